"""The daemon: announces jobs, takes contributions, averages, publishes. No training framework."""
