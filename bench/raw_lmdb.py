"""LMDB alone: the same pairs in the same batches, sorted, each batch in one synced transaction of ``putmulti``.

What a checkpoint does beside that (state digests, old values, history, receipts) is not done here, and neither are
log, network and decoding. Coalescing and sorting are not timed.
"""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import lmdb
from jobs import RawJob, argument, parse_job
from load import ordered_pairs, random_pairs

from understudy.common.store_layout import MAP_BYTES, realm_prefix

_PREFIX = realm_prefix(1)  # keys are as long as in a store
_FILLED_AT_ONCE = 50_000


def _open(folder: str) -> lmdb.Environment:
    return lmdb.open(folder, map_size=MAP_BYTES, max_dbs=1, lib_version=0)


def fill(job: RawJob) -> dict[str, Any]:
    """Makes the environment, preloaded as the store is."""
    pairs = ordered_pairs(seed=0, keys=job.keys, value_bytes=job.value_bytes)
    with _open(job.folder) as env:
        data = env.open_db(b"data")
        while batch := [(_PREFIX + key, value) for key, value in itertools.islice(pairs, _FILLED_AT_ONCE)]:
            with env.begin(db=data, write=True) as txn:
                txn.cursor().putmulti(batch, append=True)
    return {}


def write(job: RawJob) -> dict[str, Any]:
    """Writes the batches; gives the seconds of each transaction."""
    pairs = random_pairs(seed=job.seed, keys=job.keys, value_bytes=job.value_bytes)
    times_s = []
    with _open(job.folder) as env:
        data = env.open_db(b"data")
        for count in job.batches:
            batch = sorted({_PREFIX + key: value for key, value in itertools.islice(pairs, count)}.items())
            began_s = time.monotonic()
            with env.begin(db=data, write=True) as txn:
                txn.cursor().putmulti(batch)
            times_s.append(time.monotonic() - began_s)
    return {"seconds": times_s}


def main() -> None:
    """Does the job in the argument."""
    job = parse_job(RawJob, argument())
    print(json.dumps(write(job) if job.batches else fill(job)))


if __name__ == "__main__":
    main()
