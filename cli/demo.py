"""``understudy demo``."""

from __future__ import annotations

import contextlib
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from understudy.cli.options import EPILOG, json_option
from understudy.common.errors import CorruptionError, UnderstudyError, UsageError

if TYPE_CHECKING:
    from understudy.cli.demo_fates import Fate, Reunion
    from understudy.cli.demo_screen import Screen
    from understudy.cli.demo_story import Outcome, Story

_T = TypeVar("_T")


@click.command(epilog=EPILOG)
@click.option(
    "--keep", type=click.Path(path_type=Path), metavar="DIR", help="Work in DIR, and leave everything there."
)
@click.option(
    "--writers",
    type=click.IntRange(1, 100),
    default=8,
    show_default=True,
    metavar="N",
    help="How many clients write, each with 8 transactions under way.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    default=16.0,
    show_default=True,
    metavar="S",
    help="How long they write while there are two nodes; half of it before the kill.",
)
@json_option
def demo(keep: Path | None, writers: int, seconds: float, as_json: bool) -> None:
    """Play the whole story on this machine.

    In a minute, on real data: a primary and its replica take in the standard library of this Python, and writers
    go on all the time. The primary is killed, the replica promoted, and the old primary comes back as a replica. Then
    every acknowledged transaction is looked for. In the last act a server is lost with changes that only its clients
    still have: they bring them home, and two of them are reset. Exit code 0 only if nothing acknowledged was lost or
    applied twice, and all nodes and copies are equal.

    \b
    Example:
      understudy demo --keep /tmp/look-around
    """
    from understudy.cli.output import print_json

    with _working_in(keep) as folder:
        outcome, reunion = _play(folder, writers=writers, seconds=seconds, on_stderr=as_json)
        is_good = outcome.proof.is_good and reunion.is_good
        if as_json:
            print_json({"ok": is_good, **_facts(outcome), **_client_facts(reunion)})
        else:
            _tell(outcome)
            _tell_clients(reunion)
        if not is_good:
            raise CorruptionError("what was promised was not kept: see the table")
    if as_json:
        return
    click.secho(
        "\nNothing acknowledged was lost or applied twice; nodes and copies are equal.", fg="green", bold=True
    )
    if keep is not None:
        click.echo(f"Look around: understudy status {keep / 'second'}, understudy log {keep / 'second'}")


@contextlib.contextmanager
def _working_in(keep: Path | None) -> Iterator[Path]:
    """A folder for everything: one to stay, or one that stays only if something goes wrong."""
    import shutil
    import tempfile

    if keep is not None:
        _make_empty(keep)
        yield keep
        return
    folder = Path(tempfile.mkdtemp(prefix="understudy-demo-"))
    try:
        yield folder
    except UnderstudyError:
        click.echo(f"what it left behind, logs too, is in {folder}", err=True)
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


def _make_empty(keep: Path) -> None:
    keep.mkdir(parents=True, exist_ok=True)
    if any(keep.iterdir()):
        raise UsageError(f"{keep} is not empty", remedy="give --keep a directory of its own")


def _play(folder: Path, *, writers: int, seconds: float, on_stderr: bool) -> tuple[Outcome, Reunion]:
    import asyncio
    import logging

    from understudy.cli.demo_screen import Screen
    from understudy.cli.demo_story import Story
    from understudy.common.logs import configure_logs
    from understudy.common.portal import new_event_loop

    configure_logs(level=logging.ERROR)  # a reset is worth a warning, and here it is part of the story
    with Screen(on_stderr=on_stderr) as screen, asyncio.Runner(loop_factory=new_event_loop) as runner:
        story = Story(folder, writers=writers, seconds=seconds, screen=screen)
        outcome = runner.run(_unless_interrupted(_play_acts(story, folder, screen)))
    if outcome is None:
        raise KeyboardInterrupt
    return outcome


async def _play_acts(story: Story, folder: Path, screen: Screen) -> tuple[Outcome, Reunion]:
    """One after the other: by the time that the devices use gRPC on their own loop, nobody does here any more."""
    from understudy.cli.demo_clients import ClientStory

    outcome = await story.play()
    screen.clear()
    return outcome, await ClientStory(folder, screen=screen).play()


async def _unless_interrupted(work: Coroutine[Any, Any, _T]) -> _T | None:
    """What ``work`` returns; None if a signal ended it. It is cancelled once and then has the time that it needs."""
    import asyncio
    import signal

    task = asyncio.create_task(work)
    loop = asyncio.get_running_loop()
    received: list[int] = []

    def stop(number: int) -> None:
        if not received:
            task.cancel()
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop, number)
    await asyncio.wait([task])
    if received and task.cancelled():
        return None
    return task.result()


