"""The coordinator's key and certificate: made, renewed, followed by another; and an operator's own."""

import datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from coordinator.auth import certificates, identity
from coordinator.auth.identity import OwnFiles
from coordinator.rpc import transport
from oneround import signing, tls
from oneround.errors import UsageError
from tests import authorities, commands

DAY = datetime.timedelta(days=1)
NOW = datetime.datetime(2026, 11, 21, 12, tzinfo=datetime.UTC)


def ends(certificate: bytes) -> datetime.datetime:
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def test_a_certificate_is_made_anew_in_time_and_the_key_stays(tmp_path: Path) -> None:
    first = identity.load_or_create(tmp_path, now=NOW)
    assert ends(first.certificate) - NOW == 365 * DAY and tls.name(first.certificate) == tls.NAME
    assert identity.load_or_create(tmp_path, now=NOW + 240 * DAY) == first
    later = identity.load_or_create(tmp_path, now=NOW + 250 * DAY)
    assert later.certificate != first.certificate and ends(later.certificate) == NOW + 615 * DAY
    assert (later.key, later.fingerprint, later.admin_token) == (first.key, first.fingerprint, first.admin_token)
    assert identity.load_or_create(tmp_path, now=NOW + 250 * DAY) == later
    earlier = identity.load_or_create(tmp_path, now=NOW - 9 * DAY)  # the clock had been wrong
    assert ends(earlier.certificate) == NOW + 356 * DAY
    assert (tmp_path / "certificate.pem").stat().st_mode & 0o077 == 0


def test_a_damaged_certificate_is_made_anew(tmp_path: Path) -> None:
    first = identity.load_or_create(tmp_path)
    (tmp_path / "certificate.pem").write_bytes(first.certificate[:100])
    assert identity.load_or_create(tmp_path).fingerprint == first.fingerprint


def test_a_key_that_follows_another(tmp_path: Path) -> None:
    keys = [identity.load_or_create(tmp_path).fingerprint]
    for _ in range(3):
        before, after = identity.rotate(tmp_path)
        assert before == keys[-1] and after not in keys
        keys.append(after)
        assert tls.earlier(identity.load_or_create(tmp_path).certificate) == tuple(keys[:-1])
    renewed = identity.load_or_create(tmp_path, now=datetime.datetime.now(datetime.UTC) + 300 * DAY)
    assert renewed.fingerprint == keys[-1] and tls.earlier(renewed.certificate) == tuple(keys[:-1])
    for _ in range(tls.MOST_CHANGES):
        identity.rotate(tmp_path)
    assert len(tls.earlier(identity.load_or_create(tmp_path).certificate)) == tls.MOST_CHANGES


def test_a_change_that_was_cut_short_has_not_happened(tmp_path: Path) -> None:
    first, _ = identity.rotate(_made(tmp_path))
    second = identity.load_or_create(tmp_path)
    identity.rotate(tmp_path)
    (tmp_path / "key.pem").write_bytes(second.key)  # the new certificate is there, and its key is not
    again = identity.load_or_create(tmp_path)
    assert again.fingerprint == second.fingerprint and tls.earlier(again.certificate) == (first,)


def test_a_key_that_was_removed_is_followed_by_nobody(tmp_path: Path) -> None:
    before = identity.load_or_create(_made(tmp_path)).fingerprint
    (tmp_path / "key.pem").unlink()
    after = identity.load_or_create(tmp_path)
    assert after.fingerprint != before and tls.earlier(after.certificate) == ()


def _made(folder: Path) -> Path:
    identity.load_or_create(folder)
    return folder


def test_changes_that_nobody_has_signed() -> None:
    old, new, other = (authorities.new_key() for _ in range(3))
    now = datetime.datetime.now(datetime.UTC)

    def shown(*changes: tls.Change) -> tuple[str, ...]:
        return tls.earlier(certificates.self_signed(authorities.pem(new), changes, now))

    good = tls.change(old, signing.spki(new))
    assert shown(good) == (signing.fingerprint(signing.spki(old)),)
    assert shown(tls.Change(good.key, good.signature[:-1])) == ()
    assert shown(tls.Change(signing.spki(old), tls.change(other, signing.spki(new)).signature)) == (), "by another key"
    assert shown(tls.change(old, signing.spki(other))) == (), "for another key"
    assert shown(tls.Change(b"no key", good.signature)) == ()
    assert shown(tls.change(other, signing.spki(new)), good) == shown(good), "a break in the chain ends it"
    assert len(shown(tls.change(other, signing.spki(old)), good)) == 2


