"""Realms of a backup brought back into a running server, as ordinary transactions."""

from __future__ import annotations

import datetime
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from understudy.backup.manifest import Manifest
from understudy.backup.realm_bases import Bases
from understudy.backup.restore import RestoreReport
from understudy.backup.restore_chosen import Restored
from understudy.backup.restore_whole import BeforeFolding
from understudy.backup.restored_realms import Pair, RestoredRealms, differences, in_transactions
from understudy.backup.scratch import scratch
from understudy.backup.selection import Selection
from understudy.backup.source import open_source
from understudy.cli import pairs
from understudy.cli.loader import connected
from understudy.cli.output import Progress, counted, print_json
from understudy.cli.realm_writer import RealmWriter, Written
from understudy.cli.sinks import FileSink
from understudy.cli.writing import check_primary
from understudy.client import AsyncServer, Operation, Server
from understudy.common.credentials import Credentials
from understudy.common.errors import UsageError
from understudy.common.types import check_realm_path, is_system_realm

# Makes a data directory of the backup.
Restore = Callable[[Path, BeforeFolding], RestoreReport]
_NAME_CHARACTERS_MAX = 150  # of an export's file name; a realm's path alone can be longer than a name may be


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is wanted."""

    selection: Selection
    as_path: str | None  # the one realm's path on the server, if another one
    scratch: Path  # the folder to restore in
    dry_run: bool
    yes: bool  # don't ask

    def check(self) -> None:
        """Refuses what can't be, before anything is done.

        Raises:
            UsageError.
        """
        self.selection.check()
        if self.as_path is None:
            return
        check_realm_path(self.as_path)
        if is_system_realm(self.as_path):
            raise UsageError(f"{self.as_path} is the system's own", remedy="give another path with --as")
        if "~" in self.as_path.split("/"):
            raise UsageError(f"{self.as_path} does not say whose", remedy="give the user's id in place of ~")


@dataclass(slots=True, kw_only=True)
class Plan:
    """What is to be done with one realm."""

    realm: str  # in the backup
    target: str  # on the server
    version: int = 0  # of the target; 0: it is not there
    past: int = 0  # changes that are written one by one, into a target that is not there
    has_base: bool = False  # and before them, what the realm held when they began
    puts: int = 0
    overwrites: int = 0  # of the puts
    deletes: int = 0
    export: Path | None = None  # what is there now
    written: Written | None = None

    @property
    def is_new(self) -> bool:
        """Whether the target is not there yet."""
        return not self.version

    @property
    def is_done(self) -> bool:
        """Whether the target is there, and is what it shall be."""
        return not self.is_new and not self.puts and not self.deletes

    @property
    def destroys(self) -> bool:
        """Whether something that is there will be gone."""
        return bool(self.overwrites or self.deletes)

    @property
    def _base(self) -> str:
        return ", behind the state before them" if self.has_base else ""

    def __str__(self) -> str:
        name = self.realm if self.realm == self.target else f"{self.realm} as {self.target}"
        if self.is_new:
            return f"{name}: is not there; {counted(self.past, 'change')} one by one{self._base}"
        if self.is_done:
            return f"{name}: nothing differs"
        return (
            f"{name}: {counted(self.puts, 'put')}, of which {self.overwrites:,} overwrite, and "
            f"{counted(self.deletes, 'delete')}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Restored):
    """What came of it; the manifest is of what was restored beside."""

    plans: list[Plan]
    seconds: float

    @property
    def others(self) -> list[Plan]:
        """The realms that others have written to meanwhile."""
        return [plan for plan in self.plans if plan.written is not None and plan.written.others]


def restore_into(server: str, credentials: Credentials, restore: Restore, options: Options) -> Outcome:
    """Restores into a scratch directory, and writes the chosen realms to the server.

    Raises:
        UsageError: no realm is chosen, or too many are, or nobody was asked whether to overwrite.
        UnderstudyError: what restoring, connecting and committing raise; some may have been written.
        click.Abort: a person has said no.
    """
    started_s = time.monotonic()
    options.check()
    with connected(server, credentials) as connection, scratch(options.scratch) as directory:
        reading = Server(connection)
        check_primary(reading.status(), server)
        there = {realm.path for realm in reading.realms()}
        bases = Bases(directory.parent / "bases", lambda path: _is_missing(path, options, there))
        manifest = restore(directory, bases.keep).manifest
        with open_source(directory) as source:
            restoring = _Restoring(connection, RestoredRealms(source.state, bases), options)
            plans = restoring.run(manifest)
    unmatched = options.selection.unmatched([plan.realm for plan in plans])
    return Outcome(manifest=manifest, unmatched=unmatched, plans=plans, seconds=time.monotonic() - started_s)


def _is_missing(path: str, options: Options, there: set[str]) -> bool:
    return options.selection.takes(path) and (options.as_path or path) not in there


class _Restoring:
    def __init__(self, connection: AsyncServer, realms: RestoredRealms, options: Options) -> None:
        self._connection = connection
        self._server = Server(connection)
        self._realms = realms
        self._options = options

    def run(self, manifest: Manifest) -> list[Plan]:
        """Looks, shows, asks, writes."""
        paths = self._chosen(manifest)
        plans: list[Plan] = []
        try:
            for path in paths:
                plans.append(Plan(realm=path, target=self._options.as_path or path))
                self._look(plans[-1])
                click.echo(str(plans[-1]), err=True)
            if not self._options.dry_run:
                self._ask(plans)
                for plan in plans:
                    self._write(plan)
        finally:
            # Nothing was taken away there, so nobody needs what it was.
            for plan in plans:
                if plan.export is not None and (plan.written is None or not plan.destroys):
                    plan.export.unlink(missing_ok=True)
                    plan.export = None
        return plans

    def _chosen(self, manifest: Manifest) -> list[str]:
        paths = self._realms.paths(self._options.selection)
        if not paths:
            raise UsageError(
                f"the backup holds no realm of {self._options.selection} at LSN {manifest.lsn} of {manifest.time}",
                remedy="`understudy log DIR --realm PATH` shows what became of one; --lsn or --at goes to before that",
            )
        if self._options.as_path is not None and len(paths) > 1:
            raise UsageError(
                f"--as is for one realm, and {self._options.selection} holds {len(paths)}: {', '.join(paths[:5])}"
                + (", …" if len(paths) > 5 else ""),
                remedy="choose one with --realm",
            )
        return paths

    # -- looking -------------------------------------------------------------------------------------------

    def _look(self, plan: Plan) -> None:
        """Fills in what is there, and how it differs from what is wanted."""
        # Before it is read: whatever is changed from here on then shows in the versions that our changes make.
        plan.version = self._version(plan.target)
        if plan.is_new:
            plan.past, plan.has_base = self._realms.past(plan.realm)
            return
        plan.export = self._export(plan.target)
        with Progress("comparing", unit="keys") as progress:
            for number, one in enumerate(differences(_exported(plan), self._realms.pairs(plan.realm)), 1):
                plan.puts += one.wanted is not None
                plan.overwrites += one.wanted is not None and one.present is not None
                plan.deletes += one.wanted is None
                progress.update(number)

    def _version(self, path: str) -> int:
        return next((realm.version for realm in self._server.realms() if realm.path == path), 0)

    def _export(self, path: str) -> Path:
        """Writes out a realm as it is (G4), into the current directory. Nobody has asked for it, so it is private."""
        file = _free_name(path)
        with Progress("exporting", unit="keys") as progress, FileSink(file, mode=0o600) as sink:
            for number, (key, value) in enumerate(self._server.scan(path), 1):
                sink.write(key, value)
                progress.update(number)
        return file

    # -- writing -------------------------------------------------------------------------------------------

    def _ask(self, plans: list[Plan]) -> None:
        if self._options.yes or all(plan.is_done for plan in plans):
            return
        if sys.stdin.isatty():
            click.confirm("Write this to the server?", abort=True, err=True)
            return
        destroying = [plan for plan in plans if plan.destroys]
        if destroying:
            raise UsageError(
                f"{destroying[0]}: nobody is there to be asked",
                remedy="--as PATH restores it beside the present one; --yes overwrites, and leaves an export of that",
            )

    def _write(self, plan: Plan) -> None:
        if plan.is_done:
            return
        if plan.destroys:
            click.echo(f"{plan.target} as it is now: {plan.export}", err=True)
        with Progress("writing", unit="transactions") as progress:
            writer = RealmWriter(self._connection, plan.target, plan.version, progress)
            plan.written = writer.written
            writer.write(self._transactions(plan))

    def _transactions(self, plan: Plan) -> Iterator[list[Operation]]:
        if plan.is_new:
            return self._realms.transactions(plan.realm)
        found = differences(_exported(plan), self._realms.pairs(plan.realm))
        return in_transactions(one.operation() for one in found)


def _exported(plan: Plan) -> Iterator[Pair]:
    """What was there when it was looked at."""
    assert plan.export is not None, "what is there was exported"
    return ((pair.key, pair.value) for pair in pairs.file_lines(plan.export, from_line=1))


def _free_name(realm: str) -> Path:
    """Of a file that is not there yet."""
    now = datetime.datetime.now(datetime.UTC)
    # A plus sign is in no segment of a path, so no two realms' names are alike.
    stem = f"{realm[1:].replace('/', '+')[:_NAME_CHARACTERS_MAX]}-before-restore-{now:%Y%m%dT%H%M%SZ}"
    names = itertools.chain([f"{stem}.jsonl"], (f"{stem}-{number}.jsonl" for number in itertools.count(2)))
    return next(path for path in map(Path, names) if not path.exists())


# -- telling -----------------------------------------------------------------------------------------------------


def print_outcome(outcome: Outcome, *, as_json: bool) -> None:
    """What was written, on standard output; and on standard error what others have."""
    manifest = outcome.manifest
    if as_json:
        print_json(
            {
                "lsn": manifest.lsn,
                "time": manifest.time,
                "realms": [_facts(plan) for plan in outcome.plans],
                "seconds": round(outcome.seconds, 3),
            }
        )
    else:
        for plan in outcome.plans:
            if plan.written is not None:
                click.echo(_line(plan, plan.written, manifest))
    for plan in outcome.others:
        assert plan.written is not None, "that is how we know"
        click.echo(
            f"problem: {counted(plan.written.others, 'change')} to {plan.target} came from others meanwhile, and may "
            f"have been overwritten: `understudy log DIR --realm {plan.target} --to {plan.written.lsn}` on the server "
            "shows them",
            err=True,
        )


def _line(plan: Plan, written: Written, manifest: Manifest) -> str:
    done = f"{plan.target}: as {plan.realm} was at LSN {manifest.lsn} of {manifest.time}"
    line = f"{done}, in {counted(written.transactions, 'transaction')}, now version {written.version:,}"
    return line if plan.export is None else f"{line}; as it was before: {plan.export}"


def _facts(plan: Plan) -> dict[str, object]:
    written = plan.written or Written(version=plan.version)
    return {
        "realm": plan.realm,
        "target": plan.target,
        "created": plan.is_new,
        "history": plan.past,
        "puts": plan.puts,
        "overwrites": plan.overwrites,
        "deletes": plan.deletes,
        "export": str(plan.export) if plan.export is not None else None,
        "transactions": written.transactions,
        "version": written.version,
        "lsn": written.lsn,
        "others": written.others,
    }
