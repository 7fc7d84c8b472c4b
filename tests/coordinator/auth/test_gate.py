"""Who comes in: challenges, sessions, what a job asks for, what is local, tokens, and what an operator decides."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa, x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from coordinator.auth import policy
from coordinator.auth.gate import Gate
from coordinator.auth.policy import Caller
from coordinator.auth.sessions import CHALLENGE_SECONDS, SCHEME, SESSION_SECONDS, Sessions
from coordinator.storage.people import EVERY, MOST_WAITING, People
from coordinator.storage.store import Store
from oneround import signing
from oneround.errors import Denied, NotEnough, NotFound, NotSignedIn, Refused, UsageError
from oneround.lan import Interface
from oneround.signing import public_id
from oneround.v1 import federation_pb2 as pb
from tests.clients import me

SECRET, COORDINATOR = b"s" * 32, "c" * 64
HERE, THERE = "ipv4:192.168.1.7:40000", "ipv4:8.8.4.4:40000"
WEEK = 7 * 86400.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sessions(clock: Clock) -> Sessions:
    return Sessions(SECRET, COORDINATOR, clock)


def signed_in(
    challenge: bytes, label: str = "alice", token: str = "", coordinator: str = COORDINATOR
) -> pb.SignInRequest:
    who = me(label)
    signature = signing.sign(who.key, signing.sign_in(coordinator, challenge, token))
    return pb.SignInRequest(key=who.public_key, challenge=challenge, signature=signature, token=token)


# ---- challenges ----


def test_who_signs_a_challenge_is_known_by_its_key(sessions: Sessions, clock: Clock) -> None:
    for label in ("alice", "bob"):
        assert sessions.authenticate(signed_in(sessions.challenge(), label)) == me(label).client_id
    late = sessions.challenge()
    clock.now += CHALLENGE_SECONDS
    assert sessions.authenticate(signed_in(late)) == me("alice").client_id, "within the minute"
    again = Sessions(SECRET, COORDINATOR, clock)
    assert again.authenticate(signed_in(sessions.challenge())) == me("alice").client_id, (
        "a restart forgets no challenge"
    )


def test_a_challenge_is_answered_once(sessions: Sessions, clock: Clock) -> None:
    request = signed_in(sessions.challenge())
    sessions.authenticate(request)
    others = signed_in(request.challenge, "bob")
    for seconds in (0.0, CHALLENGE_SECONDS - 1.0):
        clock.now += seconds
        sessions.authenticate(signed_in(sessions.challenge(), "carol"))  # forgets what is over
        for replayed in (request, others):
            with pytest.raises(NotSignedIn, match="has been used"):
                sessions.authenticate(replayed)
    clock.now += 2.0
    with pytest.raises(NotSignedIn, match="too old"):
        sessions.authenticate(request)


def test_challenges_that_are_over_are_forgotten(sessions: Sessions, clock: Clock) -> None:
    for _ in range(100):
        sessions.authenticate(signed_in(sessions.challenge()))
        clock.now += 1.0
    assert len(sessions._answered) <= CHALLENGE_SECONDS + 1


def test_challenges_of_nobody(sessions: Sessions, clock: Clock) -> None:
    """Made up, cut, changed, of another coordinator, of a session, from the future, and too old."""
    good = sessions.challenge()
    foreign = Sessions(b"t" * 32, COORDINATOR, clock).challenge()
    issued = base64.urlsafe_b64decode(sessions.issue(me("alice").client_id))
    bent = [bytes([*good[:at], good[at] ^ 1, *good[at + 1 :]]) for at in (0, 15, 16, 23, 24, 55)]
    for challenge in (b"", bytes(56), good[:-1], good[1:], good + b"x", good * 2, foreign, issued, *bent):
        with pytest.raises(NotSignedIn, match="not one of this coordinator's"):
            sessions.authenticate(signed_in(challenge))
    clock.now -= 1.0
    with pytest.raises(NotSignedIn, match="too old"):
        sessions.authenticate(signed_in(good))
    clock.now += CHALLENGE_SECONDS + 2.0
    with pytest.raises(NotSignedIn, match="too old"):
        sessions.authenticate(signed_in(good))
    assert not sessions._answered


def test_what_is_no_ed25519_key(sessions: Sessions) -> None:
    weak = rsa.generate_private_key(65537, 2048)
    curve = ec.generate_private_key(ec.SECP256R1())
    exchange = x25519.X25519PrivateKey.generate().public_key()
    raw = me("alice").key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    for key, der in [
        (weak, signing.spki(weak)),
        (curve, signing.spki(curve)),
        (None, exchange.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)),
        (None, raw),
        (None, b""),
        (None, me("alice").public_key[:-1]),
        (None, me("alice").public_key + b"x"),
    ]:
        challenge = sessions.challenge()
        said = signing.sign_in(COORDINATOR, challenge, "")
        signature = signing.sign(key, said) if key else me("alice").key.sign(said)
        with pytest.raises(UsageError, match="key"):
            sessions.authenticate(pb.SignInRequest(key=der, challenge=challenge, signature=signature))


def test_signatures_of_something_else(sessions: Sessions) -> None:
    """For another coordinator, for one without TLS, of another token, challenge or key, of other bytes, and none."""
    challenge, other = sessions.challenge(), sessions.challenge()
    requests = [
        signed_in(challenge, coordinator="d" * 64),
        signed_in(challenge, coordinator=""),
        signed_in(challenge, token="a token"),
        signed_in(other),
        signed_in(challenge, "bob"),
    ]
    for request in requests:
        request.challenge, request.key, request.token = challenge, me("alice").public_key, "another token"
    plain = pb.SignInRequest(key=me("alice").public_key, challenge=challenge)
    raw = pb.SignInRequest(
        key=me("alice").public_key, challenge=challenge, signature=signing.sign(me("alice").key, challenge)
    )
    for request in (*requests, plain, raw):
        with pytest.raises(NotSignedIn, match="not this key's, or not for this coordinator"):
            sessions.authenticate(request)
    assert sessions.authenticate(signed_in(challenge)), "none of them has used it up"


@given(st.binary(max_size=200), st.binary(max_size=200), st.binary(max_size=100), st.text(max_size=20))
def test_bytes_that_sign_nobody_in(key: bytes, challenge: bytes, signature: bytes, token: str) -> None:
    sessions = Sessions(SECRET, COORDINATOR, Clock())
    whole = signed_in(sessions.challenge())
    for request in (
        pb.SignInRequest(key=key, challenge=challenge, signature=signature, token=token),
        pb.SignInRequest(key=key, challenge=whole.challenge, signature=whole.signature),
        pb.SignInRequest(key=whole.key, challenge=whole.challenge, signature=signature, token=token),
    ):
        with pytest.raises((NotSignedIn, UsageError)):
            sessions.authenticate(request)


# ---- sessions ----


def test_a_session_speaks_for_its_client_until_it_is_over(sessions: Sessions, clock: Clock) -> None:
    session = sessions.issue(me("alice").client_id)
    clock.now += SESSION_SECONDS
    assert sessions.client_id(session) == me("alice").client_id
    assert Sessions(SECRET, COORDINATOR, clock).client_id(session) == me("alice").client_id, "a restart ends none"
    clock.now += 1.0
    with pytest.raises(NotSignedIn, match="is over"):
        sessions.client_id(session)


def test_sessions_of_nobody(sessions: Sessions, clock: Clock) -> None:
    good = sessions.issue(me("alice").client_id)
    raw = base64.urlsafe_b64decode(good)
    bent = [bytes([*raw[:at], raw[at] ^ 1, *raw[at + 1 :]]) for at in (0, 15, 16, 23, 24, 55)]
    longer = raw[:16] + struct.pack(">d", clock.now + 1e6) + raw[24:]
    never = raw[:16] + struct.pack(">d", float("nan")) + raw[24:]
    another = bytes.fromhex(me("bob").client_id) + raw[16:]
    made = [raw[:-1], raw[1:], raw + b"x", raw[:24], sessions.challenge(), longer, never, another, bytes(56), *bent]
    foreign = Sessions(b"t" * 32, COORDINATOR, clock).issue(me("alice").client_id)
    given_texts = ["", "=", "a", "é", "\0", good[:-4], "x" * 10_000, foreign]
    for session in [*given_texts, *(base64.urlsafe_b64encode(each).decode() for each in made)]:
        with pytest.raises(NotSignedIn, match="needs a session"):
            sessions.client_id(session)


@given(st.text(max_size=120))
def test_texts_that_are_no_session(text: str) -> None:
    with pytest.raises(NotSignedIn):
        Sessions(SECRET, COORDINATOR, Clock()).client_id(text)


# ---- decisions ----


@pytest.mark.parametrize(
    ("who", "local", "passed", "standing"),
    [
        ("open", True, False, "in"),
        ("open", False, False, "out"),
        ("open", False, True, "in"),
        ("open", True, True, "in"),
        ("token", True, False, "out"),
        ("token", False, False, "out"),
        ("token", False, True, "in"),
        ("token", True, True, "in"),
        ("approved", True, False, "may ask"),
        ("approved", False, False, "out"),
        ("approved", False, True, "in"),
        ("approved", True, True, "in"),
        ("something new", True, False, "out"),
    ],
)
def test_where_one_stands(who: str, local: bool, passed: bool, standing: str) -> None:
    assert policy.access(who, local=local, passed=passed) == standing


OWN = [
    Interface("eth0", frozenset({"up"}), ("203.0.114.5", "2a01:4f8::5", "fe80::1%eth0")),
    Interface("wlan0", frozenset({"up"}), ("192.168.1.20",)),
]


@pytest.mark.parametrize(
    ("peer", "local"),
    [
        ("unix:", True),
        ("unix:/run/oneround/admin.sock", True),
        ("ipv4:127.0.0.1:50000", True),
        ("ipv4:127.8.8.8:50000", True),
        ("ipv6:[::1]:50000", True),
        ("ipv6:%5B::1%5D:50000", True),  # as gRPC writes it
        ("ipv4:10.1.2.3:50000", True),
        ("ipv4:172.16.0.1:1", True),
        ("ipv4:172.32.0.1:1", False),
        ("ipv4:192.168.1.7:50000", True),
        ("ipv4:192.169.1.7:50000", False),
        ("ipv4:169.254.10.10:50000", True),
        ("ipv6:%5Bfe80::2%25eth0%5D:50000", True),
        ("ipv6:[fe80::2]:50000", True),
        ("ipv6:[fd12:3456::1]:50000", True),
        ("ipv6:[2a01:4f8::6]:50000", False),  # a neighbour by prefix, and anybody's all the same
        ("ipv6:[2a01:4f8::5]:50000", True),  # this machine's own
        ("ipv4:203.0.114.5:50000", True),
        ("ipv4:203.0.114.6:50000", False),
        ("ipv4:8.8.8.8:50000", False),
        ("ipv4:100.64.1.2:50000", False),  # shared by a provider's customers
        ("ipv6:[::ffff:192.168.1.7]:50000", True),
        ("ipv6:[::ffff:127.0.0.1]:50000", True),
        ("ipv6:[::ffff:8.8.8.8]:50000", False),
        ("ipv6:[::ffff:203.0.114.5]:50000", True),
        ("ipv6:[64:ff9b::c0a8:107]:50000", False),
        ("ipv6:[2002:c0a8:107::1]:50000", False),  # 6to4, of a private address
        ("", False),
        ("unknown", False),
        ("ipv4:", False),
        ("ipv4::", False),
        ("ipv4:localhost:50000", False),
        ("ipv4:192.168.1:50000", False),
        ("ipv4:0300.0250.1.7:50000", False),
        ("ipv6:[::1", False),
        ("unixx:/a", False),
    ],
)
def test_what_is_local(peer: str, local: bool) -> None:
    assert policy.is_local(peer, OWN) is local


@given(st.text(max_size=60))
def test_no_name_of_a_peer_is_too_odd(text: str) -> None:
    assert policy.is_local(f"ipv4:{text}", OWN) in (True, False)


# ---- tokens ----


@pytest.fixture
def people(tmp_path: Path) -> People:
    return People(Store(f"sqlite:///{tmp_path / 'rows.sqlite'}").database)


ALICE, BOB, CAROL = (me(label).client_id for label in ("alice", "bob", "carol"))


def test_a_token_lets_in_as_many_as_it_says(people: People) -> None:
    _, once = people.create_token("notes", WEEK, 1, "", 0.0)
    assert people.redeem(once, ALICE, 1.0) == "notes" and people.passes_of(ALICE) == {"notes"}
    assert people.redeem(once, ALICE, 2.0) == "notes", "brought again, as after a restart"
    with pytest.raises(Denied, match="used by somebody else already"):
        people.redeem(once, BOB, 3.0)
    assert people.passes_of(BOB) == set() and [token.used for token in people.tokens()] == [1]

    _, twice = people.create_token("notes", WEEK, 2, "", 0.0)
    for client in (BOB, BOB, CAROL):
        people.redeem(twice, client, 4.0)
    with pytest.raises(Denied, match="used by somebody else already"):
        people.redeem(twice, "d" * 32, 5.0)

    _, many = people.create_token(EVERY, WEEK, 0, "", 0.0)
    for number in range(20):
        assert people.redeem(many, f"{number:032x}", 6.0) == EVERY
        assert people.passes_of(f"{number:032x}") == {EVERY}


def test_a_token_that_is_over(people: People) -> None:
    made, secret = people.create_token("notes", WEEK, 0, "", 0.0)
    people.redeem(secret, ALICE, WEEK)
    with pytest.raises(Denied, match="has expired"):
        people.redeem(secret, BOB, WEEK + 0.1)
    gone, revoked = people.create_token("notes", WEEK, 0, "", 0.0)
    people.redeem(revoked, CAROL, 1.0)
    assert people.revoke(gone.id).revoked
    with pytest.raises(Denied, match="was revoked"):
        people.redeem(revoked, BOB, 1.0)
    assert people.redeem(secret, ALICE, 2 * WEEK) == people.redeem(revoked, CAROL, 2 * WEEK) == "notes", (
        "who is in stays"
    )
    assert people.passes_of(BOB) == set() and BOB not in {person.client_id for person, _ in people.everybody()}
    with pytest.raises(NotFound, match="no token"):
        people.revoke("0" * 8)
    assert made.id != gone.id


def test_what_is_no_token(people: People) -> None:
    made, secret = people.create_token("notes", WEEK, 1, "", 0.0)
    for guess in ("", secret[:-1], secret + "x", secret.swapcase(), made.id, made.digest, "' OR 1=1 --", "\0", "é"):
        with pytest.raises(Denied, match="not known here"):
            people.redeem(guess, ALICE, 1.0)
    assert not people.everybody(), "who brings none is not written down"


def test_who_is_in_otherwise_uses_up_no_token_and_is_not_kept_out_by_a_used_one(people: People) -> None:
    _, secret = people.create_token("notes", WEEK, 1, "", 0.0)
    people.redeem(secret, ALICE, 1.0)
    people.settle(ALICE, "notes", pb.SETTLEMENT_APPROVE, "", 2.0)
    assert people.redeem(secret, ALICE, 3.0) == "notes", "in by the operator's word now, and the token is used up"
    _, other = people.create_token("notes", WEEK, 1, "", 0.0)
    people.redeem(other, ALICE, 4.0)
    assert people.redeem(other, BOB, 5.0) == "notes", "it was still good for one"


def test_who_was_refused_comes_in_by_no_used_token(people: People) -> None:
    _, secret = people.create_token("notes", WEEK, 1, "", 0.0)
    people.redeem(secret, ALICE, 1.0)
    people.settle(ALICE, "notes", pb.SETTLEMENT_REFUSE, "", 2.0)
    assert people.passes_of(ALICE) == set()
    with pytest.raises(Denied):
        people.redeem(secret, ALICE, 3.0)


def test_a_tokens_secret_is_nowhere_on_the_disk(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'rows.sqlite'}")
    people = People(store.database)
    _, secret = people.create_token("notes", WEEK, 1, "for the ward", 0.0)
    people.redeem(secret, ALICE, 1.0)

    def written() -> bytes:
        return b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())

    assert b"for the ward" in written() and secret.encode() not in written()
    store.close()
    assert b"for the ward" in written() and secret.encode() not in written()


def test_a_deleted_job_leaves_nobody_in_the_next_one_of_its_name(people: People) -> None:
    _, one = people.create_token("notes", WEEK, 0, "", 0.0)
    _, every = people.create_token(EVERY, WEEK, 0, "", 0.0)
    people.redeem(one, ALICE, 1.0)
    people.redeem(every, BOB, 1.0)
    people.forget("notes")
    assert (people.passes_of(ALICE), people.passes_of(BOB)) == (set(), {EVERY})
    with pytest.raises(Denied, match="not known"):
        people.redeem(one, CAROL, 2.0)
    assert people.redeem(every, CAROL, 2.0) == EVERY


def test_who_asks_again_keeps_what_it_was_given(people: People) -> None:
    people.request_pass(ALICE, "notes", "alice", 1.0)
    people.request_pass(ALICE, "notes", "alice's other name", 2.0)
    ((person, (asked,)),) = people.everybody("notes")
    assert (person.name, asked.granted, people.passes_of(ALICE)) == ("alice's other name", False, set())
    people.settle(ALICE, "notes", pb.SETTLEMENT_APPROVE, "", 3.0)
    people.request_pass(ALICE, "notes", "alice", 4.0)
    assert people.passes_of(ALICE) == {"notes"}
    assert not people.everybody("other")


def test_no_more_ask_than_an_operator_can_look_at() -> None:
    people = People(Store("sqlite://").database)
    for number in range(MOST_WAITING):
        people.request_pass(f"{number:032x}", "notes", "", 1.0)
    for _ in range(3):
        with pytest.raises(NotEnough, match="too many wait"):
            people.request_pass(ALICE, "notes", "alice", 2.0)
    people.request_pass(f"{7:032x}", "notes", "who has asked may go on asking", 2.0)
    people.request_pass(ALICE, "other", "alice", 2.0)
    people.settle(f"{7:032x}", "notes", pb.SETTLEMENT_APPROVE, "", 3.0)
    people.request_pass(ALICE, "notes", "alice", 4.0)
    assert len(people.everybody()) == MOST_WAITING + 1


# ---- the doors ----

JOBS = {"open": "open", "by-token": "token", "by-approval": "approved"}


def _who(job: str) -> str:
    if job not in JOBS:
        raise NotFound(f"there is no job {job!r} here")
    return JOBS[job]


@pytest.fixture
def gate(people: People, sessions: Sessions, clock: Clock) -> Gate:
    return Gate(people, _who, sessions, "admin", clock)


def caller(gate: Gate, sessions: Sessions, label: str, peer: str = HERE) -> Caller:
    return gate.authenticate({"authorization": SCHEME + sessions.issue(me(label).client_id)}, peer)


async def test_what_each_may_know_of(gate: Gate, sessions: Sessions) -> None:
    async def seen(who: Caller) -> list[str]:
        return await gate.visible(who, list(JOBS))

    alice, far = (caller(gate, sessions, "alice", peer) for peer in (HERE, THERE))
    assert await seen(alice) == ["open", "by-approval"] and await seen(far) == []
    assert await seen(gate.authenticate({"authorization": "Bearer admin"}, THERE)) == list(JOBS)
    assert await gate.may_join(alice, "open", "alice") and not await gate.may_join(alice, "by-approval", "alice")
    assert await seen(far) == []
    await gate.joined(alice, "open", "alice")
    assert await seen(far) == ["open"], "it joined, and goes on from another network"
    await gate.settle(pb.SettleRequest(client="alice", job="by-approval", settlement=pb.SETTLEMENT_APPROVE))
    assert await seen(far) == ["open", "by-approval"]
    made = await gate.create_token(pb.CreateTokenRequest(job="by-token", holds_seconds=60, uses=1))
    reply = await gate.sign_in(signed_in(gate.challenge().challenge, token=made.secret))
    assert reply.job == "by-token" and await seen(far) == list(JOBS)
    await gate.settle(pb.SettleRequest(client="alice", settlement=pb.SETTLEMENT_REFUSE))
    assert await seen(far) == [] and await seen(alice) == ["open", "by-approval"]


async def test_hidden_and_missing_jobs_are_told_in_the_same_words(gate: Gate, sessions: Sessions) -> None:
    async def said(call: Callable[..., object], *arguments: object) -> tuple[str, str]:
        with pytest.raises(NotFound) as caught:
            await call(*arguments)  # type: ignore[misc]
        return str(caught.value), caught.value.hint

    alice = caller(gate, sessions, "alice")
    for hidden, missing in (("by-token", "no-token"),):
        for call, more in ((gate.require_visible, ()), (gate.require_member, ()), (gate.may_join, ("alice",))):
            one, other = await said(call, alice, hidden, *more), await said(call, alice, missing, *more)
            assert (one[0].replace(hidden, missing), one[1].replace(hidden, missing)) == other


async def test_who_may_ask_gets_nothing_meanwhile(gate: Gate, sessions: Sessions) -> None:
    alice = caller(gate, sessions, "alice")
    await gate.require_visible(alice, "by-approval")
    for _ in range(2):
        with pytest.raises(Denied, match="has not let this client into") as caught:
            await gate.require_member(alice, "by-approval")
        assert public_id(alice.client_id) in caught.value.hint
        assert not await gate.may_join(alice, "by-approval", "alice")
    with pytest.raises(UsageError, match="no client's"):
        await gate.may_join(Caller(operator=True), "open", "the operator")


async def test_who_is_refused_while_it_joins_is_not_let_in_by_that(gate: Gate, sessions: Sessions) -> None:
    alice = caller(gate, sessions, "alice")
    await gate.may_join(alice, "by-approval", "alice")
    asked = pb.SettleRequest(client="alice", job="by-approval", settlement=pb.SETTLEMENT_APPROVE)
    await gate.settle(asked)
    assert await gate.may_join(alice, "by-approval", "alice")
    asked.settlement = pb.SETTLEMENT_REFUSE
    await gate.settle(asked)
    await gate.joined(alice, "by-approval", "alice")
    assert not await gate.may_join(alice, "by-approval", "alice")


async def test_who_is_banned_gets_nowhere(gate: Gate, sessions: Sessions, people: People, clock: Clock) -> None:
    await gate.joined(caller(gate, sessions, "alice"), "open", "alice")
    request = pb.SettleRequest(client="alice", settlement=pb.SETTLEMENT_BAN, why="a lost\x1b[2J laptop")
    settled = await gate.settle(request)
    assert settled.banned and settled.why == "a lost[2J laptop"
    with pytest.raises(Denied, match="has banned this client") as caught:
        caller(gate, sessions, "alice")
    assert settled.id in caught.value.hint
    with pytest.raises(Denied, match="has banned"):
        await gate.sign_in(signed_in(gate.challenge().challenge))
    after = Gate(people, _who, sessions, "admin", clock)
    with pytest.raises(Denied, match="has banned"):
        caller(after, sessions, "alice")
    await gate.settle(pb.SettleRequest(client=settled.id, settlement=pb.SETTLEMENT_UNBAN))
    assert caller(gate, sessions, "alice").client_id == ALICE


def test_metadata_that_says_nothing(gate: Gate, sessions: Sessions) -> None:
    session = sessions.issue(ALICE)
    for given_text in (
        "",
        session,
        f"session {session}",
        f"Bearer {session}",
        "Bearer",
        "Bearer ",
        "Bearer admi",
        SCHEME,
    ):
        with pytest.raises(NotSignedIn):
            gate.authenticate({"authorization": given_text}, HERE)
    with pytest.raises(NotSignedIn):
        gate.authenticate({}, HERE)
    with pytest.raises(NotSignedIn):
        gate.authenticate({"authorization": b"\xff"}, HERE)


async def test_names_do_not_stand_in_the_way(gate: Gate, sessions: Sessions) -> None:
    """Of two with one name none is meant; who takes another's id for a name is not taken for the other."""

    ids = {label: public_id(me(label).client_id) for label in ("alice", "bob", "mallory")}
    for label, name in (("alice", "ward"), ("bob", "ward"), ("mallory", ids["alice"])):
        await gate.joined(caller(gate, sessions, label), "open", name)
    with pytest.raises(Refused, match="2 clients are called 'ward'"):
        await gate.settle(pb.SettleRequest(client="ward", settlement=pb.SETTLEMENT_BAN))
    with pytest.raises(NotFound, match="no client 'nobody'"):
        await gate.settle(pb.SettleRequest(client="nobody", settlement=pb.SETTLEMENT_BAN))
    settled = await gate.settle(pb.SettleRequest(client=ids["alice"], settlement=pb.SETTLEMENT_BAN))
    assert (settled.id, settled.name, settled.banned) == (ids["alice"], "ward", True)
    await gate.settle(pb.SettleRequest(client=ids["mallory"], settlement=pb.SETTLEMENT_BAN))
    assert {each.id for each in (await gate.list_clients()).clients if each.banned} == {ids["alice"], ids["mallory"]}


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (pb.CreateTokenRequest(job="nothing", holds_seconds=60), "no job"),
        (pb.CreateTokenRequest(holds_seconds=0), "from a second"),
        (pb.CreateTokenRequest(holds_seconds=-1), "from a second"),
        (pb.CreateTokenRequest(holds_seconds=float("nan")), "from a second"),
        (pb.CreateTokenRequest(holds_seconds=float("inf")), "from a second"),
        (pb.CreateTokenRequest(holds_seconds=1e9), "to 366 days"),
        (pb.SettleRequest(client="alice"), "no decision"),
        (pb.SettleRequest(client="alice", settlement=99), "no decision"),  # type: ignore[arg-type]
        (pb.SettleRequest(client="alice", job="nothing", settlement=pb.SETTLEMENT_APPROVE), "no job"),
    ],
)
async def test_what_an_operator_cannot_ask_for(
    gate: Gate, sessions: Sessions, request_: pb.CreateTokenRequest | pb.SettleRequest, says: str
) -> None:
    await gate.joined(caller(gate, sessions, "alice"), "open", "alice")
    with pytest.raises((UsageError, NotFound), match=says):
        if isinstance(request_, pb.CreateTokenRequest):
            await gate.create_token(request_)
        else:
            await gate.settle(request_)
    assert not (await gate.list_tokens()).tokens
