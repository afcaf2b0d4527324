"""The CPU's kernel of the deformable convolution against the reference."""

import math

import pytest
import torch
from kernel_checks import (
    CPU,
    GRADIENTS,
    LAYOUTS,
    check_compiled,
    check_double_backward,
    check_float32,
    check_float64,
    check_layout,
    check_not_finite,
    check_some_gradients,
    check_threads,
    every_isa,
    needs_cpu_kernels,
)
from layers import check_gradients, conv, norm, tensor

import ffkernels
from ffkernels.nn import DeformConvBNAct
from ffkernels.reference.deform_conv2d import deform_conv2d as reference

pytestmark = needs_cpu_kernels

CASES = {
    # name: (channels, out_channels, kernel, stride, bias, (height, width))
    "teacher, first": (56, 28, 3, 1, False, (5, 7)),
    "teacher, second": (14, 14, 3, 1, False, (6, 3)),
    "bias": (12, 8, 3, 1, True, (4, 5)),
    "stride 2": (5, 3, 3, 2, True, (7, 6)),
    "5x5": (3, 17, 5, 1, False, (4, 3)),
    "1x1": (16, 33, 1, 1, True, (3, 4)),
    "one pixel": (4, 4, 3, 1, False, (1, 1)),
    "one row": (8, 4, 3, 1, False, (1, 19)),
    "one column": (3, 5, 3, 1, True, (18, 1)),
}


def make(case, kind="train", activation="none", batch=2, spread=1.5):
    channels, out, k, stride, bias, size = CASES[case]
    x, c = tensor(batch, channels, *size), conv(out, channels, k, 1, bias, stride)
    target = [(n + 2 * c.padding - k) // stride + 1 for n in size]
    offset = (torch.randn(batch, 2 * k * k, *target, dtype=torch.float64) * spread).requires_grad_()
    mask = torch.rand(batch, k * k, *target, dtype=torch.float64, requires_grad=True)
    return x, offset, mask, c, None if kind == "none" else norm(out, kind == "train"), activation, 0.2


def kernel(*arguments):
    return ffkernels.deform_conv2d(*arguments, policy=CPU)


@pytest.mark.parametrize("kind", ["train", "eval", "none"])
@pytest.mark.parametrize("case", CASES)
def test_float64(case, kind):
    torch.manual_seed(0)
    check_float64(kernel, reference, make(case, kind, "leaky_relu", spread=3.0))


@every_isa
@pytest.mark.parametrize("kind", ["train", "none"])
@pytest.mark.parametrize("case", CASES)
def test_float32(case, kind, isa):
    torch.manual_seed(1)
    check_float32(kernel, reference, make(case, kind, "leaky_relu", batch=5 if case == "one pixel" else 2), isa)


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("kind", ["train", "eval", "none"])
def test_gradcheck(kind, activation):
    torch.manual_seed(2)
    arguments = make("stride 2", kind, activation)
    x, offset, mask, c, bn, *_ = arguments
    x = x[:1, :, :3, :3].detach().requires_grad_()
    offset, mask = (t[:1, :, :2, :2].detach().requires_grad_() for t in (offset, mask))
    check_gradients(lambda: kernel(x, offset, mask, c, bn, activation), x, offset, mask, c, bn)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads):
    torch.manual_seed(3)
    x, c = tensor(2, 24, 20, 21), conv(16, 24, 3)
    offset, mask = tensor(2, 18, 20, 21), tensor(2, 9, 20, 21)
    check_threads(kernel, reference, (x, offset, mask, c, norm(16), "relu"), threads)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, gradient):
    torch.manual_seed(4)
    c = conv(6, 8, 3)
    c.weight.requires_grad_(False)
    maps = tensor(2, 8, 6, 10), tensor(2, 18, 6, 10), tensor(2, 9, 6, 10)
    check_layout(
        lambda *m: kernel(*m, c, None, "relu"), lambda *m: reference(*m, c, None, "relu"), maps, layout, gradient
    )


