"""The CPU's SSH block and detection heads against their references."""

import pytest
import torch
from backends import FORMATS
from helpers import compare_kernel
from layers import check_gradients, conv, leaves, norm, tensor

import ffkernels
from ffkernels import HeadParams, Policy, cpu, registry
from ffkernels.reference.multi_head import multi_head as multi_head_reference
from ffkernels.reference.ssh_grouped import ssh_grouped as ssh_reference

CPU = Policy("require", "cpu")
pytestmark = pytest.mark.skipif(
    (_reason := registry.backend_unavailable("cpu")) is not None, reason=f"backend cpu: {_reason}"
)
ISAS = [] if _reason else cpu.instruction_sets()


@pytest.fixture(params=ISAS)
def isa(request):
    before = cpu.loaded_isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


def ssh_params(channels=8, out=8, groups=4, training=True, bias=False):
    first, other = out // 2, out // 4
    shapes = [(first, channels), (other, channels), (other, other), (other, other), (other, other)]
    groups = [groups if o % groups == 0 and i % groups == 0 else 1 for o, i in shapes]
    convs = [conv(o, i, 3, g, bias) for (o, i), g in zip(shapes, groups)]
    return convs, [norm(o, training) for o, _ in shapes]


def copied(bns):
    return [bn._replace(running_mean=bn.running_mean.clone(), running_var=bn.running_var.clone()) for bn in bns]


def ssh(x, convs, bns, groups=1):
    return ffkernels.ssh_grouped(x, convs, bns, groups, policy=CPU)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "channels,out,groups,shuffle,size,bias",
    [
        (32, 32, 4, 4, (7, 6), False),
        (12, 16, 4, 2, (5, 9), True),
        (6, 12, 1, 1, (1, 7), False),
        (8, 8, 2, 8, (7, 1), True),
        (20, 40, 5, 4, (1, 1), False),
    ],
)
def test_ssh_float64(channels, out, groups, shuffle, size, bias, form, training):
    torch.manual_seed(0)
    x = tensor(3, channels, *size).detach().contiguous(memory_format=form).requires_grad_()
    convs, bns = ssh_params(channels, out, groups, training, bias)
    mine = copied(bns)
    y, expected = ssh(x, convs, mine, shuffle), ssh_reference(x, convs, bns, shuffle)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)
    assert y.is_contiguous(memory_format=form)
    grad = torch.randn(()).double().expand(y.shape) + 0 * y.detach()
    grad_before = grad.clone()
    wanted = list(leaves(x, convs, bns))
    for g, e in zip(*(torch.autograd.grad(out, wanted, grad) for out in (y, expected))):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)
    assert torch.equal(grad, grad_before)
    for a, b in zip(mine, bns):
        torch.testing.assert_close(a.running_mean, b.running_mean, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(a.running_var, b.running_var, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(ssh(x, convs, copied(bns) if not training else mine, shuffle), expected)


@pytest.mark.parametrize("training", [True, False])
def test_ssh_float32(training, isa):
    torch.manual_seed(1)
    convs, bns = ssh_params(32, 32, 4, training)
    compare_kernel(
        lambda x, c, b: ssh(x, c, b, 4), lambda x, c, b: ssh_reference(x, c, b, 4), (tensor(2, 32, 9, 8), convs, bns)
    )


def test_ssh_gradcheck():
    torch.manual_seed(2)
    x, (convs, bns) = tensor(2, 4, 3, 2), ssh_params(4, 8, 2)
    check_gradients(lambda: ssh(x, convs, bns, 4), x, convs, bns)


def test_ssh_gradients_only_where_required():
    torch.manual_seed(3)
    x, (convs, bns) = tensor(2, 8, 4, 5), ssh_params()
    everything = list(leaves(x, convs, bns))
    for chosen in range(len(everything)):
        for i, leaf in enumerate(everything):
            leaf.requires_grad_(i == chosen)
        results = [
            torch.autograd.grad(run(x, convs, bns, 2).square().sum(), [everything[chosen]])[0]
            for run in (ssh, ssh_reference)
        ]
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_ssh_empty_batch_and_mixed_normalisation():
    convs, bns = ssh_params()
    assert ssh(torch.zeros(0, 8, 4, 5, dtype=torch.float64), convs, bns).shape == (0, 8, 4, 5)
    bns[2] = bns[2]._replace(eps=1e-3)
    with pytest.raises(ffkernels.FusedKernelRequired, match="differ in mode, eps"):
        ssh(torch.zeros(1, 8, 4, 5, dtype=torch.float64), convs, bns)


def head(channels, hidden=None, anchors=2, training=True, bias=True):
    width = hidden or channels
    predictors = [conv(anchors * k, width, 1, bias=bias) for k in (2, 4, 10)]
    trunk = conv(hidden, channels, 3) if hidden else None
    return HeadParams(trunk, norm(hidden, training) if hidden else None, *predictors)


def heads_kernel(features, heads, softmax):
    return ffkernels.multi_head(features, heads, softmax, policy=CPU)


SIZES = ((5, 7), (3, 4), (1, 2))


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "channels,hidden,anchors,training,bias",
    [(32, 16, 2, True, True), (8, 4, 2, False, True), (74, None, 2, True, True), (5, None, 1, True, False)],
)
def test_heads_float64(channels, hidden, anchors, training, bias, form, softmax):
    torch.manual_seed(4)
    features = [tensor(3, channels, *size).detach().contiguous(memory_format=form).requires_grad_() for size in SIZES]
    heads = [head(channels, hidden, anchors, training, bias) for _ in SIZES]
    outputs = heads_kernel(features, heads, softmax), multi_head_reference(features, heads, softmax)
    grads = [torch.randn_like(y) for y in outputs[0]]
    wanted = list(leaves(features, heads))
    for mine, theirs in zip(*outputs):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)
    for g, e in zip(*(torch.autograd.grad(out, wanted, grads) for out in outputs)):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        for mine, theirs in zip(heads_kernel(features, heads, softmax), outputs[1]):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_heads_float32(isa):
    torch.manual_seed(5)
    arguments = [tensor(2, 32, *size) for size in SIZES], [head(32, 16) for _ in SIZES]
    compare_kernel(lambda f, h: heads_kernel(f, h, True), lambda f, h: multi_head_reference(f, h, True), arguments)


