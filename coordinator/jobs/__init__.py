"""Jobs: their file, their base model, who is at work on them, and how they stand."""
