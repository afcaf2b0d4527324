"""The whole of V2 on each GPU backend, nothing left to the reference, against plain PyTorch in float64."""

import copy
from contextlib import nullcontext

import pytest
import torch
from backends import backends
from layers import randomize
from torch import nn

from featherface import create_model
from ffkernels import set_fused

GPUS = [p for p in backends("multi_head") if p.values[0].name != "cpu"]


def away_from_thresholds(model):
    """Gives every channel behind a batch normalisation one sign: values of 0 +- 0.5 around an offset of +-3.

    Where a value crosses the threshold of its ReLU the gradient jumps, so two precisions of a network with 10^5 such
    values, some closer to 0 than rounding, need not have the same gradient. Here they must.
    """
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.constant_(bn.weight, 0.5)
        with torch.no_grad():
            bn.bias.copy_(3 * (2 * torch.randint(2, bn.bias.shape) - 1))
    return model


def check_training(gpu, seed, slack, dtype=torch.float32, autocast=nullcontext):
    """Outputs of ``dtype`` and gradients of V2's fused layers, off by at most 3 times what PyTorch's own are off by."""
    torch.manual_seed(seed)
    plain = away_from_thresholds(create_model("featherface_v2", fused=False)).double().train()
    single = copy.deepcopy(plain).float().to(gpu.device)
    fused = set_fused(copy.deepcopy(single), gpu.policy)
    # Large enough on a GPU that no gradient is a small tensor.
    x = torch.randn(4, 3, *((32, 32) if gpu.emulated else (160, 192)), dtype=torch.float64)
    results = []
    for model in (fused, single, plain):
        like = next(model.parameters())
        with nullcontext() if model is plain else autocast():
            outputs = model(x.to(like))
        assert all(y.dtype is (like.dtype if model is plain else dtype) for y in outputs)
        sum(y.to(like.dtype).square().mean() for y in outputs).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append([v.detach().double().cpu() for v in (*outputs, gradient)])
    for mine, theirs, exact in zip(*results):
        assert (mine - exact).norm() <= 3 * (theirs - exact).norm() + slack * exact.norm()


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
def test_v2_forward_and_backward(gpu):
    check_training(gpu, seed=0, slack=1e-5)


HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@pytest.mark.slow
@HALF
@pytest.mark.parametrize("gpu", GPUS)
def test_v2_training_under_autocast(gpu, dtype, autocast):
    check_training(gpu, seed=2, slack=1e-3, dtype=dtype, autocast=lambda: autocast(gpu, dtype))


@pytest.mark.slow
@HALF
@pytest.mark.parametrize("gpu", GPUS)
def test_v1_evaluation_under_autocast(gpu, dtype, autocast):
    torch.manual_seed(3)
    plain = randomize(create_model("featherface_v1_ssh", fused=False)).eval()
    single = copy.deepcopy(plain).to(gpu.device)
    fused = set_fused(copy.deepcopy(single), gpu.policy)
    exact = plain.double()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        wanted = exact(x.double())
        with autocast(gpu, dtype):
            results = [model(x.to(gpu.device)) for model in (fused, single)]
    assert results[0][1].dtype is torch.float32, "of probabilities, as PyTorch has it"
    for mine, theirs, want in zip(*results, wanted):
        mine, theirs = mine.double().cpu(), theirs.double().cpu()
        assert (mine - want).norm() <= 2 * (theirs - want).norm() + 1e-3 * want.norm()


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
def test_v2_evaluation_in_half_precision(gpu):
    torch.manual_seed(1)
    plain = randomize(create_model("featherface_v2", fused=False)).eval()
    half = copy.deepcopy(plain).half().to(gpu.device)
    exact = copy.deepcopy(half).double()
    fused = set_fused(copy.deepcopy(half), gpu.policy)
    x = torch.randn(2, 3, 64, 96).half().to(gpu.device)
    with torch.no_grad():
        for mine, theirs, wanted in zip(fused(x), half(x), exact(x.double())):
            assert (mine - wanted).norm() <= 2 * (theirs - wanted).norm() + 1e-3 * wanted.norm()
