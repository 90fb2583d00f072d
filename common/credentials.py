"""What a peer proves itself with: whom it trusts, its certificate, its token."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import grpc.aio

from understudy.common.errors import UsageError
from understudy.common.proving_channel import AUTHORIZATION_METADATA, Metadata, ProvingChannel
from understudy.common.secret_files import read_private
from understudy.common.tls import ClientTls

# What an HTTP header can carry of it (RFC 6750); with more than 8 KiB of metadata, servers refuse a call.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{1,4096}")


Token = str | Callable[[], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """How to connect, and as whom.

    Attributes:
        tls: None connects in the clear.
        token: itself, or ``@FILE``, which is read at each connecting, or what gives it at each call.
    """

    tls: ClientTls | None = None
    token: Token | None = field(default=None, repr=False)

    @classmethod
    def given(
        cls,
        *,
        ca: str | os.PathLike[str] | None = None,
        cert: str | os.PathLike[str] | None = None,
        key: str | os.PathLike[str] | None = None,
        token: Token | None = None,
    ) -> Credentials:
        """From files that a person or a program names; nothing is read yet.

        Raises:
            UsageError: a certificate without its key or without a CA, or the reverse.
        """
        if (cert is None) != (key is None):
            raise UsageError("a client certificate needs its key", remedy="give both --cert and --cert-key")
        if ca is None and cert is not None:
            raise UsageError(
                "a client certificate is used with TLS only", remedy="give --ca, which says whom to trust"
            )
        tls = None
        if ca is not None:
            tls = ClientTls(Path(ca), Path(cert) if cert else None, Path(key) if key else None)
        return cls(tls=tls, token=token)

    def bearer(self) -> str | None:
        """The token itself, read now if it is in a file.

        Raises:
            UsageError: its file can't be read, or it is no token.
            NotPermitted: others may read its file.
        """
        if self.token is None:
            return None
        token = self.token() if callable(self.token) else self.token
        if token.startswith("@"):
            token = read_private(Path(token[1:])).decode(errors="replace").strip()
        if not _TOKEN.fullmatch(token):
            raise UsageError("the token is none", remedy="give it as it was printed, or @FILE")
        return token

    def check(self) -> None:
        """Reads all files once, so that a mistake is told at the start.

        Raises:
            UsageError, NotPermitted: of a file.
        """
        self.bearer()
        if self.tls is not None:
            self.tls.credentials()


ANONYMOUS = Credentials()


def _shown(token: str | None) -> tuple[tuple[str, str], ...]:
    return ((AUTHORIZATION_METADATA, f"Bearer {token}"),) if token is not None else ()


def proving(channel: grpc.aio.Channel, credentials: Credentials) -> grpc.aio.Channel:
    """``channel``, whose calls say who calls; files are read now.

    In each call's metadata, and not as gRPC's call credentials, which exist only over TLS: on this machine a token
    may also go over a loopback connection.

    Raises:
        UsageError, NotPermitted: of the files.
    """
    token = credentials.bearer()
    own = credentials.tls.identity() if credentials.tls is not None else None
    if token is None and own is None:
        return channel
    fixed = None if callable(credentials.token) else _shown(token)

    def proofs() -> Metadata:
        bearer = _shown(credentials.bearer()) if fixed is None else fixed
        if own is None:
            return bearer
        from understudy.common.certificate_proof import PROOF_METADATA, make_proof

        return (*bearer, (PROOF_METADATA, make_proof(own.chain, own.key)))

    return cast(grpc.aio.Channel, ProvingChannel(channel, proofs))
