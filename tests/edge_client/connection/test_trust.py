"""Whom a client trusts: what is pinned, asked, followed and refused."""

import datetime
import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from coordinator.auth import certificates
from coordinator.auth import identity as identities
from edge_client.connection import trust
from edge_client.connection.identity import Pin, Pins
from edge_client.connection.target import Target
from edge_client.connection.trust import KeyStanding, ShownCertificate
from edge_client.ui.screen import Screen
from oneround import signing, tls
from oneround.errors import BadData, Refused, UsageError
from tests import authorities, commands, terminal

HERE, THERE = "192.0.2.1:50051", "192.0.2.2:50051"
NOW = datetime.datetime.now(datetime.UTC)
KEYS = [authorities.new_key() for _ in range(4)]
NAMES = [signing.fingerprint(signing.spki(key)) for key in KEYS]


def shown(number: int, *before: int, address: str = HERE) -> ShownCertificate:
    """One that shows a key which follows others."""
    keys = [KEYS[each] for each in (*before, number)]
    changes = [tls.change(old, signing.spki(new)) for old, new in itertools.pairwise(keys)]
    return ShownCertificate(address, certificates.self_signed(authorities.pem(KEYS[number]), changes, NOW))


@pytest.mark.parametrize(
    ("pins", "seen", "expected"),
    [
        ({}, shown(0), KeyStanding.NEW),
        ({}, shown(1, 0), KeyStanding.NEW),
        ({HERE: Pin(NAMES[0])}, shown(0), KeyStanding.PINNED),
        ({HERE: Pin(NAMES[0])}, shown(1), KeyStanding.CHANGED),
        ({HERE: Pin(NAMES[0])}, shown(1, 0), KeyStanding.FOLLOWS),
        ({HERE: Pin(NAMES[0])}, shown(2, 0, 1), KeyStanding.FOLLOWS),
        ({HERE: Pin(NAMES[0])}, shown(2, 1), KeyStanding.CHANGED),
        ({HERE: Pin(NAMES[1], (NAMES[0],))}, shown(0), KeyStanding.GIVEN_UP),
        ({HERE: Pin(NAMES[1], (NAMES[0],))}, shown(2, 0), KeyStanding.CHANGED),  # signed by one that was given up
        ({THERE: Pin(NAMES[0])}, shown(0), KeyStanding.ELSEWHERE),
        ({THERE: Pin(NAMES[0])}, shown(1, 0), KeyStanding.FOLLOWS),
        ({THERE: Pin(NAMES[0])}, shown(1), KeyStanding.NEW),
        ({THERE: Pin(NAMES[1], (NAMES[0],))}, shown(0), KeyStanding.GIVEN_UP),
        ({HERE: Pin(NAMES[2]), THERE: Pin(NAMES[0])}, shown(0), KeyStanding.CHANGED),
    ],
)
def test_what_a_key_is(pins: Mapping[str, Pin], seen: ShownCertificate, expected: KeyStanding) -> None:
    assert trust.standing(seen, pins) is expected


def test_pins_follow_at_every_address_and_earlier_keys_stay_known(tmp_path: Path) -> None:
    (tmp_path / "known-coordinators.json").write_text(json.dumps({HERE: NAMES[0], THERE: NAMES[0], "x:1": NAMES[3]}))
    pins = Pins(tmp_path)
    assert pins.all() == {HERE: NAMES[0], THERE: NAMES[0], "x:1": NAMES[3]}, "as it was written before"
    pins.pin(HERE, NAMES[1], [NAMES[0]])
    assert pins.all() == {HERE: NAMES[1], THERE: NAMES[1], "x:1": NAMES[3]}
    pins.pin(THERE, NAMES[2], [NAMES[0], NAMES[1]])
    assert Pins(tmp_path).by_address()[HERE] == Pin(NAMES[2], (NAMES[0], NAMES[1]))
    assert pins.earlier(NAMES[2]) == {NAMES[0], NAMES[1]} and not pins.earlier(NAMES[3])
    pins.pin("new:1", NAMES[2])
    assert pins.by_address()["new:1"].earlier == (NAMES[0], NAMES[1])
    pins.pin(HERE, NAMES[3])  # accepted by hand
    assert pins.by_address()[HERE] == Pin(NAMES[3]), "what is not signed is not its earlier key"
    Pins(tmp_path, keep=False).pin(HERE, NAMES[0])
    assert pins.all()[HERE] == NAMES[3]


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"a:1": 3}', '{"a:1": {}}', '{"a:1": {"fingerprint": "x", "earlier": 3}}']
)
def test_damaged_pins(tmp_path: Path, text: str) -> None:
    (tmp_path / "known-coordinators.json").write_text(text)
    with pytest.raises(BadData, match="is damaged"):
        Pins(tmp_path).all()


