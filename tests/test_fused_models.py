"""FF_USE_FUSED=1 on whole networks: the same training, step by step, as plain PyTorch, by the C++ kernels."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.utils.checkpoint
from torch import Tensor, nn

import featherface
import ffkernels
from ffkernels import registry

_reason = registry.backend_unavailable("cpu", "cpu")
pytestmark = pytest.mark.skipif(_reason is not None, reason=f"backend cpu: {_reason}")

MODELS = featherface.list_models()
SIZES = [(64, 96), (75, 51), pytest.param((320, 320), marks=pytest.mark.slow)]


def pair(name: str, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A plain model and its fused twin with the same weights, both in training mode."""
    torch.manual_seed(seed)
    plain = featherface.create_model(name, fused="0").train()
    fused = featherface.create_model(name, fused="require").train()
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def images(*size: int, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 50 * torch.randn(batch, 3, *size, generator=generator)


def loss_of(outputs: tuple[Tensor, ...]) -> Tensor:
    return sum(output.square().mean() for output in outputs)


def train(model: nn.Module, x: Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model(x))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_close(mine: dict[str, Tensor], exact: dict[str, Tensor], tolerance: float, what: str) -> None:
    """In the Euclidean norm, up to ``tolerance`` of each tensor's norm and a tenth of that of the largest tensor's.

    Single values may differ by more in float32: a rounding can decide which side of a ReLU a pixel falls on.
    """
    assert mine.keys() == exact.keys()
    largest = max(e.norm().item() for e in exact.values())
    for name, e in exact.items():
        off = (mine[name].double() - e.double()).norm().item()
        limit = tolerance * (e.norm().item() + 0.1 * largest)
        assert off <= limit, f"{what} {name}: off by {off:.3g}, allowed {limit:.3g}"


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in model.state_dict().items() if t.is_floating_point()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_three_steps(name, size):
    """In float64, where no rounding is amplified from step to step: losses, gradients, weights, running statistics."""
    plain, fused = (model.double() for model in pair(name))
    x = images(*size).double()
    losses = [train(model, x, 3) for model in (fused, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert_close(gradients(fused), gradients(plain), 1e-7, "gradient of")
    assert_close(state(fused), state(plain), 1e-8, "state")
    for key, value in plain.state_dict().items():
        if key.endswith("num_batches_tracked"):
            assert fused.state_dict()[key] == value
    with torch.no_grad():
        for mine, theirs in zip(fused.eval()(x), plain.eval()(x)):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8 * theirs.abs().max().item())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_float32_gradients(name, size):
    plain, fused = pair(name)
    exact = copy.deepcopy(plain).double()
    x = images(*size, batch=4)
    losses = [loss_of(fused(x)), loss_of(exact(x.double()))]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert_close(gradients(fused), gradients(exact), 0.1, "gradient of")
    assert_close(state(fused), state(exact), 1e-5, "state")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_every_op_with_a_kernel_runs_on_it(name, training):
    model = featherface.create_model(name, fused="require").train(training)
    rows = ffkernels.report(model)
    assert rows and {row.backend for row in rows} == {"cpu"}


@pytest.mark.parametrize("name", ["featherface_v2", "featherface_v2_ultra", "featherface_v1_ssh"])
def test_weights_load_both_ways(name, tmp_path):
    plain, fused = pair(name)
    train(fused, images(64, 64), 1)
    torch.save(fused.state_dict(), tmp_path / "fused.pt")
    plain.load_state_dict(torch.load(tmp_path / "fused.pt", weights_only=True))
    x = images(64, 64, seed=2)
    with torch.no_grad():
        for mine, theirs in zip(fused.eval()(x), plain.eval()(x)):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_three_hundred_steps_end_alike(name):
    plain, fused = pair(name)
    x = images(64, 64, batch=4)
    ends = [sum(train(model, x, 300)[-20:]) / 20 for model in (fused, plain)]
    assert ends[0] == pytest.approx(ends[1], rel=0.1, abs=1e-3)


def test_gradients_accumulate_and_checkpoint():
    _, model = pair("featherface_v2")
    batches = [images(64, 64, seed=s) for s in (1, 2)]
    initial = copy.deepcopy(model.state_dict())
    for x in batches:
        loss_of(model(x)).backward()
    accumulated = {name: g.clone() for name, g in gradients(model).items()}
    model.zero_grad()
    model.load_state_dict(initial)
    for x in batches:
        loss_of(torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)).backward()
    for name, g in gradients(model).items():
        torch.testing.assert_close(g, accumulated[name], rtol=1e-4, atol=1e-5 * g.abs().max().item() + 1e-12)


def test_autocast_in_bfloat16():
    plain, fused = pair("featherface_v2")
    x = images(64, 96)
    exact = copy.deepcopy(plain).double()
    with torch.autocast("cpu", torch.bfloat16):
        results = [model(x) for model in (fused, plain)]
    for model, outputs in zip((fused, plain), results):
        loss_of([out.float() for out in outputs]).backward()
        assert all(g.isfinite().all() for g in gradients(model).values())
    for mine, theirs, truth in zip(*results, exact(x.double())):
        off, baseline = ((t.double() - truth).norm().item() for t in (mine, theirs))
        assert off <= 2 * baseline + 1e-2 * truth.norm().item()


def test_copies_are_fused_and_equal():
    _, model = pair("featherface_v2_ultra")
    x = images(64, 64)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert train(twin, x, 2) == train(copy.deepcopy(model), x, 2)


def test_two_models_in_two_threads():
    models = [pair("featherface_v2", seed)[1] for seed in (0, 1)]
    inputs = [images(64, 64, seed=seed) for seed in (0, 1)]
    alone = [train(copy.deepcopy(model), x, 3) for model, x in zip(models, inputs)]
    together: list = [None, None]

    def work(i: int) -> None:
        together[i] = train(models[i], inputs[i], 3)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A new thread has a number of OpenMP threads of its own, and sums are taken per thread.
    for a, b in zip(alone, together):
        assert a == pytest.approx(b, rel=1e-5)


def _train_in_a_group(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        model = featherface.create_model("featherface_v2", fused="require").train()
        parallel = nn.parallel.DistributedDataParallel(model)
        losses = train(parallel, images(64, 64, seed=rank), 2)
        total = torch.stack([p.detach().double().sum() for p in model.parameters()])
        torch.save({"losses": losses, "parameters": total}, f"{path}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    mp.spawn(_train_in_a_group, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first["parameters"], second["parameters"])
    assert first["losses"] != second["losses"]
