"""The CPU's kernels of a BiFPN node against the reference."""

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
from ffkernels.reference.bifpn_node import bifpn_node as reference

pytestmark = needs_cpu_kernels

CASES = {
    # name: (channels, groups, bias, resample, heights and widths of the inputs)
    "top-down": (32, 4, False, ("none", "up"), ((5, 7), (3, 4))),
    "bottom-up": (32, 4, False, ("none", "none", "down"), ((3, 4), (3, 4), (5, 7))),
    "last": (8, 4, False, ("none", "down", "down"), ((3, 2), (5, 3), (6, 4))),
    "V1": (74, 1, True, ("none", "down"), ((2, 3), (4, 6))),
    "of order": (5, 1, True, ("down", "up", "none"), ((7, 5), (2, 2), (4, 3))),
    "up by odd factors": (6, 3, False, ("none", "up"), ((7, 11), (3, 4))),
    "one pixel": (4, 2, False, ("none", "up", "down"), ((1, 1), (1, 1), (1, 1))),
    "one row": (8, 2, True, ("none", "down"), ((1, 10), (1, 20))),
    "one column": (3, 1, True, ("up", "none"), ((9, 1), (17, 1))),
    "dense 3x3": (6, 0, False, ("none", "down"), ((3, 3), (5, 6))),
}


def make(case, training=True, pool="max", batch=2):
    channels, groups, bias, resample, sizes = CASES[case]
    inputs = tuple(tensor(batch, channels, *size) for size in sizes)
    weight = torch.tensor([0.7, 1.3, 0.4], dtype=torch.float64, requires_grad=True)
    first = conv(channels, channels, 3, channels if groups else 1, bias)
    second = conv(channels, channels, 1, groups, bias) if groups else None
    bn = norm(channels, training)._replace(eps=1e-3, momentum=0.01)
    return inputs, resample, weight, first, second, bn, groups or 1, pool


def kernel(*arguments):
    return ffkernels.bifpn_node(*arguments, policy=CPU)


@pytest.mark.parametrize("pool", ["max", "max_same"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_float64(case, training, pool):
    torch.manual_seed(0)
    check_float64(kernel, reference, make(case, training, pool))


@every_isa
@pytest.mark.parametrize("case", CASES)
def test_float32(case, isa):
    torch.manual_seed(1)
    check_float32(kernel, reference, make(case, pool="max_same" if case == "V1" else "max", batch=3), isa)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", ["of order", "one pixel", "dense 3x3"])
def test_gradcheck(case, training):
    torch.manual_seed(2)
    inputs, *rest = make(case, training)
    inputs = tuple(x[:, :, :4, :4].detach().requires_grad_() for x in inputs) if case == "dense" else inputs
    check_gradients(lambda: kernel(inputs, *rest), inputs, rest)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads):
    torch.manual_seed(3)
    inputs = tensor(2, 24, 17, 18), tensor(2, 24, 9, 9), tensor(2, 24, 33, 36)
    weight = torch.rand(3, dtype=torch.float64, requires_grad=True)
    arguments = (inputs, ("none", "up", "down"), weight, conv(24, 24, 3, 24), conv(24, 24, 1, 4), norm(24), 4)
    check_threads(kernel, reference, arguments, threads)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, gradient):
    torch.manual_seed(4)
    inputs, resample, *rest = make("of order", False)
    rest = [t.detach() if isinstance(t, torch.Tensor) else t for t in rest]
    for group in rest[1:4]:
        for t in group:
            if isinstance(t, torch.Tensor):
                t.requires_grad_(False)
    check_layout(
        lambda *m: kernel(m, resample, *rest), lambda *m: reference(m, resample, *rest), inputs, layout, gradient
    )


@pytest.mark.parametrize("pool", ["max", "max_same"])
def test_equal_values_share_nothing(pool):
    """The first of equal values in a window takes its gradient, a zero of the border included, as in max_pool2d."""
    torch.manual_seed(5)
    inputs, *rest = make("bottom-up", pool=pool)
    with torch.no_grad():
        for x in inputs:
            x.copy_(x.round().clamp_(-1, 0))
    check_float64(kernel, reference, (inputs, *rest))


