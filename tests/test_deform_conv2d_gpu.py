"""GPU kernels of the deformable convolution against the reference."""

import pytest
import torch
from backends import backend_dtypes, backends
from helpers import compare_kernel, convert
from test_deform_conv2d_cpu import CASES, make

import ffkernels
from ffkernels.reference.deform_conv2d import deform_conv2d as reference

GPUS = [p for p in backends("deform_conv2d") if p.values[0].name != "cpu"]
HALVES = [p for p in backend_dtypes("deform_conv2d") if p.values[0].name != "cpu" and p.values[1] != torch.float32]
QUICK = [("teacher, second", "train"), ("stride 2", "eval"), ("one pixel", "none"), ("5x5", "none")]


def kernel_of(gpu):
    return lambda *arguments: ffkernels.deform_conv2d(*arguments, policy=gpu.policy)


@pytest.mark.parametrize(
    "case,kind",
    [
        pytest.param(case, kind, marks=[] if (case, kind) in QUICK else pytest.mark.slow)
        for case in CASES
        for kind in ("train", "eval", "none")
        if (case, kind) != ("one pixel", "train")
    ],
)
@pytest.mark.parametrize("gpu", GPUS)
def test_float32(gpu, case, kind):
    torch.manual_seed(1)
    compare_kernel(kernel_of(gpu), reference, make(case, kind, "silu"), device=gpu.device)


@pytest.mark.parametrize("gpu,dtype", HALVES)
def test_half_precision(gpu, dtype):
    torch.manual_seed(2)
    compare_kernel(kernel_of(gpu), reference, make("bias", "eval", "silu"), dtype, gpu.device)


@pytest.mark.parametrize("gpu", GPUS)
def test_far_outside_repetition_and_nan(gpu):
    """Positions far outside read zero; two runs agree to the bit; a position that is NaN stays where it is read."""
    torch.manual_seed(3)
    x, offset, mask, conv, *_ = convert(make("teacher, second", "none"), torch.float32, gpu.device)
    results = []
    for _ in range(2):
        y = kernel_of(gpu)(x, offset, mask, conv, None)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, offset, mask, conv.weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    for far in (1e6, -1e30):
        assert not kernel_of(gpu)(x, torch.full_like(offset, far), mask, conv, None).any()
    bad = offset.detach().clone()
    bad[0, 0, 2, 2] = float("nan")
    y = kernel_of(gpu)(x, bad, mask, conv, None)
    assert torch.equal(y.isnan(), reference(x, bad, mask, conv, None).isnan())
