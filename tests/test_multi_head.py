import pytest
import torch
from backends import FORMATS
from functorch.compile import make_boxed_func
from layers import check_gradients, conv, norm, same_statistics, stock_conv, stock_norm, tensor
from torch._dynamo.backends.common import aot_autograd

import ffkernels
from featherface.models import SharedMultiHead
from ffkernels import HeadParams

SIZES = ((3, 4), (2, 2), (1, 1))


def head(channels=4, hidden=2, anchors=2, training=True):
    trunk, bn = (conv(hidden, channels, 3), norm(hidden, training)) if hidden else (None, None)
    inner = hidden or channels
    return HeadParams(trunk, bn, *(conv(anchors * k, inner, 1, bias=True) for k in (2, 4, 10)))


def features(batch=2, channels=4, sizes=SIZES):
    return [tensor(batch, channels, *size) for size in sizes]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("hidden", [2, 0])
@pytest.mark.parametrize("anchors", [1, 2])
def test_row_by_row(anchors, hidden, softmax, training):
    x, heads = features(), [head(4, hidden, anchors, training) for _ in SIZES]
    expected = {4: [], 2: [], 10: []}
    for level, params in zip(x, heads):
        t = level
        if hidden:
            bn = stock_norm(params.trunk_bn)
            t = bn(stock_conv(params.trunk)(level)).clamp(min=0)
        for conv_params, k in ((params.bbox, 4), (params.cls, 2), (params.landmarks, 10)):
            raw = stock_conv(conv_params)(t)
            for row in range(level.shape[2]):
                for column in range(level.shape[3]):
                    for anchor in range(anchors):
                        values = raw[:, anchor * k : (anchor + 1) * k, row, column]
                        expected[k].append(values.softmax(1) if softmax and k == 2 else values)
    outputs = ffkernels.multi_head(x, heads, softmax)
    for y, k in zip(outputs, (4, 2, 10)):
        torch.testing.assert_close(y, torch.stack(expected[k], 1), rtol=1e-12, atol=1e-12)


def test_running_statistics():
    x, params = features(sizes=((3, 4),)), head()
    stock = stock_norm(params.trunk_bn)
    stock(stock_conv(params.trunk)(x[0]))
    ffkernels.multi_head(x, [params])
    same_statistics(params.trunk_bn, stock)


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_gradients(training, softmax):
    x, heads = features(2, 2, ((2, 2), (1, 1))), [head(2, 2, 1, training) for _ in range(2)]
    check_gradients(lambda: ffkernels.multi_head(x, heads, softmax), x, heads)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_shapes_and_formats(batch, form):
    x = [v.detach().contiguous(memory_format=form) for v in features(batch)]
    outputs = ffkernels.multi_head(x, [head(training=False) for _ in SIZES])
    assert [tuple(y.shape) for y in outputs] == [(batch, 34, k) for k in (4, 2, 10)]
    assert all(y.is_contiguous() for y in outputs)


def test_errors():
    x, heads = features(), [head() for _ in SIZES]
    with pytest.raises(ValueError, match="multi_head: needs as many heads as levels, at least one, got 2 and 3"):
        ffkernels.multi_head(x, heads[:2])
    with pytest.raises(ValueError, match=r"features\[1\] has a batch of 1, features\[0\] one of 2"):
        ffkernels.multi_head([x[0], x[1][:1], x[2]], heads)
    with pytest.raises(ValueError, match="got 0 and 0"):
        ffkernels.multi_head([], [])
    with pytest.raises(ValueError, match=r"heads\[1\].trunk.weight \(2, 5, 3, 3\) with groups=1 does not fit 4"):
        ffkernels.multi_head(x, [heads[0], head(5), heads[2]])
    with pytest.raises(ValueError, match=r"heads\[0\].cls has 6 channels, 2 anchors need 4"):
        ffkernels.multi_head(x, [heads[0]._replace(cls=conv(6, 2, 1)), *heads[1:]])
    with pytest.raises(ValueError, match=r"heads\[0\].bbox must be a 1x1 convolution"):
        ffkernels.multi_head(x, [heads[0]._replace(bbox=conv(8, 2, 3)), *heads[1:]])


class TestModule:
    def test_parameters_are_those_of_the_seed(self):
        module = SharedMultiHead(32, num_anchors=2)
        assert sum(p.numel() for p in module.parameters()) == 5184
        assert list(dict(module.named_parameters())) == [
            "shared_conv.0.weight",
            "shared_conv.1.weight",
            "shared_conv.1.bias",
            *(f"{name}_head.{kind}" for name in ("cls", "bbox", "landmark") for kind in ("weight", "bias")),
        ]

    def test_forward(self):
        module = SharedMultiHead(8, num_anchors=3).eval()
        x = torch.randn(2, 8, 3, 2)
        t = module.shared_conv(x)
        cls, bbox, landmarks = module(x)
        for y, layer, k in (
            (cls, module.cls_head, 2),
            (bbox, module.bbox_head, 4),
            (landmarks, module.landmark_head, 10),
        ):
            torch.testing.assert_close(y, layer(t).permute(0, 2, 3, 1).reshape(2, 18, k))


def test_compiled_training_takes_other_sizes_without_compiling_again():
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph))(module, inputs)

    torch._dynamo.reset()
    heads = [head() for _ in SIZES]
    run = torch.compile(lambda x: ffkernels.multi_head(x, heads, policy=ffkernels.Policy("1", "cpu")), backend=backend)
    for n in (8, 6, 5, 7, 9):
        x = features(sizes=((n, n + 1), (n - 1, n), (n - 2, n - 1)))
        outputs = run(x)
        sum(y.square().sum() for y in outputs).backward()
        torch.testing.assert_close(outputs[1], ffkernels.multi_head(x, heads)[1])
    torch._dynamo.reset()
    assert len(graphs) <= 2
