"""Shows with a call that a client certificate is the caller's own, and checks it.

``certificate.proto`` says why this is not left to the TLS handshake. It is a client assertion as in RFC 7523 with the
certificate along as in RFC 7515's ``x5c``: like a bearer token, but made by the caller itself and soon worthless.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from google.protobuf.message import DecodeError

from understudy.common.certificates import PrivateKey, uris_of
from understudy.common.errors import NotAuthenticated
from understudy.v1.certificate_pb2 import CertificateClaim, CertificateProof

PROOF_METADATA = "understudy-certificate-bin"
PROOF_S_MAX = 300.0  # before and after: the two clocks may differ by so much

_CHAIN_MAX = 5
_DOMAIN = b"understudy.v1.CertificateClaim\0"  # what is signed can't be taken for anything else
_PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.DIGEST_LENGTH)


def make_proof(chain: Iterable[x509.Certificate], key: PrivateKey) -> bytes:
    """A proof as of now, for :data:`PROOF_METADATA`."""
    claim = CertificateClaim(
        chain=[certificate.public_bytes(Encoding.DER) for certificate in chain],
        made_us=time.time_ns() // 1_000,
    ).SerializeToString()
    return CertificateProof(claim=claim, signature=_sign(key, _DOMAIN + claim)).SerializeToString()


def proven_names(proof: bytes, ca: Sequence[x509.Certificate]) -> tuple[str, ...]:
    """The names in the certificate that ``proof`` shows, which one of ``ca`` has signed.

    Raises:
        NotAuthenticated: it is no proof, is too old, or nobody of ``ca`` vouches for the certificate.
    """
    try:
        message = CertificateProof.FromString(proof)
        claim = CertificateClaim.FromString(message.claim)
        chain = [x509.load_der_x509_certificate(der) for der in claim.chain[:_CHAIN_MAX]]
    except (DecodeError, ValueError, x509.InvalidVersion) as error:
        raise NotAuthenticated("the client certificate can't be read") from error
    if not chain:
        raise NotAuthenticated("a proof of no client certificate")
    _check_vouched(chain, ca)
    _check_signature(chain[0], message.signature, _DOMAIN + message.claim)
    _check_time(claim.made_us / 1e6)
    return uris_of(chain[0])


def _check_vouched(chain: Sequence[x509.Certificate], ca: Sequence[x509.Certificate]) -> None:
    verifier = PolicyBuilder().store(Store(list(ca))).build_client_verifier()
    try:
        verifier.verify(chain[0], list(chain[1:]))
    except (VerificationError, ValueError) as error:  # ValueError: a part that is only looked at now is none
        raise NotAuthenticated(
            f"the client certificate is not accepted: {error}",
            remedy="has it expired, and did the CA that the server was given with --tls-ca sign it?",
        ) from error


def _check_signature(certificate: x509.Certificate, signature: bytes, signed: bytes) -> None:
    key = certificate.public_key()
    try:
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, signed, ec.ECDSA(hashes.SHA256()))
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, signed, _PSS, hashes.SHA256())
        else:
            raise NotAuthenticated("the client certificate's key is neither ECDSA nor RSA")
    except InvalidSignature as error:
        raise NotAuthenticated("the proof of the client certificate was not made with its key") from error


def _check_time(made_s: float) -> None:
    age_s = time.time() - made_s
    if abs(age_s) > PROOF_S_MAX:
        raise NotAuthenticated(
            f"the proof of the client certificate was made {abs(age_s):.0f} s "
            f"{'ago' if age_s > 0 else 'ahead of time'}",
            remedy="set the clocks of both machines: they differ too much",
        )


def _sign(key: PrivateKey, content: bytes) -> bytes:
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(content, ec.ECDSA(hashes.SHA256()))
    return key.sign(content, _PSS, hashes.SHA256())
