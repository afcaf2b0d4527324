"""Annotated faces of a batch, in a form without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Targets(NamedTuple):
    """The faces of all images of a batch, one after the other; coordinates are fractions of the input's side.

    Attributes:
        boxes: (F, 4) float32, ``x1 y1 x2 y2``.
        landmarks: (F, 10) float32; zeros where unknown.
        has_landmarks: (F,) bool.
        image: (F,) int64, the image that each face is in, not falling.
        ignored: (K, 4) float32, regions whose anchors are no negatives.
        ignored_image: (K,) int64.
        labelled: (B,) bool; an image without annotations teaches through a teacher alone.
    """

    boxes: Tensor
    landmarks: Tensor
    has_landmarks: Tensor
    image: Tensor
    ignored: Tensor
    ignored_image: Tensor
    labelled: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        return Targets(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))

    def pin_memory(self) -> Targets:
        return Targets(*(tensor.pin_memory() for tensor in self))

    @classmethod
    def build(
        cls,
        boxes: Sequence[np.ndarray],
        landmarks: Sequence[np.ndarray] | None = None,
        ignored: Sequence[np.ndarray] | None = None,
        labelled: Sequence[bool] | None = None,
    ) -> Targets:
        """Targets from arrays per image: boxes (n, 4), landmarks (n, 5, 2) with NaN where unknown, ignored (m, 4)."""
        landmarks = landmarks or [np.full((len(b), 5, 2), np.nan, np.float32) for b in boxes]
        ignored = ignored or [np.empty((0, 4), np.float32) for _ in boxes]
        labelled = [True] * len(boxes) if labelled is None else labelled
        points = _stack(landmarks, 10)
        known = ~torch.isnan(points).any(1)
        return cls(
            _stack(boxes, 4),
            torch.where(known[:, None], points, torch.zeros(())),
            known,
            _numbers(boxes),
            _stack(ignored, 4),
            _numbers(ignored),
            torch.tensor(labelled, dtype=torch.bool),
        )


def _stack(arrays: Sequence[np.ndarray], columns: int) -> Tensor:
    rows = [np.asarray(array, np.float32).reshape(-1, columns) for array in arrays]
    return torch.from_numpy(np.concatenate([np.empty((0, columns), np.float32), *rows]))


def _numbers(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(arrays)), torch.tensor([len(a) for a in arrays], dtype=torch.int64))
