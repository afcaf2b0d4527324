"""Weights that come with the package, and the manifest that says which file is whose.

``weights.json`` maps a model's name to ``{"file": ..., "sha256": ...}``. A file is read only if its content has that
sum, so that a damaged or exchanged one is noticed.
"""

from __future__ import annotations

import json
import os
import shutil
from functools import lru_cache
from pathlib import Path

from featherface.errors import CheckpointError
from featherface.files import atomic_write, sha256

FOLDER = Path(__file__).parent
MANIFEST = "weights.json"


def available(folder: Path | None = None) -> dict[str, dict[str, str]]:
    """The manifest: model -> ``file`` and ``sha256``; empty where no weights come with the package.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    path = (folder or FOLDER) / MANIFEST
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {name: {"file": str(entry["file"]), "sha256": str(entry["sha256"])} for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged; install the package again") from error


def find(name: str, folder: Path | None = None) -> Path | None:
    """The checked weights file of a model; None where none comes with the package.

    Raises:
        CheckpointError: the file is missing, or is not the one that the manifest describes.
    """
    folder = folder or FOLDER
    entry = available(folder).get(name)
    if entry is None:
        return None
    path = folder / entry["file"]
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; install the package again")
    if _checked_sum(path, path.stat().st_mtime_ns) != entry["sha256"]:
        raise CheckpointError(f"{path} is not the file that came with the package (SHA-256 differs); install it again")
    return path


def add(name: str, source: str | os.PathLike, folder: Path | None = None) -> Path:
    """Makes ``source`` the weights of a model: copies it and notes its sum in the manifest.

    Raises:
        CheckpointError: the file is not a weights file of that model, or cannot be written.
    """
    from featherface.models import create_model

    source = Path(source)
    if source.suffix != ".safetensors":
        raise CheckpointError(f"{source}: weights that come with the package are .safetensors files")
    create_model(name, weights=source, fused=False)
    folder = folder or FOLDER
    target = folder / f"{name}.safetensors"
    entries = {**available(folder), name: {"file": target.name, "sha256": sha256(source)}}
    try:
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)
        with atomic_write(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error
    return target


@lru_cache(maxsize=16)
def _checked_sum(path: Path, modified: int) -> str:
    """The sum of a file; its time of change is part of the key."""
    return sha256(path)
