"""Convolution kernels on GPUs against the references: grouped_conv_bn_act, depthwise_separable and chains of them."""

import pytest
import torch
from backends import FORMATS, backend_dtypes, backends
from helpers import compare_kernel, convert
from layers import leaves, tensor
from test_conv_chain_cpu import CASES, DW, PW, copies, make_units

import ffkernels
from ffkernels.reference.conv_chain import conv_chain as reference

GPUS = [p for p in backends("conv_chain") if p.values[0].name != "cpu"]
GPU_DTYPES = [p for p in backend_dtypes("conv_chain") if p.values[0].name != "cpu"]


def kernel_of(gpu):
    return lambda x, units: ffkernels.conv_chain(x, units, policy=gpu.policy)


@pytest.mark.parametrize("kind", ["train", "eval", "none"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gpu", GPUS)
def test_float32(gpu, case, kind):
    channels, layers, size = CASES[case]
    torch.manual_seed(1)
    arguments = tensor(3, channels, *size), make_units(channels, layers, kind)
    compare_kernel(kernel_of(gpu), reference, arguments, device=gpu.device)


@pytest.mark.parametrize("gpu", GPUS)
def test_largest_strides(gpu):
    """CUDA C++ serves strides up to 9: a larger one's tile would not fit into shared memory."""
    for stride in (9, 12):
        torch.manual_seed(1)
        arguments = tensor(2, 4, 40, 31), make_units(4, [(8, 7, 2, stride, False, "relu")], "train")
        if stride == 12 and gpu.name == "cuda":
            with pytest.raises(ffkernels.FusedKernelRequired, match="strides above 9"):
                kernel_of(gpu)(*convert(arguments, torch.float32, gpu.device))
        else:
            compare_kernel(kernel_of(gpu), reference, arguments, device=gpu.device)


@pytest.mark.parametrize("kind", ["train", "eval"])
@pytest.mark.parametrize(
    "case", ["stem and blocks", "grouped, many", "depthwise 16 stride 2", "dense 1x1", "dense 7x7"]
)
@pytest.mark.parametrize("gpu,dtype", [p for p in GPU_DTYPES if p.values[1] != torch.float32])
def test_half_precision(gpu, dtype, case, kind):
    channels, layers, size = CASES[case]
    # The derivative of a smooth activation; at a kink, the rounding of z decides between two values.
    layers = [(*layer[:-1], "silu") for layer in layers]
    torch.manual_seed(1)
    arguments = tensor(3, channels, *size), make_units(channels, layers, kind)
    compare_kernel(kernel_of(gpu), reference, arguments, dtype, gpu.device)


@pytest.mark.parametrize("gpu,dtype", [p for p in GPU_DTYPES if p.values[1] != torch.float32])
def test_autocast_keeps_statistics_that_the_dtype_cannot_hold(gpu, dtype, autocast):
    """The published V1's first normalisation has a variance of 83,378, which is infinite in float16."""
    torch.manual_seed(4)
    units = make_units(3, [(8, 3, 1, 2, False, "leaky_relu"), (8, 1, 1, 1, True, "none")], "eval")
    with torch.no_grad():
        for tensor_ in (units[0].conv.weight, units[0].bn.running_mean):
            tensor_.mul_(1000)
        units[0].bn.running_var.mul_(1e6)
    x = tensor(2, 3, 9, 7)
    exact = reference(x, units)
    own_x, own_units = convert((x, units), torch.float32, gpu.device)
    with autocast(gpu, dtype):
        y = kernel_of(gpu)(own_x, own_units)
    assert y.dtype is dtype
    y.float().mean().backward()
    assert own_x.grad.dtype is torch.float32 and own_units[0].bn.weight.grad.isfinite().all()
    error = (y.detach().double().cpu() - exact.detach()).abs().max()
    assert error <= 16 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("kind", ["untracked", "plain"])
@pytest.mark.parametrize("gpu", GPUS)
def test_batch_norm_variants(gpu, kind):
    torch.manual_seed(2)
    compare_kernel(kernel_of(gpu), reference, (tensor(3, 8, 6, 5), make_units(8, [DW, PW], kind)), device=gpu.device)


@pytest.mark.parametrize("gpu", GPUS)
def test_signs_of_batch_norm_weights(gpu):
    torch.manual_seed(7)
    units = make_units(8, [DW, (8, 1, 1, 1, False, "relu")])
    for unit in units:
        with torch.no_grad():
            unit.bn.weight.copy_(torch.tensor([1.0, -1, 0, 0, 2, -2, 1e-3, -1e3]))
            unit.bn.bias[:3] = 0
    compare_kernel(kernel_of(gpu), reference, (tensor(3, 8, 7, 6), units), device=gpu.device)


@pytest.mark.parametrize("layer", [(0, 3, 0, 1, False, "none"), (8, 1, 1, 1, False, "none")])
@pytest.mark.parametrize("gpu", GPUS)
def test_large_mean_and_small_variance(gpu, layer):
    torch.manual_seed(8)
    units = make_units(8, [layer])
    with torch.no_grad():
        units[0].conv.weight.zero_()
        if layer[1] == 3:
            units[0].conv.weight[:, :, 1, 1] = 1
        else:
            units[0].conv.weight.copy_(torch.eye(8)[:, :, None, None])
    x = (1e4 + 1e-2 * torch.randn(2, 8, 15, 17, dtype=torch.float64)).float().double().requires_grad_()
    compare_kernel(kernel_of(gpu), reference, (x, units), device=gpu.device)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("gpu", GPUS)
def test_layouts_and_repetition(gpu, form):
    """NCHW, expanded gradients, views; two runs agree to the bit; nothing is written into an input."""
    torch.manual_seed(5)
    units = [
        u._replace(conv=u.conv._replace(weight=u.conv.weight.detach().float().to(gpu.device)), bn=None)
        for u in make_units(8, [DW, PW])
    ]
    base = torch.randn(2, 8, 6, 20, device=gpu.device)
    for view in (base, base[..., ::2], base[:, :1].expand(-1, 8, -1, -1)):
        x = view.contiguous(memory_format=form) if view is base else view
        before, results = x.clone(), []
        for _ in range(2):
            leaf = x.detach().requires_grad_()
            y = ffkernels.conv_chain(leaf, units, policy=gpu.policy)
            y.backward(torch.ones((), device=gpu.device).expand(y.shape))
            results.append((y.detach(), leaf.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results))
        assert torch.equal(x, before)
        if view is base:
            assert y.is_contiguous(memory_format=form)
        leaf = x.detach().requires_grad_()
        expected = reference(leaf, units)
        expected.sum().backward()
        torch.testing.assert_close(results[0], (expected.detach(), leaf.grad), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("gpu", GPUS)
def test_not_finite(gpu, value):
    for kind, activation in (("train", "relu"), ("eval", "leaky_relu"), ("none", "silu"), ("none", "relu")):
        for layer in ((4, 3, 1, 1, False), (0, 3, 0, 1, False)):
            torch.manual_seed(6)
            units = make_units(4, [(*layer, activation)], kind)
            units = [
                u._replace(
                    conv=u.conv._replace(weight=u.conv.weight.detach().float().to(gpu.device)),
                    bn=u.bn and type(u.bn)(*(t.detach().float().to(gpu.device) for t in u.bn[:4]), *u.bn[4:]),
                )
                for u in units
            ]
            x = torch.randn(2, 4, 5, 6, device=gpu.device)
            x[1, 2, 3, 3] = value
            copied = [u._replace(bn=u.bn and u.bn._replace(**copies(u.bn))) for u in units]
            mine, theirs = ffkernels.conv_chain(x, units, policy=gpu.policy), reference(x, copied)
            assert torch.equal(mine.isfinite(), theirs.isfinite()), (kind, layer)
            assert torch.equal(mine.isnan(), theirs.isnan()), (kind, layer)


@pytest.mark.parametrize("gpu", GPUS)
def test_gradients_only_where_required(gpu):
    torch.manual_seed(9)
    x, units = tensor(2, 4, 5, 5), make_units(4, [(0, 3, 0, 1, True, "relu"), (6, 1, 1, 1, True, "relu")])
    everything = [x, *leaves(units)]
    for chosen in range(len(everything)):
        for i, leaf in enumerate(everything):
            leaf.requires_grad_(i == chosen)
        compare_kernel(kernel_of(gpu), reference, (x, units), device=gpu.device)


@pytest.mark.parametrize("gpu", GPUS)
def test_empty_batch(gpu):
    units = [
        u._replace(conv=u.conv._replace(weight=u.conv.weight.detach().float().to(gpu.device)), bn=None)
        for u in make_units(8, [DW, PW])
    ]
    x = torch.zeros(0, 8, 5, 4, device=gpu.device, requires_grad=True)
    y = ffkernels.conv_chain(x, units, policy=gpu.policy)
    y.sum().backward()
    assert y.shape == (0, 6, 5, 4) and x.grad.shape == x.shape
