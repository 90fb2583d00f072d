"""Nodes crash at random moments under load, again and again, and everything that clients were told holds."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from random import Random

import pytest
from harness import Processes
from killing import Nursery

from crash.clients import Clients
from crash.machines import Killing, Machine, power_losses
from crash.pair import CrashingPair
from crash.tally import Tally

_ROUNDS_MAX = 15  # then all begins anew, so that logs and histories stay small

Machines = Callable[[Path, Random], AbstractContextManager[tuple[Machine, Machine]]]


@contextmanager
def _killing(folder: Path, _: Random) -> Iterator[tuple[Machine, Machine]]:
    for name in ("a", "b"):
        (folder / name).mkdir()
    yield Killing(folder / "a"), Killing(folder / "b")


@contextmanager
def _losing_power(folder: Path, chance: Random) -> Iterator[tuple[Machine, Machine]]:
    with power_losses(folder, chance, 2) as (one, other):
        yield one, other


def _act(
    folder: Path,
    nursery: Nursery,
    seed: int,
    tally: Tally,
    *,
    machines: Machines,
    durability: str,
    until_s: float,
) -> None:
    """A pair from its beginning, through some crashes, to the comparison of everything."""
    print(f"TEST_SEED={seed}")
    (folder / "processes").mkdir(parents=True)
    chance, processes = Random(seed), Processes(folder / "processes")
    with machines(folder, chance) as pair_of_machines:
        try:
            pair = CrashingPair(processes, nursery, pair_of_machines, chance, tally, durability=durability)
            with Clients(pair.addresses, chance, synced=folder / "synced") as clients:
                for _ in range(_ROUNDS_MAX):
                    pair.go_through(clients)
                    if time.monotonic() > until_s:
                        break
                clients.stop()
            pair.check(clients)
        except BaseException:
            processes.close()  # and print what they logged
            raise
    shutil.rmtree(folder)


@pytest.mark.parametrize("durability", ["local", "replica"])
@pytest.mark.parametrize("machines", [_killing, _losing_power], ids=["killed", "powerless"])
def test_whatever_crashes_what_clients_were_told_holds(
    tmp_path: Path,
    nursery: Nursery,
    seed: int,
    seconds: float,
    tally: Tally,
    machines: Machines,
    durability: str,
) -> None:
    """G1, G2, G5, G6, G7, G11: primary, replica or both crash, roles swap; nothing is lost, doubled or untrue."""
    until_s, seeds, acts = time.monotonic() + seconds, Random(seed), 0
    while not acts or time.monotonic() < until_s:
        act_seed = seeds.getrandbits(32) if acts else seed
        folder = tmp_path / f"act{acts}"
        _act(folder, nursery, act_seed, tally, machines=machines, durability=durability, until_s=until_s)
        acts += 1