async def test_what_is_only_heard_of_is_not_pinned_without_a_word() -> None:
    async def meet(announced: str) -> None:
        await trust.first_time(Screen(as_json=True), shown(0), announced)

    await meet("")  # a person named the address
    with pytest.raises(Refused, match="only heard of on this network") as caught:
        await meet(NAMES[0])
    assert f"--trust {NAMES[0]}" in caught.value.hint
    with pytest.raises(Refused, match="one with another answers there"):
        await meet(NAMES[1])


def test_fingerprints_on_the_command_line() -> None:
    assert (
        Target(trust=tls.grouped(NAMES[0])).trusted == Target(trust=NAMES[0]).trusted == NAMES[0]
        and not Target().trusted
    )
    with pytest.raises(UsageError, match="no whole fingerprint"):
        _ = Target(trust=NAMES[0][:16]).trusted


@pytest.mark.parametrize("address", ["192.0.2.1:50051", "example.org:1", "[fe80::1]:1"])
def test_insecure_is_for_this_machine(address: str) -> None:
    with pytest.raises(UsageError, match="--insecure is for a coordinator on this machine"):
        Target(insecure=True).require_allowed(address)
    Target(insecure_anywhere=True).require_allowed(address)
    Target(insecure=True, insecure_anywhere=True).require_allowed(address)
    for here in ("127.0.0.1:1", "localhost:1", "[::1]:1"):
        Target(insecure=True).require_allowed(here)


def test_a_person_compares_and_answers(tmp_path: Path) -> None:
    state = tmp_path / "client"
    with commands.coordinator(tmp_path / "coordinator") as address:
        key = identities.load_or_create(tmp_path / "coordinator").fingerprint
        pulls = ("pull", "notes", "--server", address, "--state", state)
        for answer in ("n", "", key[:32]):
            with terminal.running("edge-client", *pulls, columns=120) as screen:
                screen.expect("Is it the same there?")
                assert address in screen.text and tls.grouped(key) in screen.text
                screen.type(f"{answer}\n")
                assert f"--trust {key}" in screen.finish(code=3)
            assert not Pins(state).all(), "a no changes nothing"
        with terminal.running("edge-client", *pulls, columns=120) as screen:
            screen.expect("Is it the same there?")
            screen.type(f"{tls.grouped(key)}\n")
            screen.expect("First time at")
            screen.finish(code=3)  # there is no such job
        assert Pins(state).all() == {address: key}
        with terminal.running("edge-client", *pulls, columns=120) as screen:
            assert "the same there" not in screen.finish(code=3)


def test_accepting_a_changed_key(tmp_path: Path) -> None:
    state = tmp_path / "client"
    with commands.coordinator(tmp_path / "coordinator") as address:
        key = identities.load_or_create(tmp_path / "coordinator").fingerprint
        Pins(state).pin(address, NAMES[0])
        pulls = ("pull", "notes", "--server", address, "--state", state)
        _, err = commands.run("edge-client", *pulls, code=3)
        assert tls.grouped(NAMES[0]) in err and tls.grouped(key) in err and "another key than the last time" in err
        _, err = commands.run("edge-client", *pulls, "--trust", NAMES[1], code=3)
        assert "another key than you trust" in err and Pins(state).all() == {address: NAMES[0]}
        _, err = commands.run("edge-client", *pulls, "--trust", tls.grouped(key), code=3)
        assert "no job" in err and Pins(state).all() == {address: key}
        Pins(state).pin(address, NAMES[0])
        _, err = commands.run("edge-client", *pulls, code=3)
        (line,) = [line.split() for line in err.splitlines() if line.strip().startswith("edge-client trust")]
        out, _ = commands.run(*line)
        assert tls.grouped(key) in out and tls.grouped(NAMES[0]) in out
        assert "no job" in commands.run("edge-client", *pulls, code=3)[1]
