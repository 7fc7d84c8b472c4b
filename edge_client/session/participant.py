"""Who takes part in jobs: a person's machine with its data and how it trains."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path

from edge_client.backends import Backend
from edge_client.pausing.controller import PauseController
from edge_client.session.snapshots import SAVE_SECONDS
from edge_client.training.recipe import EXACT, Setup
from oneround.v1 import federation_pb2 as pb


@dataclass(frozen=True)
class Participant:
    """Who takes part, with what."""

    state: Path
    name: str
    data: Path
    backend: Backend
    model: Path | None = None  # the base model's folder, if it is on this machine
    skip_bad_rows: bool = False
    save_every: float = SAVE_SECONDS  # seconds
    setup: Setup = EXACT  # how this machine trains, if memory is enough for it
    again: bool = False  # train anew, where the operator lets this machine send another contribution
    pausing: PauseController = field(default_factory=PauseController)  # keeps to the person's pause policy
    consent: str = ""  # digest of the terms that the person has agreed to
    agreed: pb.Job | None = None  # the job that was shown; no other one is taken part in

    def request(self, job: str) -> pb.JoinRequest:
        """What is said of this machine to join a job."""
        return pb.JoinRequest(
            job=job,
            client_name=self.name,
            machine=pb.Machine(
                platform=f"{platform.system()} {platform.machine()}",
                backend=self.backend.name,
                device=self.backend.device(),
            ),
        )
