"""What a run says while it runs: a progress bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

QUIET_SECONDS = 30.0


class Display:
    """Progress on standard error. ``quiet`` says nothing but messages."""

    def __init__(self, total: int, done: int = 0, quiet: bool = False) -> None:
        self._console = Console(stderr=True)
        self._quiet, self._total, self._start_step = quiet, total, done
        self._start = self._last = time.monotonic()
        self._bar: Progress | None = None
        if not quiet and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]} | {task.fields[speed]} images/s | {task.fields[ap]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=total, completed=done, epoch=0, loss="-", speed="-", ap="")
            self._bar.start()

    def step(self, step: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step)

    def row(self, row: Mapping[str, float | int]) -> None:
        """Shows a row of metrics.csv."""
        loss, speed = f"{row['loss']:.4f}", f"{row['images_per_second']:.1f}"
        if self._bar:
            self._bar.update(self._task, epoch=row["epoch"], loss=loss, speed=speed)
            return
        elapsed = time.monotonic() - self._last
        if self._quiet or (elapsed < QUIET_SECONDS and row["step"] < self._total and self._last != self._start):
            return
        self._last = time.monotonic()
        done = row["step"] - self._start_step
        left = (self._last - self._start) / max(done, 1) * (self._total - row["step"])
        self.message(
            f"step {row['step']}/{self._total}, epoch {row['epoch']}: loss {loss}, lr {row['lr']:.2e}, "
            f"{speed} images/s, loader {100 * row['loader_share']:.0f} %, {left / 60:.0f} min left"
        )

    def validated(self, epoch: int, ap: Mapping[str, float]) -> None:
        text = ", ".join(f"{name} {100 * value:.2f}" for name, value in ap.items() if value == value)
        if self._bar:
            self._bar.update(self._task, ap=f"AP {100 * ap['all']:.1f}")
        self.message(f"epoch {epoch}: validation AP {text}")

    def message(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
