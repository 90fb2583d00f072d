"""A transaction being put together, for the direct client and the embedded primary alike."""

from __future__ import annotations

from understudy.common.errors import BadOperation
from understudy.common.memtable import Receipt
from understudy.common.operations import Add, Delete, DeleteRange, Operation, Put, Update


class TransactionBuilder:
    """Collects operations; whoever made it sends them when the ``with`` block ends, at least one.

    ``receipt`` is there afterwards. A block that raises sends nothing. After the block nothing can be added.
    """

    def __init__(self) -> None:
        self._operations: list[Operation] = []
        self._receipt: Receipt | None = None
        self._ended = False

    def end(self) -> list[Operation]:
        """What was collected; nothing is from here on."""
        self._ended = True
        return self._operations

    def _collect(self, operation: Operation) -> None:
        if self._ended:
            raise BadOperation(f"{operation!r:.200} comes too late", remedy="begin another transaction")
        self._operations.append(operation)

    def put(self, key: bytes, value: bytes) -> None:
        """Sets ``key`` to ``value``."""
        self._collect(Put(key, value))

    def update(self, key: bytes, value: bytes) -> None:
        """Sets ``key`` to ``value`` where the key exists."""
        self._collect(Update(key, value))

    def delete(self, key: bytes) -> None:
        """Removes ``key``."""
        self._collect(Delete(key))

    def delete_range(self, start: bytes = b"", end: bytes = b"") -> None:
        """Removes every key from ``start`` to before ``end``; empty means without bound."""
        self._collect(DeleteRange(start, end))

    def add(self, key: bytes, amount: int) -> None:
        """Adds to the counter at ``key``; without effect where the value is no counter, or the sum has no 64 bits."""
        self._collect(Add(key, amount))

    @property
    def receipt(self) -> Receipt:
        """Realm, version, LSN and digest of the committed transaction.

        Raises:
            BadOperation: it was not committed (yet).
        """
        if self._receipt is None:
            raise BadOperation("no receipt: the transaction was not committed")
        return self._receipt

    def committed(self, receipt: Receipt) -> None:
        """Notes the receipt."""
        self._receipt = receipt
