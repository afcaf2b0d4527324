"""Which anchor learns which face. Everything is computed for all faces of a batch at once.

A face has the number that it has in :class:`~featherface.losses.Targets`, F faces in all; N anchors per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from featherface.models.anchors import STEPS, level_sizes

from .boxes import EPSILON, areas, corners, decode_boxes, overlap, pairwise_overlap
from .targets import Targets

ASSIGNERS = ("multibox", "atss", "simota")
IGNORED_SHARE = 0.5


class Assignment(NamedTuple):
    """The answer of an assigner.

    Attributes:
        face: (B, N) int64, the face that each anchor learns, -1 for none.
        negative: (B, N) bool, anchors that learn background: those without a face, in labelled images, outside of
            ignored regions.
    """

    face: Tensor
    negative: Tensor

    @property
    def positive(self) -> Tensor:
        """(B, N) bool, anchors that learn a face."""
        return self.face >= 0


def multibox(targets: Targets, priors: Tensor, threshold: float = 0.35, override: float = 0.2) -> Assignment:
    """SSD's matching as RetinaFace uses it (Liu et al. 2016, section 2.2; Deng et al. 2020).

    An anchor learns the face of its image that it overlaps most, if that IoU is at least ``threshold``. The anchor that
    a face overlaps most learns this face whatever the IoU, if it is at least ``override``; if it is the best of several
    faces, the last of them.

    Args:
        targets: of B images.
        priors: (N, 4) anchors, ``cx cy w h``.
    """
    batch, count, faces = len(targets.labelled), len(priors), len(targets.boxes)
    iou = pairwise_overlap(targets.boxes, corners(priors))
    index = targets.image[:, None].expand(faces, count)
    best = iou.new_zeros(batch, count).scatter_reduce_(0, index, iou, "amax")
    number = torch.arange(faces, device=iou.device)[:, None]
    wins = (iou == best[targets.image]) & (iou >= threshold)
    face = _lowest(torch.where(wins, number, faces), index, (batch, count), faces)

    own_iou, own = iou.max(1) if count and faces else (iou.new_zeros(faces), targets.image)
    forced = torch.where(own_iou >= override, number[:, 0], -1)
    flat = torch.full((batch * count,), -1, dtype=torch.int64, device=iou.device)
    flat.scatter_reduce_(0, targets.image * count + own, forced, "amax")
    flat = flat.view(batch, count)
    face = torch.where(flat >= 0, flat, face)
    return Assignment(face, _negatives(face, targets, priors))


def atss(targets: Targets, priors: Tensor, size: tuple[int, int], top_k: int = 9) -> Assignment:
    """Adaptive Training Sample Selection (Zhang et al. 2020).

    The candidates of a face are the ``top_k`` anchors of each level whose centres are nearest to its own. Those whose
    IoU reaches the mean plus the standard deviation of the candidates' IoUs, and whose centre lies inside the face,
    learn it. Of several faces an anchor learns the one it overlaps most. A face smaller than the anchors' spacing may
    hold no centre; it is then learnt by its best candidate, if that is still free.

    Args:
        targets: of B images.
        priors: (N, 4) anchors, ``cx cy w h``.
        size: height and width of the input in pixels.
    """
    batch, count, faces = len(targets.labelled), len(priors), len(targets.boxes)
    candidates = nearest_anchors(targets.boxes, priors, size, [top_k] * len(STEPS))
    chosen = priors[candidates]
    iou = overlap(targets.boxes[:, None], corners(chosen))
    mean = iou.mean(1, keepdim=True)
    deviation = ((iou - mean).square().sum(1, keepdim=True) / max(iou.shape[1] - 1, 1)).sqrt()
    edges = torch.cat([chosen[..., :2] - targets.boxes[:, None, :2], targets.boxes[:, None, 2:] - chosen[..., :2]], -1)
    inside = edges.amin(-1) > EPSILON
    positive = inside & (iou >= mean + deviation) & (iou > 0)

    place = targets.image[:, None] * count + candidates
    face = _by_overlap(positive, iou, place, batch * count)
    lonely = ~(face[place] == torch.arange(faces, device=iou.device)[:, None]).any(1)
    free = (iou > 0) & (face[place] < 0)
    best = torch.where(free, iou, -1).argmax(1, keepdim=True) if candidates.shape[1] else candidates
    fallback = torch.zeros_like(positive).scatter_(1, best, True) & free & lonely[:, None]
    rescued = _by_overlap(fallback, iou, place, batch * count)
    face = torch.where(face >= 0, face, rescued).view(batch, count)
    return Assignment(face, _negatives(face, targets, priors))


@torch.no_grad()
def simota(
    targets: Targets,
    priors: Tensor,
    size: tuple[int, int],
    bbox: Tensor,
    score: Tensor,
    radius: float = 2.5,
    top_k: int = 10,
    iou_weight: float = 3.0,
) -> Assignment:
    """SimOTA, the simplified optimal transport assignment of YOLOX (Ge et al. 2021, section 2.1).

    The candidates of a face are the anchors whose centre is within ``radius`` steps of its own along both axes, at any
    level; where there are none, the nearest anchor of each level. Each costs -log p - ``iou_weight`` log IoU with what
    the network predicts there. A face is learnt by its k cheapest candidates, k = the sum of its ``top_k`` largest
    IoUs, rounded down but at least 1. Of several faces an anchor learns the one it is cheapest for.

    Args:
        targets: of B images.
        priors: (N, 4) anchors, ``cx cy w h``.
        size: height and width of the input in pixels.
        bbox: (B, N, 4) regressions.
        score: (B, N) logit of a face.
    """
    batch, count = score.shape
    cells = int(2 * radius + 1) ** 2
    candidates = nearest_anchors(targets.boxes, priors, size, [2 * cells] * len(STEPS))
    steps = torch.cat(
        [
            priors.new_full((2 * rows * columns,), float(step))
            for step, (rows, columns) in zip(STEPS, level_sizes(*size))
        ]
    )
    chosen = priors[candidates]
    height, width = size
    centre = (targets.boxes[:, None, :2] + targets.boxes[:, None, 2:]) / 2
    away = (chosen[..., :2] - centre).abs() * priors.new_tensor([width, height])
    near = away.amax(-1) < radius * steps[candidates]
    near |= ~near.any(1, keepdim=True)

    place = targets.image[:, None] * count + candidates
    predicted = decode_boxes(bbox.float().reshape(-1, 4)[place], chosen)
    iou = torch.where(near, overlap(targets.boxes[:, None], predicted), 0.0).nan_to_num_(0.0)
    cost = -torch.nn.functional.logsigmoid(score.float().reshape(-1)[place]) - iou_weight * torch.log(iou + 1e-8)
    cost = torch.where(near, cost.nan_to_num(1e8, 1e8), torch.inf)
    wanted = iou.topk(min(top_k, iou.shape[1]), 1).values.sum(1).long().clamp(min=1)
    rank = cost.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    positive = near & (rank < wanted[:, None])
    face = _by_overlap(positive, -cost, place, batch * count).view(batch, count)
    return Assignment(face, _negatives(face, targets, priors))


def nearest_anchors(boxes: Tensor, priors: Tensor, size: tuple[int, int], counts: Sequence[int]) -> Tensor:
    """The anchors of each level whose centres are nearest to the centres of the boxes.

    Args:
        boxes: (F, 4) ``x1 y1 x2 y2``.
        counts: anchors to take per level, fewer where a level has not so many.

    Returns:
        (F, sum of counts) int64, numbers of anchors.
    """
    height, width = size
    scale = priors.new_tensor([width, height])
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 * scale
    nearest, start = [], 0
    for (rows, columns), count in zip(level_sizes(*size), counts):
        level = priors[start : start + 2 * rows * columns, :2] * scale
        delta = (centre[:, None] - level[None]).square_().sum(-1)
        nearest.append(delta.topk(min(count, len(level)), 1, largest=False).indices + start)
        start += len(level)
    return torch.cat(nearest, 1)


def rows_of(mask: Tensor) -> Tensor | slice:
    """Where a mask (B, N) is set, as rows of (B N, ...). On a GPU, which would have to be waited for, all rows."""
    return mask.flatten().nonzero()[:, 0] if mask.device.type == "cpu" else slice(None)


def _by_overlap(positive: Tensor, value: Tensor, place: Tensor, length: int) -> Tensor:
    """(F, C) candidates -> (length,) the face of largest ``value`` at each place, the first of equals, -1 for none."""
    faces = len(positive)
    flat = place.reshape(-1)
    value = torch.where(positive, value, -torch.inf)
    best = value.new_full((length,), -torch.inf).scatter_reduce_(0, flat, value.reshape(-1), "amax")
    wins = positive & (value == best[place])
    number = torch.where(wins, torch.arange(faces, device=place.device)[:, None], faces)
    return _lowest(number.reshape(-1), flat, (length,), faces)


def _lowest(number: Tensor, index: Tensor, shape: tuple[int, ...], none: int) -> Tensor:
    """Scatters the lowest number to each place; ``none`` becomes -1."""
    lowest = torch.full(shape, none, dtype=torch.int64, device=number.device)
    lowest.scatter_reduce_(0, index, number, "amin")
    return torch.where(lowest < none, lowest, -1)


def _negatives(face: Tensor, targets: Targets, priors: Tensor) -> Tensor:
    """Anchors that learn background. An anchor half of which lies in an ignored region learns nothing."""
    batch, count = face.shape
    intersection, _, _ = areas(corners(priors), targets.ignored[:, None])
    share = intersection / (priors[:, 2] * priors[:, 3])
    hidden = share.new_zeros(batch, count)
    hidden.scatter_reduce_(0, targets.ignored_image[:, None].expand(len(share), count), share, "amax")
    return (face < 0) & (hidden < IGNORED_SHARE) & targets.labelled[:, None]
