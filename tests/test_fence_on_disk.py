"""A fence that could not be written down at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from harness import wait_until

from understudy.common.directory import NODE_FILE, DataDirectory, NodeFile, Role
from understudy.common.errors import DiskFull, WrongRole
from understudy.common.settings import PrimarySettings
from understudy.common.types import Epoch
from understudy.primary.server import serving_primary


def test_g7_a_fence_is_on_disk_when_nothing_more_is_acknowledged(tmp_path: Path) -> None:
    """G7: whatever becomes of the process once it is fenced, its directory says so."""
    settings = PrimarySettings(data_dir=tmp_path / "a", listen="127.0.0.1:0")

    async def story() -> None:
        async with serving_primary(settings) as old:
            old.node.fence(Epoch(2))
            assert NodeFile.read(tmp_path / "a" / NODE_FILE).role is Role.FENCED

    asyncio.run(story())


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
