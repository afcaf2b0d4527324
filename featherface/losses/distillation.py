"""The loss against a teacher whose anchors are the student's, so that everything aligns anchor by anchor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, max_pool2d

from .assignment import rows_of
from .boxes import box_loss, decode_boxes, smooth_l1
from .classification import check_beta, face_logit, quality_focal

CLASS_TERMS = ("kl", "masked", "focal")


@dataclass
class Distillation:
    """The loss against a teacher. A weight of 0 switches a term off.

    Attributes:
        teacher: name of a model of the registry; empty: no distillation.
        weights: its weights file.
        dtype: float32 or bfloat16, of the teacher's weights and arithmetic; the latter is faster where a processor has
            instructions for it, and rounds what the student learns from.
        task_weight: of the loss against annotated faces, beside the terms below.
        class_weight: of the class term.
        class_kind: kl: Kullback-Leibler divergence of the softmax at ``temperature``, times its square, mean over all
            anchors (Hinton et al. 2015); masked: squared difference of probabilities where teacher or student are
            unsure or positive (after Liang et al. 2020, TDKD); focal: the quality focal loss with the teacher's
            probability as quality.
        focal_beta: exponent of focal: 0, for the cross entropy with the teacher's probability, or at least 1.
        temperature: of kl.
        mask_threshold: probability from which on masked looks at an anchor.
        box_weight: of one minus DIoU with the teacher's boxes, on its positives.
        landmark_weight: of the smooth L1 difference from the teacher's landmarks, on its positives.
        positive_threshold: probability from which on an anchor is a positive of the teacher.
        feature_weight: of the squared difference from the teacher's last feature maps, where it sees faces.
        unlabelled_weight: of the class, box and landmark terms in images without annotations, relative to others.
        cache_gb: memory for the teacher's outputs, where views repeat (``batches.views``) and feature_weight is 0.
    """

    teacher: str = "featherface_v1_ssh"
    weights: str = ""
    dtype: str = "float32"
    task_weight: float = 1.0
    class_weight: float = 3.0
    class_kind: str = "focal"
    focal_beta: float = 2.0
    temperature: float = 4.0
    mask_threshold: float = 0.1
    box_weight: float = 1.0
    landmark_weight: float = 0.5
    positive_threshold: float = 0.5
    feature_weight: float = 0.5
    unlabelled_weight: float = 1.0
    cache_gb: float = 0.0

    def __post_init__(self) -> None:
        if self.class_kind not in CLASS_TERMS:
            raise ValueError(f"class_kind is {self.class_kind!r}; choose from: {', '.join(CLASS_TERMS)}")
        check_beta(self.focal_beta)


class FeatureAdapters(nn.Module):
    """A 1x1 convolution per level, from the student's channels to the teacher's. No part of the student."""

    def __init__(self, student_channels: int, teacher_channels: int, levels: int = 3) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(student_channels, teacher_channels, 1) for _ in range(levels))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [level(x) for level, x in zip(self.levels, features)]


def distillation_loss(
    config: Distillation,
    student: tuple[Tensor, Tensor, Tensor],
    teacher: tuple[Tensor, Tensor, Tensor],
    priors: Tensor,
    labelled: Tensor,
    student_features: Sequence[Tensor] = (),
    teacher_features: Sequence[Tensor] = (),
    mean_count: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The weighted terms.

    Args:
        student, teacher: bbox (B, N, 4), class logits (B, N, 2), landmarks (B, N, 10).
        priors: (N, 4) anchors.
        labelled: (B,) bool.
        student_features, teacher_features: maps of the same sizes and channels (:class:`FeatureAdapters`), P3, P4, P5.
        mean_count: as of :func:`~featherface.losses.task.task_loss`.

    Returns:
        Those of ``teacher_class``, ``teacher_box``, ``teacher_landmark`` and ``teacher_feature`` whose weight is not 0.
    """
    bbox, cls, landmarks = (tensor.float() for tensor in student)
    teacher_bbox, teacher_cls, teacher_landmarks = (tensor.detach().float() for tensor in teacher)
    probability = torch.sigmoid(face_logit(teacher_cls))
    weight = torch.where(labelled, 1.0, config.unlabelled_weight)[:, None]
    positive = probability >= config.positive_threshold
    # Sure faces count more than those at the threshold.
    strength = torch.where(positive, probability, 0.0) * weight
    mean_count = mean_count or (lambda count: count)
    count = mean_count(strength.sum()).clamp(min=1)
    terms: dict[str, Tensor] = {}
    if config.class_weight:
        terms["teacher_class"] = config.class_weight * class_term(config, cls, teacher_cls, weight, mean_count)
    rows = rows_of(positive)
    learns, strength = positive.flatten()[rows, None], strength.flatten()[rows]

    # Elsewhere both are the anchor itself: no value there can overflow.
    def chosen(own: Tensor, theirs: Tensor) -> list[Tensor]:
        return [torch.where(learns, values.flatten(0, 1)[rows], 0.0) for values in (own, theirs)]

    if config.box_weight:
        prior = priors.repeat(len(bbox), 1)[rows]
        own, theirs = (decode_boxes(values, prior) for values in chosen(bbox, teacher_bbox))
        terms["teacher_box"] = config.box_weight * (strength * box_loss(own, theirs, "diou")).sum() / count
    if config.landmark_weight:
        difference = smooth_l1(*chosen(landmarks, teacher_landmarks))
        terms["teacher_landmark"] = config.landmark_weight * (strength * difference).sum() / count
    if config.feature_weight:
        masks = foreground(probability, [feature.shape[2:] for feature in teacher_features])
        terms["teacher_feature"] = config.feature_weight * feature_term(student_features, teacher_features, masks)
    return terms


def class_term(
    config: Distillation,
    cls: Tensor,
    teacher_cls: Tensor,
    weight: Tensor,
    mean_count: Callable[[Tensor], Tensor],
) -> Tensor:
    """The class term without its weight; ``weight`` (B, 1) is that of the images."""
    if config.class_kind == "kl":
        own, theirs = (log_softmax(logits / config.temperature, -1) for logits in (cls, teacher_cls))
        divergence = (theirs.exp() * (theirs - own)).sum(-1)
        return config.temperature**2 * (weight * divergence).mean()
    logit, quality = face_logit(cls), torch.sigmoid(face_logit(teacher_cls))
    count = mean_count((weight * quality).sum()).clamp(min=1)
    if config.class_kind == "focal":
        return (weight * quality_focal(logit, quality, config.focal_beta)).sum() / count
    own = torch.sigmoid(logit)
    mask = (quality > config.mask_threshold) | (own.detach() > config.mask_threshold)
    return (weight * torch.where(mask, (own - quality).square(), 0.0)).sum() / count


def foreground(probability: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Where the teacher sees faces: (B, N) probabilities -> per level (B, 1, H, W), the largest of a cell's two anchors
    and of its eight neighbours."""
    masks, start = [], 0
    for height, width in sizes:
        level = probability[:, start : start + 2 * height * width].view(-1, 1, height, width, 2).amax(-1)
        masks.append(max_pool2d(level, 3, stride=1, padding=1))
        start += 2 * height * width
    return masks


def feature_term(student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Mean over levels of the masked squared difference, in units of the masked mean square of the teacher's map."""
    terms = []
    for own, theirs, mask in zip(student, teacher, masks):
        own, theirs = own.float(), theirs.detach().float()
        energy = (mask * theirs.square()).sum()
        terms.append((mask * (own - theirs).square()).sum() / energy.clamp(min=1e-6))
    return torch.stack(terms).mean()
