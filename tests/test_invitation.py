"""The line that lets somebody in: what it says, there and back, and what is no such line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneround import invitation
from oneround.invitation import Invitation

KEY = "0f" * 32
TOKEN = "Ab3_-xyz01234567890abc"

labels = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
hosts = st.one_of(
    st.lists(labels, min_size=1, max_size=4).map(".".join),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(lambda address: f"[{address}]"),
)
servers = st.tuples(hosts, st.integers(1, 65535)).map(lambda both: f"{both[0]}:{both[1]}")
tokens = st.from_regex(r"[A-Za-z0-9_-]{8,128}", fullmatch=True)
keys = st.one_of(st.just(""), st.binary(min_size=32, max_size=32).map(bytes.hex))


@given(servers, tokens, keys)
def test_there_and_back(server: str, token: str, key: str) -> None:
    made = Invitation(server, token, key)
    link = str(made)
    assert invitation.read(link) == invitation.read(f"  {link}\n") == made
    assert link.isascii() and not set(link) & set(" '\"$`\\!&|;<>\n"), "it can be pasted into a shell, in quotes"


def test_what_it_looks_like() -> None:
    link = str(Invitation("ward.example:50051", TOKEN, KEY))
    assert link == f"oneround://ward.example:50051/#{TOKEN}+Dw8PDw8PDw8PDw8PDw8PDw8PDw8PDw8PDw8PDw8PDw8"
    before, _, after = link.partition("#")
    assert TOKEN not in before and after.startswith(TOKEN), "no browser sends what is behind the #"
    assert invitation.read(f"oneround://[::1]:50051#{TOKEN}") == Invitation("[::1]:50051", TOKEN)


GOOD = str(Invitation("ward.example:50051", TOKEN, KEY))
DAMAGED = {
    "nothing": "",
    "an address": "ward.example:50051",
    "another scheme": GOOD.replace("oneround", "https"),
    "scheme in capitals": GOOD.replace("oneround", "ONEROUND"),
    "no token": "oneround://ward.example:50051/",
    "an empty token": "oneround://ward.example:50051/#",
    "a short token": "oneround://ward.example:50051/#abc",
    "a long token": f"oneround://ward.example:50051/#{'a' * 129}",
    "a token with other letters": GOOD.replace(TOKEN, "Ab3 xyz01234567890abc"),
    "a fingerprint that is cut": GOOD[:-1],
    "a fingerprint that is longer": GOOD + "x",
    "a fingerprint in hex": f"oneround://ward.example:50051/#{TOKEN}+{KEY}",
    "an empty fingerprint": f"oneround://ward.example:50051/#{TOKEN}+",
    "two fingerprints": f"{GOOD}+{'a' * 43}",
    "no host": GOOD.replace("ward.example:50051", ""),
    "no port": GOOD.replace(":50051", ""),
    "a port that is none": GOOD.replace("50051", "ssh"),
    "a port that is too long": GOOD.replace("50051", "500511"),
    "somebody else behind an @": GOOD.replace("ward.example", "ward.example@evil.example"),
    "a path": GOOD.replace("/#", "/../#"),
    "a query": GOOD.replace("/#", "/?a=b#"),
    "a query without a path": GOOD.replace("/#", "?a=b#"),
    "a terminal's escape": GOOD.replace("ward", "\x1b[2Jward"),
    "right to left": GOOD.replace("ward", "\u202eward"),
    "letters that look alike": GOOD.replace("ward", "w\u0430rd"),
    "digits of another script": GOOD.replace("50051", "٥٠٠٥١"),
    "a line break within": GOOD.replace("/#", "\n/#"),
    "two lines": f"{GOOD}\n{GOOD}",
    "a NUL": GOOD.replace("ward", "wa\0rd"),
    "a shell's words": GOOD.replace("ward.example", "$(reboot)"),
    "an option": GOOD.replace("ward.example", "--insecure-anywhere"),
}


@pytest.mark.parametrize("link", DAMAGED.values(), ids=DAMAGED.keys())
def test_what_is_none(link: str) -> None:
    with pytest.raises(ValueError, match="an invitation reads"):
        invitation.read(link)


@given(st.text(max_size=300))
def test_whatever_is_pasted(text: str) -> None:
    for link in (text, f"oneround://{text}", f"oneround://ward.example:50051/#{text}", GOOD + text, text + GOOD):
        try:
            found = invitation.read(link)
        except ValueError:
            continue
        assert found.server.isascii() and found.server.isprintable() and found.token


@given(st.integers(0, len(GOOD) - 1), st.characters())
def test_one_letter_that_is_another(at: int, letter: str) -> None:
    """Nothing that is pasted with a slip makes trouble; where it can be read, it says what it says."""
    link = GOOD[:at] + letter + GOOD[at + 1 :]
    try:
        found = invitation.read(link)
    except ValueError:
        return
    assert len(found.fingerprint) == 64
