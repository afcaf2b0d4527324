"""Views of a batch of photographs, as the training's loader makes them: ``pytest --benchmark-only -k crop_resize``."""

import pytest
import torch
from ops import competitors, measure, policy

from ffkernels import Policy
from ffkernels.ops.crop_resize import crop_resize

HEIGHT, WIDTH, SIZE = 640, 960, 640


@pytest.mark.parametrize("batch", [8, 64])
@pytest.mark.parametrize("competitor,device", competitors("crop_resize"))
def test_crop_resize(benchmark, competitor, device, batch):
    benchmark.group = f"crop_resize, {batch} of {SIZE}x{SIZE}, {device}"
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8 * HEIGHT * WIDTH * 3,), dtype=torch.uint8, generator=generator).to(device)
    rows = []
    for image in range(batch):
        side = int(torch.randint(200, HEIGHT + 1, (), generator=generator))
        offset = image % 8 * HEIGHT * WIDTH * 3
        rows.append([offset, WIDTH, 100, 0, side, side, 0, 0, SIZE, SIZE, image % 2, 1, image, 0, 0, SIZE])
    views = torch.tensor(rows)

    def run():
        return crop_resize(pixels, views, batch, SIZE, (123, 117, 104), policy=policy(competitor))

    expected = crop_resize(pixels, views, batch, SIZE, (123, 117, 104), policy=Policy("0"))
    assert (run().int() - expected.int()).abs().max() <= 1
    measure(benchmark, run, device, int(3 * views[:, 4].square().sum()) + expected.nbytes)
