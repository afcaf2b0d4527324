"""The nodes of V2's and V1's pyramids at 640x640, in training mode: ``pytest --benchmark-only -k bifpn_node``."""

import pytest
import torch
from ops import competitors, measure, policy
from torch import nn

from featherface.models.bifpn import BiFPNNode
from ffkernels import set_fused

# name: (channels, groups, resample, sizes, pool)
NODES = {
    "P4u": (("none", "up"), (40, 20)),
    "P3o": (("none", "up"), (80, 40)),
    "P4o": (("none", "none", "down"), (40, 40, 80)),
    "P5o": (("none", "down", "down"), (20, 40, 40)),
}
MODELS = {"V2": (32, 4, False, "max"), "V1": (56, 1, True, "max_same")}


@pytest.mark.parametrize("mode", ["evaluation", "training"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("competitor,device", competitors("bifpn_node"))
def test_bifpn_node(benchmark, competitor, device, model, node, batch, mode):
    resample, sizes = NODES[node]
    channels, groups, bias, pool = MODELS[model]
    benchmark.group = f"bifpn_node {model} {node} batch {batch} {mode} {device}"
    training = mode == "training"
    torch.manual_seed(0)
    module = BiFPNNode(channels, resample, 3, groups, bias, pool=pool).to(device).train(training)
    inputs = [
        torch.randn(batch, channels, n, n, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
        for n in sizes
    ]
    run_module(benchmark, module, inputs, competitor, device, training)


def run_module(
    benchmark, module: nn.Module, inputs: list[torch.Tensor], competitor: str, device: str, training: bool
) -> None:
    """Times the module in one mode after checking it against PyTorch."""
    set_fused(module, False)
    expected = module(*inputs)
    set_fused(module, policy(competitor))
    torch.testing.assert_close(module(*inputs), expected, rtol=1e-3, atol=1e-4)
    moved = sum(t.nbytes for t in (*inputs, expected))
    if not training:
        with torch.no_grad():
            return measure(benchmark, lambda: module(*inputs), device, moved)
    grad, leaves = torch.randn_like(expected), [*inputs, *module.parameters()]

    def step() -> None:
        torch.autograd.grad(module(*inputs), leaves, grad, allow_unused=True)

    return measure(benchmark, step, device, 3 * moved)
