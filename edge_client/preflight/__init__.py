"""Whether a job fits this machine: disk, memory, compatibility."""
