"""Who is known, in SQL: keys that have signed in, what they may take part in, and tokens. Every public method is one
transaction, committed when it returns."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

from sqlalchemy import delete, func, not_, select
from sqlalchemy.orm import Session

from coordinator.storage.database import Database
from coordinator.storage.schema import Pass, Person, Token
from oneround.errors import Denied, NotEnough, NotFound
from oneround.v1 import federation_pb2 as pb

EVERY = ""  # a pass or a token for every job
MOST_WAITING = 500  # clients that ask to be let into one job


class People:
    """The coordinator's memory of keys, passes and tokens."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # Clients

    def record_seen(self, client_id: str, name: str, now: float) -> None:
        """Take down that a client was here, under this name."""
        with self._database.writes() as session:
            _person(session, client_id, name, now)

    def banned(self) -> set[str]:
        """Client ids that are kept out of everything."""
        with self._database.reads() as session:
            return set(session.scalars(select(Person.client_id).where(Person.banned)))

    def passes_of(self, client_id: str) -> set[str]:
        """The jobs that a client has a pass for; EVERY among them, if for every one."""
        with self._database.reads() as session:
            return set(session.scalars(select(Pass.job).where(Pass.client_id == client_id, Pass.granted)))

    def request_pass(self, client_id: str, job: str, name: str, now: float) -> None:
        """Take down that a client asks to take part in a job. Asking again changes nothing.

        Raises:
            NotEnough: as many as an operator can look at wait already.
        """
        with self._database.writes() as session:
            has_asked = session.get(Pass, (client_id, job)) is not None
            asking = select(func.count()).where(Pass.job == job, not_(Pass.granted))
            if not has_asked and (session.scalar(asking) or 0) >= MOST_WAITING:
                raise NotEnough(f"too many wait to be let into {job!r}", hint="tell the operator, and ask again later")
            _person(session, client_id, name, now)
            if not has_asked:
                session.add(Pass(client_id=client_id, job=job, granted=False, how="", at=now))

    def grant_pass(self, client_id: str, job: str, name: str, how: str, now: float) -> None:
        """Let a client take part in a job from now on."""
        with self._database.writes() as session:
            _person(session, client_id, name, now)
            _grant(session, client_id, job, how, now)

    def everybody(self, job: str = "") -> list[tuple[Person, list[Pass]]]:
        """Everybody, or those with something to do with a job; who was seen last comes first."""
        with self._database.reads() as session:
            passes: dict[str, list[Pass]] = {}
            for row in session.scalars(select(Pass).order_by(Pass.job)):
                passes.setdefault(row.client_id, []).append(row)
            people = session.scalars(select(Person).order_by(Person.last_seen.desc(), Person.client_id)).all()
        everybody = [(person, passes.get(person.client_id, [])) for person in people]
        return [(person, own) for person, own in everybody if not job or any(p.job in (job, EVERY) for p in own)]

    def settle(self, client_id: str, job: str, settlement: pb.Settlement.ValueType, why: str, now: float) -> None:
        """Take down the operator's decision about a client."""
        with self._database.writes() as session:
            person = session.get_one(Person, client_id)
            if settlement == pb.SETTLEMENT_APPROVE:
                _grant(session, client_id, job, "approved", now)
            elif settlement == pb.SETTLEMENT_REFUSE:
                refused = delete(Pass).where(Pass.client_id == client_id)
                session.execute(refused.where(Pass.job == job) if job else refused)
            else:
                person.banned = settlement == pb.SETTLEMENT_BAN
                person.why = why

    # Tokens

    def create_token(self, job: str, expires: float, uses: int, note: str, now: float) -> tuple[Token, str]:
        """A token, and its secret, of which only a digest is kept."""
        secret = secrets.token_urlsafe(16)
        token = Token(
            id=secrets.token_hex(4),
            digest=_digest(secret),
            job=job,
            note=note,
            created=now,
            expires=expires,
            uses=uses,
            used=0,
            revoked=False,
        )
        with self._database.writes() as session:
            session.add(token)
        return token, secret

    def tokens(self) -> Sequence[Token]:
        """Newest first."""
        with self._database.reads() as session:
            return session.scalars(select(Token).order_by(Token.created.desc(), Token.id)).all()

    def revoke(self, id: str) -> Token:
        """Raises NotFound when there is no such token."""
        with self._database.writes() as session:
            token = session.get(Token, id)
            if token is None:
                raise NotFound(f"there is no token {id!r}", hint="coordinator token list")
            token.revoked = True
            return token

    def redeem(self, secret: str, client_id: str, now: float) -> str:
        """Let a client into the job of a token; returns the job. For a client that is in already, by this token or
        otherwise, it changes nothing, even if the token is used up, over or revoked.

        Raises:
            Denied: there is no such token, or it lets nobody in any more.
        """
        with self._database.writes() as session:
            token = session.scalar(select(Token).where(Token.digest == _digest(secret)))
            if token is None:
                raise Denied("this token is not known here", hint="ask the operator for one: coordinator token create")
            _person(session, client_id, "", now)
            row = session.get(Pass, (client_id, token.job))
            if row is not None and row.granted:
                return token.job
            for over, why in (
                (token.revoked, "was revoked"),
                (now > token.expires, "has expired"),
                (token.uses and token.used >= token.uses, "was used by somebody else already"),
            ):
                if over:
                    raise Denied(f"this token {why}", hint="ask the operator for another: coordinator token create")
            token.used += 1
            _grant(session, client_id, token.job, _by(token), now)
            return token.job

    def forget(self, job: str) -> None:
        """Drop the passes and tokens of a job."""
        with self._database.writes() as session:
            session.execute(delete(Pass).where(Pass.job == job, Pass.job != EVERY))
            session.execute(delete(Token).where(Token.job == job, Token.job != EVERY))


def _person(session: Session, client_id: str, name: str, now: float) -> None:
    person = session.get(Person, client_id)
    if person is None:
        session.add(Person(client_id=client_id, name=name, first_seen=now, last_seen=now, banned=False, why=""))
        session.flush()
    else:
        person.name, person.last_seen = name or person.name, now


def _grant(session: Session, client_id: str, job: str, how: str, now: float) -> None:
    row = session.get(Pass, (client_id, job))
    if row is None:
        session.add(Pass(client_id=client_id, job=job, granted=True, how=how, at=now))
    elif not row.granted or how != "open":
        row.granted, row.how, row.at = True, how, now


def _by(token: Token) -> str:
    return f"token {token.id}"


def _digest(secret: str) -> str:
    """Of 128 random bits; what is as long as that needs no salt and no slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()
