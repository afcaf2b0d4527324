import math

import pytest
import torch
from backends import FORMATS
from layers import check_gradients, conv, norm, same_statistics, stock_conv, stock_norm, tensor
from torch import nn
from torch.nn import functional as F

import ffkernels
from ffkernels.nn import DeformConv, DeformConvBNAct


def sampling(x, c, spread=1.5):
    """Random offsets and masks for x."""
    k, size = c.weight.shape[2], [(n + 2 * c.padding - c.weight.shape[2]) // c.stride + 1 for n in x.shape[2:]]
    offset = (torch.randn(len(x), 2 * k * k, *size, dtype=torch.float64) * spread).requires_grad_()
    return offset, torch.rand(len(x), k * k, *size, dtype=torch.float64, requires_grad=True)


def pixel(x, b, i, j):
    inside = 0 <= i < x.shape[2] and 0 <= j < x.shape[3]
    return x[b, :, i, j] if inside else torch.zeros(x.shape[1], dtype=x.dtype)


def by_definition(x, offset, mask, c):
    """y(p) = sum over taps of w_k x(p + p_k + dp_k) dm_k, pixel by pixel."""
    k, (batch, _, out_h, out_w) = c.weight.shape[2], offset.shape
    y = torch.zeros(batch, len(c.weight), out_h, out_w, dtype=x.dtype)
    for b in range(batch):
        for i in range(out_h):
            for j in range(out_w):
                for tap in range(k * k):
                    row = i * c.stride - c.padding + tap // k + offset[b, 2 * tap, i, j].item()
                    column = j * c.stride - c.padding + tap % k + offset[b, 2 * tap + 1, i, j].item()
                    top, left = math.floor(row), math.floor(column)
                    value = torch.zeros(x.shape[1], dtype=x.dtype)
                    for di, wi in ((0, 1 - (row - top)), (1, row - top)):
                        for dj, wj in ((0, 1 - (column - left)), (1, column - left)):
                            value = value + wi * wj * pixel(x, b, top + di, left + dj)
                    y[b, :, i, j] += c.weight[:, :, tap // k, tap % k] @ value * mask[b, tap, i, j]
    return y if c.bias is None else y + c.bias[:, None, None]


@pytest.mark.parametrize("k,stride,bias", [(3, 1, False), (3, 2, True), (1, 1, True), (5, 1, False)])
@pytest.mark.parametrize("size", [(4, 5), (1, 1)])
def test_by_definition(size, k, stride, bias):
    x, c = tensor(2, 3, *size), conv(4, 3, k, bias=bias, stride=stride)
    offset, mask = sampling(x, c)
    y = ffkernels.deform_conv2d(x, offset, mask, c, None)
    torch.testing.assert_close(y, by_definition(x, offset, mask, c), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_without_offsets_it_is_a_convolution(form):
    x, c = tensor(2, 3, 6, 5).contiguous(memory_format=form), conv(4, 3, 3, bias=True)
    offset, mask = (torch.zeros_like(t) for t in sampling(x, c))
    y = ffkernels.deform_conv2d(x, offset, mask + 1, c, None)
    torch.testing.assert_close(y, F.conv2d(x, c.weight, c.bias, padding=1))
    assert y.is_contiguous(memory_format=form)


def test_whole_offsets_shift_the_image():
    x, c = tensor(1, 2, 6, 7), conv(3, 2, 3)
    offset, mask = (torch.zeros_like(t) for t in sampling(x, c))
    offset[:, 0::2], offset[:, 1::2] = 1, -2
    expected = F.conv2d(F.pad(x, (4, 4, 4, 4)), c.weight)[:, :, 4 : 4 + 6, 1 : 1 + 7]
    torch.testing.assert_close(ffkernels.deform_conv2d(x, offset, mask + 1, c, None), expected)


@pytest.mark.parametrize("far", [50.0, -50.0, 1e6, 1e30, -1e30])
def test_far_outside_is_zero(far):
    x, c = tensor(1, 2, 4, 4), conv(3, 2, 3)
    offset, mask = sampling(x, c)
    y = ffkernels.deform_conv2d(x, torch.full_like(offset, far), mask, c, None)
    assert torch.equal(y, torch.zeros_like(y))


def test_half_a_pixel_outside_counts_half():
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    c = conv(1, 1, 1)._replace(weight=torch.ones(1, 1, 1, 1, dtype=torch.float64))
    offset, mask = torch.zeros(1, 2, 2, 2, dtype=torch.float64), torch.ones(1, 1, 2, 2, dtype=torch.float64)
    offset[:, 0, 0] = -0.5
    offset[:, 0, 1] = 0.25
    y = ffkernels.deform_conv2d(x, offset, mask, c, None)
    torch.testing.assert_close(y, torch.tensor([[[[0.5, 0.5], [0.75, 0.75]]]], dtype=torch.float64))


def test_nan_passes_and_stays_where_it_is_read():
    x, c = tensor(1, 2, 5, 5), conv(3, 2, 3)
    offset, mask = (torch.zeros_like(t) for t in sampling(x, c))
    bad = offset.clone()
    bad[0, 0, 2, 2] = float("nan")
    y = ffkernels.deform_conv2d(x, bad, mask + 1, c, None)
    assert y[0, :, 2, 2].isnan().all() and y.isnan().sum() == 3
    image = x.detach().clone()
    image[0, 0, 0, 0] = float("inf")
    # Samples outside read nothing of the image, not even infinity times zero.
    y = ffkernels.deform_conv2d(image, torch.full_like(offset, -9.0), mask + 1, c, None)
    assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu", "silu"])
def test_normalisation_and_activation(activation, training):
    x, c, bn = tensor(2, 3, 4, 4), conv(4, 3, 3), norm(4, training)
    offset, mask = sampling(x, c)
    stock = stock_norm(bn)
    act = {"none": nn.Identity(), "relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU(0.3), "silu": nn.SiLU()}[activation]
    expected = act(stock(ffkernels.deform_conv2d(x, offset, mask, c, None)))
    torch.testing.assert_close(ffkernels.deform_conv2d(x, offset, mask, c, bn, activation, 0.3), expected)
    same_statistics(bn, stock)


@pytest.mark.parametrize("training", [True, False])
def test_gradients(training):
    x, c, bn = tensor(2, 2, 3, 3), conv(2, 2, 3, bias=True), norm(2, training)
    offset, mask = sampling(x, c)
    check_gradients(lambda: ffkernels.deform_conv2d(x, offset, mask, c, bn, "silu"), x, offset, mask, c, bn)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (1, 2, 1, 1), (2, 2, 5, 1)])
def test_shapes_and_formats(shape, form):
    x, c = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=form), conv(4, 2, 3)
    y = ffkernels.deform_conv2d(x, *sampling(x, c), c, norm(4, False))
    assert y.shape == (shape[0], 4, *shape[2:])
    assert y.numel() == 0 or y.is_contiguous(memory_format=form)


def test_half_precision_keeps_positions():
    x, c = torch.zeros(1, 1, 3, 400), conv(1, 1, 1)
    x[..., 301] = 1
    offset, mask = torch.zeros(1, 2, 3, 400), torch.ones(1, 1, 3, 400)
    offset[:, 1] = 0.25
    c = c._replace(weight=torch.ones(1, 1, 1, 1, dtype=torch.bfloat16))
    y = ffkernels.deform_conv2d(x.bfloat16(), offset.bfloat16(), mask.bfloat16(), c, None)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y[0, 0, 0, 299:303].float(), torch.tensor([0, 0.25, 0.75, 0]))


