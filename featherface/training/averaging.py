"""The average of several weights files of one model, as of a run and of what was fine-tuned from it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from featherface.detector import resolve_weights
from featherface.errors import CheckpointError, FeatherFaceError
from featherface.files import sha256
from featherface.models import create_model, save_weights


def average_weights(
    files: Sequence[str | os.PathLike], output: str | os.PathLike, shares: Sequence[float] | None = None
) -> str:
    """Writes ``sum_i shares_i * weights_i / sum(shares)``, of every parameter and running statistic.

    It makes sense for weights that came from one another by training: between those the loss hardly rises, and the
    average is often better than each (Wortsman et al. 2022, "Robust fine-tuning of zero-shot
    models").

    Args:
        files: two or more weights files of the same model; a model's name stands for the package's weights.
        output: ``.safetensors``, whose metadata name the files, their sums and their shares, or ``.pth``.
        shares: of each file, not negative; by default equal.

    Returns:
        The model's name.

    Raises:
        FeatherFaceError: fewer than two files, or shares that do not fit.
        CheckpointError: a file cannot be read, or is of another model.
    """
    shares = [1.0] * len(files) if shares is None else list(shares)
    if len(files) < 2:
        raise FeatherFaceError("an average needs at least two weights files")
    if len(shares) != len(files) or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise FeatherFaceError(f"shares are {shares}; expected one for each of {len(files)} files, none negative")
    shares = [share / sum(shares) for share in shares]
    names, paths = zip(*(resolve_weights(file, None) for file in files))
    if len(set(names)) > 1:
        raise CheckpointError(f"the files are of different models: {', '.join(names)}")
    name = names[0]
    models = [create_model(name, weights=path) for path in paths]
    if any(model.options != models[0].options for model in models):
        raise CheckpointError(f"the files are of {name} with different options: {[dict(m.options) for m in models]}")
    states = [model.state_dict() for model in models]
    average = {
        key: sum(share * state[key].double() for share, state in zip(shares, states)).to(value.dtype)
        if value.is_floating_point()
        else value
        for key, value in states[0].items()
    }
    models[0].load_state_dict(average)
    parts = [{"file": path.name, "sha256": sha256(path), "share": share} for path, share in zip(paths, shares)]
    save_weights(models[0], output, {"average_of": json.dumps(parts)})
    return name
