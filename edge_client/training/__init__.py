"""One training recipe for every backend, and the snapshot to resume from."""
