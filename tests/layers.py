"""Random layer parameters in float64, for tests of ops against their definitions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ffkernels import BatchNorm, ConvParams


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def conv(
    out_channels: int, in_channels: int, k: int, groups: int = 1, bias: bool = False, stride: int = 1
) -> ConvParams:
    weight = tensor(out_channels, in_channels // groups, k, k)
    return ConvParams(weight, tensor(out_channels) if bias else None, stride, k // 2, groups)


def norm(channels: int, training: bool = True) -> BatchNorm:
    """Batch normalisation with signed weights and running statistics away from 0 and 1."""
    mean, var = torch.randn(channels, dtype=torch.float64), torch.rand(channels, dtype=torch.float64) + 0.5
    return BatchNorm(tensor(channels), tensor(channels), mean, var, training, 0.1, 1e-5)


def one_sided(bn: BatchNorm) -> BatchNorm:
    """``bn`` with offsets so large beside its weights that no value lies near the threshold of a ReLU, where the
    gradients of two precisions need not agree."""
    with torch.no_grad():
        bn.weight.mul_(0.02)
        bn.bias.copy_(3 * bn.bias.sign())
    return bn


def leaves(*values: object) -> Iterator[Tensor]:
    """The tensors inside nested tuples and lists that take gradients."""
    for value in values:
        if isinstance(value, Tensor):
            if value.requires_grad:
                yield value
        elif isinstance(value, (tuple, list)):
            yield from leaves(*value)


def check_gradients(run, *values: object) -> None:
    """gradcheck with respect to every leaf of ``values``, which ``run()`` reads."""
    # gradcheck changes its inputs in place, so run() sees the changes.
    assert torch.autograd.gradcheck(lambda *_: run(), tuple(leaves(*values)), fast_mode=False)


def stock_conv(params: ConvParams) -> nn.Conv2d:
    """The stock layer with these parameters."""
    o, i, k, _ = params.weight.shape
    layer = nn.Conv2d(
        i * params.groups, o, k, params.stride, params.padding, groups=params.groups, bias=params.bias is not None
    ).double()
    with torch.no_grad():
        layer.weight.copy_(params.weight)
        if params.bias is not None:
            layer.bias.copy_(params.bias)
    return layer


def stock_norm(params: BatchNorm) -> nn.BatchNorm2d:
    """The stock layer with these parameters and a copy of these statistics."""
    layer = nn.BatchNorm2d(len(params.weight), params.eps, params.momentum).double().train(params.training)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(layer, name).copy_(getattr(params, name))
    return layer


def same_statistics(params: BatchNorm, layer: nn.BatchNorm2d) -> None:
    torch.testing.assert_close(params.running_mean, layer.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(params.running_var, layer.running_var, rtol=1e-12, atol=1e-12)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter and running statistic of ``model`` a value that its default does not have."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("num_batches_tracked"):
                continue
            noise = torch.randn(value.shape, generator=generator).to(value)
            if name.endswith("running_var"):
                value.copy_(1 + 0.2 * noise.abs())
            else:
                value.add_(0.05 * noise)
    return model
