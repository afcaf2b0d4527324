"""GPU kernels of the SSH block and the detection heads against their references."""

import pytest
import torch
from backends import backend_dtypes, backends
from helpers import compare_kernel, convert
from layers import leaves, one_sided, tensor
from test_ssh_and_heads_cpu import head, ssh_params

import ffkernels
import ffkernels.cuda.ssh_grouped as cuda_ssh
from ffkernels.reference.multi_head import multi_head as heads_reference
from ffkernels.reference.ssh_grouped import ssh_grouped as ssh_reference

SSH = [p for p in backends("ssh_grouped") if p.values[0].name != "cpu"]
SSH_HALVES = [p for p in backend_dtypes("ssh_grouped") if p.values[0].name != "cpu" and p.values[1] != torch.float32]
HEADS = [p for p in backends("multi_head") if p.values[0].name != "cpu"]
HEADS_HALVES = [p for p in backend_dtypes("multi_head") if p.values[0].name != "cpu" and p.values[1] != torch.float32]
SIZES = ((3, 5), (2, 2), (1, 1))


def ssh(gpu, shuffle):
    return lambda x, convs, bns: ffkernels.ssh_grouped(x, convs, bns, shuffle, policy=gpu.policy)


def heads_of(gpu, softmax):
    return lambda features, heads: ffkernels.multi_head(features, heads, softmax, policy=gpu.policy)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "channels,out,groups,shuffle,size,bias",
    [
        (32, 32, 4, 4, (7, 6), False),
        pytest.param(12, 16, 4, 2, (5, 9), True, marks=pytest.mark.slow),
        (6, 12, 1, 1, (1, 7), False),
        pytest.param(20, 40, 5, 4, (1, 1), False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("gpu", SSH)
def test_ssh_float32(gpu, channels, out, groups, shuffle, size, bias, training):
    torch.manual_seed(0)
    arguments = tensor(3, channels, *size), *ssh_params(channels, out, groups, training, bias)
    compare_kernel(ssh(gpu, shuffle), lambda *values: ssh_reference(*values, shuffle), arguments, device=gpu.device)


@pytest.mark.parametrize("gpu,dtype", SSH_HALVES)
def test_ssh_half_precision(gpu, dtype):
    torch.manual_seed(1)
    convs, bns = ssh_params(8, 16, 4, False)
    arguments = tensor(2, 8, 5, 4), convs, [one_sided(bn) for bn in bns]
    compare_kernel(ssh(gpu, 4), lambda *values: ssh_reference(*values, 4), arguments, dtype, gpu.device)


@pytest.mark.parametrize("gpu,dtype", [p for p in backend_dtypes("ssh_grouped") if p.values[0].name != "cpu"])
@pytest.mark.parametrize(
    "channels,out,groups,shuffle,size,bias",
    [(32, 32, 4, 4, (9, 18), False), (12, 16, 4, 2, (5, 9), True), (6, 12, 1, 1, (1, 7), False)],
)
def test_ssh_evaluation(gpu, dtype, channels, out, groups, shuffle, size, bias):
    """Without gradients; the first image is larger than a tile of the CUDA kernel."""
    if gpu.name == "triton":  # tiles nothing here, and programs of the interpreter are slow
        size = min(size, (3, 5))
    torch.manual_seed(7)
    arguments = tensor(2, channels, *size), *ssh_params(channels, out, groups, False, bias)
    with torch.no_grad():
        compare_kernel(
            ssh(gpu, shuffle), lambda *values: ssh_reference(*values, shuffle), arguments, dtype, gpu.device, False
        )


@pytest.mark.parametrize("gpu", [p for p in SSH if p.values[0].name == "cuda"])
def test_ssh_evaluation_is_one_kernel(gpu, monkeypatch):
    """Where a tile fits in shared memory; NaN spreads as in the reference; without affine parameters."""
    torch.manual_seed(8)
    forward = cuda_ssh.conv_forward
    calls = []
    monkeypatch.setattr(cuda_ssh, "conv_forward", lambda *a: calls.append(a) or forward(*a))
    for channels, composed in ((8, False), (128, True)):
        convs, bns = convert(ssh_params(channels, 8, 4, False), torch.float32, gpu.device)
        bns = [bn._replace(weight=None, bias=None) for bn in bns]
        x = torch.randn(1, channels, 5, 12, device=gpu.device)
        x[0, 0, 1, 1] = float("nan")
        calls.clear()
        with torch.no_grad():
            y, expected = ssh(gpu, 4)(x, convs, bns), ssh_reference(x, convs, bns, 4)
        assert bool(calls) == composed
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("gpu", SSH)
def test_ssh_gradients_only_where_required(gpu):
    torch.manual_seed(2)
    x, (convs, bns) = tensor(2, 8, 3, 4), ssh_params(8, 16, 2)
    everything = list(leaves(x, convs, bns))
    for chosen in range(0, len(everything), 4):
        for i, leaf in enumerate(everything):
            leaf.requires_grad_(i == chosen)
        compare_kernel(ssh(gpu, 2), lambda *values: ssh_reference(*values, 2), (x, convs, bns), device=gpu.device)


@pytest.mark.parametrize("gpu", SSH)
def test_ssh_repeats_its_bits(gpu):
    torch.manual_seed(3)
    convs, bns = convert(ssh_params(8, 16, 4, False), torch.float32, gpu.device)
    x = torch.randn(2, 16, 5, 8, device=gpu.device)[:, ::2, :, ::2].requires_grad_()
    results = []
    for _ in range(2):
        y = ssh(gpu, 4)(x, convs, bns)
        results.append((y, *torch.autograd.grad(y, [x, convs[1].weight], torch.ones(()).to(y).expand(y.shape))))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    torch.testing.assert_close(y, ssh_reference(x, convs, bns, 4))


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("channels,hidden,anchors,training", [(32, 16, 2, True), (5, None, 1, True), (8, 4, 3, False)])
@pytest.mark.parametrize("gpu", HEADS)
def test_heads_float32(gpu, channels, hidden, anchors, training, softmax):
    torch.manual_seed(4)
    features = tuple(tensor(2, channels, *size) for size in SIZES)
    heads = tuple(head(channels, hidden, anchors, training) for _ in SIZES)
    compare_kernel(
        heads_of(gpu, softmax), lambda *values: heads_reference(*values, softmax), (features, heads), device=gpu.device
    )


@pytest.mark.parametrize("gpu", HEADS)
def test_heads_of_large_maps(gpu):
    torch.manual_seed(4)
    features, heads = (tensor(2, 4, 41, 43), tensor(2, 4, 20, 22)), (head(4, None, 2), head(4, None, 2))
    compare_kernel(heads_of(gpu, False), heads_reference, (features, heads), device=gpu.device)


@pytest.mark.parametrize("gpu,dtype", HEADS_HALVES)
def test_heads_half_precision(gpu, dtype):
    torch.manual_seed(5)
    features = tuple(tensor(2, 8, *size) for size in SIZES)
    heads = tuple(head(8) for _ in SIZES)
    compare_kernel(
        heads_of(gpu, True), lambda *values: heads_reference(*values, True), (features, heads), dtype, gpu.device
    )


@pytest.mark.parametrize("gpu", HEADS)
def test_heads_with_one_gradient(gpu):
    torch.manual_seed(6)
    features = [torch.randn(2, 5, *size, device=gpu.device, requires_grad=True) for size in SIZES]
    heads = convert([head(5, None, 2) for _ in SIZES], torch.float32, gpu.device)
    for i in range(3):
        results = [
            torch.autograd.grad(run(features, heads)[i].square().sum(), features)
            for run in (heads_of(gpu, True), lambda *values: heads_reference(*values, True))
        ]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
