"""The CPU's convolution kernels against the references: grouped_conv_bn_act, depthwise_separable and chains of them."""

import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.utils.checkpoint
from backends import FORMATS
from helpers import compare_kernel
from layers import check_gradients, conv, leaves, norm, tensor

import featherface.models.backbone
import ffkernels
from ffkernels import BatchNorm, ConvUnit, Policy, cpu, registry
from ffkernels.reference.conv_chain import conv_chain as reference

CPU = Policy("require", "cpu")
pytestmark = pytest.mark.skipif(
    (_reason := registry.backend_unavailable("cpu")) is not None, reason=f"backend cpu: {_reason}"
)

BATCH_NORMS = ("train", "eval", "untracked", "plain", "none")


def make_norm(kind: str, channels: int) -> BatchNorm | None:
    bn = norm(channels, kind != "eval")
    if kind == "untracked":
        return bn._replace(running_mean=None, running_var=None)
    if kind == "plain":
        return bn._replace(weight=None, bias=None)
    return None if kind == "none" else bn


def make_units(channels: int, layers: list[tuple], kind: str = "train") -> list[ConvUnit]:
    """``layers``: (out_channels, kernel, groups, stride, bias, activation); groups 0 means depthwise."""
    units = []
    for out, k, groups, stride, bias, activation in layers:
        out = out or channels
        params = conv(out, channels, k, groups or channels, bias, stride)
        units.append(ConvUnit(params, make_norm(kind, out), activation, 0.2))
        channels = out
    return units


def kernel(x, units):
    return ffkernels.conv_chain(x, units, policy=CPU)


DW, PW = (0, 3, 0, 1, False, "leaky_relu"), (6, 1, 1, 1, False, "leaky_relu")
CASES = {
    # name: (channels, [(out, kernel, groups, stride, bias, activation)], (height, width))
    "dense 3x3": (3, [(8, 3, 1, 2, False, "leaky_relu")], (9, 7)),
    "dense 3x3 wide": (37, [(19, 3, 1, 1, True, "relu")], (5, 6)),
    "dense 7x7": (2, [(1, 7, 1, 1, False, "none")], (6, 9)),
    "dense 5x5 stride 2": (4, [(6, 5, 1, 2, True, "silu")], (7, 8)),
    "dense 1x1": (17, [(33, 1, 1, 1, True, "silu")], (7, 11)),
    "1x1 stride 2": (6, [(5, 1, 1, 2, False, "relu")], (5, 4)),
    "grouped 3x3": (16, [(8, 3, 4, 1, False, "relu")], (5, 7)),
    "grouped, many": (80, [(160, 3, 5, 1, True, "silu")], (3, 4)),
    "grouped 3x3, many rows and vectors": (12, [(20, 3, 2, 1, True, "leaky_relu")], (19, 51)),
    "grouped 1x1": (32, [(32, 1, 4, 1, True, "none")], (6, 5)),
    "grouped 1x1, whole vectors": (64, [(64, 1, 2, 1, False, "relu")], (4, 5)),
    "depthwise 8": (8, [DW], (7, 9)),
    "depthwise 5": (5, [(0, 3, 0, 1, True, "silu")], (7, 9)),
    "depthwise 16 stride 2": (16, [(0, 3, 0, 2, False, "relu")], (7, 10)),
    "depthwise 40": (40, [(0, 3, 0, 1, False, "none")], (4, 5)),
    "depthwise 7x7": (4, [(0, 7, 0, 1, False, "silu")], (5, 4)),
    "depthwise 5x5 stride 2": (3, [(0, 5, 0, 2, True, "relu")], (6, 7)),
    "depthwise 1x1": (8, [(0, 1, 0, 1, True, "leaky_relu")], (3, 5)),
    "stride 3": (4, [(5, 3, 1, 3, False, "relu")], (8, 7)),
    "one row": (8, [DW, PW], (1, 13)),
    "one column": (8, [DW, PW], (13, 1)),
    "one pixel": (8, [DW, PW], (1, 1)),
    "block stride 2": (8, [(0, 3, 0, 2, False, "leaky_relu"), PW], (9, 8)),
    "stem and blocks": (3, [(8, 3, 1, 2, False, "leaky_relu"), DW, PW, DW, (4, 1, 1, 1, True, "none")], (9, 7)),
}


