"""Depthwise and pointwise convolution as one Triton kernel: evaluation of depthwise_separable and of BiFPN nodes."""

import pytest
import torch
from backends import backend_dtypes, backends
from helpers import compare_kernel, convert
from layers import tensor
from test_bifpn_node_cpu import make
from test_conv_chain_cpu import make_units

pytest.importorskip("triton")
import ffkernels
from ffkernels.reference.bifpn_node import bifpn_node as node_reference
from ffkernels.reference.conv_chain import conv_chain as reference
from ffkernels.triton import conv, conv_chain, separable

TRITON = [p for p in backends("conv_chain") if p.values[0].name == "triton"]
DTYPES = [p for p in backend_dtypes("conv_chain") if p.values[0].name == "triton"]
CASES = {
    # name: (channels, [(out, kernel, groups, stride, bias, activation)], (height, width))
    "stride 1": (8, [(0, 3, 0, 1, False, "leaky_relu"), (16, 1, 1, 1, False, "leaky_relu")], (7, 5)),
    "stride 2, odd": (20, [(0, 3, 0, 2, True, "silu"), (37, 1, 1, 1, True, "silu")], (9, 6)),
    "several blocks": (40, [(0, 3, 0, 2, False, "relu"), (150, 1, 1, 1, False, "none")], (6, 5)),
    "groups that share a tile": (16, [(0, 3, 0, 1, False, "none"), (16, 1, 4, 1, True, "relu")], (5, 6)),
    "1x1": (6, [(0, 1, 0, 1, True, "relu"), (5, 1, 1, 1, False, "none")], (3, 4)),
}


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that run."""
    names = []
    for module in (conv, separable):

        def launch(kernel, *arguments, launch=module.launch, **constants):
            names.append(kernel.__name__)
            launch(kernel, *arguments, **constants)

        monkeypatch.setattr(module, "launch", launch)
    return names


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gpu,dtype", DTYPES)
def test_one_kernel_gives_the_reference(gpu, dtype, case, launched):
    channels, layers, size = CASES[case]
    torch.manual_seed(1)
    arguments = tensor(2, channels, *size), make_units(channels, layers, "none" if case == "1x1" else "eval")
    kernel = lambda x, units: ffkernels.conv_chain(x, units, policy=gpu.policy)  # noqa: E731
    with torch.no_grad():
        compare_kernel(kernel, reference, arguments, dtype, gpu.device, gradients=False)
    assert launched == ["separable_kernel"]


@pytest.mark.parametrize("case", ["stride 2, odd", "groups that share a tile"])
@pytest.mark.parametrize("gpu,dtype", DTYPES)
def test_it_has_the_bits_of_two_kernels(gpu, dtype, case, launched, monkeypatch):
    channels, layers, size = CASES[case]
    torch.manual_seed(2)
    x, units = convert((tensor(2, channels, *size), make_units(channels, layers, "eval")), dtype, gpu.device)
    with torch.no_grad():
        one = ffkernels.conv_chain(x, units, policy=gpu.policy)
        monkeypatch.setattr(conv_chain, "fits", lambda depthwise, pointwise: False)
        two = ffkernels.conv_chain(x, units, policy=gpu.policy)
    assert launched == ["separable_kernel", "depthwise_kernel", "conv_kernel"]
    if gpu.device == "cpu" and dtype == torch.float32:
        # The interpreter's products are NumPy's, which adds in an order that depends on the processor and the tile.
        torch.testing.assert_close(one, two)
    else:
        assert torch.equal(one, two)


@pytest.mark.parametrize("gpu,dtype", [p for p in DTYPES if p.values[1] != torch.bfloat16])
def test_a_node_of_a_feature_pyramid(gpu, dtype, launched):
    torch.manual_seed(3)
    kernel = lambda *arguments: ffkernels.bifpn_node(*arguments, policy=gpu.policy)  # noqa: E731
    with torch.no_grad():
        compare_kernel(kernel, node_reference, make("last", False), dtype, gpu.device, gradients=False)
    assert launched == ["separable_kernel"]


@pytest.mark.parametrize("kind,grad", [("train", False), ("eval", True)])
@pytest.mark.parametrize("gpu", TRITON)
def test_training_keeps_the_map_between(gpu, kind, grad, launched):
    channels, layers, size = CASES["stride 1"]
    x, units = convert((tensor(2, channels, *size), make_units(channels, layers, kind)), torch.float32, gpu.device)
    with torch.set_grad_enabled(grad):
        ffkernels.conv_chain(x, units, policy=gpu.policy)
    assert launched == ["depthwise_kernel", "conv_kernel"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("gpu", TRITON)
def test_not_finite(gpu, value, launched):
    channels, layers, size = CASES["stride 1"]
    torch.manual_seed(4)
    x, units = convert((tensor(1, channels, *size), make_units(channels, layers, "eval")), torch.float32, gpu.device)
    with torch.no_grad():
        x[0, 2, 3, 3] = value
        mine, theirs = ffkernels.conv_chain(x, units, policy=gpu.policy), reference(x, units)
    assert launched == ["separable_kernel"]
    assert torch.equal(mine.isfinite(), theirs.isfinite()) and torch.equal(mine.isnan(), theirs.isnan())
