"""The attention of V2 (both managers), Ultra and V1 at 640x640: ``pytest --benchmark-only -k cbam``."""

import pytest
import torch
from bench_bifpn_node import run_module
from ops import competitors
from torch import nn

from featherface.models.attention import CBAM, CBAM_Plus, SharedCBAMManager


class Threefold(nn.Module):
    """Ultra's attention of one level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.manager = SharedCBAMManager({"level": channels}, repeats=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.manager(x, "level", residual=True)


class Residual(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, residual=True)


MODELS = {
    "V2": lambda channels: Residual(CBAM_Plus(channels)),
    "V1": lambda channels: Residual(CBAM(channels)),
    "Ultra": Threefold,
}
LAYERS = [(64, 80), (128, 40), (256, 20), (32, 80), (32, 40), (32, 20)]


@pytest.mark.parametrize("mode", ["evaluation", "training"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("competitor,device", competitors("cbam"))
def test_cbam(benchmark, competitor, device, model, layer, batch, mode):
    channels, size = layer
    benchmark.group = f"cbam {model} {channels}x{size}x{size} batch {batch} {mode} {device}"
    torch.manual_seed(0)
    module = MODELS[model](channels).to(device).train(mode == "training")
    x = torch.randn(batch, channels, size, size, device=device).contiguous(memory_format=torch.channels_last)
    run_module(benchmark, module, [x.requires_grad_()], competitor, device, mode == "training")
