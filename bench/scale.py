"""How much is measured: in full, or quickly to see that everything runs."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Sizes and durations of all rows."""

    name: str
    rounds: int
    window_s: float  # of one closed-loop measurement
    warm_s: float  # before it, not counted
    keys: int  # that random keys are drawn from, and that the store is preloaded with
    lag_s: float
    catchup_entries: int
    store_bytes: int  # of the large store
    larger_store_bytes: int
    small_store_bytes: int
    memory_bytes: int  # of values that go through
    memory_commits: int
    replayed_entries: int
    local_commits: int  # relaxed; a tenth of it durable
    uploaded_changes: int
    downloaded_keys: int
    followers: int  # connected clients of one realm
    followed_s: float
    realms: int  # on one server
    realms_clients: int
    realms_s: float  # of light traffic
    disk_bytes: int  # that the whole run needs at once, at the most


FULL = Scale(
    name="full",
    rounds=3,
    window_s=5.0,
    warm_s=1.0,
    keys=1_000_000,
    lag_s=30.0,
    catchup_entries=1_000_000,
    store_bytes=2 * GIB,
    larger_store_bytes=8 * GIB,
    small_store_bytes=20 * MIB,
    memory_bytes=2 * GIB,
    memory_commits=2_000_000,
    replayed_entries=300_000,
    local_commits=20_000,
    uploaded_changes=10_000,
    downloaded_keys=100_000,
    followers=100,
    followed_s=20.0,
    realms=10_000,
    realms_clients=200,
    realms_s=30.0,
    disk_bytes=40 * GIB,
)

QUICK = Scale(
    name="quick",
    rounds=1,
    window_s=2.0,
    warm_s=0.5,
    keys=100_000,
    lag_s=5.0,
    catchup_entries=150_000,
    store_bytes=256 * MIB,
    larger_store_bytes=512 * MIB,
    small_store_bytes=20 * MIB,
    memory_bytes=128 * MIB,
    memory_commits=100_000,
    replayed_entries=100_000,
    local_commits=3_000,
    uploaded_changes=3_000,
    downloaded_keys=30_000,
    followers=20,
    followed_s=3.0,
    realms=400,
    realms_clients=20,
    realms_s=3.0,
    disk_bytes=5 * GIB,
)
