"""The structure of an LMDB file, checked page by page without LMDB, which may crash on a damaged one.

py-lmdb's own verifier does the work. In one case it reports what LMDB does on purpose: a long value stands in a
chain of more overflow pages than it needs. ``mdb_cursor_put`` leaves a value where it is if the transaction itself
wrote its chain and the chain is long enough for the new value; the chain's head then says how long the chain is,
and the tree's counter and all later transactions go by that.

No checkpoint writes a key of a named database twice, and what is deleted and then put gets a chain of its own. But
LMDB itself writes records of its list of free pages twice when it commits (``mdb_freelist_save``): first with room
for what is free by then, again without the pages that this very record took. Where that crosses the border of a
page, as it rarely does where thousands of pages are free, the chain is one page longer than needed.

So a chain that is longer than its value counts with all its pages, and is sound if nothing else has any of them and
the counter agrees. A chain that is shorter than its value stays an error.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

from lmdb import verify

from understudy.common.files import storage_errors

_PAGE_NUMBER = struct.Struct("=Q")
# Private, and without types. The versions of py-lmdb that pyproject.toml allows have it, or the tests fail.
_Verifier: Any = verify._Verifier


def check_structure(path: Path) -> list[str]:
    """What is wrong with an LMDB file; empty if nothing is.

    Nothing may write to it meanwhile. Takes some seconds a GiB.

    Args:
        path: an environment's directory, or the file itself.

    Raises:
        StorageFailed: it can't be read.
    """
    data_file = path / "data.mdb" if path.is_dir() else path
    with storage_errors("read", data_file), data_file.open("rb") as file:
        try:
            problems: list[str] = _ChainVerifier(file, os.fstat(file.fileno()).st_size).verify()
        except verify.VerifyError as error:
            return [str(error)]
    return problems


class _ChainVerifier(_Verifier):  # type: ignore[misc]
    """Takes the length of an overflow chain from its head where that is more than the value needs."""

    def _bigdata(
        self, ctx: dict[str, Any], pgno: int, i: int, buf: bytes, doff: int, dsize: int, want_bytes: bool
    ) -> bytes | None:
        # The verifier derives the chain's length from the value's; so it is shown a value that fills the chain.
        filling = max(dsize, self._chain_bytes(buf, doff))
        data: bytes | None = super()._bigdata(ctx, pgno, i, buf, doff, filling, want_bytes)
        return None if data is None else data[:dsize]

    def _chain_bytes(self, buf: bytes, doff: int) -> int:
        """How long a value the chain can hold; 0 where there is no chain."""
        if doff + _PAGE_NUMBER.size > len(buf):
            return 0
        head = self.read_page(_PAGE_NUMBER.unpack_from(buf, doff)[0])
        if head is None or self._pg_flags(head, 0) != verify.P_OVERFLOW:
            return 0
        filling: int = self._pg_pages(head, 0) * self.psize - self.hdrsz
        return filling
