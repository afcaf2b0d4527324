"""Batch normalisation as an op argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class BatchNorm(NamedTuple):
    """What a fused op needs of one ``nn.BatchNorm2d``: y = (x - mean) / sqrt(var + eps) * weight + bias.

    ``training=True`` normalises with the batch's own mean and biased variance and, if running statistics are given,
    updates them in place: ``running = (1 - momentum) * running + momentum * batch`` (unbiased variance).
    ``training=False`` normalises with the running statistics. All tensors are (C,).
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float

    @classmethod
    def of(
        cls,
        module: nn.BatchNorm2d,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        num_batches_tracked: Tensor | None = None,
    ) -> BatchNorm:
        """The state of ``module`` for one forward pass; counts the batch exactly as ``nn.BatchNorm2d.forward`` does.

        A module whose affine parameters serve several uses passes the statistics of the use at hand: all three tensors.
        They are used and updated whether or not the module tracks any of its own.
        """
        if not isinstance(module, nn.BatchNorm2d):
            raise TypeError(
                f"fused modules normalise with nn.BatchNorm2d, found {type(module).__name__}: "
                "SyncBatchNorm and replaced normalisation layers are not supported"
            )
        # In evaluation a module that has statistics uses them, also where it is told to track none any more.
        if running_mean is None and (module.track_running_stats or not module.training):
            running_mean, running_var = module.running_mean, module.running_var
            num_batches_tracked = module.num_batches_tracked
        momentum = 0.0 if module.momentum is None else module.momentum
        if module.training and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
            if module.momentum is None:
                momentum = 1.0 / float(num_batches_tracked)
        training = module.training or running_mean is None
        return cls(module.weight, module.bias, running_mean, running_var, training, momentum, module.eps)


Use = tuple[BatchNorm, Tensor, Tensor, int]
"""A normalisation, the mean and biased variance that it saw, and of how many values per channel."""


def normalisation_tensors(bn: BatchNorm | None, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Weight, bias, running mean and running variance for kernels of ``dtype``; in training they read no statistics.

    All are of that dtype. Only where it is float16 or bfloat16 and one of them is not, as under autocast, all are
    float32, as for ``torch.nn.functional.batch_norm``: a variance of 83,378 is infinite in float16.
    """
    if bn is None:
        return (None,) * 4
    tensors = [bn.weight, bn.bias, *((None, None) if bn.training else (bn.running_mean, bn.running_var))]
    if dtype.itemsize < 4 and any(t is not None and t.dtype is not dtype for t in tensors):
        dtype = torch.float32
    return tuple(as_dense(t, dtype) for t in tensors)


def as_dense(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor as kernels read parameters: contiguous and of ``dtype``."""
    if tensor is None or (tensor.dtype is dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


def update_running_statistics(uses: Sequence[Use]) -> None:
    """``running = (1 - momentum) * running + momentum * batch`` for (bn, mean, biased variance, values per channel)."""
    tracked = [use for use in uses if use[0].running_mean is not None]
    if not tracked:
        return
    if not torch.compiler.is_compiling() and all(
        type(mean) is Tensor and updatable(bn, mean.dtype) for bn, mean, *_ in tracked
    ):
        from . import cpu

        if cpu.unavailable() is None:
            from .cpu.conv import batch_norm_update

            batch_norm_update([(bn, mean.data_ptr(), var.data_ptr(), n) for bn, mean, var, n in tracked])
            return
    with torch.no_grad():
        for group in _at_once(tracked):
            var = torch._foreach_mul([v for _, _, v, _ in group], [n / (n - 1) for *_, n in group])
            running = [bn.running_mean for bn, *_ in group] + [bn.running_var for bn, *_ in group]
            batch = [m.to(r.dtype) for m, r in zip([*(m for _, m, _, _ in group), *var], running)]
            torch._foreach_lerp_(running, batch, group[0][0].momentum)


def _at_once(uses: Sequence[Use]) -> list[list[Use]]:
    """Uses in groups of one momentum that name no running statistics twice: a GPU updates a group in no order."""
    groups: list[list[Use]] = []
    for use in uses:
        first = 0
        for n, group in enumerate(groups):
            if any(other[0].running_mean is use[0].running_mean for other in group):
                first = n + 1
        fitting = next((g for g in groups[first:] if g[0][0].momentum == use[0].momentum), None)
        if fitting is None:
            groups.append([use])
        else:
            fitting.append(use)
    return groups


def updatable(bn: BatchNorm, dtype: torch.dtype) -> bool:
    """Whether the C++ kernels can update ``bn`` from statistics of ``dtype``: plain dense tensors of the CPU."""
    running = bn.running_mean
    return (
        type(running) is Tensor
        and running.is_cpu
        and running.dtype is dtype
        and dtype in (torch.float32, torch.float64)
        and running.is_contiguous()
        and type(bn.running_var) is Tensor
        and bn.running_var.is_cpu
        and bn.running_var.dtype is dtype
        and bn.running_var.is_contiguous()
    )