@pytest.mark.parametrize("offset", [0.0, 1.0, -1.0, -1.5, 7.0, 1e6, -1e30, math.inf, -math.inf, math.nan])
def test_offsets_to_anywhere(offset):
    """On pixels, on the border, far outside and not finite: what PyTorch gives."""
    torch.manual_seed(5)
    x, offsets, mask, *rest = make("teacher, second", "none")
    with torch.no_grad():
        offsets[:, ::3] = offset
    for function in (check_not_finite, check_float64)[: 2 if math.isfinite(offset) else 1]:
        function(kernel, reference, (x, offsets, mask, *rest))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_pixels_that_are_not_finite(value):
    torch.manual_seed(6)
    x, *rest = make("bias", "eval", "relu")
    with torch.no_grad():
        x[0, 2, 1, 1] = value
    check_not_finite(kernel, reference, (x, *rest))


def test_gradients_only_where_required():
    torch.manual_seed(7)
    check_some_gradients(kernel, reference, make("one row", "eval"))


def test_double_backward_is_an_error():
    check_double_backward(kernel, make("bias"))


def test_empty_batch():
    arguments = make("bias", "eval", batch=0)
    y = kernel(*arguments)
    y.sum().backward()
    assert y.shape == (0, 8, 4, 5) and arguments[0].grad.shape == arguments[0].shape


def test_statistics_without_gradients():
    torch.manual_seed(8)
    arguments = make("bias")
    bn = arguments[4]._replace(
        running_mean=arguments[4].running_mean.clone(), running_var=arguments[4].running_var.clone()
    )
    with torch.no_grad():
        expected = reference(*arguments[:4], bn, *arguments[5:])
        torch.testing.assert_close(kernel(*arguments), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(arguments[4].running_var, bn.running_var)


def test_one_value_per_channel_cannot_be_normalised():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        kernel(*make("one pixel", batch=1))


def test_autocast():
    block = DeformConvBNAct(8, 6, activation="relu").eval()
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    expected = block(x)
    ffkernels.set_fused(block, "require")
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x.bfloat16())
    y.sum().backward()
    assert y.dtype == torch.float32 and x.grad is not None
    torch.testing.assert_close(y, expected, rtol=0.1, atol=0.1)


def test_refusal():
    x, offset, mask, *rest = make("bias", "none")
    with pytest.raises(ffkernels.FusedKernelRequired, match="different dtypes"):
        kernel(x, offset.float(), mask, *rest)


def test_opcheck():
    torch.manual_seed(9)
    for form in (torch.contiguous_format, torch.channels_last):
        x, offset, mask, c, bn, *_ = make("bias")
        x, offset, mask = (t.detach().contiguous(memory_format=form) for t in (x, offset, mask))
        params = [c.weight.detach(), c.bias.detach(), bn.weight.detach(), bn.bias.detach(), None, None]
        settings = [1, 1, 1, 1, 1], [0.1, 1e-5]
        raw, backward = torch.ops.ffkernels._deform_conv2d.default, torch.ops.ffkernels._deform_conv2d_backward.default
        for save in (True, False):
            torch.library.opcheck(raw, (x, offset, mask, params, *settings, save, "cpu"))
        y, *saved = raw(x, offset, mask, params, *settings, True, "cpu")
        needs = [True, True, False, True, True, True, False]
        arguments = (torch.randn_like(y), x, offset, mask, params, saved, *settings, needs, "cpu")
        torch.library.opcheck(backward, arguments)


@pytest.mark.parametrize("training", [True, False])
def test_compile(training):
    torch.manual_seed(10)
    with ffkernels.use("require", "cpu"):
        block = DeformConvBNAct(4, 6, activation="leaky_relu").train(training)
    for layer in (block[0].offset_conv, block[0].modulator_conv):
        torch.nn.init.normal_(layer.weight, std=0.1)
    check_compiled(block, torch.randn(2, 4, 6, 5))
