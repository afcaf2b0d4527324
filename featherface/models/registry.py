"""The models by name."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffkernels.config import Fused, build_policy, use

from .. import weights as packaged
from ..errors import CheckpointError, FeatherFaceError
from .base import FeatherFace
from .checkpoint import load_backbone, load_tensors, read_metadata, read_tensors, shared_names
from .ultra import FeatherFaceV2Ultra
from .v1 import FeatherFaceV1
from .v2 import FeatherFaceV2

MODELS: dict[str, Callable[..., FeatherFace]] = {
    "featherface_v1": partial(FeatherFaceV1, "conv"),
    "featherface_v1_dcn": partial(FeatherFaceV1, "dcn"),
    "featherface_v1_ssh": partial(FeatherFaceV1, "ssh"),
    "featherface_v2": FeatherFaceV2,
    "featherface_v2_ultra": FeatherFaceV2Ultra,
}
WEIGHTS = Path(__file__).parent.parent / "weights"


def list_models() -> list[str]:
    """Names that :func:`create_model` knows."""
    return list(MODELS)


def create_model(
    name: str,
    pretrained: bool = False,
    weights: str | os.PathLike | None = None,
    backbone_weights: str | os.PathLike | None = None,
    fused: Fused = None,
    **options: Any,
) -> FeatherFace:
    """A model by name, in training mode.

    Args:
        name: one of :func:`list_models`.
        pretrained: load the weights that come with the package.
        weights: load this file, ``.safetensors`` or a PyTorch checkpoint; its names may be the published V1's. Options
            noted in the file (:func:`featherface.models.save_weights`) hold where ``options`` does not give others.
        backbone_weights: load only the backbone, from an ImageNet classifier or any FeatherFace checkpoint.
        fused: ``None`` follows ``FF_USE_FUSED``; ``True``, ``False``, ``"0"``, ``"1"`` or ``"require"`` override it.
        options: of the model: ``innovations`` of ``featherface_v2_ultra``.

    Raises:
        FeatherFaceError: the name or an option is unknown, or two sources of weights are given.
        CheckpointError: the weights cannot be read or do not fit.
    """
    if name not in MODELS:
        raise FeatherFaceError(f"there is no model {name!r}; choose from: {', '.join(MODELS)}")
    if sum((bool(pretrained), weights is not None, backbone_weights is not None)) > 1:
        raise FeatherFaceError("pretrained, weights and backbone_weights exclude each other: pass one of them")
    if pretrained:
        weights = packaged.find(name)
        if weights is None:
            raise CheckpointError(
                f"no weights of {name} come with this package: pass weights='FILE' instead of pretrained=True"
            )
    if weights is not None:
        options = {**_noted_options(weights, name), **options}
    model = _build(name, build_policy(fused), options)
    if weights is not None:
        tensors = read_tensors(weights)
        try:
            load_tensors(model, tensors, weights)
        except CheckpointError as error:
            found = identify(tensors)
            if found is None or found == name:
                raise
            raise CheckpointError(f"{weights} is a checkpoint of {found}, not of {name}") from error
    if backbone_weights is not None:
        load_backbone(model, backbone_weights)
    return model


def identify(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the model that has all of these tensors, and the fewest others; None if there is none.

    ``tensors`` are those of :func:`featherface.models.checkpoint.read_tensors`.
    """
    others: dict[str, int] = {}
    for name in MODELS:
        with torch.device("meta"):
            state = MODELS[name]().state_dict()
        if all(key in state and state[key].shape == value.shape for key, value in tensors.items()):
            others[name] = len(state) - len(tensors)
    return min(others, key=others.__getitem__, default=None)


def transfer_weights(model: FeatherFace, path: str | os.PathLike) -> tuple[int, int]:
    """Takes from the weights of another model every tensor that ``model`` has under the same name, of several the first
    that is there, and in the same shape; the others of ``model`` stay as they are.

    Returns:
        How many tensors were taken, and how many the model has.

    Raises:
        CheckpointError: the file cannot be read, or not one tensor fits.
    """
    tensors = read_tensors(path)
    if source := identify(tensors):
        with torch.device("meta"):
            groups = shared_names(MODELS[source]())
        # A file holds a shared tensor once, under a name that may not be the one that the models have in common.
        for names in groups:
            tensors |= dict.fromkeys(names, next(tensors[name] for name in names if name in tensors))
    state, taken = model.state_dict(), 0
    for names in (groups := shared_names(model)):
        fitting = [tensors[name] for name in names if name in tensors and tensors[name].shape == state[name].shape]
        if fitting:
            state[names[0]].copy_(fitting[0])
            taken += 1
    if not taken:
        raise CheckpointError(f"{path} has no tensor in common with {model.name}")
    return taken, len(groups)


def _noted_options(path: str | os.PathLike, name: str) -> dict[str, Any]:
    """Options that a weights file of model ``name`` was saved with, none where it says nothing of them."""
    noted = read_metadata(path)
    if noted.get("model") != name:
        return {}
    try:
        return dict(json.loads(noted.get("options", "{}")))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} notes options that are not JSON: {noted['options']!r}") from error


def _build(name: str, policy: Any, options: dict[str, Any]) -> FeatherFace:
    known = list(inspect.signature(MODELS[name]).parameters)
    if unknown := sorted(set(options).difference(known)):
        has = f"its options are: {', '.join(known)}" if known else "it has none"
        raise FeatherFaceError(f"{name} has no option {', '.join(unknown)}; {has}")
    try:
        with use(policy):
            model = MODELS[name](**options)
    except ValueError as error:
        raise FeatherFaceError(f"{name}: {error}") from error
    model.name = name
    return model