@pytest.mark.parametrize("value", [b"", b"{}", b"[1]", b'[["!", "!"]]', b'[["a"]]', b"[" * 100_000, b"\xff", b"null"])
def test_an_extension_that_is_none(value: bytes) -> None:
    key = authorities.new_key()
    made = authorities._builder("x", "x", key, 9).add_extension(x509.UnrecognizedExtension(tls.CHANGES, value), False)
    assert tls.earlier(made.sign(key, authorities.hashes.SHA256()).public_bytes(Encoding.PEM)) == ()


def test_fingerprints_as_people_write_them() -> None:
    key = "0123456789abcdef" * 4
    assert tls.ungrouped(tls.grouped(key)) == tls.ungrouped(f" {key.upper()}\n") == key
    assert not any(map(tls.ungrouped, ("", key[:16], f"{key}0", key.replace("0", "g"), tls.grouped(key)[:-1])))


def written(folder: Path, key: bytes, certificate: bytes) -> OwnFiles:
    files = OwnFiles(folder / "own.pem", folder / "own-key.pem")
    files.certificate.write_bytes(certificate)
    files.key.write_bytes(key)
    return files


def test_an_operators_own_certificate(tmp_path: Path) -> None:
    key, ca = authorities.new_key(), authorities.authority("ca")
    own = written(tmp_path, authorities.pem(key), ca.signed(key, ["*.ward.example", "192.0.2.7"]))
    who = identity.load_or_create(tmp_path / "state", own)
    assert who.fingerprint == signing.fingerprint(signing.spki(key)) and tls.name(who.certificate) == "any.ward.example"
    made = {file.name for file in (tmp_path / "state").iterdir()}
    assert made == {"admin-token", "session-secret"}, "no key is made that is not used"
    assert tls.name(ca.signed(key, ["192.0.2.7"])) == "192.0.2.7"


def test_own_certificates_that_cannot_be_used(tmp_path: Path) -> None:
    key, ca = authorities.new_key(), authorities.authority("ca")
    pem, edwards = authorities.pem(key), ed25519.Ed25519PrivateKey.generate()
    edwards_pem = edwards.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    good = ca.signed(key, ["ward.example"])
    for private, certificate, says in (
        (authorities.pem(authorities.new_key()), good, "is not that of the key"),
        (pem, b"", "no certificate in PEM form"),
        (good, good, "no private key"),
        (edwards_pem, good, "Ed25519"),
        (pem, ca.signed(key, ["ward.example"], days=-1), "ended on"),
    ):
        with pytest.raises(UsageError, match=says):
            identity.load_or_create(tmp_path / "state", written(tmp_path, private, certificate))
    with pytest.raises(UsageError, match="cannot read"):
        identity.load_or_create(tmp_path / "state", OwnFiles(tmp_path / "none.pem", tmp_path / "own-key.pem"))
    with pytest.raises(UsageError, match="no certificate"):
        certificates.authority(tmp_path / "own-key.pem")


def test_a_socket_in_a_folder_with_a_long_path(tmp_path: Path) -> None:
    assert transport.socket(Path("/srv/x")) == "unix:/srv/x/admin.sock"
    long, other = tmp_path / ("a" * 99), tmp_path / ("b" * 99)
    there = transport.socket(long)
    assert len(there) < 100 and there == transport.socket(long) != transport.socket(other)
    folder = Path(there.removeprefix("unix:")).parent
    assert folder.stat().st_mode & 0o077 == 0


def test_rotating_from_the_command_line(tmp_path: Path) -> None:
    state = tmp_path / "state"
    _, err = commands.run("coordinator", "rotate-key", "--state", state, code=2)
    assert "no coordinator has run" in err
    with commands.coordinator(state):
        _, err = commands.run("coordinator", "rotate-key", "--state", state, code=2)
        assert "another coordinator is at work" in err and "stop the daemon first" in err
    before = identity.load_or_create(state).fingerprint
    out, _ = commands.run("coordinator", "rotate-key", "--state", state)
    after = identity.load_or_create(state).fingerprint
    assert before != after and tls.grouped(before) in out and tls.grouped(after) in out
    with commands.coordinator(state):
        assert "serving" in commands.run("coordinator", "health", "--state", state)[0]
        started = (tmp_path / "state.log").read_text()
        assert f"Key fingerprint  {tls.grouped(after)}" in started and tls.grouped(before) in started
