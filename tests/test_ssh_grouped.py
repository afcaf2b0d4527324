import pytest
import torch
from backends import FORMATS
from layers import check_gradients, conv, norm, same_statistics, stock_conv, stock_norm, tensor
from torch import nn

import ffkernels
from featherface.models import SSH_Grouped


def layers(channels=8, first=8, other=4, groups=4, training=True):
    convs = [conv(first, channels, 3, groups), conv(other, channels, 3, groups)]
    convs += [conv(other, other, 3, groups) for _ in range(3)]
    return convs, [norm(len(c.weight), training) for c in convs]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shuffle_groups", [1, 2, 4])
@pytest.mark.parametrize("size", [(5, 4), (1, 1), (2, 9)])
def test_against_stock_layers(size, shuffle_groups, training):
    x, (convs, bns) = tensor(3, 8, *size), layers(training=training)
    c3, c51, c52, c72, c73 = stock = [nn.Sequential(stock_conv(c), stock_norm(b)) for c, b in zip(convs, bns)]
    a = c51(x).clamp(min=0)
    expected = torch.cat([c3(x), c52(a), c73(c72(a).clamp(min=0))], 1).clamp(min=0)
    expected = nn.ChannelShuffle(shuffle_groups)(expected)
    y = ffkernels.ssh_grouped(x, convs, bns, shuffle_groups)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for bn, layer in zip(bns, stock):
        same_statistics(bn, layer[1])


@pytest.mark.parametrize("training", [True, False])
def test_gradients(training):
    x, (convs, bns) = tensor(2, 4, 2, 3), layers(4, 4, 2, 2, training)
    check_gradients(lambda: ffkernels.ssh_grouped(x, convs, bns, 2), x, convs, bns)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (1, 8, 1, 1), (2, 8, 5, 1)])
def test_shapes_and_formats(shape, form):
    convs, bns = layers(training=False)
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=form)
    y = ffkernels.ssh_grouped(x, convs, bns, 4)
    assert y.shape == (shape[0], 16, *shape[2:])
    assert y.numel() == 0 or y.is_contiguous(memory_format=form)


def test_errors():
    x, (convs, bns) = tensor(1, 8, 3, 3), layers()
    with pytest.raises(ValueError, match=r"ssh_grouped: needs five convolutions and five batch norm.* got 4 and 5"):
        ffkernels.ssh_grouped(x, convs[:4], bns)
    with pytest.raises(ValueError, match="shuffle_groups=3 does not divide the 16 output channels"):
        ffkernels.ssh_grouped(x, convs, bns, 3)
    with pytest.raises(ValueError, match=r"conv5X5_2.weight .* does not fit 4 input channels"):
        ffkernels.ssh_grouped(x, [*convs[:2], conv(4, 8, 3, 4), *convs[3:]], bns)
    with pytest.raises(ValueError, match=r"conv3X3 must be 3x3 with stride 1 and padding 1"):
        ffkernels.ssh_grouped(x, [conv(8, 8, 1, 4), *convs[1:]], bns)
    with pytest.raises(ValueError, match=r"batch normalisation of conv7x7_3.weight must be"):
        ffkernels.ssh_grouped(x, convs, [*bns[:4], norm(5)])


class TestModule:
    def test_parameters_are_those_of_the_seed(self):
        block = SSH_Grouped(32, 32, groups=4, reduction=2)
        assert sum(p.numel() for p in block.parameters()) == 2256
        shapes = {name: tuple(p.shape) for name, p in block.named_parameters() if p.dim() == 4}
        assert shapes == {
            "conv3X3.0.weight": (16, 8, 3, 3),
            "conv5X5_1.0.weight": (8, 8, 3, 3),
            "conv5X5_2.0.weight": (8, 2, 3, 3),
            "conv7X7_2.0.weight": (8, 2, 3, 3),
            "conv7x7_3.0.weight": (8, 2, 3, 3),
        }

    @pytest.mark.parametrize("training", [True, False])
    def test_forward(self, training):
        block = SSH_Grouped(16, 32, groups=2, reduction=4).train(training)
        stock = {name: nn.Sequential(*child) for name, child in block.named_children()}
        x = torch.randn(2, 16, 5, 6)
        y = block(x)
        a = stock["conv5X5_1"](x)
        branches = stock["conv3X3"](x), stock["conv5X5_2"](a), stock["conv7x7_3"](stock["conv7X7_2"](a))
        assert [b.shape[1] for b in branches] == [8, 12, 12]
        torch.testing.assert_close(y, torch.cat(branches, 1).relu())

    def test_shuffled_store(self):
        block = SSH_Grouped(32, 32).eval()
        x = torch.randn(2, 32, 3, 3)
        assert torch.equal(block(x, shuffle_groups=4), nn.ChannelShuffle(4)(block(x)))

    @pytest.mark.parametrize(
        "arguments,message",
        [
            ({"in_channel": 30, "out_channel": 32}, "groups=4 must divide .* 30, 16 and 8"),
            ({"in_channel": 32, "out_channel": 24}, "groups=4 must divide .* 32, 12 and 6"),
            ({"in_channel": 32, "out_channel": 33}, "33 channels cannot be divided"),
        ],
    )
    def test_errors(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            SSH_Grouped(**arguments)
