"""What a mutant is: the product with one thing wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class Moved(Exception):
    """The text that a mutant replaces is not in its place any more, or not only there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One breakage.

    Attributes:
        name: of what is wrong then.
        guarantee: that it breaks.
        file: relative to the repository.
        old: stands there exactly once.
        new: takes its place.
        tests: files or node ids; that should notice it where no simulated story does.
        simulated: whether a simulated story can notice it at all: it has no forgers, and its disks are its own.
    """

    name: str
    guarantee: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    simulated: bool = True

    def source(self, root: Path) -> str:
        """The broken file of the tree in ``root``.

        Raises:
            Moved: the registry has to follow the code.
        """
        path = root / self.file
        text = path.read_text() if path.exists() else ""
        if (count := text.count(self.old)) != 1:
            raise Moved(f"{self.name}: its old text occurs {count} times in {self.file}:\n{self.old}")
        return text.replace(self.old, self.new)
