"""From a closed round to a verified publication."""
