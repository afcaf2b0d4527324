"""Student, adapters and teacher as the training loop calls them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from featherface.data import Batch
from featherface.errors import CheckpointError
from featherface.losses import FeatureAdapters
from featherface.models import FeatherFace
from featherface.models.anchors import anchors
from ffkernels import multi_head
from ffkernels.engine import Engine


class Predictions(NamedTuple):
    """For every anchor bbox (B, N, 4), class logits (B, N, 2), landmarks (B, N, 10); and the maps P3, P4, P5."""

    bbox: Tensor
    cls: Tensor
    landmarks: Tensor
    features: tuple[Tensor, ...]


def predict(model: FeatherFace, x: Tensor) -> Predictions:
    """What ``model(x, logits=True)`` returns, with the maps that its heads read."""
    return Predictions(*_outputs(model, x))


def _outputs(model: FeatherFace, x: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    features = model.forward_features(x)
    return (*multi_head(features, model.heads(), False, policy=model.ff_policy), tuple(features))


class Network(nn.Module):
    """The student and, where features are distilled, the adapters to the teacher's channels.

    It returns the fields of :class:`Predictions` as a plain tuple: torch.compile of PyTorch 2.11 fails on a named one.
    """

    def __init__(self, student: FeatherFace, adapters: FeatureAdapters | None = None) -> None:
        super().__init__()
        self.student = student
        self.adapters = adapters

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        bbox, cls, landmarks, features = _outputs(self.student, x)
        return bbox, cls, landmarks, () if self.adapters is None else tuple(self.adapters(features))


class Teacher:
    """A frozen model in evaluation mode, with a memory of its outputs where views repeat.

    Args:
        model: any model of the registry.
        cache_gb: bytes of outputs to remember, in GiB.
        views: the number of epochs after which views repeat.
        engine: of the same model, ``outputs="raw"``, that answers in its place, without features.
    """

    def __init__(self, model: FeatherFace, cache_gb: float = 0.0, views: int = 0, engine: Engine | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.engine = engine
        self.views = views
        self._room = int(cache_gb * 2**30) if views else 0
        self._memory: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self.remembered = 0

    @torch.no_grad()
    def __call__(self, batch: Batch, images: Tensor) -> Predictions:
        """The teacher's predictions for ``images``, the batch's images in the memory format that it wants."""
        if not self._room and not self._memory:
            return self._predict(images)
        keys = [(int(index), batch.epoch % self.views) for index in batch.indices]
        if all(key in self._memory for key in keys):
            self.remembered += len(keys)
            stored = zip(*(self._memory[key] for key in keys))
            return Predictions(*(torch.stack(tensors).to(images.device) for tensors in stored), ())
        result = self._predict(images)
        outputs = [tensor.cpu() for tensor in result[:3]]
        size = sum(tensor[0].numel() * tensor.element_size() for tensor in outputs)
        for row, key in enumerate(keys):
            if key not in self._memory and self._room >= size:
                self._memory[key] = tuple(tensor[row].clone() for tensor in outputs)
                self._room -= size
        return result._replace(features=())

    def _predict(self, images: Tensor) -> Predictions:
        if self.engine is not None:
            return Predictions(*self.engine(images), ())
        return predict(self.model, images.to(next(self.model.parameters()).dtype))


def check_anchors(model: nn.Module, name: str, channels: Sequence[int] = (4, 2, 10)) -> list[int]:
    """Channels of the maps that the heads read, after a look at what the model predicts.

    Raises:
        CheckpointError: the model's anchors are not those of this package.
    """
    parameter = next(model.parameters())
    training = model.training
    model.eval()
    with torch.no_grad():
        size = (64, 96)
        predictions = predict(model, torch.zeros(1, 3, *size, device=parameter.device, dtype=parameter.dtype))
    model.train(training)
    found = [tuple(tensor.shape[1:]) for tensor in predictions[:3]]
    expected = [(len(anchors(*size)), count) for count in channels]
    if found != expected:
        raise CheckpointError(
            f"{name} has other anchors: for {size[0]} x {size[1]} pixels it predicts {found}, expected {expected}; "
            "teacher and student must share the anchors of featherface.models.anchors"
        )
    return [feature.shape[1] for feature in predictions.features]


def set_prior(model: FeatherFace, probability: float) -> None:
    """Sets the class biases so that, where features are zero, every anchor is a face with this probability."""
    half = math.log(probability / (1 - probability)) / 2
    with torch.no_grad():
        for head in model.heads():
            # Per anchor background, face.
            head.cls.bias.view(-1, 2).copy_(torch.tensor([-half, half]))
