"""`edge-client`: the participant's command line."""
