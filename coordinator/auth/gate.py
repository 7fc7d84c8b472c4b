"""The gate: authenticates who calls, and authorises what they may see and do. Every call of a client passes here before
it gets to the daemon."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Mapping, Sequence

import structlog

from coordinator.auth import policy
from coordinator.auth.policy import Caller
from coordinator.auth.sessions import SCHEME, SESSION_SECONDS, Sessions
from coordinator.storage.people import EVERY, People
from coordinator.storage.schema import Person, Token
from oneround import lan
from oneround.errors import Denied, NotFound, NotSignedIn, Refused, UsageError
from oneround.signing import public_id
from oneround.text import label
from oneround.v1 import federation_pb2 as pb

LONGEST_TOKEN_SECONDS = 366 * 86400.0
LOOK_AGAIN = 15.0  # seconds between two looks at this machine's addresses

log = structlog.get_logger()
offload = asyncio.to_thread


class Gate:
    """Authenticates clients and the operator, and authorises clients. Methods raise OneroundError."""

    def __init__(
        self,
        people: People,
        access: Callable[[str], str],
        sessions: Sessions,
        admin_token: str,
        clock: Callable[[], float],
    ) -> None:
        """`access` gives a job's JobSpec.access.who by its name, and raises NotFound."""
        self._people, self._access_of, self._sessions, self._clock = people, access, sessions, clock
        self._admin = f"Bearer {admin_token}"
        self._banned = people.banned()
        self._interfaces, self._looked = lan.interfaces(), clock()

    # Authentication

    def challenge(self) -> pb.ChallengeReply:
        return pb.ChallengeReply(challenge=self._sessions.challenge())

    async def sign_in(self, request: pb.SignInRequest) -> pb.SignInReply:
        """A session for a client that proves to hold its key; a token in the request is redeemed.

        Raises:
            NotSignedIn: the proof is invalid.
            Denied: the client is banned, or its token lets nobody in.
        """
        client_id = self._sessions.authenticate(request)
        self._require_not_banned(client_id)
        reply = pb.SignInReply(session=self._sessions.issue(client_id), holds_seconds=SESSION_SECONDS)
        if request.token:
            reply.job = await offload(self._people.redeem, request.token, client_id, self._clock())
            log.info("token_redeemed", job=reply.job, id=public_id(client_id))
        return reply

    def authenticate(self, metadata: Mapping[str, str | bytes], peer: str) -> Caller:
        """Who makes a call, by its session or the admin token.

        Raises:
            NotSignedIn: the call has neither.
            Denied: the client is banned.
        """
        authorization = str(metadata.get("authorization", ""))
        if self.is_operator(authorization):
            return Caller(operator=True)
        if not authorization.startswith(SCHEME):
            raise NotSignedIn("this call needs a session", hint="update oneround, or run the same command again")
        client_id = self._sessions.client_id(authorization.removeprefix(SCHEME))
        self._require_not_banned(client_id)
        return Caller(client_id, self._is_local(peer))

    def is_operator(self, authorization: str) -> bool:
        return hmac.compare_digest(authorization.encode(), self._admin.encode())

    def _require_not_banned(self, client_id: str) -> None:
        if client_id in self._banned:
            raise Denied("the operator has banned this client", hint=f"ask them; its id is {public_id(client_id)}")

    def _is_local(self, peer: str) -> bool:
        if self._clock() - self._looked > LOOK_AGAIN:
            self._interfaces, self._looked = lan.interfaces(), self._clock()
        return policy.is_local(peer, self._interfaces)

    # Authorisation

    async def visible(self, caller: Caller, jobs: Sequence[str]) -> list[str]:
        """Those of the jobs that a caller may know of."""
        passes = await self._passes(caller)
        return [name for name in jobs if self._access(caller, name, passes) != "out"]

    async def require_visible(self, caller: Caller, job: str) -> None:
        """Raises NotFound for a caller that may not know of a job, as if there were none."""
        if self._access(caller, job, await self._passes(caller)) == "out":
            raise self._hidden(job)

    async def require_member(self, caller: Caller, job: str) -> None:
        """Raises NotFound or Denied for a caller that may not take part in a job."""
        access = self._access(caller, job, await self._passes(caller))
        if access == "out":
            raise self._hidden(job)
        if access == "may ask":
            raise Denied(
                f"the operator has not let this client into {job!r}",
                hint=f"edge-client join --job {job}, to ask; its id is {public_id(caller.client_id)}",
            )

    async def may_join(self, caller: Caller, job: str, name: str) -> bool:
        """Whether a client may join a job now. If the operator has to approve first, its request is taken down.

        Raises:
            NotFound: the client may not know of the job.
            NotEnough: too many wait for the operator already.
        """
        if not caller.client_id:
            raise UsageError("the operator's credential is no client's")
        passes = await self._passes(caller)
        access = self._access(caller, job, passes)
        if access == "out":
            raise self._hidden(job)
        if access == "may ask":
            name = label(name) or public_id(caller.client_id)
            await offload(self._people.request_pass, caller.client_id, job, name, self._clock())
            log.info("asks_to_join", job=job, client=name, id=public_id(caller.client_id))
            return False
        return True

    async def joined(self, caller: Caller, job: str, name: str) -> None:
        """A client has joined a job. It gets a pass, so that it stays in when it resumes from another network."""
        passes = await self._passes(caller)
        name = label(name) or public_id(caller.client_id)
        if job not in passes and self._access(caller, job, passes) == "in":  # the operator may have refused it since
            how = "every job" if EVERY in passes else "open"
            await offload(self._people.grant_pass, caller.client_id, job, name, how, self._clock())
        else:
            await offload(self._people.record_seen, caller.client_id, name, self._clock())

    async def _passes(self, caller: Caller) -> set[str]:
        return await offload(self._people.passes_of, caller.client_id) if caller.client_id else set()

    def _access(self, caller: Caller, job: str, passes: set[str]) -> policy.Access:
        try:
            job_access = self._access_of(job)
        except NotFound:
            raise self._hidden(job) from None  # in the same words as for one that is hidden
        return policy.access(job_access, local=caller.local, passed=caller.operator or EVERY in passes or job in passes)

    def _hidden(self, job: str) -> NotFound:
        return NotFound(
            f"there is no job {job!r} for this client",
            hint="if it takes a token, ask the operator for one: coordinator token create prints the command",
        )

    # The operator

    async def create_token(self, request: pb.CreateTokenRequest) -> pb.CreateTokenReply:
        """A token, and its secret, which nobody can look up later.

        Raises:
            NotFound: there is no such job.
            UsageError: the token would be valid for no time, or too long.
        """
        if request.job:
            self._access_of(request.job)
        if not 1 <= request.holds_seconds <= LONGEST_TOKEN_SECONDS:
            raise UsageError("a token holds from a second to 366 days")
        now, note = self._clock(), label(request.note, 200)
        expires = now + request.holds_seconds
        token, secret = await offload(self._people.create_token, request.job, expires, request.uses, note, now)
        log.info("token_created", token=token.id, job=request.job, uses=request.uses, note=note)
        return pb.CreateTokenReply(token=_token(token), secret=secret)

    async def list_tokens(self) -> pb.ListTokensReply:
        return pb.ListTokensReply(tokens=map(_token, await offload(self._people.tokens)))

    async def revoke_token(self, id: str) -> pb.Token:
        token = await offload(self._people.revoke, id)
        log.info("token_revoked", token=id)
        return _token(token)

    async def list_clients(self, job: str = "") -> pb.ListClientsReply:
        """Everybody, or the clients with a pass for a job or a request for one; who was seen last comes first."""
        people = await offload(self._people.everybody, job)
        return pb.ListClientsReply(
            clients=[
                pb.KnownClient(
                    id=public_id(person.client_id),
                    name=person.name,
                    first_seen_unix=person.first_seen,
                    last_seen_unix=person.last_seen,
                    banned=person.banned,
                    why=person.why,
                    passes=[pb.Pass(job=row.job, granted=row.granted, how=row.how) for row in passes],
                )
                for person, passes in people
            ]
        )

    async def settle(self, request: pb.SettleRequest) -> pb.KnownClient:
        """Approve, refuse, ban or unban a client.

        Raises:
            NotFound: there is no such client or job.
            Refused: several clients have this name.
        """
        if request.settlement not in pb.Settlement.values() or not request.settlement:
            raise UsageError("the request holds no decision")
        if request.job:
            self._access_of(request.job)
        person = _named(request.client, [person for person, _ in await offload(self._people.everybody)])
        why = label(request.why, 500)
        await offload(self._people.settle, person.client_id, request.job, request.settlement, why, self._clock())
        self._banned = await offload(self._people.banned)
        decision = pb.Settlement.Name(request.settlement).removeprefix("SETTLEMENT_").lower()
        log.info("settled", client=person.name, id=public_id(person.client_id), decision=decision, job=request.job)
        listed = await self.list_clients()
        return next(client for client in listed.clients if client.id == public_id(person.client_id))


def _named(name_or_id: str, people: Sequence[Person]) -> Person:
    """Somebody by id, or by a name that only one has. Who takes another's id for a name is found by its own id."""
    matching = [person for person in people if name_or_id == public_id(person.client_id)]
    matching = matching or [person for person in people if name_or_id == person.name]
    if len(matching) == 1:
        return matching[0]
    if not matching:
        raise NotFound(f"no client {name_or_id!r} is known here", hint="coordinator clients")
    ids = ", ".join(public_id(person.client_id) for person in matching)
    raise Refused(f"{len(matching)} clients are called {name_or_id!r}", hint=f"name one by its id: {ids}")


def _token(row: Token) -> pb.Token:
    return pb.Token(
        id=row.id,
        job=row.job,
        note=row.note,
        created_unix=row.created,
        expires_unix=row.expires,
        uses=row.uses,
        used=row.used,
        revoked=row.revoked,
    )
