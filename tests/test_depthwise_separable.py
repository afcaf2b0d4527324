import pytest
import torch
from backends import FORMATS
from layers import check_gradients, conv, norm, same_statistics, stock_conv, stock_norm, tensor
from torch import nn

import ffkernels
from ffkernels.nn import DepthwiseSeparable


def layers(channels=4, out=6, stride=1, training=True):
    depthwise = conv(channels, channels, 3, groups=channels, stride=stride)
    return depthwise, norm(channels, training), conv(out, channels, 1), norm(out, training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride,size", [(1, (5, 4)), (2, (5, 4)), (2, (1, 1)), (2, (6, 7))])
def test_against_stock_layers(stride, size, training):
    x, params = tensor(3, 4, *size), layers(stride=stride, training=training)
    dw, dw_bn, pw, pw_bn = params
    stock = nn.Sequential(
        stock_conv(dw), stock_norm(dw_bn), nn.LeakyReLU(0.1), stock_conv(pw), stock_norm(pw_bn), nn.LeakyReLU(0.1)
    )
    expected = stock(x)
    torch.testing.assert_close(ffkernels.depthwise_separable(x, *params), expected, rtol=1e-12, atol=1e-12)
    same_statistics(dw_bn, stock[1])
    same_statistics(pw_bn, stock[4])


@pytest.mark.parametrize("training", [True, False])
def test_gradients(training):
    x, params = tensor(2, 3, 3, 3), layers(3, 4, 2, training)
    check_gradients(lambda: ffkernels.depthwise_separable(x, *params), x, params)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (1, 4, 1, 1), (2, 4, 5, 1)])
def test_shapes_and_formats(shape, form):
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=form)
    y = ffkernels.depthwise_separable(x, *layers(training=False))
    assert y.shape == (shape[0], 6, *shape[2:])
    assert y.numel() == 0 or y.is_contiguous(memory_format=form)


@pytest.mark.parametrize(
    "position,value,message",
    [
        (0, conv(4, 4, 3), "depthwise must keep the 4 channels apart, got groups=1"),
        (0, conv(8, 4, 3, groups=4), "depthwise must keep the 4 channels apart"),
        (2, conv(6, 4, 3), r"pointwise must be a 1x1 convolution of stride 1, got \(6, 4, 3, 3\)"),
        (2, conv(6, 5, 1), r"pointwise.weight \(6, 5, 1, 1\) with groups=1 does not fit 4"),
        (1, norm(5), r"depthwise_bn.weight must be \(4,\)"),
        (3, norm(5), r"pointwise_bn.weight must be \(6,\)"),
    ],
)
def test_errors(position, value, message):
    params = list(layers())
    params[position] = value
    with pytest.raises(ValueError, match=f"depthwise_separable: {message}"):
        ffkernels.depthwise_separable(tensor(1, 4, 3, 3), *params)


def test_block_replaces_a_sequential():
    block = DepthwiseSeparable(4, 6, stride=2)
    stock = nn.Sequential(
        nn.Conv2d(4, 4, 3, 2, 1, groups=4, bias=False),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.1),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.1),
    )
    block.load_state_dict(stock.state_dict())
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(block(x), stock(x))
    block.eval(), stock.eval()
    torch.testing.assert_close(block(x), stock(x))
    assert list(block.state_dict()) == list(stock.state_dict())
