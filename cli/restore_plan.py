"""What ``restore`` would do with a repository, which ``--dry-run`` only says."""

from __future__ import annotations

from dataclasses import dataclass

import click

from understudy.backup.catalog import Catalog, StoredBackup
from understudy.backup.choice import reach_of
from understudy.backup.manifest import utc_seconds, utc_text
from understudy.backup.point import Point
from understudy.backup.repository import Repository
from understudy.backup.stretch import Stretch
from understudy.cli.output import print_json
from understudy.common.types import Epoch, Lsn


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """From which backup, and how far along the log."""

    repository: Repository
    catalog: Catalog
    stretches: list[Stretch]
    backup: StoredBackup
    with_log: bool
    point: Point | None
    epoch_max: Epoch | None

    def tell(self) -> None:
        """Says it on standard error."""
        manifest = self.backup.manifest
        click.echo(
            f"from {self.backup.id}, which reaches LSN {manifest.lsn} of {manifest.time}"
            + (f"; then the log, up to {self.point or 'its end'}" if self.with_log else ""),
            err=True,
        )

    def print_facts(self, *, as_json: bool) -> None:
        """What else is known without reading the log."""
        epoch, lsn = self._reach()
        ended = self._is_known_to_end(lsn)
        if ended:
            click.echo(
                f"note: what is known there ends with LSN {lsn} of epoch {epoch}, before what is asked for",
                err=True,
            )
        if as_json:
            print_json(self._facts(epoch, lsn) | {"ended": ended})

    def _facts(self, epoch: Epoch, lsn: Lsn) -> dict[str, object]:
        manifest, point = self.backup.manifest, self.point
        time_us = point.time_us if point is not None else None
        return {
            "backup": self.backup.id,
            "lsn": manifest.lsn,
            "time": manifest.time,
            "epoch": manifest.epoch,
            "with_log": self.with_log,
            "to_lsn": point.lsn if point is not None else None,
            "to_time": utc_text(time_us / 1e6) if time_us is not None else None,
            "log_epoch": epoch,
            "log_lsn": lsn,
        }

    def _reach(self) -> tuple[Epoch, Lsn]:
        if not self.with_log:
            return self.backup.manifest.rank
        return reach_of(self.backup, self.stretches, self.epoch_max)

    def _is_known_to_end(self, lsn: Lsn) -> bool:
        """Whether the log ends before the point. Its entries have times that only who reads them knows."""
        if self.point is None:
            return False
        if self.point.lsn is not None:
            return lsn < self.point.lsn
        manifest = self.backup.manifest
        return lsn == manifest.lsn and not self.point.is_before(lsn, round(utc_seconds(manifest.time) * 1e6))
