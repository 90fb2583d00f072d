"""The changes of clients' realms as a node's log has them, gathered while the copies that hold the log come and go."""

from __future__ import annotations

import uuid
from collections import defaultdict
from pathlib import Path

from crash.history import Applied
from understudy.common.directory import NODE_FILE, NodeFile
from understudy.common.entries import change_digest, parse_change, parse_entry
from understudy.common.log_reader import read_records
from understudy.common.operations import ADD, PUT
from understudy.common.types import ClusterId, Lsn
from understudy.v1 import log_pb2

REALMS = ("/one", "/two")  # of the clients
LABEL = b"label/"  # a transaction puts a key of this and its label


class Ledger:
    """All changes up to some LSN. What was read once is final: what follows must chain to it."""

    def __init__(self) -> None:
        self.realms: dict[str, list[Applied]] = defaultdict(list)
        self._heads: dict[str, bytes] = {}
        self._last = Lsn(0)

    def read(self, directory: Path, *, upto: int | None = None) -> None:
        """Goes on with the log in a data directory, to its end, or to an LSN up to which it can't change any more."""
        node = NodeFile.read(directory / NODE_FILE)
        cluster = ClusterId(uuid.UUID(node.cluster).bytes)
        for record in read_records(directory / "log", cluster, self._last):
            if upto is not None and record.lsn > upto:
                break
            assert record.lsn == self._last + 1, f"LSN {record.lsn} after {self._last}"
            self._last = record.lsn
            raw = parse_entry(record.payload, record.lsn).change
            if raw:
                self._add(record.lsn, raw)

    def _add(self, lsn: Lsn, raw: bytes) -> None:
        change = parse_change(raw, lsn)
        if change.realm not in REALMS:
            return
        before = self._heads.get(change.realm, b"")
        assert change.previous == before, f"{change.realm}, LSN {lsn}: its previous change is another one"
        self._heads[change.realm] = change_digest(raw)
        self.realms[change.realm].append(_applied(lsn, change))


def _applied(lsn: Lsn, change: log_pb2.Change) -> Applied:
    puts = {one.key: one.value for one in change.operations if one.kind == PUT}
    (label,) = (key.removeprefix(LABEL) for key in puts if key.startswith(LABEL))
    return Applied(
        lsn=lsn,
        version=change.version,
        client=change.client,
        number=change.number,
        label=label,
        puts={key: value for key, value in puts.items() if not key.startswith(LABEL)},
        adds={one.key: one.amount for one in change.operations if one.kind == ADD},
    )
