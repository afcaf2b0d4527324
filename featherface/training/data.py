"""The data of a configuration."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from featherface.data import FaceData, load_data

from .config import Data


def read_data(
    config: Data, cache_dir: str | os.PathLike | None = None, report: Callable[[str], None] | None = None
) -> FaceData:
    """The sources of a configuration, decoded and split.

    Args:
        config: its section ``data``.
        cache_dir: where decoded pixels are kept on disk; None keeps them in memory.
        report: called with a sentence for each image that is skipped.

    Raises:
        DataError: a source cannot be used, or nothing is left to train on.
    """
    return load_data(
        config.sources,
        Path(config.root).expanduser(),
        seed=config.split_seed,
        max_side=config.max_side,
        memory_limit_gb=config.memory_limit_gb,
        cache_dir=cache_dir,
        report=report,
    )
