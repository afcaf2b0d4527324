"""From raw predictions to faces: decoding, filtering, top-k and non-maximum suppression in plain PyTorch.

Sources: SSD (Liu et al., 2016), section 2.2, for boxes encoded against anchors, divided by two variances;
RetinaFace (Deng et al., 2020), section 3.1, for landmarks encoded against the same anchors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NMS_BLOCK = 64
"""Candidates that :func:`nms` settles at a time; it holds at most ``NMS_BLOCK * N`` overlaps in memory."""


def decode(
    bbox: Tensor, landmarks: Tensor, priors: Tensor, variances: Sequence[float] = (0.1, 0.2)
) -> tuple[Tensor, Tensor]:
    """See :func:`ffkernels.ops.detection.decode`."""
    centre, size = priors[..., :2], priors[..., 2:]
    box_centre = centre + bbox[..., :2] * variances[0] * size
    half = size * torch.exp(bbox[..., 2:] * variances[1]) / 2
    boxes = torch.cat((box_centre - half, box_centre + half), dim=-1)
    points = landmarks.unflatten(-1, (-1, 2)) * variances[0] * size.unsqueeze(-2) + centre.unsqueeze(-2)
    return boxes, points.flatten(-2)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """See :func:`ffkernels.ops.detection.nms`."""
    usable = (_usable(boxes) & ~torch.isnan(scores)).nonzero()[:, 0]
    order = usable[torch.sort(scores[usable], descending=True, stable=True).indices]
    return order[_greedy(boxes[order], iou_threshold)]


def detect(
    bbox: Tensor,
    scores: Tensor,
    landmarks: Tensor,
    priors: Tensor,
    score_threshold: float = 0.5,
    nms_threshold: float = 0.4,
    top_k: int = 5000,
    keep_top_k: int = 750,
    variances: Sequence[float] = (0.1, 0.2),
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`ffkernels.ops.detection.detect`."""
    candidates = (scores > score_threshold).nonzero()[:, 0]
    scores, order = torch.sort(scores[candidates], descending=True, stable=True)
    scores, candidates = scores[:top_k], candidates[order[:top_k]]
    boxes, points = decode(bbox[candidates], landmarks[candidates], priors[candidates], variances)
    usable = _usable(boxes) & torch.isfinite(points).all(dim=1)
    if not usable.all():
        boxes, points, scores = boxes[usable], points[usable], scores[usable]
    keep = _greedy(boxes, nms_threshold)[:keep_top_k]
    return boxes[keep], scores[keep], points[keep]


def _usable(boxes: Tensor) -> Tensor:
    """(N, 4) -> (N,) bool: coordinates and area are finite."""
    return torch.isfinite(boxes).all(dim=1) & torch.isfinite((boxes[:, 2:] - boxes[:, :2]).prod(dim=1))


def _greedy(boxes: Tensor, iou_threshold: float) -> Tensor:
    """Indices that greedy suppression keeps of ``boxes`` (N, 4), which are finite and in descending order of score.

    Greedy suppression keeps box i exactly when no kept box j < i overlaps it. Boxes are settled in blocks. When a
    block's turn comes, all that kept boxes of earlier blocks overlap is already gone, so the fate of a box depends on
    its own block alone. Inside a block, ``keep_i = not any(keep_j and overlap_ji for j < i)`` is applied to all boxes
    at once, again and again, until nothing changes. Since i depends only on j < i, the first n boxes are final after
    n rounds: the iteration ends, and its only fixed point is the greedy answer. It takes as many rounds as the longest
    chain of suppressions in the block, usually fewer than five.
    """
    corners = boxes.T
    area = (corners[2:] - corners[:2]).clamp_(min=0).prod(dim=0, keepdim=True)
    left = torch.cat((corners, area))
    index = torch.arange(boxes.shape[0], device=boxes.device)
    kept = [index[:0]]
    while index.numel():
        block = left[:, :NMS_BLOCK]
        overlap = (_excess(block, block, iou_threshold) > 0).triu_(diagonal=1).to(boxes.dtype)
        keep = overlap.new_ones(overlap.shape[0])
        while not torch.equal(settled := (keep @ overlap == 0).to(keep.dtype), keep):
            keep = settled
        chosen = keep.nonzero()[:, 0]
        kept.append(index[chosen])
        index, left = index[NMS_BLOCK:], left[:, NMS_BLOCK:]
        if index.numel():
            free = (_excess(block[:, chosen], left, iou_threshold).amax(dim=0) <= 0).nonzero()[:, 0]
            index, left = index[free], left[:, free]
    return torch.cat(kept)


def _excess(a: Tensor, b: Tensor, iou_threshold: float) -> Tensor:
    """(5, A), (5, B) of x1 y1 x2 y2 area -> (A, B): intersection - threshold * union, positive where boxes overlap."""
    a, b = a.unsqueeze(2), b.unsqueeze(1)
    extent = torch.minimum(a[2:4], b[2:4]).sub_(torch.maximum(a[:2], b[:2]))
    # One clamped factor is enough: a negative other one makes the product negative, which is no overlap either.
    intersection = extent[0].clamp_(min=0).mul_(extent[1])
    union = (a[4] + b[4]).sub_(intersection)
    return intersection.sub_(union.mul_(iou_threshold))
