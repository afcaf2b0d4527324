"""A run's folder: one run at a time, whole files only, metrics that continue where a checkpoint left them."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from featherface.errors import CheckpointError, FeatherFaceError
from featherface.files import atomic_write

from .config import Config, dump

CHECKPOINT, PREVIOUS = "last.pt", "previous.pt"
CHECKPOINT_FORMAT = 1

# Options that may change when a run is resumed: they decide how it runs, not what it learns.
FREE = (
    "data.root",
    "data.cache",
    "data.cache_dir",
    "data.memory_limit_gb",
    "batches.workers",
    "distillation.cache_gb",
    "runtime.device",
    "runtime.checkpoint_minutes",
    "runtime.divergence",
    "runtime.log_every",
    "runtime.tensorboard",
    "validation.every",
)


class TrainingError(FeatherFaceError):
    """A run cannot begin, or cannot go on."""


class RunFolder:
    """The folder of a run, locked against a second process.

    ``config.toml``, ``run.json``, ``metrics.csv``, ``validation.csv``, ``curves.png``, ``last.pt`` and ``previous.pt``
    (checkpoints), ``best.safetensors``, ``final.safetensors``, ``model_card.md``.

    Raises:
        TrainingError: the folder cannot be written to, or another process trains in it.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "run.lock", "a")  # noqa: SIM115
        except OSError as error:
            raise TrainingError(f"the run folder {path} cannot be written to: {error.strerror or error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise TrainingError(
                f"another process is training in {path}; wait for it, or choose another run folder"
            ) from error

        # What a process that was killed while it wrote has left.
        for name in (CHECKPOINT, "best.safetensors", "final.safetensors"):
            for path in self.path.glob(f".{Path(name).stem}.*{Path(name).suffix}"):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        self._lock.close()

    def has_checkpoint(self) -> bool:
        return any((self.path / name).exists() for name in (CHECKPOINT, PREVIOUS))

    def begin(self, config: Config) -> None:
        """Writes what is known before the first step.

        Raises:
            TrainingError: a file cannot be written.
        """
        facts = {
            "git": git_revision(),
            "command": sys.argv,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
            "cpu_threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        }
        self.write("config.toml", dump(config))
        self.write("run.json", json.dumps(facts, indent=2) + "\n")

    def write(self, name: str, text: str) -> None:
        """Writes a small file, whole.

        Raises:
            TrainingError: it cannot be written.
        """
        try:
            with atomic_write(self.path / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise TrainingError(f"{self.path / name} cannot be written: {error.strerror or error}") from error

    def check_space(self, needed: int) -> None:
        """Refuses to begin where checkpoints will not fit.

        Raises:
            TrainingError: the disk has less than ``needed`` bytes left.
        """
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise TrainingError(
                f"the disk of {self.path} has {free / 2**20:.0f} MiB left, the run needs {needed / 2**20:.0f}: free "
                "some space or choose another run folder"
            )

    def save(self, state: Mapping[str, Any]) -> None:
        """Writes a checkpoint; the one before it stays as ``previous.pt``. One of the two is whole at any moment.

        Raises:
            TrainingError: it cannot be written. The checkpoints from before are still there.
        """
        # Serialised in memory first: PyTorch's own writer hides why a disk refused it.
        buffer = io.BytesIO()
        torch.save({**state, "format": CHECKPOINT_FORMAT}, buffer)
        last, previous = self.path / CHECKPOINT, self.path / PREVIOUS
        try:
            with atomic_write(last) as temporary:
                temporary.write_bytes(buffer.getbuffer())
                if last.exists():
                    os.replace(last, previous)
        except OSError as error:
            raise TrainingError(
                f"the checkpoint {last} cannot be written ({error.strerror or error}); the one before it is whole: "
                "free some space and resume"
            ) from error

    @staticmethod
    def peek(folder: str | os.PathLike) -> dict[str, Any] | None:
        """The last whole checkpoint of a run, on the CPU; None where there is none. Needs no lock.

        Raises:
            CheckpointError: there are checkpoints and none can be read, or one is not of a training run.
        """
        problems = []
        for name in (CHECKPOINT, PREVIOUS):
            path = Path(folder) / name
            if not path.exists():
                continue
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                problems.append(f"{path}: {error}".splitlines()[0])
                continue
            if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
                raise CheckpointError(f"{path} is not a checkpoint of a training run of this version")
            return state
        if problems:
            raise CheckpointError(f"no checkpoint can be read: {'; '.join(problems)}")
        return None


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Options that differ and that decide what is learnt, as ``section.option``."""
    found = []
    for name in sorted({*old, *new}):
        key = f"{prefix}{name}"
        if key in FREE:
            continue
        a, b = old.get(name), new.get(name)
        if not prefix and isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{key}.")
        elif a != b:
            found.append(key)
    return found


def git_revision() -> str | None:
    """The commit that this package's files are from, with ``-dirty`` when they were changed; None outside of git."""
    folder = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


class Table:
    """A CSV file that grows row by row and can be taken back to an earlier length."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, list(columns)

    def length(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def restore(self, length: int) -> bool:
        """Cuts the file to ``length`` bytes; 0 begins it anew. False where it was shorter: its whole lines stay."""
        try:
            kept = min(length, self.length())
            if kept < length:
                kept = self.path.read_bytes().rfind(b"\n") + 1 if kept else 0
            if kept:
                os.truncate(self.path, kept)
            else:
                with open(self.path, "w", newline="", encoding="utf-8") as file:
                    csv.writer(file).writerow(self.columns)
            return kept == length
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def add(self, row: Mapping[str, Any]) -> None:
        try:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow([row.get(column, "") for column in self.columns])
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def sync(self) -> None:
        """Brings the rows to the disk: a checkpoint must not know of rows that a power cut can still take."""
        try:
            with open(self.path, "rb+") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
