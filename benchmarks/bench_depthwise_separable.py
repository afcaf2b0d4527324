"""The blocks of the backbone: ``pytest --benchmark-only -k depthwise_separable``."""

import pytest
import torch
from layers import conv, image, leaves, norm, products
from ops import competitors, forward_backward, measure, policy

import ffkernels

# channels, out_channels, stride, height
LAYERS = [
    (8, 16, 1, 160),
    (16, 32, 2, 160),
    (32, 32, 1, 80),
    (32, 64, 2, 80),
    (64, 64, 1, 40),
    (64, 128, 2, 40),
    (128, 128, 1, 20),
    (128, 256, 2, 20),
    (256, 256, 1, 10),
]


@pytest.mark.parametrize("mode", ["evaluation", "training"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: "-".join(map(str, layer)))
@pytest.mark.parametrize("competitor,device", competitors("depthwise_separable"))
def test_depthwise_separable(benchmark, competitor, device, layer, mode):
    channels, out, stride, height = layer
    benchmark.group = f"depthwise_separable {'-'.join(map(str, layer))} {mode} {device}"
    training = mode == "training"
    depthwise, pointwise = conv(channels, channels, 3, stride, channels), conv(out, channels, 1)
    params = depthwise, norm(channels, training), pointwise, norm(out, training)
    x = image(channels, height, training)

    def run(*_):
        return ffkernels.depthwise_separable(x, *params, policy=policy(competitor))

    expected = ffkernels.depthwise_separable(x, *params, policy=policy("eager"))
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-4)
    flops = 2 * (products(depthwise, x) + products(pointwise, expected)) * (3 if training else 1)
    with torch.set_grad_enabled(training):
        measure(benchmark, forward_backward(run, *leaves(x, params)) if training else run, device, flops=flops)
