"""Dense convolutions as products of matrices (csrc/cuda/conv_product.cu) against the references."""

import ctypes
import os

import pytest
import torch
from backends import backend_dtypes
from helpers import compare_kernel, convert
from layers import tensor
from test_conv_chain_cpu import make_units

import ffkernels
import ffkernels.cuda.conv_chain as cuda_chain
from ffkernels.reference.conv_chain import conv_chain as reference

ALL = [p for p in backend_dtypes("conv_chain") if p.values[0].name == "cuda"]
HALVES = [p for p in ALL if p.values[1] != torch.float32]
DW = (0, 3, 0, 1, False, "silu")
CASES = {
    # name: (channels, [(out, kernel, groups, stride, bias, activation)], (height, width))
    "8 to 16, several tiles": (8, [(16, 1, 1, 1, False, "silu")], (37, 41)),
    "24 to 40, bias": (24, [(40, 1, 1, 1, True, "silu")], (9, 7)),
    "9 to 11": (9, [(11, 1, 1, 1, True, "none")], (5, 7)),
    "128 to 256": (128, [(256, 1, 1, 1, False, "silu")], (3, 5)),
    "272 to 264": (272, [(264, 1, 1, 1, False, "none")], (2, 3)),
    "1x1 stride 2": (16, [(24, 1, 1, 2, False, "silu")], (7, 6)),
    "heads' trunk": (32, [(16, 3, 1, 1, False, "silu")], (9, 10)),
    "teacher's context": (74, [(74, 3, 1, 1, False, "silu")], (4, 5)),
    "offsets and mask": (56, [(27, 3, 1, 1, True, "none")], (5, 6)),
    "3x3 stride 2": (10, [(33, 3, 1, 2, False, "silu")], (9, 8)),
    "5x5 stride 3": (8, [(8, 5, 1, 3, True, "silu")], (11, 10)),
    "two in a row": (16, [(48, 1, 1, 1, False, "silu"), (24, 1, 1, 1, True, "silu")], (6, 7)),
    "block": (16, [DW, (32, 1, 1, 1, False, "silu")], (9, 10)),
}
QUICK = {
    ("24 to 40, bias", "none"),
    ("9 to 11", "none"),
    ("1x1 stride 2", "train"),
    ("heads' trunk", "eval"),
    ("teacher's context", "none"),
    ("two in a row", "train"),
    ("block", "train"),
}
BLOCKS = {
    # name: (channels, out, stride, bias, (height, width))
    "8 to 16": (8, 16, 1, True, (13, 11)),
    "64 to 64": (64, 64, 1, False, (12, 12)),
    "72 to 136, stride 2": (72, 136, 2, True, (9, 8)),
    "256 to 256": (256, 256, 1, False, (4, 5)),
    "one pixel": (16, 8, 2, False, (1, 1)),
}


def kernel_of(gpu):
    return lambda x, units: ffkernels.conv_chain(x, units, policy=gpu.policy)


def launched() -> list[str]:
    """Kernels since the last call; only the emulation knows."""
    library = ctypes.CDLL(os.environ["FF_TEST_CUDA_EMULATION"])
    library.ff_emulation_launched.restype = ctypes.c_char_p
    return library.ff_emulation_launched().decode().splitlines()


@pytest.mark.parametrize(
    "case,kind",
    [
        pytest.param(case, kind, marks=[] if (case, kind) in QUICK else pytest.mark.slow)
        for case in CASES
        for kind in ("train", "eval", "none")
    ],
)
@pytest.mark.parametrize("gpu,dtype", ALL)
def test_forward_and_backward(gpu, dtype, case, kind):
    channels, layers, size = CASES[case]
    torch.manual_seed(1)
    arguments = tensor(3, channels, *size), make_units(channels, layers, kind)
    compare_kernel(kernel_of(gpu), reference, arguments, dtype, gpu.device)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "none"])
@pytest.mark.parametrize("gpu,dtype", ALL)
def test_activations_of_input_and_gate(gpu, dtype, activation):
    """The first layer copies its input, whose values are not near a kink; the second reads it, and its gradient is
    gated by it."""
    torch.manual_seed(2)
    units = make_units(16, [(16, 1, 1, 1, False, activation), (24, 1, 1, 1, False, "none")], "none")
    with torch.no_grad():
        units[0].conv.weight.copy_(torch.eye(16)[:, :, None, None])
    x = torch.randn(2, 16, 5, 6, dtype=torch.float64)
    x = (x + x.sign() / 4).requires_grad_()
    compare_kernel(kernel_of(gpu), reference, (x, units), dtype, gpu.device)


