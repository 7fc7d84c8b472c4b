"""The one upload of each client: declared, resumed, checked, committed, acknowledged."""
