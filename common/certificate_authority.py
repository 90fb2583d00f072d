"""A private CA for a quick start: makes itself, and signs certificates for servers and replicas.

Extensions are those that RFC 5280 and the verifiers of gRPC and Python want. Keys are ECDSA P-256: gRPC's TLS
negotiates no Ed25519.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from understudy.common.certificates import PrivateKey, check_pair, parse_certificates, parse_key
from understudy.common.errors import UsageError
from understudy.common.files import publish, storage_errors, sync_directory
from understudy.common.secret_files import read_file, read_private
from understudy.common.tls import REPLICA_NAME

CA_LIFE = datetime.timedelta(days=3650)
LEAF_LIFE = datetime.timedelta(days=825)  # the most that common verifiers take
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")

_CLOCKS_DIFFER = datetime.timedelta(hours=1)
_HOST_NAME = re.compile(
    r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*"
)


@dataclass(frozen=True, slots=True)
class Holder:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: PrivateKey


@dataclass(frozen=True, slots=True)
class KeyFiles:
    """The files of a directory that ``understudy keys`` makes."""

    directory: Path

    @property
    def ca(self) -> tuple[Path, Path]:
        """The CA's certificate and its key."""
        return self._pair("ca")

    @property
    def server(self) -> tuple[Path, Path]:
        """A server's certificate and its key."""
        return self._pair("server")

    @property
    def replica(self) -> tuple[Path, Path]:
        """A replica's client certificate and its key."""
        return self._pair("replica")

    def _pair(self, name: str) -> tuple[Path, Path]:
        return self.directory / f"{name}.pem", self.directory / f"{name}-key.pem"


# -- directories ---------------------------------------------------------------------------------------------


def create_keys(directory: Path, hosts: Sequence[str]) -> x509.Certificate:
    """Makes a CA, a server's certificate for ``hosts`` and a replica's in ``directory``; returns the server's.

    Raises:
        UsageError: ``directory`` is there and not empty, or a host is none.
        DiskFull, StorageFailed.
    """
    names = _host_names(hosts)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(
            f"{directory} is there and not empty",
            remedy=f"give another directory, or renew its certificates: understudy keys renew {directory}",
        )
    ca = _make_ca()
    server, replica = _sign_server(ca, _make_key(), names), _sign_replica(ca, _make_key())
    _publish_directory(directory, ca, server, replica)
    return server.certificate


def renew_keys(directory: Path, hosts: Sequence[str] = ()) -> x509.Certificate:
    """Signs the server's and the replica's certificates anew; returns the server's.

    The keys stay, so that each certificate is one file that takes the place of the old one at once.

    Args:
        directory: what :func:`create_keys` made.
        hosts: whom the server's is for from now on; none leaves them as they were.

    Raises:
        UsageError, NotPermitted: of its files.
        DiskFull, StorageFailed.
    """
    files = KeyFiles(directory)
    ca = _read(*files.ca)
    check_pair([ca.certificate], ca.key, *files.ca)
    old = _read(*files.server)
    names = (
        _host_names(hosts)
        if hosts
        else old.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    )
    server = _sign_server(ca, old.key, names)
    replica = _sign_replica(ca, _read(*files.replica).key)
    for (path, _), holder in ((files.server, server), (files.replica, replica)):
        publish(path, holder.certificate.public_bytes(Encoding.PEM), mode=0o644)
    return server.certificate


def _read(cert: Path, key: Path) -> Holder:
    return Holder(parse_certificates(read_file(cert), cert)[0], parse_key(read_private(key), key))


def _publish_directory(directory: Path, ca: Holder, server: Holder, replica: Holder) -> None:
    beside = directory.with_name(f".{directory.name}-{secrets.token_hex(8)}")
    files = KeyFiles(beside)
    with storage_errors("create", directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        beside.mkdir(mode=0o700)
        for (cert, key), holder in ((files.ca, ca), (files.server, server), (files.replica, replica)):
            publish(cert, holder.certificate.public_bytes(Encoding.PEM), mode=0o644)
            publish(key, holder.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        os.rename(beside, directory)  # also over an empty one
    sync_directory(directory.parent)


# -- names ---------------------------------------------------------------------------------------------------


def _host_names(hosts: Iterable[str]) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName(list(dict.fromkeys(map(_host_name, (*hosts, *LOCAL_HOSTS)))))


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _HOST_NAME.fullmatch(host):
        raise UsageError(
            f"bad host {host!r:.200}", remedy="give a name or an IP address, without port and brackets"
        )
    return x509.DNSName(host)


# -- certificates --------------------------------------------------------------------------------------------


def _make_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _make_ca() -> Holder:
    key = _make_key()
    # A name of its own: of two CAs of one name in one file, verifiers may look at the wrong one only.
    name = _name(f"Understudy CA {secrets.token_hex(4)}")
    usage = _key_usage(signs_certificates=True)
    certificate = (
        _builder(name, key, until=datetime.datetime.now(datetime.UTC) + CA_LIFE)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return Holder(certificate, key)


def _sign_server(ca: Holder, key: PrivateKey, names: x509.SubjectAlternativeName) -> Holder:
    return _sign(ca, key, "Understudy server", names, ExtendedKeyUsageOID.SERVER_AUTH)


def _sign_replica(ca: Holder, key: PrivateKey) -> Holder:
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(REPLICA_NAME)])
    return _sign(ca, key, "Understudy replica", names, ExtendedKeyUsageOID.CLIENT_AUTH)


def _sign(
    ca: Holder,
    key: PrivateKey,
    name: str,
    names: x509.SubjectAlternativeName,
    purpose: x509.ObjectIdentifier,
) -> Holder:
    until = min(datetime.datetime.now(datetime.UTC) + LEAF_LIFE, ca.certificate.not_valid_after_utc)
    authority = ca.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _builder(_name(name), key, until=until)
        .issuer_name(ca.certificate.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(names, critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority), critical=False
        )
        .sign(ca.key, hashes.SHA256())
    )
    return Holder(certificate, key)


def _builder(name: x509.Name, key: PrivateKey, *, until: datetime.datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime.now(datetime.UTC) - _CLOCKS_DIFFER)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
