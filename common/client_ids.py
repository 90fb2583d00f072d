"""Ids of synced clients: who reads a realm sees them all, and only who holds a directory's secret may use its own.

An id is a salt, and a mark of the secret under that salt. A directory keeps one secret for as long as it lives, shows
it to the servers that it meets, and can take new ids at any time.
"""

from __future__ import annotations

import hashlib
import hmac

from understudy.common.types import ID_BYTES, new_id

SALT_BYTES = 4


def new_client_id(secret: bytes) -> bytes:
    """A new id, 16 bytes, of the directory with this secret."""
    return client_id(secret, new_id()[:SALT_BYTES])


def owns(secret: bytes, client: bytes) -> bool:
    """Whether ``client`` is an id of the directory with this secret."""
    return hmac.compare_digest(client_id(secret, client[:SALT_BYTES]), client)


def client_id(secret: bytes, salt: bytes) -> bytes:
    """The id of the directory with this secret that begins with ``salt``, :data:`SALT_BYTES` long."""
    return salt + hashlib.blake2b(salt, key=secret, digest_size=ID_BYTES - SALT_BYTES).digest()
