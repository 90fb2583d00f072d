"""Whether what is missing in a repository's log still matters: it does until a backup lies behind it.

The log has a gap where some of it was removed, by the ceiling on its size or by hand, before it could be shipped.
"""

from __future__ import annotations

from collections.abc import Sequence

from understudy.backup.catalog import Catalog
from understudy.backup.log_path import find_path
from understudy.backup.manifest import Manifest
from understudy.backup.stretch import Stretch
from understudy.common.types import Digest, Lsn, Position

# The newest ones may be of a history that was given up; more than that would not all be.
_TRIED_MAX = 20


def find_gap(catalog: Catalog, stretches: Sequence[Stretch]) -> str:
    """What can't be restored though a later part of the log is there, in words; empty where there is nothing.

    It is what lies between a whole backup and the newest stretch if no such backup leads to its end.
    """
    whole = [one.manifest for one in catalog.backups if one.is_restorable and one.manifest.is_whole]
    newest = max(stretches, key=lambda stretch: stretch.rank, default=None)
    if newest is None or not whole:
        return ""
    whole.sort(key=lambda manifest: manifest.rank, reverse=True)
    if newest.rank <= whole[0].rank or any(_leads(one, newest, stretches) for one in whole[:_TRIED_MAX]):
        return ""
    legs = find_path(stretches, stretches, _position(whole[0]), {})
    end = legs[-1].last if legs else whole[0].lsn
    return f"the log behind LSN {end} is not all there: no moment from there to LSN {newest.last} can be restored"


def is_followed(manifest: Manifest, stretches: Sequence[Stretch]) -> bool:
    """Whether the log goes on where a backup ends, if there is any behind it."""
    beyond = [stretch for stretch in stretches if stretch.rank > manifest.rank]
    return not beyond or bool(find_path(beyond, stretches, _position(manifest), {}))


def _leads(manifest: Manifest, newest: Stretch, stretches: Sequence[Stretch]) -> bool:
    return bool(find_path([newest], stretches, _position(manifest), {}))


def _position(manifest: Manifest) -> Position:
    return Position(Lsn(manifest.lsn), Digest(bytes.fromhex(manifest.digest)))
