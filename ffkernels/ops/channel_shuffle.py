"""Channel shuffle: the template op. CONTRIBUTING.md walks through this file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..config import Policy, call_policy
from ..layout import dense
from ..reference.channel_shuffle import channel_shuffle as reference
from .library import define, kernels, needs_grad

OP = "channel_shuffle"
registry.register(OP, "cpu", (torch.float32, torch.float64, torch.float16, torch.bfloat16))
registry.register(OP, "cuda", (torch.float32, torch.float64, torch.float16, torch.bfloat16))
registry.register(OP, "triton", (torch.float32, torch.float64, torch.float16, torch.bfloat16))


def _run(x: Tensor, groups: int, backend: str) -> Tensor:
    return kernels(backend, OP).channel_shuffle(dense(x), groups)


def _fake(x: Tensor, groups: int, backend: str) -> Tensor:
    return torch.empty_like(dense(x))


_raw = define("_channel_shuffle(Tensor x, int groups, str backend) -> Tensor", _run, _fake)


class _ChannelShuffle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, backend: str) -> Tensor:
        ctx.inverse, ctx.backend = x.shape[1] // groups, backend
        return _raw(x, groups, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        shuffle = _ChannelShuffle.apply if needs_grad(grad) else _raw
        return shuffle(grad, ctx.inverse, ctx.backend), None, None


def channel_shuffle(x: Tensor, groups: int, *, policy: Policy | None = None) -> Tensor:
    """Interleave the channels of ``groups`` groups, so that the next grouped convolution sees all of them.

    ``y[:, i * groups + j] = x[:, j * (C // groups) + i]``: view as (B, groups, C / groups, H, W), transpose the second
    and third dimension, view as (B, C, H, W). Its inverse is a shuffle with ``C // groups`` groups.

    Args:
        x: (B, C, H, W), any floating dtype; NCHW or channels_last.
        groups: number of groups; divides C.
        policy: how to run it; default: the :func:`ffkernels.use` block, else the best backend.

    Returns:
        A new tensor of the same shape, dtype and memory format.

    Raises:
        ValueError: ``x`` is not four-dimensional, or ``groups`` does not divide C.

    Source: ShuffleNet (Zhang et al., CVPR 2018), section 3.1; ``ChannelShuffle_Light`` of FeatherFace V2.
    """
    if x.dim() != 4:
        raise ValueError(f"channel_shuffle: x must be (B, C, H, W), got shape {tuple(x.shape)}")
    if groups < 1 or x.shape[1] % groups != 0:
        raise ValueError(f"channel_shuffle: groups={groups} must be positive and divide the {x.shape[1]} channels of x")
    record = needs_grad(x)
    backend = registry.select(OP, x, policy or call_policy(), record)
    if backend == "reference":
        return reference(x, groups)
    return _ChannelShuffle.apply(x, groups, backend) if record else _raw(x, groups, backend)


def channels_last(x: Tensor) -> Tensor:
    """``x`` (B, C, H, W) in channels_last memory: itself where it is so already, else a copy.

    An image whose planes lie one after the other becomes one whose pixels do by a shuffle of its C * H * W numbers in C
    groups, which the CPU's kernel does several times faster than ``Tensor.contiguous``.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    traced = traced or registry.forward_mode()
    image = type(x) is Tensor and x.is_cpu and x.dtype in (torch.float32, torch.float64) and x.is_contiguous()
    same = x.is_contiguous(memory_format=torch.channels_last)
    if traced or not image or same or needs_grad(x) or not x.numel() or registry.backend_unavailable("cpu", "cpu"):
        return x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    pixels = _raw(x.view(batch, -1, 1, 1), channels, "cpu")
    return pixels.view(batch, height, width, channels).permute(0, 3, 1, 2)
