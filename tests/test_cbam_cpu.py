"""The CPU's kernels of CBAM against the reference."""

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
from ffkernels import ChannelMLP
from ffkernels.reference.cbam import cbam as reference

pytestmark = needs_cpu_kernels

CASES = {
    # name: (channels, MLP width, hidden, MLP bias, groups, order, applications, residual, (height, width))
    "manager A": (64, 32, 2, False, 4, "mean_max", 1, True, (5, 7)),
    "manager B": (32, 32, 1, False, 4, "mean_max", 1, True, (4, 3)),
    "V1": (37, 37, 3, True, 1, "max_mean", 1, True, (6, 5)),
    "no residual": (24, 8, 2, True, 3, "max_mean", 1, False, (9, 9)),
    "threefold": (16, 8, 2, False, 4, "mean_max", 3, True, (4, 5)),
    "threefold, no residual": (8, 8, 2, True, 2, "mean_max", 3, False, (3, 4)),
    "one pixel": (8, 4, 2, False, 2, "mean_max", 1, True, (1, 1)),
    "one row": (8, 4, 2, False, 8, "mean_max", 1, True, (1, 70)),
    "one column": (6, 6, 2, False, 1, "max_mean", 1, False, (67, 1)),
}


def make(case, training=True, batch=3):
    channels, width, hidden, bias, groups, order, applications, residual, size = CASES[case]
    mlp = ChannelMLP(
        tensor(hidden, width), tensor(hidden) if bias else None, tensor(width, hidden), tensor(width) if bias else None
    )
    bns = [norm(groups, training) for _ in range(applications)]
    return tensor(batch, channels, *size), mlp, conv(groups, 2 * groups, 7, groups), bns, order, residual


def kernel(*arguments):
    return ffkernels.cbam(*arguments, policy=CPU)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_float64(case, training):
    torch.manual_seed(0)
    check_float64(kernel, reference, make(case, training))


@every_isa
@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("threefold")])
def test_float32(case, isa):
    torch.manual_seed(1)
    check_float32(kernel, reference, make(case, batch=6), isa)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", ["one pixel", "threefold, no residual"])
def test_gradcheck(case, training):
    torch.manual_seed(2)
    x, mlp, spatial, *rest = make(case, training, batch=2)
    check_gradients(lambda: kernel(x, mlp, spatial, *rest), x, mlp, rest[0])


def test_gradcheck_of_the_spatial_convolution():
    torch.manual_seed(3)
    x, mlp, _, bns, *rest = make("one pixel", batch=2)
    x, spatial = tensor(2, 8, 3, 2), conv(2, 4, 3, 2)
    check_gradients(lambda: kernel(x, mlp, spatial, bns, *rest), x, spatial)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads):
    torch.manual_seed(4)
    _, mlp, spatial, *rest = make("manager A")
    check_threads(kernel, reference, (tensor(2, 64, 23, 25), mlp, spatial, *rest), threads)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, gradient):
    torch.manual_seed(5)
    _, mlp, spatial, bns, *rest = make("threefold", False)
    mlp = ChannelMLP(*(t if t is None else t.detach() for t in mlp))
    spatial = spatial._replace(weight=spatial.weight.detach())
    bns = [bn._replace(weight=bn.weight.detach(), bias=bn.bias.detach()) for bn in bns]
    check_layout(
        lambda x: kernel(x, mlp, spatial, bns, *rest),
        lambda x: reference(x, mlp, spatial, bns, *rest),
        [tensor(2, 16, 6, 10)],
        layout,
        gradient,
    )


@pytest.mark.parametrize("case", ["manager A", "V1"])
def test_equal_values_share_the_gradient_of_a_maximum(case):
    torch.manual_seed(6)
    x, mlp, *rest = make(case)
    with torch.no_grad():
        x.copy_(x.round())
        for t in mlp:
            if t is not None:
                t.zero_()  # a gate of one half, so that equal values stay equal
    check_float64(kernel, reference, (x, mlp, *rest))
    with torch.no_grad():
        x.zero_()
    check_float64(kernel, reference, (x, mlp, *rest))


