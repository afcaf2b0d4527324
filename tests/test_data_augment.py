"""Views: geometry against the pixels, colours against formulas, JPEG against Pillow's."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from featherface.data import Augmentation, jpeg
from featherface.data.augment import (
    FILL,
    Faces,
    Look,
    Placed,
    View,
    blur,
    crop,
    crop_table,
    develop,
    draw_view,
    generator,
    join_quarters,
    view_faces,
)
from featherface.data.store import PixelStore
from ffkernels.ops.preprocess import MEAN

NOTHING = np.empty((0, 4))
PLAIN = Augmentation(mirror=0, distort=0, grey=0, blur=0, jpeg=0)


def plain_view(source, target, mirror=False, **changes):
    view = View(source, target, mirror, True, np.eye(3), 0.0, 0.0, 0.0)
    return view._replace(**changes)


def seen_in(pixels, view, size):
    """The view of one photograph, (3, size, size)."""
    sizes, scales = np.array([pixels.shape[:2]]), np.ones((1, 2))
    store = PixelStore(pixels.flatten(), np.zeros(1, np.int64), sizes, scales, {})
    return crop(store.pixels, crop_table(store, [Placed(0, view, 0, 0, 0, size)]), 1, size)[0]


def test_the_numbers_of_a_view_depend_on_seed_epoch_and_image_alone():
    drawn = [generator(*key).random(3).tolist() for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0))]
    assert drawn[0] == drawn[4]
    assert len({tuple(row) for row in drawn}) == 4


@pytest.mark.parametrize("mirror", [0.0, 1.0])
@pytest.mark.parametrize("scale", [0.3, 0.8, 1.0, 1.3, 2.0])
def test_faces_stay_where_their_pixels_are(scale, mirror):
    """A white rectangle as face, and five coloured marks as landmarks, found again in the view."""
    config = Augmentation(scales=[scale], mirror=mirror, aliased=1.0, distort=0, grey=0, blur=0, jpeg=0)
    box, image = np.array([[60.0, 40.0, 100.0, 90.0]]), Image.new("RGB", (150, 120), (10, 60, 20))
    draw = ImageDraw.Draw(image)
    draw.rectangle((60, 40, 99, 89), fill=(255, 255, 255))
    eyes = np.array([[70.0, 50.0], [90.0, 50.0], [80.0, 65.0], [72.0, 80.0], [88.0, 80.0]])
    for index, (x, y) in enumerate(eyes):
        draw.rectangle((x - 3, y - 3, x + 2, y + 2), fill=(50 * index, 0, 0))
    pixels = torch.from_numpy(np.array(image))
    for index in range(6):
        view = draw_view(generator(7, 0, index), 150, 120, box, config, 96)
        out = seen_in(pixels, view, 96)
        faces = view_faces(view, box, eyes[None], NOTHING, 96, 0.0)
        assert len(faces.boxes) == 1 and len(faces.ignored) == 0
        x1, y1, x2, y2 = (faces.boxes[0] * 96).tolist()
        ys, xs = np.nonzero((out[2] > 128).numpy())
        found = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert np.abs(np.array(found) - [x1, y1, x2, y2]).max() <= 1.5
        points = faces.landmarks[0] * 96
        if scale <= 1:
            for number, (x, y) in enumerate(points):
                if 1 <= x < 95 and 1 <= y < 95:
                    shown = (1, 0, 2, 4, 3)[number] if mirror else number
                    assert out[:, int(y), int(x)].tolist() == pytest.approx([50 * shown, 0, 0], abs=2)


def test_crops_hold_a_face_and_zoom_out_shows_the_mean():
    config = Augmentation(scales=[0.3, 2.0], tries=200)
    box = np.array([[140.0, 100.0, 150.0, 112.0]])
    pixels = torch.zeros(160, 200, 3, dtype=torch.uint8)
    kinds = set()
    for index in range(20):
        view = draw_view(generator(0, 0, index), 200, 160, box, config, 64)
        assert len(view_faces(view, box, np.full((1, 5, 2), np.nan), NOTHING, 64, 0.0).boxes) == 1
        out = seen_in(pixels, view, 64)
        zoomed = view.target[2:] != (64, 64)
        kinds.add(zoomed)
        colours = {tuple(colour) for colour in out.flatten(1).T.tolist()}
        assert colours == ({(0, 0, 0), FILL} if zoomed else {(0, 0, 0)})
    assert kinds == {True, False}


@pytest.mark.parametrize("extent", [6.0, 30.0, 110.0])
def test_anchor_sampling_shows_a_whole_face_at_every_side(extent):
    config = Augmentation(scales=[0.2, 4.0], anchor_sampling=1.0, anchor_sides=[8.0, 640.0], mirror=0, jpeg=0, blur=0)
    box = np.array([[20.0, 5.0, 20 + 0.8 * extent, 5 + extent]])
    sides = []
    for index in range(300):
        view = draw_view(generator(0, 0, index), 150, 120, box, config, 96)
        (seen,) = view_faces(view, box, np.full((1, 5, 2), np.nan), NOTHING, 96, 0.0).boxes * 96
        assert (seen[2] - seen[0]) / (seen[3] - seen[1]) == pytest.approx(0.8, rel=0.2)
        sides.append(seen[3] - seen[1])
    smallest, largest = max(8.0, 96 * extent / (4 * 120)), min(96.0, 96 * extent / (0.2 * 120))
    assert min(sides) < 1.2 * smallest and max(sides) > 0.85 * largest
    assert smallest / 1.1 <= min(sides) and max(sides) <= 1.05 * largest
    middle = math.sqrt(smallest * largest)
    assert 0.2 < np.mean(np.array(sides) < middle) < 0.8


def test_mirrored_landmarks_change_sides():
    view = plain_view((0, 0, 100, 100), (0, 0, 100, 100), mirror=True)
    points = np.array([[[30.0, 40], [70, 40], [50, 55], [35, 70], [65, 70]]])
    faces = view_faces(view, np.array([[20.0, 20, 80, 90]]), points, NOTHING, 100, 0.0)
    np.testing.assert_allclose(faces.landmarks[0] * 100, [[30, 40], [70, 40], [50, 55], [35, 70], [65, 70]], atol=1e-4)
    points[0, 0] = np.nan
    faces = view_faces(view, np.array([[20.0, 20, 80, 90]]), points, NOTHING, 100, 0.0)
    assert np.isnan(faces.landmarks[0, 1]).all() and not np.isnan(faces.landmarks[0, 0]).any()


def test_faces_are_cut_dropped_or_ignored():
    view = plain_view((50, 50, 100, 100), (0, 0, 100, 100))
    boxes = np.array([[40.0, 60, 70, 90], [0, 60, 60, 90], [100, 100, 103, 103]])
    faces = view_faces(view, boxes, np.full((3, 5, 2), np.nan), np.array([[120.0, 120, 200, 200]]), 100, 4.0)
    # The first is cut at the border, the second has its centre outside, the third is too small.
    np.testing.assert_allclose(faces.boxes * 100, [[0, 10, 20, 40]], atol=1e-4)
    np.testing.assert_allclose(faces.ignored * 100, [[70, 70, 100, 100], [43.5, 43.5, 59.5, 59.5]], atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (640, 3)])
def test_extreme_photographs_have_views(size):
    width, height = size
    for index in range(20):
        view = draw_view(generator(0, 0, index), width, height, NOTHING, Augmentation(), 32)
        assert seen_in(torch.zeros(height, width, 3, dtype=torch.uint8), view, 32).shape == (3, 32, 32)
        assert min(view.source[2:]) >= 1 and min(view.target[2:]) >= 1
        assert view.source[0] + view.source[2] <= width and view.source[1] + view.source[3] <= height
        assert view.target[0] + view.target[2] <= 32 and view.target[1] + view.target[3] <= 32


def test_developing_an_untouched_view_gives_the_networks_input():
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    views = [plain_view((0, 0, 9, 9), (4, 0, 28, 30)), plain_view((0, 0, 9, 9), (4, 0, 28, 30), mirror=True)]
    result = develop(pixels, Look.of(views, [[view.window(32)] for view in views]))
    expected = pixels.flip(1).float() - torch.tensor(MEAN)[:, None, None]
    expected[:, :, 30:] = 0
    expected[0, :, :, :4] = 0
    expected[1, :, :, 28:] = 0
    assert torch.equal(result, expected)


def test_developing_a_mosaic_leaves_out_what_no_photograph_covers():
    pixels = torch.randint(1, 256, (2, 3, 32, 32), dtype=torch.uint8)
    view = plain_view((0, 0, 9, 9), (0, 0, 32, 32))
    result = develop(pixels, Look.of([view, view], [[(0, 0, 16, 16), (20, 16, 32, 32)], [(0, 0, 32, 32)]]))
    covered = torch.zeros(32, 32, dtype=torch.bool)
    covered[:16, :16] = covered[16:, 20:] = True
    expected = pixels.flip(1).float() - torch.tensor(MEAN)[:, None, None]
    expected[0] *= covered
    assert torch.equal(result, expected)


def test_quarters_join_where_they_stand():
    points = np.full((1, 5, 2), 0.5, np.float32)
    quarter = Faces(np.array([[0.2, 0.4, 0.6, 1.0]], np.float32), points, np.array([[0, 0, 1, 1]], np.float32))
    faces = join_quarters([quarter] * 4)
    corners = np.array([[0, 0], [0.5, 0], [0, 0.5], [0.5, 0.5]])
    np.testing.assert_allclose(faces.boxes, np.add([0.1, 0.2, 0.3, 0.5], np.tile(corners, 2)), atol=1e-6)
    np.testing.assert_allclose(faces.landmarks, 0.25 + corners[:, None].repeat(5, 1), atol=1e-6)
    np.testing.assert_allclose(faces.ignored, np.add([0, 0, 0.5, 0.5], np.tile(corners, 2)), atol=1e-6)


def test_colours_follow_their_formulas():
    """Extreme draws: full contrast change, grey, hue that leaves grey alone."""
    rng = np.random.default_rng(0)
    config = Augmentation(distort=1.0, grey=1.0)
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    view = draw_view(rng, 40, 40, NOTHING, config, 32)
    view = view._replace(target=(0, 0, 32, 32), sigma=0.0, quality=0.0, offset=0.0)
    grey = develop(pixels, Look.of([view], [[view.window(32)]])) + torch.tensor(MEAN)[:, None, None]
    assert torch.allclose(grey[:, 0], grey[:, 1]) and torch.allclose(grey[:, 0], grey[:, 2])
    for _ in range(20):
        matrix = draw_view(rng, 40, 40, NOTHING, Augmentation(distort=1.0, grey=0.0, contrast=0.0), 32).matrix
        np.testing.assert_allclose(matrix @ np.ones(3), np.ones(3), atol=1e-12)


def test_blur_is_a_normalised_gaussian():
    image = torch.zeros(2, 3, 33, 33)
    image[:, :, 16, 16] = 1
    result = blur(image, [1.0, 2.0])
    assert torch.allclose(result.sum((2, 3)), torch.ones(2, 3), atol=1e-5)
    x = torch.arange(33.0) - 16
    for index, sigma in enumerate((1.0, 2.0)):
        kernel = torch.exp(-0.5 * (x / sigma) ** 2) * (x.abs() <= 6)
        kernel /= kernel.sum()
        torch.testing.assert_close(result[index, 0], torch.outer(kernel, kernel), atol=1e-6, rtol=1e-4)
    assert torch.allclose(blur(torch.full((1, 3, 8, 8), 7.0), [1.5]), torch.full((1, 3, 8, 8), 7.0))


@pytest.mark.parametrize("quality", [20, 50, 90])
def test_jpeg_loses_what_pillows_encoder_loses(quality):
    rng = np.random.default_rng(quality)
    smooth = Image.fromarray(rng.integers(0, 256, (12, 14, 3), np.uint8)).resize((112, 96), Image.Resampling.BICUBIC)
    original = np.array(smooth).astype(np.float32)
    buffer = io.BytesIO()
    smooth.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    pillow = np.array(Image.open(buffer)).astype(np.float32)
    batch = torch.from_numpy(original).permute(2, 0, 1)[None]
    ours = jpeg(torch.cat([batch, batch]), [quality, 100])[0].permute(1, 2, 0).numpy()
    loss = np.sqrt(np.mean((pillow - original) ** 2))
    assert np.sqrt(np.mean((ours - pillow) ** 2)) < 0.5 * loss
    assert np.sqrt(np.mean((ours - original) ** 2)) == pytest.approx(loss, rel=0.2)
    with pytest.raises(ValueError, match="16"):
        jpeg(torch.zeros(1, 3, 24, 32), [50])


def test_develop_is_colours_then_blur_then_jpeg_of_each_view():
    config = Augmentation(distort=1.0, grey=0.0, blur=1.0, jpeg=1.0, mirror=0.0)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = [draw_view(generator(1, 0, i), 40, 40, NOTHING, config, 32) for i in range(3)]
    views = [view._replace(target=(0, 0, 32, 32)) for view in views]
    result = develop(pixels, Look.of(views, [[view.window(32)] for view in views]))
    for i, view in enumerate(views):
        rgb = np.einsum("ij,jhw->ihw", view.matrix, pixels[i].double().numpy()) + view.offset
        rgb = torch.from_numpy(rgb).clamp(0, 255).float()[None]
        expected = jpeg(blur(rgb, [view.sigma]), [view.quality])[0].flip(0) - torch.tensor(MEAN)[:, None, None]
        torch.testing.assert_close(result[i], expected, atol=0.5, rtol=0)


def test_drawn_colours_keep_within_their_bounds_and_reach_them():
    def drawn(**options):
        config = Augmentation(**{"distort": 1.0, "grey": 0.0, **options})
        return [draw_view(generator(2, 0, i), 40, 40, NOTHING, config, 32) for i in range(300)]

    nothing = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    grey = np.ones(3)
    bright = np.array([view.offset for view in drawn(**nothing | {"brightness": 32.0})])
    assert -32 <= bright.min() < -20 and 20 < bright.max() <= 32
    contrast = np.array([(view.matrix @ grey).mean() for view in drawn(**nothing | {"contrast": 0.5})])
    assert 0.5 <= contrast.min() < 0.6 and 1.4 < contrast.max() <= 1.5
    for options in ({"saturation": 0.5}, {"hue": 18.0}):
        matrices = np.array([view.matrix for view in drawn(**nothing | options)])
        np.testing.assert_allclose(matrices @ grey, np.broadcast_to(grey, (300, 3)), atol=2e-2)
        assert np.abs(matrices - np.eye(3)).max() > 0.1
    assert all(np.array_equal(view.matrix, np.eye(3)) and view.offset == 0 for view in drawn(distort=0.0))
