"""Writes transactions to one realm: in order, many under way at a time, and with an eye on what others do meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import click

from understudy.cli.commit_window import CommitWindow, telling_how_to_go_on
from understudy.cli.output import Progress
from understudy.client import AsyncServer, Operation, Receipt
from understudy.common import portal
from understudy.common.errors import UnderstudyError

_AGAIN = "give the command again: it goes on with what differs"


@dataclass(slots=True)
class Written:
    """What was committed."""

    transactions: int = 0
    version: int = 0  # of the realm, after the last of them
    lsn: int = 0
    others: int = 0  # changes that others made to the realm in between


class RealmWriter:
    """One realm's.

    Args:
        connection: its loop is the portal's.
        version: the realm's, as it was looked at; 0 where there was none. Then nobody else may have made it.
        progress: told of the transactions committed.
    """

    def __init__(self, connection: AsyncServer, realm: str, version: int, progress: Progress) -> None:
        self.written = Written(version=version)
        self._realm = realm
        self._is_new = version == 0
        self._progress = progress
        self._window = CommitWindow(connection, realm)

    def write(self, transactions: Iterable[list[Operation]]) -> Written:
        """Commits them all.

        Raises:
            UnderstudyError: refused, or no answer, or others are making the realm, too; some may have been committed.
        """
        try:
            with telling_how_to_go_on(lambda: _AGAIN):
                self._write(transactions)
        except KeyboardInterrupt:
            click.echo(f"understudy: interrupted; {_AGAIN}", err=True)
            raise
        except UnderstudyError:
            portal.call(self._window.give_up())  # where it was reading the transactions that failed
            raise
        return self.written

    def _write(self, transactions: Iterable[list[Operation]]) -> None:
        for operations in transactions:
            portal.call(self._window.submit(operations, self._note))
            if self._is_new and not self.written.transactions:
                portal.call(
                    self._window.finish()
                )  # nothing is added to a realm that others have made meanwhile
            self._progress.update(self.written.transactions)
        portal.call(self._window.finish())

    def _note(self, receipt: Receipt) -> None:
        self._note_others(receipt)
        self.written.transactions += 1
        self.written.version, self.written.lsn = receipt.version, receipt.lsn

    def _note_others(self, receipt: Receipt) -> None:
        """A version that is not the next one tells of changes in between, or that the realm was dropped."""
        expected = self.written.version + 1
        if receipt.version == expected:
            return
        if self._is_new:
            raise UnderstudyError(
                f"others write to {self._realm}, too, which was not there: LSN {receipt.lsn} made its version "
                f"{receipt.version}, not {expected}"
            )
        self.written.others += max(receipt.version - expected, 1)
