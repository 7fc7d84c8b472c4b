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

    def seen(self, client_id: str, name: str, now: float) -> None:
        """A client asks for something."""
        with self._database.writes() as session:
            _person(session, client_id, name, now)

    def banned(self) -> set[str]:
        """Client ids that are kept out of everything."""
        with self._database.reads() as session:
            return set(session.scalars(select(Person.client_id).where(Person.banned)))

    def jobs_of(self, client_id: str) -> set[str]:
        """The jobs that a client has a pass for; EVERY among them, if for every one."""
        with self._database.reads() as session:
            return set(session.scalars(select(Pass.job).where(Pass.client_id == client_id, Pass.granted)))

    def asks(self, client_id: str, job: str, name: str, now: float) -> None:
        """A client would take part in a job that takes approval. It may ask as often as it likes.

        Raises:
            NotEnough: as many as an operator can look at wait already.
        """
        with self._database.writes() as session:
            known = session.get(Pass, (client_id, job)) is not None
            asking = select(func.count()).where(Pass.job == job, not_(Pass.granted))
            if not known and (session.scalar(asking) or 0) >= MOST_WAITING:
                raise NotEnough(f"too many wait to be let into {job!r}", hint="tell the operator, and ask again later")
            _person(session, client_id, name, now)
            if not known:
                session.add(Pass(client_id=client_id, job=job, granted=False, how="", at=now))

    def lets_in(self, client_id: str, job: str, name: str, how: str, now: float) -> None:
        """A client may take part in a job from now on."""
        with self._database.writes() as session:
            _person(session, client_id, name, now)
            _grant(session, client_id, job, how, now)

    def known(self, job: str = "") -> list[tuple[Person, list[Pass]]]:
        """Everybody, or those with something to do with a job; who was seen last comes first."""
        with self._database.reads() as session:
            passes: dict[str, list[Pass]] = {}
            for each in session.scalars(select(Pass).order_by(Pass.job)):
                passes.setdefault(each.client_id, []).append(each)
            people = session.scalars(select(Person).order_by(Person.last_seen.desc(), Person.client_id)).all()
            known = [(person, passes.get(person.client_id, [])) for person in people]
        return [(person, given) for person, given in known if not job or any(p.job in (job, EVERY) for p in given)]

    def settle(self, client_id: str, job: str, settlement: pb.Settlement.ValueType, why: str, now: float) -> None:
        """The operator's decision of a client."""
        with self._database.writes() as session:
            person = session.get_one(Person, client_id)
            if settlement == pb.SETTLEMENT_APPROVE:
                _grant(session, client_id, job, "approved", now)
            elif settlement == pb.SETTLEMENT_REFUSE:
                given = delete(Pass).where(Pass.client_id == client_id)
                session.execute(given.where(Pass.job == job) if job else given)
            else:
                person.banned = settlement == pb.SETTLEMENT_BAN
                person.why = why

    # Tokens

    def create_token(self, job: str, expires: float, uses: int, note: str, now: float) -> tuple[Token, str]:
        """A token, and its secret, of which only a digest is kept."""
        secret = secrets.token_urlsafe(16)
        made = Token(
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
            session.add(made)
        return made, secret

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
        """A client brings a token, and may take part in the job that it is for, which is returned. For whoever is in,
        by it or otherwise, bringing it changes nothing, when it is used up, over or revoked too.

        Raises:
            Denied: there is no such token, or nobody comes in by it any more.
        """
        with self._database.writes() as session:
            token = session.scalar(select(Token).where(Token.digest == _digest(secret)))
            if token is None:
                raise Denied("this token is not known here", hint="ask the operator for one: coordinator token create")
            _person(session, client_id, "", now)
            there = session.get(Pass, (client_id, token.job))
            if there is not None and there.granted:
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
        """A job is gone, and what was given out for it."""
        with self._database.writes() as session:
            session.execute(delete(Pass).where(Pass.job == job, Pass.job != EVERY))
            session.execute(delete(Token).where(Token.job == job, Token.job != EVERY))


def _person(session: Session, client_id: str, name: str, now: float) -> None:
    there = session.get(Person, client_id)
    if there is None:
        session.add(Person(client_id=client_id, name=name, first_seen=now, last_seen=now, banned=False, why=""))
        session.flush()
    else:
        there.name, there.last_seen = name or there.name, now


def _grant(session: Session, client_id: str, job: str, how: str, now: float) -> None:
    there = session.get(Pass, (client_id, job))
    if there is None:
        session.add(Pass(client_id=client_id, job=job, granted=True, how=how, at=now))
    elif not there.granted or how != "open":
        there.granted, there.how, there.at = True, how, now


def _by(token: Token) -> str:
    return f"token {token.id}"


def _digest(secret: str) -> str:
    """Of 128 random bits; what is as long as that needs no salt and no slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()
