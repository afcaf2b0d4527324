import pytest
import torch
from backends import FORMATS
from layers import check_gradients, conv, norm, same_statistics, stock_conv, stock_norm, tensor
from torch import nn

import ffkernels
from featherface.models import BiFPN, BiFPN_Light


def nearest(x, size):
    """Up-sampling, pixel by pixel."""
    rows = [i * x.shape[2] // size[0] for i in range(size[0])]
    columns = [j * x.shape[3] // size[1] for j in range(size[1])]
    return torch.stack([torch.stack([x[:, :, i, j] for j in columns], -1) for i in rows], -2)


def maximum(x, pool):
    """3x3 maximum of stride 2, window by window; outside lie zeros for "max_same", nothing for "max"."""
    height, width = x.shape[2:]
    # TensorFlow's SAME puts the odd pixel of padding behind: an even size starts at 0, an odd one at -1.
    start = [-(n % 2) if pool == "max_same" else -1 for n in (height, width)]
    result = []
    for i in range((height + 1) // 2):
        row = []
        for j in range((width + 1) // 2):
            values = []
            for r in range(2 * i + start[0], 2 * i + start[0] + 3):
                for c in range(2 * j + start[1], 2 * j + start[1] + 3):
                    if 0 <= r < height and 0 <= c < width:
                        values.append(x[:, :, r, c])
                    elif pool == "max_same":
                        values.append(torch.zeros_like(x[:, :, 0, 0]))
            row.append(torch.stack(values).amax(0))
        result.append(torch.stack(row, -1))
    return torch.stack(result, -2)


def layers(channels=4, groups=2, bias=False, training=True, weights=3):
    fusion = torch.rand(weights, dtype=torch.float64).add_(0.2).requires_grad_()
    return (
        fusion,
        conv(channels, channels, 3, channels),
        conv(channels, channels, 1, groups, bias),
        norm(channels, training),
    )


CASES = {
    "top-down": (["none", "up"], [(5, 4), (3, 2)]),
    "bottom-up": (["none", "none", "down"], [(3, 2), (3, 2), (5, 4)]),
    "last": (["none", "down", "down"], [(2, 3), (4, 5), (3, 6)]),
    "of order": (["down", "none"], [(1, 2), (1, 1)]),
    "up from one pixel": (["none", "up"], [(2, 2), (1, 1)]),
    "up by other factors": (["none", "up"], [(7, 5), (3, 5)]),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", ["max", "max_same"])
@pytest.mark.parametrize("case", CASES)
def test_by_definition(case, pool, training):
    resample, sizes = CASES[case]
    inputs = [tensor(2, 4, *size) - 0.5 for size in sizes]
    fusion, dw, pw, bn = layers(training=training)
    stock = stock_norm(bn)
    size = sizes[resample.index("none")]
    resize = {"none": lambda x: x, "up": lambda x: nearest(x, size), "down": lambda x: maximum(x, pool)}
    weight = fusion / (fusion.sum() + 1e-4)
    total = sum(weight[i] * resize[how](x) for i, (x, how) in enumerate(zip(inputs, resample)))
    y = nn.ChannelShuffle(2)(stock_conv(pw)(stock_conv(dw)(total * total.sigmoid())))
    result = ffkernels.bifpn_node(inputs, resample, fusion, dw, pw, bn, 2, pool)
    torch.testing.assert_close(result, stock(y), rtol=1e-11, atol=1e-11)
    same_statistics(bn, stock)


def test_all_weights_normalise_and_negative_ones_count_as_zero():
    inputs = [tensor(1, 4, 2, 2), tensor(1, 4, 2, 2)]
    _, dw, pw, bn = layers(training=False)

    def run(*weights, epsilon=1e-4):
        weights = torch.tensor(weights, dtype=torch.float64)
        return ffkernels.bifpn_node(inputs, ["none", "none"], weights, dw, pw, bn, epsilon=epsilon)

    torch.testing.assert_close(run(1.0, 2.0, 5.0, epsilon=0.0), run(1.0, 2.0, epsilon=5.0))
    torch.testing.assert_close(run(1.0, 2.0, -5.0), run(1.0, 2.0))
    assert not torch.allclose(run(1.0, 2.0, 5.0), run(1.0, 2.0))


def test_dense_node():
    inputs, resample = [tensor(2, 3, 4, 4), tensor(2, 3, 2, 2)], ["none", "up"]
    fusion, dense, bn = tensor(2).abs(), conv(5, 3, 3), norm(5)
    stock = stock_norm(bn)
    weight = fusion / (fusion.sum() + 1e-4)
    total = weight[0] * inputs[0] + weight[1] * inputs[1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = stock(stock_conv(dense)(nn.SiLU()(total)))
    torch.testing.assert_close(ffkernels.bifpn_node(inputs, resample, fusion, dense, None, bn), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pool", ["max", "max_same"])
@pytest.mark.parametrize(
    "resample,sizes", [(["none", "up"], [(3, 2), (2, 1)]), (["none", "none", "down"], [(2, 1), (2, 1), (3, 2)])]
)
def test_gradients(resample, sizes, pool, training):
    inputs, params = [tensor(2, 2, *size) for size in sizes], layers(2, 2, True, training)
    check_gradients(lambda: ffkernels.bifpn_node(inputs, resample, *params, 2, pool), inputs, params)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_shapes_and_formats(batch, form):
    inputs = [torch.randn(batch, 4, *size).double().contiguous(memory_format=form) for size in ((3, 2), (3, 2), (5, 4))]
    y = ffkernels.bifpn_node(inputs, ["none", "none", "down"], *layers(training=False), 2)
    assert y.shape == (batch, 4, 3, 2)
    assert y.numel() == 0 or y.is_contiguous(memory_format=form)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"inputs": [tensor(1, 4, 3, 3)], "resample": ["none"]}, "two or three inputs .* got 1 and 1"),
        ({"resample": ["none"]}, "got 2 and 1"),
        ({"resample": ["up", "up"]}, r"'none' at least once, got \['up', 'up'\]"),
        ({"resample": ["none", "half"]}, "resample must be"),
        (
            {"resample": ["none", "down"]},
            r"inputs\[1\] \(1, 4, 2, 2\) with resample 'down' does not fit \(1, 4, 3, 3\)",
        ),
        ({"inputs": [tensor(1, 4, 3, 3), tensor(1, 5, 2, 2)]}, r"inputs\[1\] \(1, 5, 2, 2\)"),
        ({"fusion_weight": tensor(1)}, r"fusion_weight \(1,\) must hold a weight for each of 2 inputs"),
        ({"pool": "mean"}, "unknown pool 'mean'"),
        ({"shuffle_groups": 3}, "shuffle_groups=3 does not divide the 4 output channels"),
        ({"depthwise": conv(4, 4, 1, 4)}, "depthwise must be 3x3"),
        ({"pointwise": conv(4, 4, 3)}, "pointwise must be a 1x1"),
        ({"bn": norm(5)}, r"bn.weight must be \(4,\)"),
    ],
)
def test_errors(change, message):
    fusion, dw, pw, bn = layers()
    arguments = {
        "inputs": [tensor(1, 4, 3, 3), tensor(1, 4, 2, 2)],
        "resample": ["none", "up"],
        "fusion_weight": fusion,
        "depthwise": dw,
        "pointwise": pw,
        "bn": bn,
    }
    with pytest.raises(ValueError, match=f"bifpn_node: .*{message}"):
        ffkernels.bifpn_node(**{**arguments, **change})


def stock_s(node, x):
    """The convolutions of a node, from its stock layers."""
    y = node.depthwise(nn.SiLU()(x))
    if node.pointwise is not None:
        y = nn.ChannelShuffle(node.shuffle_groups)(node.pointwise(y))
    return node.bn(y)


def shared(w):
    w = w.clamp(min=0)
    return w / (w.sum() + 1e-4)


class TestModules:
    def test_parameters_of_a_light_repeat(self):
        count = {first: sum(p.numel() for p in BiFPN_Light(first_time=first).parameters()) for first in (True, False)}
        assert count == {True: 14_624 + 4 * 608 + 10, False: 4 * 608 + 10}

    @pytest.mark.parametrize("separable", [True, False])
    @pytest.mark.parametrize("first", [True, False])
    def test_light(self, first, separable):
        module = BiFPN_Light(8, [4, 6, 10], first, separable, reduction_factor=2).eval()
        with torch.no_grad():
            for name, p in module.named_parameters():
                if name.endswith("fusion_weight"):
                    p.uniform_(-0.3, 1)
        channels = (4, 6, 10) if first else (8, 8, 8)
        x = [torch.randn(2, c, *size) for c, size in zip(channels, ((9, 6), (5, 3), (3, 2)))]
        p3, p4, p5 = [nn.Sequential(*lateral)(v) for lateral, v in zip(module.laterals, x)] if first else x
        m = module
        w = shared(m.p4_up.fusion_weight)
        p4u = stock_s(m.p4_up, w[0] * p4 + w[1] * nearest(p5, p4.shape[2:]))
        w = shared(m.p3_out.fusion_weight)
        p3o = stock_s(m.p3_out, w[0] * p3 + w[1] * nearest(p4u, p3.shape[2:]))
        w = shared(m.p4_out.fusion_weight)
        p4o = stock_s(m.p4_out, w[0] * p4 + w[1] * p4u + w[2] * maximum(p3o, "max"))
        w = shared(m.p5_out.fusion_weight)
        p5o = stock_s(m.p5_out, w[0] * p5 + w[1] * maximum(p4u, "max") + w[2] * maximum(p4o, "max"))
        for mine, expected in zip(module(x), (p3o, p4o, p5o)):
            torch.testing.assert_close(mine, expected)

    @pytest.mark.parametrize("first", [True, False])
    def test_v1(self, first):
        module = BiFPN(8, [4, 6, 10], first).eval()
        with torch.no_grad():
            for name, p in module.named_parameters():
                if name.endswith("fusion_weight"):
                    p.uniform_(0.1, 1)
        channels = (4, 6, 10) if first else (8, 8, 8)
        x = [torch.randn(2, c, *size) for c, size in zip(channels, ((9, 6), (5, 3), (3, 2)))]
        p3, p4, p5, p4b, p5b = *x, *x[1:]
        if first:
            laterals = [nn.Sequential(*layer) for layer in (*module.laterals, *module.bottom_up_laterals)]
            p3, p4, p5, p4b, p5b = (layer(v) for layer, v in zip(laterals, (*x, *x[1:])))
        m = module
        w = shared(m.p4_up.fusion_weight)
        p4u = stock_s(m.p4_up, w[0] * p4 + w[1] * nearest(p5, p4.shape[2:]))
        w = shared(m.p3_out.fusion_weight)
        p3o = stock_s(m.p3_out, w[0] * p3 + w[1] * nearest(p4u, p3.shape[2:]))
        w = shared(m.p4_out.fusion_weight)
        p4o = stock_s(m.p4_out, w[0] * p4b + w[1] * p4u + w[2] * maximum(p3o, "max_same"))
        w = shared(m.p5_out.fusion_weight)
        assert len(w) == 3
        p5o = stock_s(m.p5_out, w[0] * p5b + w[1] * maximum(p4o, "max_same"))
        for mine, expected in zip(module(x), (p3o, p4o, p5o)):
            torch.testing.assert_close(mine, expected)
        assert m.p4_up.bn.eps == 1e-3 and m.p4_up.bn.momentum == 0.01

    def test_repeats_in_a_sequential(self):
        module = nn.Sequential(*[BiFPN_Light(first_time=i == 0) for i in range(2)])
        y = module([torch.randn(2, c, n, n) for c, n in zip((64, 128, 256), (8, 4, 2))])
        assert [tuple(v.shape) for v in y] == [(2, 32, 8, 8), (2, 32, 4, 4), (2, 32, 2, 2)]

    def test_errors(self):
        with pytest.raises(ValueError, match="reduction_factor=3 does not divide 32 channels"):
            BiFPN_Light(reduction_factor=3)
