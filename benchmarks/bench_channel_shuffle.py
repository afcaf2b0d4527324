"""Channel shuffle on the model's real sizes (640x640 input): ``pytest --benchmark-only -k channel_shuffle``."""

import pytest
import torch
from ops import competitors, forward_backward, measure, policy

import ffkernels

LAYERS = [(1, 32, 80, 80), (1, 32, 40, 40), (1, 32, 20, 20), (8, 32, 80, 80)]
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", LAYERS, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("competitor,device", competitors("channel_shuffle"))
def test_channel_shuffle(benchmark, competitor, device, shape, form, mode):
    benchmark.group = f"channel_shuffle {'x'.join(map(str, shape))} {form} {mode} {device}"
    training = mode != "forward"
    x = torch.randn(shape, device=device).contiguous(memory_format=FORMATS[form]).requires_grad_(training)

    def run(t):
        return ffkernels.channel_shuffle(t, 4, policy=policy(competitor))

    assert torch.equal(run(x), ffkernels.channel_shuffle(x, 4, policy=ffkernels.Policy("0")))
    passes = 2 if training else 1
    measure(benchmark, forward_backward(run, x) if training else lambda: run(x), device, 2 * passes * x.nbytes)
