"""V2's context block on its three levels: ``pytest --benchmark-only -k ssh_grouped``."""

import pytest
import torch
from layers import conv, image, leaves, norm, products
from ops import competitors, forward_backward, measure, policy

import ffkernels

SHAPES = [(16, 32), (8, 32), (8, 8), (8, 8), (8, 8)]


@pytest.mark.parametrize("mode", ["evaluation", "training"])
@pytest.mark.parametrize("height", [40, 20, 10])
@pytest.mark.parametrize("competitor,device", competitors("ssh_grouped"))
def test_ssh_grouped(benchmark, competitor, device, height, mode):
    benchmark.group = f"ssh_grouped {height} {mode} {device}"
    training = mode == "training"
    convs = [conv(out, channels, 3, groups=4) for out, channels in SHAPES]
    bns = [norm(out, training) for out, _ in SHAPES]
    x = image(32, height, training)

    def run(*_):
        return ffkernels.ssh_grouped(x, convs, bns, 4, policy=policy(competitor))

    expected = ffkernels.ssh_grouped(x, convs, bns, 4, policy=policy("eager"))
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-4)
    flops = 2 * sum(products(c, x) for c in convs) * (3 if training else 1)
    with torch.set_grad_enabled(training):
        measure(benchmark, forward_backward(run, *leaves(x, convs, bns)) if training else run, device, flops=flops)
