"""The loss against annotated faces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .assignment import ASSIGNERS, Assignment, atss, multibox, rows_of, simota
from .boxes import BOX_LOSSES, box_loss, corners, decode_boxes, encode_boxes, encode_landmarks, overlap, smooth_l1
from .classification import check_beta, face_logit, ohem_cross_entropy, quality_focal
from .targets import Targets

CLASSIFICATIONS = ("ohem", "quality_focal")


@dataclass
class Task:
    """The loss against annotated faces.

    Attributes:
        assigner: multibox, atss or simota.
        multibox_threshold, multibox_override: see :func:`featherface.losses.assignment.multibox`.
        atss_top_k: see :func:`featherface.losses.assignment.atss`.
        classification: ohem (cross entropy with hard negatives) or quality_focal.
        ohem_ratio: negatives for each positive.
        focal_beta: exponent of the quality focal loss: 0, for plain cross entropy, or at least 1.
        box: smooth_l1, iou, diou or eiou.
        face_balance: exponent g of the weights of positives: an anchor of a face that has n of them counts n^-g in the
            class and box terms, relative to the mean. 0 counts anchors alike, 1 counts faces alike, so that small
            faces, which have few anchors, weigh as much as large ones.
        class_weight, box_weight, landmark_weight: of the three terms.
    """

    assigner: str = "multibox"
    multibox_threshold: float = 0.35
    multibox_override: float = 0.2
    atss_top_k: int = 9
    classification: str = "ohem"
    ohem_ratio: float = 7.0
    focal_beta: float = 2.0
    box: str = "diou"
    face_balance: float = 0.0
    class_weight: float = 1.0
    box_weight: float = 2.0
    landmark_weight: float = 0.1

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("assigner", self.assigner, ASSIGNERS),
            ("classification", self.classification, CLASSIFICATIONS),
            ("box", self.box, BOX_LOSSES),
        ):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; choose from: {', '.join(choices)}")
        check_beta(self.focal_beta)


def assign(
    config: Task, bbox: Tensor, cls: Tensor, targets: Targets, priors: Tensor, size: tuple[int, int]
) -> Assignment:
    """The assignment that ``config`` names, without gradients."""
    with torch.no_grad():
        if config.assigner == "multibox":
            return multibox(targets, priors, config.multibox_threshold, config.multibox_override)
        if config.assigner == "atss":
            return atss(targets, priors, size, config.atss_top_k)
        return simota(targets, priors, size, bbox, face_logit(cls))


def task_loss(
    config: Task,
    bbox: Tensor,
    cls: Tensor,
    landmarks: Tensor,
    targets: Targets,
    priors: Tensor,
    assignment: Assignment,
    mean_count: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The three weighted terms, each a sum over anchors divided by the number of positives.

    The landmark term is divided by the number of positives whose landmarks are known.

    Args:
        bbox: (B, N, 4), cls: (B, N, 2) logits, landmarks: (B, N, 10), as a model in training mode gives them.
        targets: the faces.
        priors: (N, 4) anchors.
        assignment: of anchors to faces.
        mean_count: for processes that train together: brings the number of what is divided by, a scalar, to its mean
            over the processes.

    Returns:
        ``class``, ``box`` and ``landmark``: scalars.
    """
    bbox, cls, landmarks = bbox.float(), cls.float(), landmarks.float()
    positive = assignment.positive
    mean_count = mean_count or (lambda count: count)
    count = mean_count(positive.sum().float()).clamp(min=1)
    weight = _face_weights(assignment, len(targets.boxes), config.face_balance) if config.face_balance else None

    rows = rows_of(positive)
    face, learns, prior = assignment.face.flatten()[rows], positive.flatten()[rows], priors.repeat(len(bbox), 1)[rows]
    boxes, points, known = _gather(targets, face)
    # Where an anchor learns no face, prediction and target are the anchor itself: no value there can overflow.
    regression = torch.where(learns[:, None], bbox.flatten(0, 1)[rows], 0.0)
    boxes = torch.where(learns[:, None], boxes, corners(prior))
    predicted = decode_boxes(regression, prior)
    if config.box == "smooth_l1":
        box = smooth_l1(regression, torch.where(learns[:, None], encode_boxes(boxes, prior), 0.0))
    else:
        box = torch.where(learns, box_loss(predicted, boxes, config.box), 0.0)
    if weight is not None:
        box = weight.flatten()[rows] * box

    if config.classification == "ohem":
        classification = ohem_cross_entropy(cls, positive, assignment.negative, config.ohem_ratio, weight)
    else:
        quality = torch.zeros_like(positive, dtype=torch.float32)
        quality.view(-1)[rows] = torch.where(learns, overlap(predicted.detach(), boxes).clamp(0, 1), 0.0)
        focal = quality_focal(face_logit(cls), quality, config.focal_beta)
        if weight is not None:
            focal = torch.where(positive, weight * focal, focal)
        classification = torch.where(positive | assignment.negative, focal, 0.0).sum()

    known = (known & learns)[:, None]
    points = torch.where(known, encode_landmarks(points, prior), 0.0)
    landmark = smooth_l1(torch.where(known, landmarks.flatten(0, 1)[rows], 0.0), points).sum()
    return {
        "class": config.class_weight * classification / count,
        "box": config.box_weight * box.sum() / count,
        "landmark": config.landmark_weight * landmark / mean_count(known.sum().float()).clamp(min=1),
    }


def _face_weights(assignment: Assignment, faces: int, exponent: float) -> Tensor:
    """(B, N) weights of the positives, 0 elsewhere: n^-exponent over its mean, n the number of the face's anchors."""
    positive, face = assignment.positive, assignment.face.clamp(min=0)
    anchors = torch.zeros(max(faces, 1), device=face.device)
    anchors.index_add_(0, face.flatten(), positive.flatten().float())
    weight = torch.where(positive, anchors.clamp(min=1)[face] ** -exponent, 0.0)
    return weight * (positive.sum() / weight.sum().clamp(min=1e-6))


def _gather(targets: Targets, face: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The box (n, 4), landmarks (n, 10) and whether they are known (n,) of the faces with these numbers."""

    # A row of zeros at the end stands for "no face", whose number is -1.
    def padded(values: Tensor) -> Tensor:
        return torch.cat([values, values.new_zeros(1, *values.shape[1:])])

    return tuple(padded(v)[face] for v in (targets.boxes, targets.landmarks, targets.has_landmarks))
