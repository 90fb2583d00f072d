"""The demo's real data: the source files of the running interpreter's standard library, a realm for each package."""

from __future__ import annotations

import asyncio
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from understudy.cli.pairs import Pair
from understudy.client import AsyncServer, Put
from understudy.common.batches import in_batches
from understudy.common.errors import BadRealmPath, UnderstudyError
from understudy.common.types import check_realm_path, is_system_realm

_LOOSE_REALM = "/stdlib/modules"
_NOT_PART_OF_IT = {"site-packages", "dist-packages", "__pycache__"}
_BATCH_PAIRS = 200
_REALMS_AT_A_TIME = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """Files by the realm that they go to; a file's key is its path below the library."""

    root: Path
    realms: dict[str, list[Path]]

    @property
    def files(self) -> int:
        """How many there are."""
        return sum(map(len, self.realms.values()))

    def pairs(self, realm: str) -> Iterator[Pair]:
        """What the realm is to hold, read from the files."""
        for path in self.realms[realm]:
            yield Pair(os.fsencode(path.relative_to(self.root)), path.read_bytes(), 0)


def find_library() -> Library:
    """The ``*.py`` files of the running interpreter.

    Raises:
        UnderstudyError: it has none.
    """
    root = Path(sysconfig.get_path("stdlib"))
    realms: dict[str, list[Path]] = {}
    for path in _sources(root):
        realms.setdefault(_realm(path.relative_to(root)), []).append(path)
    if not realms:
        raise UnderstudyError(
            f"the demo has nothing to import: no source files in {root}",
            remedy="use a Python that was installed with its standard library as files",
        )
    return Library(root=root, realms=realms)


def _sources(folder: Path) -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False) and entry.name not in _NOT_PART_OF_IT:
            yield from _sources(Path(entry.path))
        elif entry.name.endswith(".py") and entry.is_file(follow_symlinks=False):
            yield Path(entry.path)


def _realm(path: Path) -> str:
    """``/stdlib/PACKAGE``; one realm for loose modules and for packages whose names can't be a realm's."""
    if len(path.parts) == 1:
        return _LOOSE_REALM
    try:
        realm = check_realm_path(f"/stdlib/{path.parts[0]}")
    except BadRealmPath:
        return _LOOSE_REALM
    return _LOOSE_REALM if is_system_realm(realm) else realm


class Importer:
    """Puts a library into a server, several realms at a time."""

    def __init__(self, server: AsyncServer, library: Library) -> None:
        self.files = 0
        self.bytes = 0
        self._server = server
        self._library = library
        self._turns = asyncio.Semaphore(_REALMS_AT_A_TIME)

    async def run(self) -> None:
        """Returns when all files are in, as durable as the server is set to."""
        await asyncio.gather(*(self._import(realm) for realm in self._library.realms))

    async def _import(self, realm: str) -> None:
        async with self._turns:
            pairs = self._library.pairs(realm)
            for batch in in_batches(pairs, lambda pair: pair.size, count_max=_BATCH_PAIRS):
                await self._server.commit(realm, [Put(pair.key, pair.value) for pair in batch])
                self.files += len(batch)
                self.bytes += sum(len(pair.value) for pair in batch)


async def differing_files(server: AsyncServer, library: Library) -> int:
    """How many files the server does not hold byte for byte, or holds and should not."""
    differing = 0
    for realm in library.realms:
        wanted = {pair.key: pair.value for pair in library.pairs(realm)}
        async for key, value in server.scan(realm):
            differing += wanted.pop(key, None) != value
        differing += len(wanted)
    return differing
