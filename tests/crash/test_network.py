"""A network at its worst, between primary and replica, and between clients and primary: late, perhaps; wrong, never."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from harness import Processes, wait_until
from nodes import assert_equal, assert_sound, offline_status, put, status, wait_until_caught_up

from crash.clients import Clients
from crash.ledger import Ledger
from crash.network import BadNetwork
from crash.tally import Tally
from understudy.common.certificate_authority import KeyFiles
from understudy.v1 import admin_pb2

_WEATHER_S = 0.3
_DAMAGES_MAX = 4  # at a time; each ends a connection
_BETWEEN = 40  # transactions
_LARGE = b"v" * (3 << 20)


class _Weather:
    """All that a network does, one after the other."""

    def __init__(self, network: BadNetwork, chance: Random, tally: Tally, *, is_thorough: bool) -> None:
        self._network = network
        self._chance = chance
        self._tally = tally
        kinds = [self._delay, self._slow, self._stall, self._stall_and_cut, self._cut]
        # Both sides take ten seconds to find out.
        self._kinds: list[Callable[[], None]] = [*kinds, self._forget] if is_thorough else kinds

    def go_on(self, clients: Clients, seconds: float) -> None:
        """Something happens every now and then, at least once."""
        until_s = time.monotonic() + seconds
        while True:
            clients.wait_for(_BETWEEN)
            self._network.damages_left = self._chance.randrange(_DAMAGES_MAX)
            self._change()
            if time.monotonic() > until_s:
                break
        self._tally.add("damaged pieces", self._network.damaged)

    def _change(self) -> None:
        """For a moment, and then it is over."""
        happening = self._chance.choice(self._kinds)
        happening()
        self._tally.add(happening.__name__.strip("_").replace("_", " "))
        time.sleep(self._chance.random() * _WEATHER_S)
        self._network.recover()

    def _delay(self) -> None:
        self._network.delay_s = 0.05

    def _slow(self) -> None:
        self._network.bytes_a_second = 20_000

    def _stall(self) -> None:
        self._network.stall(after_bytes=self._chance.randrange(50_000))

    def _stall_and_cut(self) -> None:
        self._network.stall(after_bytes=self._chance.randrange(5_000))
        time.sleep(self._chance.random() * _WEATHER_S)
        self._network.cut()

    def _cut(self) -> None:
        self._network.cut()

    def _forget(self) -> None:
        self._network.forget()


def test_a_bad_network_between_primary_and_replica(
    processes: Processes, tmp_path: Path, seed: int, seconds: float, is_thorough: bool, tally: Tally
) -> None:
    """G1, G2, G11: at level `replica`, what is late, broken off or damaged on its way is never applied wrongly."""
    chance = Random(seed)
    primary = processes.primary(tmp_path / "a", "--durability", "replica")
    with BadNetwork(primary.address, chance) as network:
        replica = processes.replica(tmp_path / "b", network.address, "--id", "b")
        weather = _Weather(network, chance, tally, is_thorough=is_thorough)
        with Clients(primary.address, chance, synced=tmp_path / "synced") as clients:
            weather.go_on(clients, seconds)
            clients.stop()
        assert_equal(primary.address, replica.address)
        assert replica.terminate() == 0
    assert offline_status(tmp_path / "b").lsn >= clients.notes.highest_lsn
    _check(tmp_path / "a", clients, tally)
    assert primary.terminate() == 0
    assert_sound(tmp_path / "b")


def test_a_bad_network_between_clients_and_primary(
    processes: Processes,
    tmp_path: Path,
    seed: int,
    seconds: float,
    is_thorough: bool,
    tally: Tally,
    keys: KeyFiles,
) -> None:
    """G6, G10: over TLS nothing that was damaged is believed, and what was lost on its way is done once."""
    chance = Random(seed)
    cert, key = keys.server
    primary = processes.primary(tmp_path / "a", "--tls-cert", cert, "--tls-key", key)
    token = f"@{tmp_path / 'a' / 'admin-token'}"
    with BadNetwork(primary.address, chance, damages_requests=True) as network:
        weather = _Weather(network, chance, tally, is_thorough=is_thorough)
        with Clients(
            network.address, chance, synced=tmp_path / "synced", ca=keys.ca[0], token=token
        ) as clients:
            weather.go_on(clients, seconds)
            clients.stop()
    assert primary.terminate() == 0
    _check(tmp_path / "a", clients, tally)
    assert_sound(tmp_path / "a")


def _check(directory: Path, clients: Clients, tally: Tally) -> None:
    ledger = Ledger()
    ledger.read(directory)
    clients.notes.check(ledger.realms)
    tally.add_notes(clients.notes)


def test_a_chunk_that_stops_in_its_middle_is_not_used_and_is_sent_again(
    processes: Processes, tmp_path: Path, seed: int
) -> None:
    """G2: of an entry of which only a part has come nothing is durable or shown; after a cut it comes whole."""
    primary = processes.primary(tmp_path / "a")
    with BadNetwork(primary.address, Random(seed)) as network:
        replica = processes.replica(tmp_path / "b", network.address, "--id", "b")
        put(primary.address, "/realm", (b"key", b"before"))
        wait_until_caught_up(primary.address, replica.address)
        before = status(replica.address).durable_lsn
        network.stall(after_bytes=len(_LARGE) // 2)
        put(primary.address, "/realm", (b"key", _LARGE))
        wait_until(lambda: network.is_stalled)
        put(primary.address, "/realm", (b"key", b"after"))  # nobody waits for the replica at level `local`
        assert status(replica.address).durable_lsn == before
        network.cut()
        assert_equal(primary.address, replica.address)
        assert replica.stderr.count("event=bootstrap_begins") == 1
        assert replica.terminate() == 0
    assert_sound(tmp_path / "b")


def test_a_slow_line_to_the_replica_holds_up_nobody_at_level_local(
    processes: Processes, tmp_path: Path, seed: int
) -> None:
    """G9: the replica lags and stays connected, clients are answered meanwhile, and all arrives in the end."""
    chance = Random(seed)
    primary = processes.primary(tmp_path / "a")
    with BadNetwork(primary.address, chance) as network:
        replica = processes.replica(tmp_path / "b", network.address, "--id", "b")
        put(primary.address, "/realm", (b"key", b"before"))
        wait_until_caught_up(primary.address, replica.address)
        network.bytes_a_second = 2_000
        with Clients(primary.address, chance) as clients:
            clients.wait_for(200)

            def lagging() -> admin_pb2.ReplicaStatus | None:
                (slot,) = status(primary.address).replicas
                return slot if slot.lag_entries > 20 else None

            assert wait_until(lagging).connected
            clients.stop()
        network.recover()
        assert_equal(primary.address, replica.address)
        assert replica.stderr.count("event=following") == 1
        assert replica.terminate() == 0