def _facts(outcome: Outcome) -> dict[str, object]:
    imported, failover, rewound, proof = outcome.imported, outcome.failover, outcome.rewound, outcome.proof
    return {
        "files": imported.files,
        "file_bytes": imported.file_bytes,
        "realms": imported.realms,
        "files_differing": proof.files_differing,
        "acknowledged": proof.tally.acknowledged,
        "unknown": proof.tally.unknown,
        "lost": proof.tally.lost,
        "duplicated": proof.tally.duplicated,
        "strange": proof.tally.strange,
        "seconds_without_primary": round(failover.without_primary_s, 3),
        "promote_seconds": round(failover.promote_s, 3),
        "under_way_at_failover": failover.under_way,
        "answered_again": outcome.answered_again,
        "rewind_seconds": round(rewound.seconds, 3),
        "entries_exported": rewound.entries_exported,
        "bytes_fetched": rewound.bytes_fetched,
        "bytes_total": rewound.bytes_total,
        "digests_equal": not proof.problems,
        "problems": proof.problems,
        "lsn": proof.lsn,
    }


def _tell(outcome: Outcome) -> None:
    from understudy.cli.output import print_facts, seconds_text, size_text

    imported, failover, rewound, proof = outcome.imported, outcome.failover, outcome.rewound, outcome.proof
    tally = proof.tally
    size = size_text(imported.file_bytes)
    fetched = f"{size_text(rewound.bytes_fetched)} of {size_text(rewound.bytes_total)}"
    click.echo()
    print_facts(
        [
            ("files imported", f"{imported.files:,} in {imported.realms} realms, {size}"),
            ("  not equal to the originals", f"{proof.files_differing:,}"),
            ("transactions acknowledged", f"{tally.acknowledged:,}"),
            ("  lost", f"{tally.lost:,}"),
            ("  duplicated", f"{tally.duplicated:,}"),
            ("  there in part, or never sent", f"{tally.strange:,}"),
            ("  outcome unknown", f"{tally.unknown:,}"),
            ("time without a primary", seconds_text(failover.without_primary_s)),
            ("  of it, promote", seconds_text(failover.promote_s)),
            ("transactions under way meanwhile", f"{failover.under_way:,}"),
            ("  already with the new primary", f"{outcome.answered_again:,}, answered, not applied again"),
            ("entries only the old primary had", f"{rewound.entries_exported:,}, exported by rewind"),
            ("fetched by rewind", fetched if rewound.bytes_total else "nothing, the log could go on"),
            ("digests of both nodes", "NOT EQUAL" if proof.problems else f"equal, at LSN {proof.lsn:,}"),
        ]
    )
    for problem in proof.problems:
        click.echo(f"problem: {problem}")


# -- the last act ------------------------------------------------------------------------------------------------


def _client_facts(reunion: Reunion) -> dict[str, object]:
    return {
        "clients": [
            {
                "client": fate.name,
                "realm": fate.realm,
                "resets": list(fate.resets),
                "confirmed_and_lost": fate.lost,
                "brought_home_as_they_were": fate.appended,
                "brought_home_as_new": fate.renewed,
                "missing": fate.missing,
                "queued": fate.queued,
                "kept": fate.kept,
                "dropped": fate.dropped,
            }
            for fate in reunion.fates
        ],
        "client_problems": reunion.problems,
    }


def _tell_clients(reunion: Reunion) -> None:
    from understudy.cli.output import print_table

    numbers = ("lost", "home", "queued", "kept", "dropped")
    click.echo()
    print_table(("client", "realm", "what happened", *numbers), map(_row, reunion.fates), right=numbers)
    click.echo("lost: confirmed, and lost with the server; home: brought home to the next one")
    for problem in reunion.problems:
        click.echo(f"problem: {problem}")
    if reunion.is_good:
        click.echo("digests of all copies: equal to the server's")


def _row(fate: Fate) -> tuple[str, ...]:
    happened = "; ".join(fate.resets) or ("healed the server" if fate.appended else "no reset needed")
    numbers = (fate.lost, fate.appended + fate.renewed, fate.queued, fate.kept, fate.dropped)
    return (fate.name, fate.realm, happened, *(f"{number:,}" for number in numbers))
