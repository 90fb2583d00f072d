"""TLS: what servers and clients read from files, when, and what is wrong with it in words.

A server's files are read again when they change, so that a certificate can be renewed while it runs; what can't be
used leaves the old one in place, and status says so. A client's are read at each connecting.
"""

from __future__ import annotations

import datetime
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from understudy.common.errors import (
    NotAuthenticated,
    NotPermitted,
    PeerUnreachable,
    UnderstudyError,
)
from understudy.common.events import log
from understudy.common.secret_files import read_file, read_private

if TYPE_CHECKING:
    from cryptography import x509

    from understudy.common.certificates import PrivateKey

REPLICA_NAME = "understudy:replica"  # the URI in a client certificate that makes its owner a replica
EXPIRY_WARNING = datetime.timedelta(days=14)


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate, those between it and its CA, and its key; as read, and as parsed."""

    chain_pem: bytes
    key_pem: bytes = field(repr=False)
    chain: Sequence[x509.Certificate]
    key: PrivateKey

    @classmethod
    def read(cls, cert: Path, key: Path) -> Identity:
        """From two files.

        Raises:
            UsageError: one can't be read or used, or they do not belong together, or the certificate has expired.
            NotPermitted: others may read the key.
        """
        from understudy.common import certificates  # takes long, and only TLS needs it

        chain_pem = read_file(cert)
        certificates.check_not_swapped(chain_pem, read_file(key), cert, key)
        key_pem = read_private(key)
        chain = certificates.parse_certificates(chain_pem, cert)
        private = certificates.parse_key(key_pem, key)
        certificates.check_pair(chain, private, cert, key)
        return cls(chain_pem, key_pem, chain, private)


def _read_ca(path: Path) -> tuple[bytes, Sequence[x509.Certificate]]:
    from understudy.common import certificates

    pem = read_file(path)
    return pem, certificates.parse_certificates(pem, path)


@dataclass(frozen=True, slots=True)
class ClientTls:
    """Whom a client trusts, and which certificate is its own.

    Attributes:
        ca: certificates in PEM; a server's must be signed by one of them.
        cert, key: its own, both or neither.
    """

    ca: Path
    cert: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel: the files as they are now.

        Raises:
            UsageError, NotPermitted: of the files.
        """
        trusted, own = _read_ca(self.ca)[0], self.identity()
        if own is None:
            return grpc.ssl_channel_credentials(trusted)
        # Our servers do not ask for it (certificate.proto says why); what stands before one may.
        return grpc.ssl_channel_credentials(trusted, own.key_pem, own.chain_pem)

    def identity(self) -> Identity | None:
        """Its own certificate, if it has one.

        Raises:
            UsageError, NotPermitted: of the files.
        """
        return None if self.cert is None or self.key is None else Identity.read(self.cert, self.key)


class ServerTls:
    """A server's certificate, and the CA of the clients' certificates. Calls may come from any thread.

    Raises:
        UsageError, NotPermitted: of the files.
    """

    def __init__(self, cert: Path, key: Path, ca: Path | None = None) -> None:
        self.cert, self.key, self._ca_path = cert, key, ca
        self._lock = threading.Lock()
        self._problem = ""
        self._on_change: list[Callable[[], None]] = []
        self._seen = self._stamps()
        self._read()

    def _read(self) -> None:
        identity = Identity.read(self.cert, self.key)
        ca = _read_ca(self._ca_path)[1] if self._ca_path is not None else ()
        self._identity, self._ca = identity, ca

    def _stamps(self) -> list[tuple[int, ...] | None]:
        """What differs once one of the files has been written or replaced."""
        return [_stamp(path) for path in (self.cert, self.key, self._ca_path) if path is not None]

    def refresh(self) -> None:
        """Reads the files again if they have changed."""
        with self._lock:
            stamps = self._stamps()
            if stamps == self._seen:
                return
            self._seen = stamps
            try:
                self._read()
                for told in self._on_change:
                    told()
            except UnderstudyError as error:
                self._problem = str(error)
                log.warning("certificate_not_read", cert=str(self.cert), error=self._problem)
                return
            self._problem = ""
            log.info("certificate_read", cert=str(self.cert), until=self._until.isoformat())

    @property
    def _until(self) -> datetime.datetime:
        return self._identity.chain[0].not_valid_after_utc

    def on_change(self, told: Callable[[], None]) -> None:
        """Has ``told`` called when there is a new certificate."""
        self._on_change.append(told)

    def warnings(self) -> list[str]:
        """What an operator should know of these files now."""
        self.refresh()
        found = [f"the new certificate is not in use: {self._problem}"] if self._problem else []
        if self._until - datetime.datetime.now(datetime.UTC) < EXPIRY_WARNING:
            found.append(f"the certificate in {self.cert} expires on {self._until:%Y-%m-%d}: renew it")
        return found

    def credentials(self) -> grpc.ServerCredentials:
        """For a port of a gRPC server; each new connection gets the certificate of that moment."""
        given = self._identity

        def newer() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            self.refresh()
            if self._identity is given:
                return None
            given = self._identity
            return _configuration(given)

        return grpc.dynamic_ssl_server_credentials(_configuration(given), newer)  # type: ignore[arg-type]  # None: no change

    def peer_certificate_names(self, metadata: Iterable[tuple[str, str | bytes]]) -> tuple[str, ...]:
        """The names in the client certificate that came with a call, which our CA has signed; none if none came.

        Args:
            metadata: the call's; an interceptor has it in ``handler_call_details.invocation_metadata``.

        Raises:
            NotAuthenticated: one came that is not accepted.
        """
        from understudy.common.certificate_proof import PROOF_METADATA, proven_names

        proof = next((value for name, value in metadata if name == PROOF_METADATA), None)
        if not isinstance(proof, bytes):
            return ()
        self.refresh()
        if not self._ca:
            raise NotAuthenticated(
                "this server accepts no client certificates",
                remedy="start it with --tls-ca FILE, the CA that signs them, or give a token",
            )
        return proven_names(proof, self._ca)


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(identity.key_pem, identity.chain_pem)])


def access_name(tls: ServerTls | None) -> str:
    """How peers get in, as status tells it."""
    return "protected" if tls is None else "tls"


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino, about.st_mode


_UNTRUSTED = (  # in gRPC's words: what is wrong with a server's certificate, what mends it
    ("Hostname Verification", "is not for this name", "give an address that it names"),
    ("has expired", "has expired", "renew it on the server"),
    ("not yet valid", "is not valid yet", "are the clocks right?"),
    ("CERTIFICATE_VERIFY_FAILED", "is not signed by the CA that was given", "is --ca the right file?"),
)


def handshake_error(details: str, address: str) -> UnderstudyError | None:
    """The error for a connection that failed over TLS, from gRPC's words for it; None if it was for something else."""
    for words, problem, remedy in _UNTRUSTED:
        if words in details:
            return NotPermitted(f"{address} is not trusted: its certificate {problem}", remedy=remedy)
    if "WRONG_VERSION_NUMBER" in details:
        return PeerUnreachable(
            f"{address} does not speak TLS",
            remedy="start it with --tls-cert and --tls-key; if it is in protected mode on this machine, leave out --ca",
        )
    if "failed to connect" in details and "Socket closed" in details:
        return PeerUnreachable(
            f"{address} has closed the connection at once", remedy="if it speaks TLS, give --ca FILE"
        )
    return None