def test_one_normalisation_for_all_applications():
    """The same parameters, weight and bias, with statistics of each use: gradients add up."""
    torch.manual_seed(7)
    x, mlp, spatial, bns, *rest = make("threefold")
    shared = [bn._replace(weight=bns[0].weight, bias=bns[0].bias) for bn in bns]
    copied = [bn._replace(running_mean=bn.running_mean.clone(), running_var=bn.running_var.clone()) for bn in shared]
    y, expected = kernel(x, mlp, spatial, shared, *rest), reference(x, mlp, spatial, copied, *rest)
    wanted = [x, mlp.fc1_weight, mlp.fc2_weight, spatial.weight, bns[0].weight, bns[0].bias]
    grad = torch.randn_like(y)
    for g, e in zip(*(torch.autograd.grad(out, wanted, grad) for out in (y, expected))):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-10)
    for mine, theirs in zip(shared, copied):
        torch.testing.assert_close(mine.running_mean, theirs.running_mean)
        torch.testing.assert_close(mine.running_var, theirs.running_var)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("case", ["manager A", "V1"])
def test_not_finite(case, value):
    torch.manual_seed(8)
    x, *rest = make(case, False)
    with torch.no_grad():
        x[1, 3, 2, 2] = value
    check_not_finite(kernel, reference, (x, *rest))


@pytest.mark.parametrize("training", [True, False])
def test_without_affine_parameters_or_statistics(training):
    torch.manual_seed(9)
    x, mlp, spatial, bns, *rest = make("manager B", training)
    change = {"running_mean": None, "running_var": None} if training else {"weight": None, "bias": None}
    check_float64(kernel, reference, (x, mlp, spatial, [bn._replace(**change) for bn in bns], *rest))


def test_gradients_only_where_required():
    torch.manual_seed(10)
    check_some_gradients(kernel, reference, make("threefold", False))


def test_double_backward_is_an_error():
    check_double_backward(kernel, make("manager B"))


def test_empty_batch():
    y = kernel(*make("manager A", False, batch=0))
    y.sum().backward()
    assert y.shape == (0, 64, 5, 7)


def test_one_value_per_channel_cannot_be_normalised():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        kernel(*make("one pixel", batch=1))


def test_refusal():
    x, mlp, spatial, *rest = make("manager A")
    with pytest.raises(ffkernels.FusedKernelRequired, match="spatial convolution with a bias"):
        kernel(x, mlp, spatial._replace(bias=torch.zeros(4, dtype=torch.float64)), *rest)


def test_autocast():
    from featherface.models.attention import CBAM

    block = CBAM(48).eval()
    x = torch.randn(2, 48, 5, 5, requires_grad=True)
    expected = block(x)
    ffkernels.set_fused(block, "require")
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x.bfloat16())
    y.sum().backward()
    assert y.dtype == torch.float32 and x.grad is not None
    torch.testing.assert_close(y, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("training", [0, 1])
def test_opcheck(training):
    torch.manual_seed(11)
    for form in (torch.contiguous_format, torch.channels_last):
        x, mlp, spatial, (bn,), *_ = make("manager A", bool(training))
        x = x.detach().contiguous(memory_format=form)
        tensors = [*mlp, spatial.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var]
        params = [t if t is None else t.detach() for t in tensors]
        settings = [0, 0, 1, training], [0.1, 1e-5]
        raw, backward = torch.ops.ffkernels._cbam.default, torch.ops.ffkernels._cbam_backward.default
        for save in (True, False):
            torch.library.opcheck(raw, (x, torch.ones_like(x), params, *settings, save, "cpu"))
        y, *saved = raw(x, None, params, *settings, True, "cpu")
        needs = [True, True, True, False, True, False, True, True, True]
        arguments = (torch.randn_like(y), x, y, params, saved[-6:], *settings, needs, "cpu")
        torch.library.opcheck(backward, arguments)


@pytest.mark.parametrize("training", [True, False])
def test_compile(training):
    from featherface.models.attention import CBAM_Plus

    torch.manual_seed(12)
    with ffkernels.use("require", "cpu"):
        block = CBAM_Plus(32).train(training)
    check_compiled(block, torch.randn(2, 32, 6, 5))
