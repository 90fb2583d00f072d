"""What an application imports to work with a server.

:func:`connect` and :func:`aconnect` give a direct connection: transactions and reads on the server itself.
"""

from understudy.client.blocking import Server, connect
from understudy.client.direct import AsyncServer, aconnect
from understudy.common.errors import (
    CorruptionError,
    DirectoryError,
    DiskFull,
    Diverged,
    Fenced,
    ForeignCluster,
    NotPermitted,
    NotPrimary,
    OutcomeUnknown,
    Overloaded,
    PeerUnreachable,
    ProtocolError,
    StorageFailed,
    TransactionTooLarge,
    UnderstudyError,
    UnknownRealm,
    UsageError,
)
from understudy.common.memtable import Receipt
from understudy.common.operations import Add, Delete, DeleteRange, Operation, Put, Update
from understudy.common.types import RealmInfo

__all__ = [
    "Add",
    "AsyncServer",
    "CorruptionError",
    "Delete",
    "DeleteRange",
    "DirectoryError",
    "DiskFull",
    "Diverged",
    "Fenced",
    "ForeignCluster",
    "NotPermitted",
    "NotPrimary",
    "Operation",
    "OutcomeUnknown",
    "Overloaded",
    "PeerUnreachable",
    "ProtocolError",
    "Put",
    "RealmInfo",
    "Receipt",
    "Server",
    "StorageFailed",
    "TransactionTooLarge",
    "UnderstudyError",
    "UnknownRealm",
    "Update",
    "UsageError",
    "aconnect",
    "connect",
]
