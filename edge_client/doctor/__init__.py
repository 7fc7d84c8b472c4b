"""`edge-client doctor`: what would stop this machine from taking part."""
