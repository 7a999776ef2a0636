"""What a part gets: the device, the size, the time, and where its results go."""

from __future__ import annotations

import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarking.gpu.results import Results


@dataclass(frozen=True)
class Task:
    """The task of one part.

    `tiny` asks for toy sizes, with which every line of a part runs but no number means anything. `scratch` is a folder
    that is removed when the suite ends; `text` are files to train on, if any.
    """

    part: str
    device: str
    tiny: bool
    out: Path
    scratch: Path
    seconds: float
    text: tuple[Path, ...] = ()
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        """The seconds that the part may still take."""
        return self.began + self.seconds - time.monotonic()

    @property
    def backend(self) -> str:
        """The backend of `torch.compile`: Inductor, or for a toy one that makes no kernels."""
        return "eager" if self.tiny else "inductor"

    def row(self, table: str, **cells: Any) -> None:
        """Add a line to one of the report's tables; cells are numbers and short texts."""
        Results(self.out).write("row", part=self.part, table=table, cells=cells)
        print(f"{table}: {cells}", flush=True)

    def check(self, what: str, held: bool, found: str = "") -> None:
        """Record whether something that must hold does."""
        Results(self.out).write("check", part=self.part, what=what, held=bool(held), found=found)
        print(f"{'holds' if held else 'DOES NOT HOLD'}: {what}: {found}", flush=True)

    def failed(self, what: str) -> None:
        """Record the traceback of the current exception as a promise that did not hold."""
        error = traceback.format_exc()
        print(error, file=sys.stderr, flush=True)
        last = error.strip().splitlines()[-1]
        Results(self.out).write("check", part=self.part, what=what, held=False, found=last, traceback=error)
