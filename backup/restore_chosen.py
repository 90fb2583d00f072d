"""Chosen realms of a backup and of the log behind it: all is restored beside, and they are taken out of that."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from understudy.backup.in_progress import begun_from, in_progress, note_filled, read_filled
from understudy.backup.load_records import load_selected
from understudy.backup.manifest import Manifest, read_manifest, write_manifest
from understudy.backup.progress import Meter, OnProgress
from understudy.backup.restore_target import is_whole_copy, open_target
from understudy.backup.restore_whole import Origin, restore_whole
from understudy.backup.selection import Selection, describe_unmatched
from understudy.backup.source import Source, open_source
from understudy.common.directory import DataDirectory
from understudy.common.errors import CorruptionError, UsageError
from understudy.common.files import sync_tree
from understudy.common.types import is_system_realm


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What is there of what was asked for."""

    manifest: Manifest
    unmatched: list[str]  # of the patterns of realms: there is no such realm at the point

    @property
    def problems(self) -> list[str]:
        """What is missing that was asked for, a line each."""
        return list(dict.fromkeys([*self.manifest.problems, *map(describe_unmatched, self.unmatched)]))


def restore_chosen(
    target: Path, origin: Origin, selection: Selection, progress: OnProgress | None
) -> Restored:
    """Restores all, and takes the chosen realms out of it.

    Raises:
        UsageError: there is no realm of any of the patterns.
        and what :func:`restore_whole` raises.
    """
    name = f"{origin.name} (chosen realms)"  # whichever: they are chosen last
    with open_target(target, name) as directory:
        goes_on = read_filled(target, name) == origin.end and is_whole_copy(directory.incoming)
        with in_progress(target, name, anew=True, goes_on=goes_on):
            restored = _Choosing(directory, origin, selection, progress).bring(goes_on=goes_on)
            directory.raise_epoch_floor(origin.epoch_floor)
            sync_tree(target)
            write_manifest(target, restored.manifest)
            note_filled(target, None)
            shutil.rmtree(directory.incoming)
    return restored


class _Choosing:
    """Realms on their way into a directory, from all that is restored into its ``incoming``."""

    def __init__(
        self, directory: DataDirectory, origin: Origin, selection: Selection, progress: OnProgress | None
    ) -> None:
        self._directory = directory
        self._origin = origin
        self._selection = selection
        self._progress = progress

    def bring(self, *, goes_on: bool) -> Restored:
        """Brings them.

        Args:
            goes_on: an attempt before has restored all.
        """
        while True:
            if not goes_on:
                self._restore_incoming()
                note_filled(self._directory.path, self._origin.end)
            try:
                return self._take()
            except CorruptionError:
                if not goes_on:
                    raise
            # Damaged since then.
            note_filled(self._directory.path, None)
            shutil.rmtree(self._directory.incoming)
            goes_on = False

    def _restore_incoming(self) -> None:
        incoming = self._directory.incoming
        if begun_from(incoming) != self._origin.name:
            shutil.rmtree(incoming, ignore_errors=True)
        restore_whole(incoming, self._origin)

    def _take(self) -> Restored:
        whole = read_manifest(self._directory.incoming)
        with open_source(self._directory.incoming) as source:
            unmatched = self._unmatched(source, whole)
            meter = Meter(None, progress=self._progress)
            manifest = load_selected(self._directory, source, self._selection, meter)
        return Restored(manifest=replace(manifest, node=whole.node), unmatched=unmatched)

    def _unmatched(self, source: Source, whole: Manifest) -> list[str]:
        """The patterns that no realm matches; an error if that is all of them."""
        there = [path for path in source.state.realms() if not is_system_realm(path)]
        left_out = [one.realm for one in whole.failed]  # whoever reads the report hears of them
        unmatched = self._selection.unmatched([*there, *left_out])
        if self._selection.realms and len(unmatched) == len(self._selection.realms):
            raise UsageError(
                f"{self._origin.name} holds no realm of {' or '.join(unmatched)} at LSN {source.end.position.lsn}",
                remedy="give the command again with --realm of one that it holds"
                + (f", such as {', '.join(there[:5])}" if there else "")
                + f": it goes on with what was fetched into {self._directory.path}; or remove that",
            )
        return unmatched
