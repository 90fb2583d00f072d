"""What a backup leaves of the machine to the server whose data it copies.

Processors are shared by priority. A disk's queue can't be: the fdatasync of each commit waits behind the backup's
writes.
"""

from __future__ import annotations

import time
from pathlib import Path

from understudy.common.segment import is_segment_name

_SHARE = 0.25  # of the time, for the backup of a server that commits without a pause
_LOOK_EVERY_S = 0.02
_PAUSE_S_MAX = 0.2  # where one piece took long, another machine or a slow disk was waited for


class Courtesy:
    """Says when to pause. That a server is at work shows by its log.

    Args:
        log: the server's folder of segments.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._seen = self._written()
        self._resumed_s = time.monotonic()

    def pause_s(self) -> float:
        """Seconds to wait now; none where nothing was committed since the last look."""
        now_s = time.monotonic()
        worked_s = now_s - self._resumed_s
        if worked_s < _LOOK_EVERY_S:
            return 0.0
        before, self._seen = self._seen, self._written()
        pause_s = min(worked_s * (1 / _SHARE - 1), _PAUSE_S_MAX) if self._seen != before else 0.0
        self._resumed_s = now_s + pause_s
        return pause_s

    def _written(self) -> tuple[str, int]:
        """The newest segment, and when it was written to last."""
        try:
            name = max(path.name for path in self._log.iterdir() if is_segment_name(path.name))
            return name, (self._log / name).stat().st_mtime_ns
        except (OSError, ValueError):  # it was replaced, as by a bootstrap: whoever reads it is told
            return "", 0
