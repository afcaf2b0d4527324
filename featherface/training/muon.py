"""Muon for convolutional networks: steps of matrices have all their singular values near one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
ADAM_RMS = 0.2
"""Root mean square of AdamW's typical step, in units of the learning rate (Liu et al. 2025, section 2.2)."""


def orthogonalize(matrices: Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> Tensor:
    """U V^T of U S V^T, nearly: a quintic Newton-Schulz iteration, after which singular values are about 0.7 to 1.2.

    With X scaled to a Frobenius norm of 1, each step is ``X <- a X + (b A + c A^2) X``, ``A = X X^T``.

    Args:
        matrices: (B, m, n) float32.
        steps: of the iteration.

    Returns:
        (B, m, n); zeros where a matrix is zero.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the weights of convolutions, AdamW (Loshchilov and Hutter 2019) for the rest.

    A convolution of k groups has k matrices, output channels by input channels times taps. With the gradient G of one
    of shape (m, n) and its momentum M::

        M <- 0.95 M + 0.05 G
        W <- W - lr (0.2 sqrt(max(m, n)) orthogonalize(0.95 M + 0.05 G) + weight_decay W)

    The factor makes the root mean square of a step that of AdamW (Liu et al. 2025, Muon is Scalable for LLM Training),
    so that both take the same learning rate. ``torch.optim.Muon`` is the same for matrices alone.

    Args:
        groups: as of any optimiser; a group with ``matrices``, the number of matrices in each of its parameters, takes
            Muon's steps.
        lr: learning rate.
        betas: of AdamW.
        eps: of AdamW.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "matrices": None})
        for group in self.param_groups:
            for parameter, count in zip(group["params"], group["matrices"] or ()):
                if parameter.dim() < 2 or len(parameter) % count:
                    raise ValueError(f"Muon: a parameter of shape {tuple(parameter.shape)} is not {count} matrices")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["matrices"] is None:
                self._adamw(group)
            else:
                self._muon(group)
        return loss

    def _muon(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for parameter, count in zip(group["params"], group["matrices"]):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
            update = parameter.grad.lerp(momentum, MOMENTUM).reshape(count, len(parameter) // count, -1)
            by_shape.setdefault(update.shape[1:], []).append((parameter, update))
        lr, decay = group["lr"], group["weight_decay"]
        for shape, pairs in by_shape.items():
            parameters, updates = zip(*pairs)
            # Matrices of one shape are iterated together.
            steps = orthogonalize(torch.cat(updates)).split([len(update) for update in updates])
            size = lr * ADAM_RMS * math.sqrt(max(shape))
            for parameter, step in zip(parameters, steps):
                parameter.mul_(1 - lr * decay).sub_(step.reshape(parameter.shape), alpha=size)

    def _adamw(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [self.state[parameter]["exp_avg"] for parameter in parameters],
            [self.state[parameter]["exp_avg_sq"] for parameter in parameters],
            [],
            [self.state[parameter]["step"] for parameter in parameters],
            foreach=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
