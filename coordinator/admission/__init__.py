"""Whether a contribution takes part: looked at by itself, then held against its cohort.

Three tables, in the order in which they are asked; the first reason stands. A new check is a function and a line.

- `soundness.CHECKS`: of one contribution, when it has come in. What it says of itself and what its file holds; in a
  process of its own (worker.py), since the file is a stranger's.
- `outliers.CHECKS`: of a cohort, when a version is made. Who is set aside, and who is scaled down.
- `unreadable.REASONS`: of what could not be looked at, by what happened to the look.

A reason is one line of text for people: the operator reads it in a table and the client is sent it.
"""
