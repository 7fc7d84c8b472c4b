"""A CA of a test's own, and what it signs."""

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = datetime.timedelta(days=1)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@dataclass(frozen=True)
class Authority:
    """Signs certificates for servers and clients."""

    name: str
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate(self) -> bytes:
        made = _builder(self.name, self.name, self.key, 100)
        return (
            made.add_extension(x509.BasicConstraints(True, None), True)
            .sign(self.key, hashes.SHA256())
            .public_bytes(Encoding.PEM)
        )

    def signed(
        self, key: ec.EllipticCurvePrivateKey, names: Sequence[str] = (), *, days: int = 90, client: bool = False
    ) -> bytes:
        """A certificate for DNS names or addresses, followed by the CA's."""
        usage = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
        made = _builder("somebody", self.name, key, days).add_extension(x509.ExtendedKeyUsage([usage]), False)
        if names:
            made = made.add_extension(x509.SubjectAlternativeName([_name(each) for each in names]), False)
        made = made.add_extension(x509.BasicConstraints(False, None), True)
        return made.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM) + self.certificate

    def client(self, folder: Path, **how: int) -> tuple[Path, Path]:
        """A client's certificate and key, as files."""
        key, folder = new_key(), folder / self.name
        folder.mkdir(parents=True, exist_ok=True)
        files = folder / "client.pem", folder / "client-key.pem"
        files[0].write_bytes(self.signed(key, client=True, **how))
        files[1].write_bytes(pem(key))
        return files


def authority(name: str) -> Authority:
    return Authority(name, new_key())


def _builder(subject: str, issuer: str, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder().subject_name(_common(subject)).issuer_name(_common(issuer))
    made = made.public_key(key.public_key()).serial_number(x509.random_serial_number())
    return made.not_valid_before(now - 30 * DAY).not_valid_after(now + days * DAY)


def _common(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
