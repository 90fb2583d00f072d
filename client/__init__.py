"""What an application imports to work with a server.

:func:`connect` and :func:`aconnect` give a direct connection: transactions and reads on the server itself.
:class:`Realm` is a synced realm: a local copy, read and written at once, offline too.
"""

from understudy.client.blocking import Server, connect
from understudy.client.direct import AsyncServer, aconnect
from understudy.client.local_view import LocalView
from understudy.client.realm import LocalTransaction, Realm
from understudy.client.realm_state import Change, ConnectionState, LoadProgress, RealmState, ResetState
from understudy.client.recovery import Dropped, DroppedOperation, RecoveredChange, Recovery
from understudy.client.tokens import Tokens, TokenSource, alogin, login, logout
from understudy.common.errors import (
    BadKey,
    BadOperation,
    BadRealmPath,
    ClientReset,
    CorruptionError,
    DirectoryError,
    DirectoryInUse,
    DiskFull,
    Diverged,
    Fenced,
    ForeignCluster,
    NewerFormat,
    NotADataDirectory,
    NotAuthenticated,
    NotPermitted,
    NotPrimary,
    OutcomeUnknown,
    Overloaded,
    PeerUnreachable,
    ProtocolError,
    ReceiptExpired,
    StorageFailed,
    TransactionTooLarge,
    Unavailable,
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
    "BadKey",
    "BadOperation",
    "BadRealmPath",
    "Change",
    "ClientReset",
    "ConnectionState",
    "CorruptionError",
    "Delete",
    "DeleteRange",
    "DirectoryError",
    "DirectoryInUse",
    "DiskFull",
    "Diverged",
    "Dropped",
    "DroppedOperation",
    "Fenced",
    "ForeignCluster",
    "LoadProgress",
    "LocalTransaction",
    "LocalView",
    "NewerFormat",
    "NotADataDirectory",
    "NotAuthenticated",
    "NotPermitted",
    "NotPrimary",
    "Operation",
    "OutcomeUnknown",
    "Overloaded",
    "PeerUnreachable",
    "ProtocolError",
    "Put",
    "Realm",
    "RealmInfo",
    "RealmState",
    "Receipt",
    "ReceiptExpired",
    "RecoveredChange",
    "Recovery",
    "ResetState",
    "Server",
    "StorageFailed",
    "TokenSource",
    "Tokens",
    "TransactionTooLarge",
    "Unavailable",
    "UnderstudyError",
    "UnknownRealm",
    "Update",
    "UsageError",
    "aconnect",
    "alogin",
    "connect",
    "login",
    "logout",
]
