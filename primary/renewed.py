"""The name under which a change comes home whose realm and whose client have both gone on without it.

Numbers of a client must rise, so it can't have its own any more. The name is derived from client and number, so it
can be asked for whether a change has come home so: it must not be applied again under its own.
"""

from __future__ import annotations

from hashlib import sha256

from understudy.common.types import ID_BYTES

RENEWED_NUMBER = 1  # each name is used for one change


def renewed_name(client: bytes, number: int) -> bytes:
    """The client id that stands for one change of a client."""
    return sha256(b"renewed" + client + number.to_bytes(8, "big")).digest()[:ID_BYTES]
