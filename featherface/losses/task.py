"""The loss against annotated faces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .assignment import ASSIGNERS, Assignment, atss, multibox, simota
from .boxes import BOX_LOSSES, box_loss, decode_boxes, encode_boxes, encode_landmarks, overlap, smooth_l1
from .classification import face_logit, ohem_cross_entropy, quality_focal
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
        focal_beta: exponent of the quality focal loss.
        box: smooth_l1, iou, diou or eiou.
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
    scale: float | Tensor | None = None,
) -> dict[str, Tensor]:
    """The three weighted terms, each a sum over anchors divided by the number of positives.

    The landmark term is divided by the number of positives whose landmarks are known.

    Args:
        bbox: (B, N, 4), cls: (B, N, 2) logits, landmarks: (B, N, 10), as a model in training mode gives them.
        targets: the faces.
        priors: (N, 4) anchors.
        assignment: of anchors to faces.
        scale: positives to divide by instead of those of this batch, for processes that train together.

    Returns:
        ``class``, ``box`` and ``landmark``: scalars.
    """
    bbox, cls, landmarks = bbox.float(), cls.float(), landmarks.float()
    positive = assignment.positive
    count = positive.sum().clamp(min=1) if scale is None else scale
    boxes, points, known = _gather(targets, assignment)
    known &= positive

    # Where an anchor learns no face, prediction and target are the anchor itself: no value there can overflow.
    regression = torch.where(positive[..., None], bbox, 0.0)
    own = decode_boxes(torch.zeros_like(bbox), priors)
    boxes = torch.where(positive[..., None], boxes, own)
    predicted = decode_boxes(regression, priors)
    if config.box == "smooth_l1":
        box = smooth_l1(regression, torch.where(positive[..., None], encode_boxes(boxes, priors), 0.0))
    else:
        box = torch.where(positive, box_loss(predicted, boxes, config.box), 0.0)

    if config.classification == "ohem":
        classification = ohem_cross_entropy(cls, positive, assignment.negative, config.ohem_ratio)
    else:
        quality = torch.where(positive, overlap(predicted.detach(), boxes).clamp(0, 1), 0.0)
        focal = quality_focal(face_logit(cls), quality, config.focal_beta)
        classification = torch.where(positive | assignment.negative, focal, 0.0).sum()

    wanted = torch.where(known[..., None], encode_landmarks(points, priors), 0.0)
    landmark = smooth_l1(torch.where(known[..., None], landmarks, 0.0), wanted).sum() / known.sum().clamp(min=1)
    return {
        "class": config.class_weight * classification / count,
        "box": config.box_weight * box.sum() / count,
        "landmark": config.landmark_weight * landmark,
    }


def _gather(targets: Targets, assignment: Assignment) -> tuple[Tensor, Tensor, Tensor]:
    """The box (B, N, 4), landmarks (B, N, 10) and whether they are known (B, N) of each anchor's face."""

    # A row of zeros at the end stands for "no face", whose number is -1.
    def padded(values: Tensor) -> Tensor:
        return torch.cat([values, values.new_zeros(1, *values.shape[1:])])

    return tuple(padded(v)[assignment.face] for v in (targets.boxes, targets.landmarks, targets.has_landmarks))
