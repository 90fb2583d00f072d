"""A full check of a store in a process of its own: ``python -m understudy.common.check_process STORE``.

A server starts it, so that its own event loop goes on undisturbed. The answer, a serialized
``StateDigestsResponse``, goes to standard output.
"""

from __future__ import annotations

import sys
from pathlib import Path

from understudy.common.errors import UnderstudyError
from understudy.common.niceness import let_commits_go_first
from understudy.common.store import Store
from understudy.common.store_check import RealmState, check_state
from understudy.v1 import admin_pb2


def main(store: Path) -> int:
    """Checks the store and writes the answer; returns the exit code."""
    let_commits_go_first()
    try:
        with Store.open(store) as opened:
            response = digests(opened)
    except UnderstudyError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    sys.stdout.buffer.write(response.SerializeToString())
    return 0


def digests(store: Store) -> admin_pb2.StateDigestsResponse:
    """Checks a store; what was found, as a server answers it.

    Raises:
        CorruptionError: see :func:`understudy.common.store_check.check_state`.
    """
    response = admin_pb2.StateDigestsResponse()

    def add(state: RealmState) -> None:
        response.realms.add(
            realm=state.path, version=state.version, state_digest=state.state_digest, entries=state.entries
        )

    check = check_state(store, on_realm=add)
    response.lsn, response.digest, response.state_digest = check.lsn, check.digest, check.state_digest
    response.problems.extend(check.problems)
    return response


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
