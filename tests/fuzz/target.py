"""A decoder to be fuzzed, and what it must keep to: any bytes give a result or one of our errors, in bounded memory."""

from __future__ import annotations

import atexit
import contextlib
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from understudy.common.errors import UnderstudyError

# Beyond what there was before: a decoder may hold its input a few times over, never what a length in it says.
MEMORY_BYTES_MAX = 384 << 20
INPUT_BYTES_MAX = 128 << 10  # as large as the largest sample, a small LMDB file

Decode = Callable[[bytes], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One decoder.

    Attributes:
        name: what it reads.
        opened: the function that decodes, with what it needs in a folder of its own, until the block ends.
        samples: good input, as our own encoders make it.
        is_text: whether input is text, and so mutated as text.
        is_slow: whether an input takes milliseconds, and so fewer are tried.
    """

    name: str
    opened: Callable[[Path], AbstractContextManager[Decode]]
    samples: Callable[[], Sequence[bytes]]
    is_text: bool = False
    is_slow: bool = False


def kept_folder() -> Path:
    """A folder that is there until the process ends: for samples that take long to make."""
    folder = tempfile.mkdtemp(prefix="fuzz-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def pure(decode: Decode) -> Callable[[Path], AbstractContextManager[Decode]]:
    """For a decoder that needs nothing on disk."""
    return lambda _: contextlib.nullcontext(decode)


@contextlib.contextmanager
def opened(target: Target) -> Iterator[Callable[[bytes], None]]:
    """A function that tries one input: it returns where the decoder gives a result or one of our errors."""
    with (
        tempfile.TemporaryDirectory(prefix="fuzz-", dir=tempfile.tempdir or in_memory()) as folder,
        target.opened(Path(folder)) as decode,
        bounded_memory(),
    ):
        yield lambda data: _try(decode, data)


def in_memory() -> str | None:
    """Where a sync costs nothing, on machines that have that."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _try(decode: Decode, data: bytes) -> None:
    try:
        decode(data)
    except UnderstudyError as error:
        str(error).encode(errors="backslashreplace")  # it is going to be shown


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Makes what asks for much more memory than there is in use fail at once, with a MemoryError.

    What counts is private memory that can be written to, so an LMDB map is no matter, however large.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + MEMORY_BYTES_MAX, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmData:"))