@pytest.mark.parametrize("weights", [(-1.0, 0.5, 0.3), (0.0, 1.0, 0.0), (-1.0, -2.0, -3.0), (0.2, 0.3, -1.0)])
def test_signs_of_fusion_weights(weights):
    for case in ("bottom-up", "V1"):
        torch.manual_seed(6)
        inputs, resample, _, *rest = make(case, False)
        weight = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
        check_float64(kernel, reference, (inputs, resample, weight, *rest))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pool", ["max", "max_same"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_not_finite(place, pool, value):
    torch.manual_seed(7)
    inputs, *rest = make("bottom-up", False, pool)
    with torch.no_grad():
        inputs[place][0, 3, 1, 2] = value
    check_not_finite(kernel, reference, (inputs, *rest))


def test_nearest_pixels_are_those_of_interpolate():
    """Source indices are computed in PyTorch's arithmetic, for every pair of sizes."""
    fusion = torch.ones(2)
    first = ffkernels.ConvParams(torch.zeros(1, 1, 3, 3), padding=1)
    first.weight[0, 0, 1, 1] = 1
    bn = ffkernels.BatchNorm(None, None, torch.zeros(1), torch.ones(1), False, 0.1, 0.0)
    for target in (*range(1, 40), 49, 98, 107):
        for source in {1, 2, 3, 7, target // 3 + 1, (target + 1) // 2, target, target + 5}:
            inputs = torch.zeros(1, 1, target, 1), torch.arange(float(source)).view(1, 1, source, 1)
            arguments = (inputs, ("none", "up"), fusion, first, None, bn)
            torch.testing.assert_close(kernel(*arguments), reference(*arguments))


def test_gradients_only_where_required():
    torch.manual_seed(8)
    check_some_gradients(kernel, reference, make("last", False))


def test_double_backward_is_an_error():
    check_double_backward(kernel, make("top-down"))


def test_empty_batch():
    y = kernel(*make("bottom-up", False, batch=0))
    y.sum().backward()
    assert y.shape == (0, 32, 3, 4)


def test_one_value_per_channel_cannot_be_normalised():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        kernel(*make("one pixel", batch=1))


def test_statistics_without_gradients():
    torch.manual_seed(9)
    *head, bn, groups, pool = make("top-down")
    copy = bn._replace(running_mean=bn.running_mean.clone(), running_var=bn.running_var.clone())
    with torch.no_grad():
        y, expected = kernel(*head, bn, groups, pool), reference(*head, copy, groups, pool)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(bn.running_mean, copy.running_mean)
    torch.testing.assert_close(bn.running_var, copy.running_var)


def test_opcheck():
    torch.manual_seed(10)
    for form in (torch.contiguous_format, torch.channels_last):
        inputs, _, weight, first, second, bn, *_ = make("bottom-up")
        inputs = [x.detach().contiguous(memory_format=form) for x in inputs]
        nothing = [None] * 5
        params = [first.weight.detach(), *nothing, second.weight.detach(), None, bn.weight.detach(), bn.bias.detach()]
        params += [None, None]
        settings = [0, 0, 2, 4, 0, 1, 1, 32, 0, 0, 1, 0, 4, 0, 1], [1e-4, 0.0, 0.0, 0.0, 1e-3]
        raw, backward = torch.ops.ffkernels._bifpn_node.default, torch.ops.ffkernels._bifpn_node_backward.default
        for save in (True, False):
            torch.library.opcheck(raw, (inputs, weight.detach(), params, *settings, save, "cpu"))
        y, *saved = raw(inputs, weight.detach(), params, *settings, True, "cpu")
        needs = [True, True, False, True, True, False, False, False, True, False, True, True]
        arguments = (torch.randn_like(y), inputs, weight.detach(), params, saved, *settings, needs, "cpu")
        torch.library.opcheck(backward, arguments)


@pytest.mark.parametrize("training", [True, False])
def test_compile(training):
    from featherface.models.bifpn import BiFPNNode

    torch.manual_seed(11)
    with ffkernels.use("require", "cpu"):
        node = BiFPNNode(8, ("none", "up", "down"), 3, 4).train(training)
    check_compiled(node, torch.randn(2, 8, 4, 5), torch.randn(2, 8, 2, 3), torch.randn(2, 8, 7, 9))
