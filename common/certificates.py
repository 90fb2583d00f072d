"""X.509: certificates and keys as they come from files, with what is wrong with them in words.

Takes a while to import, so whoever needs it only with TLS imports it then.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from understudy.common.errors import UsageError

PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

_NAMES_KNOWN = (x509.DNSName, x509.UniformResourceIdentifier)


def parse_certificates(pem: bytes, path: Path) -> list[x509.Certificate]:
    """The certificates in ``pem``, which was read from ``path``.

    Raises:
        UsageError: there is none, or one is damaged.
    """
    try:
        return x509.load_pem_x509_certificates(pem)
    except (ValueError, x509.InvalidVersion) as error:
        raise UsageError(
            f"{path} is not a certificate in PEM", remedy="it begins with -----BEGIN CERTIFICATE-----"
        ) from error


def parse_key(pem: bytes, path: Path) -> PrivateKey:
    """The private key in ``pem``, which was read from ``path``.

    Raises:
        UsageError: there is none, or it is of a kind that can't be used.
    """
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError as error:
        raise UsageError(
            f"the key in {path} is encrypted", remedy=f"openssl pkey -in {path} -out FILE decrypts it"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"{path} is not a private key in PEM", remedy="it begins with -----BEGIN PRIVATE KEY-----"
        ) from error
    if not isinstance(key, PrivateKey):
        # gRPC's TLS negotiates no Ed25519: every handshake would fail without a word why.
        raise UsageError(f"the key in {path} is neither ECDSA nor RSA", remedy="make an ECDSA P-256 key")
    return key


def check_not_swapped(cert_pem: bytes, key_pem: bytes, cert_path: Path, key_path: Path) -> None:
    """Refuses a key in the place of a certificate, or the reverse, before anything else is said of the files.

    Raises:
        UsageError.
    """
    for pem, path, wanted, found in (
        (cert_pem, cert_path, "CERTIFICATE", "PRIVATE KEY"),
        (key_pem, key_path, "PRIVATE KEY", "CERTIFICATE"),
    ):
        ends = f"{wanted}-----".encode(), f"{found}-----".encode()
        if ends[0] not in pem and ends[1] in pem:
            raise UsageError(
                f"{path} holds a {found.lower()}, where a {wanted.lower()} should be",
                remedy="were the certificate and its key swapped?",
            )


def check_pair(chain: Sequence[x509.Certificate], key: PrivateKey, cert_path: Path, key_path: Path) -> None:
    """Refuses a certificate that is not the key's, or not valid now.

    Raises:
        UsageError.
    """
    try:
        certified = _public_bytes(chain[0].public_key())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"the certificate in {cert_path} has a key that can't be used: {error}") from error
    if certified != _public_bytes(key.public_key()):
        raise UsageError(f"the key in {key_path} is not the one of the certificate in {cert_path}")
    now = datetime.datetime.now(datetime.UTC)
    if now > chain[0].not_valid_after_utc:
        raise UsageError(
            f"the certificate in {cert_path} expired on {chain[0].not_valid_after_utc:%Y-%m-%d}",
            remedy=RENEW,
        )
    if now < chain[0].not_valid_before_utc:
        raise UsageError(
            f"the certificate in {cert_path} is valid from {chain[0].not_valid_before_utc:%Y-%m-%d %H:%M} UTC",
            remedy="is this machine's clock right?",
        )


RENEW = "`understudy keys renew DIR` issues a new one where `understudy keys init DIR` made it"


def _public_bytes(key: object) -> bytes:
    public: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)  # type: ignore[attr-defined]
    return public


def uris_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """The URIs among its alternative names: who signs host names for others does not sign these by mistake."""
    try:
        alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):  # none, or none that can be read
        return ()
    return tuple(alternative.get_values_for_type(x509.UniformResourceIdentifier))


def names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """Its alternative names (DNS, URI, IP address), then its common name."""
    try:
        alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        alternative = x509.SubjectAlternativeName([])
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return (
        *(name.value for name in alternative if isinstance(name, _NAMES_KNOWN)),
        *map(str, alternative.get_values_for_type(x509.IPAddress)),
        *(str(attribute.value) for attribute in common),
    )
