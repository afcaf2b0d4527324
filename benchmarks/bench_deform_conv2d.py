"""The deformable convolutions of V1's context at 640x640: ``pytest --benchmark-only -k deform_conv2d``."""

import pytest
import torch
from ops import competitors, forward_backward, measure, policy

import ffkernels
from ffkernels import ConvParams, Policy

# (channels, out_channels, height and width); the first two and three of the last kind per level
LAYERS = [(c, o, size) for size in (80, 40, 20) for c, o in ((56, 28), (56, 14), (14, 14))]


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("competitor,device", competitors("deform_conv2d"))
def test_deform_conv2d(benchmark, competitor, device, layer, mode):
    channels, outputs, size = layer
    benchmark.group = f"deform_conv2d {channels}->{outputs} {size}x{size} {mode} {device}"
    training = mode != "forward"

    def tensor(*shape, scale=1.0):
        x = torch.randn(shape, device=device) * scale
        return (x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x).requires_grad_(training)

    x, offset, mask = tensor(1, channels, size, size), tensor(1, 18, size, size), tensor(1, 9, size, size)
    weight = tensor(outputs, channels, 3, 3, scale=0.05)

    def run(x, offset, mask, weight):
        conv = ConvParams(weight, padding=1)
        return ffkernels.deform_conv2d(x, offset, mask, conv, None, "leaky_relu", policy=policy(competitor))

    inputs = x, offset, mask, weight
    expected = ffkernels.deform_conv2d(
        *inputs[:3], ConvParams(weight, padding=1), None, "leaky_relu", policy=Policy("0")
    )
    torch.testing.assert_close(run(*inputs), expected, rtol=1e-4, atol=1e-4)
    # A sample is four multiplications and additions per channel and one by the mask; the backward pass is twice that.
    flops = 9 * size * size * channels * (2 * outputs + 9) * (3 if training else 1)
    moved = sum(t.nbytes for t in (*inputs, expected)) * (3 if training else 1)
    measure(benchmark, forward_backward(run, *inputs) if training else lambda: run(*inputs), device, moved, flops)