@pytest.mark.parametrize("kind", BATCH_NORMS)
@pytest.mark.parametrize("case", CASES)
def test_float64(case, kind):
    channels, layers, size = CASES[case]
    torch.manual_seed(0)
    x, units = tensor(3, channels, *size), make_units(channels, layers, kind)
    mine = [unit._replace(bn=unit.bn and unit.bn._replace(**copies(unit.bn))) for unit in units]
    y, expected = kernel(x, mine), reference(x, units)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)
    grad = torch.randn_like(y)
    for g, e in zip(*(torch.autograd.grad(out, list(leaves(x, units)), grad) for out in (y, expected))):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-10)
    for a, b in zip(mine, units):
        if b.bn is not None and b.bn.running_mean is not None:
            torch.testing.assert_close(a.bn.running_mean, b.bn.running_mean, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(a.bn.running_var, b.bn.running_var, rtol=1e-11, atol=1e-12)


def copies(bn: BatchNorm) -> dict:
    statistics = {"running_mean": bn.running_mean, "running_var": bn.running_var}
    return {name: t.clone() for name, t in statistics.items() if t is not None}


@pytest.mark.parametrize("isa", cpu.instruction_sets() if not _reason else [])
@pytest.mark.parametrize("kind", ["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_float32(case, kind, isa):
    before = cpu.loaded_isa()
    cpu.set_isa(isa)
    try:
        channels, layers, size = CASES[case]
        torch.manual_seed(1)
        arguments = tensor(4, channels, *size), make_units(channels, layers, kind)
        compare_kernel(kernel, reference, arguments)
    finally:
        cpu.set_isa(before)


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("kind", ["train", "eval", "none"])
@pytest.mark.parametrize("layer", [(4, 3, 2, 2, True), (0, 3, 0, 1, False), (3, 1, 1, 1, True)])
def test_gradcheck(layer, kind, activation):
    torch.manual_seed(2)
    x, units = tensor(2, 4, 3, 3), make_units(4, [(*layer, activation)], kind)
    check_gradients(lambda: kernel(x, units), x, units)


def test_gradcheck_of_a_block():
    torch.manual_seed(3)
    x, units = tensor(2, 3, 4, 3), make_units(3, [(0, 3, 0, 2, False, "silu"), (4, 1, 1, 1, False, "silu")])
    dw, pw = units
    check_gradients(
        lambda: ffkernels.depthwise_separable(x, dw.conv, dw.bn, pw.conv, pw.bn, "silu", policy=CPU), x, units
    )


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(4)
        x, units = tensor(2, 8, 40, 40), make_units(8, [DW, (24, 1, 1, 1, False, "relu"), (8, 3, 4, 2, True, "none")])
        results = []
        for _ in range(2):
            y = kernel(x, units)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(leaves(x, units)))])
        assert all(torch.equal(a, b) for a, b in zip(*results)), "two runs differ"
        expected = reference(x, units)
        torch.testing.assert_close(results[0][0], expected, rtol=1e-10, atol=1e-10)
        for g, e in zip(results[0][1:], torch.autograd.grad(expected.square().sum(), list(leaves(x, units)))):
            torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-8)
    finally:
        torch.set_num_threads(before)


INPUTS = {
    "nchw": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second column": lambda x: x[..., ::2],
    "some channels": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, 3:11],
    "expanded": lambda x: x[:, :1].expand(-1, 8, -1, -1),
}
GRADIENTS = {
    "dense": torch.randn_like,
    "stride 0": lambda y: torch.ones((), dtype=y.dtype).expand(y.shape),
    "sliced": lambda y: torch.randn(*y.shape[:3], 2 * y.shape[3], dtype=y.dtype)[..., ::2],
    "transposed": lambda y: torch.randn(y.shape[::-1], dtype=y.dtype).permute(3, 2, 1, 0),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("form", INPUTS)
def test_layouts(form, gradient):
    torch.manual_seed(5)
    base, units = torch.randn(2, 8, 6, 10, dtype=torch.float64), make_units(8, [DW, PW])
    x = INPUTS[form](base).detach().requires_grad_()
    before = x.detach().clone()
    y, expected = kernel(x, units), reference(x, units)
    grad = GRADIENTS[gradient](y)
    grad_before = grad.clone()
    if form in FORMATS:
        assert y.is_contiguous(memory_format=FORMATS[form])
    for g, e in zip(*(torch.autograd.grad(out, list(leaves(x, units)), grad) for out in (y, expected))):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-10)
    assert torch.equal(x, before) and torch.equal(grad, grad_before)


