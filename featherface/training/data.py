"""The data of a configuration."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from featherface.data import FaceData, load_data

from .config import Config, ConfigError


def read_data(
    config: Config, folder: str | os.PathLike | None = None, report: Callable[[str], None] | None = None
) -> FaceData:
    """The sources of a configuration, decoded and split.

    Args:
        config: of the training; its section ``data`` says all.
        folder: of the run: where ``data.cache = "disk"`` keeps decoded pixels if there is no ``data.cache_dir``.
        report: called with a sentence for each image that is skipped.

    Raises:
        ConfigError: there is no folder for a cache on disk.
        DataError: a source cannot be used, or nothing is left to train on.
    """
    data = config.data
    cache_dir = None
    if data.cache == "disk":
        cache_dir = config.path(data.cache_dir) if data.cache_dir else folder
        if cache_dir is None:
            raise ConfigError('data.cache is "disk": name its folder with data.cache_dir')
    return load_data(
        data.sources,
        Path(data.root).expanduser(),
        seed=data.split_seed,
        max_side=data.max_side,
        memory_limit_gb=data.memory_limit_gb,
        cache_dir=cache_dir,
        report=report,
    )
