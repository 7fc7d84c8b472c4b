"""Kinds of update: what a client trains and sends, and a coordinator averages.

- `update.py`: what an update is, whatever its kind: one module's change of a weight, and many of them by name.
- `kinds.py`: what a kind has to know of a job, and the table of kinds, by the name of their table in a job file.
- `sizes.py`: bytes of uploads, snapshots and finished updates of a job.
- `low_rank.py`, `truncate.py`, `lora.py`: LoRA, which is the first kind.

A new kind is a class of module updates, a module like `lora.py`, a line in `kinds.KINDS`, and its cases in the oneofs
`JobSpec.update` and `Module.tuned` of the wire.
"""