def test_empty_batch():
    units = make_units(8, [DW, PW])
    x = torch.zeros(0, 8, 5, 4, dtype=torch.float64, requires_grad=True)
    y = kernel(x, units)
    y.sum().backward()
    assert y.shape == (0, 6, 5, 4) and x.grad.shape == x.shape


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(value, activation):
    """Where PyTorch's result is finite or NaN, so is the kernel's; in training the whole channel is lost in both."""
    for kind, layer in itertools.product(("train", "eval", "none"), [(4, 3, 1, 1, False), (0, 3, 0, 1, False)]):
        torch.manual_seed(6)
        units = make_units(4, [(*layer, activation)], kind)
        x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
        x[1, 2, 3, 3] = value
        copied = [u._replace(bn=u.bn and u.bn._replace(**copies(u.bn))) for u in units]
        mine, theirs = kernel(x, units), reference(x, copied)
        assert torch.equal(mine.isfinite(), theirs.isfinite()), (kind, layer)
        assert torch.equal(mine.isnan(), theirs.isnan()), (kind, layer)


def test_signs_of_batch_norm_weights():
    torch.manual_seed(7)
    units = make_units(8, [DW, (8, 1, 1, 1, False, "relu")])
    for unit in units:
        with torch.no_grad():
            unit.bn.weight.copy_(torch.tensor([1.0, -1, 0, 0, 2, -2, 1e-3, -1e3]))
            unit.bn.bias[:3] = 0
    compare_kernel(kernel, reference, (tensor(3, 8, 7, 6), units))


@pytest.mark.parametrize("layer", [(0, 3, 0, 1, False, "none"), (8, 1, 1, 1, False, "none")])
def test_large_mean_and_small_variance(layer):
    torch.manual_seed(8)
    units = make_units(8, [layer])
    with torch.no_grad():
        units[0].conv.weight.zero_()
        if layer[1] == 3:
            units[0].conv.weight[:, :, 1, 1] = 1
        else:
            units[0].conv.weight.copy_(torch.eye(8)[:, :, None, None])
    x = (1e4 + 1e-2 * torch.randn(4, 8, 30, 31, dtype=torch.float64)).float().double().requires_grad_()
    compare_kernel(kernel, reference, (x, units))


def test_gradients_only_where_required():
    torch.manual_seed(9)
    x, units = tensor(2, 4, 5, 5), make_units(4, [(0, 3, 0, 1, True, "relu"), (6, 1, 1, 1, True, "relu")])
    everything = [x, *leaves(units)]
    for chosen in itertools.chain(range(len(everything)), [-1]):
        for i, leaf in enumerate(everything):
            leaf.grad = None
            leaf.requires_grad_(chosen < 0 or i == chosen)
        kernel(x, units).square().sum().backward()
        grads = [leaf.grad for leaf in everything]
        expected = torch.autograd.grad(
            reference(x, units).square().sum(), [leaf for leaf in everything if leaf.requires_grad]
        )
        found = [g for g in grads if g is not None]
        assert len(found) == len(expected)
        for g, e in zip(found, expected):
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9)


def test_bias_in_front_of_batch_statistics_has_no_gradient():
    units = make_units(4, [(5, 3, 1, 1, True, "relu")])
    y = kernel(tensor(2, 4, 5, 5), units)
    (grad,) = torch.autograd.grad(y.square().sum(), [units[0].conv.bias])
    assert torch.equal(grad, torch.zeros_like(grad))


