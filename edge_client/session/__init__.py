"""Taking part in a job: join, fetch, prepare, train, send, receipt; a module a step, and `run` their straight line."""

from edge_client.session.fetch import fetch_base
from edge_client.session.participant import Participant
from edge_client.session.run import AwaitsApproval, take_part
from edge_client.session.snapshots import SAVE_SECONDS, SnapshotSchedule

__all__ = ["SAVE_SECONDS", "AwaitsApproval", "Participant", "SnapshotSchedule", "fetch_base", "take_part"]
