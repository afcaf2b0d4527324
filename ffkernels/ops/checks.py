"""Checks that several ops share. Each raises ``ValueError`` naming the op, the argument and its shape."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import torch
from torch import Tensor

from ..batch_norm import BatchNorm
from ..params import ConvParams

ACTIVATIONS = ("none", "relu", "leaky_relu", "silu")


def fail(op: str, message: str) -> NoReturn:
    raise ValueError(f"{op}: {message}")


def feature_map(op: str, name: str, x: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        dtype = str(x.dtype).removeprefix("torch.")
        fail(op, f"{name} must be a floating-point (B, C, H, W) tensor, got {dtype} {tuple(x.shape)}")


def convolution(op: str, name: str, conv: ConvParams, like: Tensor, channels: int) -> int:
    """Number of output channels of a convolution that fits ``channels`` inputs and the dtype and device of ``like``."""
    weight = conv.weight
    if weight.dim() != 4:
        fail(op, f"{name}.weight must be (O, C / groups, kh, kw), got {tuple(weight.shape)}")
    if conv.groups < 1 or weight.shape[1] * conv.groups != channels or weight.shape[0] % conv.groups:
        fail(
            op, f"{name}.weight {tuple(weight.shape)} with groups={conv.groups} does not fit {channels} input channels"
        )
    if conv.bias is not None and conv.bias.shape != weight.shape[:1]:
        fail(op, f"{name}.bias must be ({weight.shape[0]},), got {tuple(conv.bias.shape)}")
    if conv.stride < 1 or conv.padding < 0:
        fail(op, f"{name} needs stride >= 1 and padding >= 0, got {conv.stride} and {conv.padding}")
    if weight.dtype != like.dtype and autocast_dtype(like.device.type) is None:
        fail(op, f"{name}.weight is {weight.dtype} and the input {like.dtype}: convert one of them, or use autocast")
    same_device(op, f"{name}.weight", weight, like)
    same_device(op, f"{name}.bias", conv.bias, like)
    return weight.shape[0]


def same_device(op: str, name: str, tensor: Tensor | None, like: Tensor) -> None:
    """Kernels take addresses: one of another device would be read as memory of this one."""
    if tensor is not None and tensor.device != like.device:
        fail(op, f"{name} is on {tensor.device} and the input on {like.device}: move one of them")


def batch_norm(op: str, name: str, bn: BatchNorm | None, like: Tensor, channels: int) -> None:
    if bn is None:
        return
    for field in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(bn, field)
        if tensor is not None and tensor.shape != (channels,):
            fail(op, f"{name}.{field} must be ({channels},), got {tuple(tensor.shape)}")
        same_device(op, f"{name}.{field}", tensor, like)
    mean, var = bn.running_mean, bn.running_var
    if mean is not None and var is not None and mean.dtype != var.dtype:
        fail(op, f"{name}.running_mean is {mean.dtype} and {name}.running_var {var.dtype}: they need one dtype")
    if not bn.training and (bn.running_mean is None or bn.running_var is None):
        fail(op, f"{name} has no running statistics to normalise with, and training is False")


def activation(op: str, value: str) -> None:
    if value not in ACTIVATIONS:
        fail(op, f"unknown activation {value!r}, use one of: {', '.join(ACTIVATIONS)}")


def needs_grad(*groups: Tensor | Iterable | None) -> bool:
    """Whether a gradient is needed with respect to any tensor in ``groups``, tuples of parameters included."""
    return torch.is_grad_enabled() and any(_requires_grad(group) for group in groups)


def _requires_grad(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    return isinstance(value, (tuple, list)) and any(_requires_grad(item) for item in value)


def values_per_channel(op: str, shape: tuple[int, ...]) -> None:
    """Batch statistics of one value do not exist; the error is that of ``nn.BatchNorm2d``."""
    if shape[0] * shape[2] * shape[3] == 1:
        fail(op, f"expected more than 1 value per channel when training, got input size {tuple(shape)}")


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What kernels compute in under autocast: its dtype on a GPU, float32 on the CPU. None without autocast, as on the
    meta device, for which PyTorch has none."""
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return None
    return torch.float32 if device_type == "cpu" else torch.get_autocast_dtype(device_type)


def autocast_input(x: Tensor) -> Tensor:
    """``x`` in :func:`autocast_dtype`, where autocast is on; float64 stays, as with PyTorch's own operations."""
    dtype = autocast_dtype(x.device.type)
    return x if dtype is None or x.dtype is torch.float64 else x.to(dtype)
