"""Convolution, batch normalisation and activation on V2's layers: ``pytest --benchmark-only -k grouped_conv``."""

import pytest
import torch
from layers import conv, image, leaves, norm, products
from ops import competitors, forward_backward, measure, policy

import ffkernels

# channels, out_channels, kernel, stride, groups, height, activation
LAYERS = [
    (3, 8, 3, 2, 1, 320, "leaky_relu"),
    (64, 32, 1, 1, 1, 40, "none"),
    (128, 32, 1, 1, 1, 20, "none"),
    (256, 32, 1, 1, 1, 10, "none"),
    (32, 16, 3, 1, 4, 40, "none"),
    (32, 16, 3, 1, 1, 40, "relu"),
    (74, 74, 3, 1, 1, 40, "relu"),
]


@pytest.mark.parametrize("mode", ["evaluation", "training"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: "-".join(map(str, layer)))
@pytest.mark.parametrize("competitor,device", competitors("grouped_conv_bn_act"))
def test_grouped_conv_bn_act(benchmark, competitor, device, layer, mode):
    channels, out, kernel, stride, groups, height, activation = layer
    benchmark.group = f"grouped_conv_bn_act {'-'.join(map(str, layer))} {mode} {device}"
    training = mode == "training"
    x, params = image(channels, height, training), (conv(out, channels, kernel, stride, groups), norm(out, training))

    def run(*_):
        return ffkernels.grouped_conv_bn_act(x, *params, activation, policy=policy(competitor))

    expected = ffkernels.grouped_conv_bn_act(x, *params, activation, policy=policy("eager"))
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-4)
    flops = 2 * products(params[0], x) * (3 if training else 1)
    with torch.set_grad_enabled(training):
        measure(benchmark, forward_backward(run, *leaves(x, params)) if training else run, device, flops=flops)
