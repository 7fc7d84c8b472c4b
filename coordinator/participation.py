"""What clients do in a job: join, train, send a contribution, fetch files, report, leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog

from coordinator import round as rounds
from coordinator.admission.worker import AdmissionWorker
from coordinator.auth.signer import Signer
from coordinator.jobs import evaluations
from coordinator.jobs.leases import Lease, Leases
from coordinator.jobs.status import Statuses
from coordinator.round_driver import RoundDriver
from coordinator.storage.blobs import Blobs
from coordinator.storage.contributions import judgement
from coordinator.storage.publications import version_folder
from coordinator.storage.schema import Client, Contribution
from coordinator.storage.store import Store
from coordinator.uploads.flow_control import PacedStream
from coordinator.uploads.service import UploadService
from oneround.errors import BadModel, Denied, NotFound, Refused
from oneround.signing import public_id
from oneround.text import label
from oneround.v1 import federation_pb2 as pb

log = structlog.get_logger()
offload = asyncio.to_thread


class Participation:
    """The clients' calls; the gate has authorised them. Methods raise OneroundError."""

    def __init__(
        self,
        state: Path,
        store: Store,
        blobs: Blobs,
        signer: Signer,
        driver: RoundDriver,
        leases: Leases,
        statuses: Statuses,
        uploads: UploadService,
        admission: AdmissionWorker,
        clock: Callable[[], float],
    ) -> None:
        self._state, self._store, self._blobs, self._signer, self._driver = state, store, blobs, signer, driver
        self._leases, self._statuses, self._uploads, self._admission = leases, statuses, uploads, admission
        self._clock = clock

    async def join(self, request: pb.JoinRequest, client_id: str) -> pb.JoinReply:
        """A lease and the job for a client; the receipt too, if its contribution is in."""
        name = request.job
        job = await self.describe(name)
        contribution = await offload(self._store.contribution, name, client_id)
        round = await self._driver.current(name)
        if contribution is None and not rounds.takes_contributions(round, self._clock()):
            raise Refused(
                f"job {name!r} takes no more contributions: it is {round.state} ({round.reason})",
                hint=f"edge-client pull {name}",
            )
        machine = pb.Machine(
            platform=label(request.machine.platform),
            backend=label(request.machine.backend),
            device=label(request.machine.device),
        )
        known_as = label(request.client_name) or public_id(client_id)
        row = Client.joining(name, client_id, known_as, machine, self._clock())
        client = await offload(self._store.join, row)
        self._leases.heard(self._leases.hold(client, contribution))
        log.info("joined", job=name, client=client.name, backend=machine.backend)
        await self._statuses.changed(name)
        reply = pb.JoinReply(lease=client.lease, job=job)
        if contribution is not None:
            reply.receipt.CopyFrom(self._signer.receipt(contribution))
            reply.judgement.CopyFrom(judgement(contribution))
            reply.may_replace = contribution.may_replace
        return reply

    async def heartbeat(self, beat: pb.HeartbeatRequest) -> pb.HeartbeatReply:
        """Note how training goes; say whether to go on."""
        lease = await self._lease(beat.lease)
        self._leases.heard(lease, beat)
        reply = pb.HeartbeatReply(directive=pb.DIRECTIVE_CONTINUE, next_seconds=self._leases.pace)
        client = lease.client
        if lease.contributed:
            if lease.judgement is None:
                contribution = await offload(self._store.contribution, client.job, client.client_id)
                assert contribution is not None, "contributions do not go while their job is there"
                lease.judgement = judgement(contribution)
            reply.judgement.CopyFrom(lease.judgement)
            return reply
        round = await self._driver.current(client.job)
        if client.withdrawn or not rounds.takes_contributions(round, self._clock()):
            why = "this client has withdrawn" if client.withdrawn else f"the round is {round.state}: {round.reason}"
            return pb.HeartbeatReply(directive=pb.DIRECTIVE_STOP, reason=why)
        return reply

    async def withdraw(self, token: str) -> None:
        """A client leaves; its upload is dropped, and its contribution takes no part in the versions to come."""
        lease = await self._lease(token)
        client = lease.client
        if lease.uploading:
            raise Refused("a stream of this client is still open")
        contribution = await offload(self._store.contribution, client.job, client.client_id)
        before = lease.unrecorded
        await offload(self._store.withdraw, client, self._clock(), before)
        lease.recorded(before)
        client.withdrawn = True
        self._uploads.release(client)
        log.info("withdrawn", job=client.job, client=client.name)
        if contribution is not None:
            await self._driver.renew(client.job, f"{client.name} has withdrawn")
        await self._statuses.changed(client.job)

    async def report(self, request: pb.ReportRequest) -> None:
        """Keep how a publication does on a client's data.

        Raises:
            UsageError: a number is missing or invalid.
            NotFound: there is no such version.
        """
        lease = await self._lease(request.lease)
        evaluations.check(request.evaluation)
        await offload(self._store.report, lease.client, request.evaluation, self._clock())
        log.info("evaluated", job=lease.client.job, client=lease.client.name, version=request.evaluation.version)

    async def open_upload(self, request: pb.OpenUploadRequest) -> pb.OpenUploadReply:
        """How much of the declared contribution is here; its receipt when all of it is."""
        lease = await self._lease(request.lease)
        self._leases.heard(lease)
        return await self._uploads.open(lease, request.declaration, await self._driver.current(lease.client.job))

    async def upload(self, token: str, messages: PacedStream[pb.UploadRequest]) -> pb.Receipt:
        """Take the bytes of a contribution; the receipt once they are safe. It is judged after that."""
        lease = await self._lease(token)
        self._leases.heard(lease)
        contribution = await self._uploads.take(lease, messages)
        self._leases.judged(contribution)
        size = contribution.size
        log.info("contribution", job=contribution.job, client=lease.client.name, digest=contribution.digest, size=size)
        self._leases.heard(lease)
        self._admission.look()
        await self._statuses.changed(contribution.job)
        return self._signer.receipt(contribution)

    async def judged(self, contribution: Contribution) -> None:
        """A contribution was looked at. The loop advances its round; a thousand that come at once are not worth a
        thousand looks at it."""
        client = public_id(contribution.client_id)
        verdict, reason = contribution.verdict, contribution.reason
        log.info("judged", job=contribution.job, client=client, verdict=verdict, reason=reason)
        self._leases.judged(contribution)
        await self._statuses.changed(contribution.job)

    async def file(self, name: str, digest: str) -> Path:
        """The file of one of a job's artifacts.

        Raises:
            NotFound: the job has none of this digest.
            BadModel: the base model's file has changed.
        """
        announced = await offload(self._store.announced, name)
        if digest == announced.job.initial.digest:
            return await offload(self._blobs.path, digest)
        for artifact in announced.job.base_files:
            if artifact.digest == digest:
                file = Path(announced.base_folder) / artifact.name
                if not file.is_file() or file.stat().st_size != artifact.size:
                    raise BadModel(
                        f"the base model of {name!r} has changed on the coordinator since the job was submitted",
                        hint=f"put {artifact.name} back as it was, or submit a new job",
                    )
                return file
        for published in await offload(self._store.publications, name):
            for artifact in published.artifacts:
                if artifact.digest == digest:
                    return version_folder(self._state, name, published.version) / artifact.name
        raise NotFound(f"job {name!r} has no artifact {digest!r}")

    async def describe(self, name: str) -> pb.Job:
        """The job that joining would announce. Raises NotFound when there is no such job."""
        return (await offload(self._store.announced, name)).job

    async def job_of(self, token: str, client_id: str) -> str:
        """The job that a lease is for.

        Raises:
            Denied: the lease is unknown, or another client's.
        """
        client = (await self._lease(token)).client
        if client.client_id != client_id:
            raise Denied("this lease is another client's", hint="edge-client join again")
        return client.job

    async def only_open(self, among: Iterable[str]) -> str:
        """The only one of some jobs that takes contributions.

        Raises:
            Refused: there is none, or there are several.
        """
        now, current = self._clock(), await offload(self._store.rounds)
        taking = [name for name in among if name in current and rounds.takes_contributions(current[name], now)]
        if len(taking) == 1:
            return taking[0]
        if not taking:
            raise Refused("no job is open here", hint="coordinator submit JOB.toml, on the coordinator's machine")
        raise Refused(
            f"several jobs are open here: {', '.join(sorted(taking))}", hint=f"edge-client join --job {min(taking)}"
        )

    async def _lease(self, token: str) -> Lease:
        """Raises Denied when no client holds this lease."""
        lease = self._leases.get(token)
        if lease is None:
            client = await offload(self._store.client, token)
            contribution = await offload(self._store.contribution, client.job, client.client_id)
            lease = self._leases.hold(client, contribution)
        return lease
