"""The client: trains on local files, sends one adapter, and uses the result."""