def test_errors():
    x, c = tensor(2, 3, 4, 4), conv(4, 3, 3)
    offset, mask = sampling(x, c)
    with pytest.raises(ValueError, match=r"offset must be \(2, 18, 4, 4\) for x \(2, 3, 4, 4\), got \(2, 18, 4, 3\)"):
        ffkernels.deform_conv2d(x, offset[..., :3], mask, c, None)
    with pytest.raises(ValueError, match=r"mask must be \(2, 9, 4, 4\)"):
        ffkernels.deform_conv2d(x, offset, mask[:, :8], c, None)
    with pytest.raises(ValueError, match="conv must have one group, got 3"):
        ffkernels.deform_conv2d(x, offset, mask, conv(3, 3, 3, 3), None)
    with pytest.raises(ValueError, match="unknown activation"):
        ffkernels.deform_conv2d(x, offset, mask, c, None, "gelu")


class TestModules:
    def test_starts_as_the_plain_convolution(self):
        block = DeformConvBNAct(4, 6, activation="relu")
        stock = nn.Sequential(block[0].regular_conv, nn.BatchNorm2d(6), nn.ReLU())
        x = torch.randn(2, 4, 5, 5)
        torch.testing.assert_close(block(x), stock(x))
        assert not any(p.any() for layer in (block[0].offset_conv, block[0].modulator_conv) for p in layer.parameters())

    def test_mask_is_twice_a_sigmoid_and_offsets_are_read_by_tap(self):
        layer = DeformConv(3, 4).double()
        nn.init.normal_(layer.offset_conv.weight)
        nn.init.normal_(layer.modulator_conv.weight)
        x = tensor(1, 3, 4, 4)
        offset, mask = layer.offset_conv(x), 2 / (1 + torch.exp(-layer.modulator_conv(x)))
        expected = by_definition(x, offset, mask, ffkernels.ConvParams.of(layer.regular_conv))
        torch.testing.assert_close(layer(x), expected)

    def test_stride(self):
        assert DeformConv(3, 4, stride=2)(torch.randn(1, 3, 7, 6)).shape == (1, 4, 4, 3)

    def test_stock_layer_of_parameters(self):
        c = conv(4, 3, 3, bias=True)
        assert torch.equal(ffkernels.ConvParams.of(stock_conv(c)).weight, c.weight)
        for layer in (
            nn.Conv2d(3, 4, 3, dilation=2),
            nn.Conv2d(3, 4, 3, padding="same"),
            nn.Conv2d(3, 4, 3, padding_mode="reflect"),
        ):
            with pytest.raises(ValueError, match="needs dilation 1 and numeric zero padding"):
                ffkernels.ConvParams.of(layer)
        with pytest.raises(ValueError, match="the same both ways"):
            ffkernels.ConvParams.of(nn.Conv2d(3, 4, 3, stride=(1, 2)))