def test_double_backward_is_an_error():
    x, units = tensor(2, 4, 5, 5), make_units(4, [PW])
    (grad,) = torch.autograd.grad(kernel(x, units).square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_statistics_without_gradients():
    """Training mode under no_grad updates running statistics all the same."""
    x, units = tensor(2, 4, 5, 5), make_units(4, [DW, PW])
    copied = [u._replace(bn=u.bn._replace(**copies(u.bn))) for u in units]
    with torch.no_grad():
        torch.testing.assert_close(kernel(x, units), reference(x, copied), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(units[1].bn.running_var, copied[1].bn.running_var)


def test_autocast():
    block = ffkernels.nn.DepthwiseSeparable(4, 8)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    expected = block(x)
    ffkernels.set_fused(block, "require")
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x.bfloat16())
    y.sum().backward()
    assert y.dtype == torch.float32 and x.grad is not None
    torch.testing.assert_close(y, expected, rtol=0.1, atol=0.1)


def test_opcheck():
    units = make_units(4, [DW, (6, 1, 1, 1, True, "relu")])
    params = []
    for unit in units:
        params += [unit.conv.weight, unit.conv.bias, unit.bn.weight, unit.bn.bias, None, None]
    params = [p if p is None else p.detach() for p in params]
    integers, floats = [1, 1, 4, 2, 1, 1, 0, 1, 1, 1], [0.1, 1e-5, 0.1, 1e-5]
    raw = torch.ops.ffkernels._conv_chain.default
    backward = torch.ops.ffkernels._conv_chain_backward.default
    for form in FORMATS.values():
        x = torch.randn(2, 4, 5, 6, dtype=torch.float64).contiguous(memory_format=form)
        for save in (True, False):
            torch.library.opcheck(raw, (x, params, integers, floats, save, "cpu"))
        y, *saved = raw(x, params, integers, floats, True, "cpu")
        needs = [True, True, False, True, True, True, True, True, False]
        torch.library.opcheck(backward, (torch.randn_like(y), x, params, saved, integers, floats, needs, "cpu"))


@pytest.mark.parametrize("training", [True, False])
def test_compile(training):
    torch.manual_seed(10)
    with ffkernels.use("require", "cpu"):
        model = ffkernels.nn.ConvChain(
            ffkernels.nn.ConvBNAct(3, 8, stride=2), ffkernels.nn.DepthwiseSeparable(8, 16)
        ).train(training)
    x = torch.randn(2, 3, 9, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.reset_running_stats()
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        statistics = [b.clone() for b in model.buffers()]
        results.append([y, *statistics, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_chain_of_modules():
    """A fused chain has the parameters, results and statistics of nn.Sequential, and calls blocks that have hooks."""
    torch.manual_seed(11)
    chain = ffkernels.nn.ConvChain(
        ffkernels.nn.ConvBNAct(3, 8, stride=2, activation="leaky_relu"), ffkernels.nn.DepthwiseSeparable(8, 12)
    )
    x = torch.randn(2, 3, 9, 8)
    expected, state = chain(x), {k: v.clone() for k, v in chain.state_dict().items()}
    for module in chain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    ffkernels.set_fused(chain, "require", "cpu")
    torch.testing.assert_close(chain(x), expected)
    for name, value in chain.state_dict().items():
        torch.testing.assert_close(value, state[name], msg=name)
    seen = []
    chain[1].register_forward_hook(lambda module, arguments, output: seen.append(output.shape))
    chain(x)
    assert seen == [(2, 12, 5, 4)]


def test_refusals():
    x = torch.zeros(1, 4, 16, 16)
    for weight, padding, match in [
        (torch.zeros(4, 4, 9, 9), 4, "larger than 7x7"),
        (torch.zeros(4, 4, 3, 1), 0, "not square"),
        (torch.zeros(4, 4, 3, 3), 3, "padding as wide"),
    ]:
        with pytest.raises(ffkernels.FusedKernelRequired, match=match):
            ffkernels.grouped_conv_bn_act(x, ffkernels.ConvParams(weight, padding=padding), None, policy=CPU)


@pytest.mark.parametrize("size", [(64, 64), (57, 39)])
def test_backbone_over_three_steps(size):
    """Outputs, gradients and statistics of the fused backbone stay those of plain PyTorch, step after step."""
    models = []
    for mode in ("0", "require"):
        torch.manual_seed(12)
        with ffkernels.use(mode):
            models.append(featherface.models.backbone.MobileNetV1().double())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=True) for m in models]
    for step in range(3):
        x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        outputs = [m(x) for m in models]
        for a, b in zip(*outputs):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        for optimizer, ys in zip(optimizers, outputs):
            optimizer.zero_grad()
            sum(y.square().mean() for y in ys).backward()
        for (name, a), b in zip(models[0].named_parameters(), models[1].parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
        for optimizer in optimizers:
            optimizer.step()
    for (name, a), b in zip(models[0].named_buffers(), models[1].buffers()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_checkpoint_accumulation_and_copies():
    torch.manual_seed(13)
    with ffkernels.use("require", "cpu"):
        block = ffkernels.nn.DepthwiseSeparable(4, 8)
    x = torch.randn(2, 4, 6, 5, requires_grad=True)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(block)))
    block(x).square().sum().backward()
    expected = [p.grad.clone() for p in block.parameters()]
    torch.utils.checkpoint.checkpoint(twin, x, use_reentrant=False).square().sum().backward()
    twin(x).square().sum().backward()
    for p, e in zip(twin.parameters(), expected):
        torch.testing.assert_close(p.grad, 2 * e, rtol=1e-4, atol=1e-4)


def test_two_models_in_two_threads():
    torch.manual_seed(14)
    cases = [(tensor(2, 8, 20, 20), make_units(8, [DW, PW])) for _ in range(2)]

    def run(case):
        x, units = case
        return [torch.autograd.grad(kernel(x, units).square().sum(), [x])[0] for _ in range(5)]

    expected = [run(case)[0] for case in cases]
    with ThreadPoolExecutor(2) as pool:
        for grads, e in zip(pool.map(run, cases), expected):
            for g in grads:
                torch.testing.assert_close(g, e)
