"""A backup and the log behind it become a data directory; what was cut off is gone on with, where it is of use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from understudy.backup.in_progress import in_progress, note_filled, read_filled
from understudy.backup.log_following import Following, Goal, WrongWay
from understudy.backup.manifest import Form, Manifest, read_manifest, write_manifest
from understudy.backup.point import cut_log
from understudy.backup.restore_target import holds_copy, open_target
from understudy.backup.target_log import describe_reached, settle
from understudy.common.directory import DataDirectory, Role
from understudy.common.errors import CorruptionError
from understudy.common.files import sync_tree

# Writes a backup's files into a directory; returns what its manifest says, and whether the point is reached (see
# `Unpacking.finish`).
Fill = Callable[[DataDirectory], tuple[Manifest, bool]]
# Given the directory with the backup in it, before the log behind the store is folded into that: once, or more often.
BeforeFolding = Callable[[DataDirectory], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a directory is restored from."""

    name: str
    fill: Fill
    goal: Goal
    following: Following | None  # the log behind it
    identity: str = ""  # what tells it from another one that takes its name
    epoch_floor: int = 0  # the epoch to come is higher
    before_folding: BeforeFolding | None

    @property
    def end(self) -> str:
        """How far to go: what an attempt before has begun is gone on with only where that is the same."""
        end = str(self.goal) if self.following is not None else f"the backup alone, {self.goal}"
        return f"{end}, {self.identity}" if self.identity else end


def restore_whole(target: Path, origin: Origin) -> Manifest:
    """Restores all of it; returns what the manifest says then.

    Raises:
        what :func:`understudy.backup.restore.restore_stored` raises.
    """
    with open_target(target, origin.name) as directory:
        goes_on = (
            origin.following is not None
            and origin.before_folding is None
            and read_filled(target, origin.name) == origin.end
            and holds_copy(target)
        )
        with in_progress(target, origin.name, anew=True, goes_on=goes_on):
            manifest = _bring_forward(directory, origin, goes_on=goes_on)
            directory.raise_epoch_floor(origin.epoch_floor)
            sync_tree(target)
            write_manifest(target, manifest)
    return manifest


def _bring_forward(directory: DataDirectory, origin: Origin, *, goes_on: bool) -> Manifest:
    """The backup and the log behind it.

    Args:
        goes_on: an attempt before has put the backup in place, and perhaps taken some of the log.
    """
    is_reached = False
    while True:
        if not goes_on:
            is_reached = _fill(directory, origin)
        try:
            return _follow(directory, origin, is_reached=is_reached)
        except WrongWay:
            pass
        except CorruptionError:
            # The copy may be damaged since then, or have gone a wrong way; else it is the log's fault.
            if not goes_on or (origin.following is not None and origin.following.begins_at_origin):
                raise
        note_filled(directory.path, None)
        goes_on = False


def _fill(directory: DataDirectory, origin: Origin) -> bool:
    """Puts the backup itself in place; returns whether it goes as far as is wanted."""
    # Of an attempt before, perhaps of another backup.
    for folder in (directory.log, directory.store, directory.incoming):
        shutil.rmtree(folder, ignore_errors=True)
    manifest, is_reached = origin.fill(directory)
    directory.begin(Role.BACKUP, manifest.cluster_id)
    point = origin.goal.point
    if point is not None and not is_reached:
        is_reached = cut_log(directory, point, goes_on=origin.following is not None)
    sync_tree(directory.path)
    write_manifest(directory.path, manifest)
    if origin.following is not None and not is_reached:
        note_filled(directory.path, origin.end)
    if origin.before_folding is not None:
        origin.before_folding(directory)
    return is_reached


def _follow(directory: DataDirectory, origin: Origin, *, is_reached: bool) -> Manifest:
    """Opens what is there, and goes on behind it where that is wanted; returns what the manifest is to say then."""
    manifest = read_manifest(directory.path)
    if origin.following is not None and not is_reached:
        reached = origin.following.follow(directory, manifest.position)
    elif origin.goal.point is not None or manifest.form is Form.RECORDS:
        reached = settle(directory)
    else:
        return manifest
    return describe_reached(directory, manifest, reached)
