"""Background tasks: what becomes of an error that nobody awaits."""

from __future__ import annotations

import asyncio
import logging

import pytest

from understudy.common.errors import StorageFailed, UnderstudyError
from understudy.common.events import LOGGER
from understudy.common.tasks import spawn


def _failed_with(error: Exception) -> UnderstudyError:
    """What a task that raises ``error`` hands over."""

    async def story() -> UnderstudyError:
        told: asyncio.Future[UnderstudyError] = asyncio.get_running_loop().create_future()

        async def fail() -> None:
            raise error

        spawn(fail(), told.set_result)
        return await told

    return asyncio.run(story())


def test_an_error_of_ours_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Where a task could not go on for a reason that has words, these are logged, and no traceback."""
    caplog.set_level(logging.INFO, LOGGER)
    error = StorageFailed("can't write x", remedy="look at the disk")
    assert _failed_with(error) is error
    [record] = caplog.records
    assert "event=task_failed" in record.getMessage()
    assert "can't write x (look at the disk)" in record.getMessage()
    assert record.levelno == logging.ERROR
    assert record.exc_info is None


def test_a_mistake_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    """What nobody has thought of is handed over as an internal error, and the log says where it came from."""
    caplog.set_level(logging.INFO, LOGGER)
    error = KeyError("x")
    assert _failed_with(error).message == "internal error: KeyError('x')"
    [record] = caplog.records
    assert "event=task_crashed" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is error
