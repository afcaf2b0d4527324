import pytest
import torch
from backends import FORMATS
from layers import check_gradients, conv, norm, same_statistics, stock_conv, stock_norm, tensor
from torch import nn
from torch.nn import functional as F

import ffkernels
from ffkernels.nn import ConvBNAct

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.2 * x),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("groups,k,stride,bias", [(1, 3, 1, False), (4, 3, 2, True), (8, 1, 1, True), (2, 5, 1, False)])
def test_against_stock_layers(groups, k, stride, bias, activation, training):
    x, c, bn = tensor(2, 8, 7, 5), conv(8, 8, k, groups, bias, stride), norm(8, training)
    stock = nn.Sequential(stock_conv(c), stock_norm(bn))
    expected = ACTIVATIONS[activation](stock(x))
    y = ffkernels.grouped_conv_bn_act(x, c, bn, activation, 0.2)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    same_statistics(bn, stock[1])


def test_groups_are_independent_dense_convolutions():
    x, c = tensor(2, 6, 5, 4), conv(9, 6, 3, groups=3)
    parts = [F.conv2d(x[:, 2 * g : 2 * g + 2], c.weight[3 * g : 3 * g + 3], padding=1) for g in range(3)]
    torch.testing.assert_close(ffkernels.grouped_conv_bn_act(x, c, None), torch.cat(parts, 1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation, training):
    x, c, bn = tensor(2, 4, 3, 3), conv(4, 4, 3, 2, True), norm(4, training)
    check_gradients(lambda: ffkernels.grouped_conv_bn_act(x, c, bn, activation), x, c, bn)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (1, 4, 1, 1), (2, 4, 1, 7), (3, 4, 6, 1)])
def test_shapes_and_formats(shape, form):
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=form)
    y = ffkernels.grouped_conv_bn_act(x, conv(8, 4, 3, 2), norm(8, False), "relu")
    assert y.shape == (shape[0], 8, *shape[2:]) and y.dtype == torch.float64
    assert y.numel() == 0 or y.is_contiguous(memory_format=form)


def test_batch_of_zero_leaves_statistics_alone():
    bn = norm(4)
    mean = bn.running_mean.clone()
    ffkernels.grouped_conv_bn_act(torch.zeros(0, 4, 3, 3, dtype=torch.float64), conv(4, 4, 3), bn)
    assert torch.equal(bn.running_mean, mean)


def test_one_value_per_channel_cannot_be_normalised():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ffkernels.grouped_conv_bn_act(tensor(1, 4, 1, 1), conv(4, 4, 3), norm(4))


def test_nan_passes():
    x = torch.full((1, 2, 1, 1), float("nan"), dtype=torch.float64)
    for activation in ACTIVATIONS:
        assert ffkernels.grouped_conv_bn_act(x, conv(2, 2, 1), None, activation).isnan().all()


def test_autocast():
    block = ConvBNAct(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(torch.randn(2, 4, 5, 5))
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change,message",
    [
        ({"x": torch.zeros(4, 3, 3).double()}, r"grouped_conv_bn_act: x must be .*\(4, 3, 3\)"),
        ({"x": torch.zeros(1, 4, 3, 3, dtype=torch.int64)}, "x must be a floating-point"),
        ({"x": torch.zeros(1, 6, 3, 3).double()}, r"conv.weight \(4, 2, 3, 3\) with groups=2 does not fit 6"),
        ({"x": torch.zeros(1, 4, 3, 3)}, "conv.weight is torch.float64 and the input torch.float32"),
        ({"bn": norm(3)}, r"bn.weight must be \(4,\), got \(3,\)"),
        ({"bn": norm(4, False)._replace(running_mean=None)}, "bn has no running statistics"),
        ({"conv": conv(4, 4, 3)._replace(bias=torch.zeros(5).double())}, r"conv.bias must be \(4,\), got \(5,\)"),
        ({"conv": conv(4, 4, 3)._replace(stride=0)}, "stride >= 1"),
        ({"conv": conv(4, 4, 3)._replace(weight=torch.zeros(4, 4).double())}, r"conv.weight must be .* \(4, 4\)"),
        ({"activation": "tanh"}, "unknown activation 'tanh', use one of: none, relu, leaky_relu, silu"),
    ],
)
def test_errors(change, message):
    arguments = {"x": tensor(1, 4, 3, 3), "conv": conv(4, 4, 3, 2), "bn": norm(4), "activation": "relu"}
    with pytest.raises(ValueError, match=message):
        ffkernels.grouped_conv_bn_act(**{**arguments, **change})


@pytest.mark.parametrize("momentum", [0.1, None])
def test_block_replaces_a_sequential(momentum):
    block = ConvBNAct(4, 8, stride=2, groups=2, activation="leaky_relu", momentum=momentum)
    stock = nn.Sequential(
        nn.Conv2d(4, 8, 3, 2, 1, groups=2, bias=False), nn.BatchNorm2d(8, momentum=momentum), nn.LeakyReLU(0.1)
    )
    block.load_state_dict(stock.state_dict())
    assert list(block.state_dict()) == list(stock.state_dict())
    for _ in range(3):
        x = torch.randn(3, 4, 6, 6)
        torch.testing.assert_close(block(x), stock(x))
    block.eval(), stock.eval()
    torch.testing.assert_close(block(x), stock(x))
    for (name, mine), theirs in zip(block.state_dict().items(), stock.state_dict().values()):
        torch.testing.assert_close(mine, theirs, msg=name)
