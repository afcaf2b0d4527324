"""Views of photographs on GPUs: against PyTorch's resize, in batches with squares of every kind."""

import pytest
import torch
from backends import backends

from ffkernels import FusedKernelRequired, Policy
from ffkernels.ops.crop_resize import crop_resize

FILL = (123, 117, 104)
CUDA = backends("crop_resize")
SIZES = [(50, 70), (33, 40), (1, 90), (64, 1), (1, 1)]


def photographs():
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (h, w, 3), dtype=torch.uint8, generator=generator) for h, w in SIZES]
    starts = [sum(3 * h * w for h, w in SIZES[:i]) for i in range(len(SIZES))]
    return torch.cat([image.flatten() for image in images]), starts


PIXELS, STARTS = photographs()


def view(photograph, source, target, image=0, square=(0, 0, 32), mirror=0, antialias=1):
    return [STARTS[photograph], SIZES[photograph][1], *source, *target, mirror, antialias, image, *square]


WHOLE = (0, 0, 32, 32)
CASES = {
    "reduced": [view(0, (0, 0, 70, 50), WHOLE)],
    "reduced without a filter": [view(0, (0, 0, 70, 50), WHOLE, antialias=0)],
    "enlarged": [view(1, (5, 6, 11, 9), WHOLE, mirror=1)],
    "enlarged without a filter": [view(1, (5, 6, 11, 9), WHOLE, antialias=0)],
    "own size": [view(1, (8, 1, 32, 32), WHOLE, mirror=1)],
    "zoomed out": [view(0, (0, 0, 70, 50), (3, 10, 17, 20), mirror=1)],
    "extreme photographs": [
        view(2, (0, 0, 90, 1), (0, 7, 32, 1), 0),
        view(3, (0, 0, 1, 64), (9, 0, 1, 32), 1, mirror=1),
        view(4, (0, 0, 1, 1), WHOLE, 2, antialias=0),
        view(2, (89, 0, 1, 1), (31, 31, 1, 1), 3),
    ],
    "mosaic": [
        view(0, (3, 4, 40, 40), (0, 0, 16, 16), 1, (0, 0, 16)),
        view(1, (0, 0, 40, 33), (1, 5, 12, 9), 1, (16, 0, 16), mirror=1),
        view(2, (10, 0, 60, 1), (0, 8, 16, 1), 1, (0, 16, 16), antialias=0),
        view(0, (20, 10, 30, 30), (0, 0, 16, 16), 1, (16, 16, 16), mirror=1),
        view(0, (0, 0, 64, 48), (0, 4, 32, 24), 0),
    ],
}


@pytest.mark.parametrize("gpu", CUDA)
@pytest.mark.parametrize("name", CASES)
def test_gpu_crop_resize(gpu, name):
    views = torch.tensor(CASES[name])
    images = int(views[:, 12].max()) + 1
    expected = crop_resize(PIXELS, views, images, 32, FILL, policy=Policy("0"))
    found = crop_resize(PIXELS.to(gpu.device), views, images, 32, FILL, policy=gpu.policy).cpu()
    assert found.shape == (images, 3, 32, 32) and found.dtype == torch.uint8
    difference = (found.int() - expected.int()).abs()
    # PyTorch resizes 8 bits in whole numbers, along one axis after the other.
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.2


@pytest.mark.parametrize("gpu", CUDA)
def test_more_views_than_a_grid_has_are_refused(gpu):
    views = torch.tensor([view(4, (0, 0, 1, 1), (0, 0, 1, 1), image, (0, 0, 1)) for image in range(65536)])
    with pytest.raises(FusedKernelRequired, match="more than 65,535 views"):
        crop_resize(PIXELS.to(gpu.device), views, len(views), 1, FILL, policy=gpu.policy)


@pytest.mark.parametrize("gpu", CUDA)
def test_no_views(gpu):
    assert crop_resize(PIXELS.to(gpu.device), torch.empty(0, 16).long(), 0, 32, FILL, policy=gpu.policy).shape[0] == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({2: 31}, "leaves its photograph"),
        ({0: len(PIXELS) - 100}, "leaves its photograph"),
        ({8: 0}, "its square"),
        ({6: 1}, "its square"),
        ({12: 1}, "images"),
        ({13: 1}, "images"),
        ({15: 64}, "images"),
    ],
)
def test_bad_views_are_refused(changes, message):
    row = view(0, (0, 0, 40, 40), WHOLE)
    assert crop_resize(PIXELS, torch.tensor([row]), 1, 32, FILL).shape == (1, 3, 32, 32)
    for column, value in changes.items():
        row[column] = value
    with pytest.raises(ValueError, match=f"crop_resize: view 0 .*{message}"):
        crop_resize(PIXELS, torch.tensor([row]), 1, 32, FILL)


@pytest.mark.parametrize("pixels", [PIXELS.float(), PIXELS[::2], PIXELS[None]])
def test_bad_pixels_are_refused(pixels):
    with pytest.raises(ValueError, match=r"pixels are .* expected"):
        crop_resize(pixels, torch.tensor([view(4, (0, 0, 1, 1), WHOLE)]), 1, 32, FILL)


def test_bad_tables_and_colours_are_refused():
    with pytest.raises(ValueError, match=r"views are \(1, 3\)"):
        crop_resize(PIXELS, torch.zeros(1, 3).long(), 1, 32, FILL)
    with pytest.raises(ValueError, match="fill is"):
        crop_resize(PIXELS, torch.tensor([view(4, (0, 0, 1, 1), WHOLE)]), 1, 32, (0, 0, 256))
