"""Images of usual sizes, letterboxed to 640x640: ``pytest --benchmark-only -k preprocess``."""

import pytest
import torch
from ops import competitors, measure, policy

from ffkernels import Policy
from ffkernels.ops.preprocess import preprocess


@pytest.mark.parametrize("height, width", [(640, 640), (480, 640), (768, 1024), (1080, 1920), (240, 320)])
@pytest.mark.parametrize("competitor,device", competitors("preprocess"))
def test_preprocess(benchmark, competitor, device, height, width):
    benchmark.group = f"preprocess {height}x{width} {device}"
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator).to(device)
    scale = min(640 / height, 640 / width)
    size = round(height * scale), round(width * scale)

    def run():
        return preprocess(image, size, (640, 640), policy=policy(competitor))

    # PyTorch places the filter in float32, which moves a pixel of 255 by up to 0.01.
    expected = preprocess(image, size, (640, 640), policy=Policy("0"))
    torch.testing.assert_close(run(), expected, rtol=0, atol=2e-2)
    measure(benchmark, run, device, image.nbytes + expected.nbytes)