@pytest.mark.parametrize("used", [0, 1, 2])
def test_heads_with_one_output_used(used):
    """Gradients of unused outputs do not exist; a shared predictor gets the sum over its levels."""
    torch.manual_seed(6)
    features, shared = [tensor(2, 8, 3, 4), tensor(2, 8, 2, 2)], head(8)
    heads = [shared, shared]
    results = []
    for run in (heads_kernel, multi_head_reference):
        y = run(features, heads, True)[used]
        wanted = [*features, (shared.bbox, shared.cls, shared.landmarks)[used].weight]
        results.append(torch.autograd.grad(y.square().sum(), wanted))
    for g, e in zip(*results):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-10)


def test_heads_gradcheck():
    torch.manual_seed(7)
    features, heads = [tensor(2, 3, 2, 2), tensor(2, 3, 1, 1)], [head(3, 2), head(3, 2)]
    check_gradients(lambda: heads_kernel(features, heads, True), features, heads)


def test_heads_empty_batch_and_nan():
    heads = [head(8), head(8)]
    features = [torch.zeros(0, 8, 3, 4, dtype=torch.float64), torch.zeros(0, 8, 2, 2, dtype=torch.float64)]
    assert [y.shape for y in heads_kernel(features, heads, True)] == [(0, 32, 4), (0, 32, 2), (0, 32, 10)]
    features = [torch.full((1, 8, 1, 1), float("nan"), dtype=torch.float64)] * 2
    assert all(y.isnan().all() for y in heads_kernel(features, heads, True))


def test_double_backward_is_an_error():
    x, (convs, bns) = tensor(2, 8, 4, 5), ssh_params()
    features, heads = [tensor(2, 8, 3, 4)], [head(8)]
    for y, leaf in ((ssh(x, convs, bns), x), (heads_kernel(features, heads, False)[0], features[0])):
        (grad,) = torch.autograd.grad(y.square().sum(), [leaf], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.sum().backward()


def test_opcheck():
    ops = torch.ops.ffkernels
    convs, bns = ssh_params(8, 8, 2)
    params = [
        t if t is None else t.detach()
        for c, b in zip(convs, bns)
        for t in (c.weight, c.bias, b.weight, b.bias, None, None)
    ]
    integers, floats = [1, 1, 2, 1, 1] * 5 + [4], [0.0, 1e-5] * 5
    for form in FORMATS.values():
        x = torch.randn(2, 8, 4, 5, dtype=torch.float64).contiguous(memory_format=form)
        for save in (True, False):
            torch.library.opcheck(ops._ssh_grouped.default, (x, params, integers, floats, save, "cpu"))
        y, *saved = ops._ssh_grouped.default(x, params, integers, floats, True, "cpu")
        needs = [True, True, False, True, True] + [True, False, True, False] * 4
        arguments = torch.randn_like(y), x, params, saved, integers, floats, needs, "cpu"
        torch.library.opcheck(ops._ssh_grouped_backward.default, arguments)
    maps = [torch.randn(2, 32, 3, 4), torch.randn(2, 32, 2, 2)]
    torch.library.opcheck(ops._multi_head_rows.default, (maps, True, "cpu"))
    bbox, cls, landmarks = ops._multi_head_rows.default(maps, True, "cpu")
    shapes = [n for z in maps for n in z.shape]
    for grads in ([bbox, cls, landmarks], [None, cls, None]):
        torch.library.opcheck(ops._multi_head_rows_backward.default, (grads, cls, shapes, "cpu"))


def test_compile():
    torch.manual_seed(8)
    x, (convs, bns) = tensor(2, 8, 4, 5), ssh_params()
    heads = [head(8, 4)]

    def run():
        return ffkernels.multi_head([ffkernels.ssh_grouped(x, convs, bns, 4, policy=CPU)], heads, True, policy=CPU)

    expected = run()
    actual = torch.compile(run, fullgraph=True, backend="aot_eager")()
    wanted = list(leaves(x, convs, bns, heads))
    weights = [torch.randn_like(y) for y in expected]
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b)
    for a, b in zip(*(torch.autograd.grad(y, wanted, weights) for y in (actual, expected))):
        torch.testing.assert_close(a, b)
