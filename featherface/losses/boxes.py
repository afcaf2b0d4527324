"""Boxes and landmarks against anchors, and losses on overlaps. All coordinates are fractions of a square input."""

from __future__ import annotations

import torch
from torch import Tensor

from featherface.models.anchors import VARIANCES

EPSILON = 1e-7
BOX_LOSSES = ("smooth_l1", "iou", "diou", "eiou")


def corners(priors: Tensor) -> Tensor:
    """(..., 4) ``cx cy w h`` as ``x1 y1 x2 y2``."""
    half = priors[..., 2:] / 2
    return torch.cat([priors[..., :2] - half, priors[..., :2] + half], -1)


def encode_boxes(boxes: Tensor, priors: Tensor) -> Tensor:
    """What a network should regress for ``boxes`` (..., 4), ``x1 y1 x2 y2``: the inverse of :func:`decode_boxes`."""
    centre, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    shift = (centre - priors[..., :2]) / (VARIANCES[0] * priors[..., 2:])
    return torch.cat([shift, torch.log((size / priors[..., 2:]).clamp(min=EPSILON)) / VARIANCES[1]], -1)


def encode_landmarks(landmarks: Tensor, priors: Tensor) -> Tensor:
    """What a network should regress for ``landmarks`` (..., 10): ``(p - centre) / (0.1 size)``."""
    points = landmarks.unflatten(-1, (-1, 2)) - priors[..., None, :2]
    return (points / (VARIANCES[0] * priors[..., None, 2:])).flatten(-2)


def decode_boxes(bbox: Tensor, priors: Tensor) -> Tensor:
    """``x1 y1 x2 y2`` (..., 4) of regressions: centre + 0.1 t size, size exp(0.2 t)."""
    centre = priors[..., :2] + VARIANCES[0] * bbox[..., :2] * priors[..., 2:]
    half = priors[..., 2:] * torch.exp(VARIANCES[1] * bbox[..., 2:]) / 2
    return torch.cat([centre - half, centre + half], -1)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes that belong together: (..., 4) and (..., 4) -> (...)."""
    intersection, area_a, area_b = areas(a, b)
    return intersection / (area_a + area_b - intersection).clamp(min=EPSILON**2)


def pairwise_overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of all pairs: (F, 4) and (N, 4) -> (F, N)."""
    return overlap(a[:, None], b[None])


def box_loss(predicted: Tensor, target: Tensor, kind: str = "diou") -> Tensor:
    """Loss of each pair of boxes (..., 4) -> (...).

    With centres c, the smallest box that encloses both of size (W, H) and diagonal d::

        iou   1 - IoU
        diou  1 - IoU + |c - c'|^2 / d^2                                               (Zheng et al. 2020)
        eiou  1 - IoU + |c - c'|^2 / d^2 + (w - w')^2 / W^2 + (h - h')^2 / H^2         (Zhang et al. 2022)

    Raises:
        ValueError: ``kind`` is none of these.
    """
    loss = 1 - overlap(predicted, target)
    if kind == "iou":
        return loss
    if kind not in ("diou", "eiou"):
        raise ValueError(f"box_loss: there is no loss {kind!r}; choose from: iou, diou, eiou")
    enclosing = torch.maximum(predicted[..., 2:], target[..., 2:]) - torch.minimum(predicted[..., :2], target[..., :2])
    enclosing_squared = enclosing.square().clamp(min=EPSILON**2)
    shift = (predicted[..., :2] + predicted[..., 2:] - target[..., :2] - target[..., 2:]) / 2
    loss = loss + shift.square().sum(-1) / enclosing_squared.sum(-1)
    if kind == "eiou":
        stretch = (predicted[..., 2:] - predicted[..., :2]) - (target[..., 2:] - target[..., :2])
        loss = loss + (stretch.square() / enclosing_squared).sum(-1)
    return loss


def smooth_l1(predicted: Tensor, target: Tensor) -> Tensor:
    """Sum over the last axis of 0.5 x^2 where |x| < 1, else |x| - 0.5 (Girshick 2015): (..., k) -> (...)."""
    return torch.nn.functional.smooth_l1_loss(predicted, target, reduction="none").sum(-1)


def areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Areas of the intersection and of each box, (..., 4) and (..., 4) -> three of (...)."""
    (a_x1, a_y1, a_x2, a_y2), (b_x1, b_y1, b_x2, b_y2) = a.unbind(-1), b.unbind(-1)
    width = (torch.minimum(a_x2, b_x2) - torch.maximum(a_x1, b_x1)).clamp(min=0)
    height = (torch.minimum(a_y2, b_y2) - torch.maximum(a_y1, b_y1)).clamp(min=0)
    area_a = (a_x2 - a_x1).clamp(min=0) * (a_y2 - a_y1).clamp(min=0)
    area_b = (b_x2 - b_x1).clamp(min=0) * (b_y2 - b_y1).clamp(min=0)
    return width * height, area_a, area_b
