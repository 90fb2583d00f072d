"""How the C library keeps memory, for processes of our own; an application's is its own business."""

from __future__ import annotations

import ctypes

# Chunks of the log and ranges of snapshots have about 1 MiB. By itself glibc maps memory for each anew, or gives it
# back as soon as two are free, and the kernel clears every page again: that was half of what sending them cost.
MAPPED_ALONE_BYTES = 4 << 20
FREE_KEPT_BYTES = 16 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Has glibc keep some memory that was freed; where there is another library, does nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MAPPED_ALONE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, FREE_KEPT_BYTES)
