"""Losses on the two logits of an anchor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus


def face_logit(cls: Tensor) -> Tensor:
    """The logit of a face, (..., 2) -> (...): its sigmoid is the softmax's probability."""
    return cls[..., 1] - cls[..., 0]


def ohem_cross_entropy(
    cls: Tensor, positive: Tensor, negative: Tensor, ratio: float = 7.0, weight: Tensor | None = None
) -> Tensor:
    """Cross entropy with hard negatives (Liu et al. 2016): all positives, and in each image the ``ratio`` times as many
    negatives of largest loss.

    Args:
        cls: (B, N, 2) logits.
        positive, negative: (B, N) bool.
        weight: (B, N), of the positives; 1 by default.

    Returns:
        The sum, a scalar.
    """
    # Cross entropy of two classes, from the difference of their logits.
    logit = face_logit(cls)
    found = softplus(-logit) if weight is None else weight * softplus(-logit)
    wanted = (positive.sum(1, keepdim=True) * ratio).long()
    # To know how many that are at most, a GPU would have to be waited for.
    most = logit.shape[1]
    if cls.device.type == "cpu" and len(wanted):
        most = min(most, int(wanted.max()))
    # Losses are above 0 and the rest is 0, so that taking more than there are adds nothing.
    hardest = torch.where(negative, softplus(logit), 0.0).topk(most, 1).values
    rank = torch.arange(most, device=cls.device)
    return torch.where(positive, found, 0.0).sum() + torch.where(rank < wanted, hardest, 0.0).sum()


def check_beta(beta: float) -> None:
    """Refuses exponents of the quality focal loss whose gradient is infinite where prediction and quality agree.

    Raises:
        ValueError: beta is neither 0 nor at least 1.
    """
    if beta != 0 and not beta >= 1:
        raise ValueError(f"focal_beta is {beta}; it must be 0 or at least 1")


def quality_focal(logit: Tensor, quality: Tensor, beta: float = 2.0) -> Tensor:
    """Quality focal loss of each anchor (Li et al. 2020, equation 2): |q - p|^beta * BCE(p, q), p = sigmoid(logit).

    Args:
        logit: (...).
        quality: (...), 0 to 1: the overlap that a positive reached, 0 for a negative.
        beta: 0 for plain cross entropy, or at least 1.
    """
    weight = (torch.sigmoid(logit) - quality).abs().pow(beta)
    return weight * binary_cross_entropy_with_logits(logit, quality, reduction="none")
