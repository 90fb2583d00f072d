"""Puts many pairs into a realm: large transactions, several of them under way at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import click

from understudy.cli.commit_window import CommitWindow, telling_how_to_go_on
from understudy.cli.output import Progress, counted
from understudy.cli.pairs import Pair
from understudy.cli.writing import check_primary
from understudy.client import AsyncServer, Put, Receipt
from understudy.client.direct import aconnect_as
from understudy.common import portal
from understudy.common.batches import in_batches
from understudy.common.credentials import Credentials
from understudy.common.errors import BadImport


@dataclass(slots=True, kw_only=True)
class Loaded:
    """What came of it."""

    keys: int = 0
    transactions: int = 0
    lsn: int = 0  # of the last transaction; 0 if there was none
    line: int = 0  # of the last pair committed

    def note(self, batch: list[Pair], receipt: Receipt) -> None:
        """A batch was committed."""
        self.keys += len(batch)
        self.transactions += 1
        self.lsn = receipt.lsn
        self.line = batch[-1].line

    def how_to_go_on(self) -> str:
        """What to do after an error or an interruption."""
        return f"go on with --from-line {self.line + 1}" if self.line else "import again, which does no harm"


def load(
    server: str, credentials: Credentials, realm: str, pairs: Iterable[Pair], *, batch_pairs: int
) -> Loaded:
    """Commits all pairs, in order. When it raises, everything before the pair named was committed.

    Raises:
        BadImport: a pair can't be read; all before it were committed.
        UnderstudyError: the server can't be reached or refused; from the line named on, pairs may be missing.
    """
    loaded = Loaded()
    with connected(server, credentials) as connection, Progress("importing", unit="keys") as progress:
        check_primary(portal.call(connection.status()), server)
        window = CommitWindow(connection, realm)
        try:
            for batch in in_batches(pairs, lambda pair: pair.size, count_max=batch_pairs):
                operations = [Put(pair.key, pair.value) for pair in batch]
                with telling_how_to_go_on(loaded.how_to_go_on):
                    portal.call(window.submit(operations, partial(loaded.note, batch)))
                progress.update(loaded.keys)
        except BadImport:
            _finish(window, loaded)
            raise
        except KeyboardInterrupt:
            click.echo(
                f"understudy: interrupted with {counted(loaded.keys, 'key')} in; {loaded.how_to_go_on()}",
                err=True,
            )
            raise
        _finish(window, loaded)
    return loaded


def _finish(window: CommitWindow, loaded: Loaded) -> None:
    with telling_how_to_go_on(loaded.how_to_go_on):
        portal.call(window.finish())


@contextlib.contextmanager
def connected(server: str, credentials: Credentials) -> Iterator[AsyncServer]:
    """A connection on the portal's loop."""
    # The reading of pairs may wait for a pipe, so the connection lives on another thread's loop.
    manager = aconnect_as(credentials, server)
    connection = portal.call(manager.__aenter__())
    try:
        yield connection
    finally:
        portal.call(manager.__aexit__(None, None, None))
