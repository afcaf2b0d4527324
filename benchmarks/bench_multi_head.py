"""Detection heads of V2 (shared trunk) and V1 (1x1) on three levels: ``pytest --benchmark-only -k multi_head``."""

import pytest
import torch
from layers import conv, image, leaves, norm, products
from ops import competitors, measure, policy

import ffkernels
from ffkernels import HeadParams

HEADS = {"V2": (32, 16), "V1 56": (56, None), "V1 74": (74, None)}


@pytest.mark.parametrize("mode", ["evaluation", "training"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("competitor,device", competitors("multi_head"))
def test_multi_head(benchmark, competitor, device, head, mode):
    benchmark.group = f"multi_head {head} {mode} {device}"
    training = mode == "training"
    channels, hidden = HEADS[head]
    levels = [image(channels, height, training) for height in (40, 20, 10)]
    heads = [
        HeadParams(
            conv(hidden, channels, 3) if hidden else None,
            norm(hidden, training) if hidden else None,
            *(conv(2 * k, hidden or channels, 1, bias=True) for k in (2, 4, 10)),
        )
        for _ in levels
    ]

    def run():
        return ffkernels.multi_head(levels, heads, not training, policy=policy(competitor))

    expected = ffkernels.multi_head(levels, heads, not training, policy=policy("eager"))
    for mine, theirs in zip(run(), expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    grads, wanted = [torch.randn_like(y) for y in expected], leaves(levels, heads)
    flops = 2 * sum(products(c, x) for x, h in zip(levels, heads) for c in (h.trunk, h.bbox, h.cls, h.landmarks) if c)
    with torch.set_grad_enabled(training):
        measure(
            benchmark,
            (lambda: torch.autograd.grad(run(), wanted, grads)) if training else run,
            device,
            flops=flops * (3 if training else 1),
        )