@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize("gpu,dtype", HALVES)
def test_block_in_one_kernel(gpu, dtype, case, monkeypatch):
    """As accurate as PyTorch; where the compiler contracts nothing, the very bits of two kernels."""
    channels, out, stride, bias, size = BLOCKS[case]
    torch.manual_seed(3)
    layers = [(0, 3, 0, stride, bias, "leaky_relu"), (out, 1, 1, 1, bias, "leaky_relu")]
    x, units = tensor(2, channels, *size), make_units(channels, layers, "eval")
    with torch.no_grad():
        compare_kernel(kernel_of(gpu), reference, (x, units), dtype, gpu.device, False)
        single = convert((x, units), dtype, gpu.device)
        y = kernel_of(gpu)(*single)
        monkeypatch.setattr(cuda_chain, "block_forward", lambda *arguments: None)
        composed = kernel_of(gpu)(*single)
    if gpu.emulated:
        assert torch.equal(y, composed)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, composed, rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("gpu,dtype", HALVES)
def test_which_calls_they_serve(gpu, dtype):
    if not gpu.emulated:
        pytest.skip("only the emulation names the kernels that ran")

    def kernels(channels, layers, kind, dtype, grad):
        x, units = convert((tensor(1, channels, 4, 4), make_units(channels, layers, kind)), dtype, gpu.device)
        launched()
        if not grad:
            with torch.no_grad():
                kernel_of(gpu)(x, units)
        else:
            kernel_of(gpu)(x, units).sum().backward()
        return " ".join(launched())

    block = [(0, 3, 0, 1, False, "relu"), (16, 1, 1, 1, False, "relu")]
    assert "separable_kernel" in kernels(8, block, "eval", dtype, False)
    assert "product_kernel" not in kernels(8, block, "eval", dtype, False)
    for channels, layers, kind, grad in [
        (8, block, "train", False),
        (8, block, "eval", True),
        (12, block, "eval", False),
    ]:
        names = kernels(channels, layers, kind, dtype, grad)
        assert "separable_kernel" not in names and "product_kernel" in names
    names = kernels(8, [(16, 3, 1, 1, False, "none")], "none", dtype, True)
    assert "product_kernel<T, false>" in names and "product_kernel<T, true>" in names
    assert "weight_product_kernel<T, kWide<T>>" in names and "conv_kernel" not in names
    assert "weight_product_kernel<T, 2>" in kernels(10, [(16, 1, 1, 1, False, "none")], "none", dtype, True)
    assert "weight_product_kernel<T, 1>" in kernels(16, [(9, 1, 1, 1, False, "none")], "none", dtype, True)
    for channels, layer in [(4, (16, 1, 1)), (16, (4, 1, 1)), (16, (16, 3, 2))]:
        assert "product_kernel" not in kernels(channels, [(*layer, 1, False, "none")], "none", dtype, True)
    names = kernels(8, block, "eval", torch.float32, False)
    assert "product_kernel<T, false>" in names and "separable_kernel" not in names


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("gpu,dtype", ALL)
def test_not_finite(gpu, dtype, value):
    for layers in (
        [(16, 3, 1, 1, True, "relu")],
        [(16, 1, 1, 1, False, "leaky_relu")],
        [DW, (8, 1, 1, 1, False, "relu")],
    ):
        for kind in ("eval", "none"):
            torch.manual_seed(4)
            x, units = convert((tensor(2, 8, 6, 7).detach(), make_units(8, layers, kind)), dtype, gpu.device)
            x[1, 2, 3, 3] = value
            with torch.no_grad():
                mine, theirs = kernel_of(gpu)(x, units), reference(x, units)
            assert torch.equal(mine.isnan(), theirs.isnan()), (layers, kind)
            assert torch.equal(mine.isinf(), theirs.isinf()), (layers, kind)


@pytest.mark.parametrize("gpu,dtype", ALL)
def test_views_and_repetition(gpu, dtype):
    """Tensors at any address; two runs agree to the bit."""
    torch.manual_seed(5)
    for layers in ([(16, 1, 1, 1, True, "none")], [(16, 3, 1, 1, True, "none")], [DW, (16, 1, 1, 1, True, "none")]):
        units = convert(make_units(8, layers, "none"), dtype, gpu.device)
        for offset in (0, 1, 2):
            base = torch.randn(2 * 8 * 5 * 6 + offset, device=gpu.device, dtype=dtype)
            x = base[offset:].view(2, 5, 6, 8).permute(0, 3, 1, 2)
            results = []
            for _ in range(2):
                leaf = x.detach().requires_grad_()
                y = kernel_of(gpu)(leaf, units)
                gradients = torch.autograd.grad(y.sum(), [leaf, *(u.conv.weight for u in units)])
                with torch.no_grad():
                    results.append((y, *gradients, kernel_of(gpu)(leaf, units)))
            assert all(torch.equal(a, b) for a, b in zip(*results))
            eps = (32 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps
            torch.testing.assert_close(results[0][0], reference(x, units), rtol=eps, atol=eps)
            torch.testing.assert_close(results[0][-1], reference(x, units), rtol=eps, atol=eps)
