"""A full check of a store in a process of its own: ``python -m understudy.common.check_process STORE``.

A server starts it, so that its own event loop goes on undisturbed. The answer, a serialized
``StateDigestsResponse``, goes to standard output.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from understudy.common.errors import UnderstudyError
from understudy.common.store import Store
from understudy.common.store_check import StateCheck, check_state
from understudy.v1 import admin_pb2, log_pb2

NICENESS = 10  # commits go first


def main(store: Path) -> int:
    """Checks the store and writes the answer; returns the exit code."""
    os.nice(NICENESS)
    try:
        with Store.open(store) as opened:
            response = to_response(check_state(opened))
    except UnderstudyError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    sys.stdout.buffer.write(response.SerializeToString())
    return 0


def to_response(check: StateCheck) -> admin_pb2.StateDigestsResponse:
    """What a check found, as a server answers it."""
    return admin_pb2.StateDigestsResponse(
        lsn=check.lsn,
        digest=check.digest,
        state_digest=check.state_digest,
        realms=[
            log_pb2.RealmDigest(
                realm=path, version=state.version, state_digest=state.state_digest, entries=state.entries
            )
            for path, state in check.realms.items()
        ],
        problems=check.problems,
    )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
