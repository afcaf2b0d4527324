"""Muon: the iteration against singular values, its steps against formulas, what it is given of a network."""

import copy

import pytest
import torch
from torch import nn

from featherface.models import create_model
from featherface.training.config import Optimizer
from featherface.training.muon import ADAM_RMS, MOMENTUM, Muon, orthogonalize
from featherface.training.optimizer import build_optimizer


@pytest.mark.parametrize("shape", [(3, 16, 72), (2, 32, 8), (1, 1, 9), (4, 20, 20), (2, 8, 1)])
def test_singular_values_become_ones(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    result = orthogonalize(matrices)
    assert result.shape == matrices.shape
    u, _, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    # In the matrices' own bases the result is diagonal; the published coefficients leave 0.68 to 1.2 of ones.
    diagonal = u.mT @ result.double() @ v.mT
    values = diagonal.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.3 and values.max() < 1.25 and values.mean() > 0.65
    torch.testing.assert_close(diagonal, torch.diag_embed(values), atol=2e-3, rtol=0)


def test_zero_gradients_make_no_step():
    assert not orthogonalize(torch.zeros(2, 4, 6)).any()


@pytest.mark.parametrize(("shape", "groups"), [((8, 4, 3, 3), 1), ((8, 4, 3, 3), 2), ((16, 8, 1, 1), 4)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_steps_of_a_convolution(shape, groups, memory_format):
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) for _ in range(3)]
    parameter = nn.Parameter(start.clone().contiguous(memory_format=memory_format))
    optimizer = Muon([{"params": [parameter], "matrices": [groups], "weight_decay": 0.1}], lr=0.01)
    expected, momentum = start.clone(), torch.zeros(shape)
    for gradient in gradients:
        parameter.grad = gradient.contiguous(memory_format=memory_format)
        optimizer.step()
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        nesterov = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        steps = [orthogonalize(part.flatten(1)[None])[0] for part in nesterov.chunk(groups)]
        scale = ADAM_RMS * max(steps[0].shape) ** 0.5
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * scale * torch.cat(steps).view(shape)
    torch.testing.assert_close(parameter.data, expected, atol=1e-5, rtol=1e-5)


def test_the_rest_is_adamw():
    start = [nn.Parameter(torch.randn(shape)) for shape in ((5,), (8, 1, 3, 3), ())]
    own, theirs = copy.deepcopy(start), copy.deepcopy(start)
    optimizers = [
        Muon([{"params": own, "weight_decay": 0.1}], 0.01, (0.8, 0.95)),
        torch.optim.AdamW(theirs, 0.01, (0.8, 0.95), weight_decay=0.1),
    ]
    for _ in range(3):
        for a, b in zip(own, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(own, theirs)


def test_a_restored_optimizer_goes_on_bit_for_bit(tmp_path):
    def build(network):
        return build_optimizer(network, Optimizer(name="muon"))

    def steps(network, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(seed))
            network(x).square().mean().backward()
            optimizer.step()

    torch.manual_seed(2)
    network = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8))
    optimizer = build(network)
    steps(network, optimizer, range(2))
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    steps(network, optimizer, range(2, 4))

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.manual_seed(3)
    again = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8))
    again.load_state_dict(state["network"])
    restored = build(again)
    restored.load_state_dict(state["optimizer"])
    steps(again, restored, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), network.parameters()))


def test_parameters_without_gradients_stay():
    parameters = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))]
    optimizer = Muon([{"params": parameters[:1], "matrices": [1]}, {"params": parameters[1:]}])
    assert optimizer.step(lambda: 3.0) == 3.0
    assert all(bool((p == 1).all()) for p in parameters) and not optimizer.state


def test_matrices_must_fit():
    with pytest.raises(ValueError, match=r"a parameter of shape \(4, 4\) is not 3 matrices"):
        Muon([{"params": [nn.Parameter(torch.ones(4, 4))], "matrices": [3]}])


@pytest.mark.parametrize("name", ["featherface_v2", "featherface_v2_ultra", "featherface_v1_ssh"])
def test_a_networks_parameters_are_shared_out(name):
    network = create_model(name)
    optimizer = build_optimizer(network, Optimizer(name="muon", weight_decay=0.1))
    muon, decayed, plain = optimizer.param_groups
    given = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in network.parameters())
    names = {id(p): key for key, p in network.named_parameters()}
    assert "body.stage2.1.3.weight" in [names[id(p)] for p in muon["params"]]
    assert not any("depthwise" in names[id(p)] or "spatial_gate" in names[id(p)] for p in muon["params"])
    assert all(p.dim() == 4 for p in muon["params"]) and len(muon["matrices"]) == len(muon["params"])
    grouped = {names[id(p)]: count for p, count in zip(muon["params"], muon["matrices"])}
    assert grouped["body.stage1.0.0.weight"] == 1
    if name == "featherface_v2":
        assert grouped["bifpn.0.p4_up.pointwise.weight"] == 4 == grouped["ssh1.conv3X3.0.weight"]
    assert (muon["weight_decay"], decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.1, 0.0)
