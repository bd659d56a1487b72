"""Certificate authorities for tests, and what they issue."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from workers.tls import Tls

DAY = datetime.timedelta(days=1)


class Authority:
    """An authority whose files are in `folder`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = _name(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        unsigned = _certificate(self._name, self._name, self._key, days=2).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        self.file = str(_write(folder / f"{name}.pem", unsigned.sign(self._key, hashes.SHA256())))

    def issue(self, name: str, *hosts: str, days: int = 2) -> Tls:
        """A certificate for hosts and addresses, whose peers must have one of this authority.

        With negative `days` it has expired.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([_host(host) for host in hosts or (name,)])
        unsigned = _certificate(_name(name), self._name, key, days).add_extension(names, False)
        cert = _write(self._folder / f"{name}.crt", unsigned.sign(self._key, hashes.SHA256()))
        secret = self._folder / f"{name}.key"
        secret.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return Tls(ca=self.file, cert=str(cert), key=str(secret))


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - 30 * DAY)
        .not_valid_after(now + days * DAY)
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, certificate: x509.Certificate) -> Path:
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return path
