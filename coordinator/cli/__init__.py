"""`coordinator`: the operator's command line."""
