"""A fence that could not be written down at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from harness import wait_until

from understudy.common.directory import DataDirectory, Role
from understudy.common.errors import DiskFull, WrongRole
from understudy.common.settings import PrimarySettings
from understudy.common.types import Epoch
from understudy.primary.server import serving_primary


def test_a_fence_that_finds_no_space_is_on_disk_as_soon_as_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G7, G9: fenced while its disk is full, a primary stays fenced after a restart if there was space meanwhile."""
    settings = PrimarySettings(data_dir=tmp_path / "a", listen="127.0.0.1:0")

    def full(*_: object) -> None:
        raise DiskFull("no space left")

    async def story() -> None:
        async with serving_primary(settings) as old:
            with monkeypatch.context() as patch:
                patch.setattr(DataDirectory, "set_role", full)
                old.node.fence(Epoch(2))
                assert old.node.is_fenced
            assert old.node.engine.directory.role is Role.PRIMARY
            await asyncio.to_thread(wait_until, lambda: old.node.engine.directory.role is Role.FENCED)
        with pytest.raises(WrongRole):
            async with serving_primary(settings):
                pass

    asyncio.run(story())
