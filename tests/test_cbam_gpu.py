"""GPU kernels of CBAM against the reference."""

import pytest
import torch
from backends import backend_dtypes, backends
from helpers import compare_kernel, convert
from layers import norm
from test_cbam_cpu import CASES, make

import ffkernels
from ffkernels.reference.cbam import cbam as reference

GPUS = [p for p in backends("cbam") if p.values[0].name != "cpu"]
HALVES = [p for p in backend_dtypes("cbam") if p.values[0].name != "cpu" and p.values[1] != torch.float32]
QUICK = [("manager A", True), ("V1", False), ("threefold, no residual", True), ("one pixel", True)]


def kernel_of(gpu):
    return lambda *arguments: ffkernels.cbam(*arguments, policy=gpu.policy)


@pytest.mark.parametrize(
    "case,training",
    [
        pytest.param(case, training, marks=[] if (case, training) in QUICK else pytest.mark.slow)
        for case in CASES
        for training in (True, False)
    ],
)
@pytest.mark.parametrize("gpu", GPUS)
def test_float32(gpu, case, training):
    torch.manual_seed(1)
    compare_kernel(kernel_of(gpu), reference, make(case, training), device=gpu.device)


@pytest.mark.parametrize(
    "case,training",
    [
        ("manager B", True),
        ("one pixel", False),
        pytest.param("manager A", False, marks=pytest.mark.slow),
        pytest.param("V1", True, marks=pytest.mark.slow),
        pytest.param("no residual", False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("gpu,dtype", HALVES)
def test_half_precision(gpu, dtype, case, training):
    torch.manual_seed(2)
    compare_kernel(kernel_of(gpu), reference, make(case, training), dtype, gpu.device)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gpu", GPUS)
def test_without_affine_parameters_or_statistics(gpu, training):
    torch.manual_seed(3)
    x, mlp, spatial, _, *rest = make("one pixel", training)
    change = {"running_mean": None, "running_var": None} if training else {"weight": None, "bias": None}
    bns = [norm(2, training)._replace(**change)]
    compare_kernel(kernel_of(gpu), reference, (x, mlp, spatial, bns, *rest), device=gpu.device)


@pytest.mark.parametrize("gpu", GPUS)
def test_layouts_and_repetition(gpu):
    """Views, channels_last, expanded gradients; two runs agree to the bit; nothing is written into an input."""
    torch.manual_seed(4)
    arguments = convert(make("one pixel", False)[1:], torch.float32, gpu.device)
    base = torch.randn(2, 16, 3, 4, device=gpu.device)
    last = base.contiguous(memory_format=torch.channels_last)
    for view in (base, last, base[..., ::2], last[:, :8], base[:, :1].expand(-1, 8, -1, -1)):
        before, results = view.clone(), []
        for run in (kernel_of(gpu), kernel_of(gpu), reference):
            leaf = view.detach().requires_grad_()
            y = run(leaf, *arguments)
            y.backward(torch.ones((), device=gpu.device).expand(y.shape))
            results.append((y.detach(), leaf.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results[:2]))
        assert torch.equal(view, before)
        torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gpu", GPUS)
def test_gradients_only_where_required(gpu):
    torch.manual_seed(5)
    x, mlp, spatial, bns, *rest = make("one pixel")
    everything = [x, mlp.fc1_weight, mlp.fc2_weight, spatial.weight, bns[0].weight, bns[0].bias]
    for chosen in range(len(everything)):
        for i, leaf in enumerate(everything):
            leaf.requires_grad_(i == chosen)
        compare_kernel(kernel_of(gpu), reference, (x, mlp, spatial, bns, *rest), device=gpu.device)


@pytest.mark.parametrize("gpu", GPUS)
def test_running_statistics_of_half_precision_stay_float32(gpu):
    torch.manual_seed(6)
    arguments = convert(make("one pixel"), torch.bfloat16, gpu.device)
    bn = convert(norm(2)._replace(momentum=0.0), torch.float32, gpu.device)
    bn.running_mean.fill_(1 + 2**-20)
    kernel_of(gpu)(*arguments[:3], [bn], *arguments[4:])
    assert (bn.running_mean == 1 + 2**-20).all()


@pytest.mark.parametrize("gpu", GPUS)
def test_nan_passes_and_empty_batch(gpu):
    x, *arguments = convert(make("one pixel", False), torch.float32, gpu.device)
    x = torch.zeros(1, 8, 3, 3, device=gpu.device)
    x[0, 1, 1, 1] = float("nan")
    nan = kernel_of(gpu)(x, *arguments).isnan()
    assert nan.any() and torch.equal(nan, reference(x, *arguments).isnan())
    assert kernel_of(gpu)(x[:0], *arguments).shape == (0, 8, 3, 3)


@pytest.mark.parametrize("gpu", [p for p in GPUS if p.values[0].name == "cuda"])
def test_a_batch_larger_than_a_grid_is_refused(gpu):
    x, *others = convert(make("one pixel", False), torch.float32, gpu.device)
    with pytest.raises(ffkernels.FusedKernelRequired, match="more than 65,535 images"):
        kernel_of(gpu)(x[:1].expand(65536, -1, -1, -1), *others)
