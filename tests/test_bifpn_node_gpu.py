"""GPU kernels of a BiFPN node against the reference."""

import pytest
import torch
from backends import backend_dtypes, backends
from helpers import compare_kernel, convert
from layers import conv, norm, tensor
from test_bifpn_node_cpu import CASES, make

import ffkernels
from ffkernels.reference.bifpn_node import bifpn_node as reference

GPUS = [p for p in backends("bifpn_node") if p.values[0].name != "cpu"]
HALVES = [p for p in backend_dtypes("bifpn_node") if p.values[0].name != "cpu" and p.values[1] != torch.float32]
QUICK = ("bottom-up", "of order", "one pixel", "dense 3x3")


def kernel_of(gpu):
    return lambda *arguments: ffkernels.bifpn_node(*arguments, policy=gpu.policy)


@pytest.mark.parametrize("pool,training", [("max", True), ("max_same", False)])
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES]
)
@pytest.mark.parametrize("gpu", GPUS)
def test_float32(gpu, case, pool, training):
    torch.manual_seed(1)
    compare_kernel(kernel_of(gpu), reference, make(case, training, pool, batch=3), device=gpu.device)


@pytest.mark.parametrize("source,target", [(26, 44), (126, 142), (80, 92), (7, 3), (1, 5), (5, 1), (9, 18), (9, 17)])
@pytest.mark.parametrize("gpu", GPUS)
def test_nearest_pixels_are_those_of_interpolate(gpu, source, target):
    torch.manual_seed(5)
    inputs = tensor(1, 2, target, 3), tensor(1, 2, source, 2)
    arguments = inputs, ("none", "up"), torch.rand(2).double(), conv(2, 2, 3, groups=2), None, norm(2, False)
    compare_kernel(kernel_of(gpu), reference, arguments, device=gpu.device)


@pytest.mark.parametrize("gpu,dtype", HALVES)
def test_half_precision(gpu, dtype):
    torch.manual_seed(2)
    compare_kernel(kernel_of(gpu), reference, make("last", False), dtype, gpu.device)


@pytest.mark.parametrize("gpu", GPUS)
def test_gradients_only_where_required(gpu):
    torch.manual_seed(3)
    inputs, resample, weight, first, *rest = make("of order")
    everything = [*inputs, weight, first.weight]
    for chosen in range(len(everything)):
        for i, leaf in enumerate(everything):
            leaf.requires_grad_(i == chosen)
        compare_kernel(kernel_of(gpu), reference, (inputs, resample, weight, first, *rest), device=gpu.device)


@pytest.mark.parametrize("pool", ["max", "max_same"])
@pytest.mark.parametrize("gpu", GPUS)
def test_ties_and_repetition(gpu, pool):
    """The first of equal values takes the gradient, as in PyTorch; two runs agree to the bit."""
    torch.manual_seed(4)
    _, resample, *rest = convert(make("of order", False, pool), torch.float32, gpu.device)
    inputs = [
        torch.randint(-1, 2, (2, 5, *size), device=gpu.device).float().requires_grad_() for size in CASES["of order"][4]
    ]
    results = []
    for run in (kernel_of(gpu), kernel_of(gpu), reference):
        y = run(inputs, resample, *rest)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results[:2]))
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-4)
