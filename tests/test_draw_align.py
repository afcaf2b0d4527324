"""Drawn pictures, the similarity transform and aligned crops."""

import numpy as np
import pytest
import torch
from marks import LANDMARKS, paint
from PIL import Image

from featherface.align import ARCFACE_TEMPLATE, align, align_faces, similarity_transform
from featherface.detections import Detections
from featherface.draw import BOX_COLOUR, draw_faces
from featherface.errors import ImageError


def faces(boxes, size):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    points = centre[:, None] + (boxes[:, 2:] - boxes[:, :2])[:, None] * np.array(LANDMARKS, np.float32)
    return Detections(boxes, np.linspace(0.99, 0.5, len(boxes), dtype=np.float32), points.astype(np.float32), size)


def test_drawing_marks_a_copy():
    image = paint(200, 300, [])
    before = image.copy()
    picture = draw_faces(image, faces([[50, 60, 150, 160]], (200, 300)), scores=False, line_width=2)
    assert isinstance(picture, Image.Image) and picture.size == (300, 200) and (image == before).all()
    pixels = np.asarray(picture)
    green = (pixels == BOX_COLOUR).all(axis=2)
    rows, columns = green.nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (60, 159, 50, 149)
    assert green[60:62, 50:150].all() and green[60:160, 148:150].all() and not green[64:150, 54:140].any()
    assert (pixels[110, 100] == (255, 220, 0)).all()


def test_drawing_scores_and_landmarks_is_optional():
    found = faces([[50, 60, 150, 160]], (200, 300))
    image = paint(200, 300, [])
    plain = np.asarray(draw_faces(image, found, scores=False, landmarks=False))
    assert (np.asarray(draw_faces(image, found, scores=True, landmarks=False)) != plain).any()
    assert (np.asarray(draw_faces(image, found, scores=False, landmarks=True)) != plain).any()
    assert (np.asarray(draw_faces(Image.fromarray(image), found)) == np.asarray(draw_faces(image, found))).all()
    assert draw_faces(Image.fromarray(image).convert("L"), found).mode == "RGB"


def test_drawing_takes_what_the_detector_takes(tmp_path):
    image = paint(200, 300, [])
    found = faces([[50, 60, 150, 160]], (200, 300))
    expected = np.asarray(draw_faces(image, found))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(image)).save(tmp_path / "turned.png", exif=exif)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    for source in (image.astype(np.float32), tensor, tensor.double(), tmp_path / "turned.png"):
        assert (np.asarray(draw_faces(source, found)) == expected).all()
    with Image.open(tmp_path / "turned.png") as turned:
        assert turned.size == (200, 300)
        assert (np.asarray(draw_faces(turned, found)) == expected).all()
    with pytest.raises(ImageError, match="found in an image of 300x200 pixels, this has 200x300"):
        draw_faces(np.ascontiguousarray(np.rot90(image)), found)


def test_drawing_of_nothing_and_of_extreme_boxes():
    image = paint(40, 30, [])
    assert (np.asarray(draw_faces(image, Detections.empty((40, 30)))) == image).all()
    extreme = [[0, 0, 30, 40], [0, 0, 0.2, 0.1], [29.5, 39.5, 30, 40], [3, 3, 4, 4]]
    assert draw_faces(image, faces(extreme, (40, 30))).size == (30, 40)
    assert draw_faces(paint(1, 1, []), faces([[0, 0, 1, 1]], (1, 1))).size == (1, 1)


@pytest.mark.parametrize("angle", [0.0, 0.5, -2.0, 3.1])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_similarity_is_recovered(angle, scale):
    generator = np.random.default_rng(0)
    points = generator.normal(size=(5, 2)) * 20
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = similarity_transform(points, scale * points @ rotation.T + [3.0, -7.0])
    np.testing.assert_allclose(matrix[:, :2], scale * rotation, atol=1e-9 * scale)
    np.testing.assert_allclose(matrix[:, 2], [3, -7], atol=1e-9 * scale)


def test_similarity_is_the_least_squares_one():
    generator = np.random.default_rng(1)
    source, target = generator.normal(size=(5, 2)), generator.normal(size=(5, 2))
    matrix = similarity_transform(source, target)
    assert np.linalg.det(matrix[:, :2]) > 0
    # The same fit as a linear problem in (a, b, tx, ty): x' = a x - b y + tx, y' = b x + a y + ty.
    x, y = source.T
    one, zero = np.ones(5), np.zeros(5)
    system = np.vstack((np.stack((x, -y, one, zero), axis=1), np.stack((y, x, zero, one), axis=1)))
    a, b, tx, ty = np.linalg.lstsq(system, target.T.ravel(), rcond=None)[0]
    np.testing.assert_allclose(matrix, [[a, -b, tx], [b, a, ty]], atol=1e-9)


def test_mirrored_points_give_a_rotation_not_a_reflection():
    source = ARCFACE_TEMPLATE
    matrix = similarity_transform(source, source * [-1, 1])
    assert np.linalg.det(matrix[:, :2]) > 0


@pytest.mark.parametrize(
    "source, message",
    [
        (np.ones((5, 2)), "coincide"),
        (np.full((5, 2), np.nan), "finite"),
        (np.ones((4, 2)), "shapes"),
        (np.ones((5, 3)), "shapes"),
    ],
)
def test_similarity_rejects(source, message):
    with pytest.raises(ValueError, match=message):
        similarity_transform(source, ARCFACE_TEMPLATE)


def turned_template(image_side, scale, angle):
    """Landmarks of a face of the template's shape, scaled, turned and centred in a square image."""
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (ARCFACE_TEMPLATE - 56) @ rotation.T * scale + image_side / 2


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0, 6.5])
@pytest.mark.parametrize("angle", [0.0, 0.6, 2.5])
def test_crops_bring_landmarks_to_the_template(scale, angle):
    landmarks = turned_template(900, scale, angle)
    yy, xx = np.mgrid[:900, :900]
    # A bright spot around each landmark: its centre of mass is found again in the crop.
    spots = sum(np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * (2.5 * scale) ** 2)) for x, y in landmarks)
    image = np.rint(255 * np.clip(spots, 0, 1)).astype(np.uint8)[..., None].repeat(3, axis=2)
    crop = align(image, landmarks)
    assert crop.shape == (112, 112, 3) and crop.dtype == np.uint8
    yy, xx = np.mgrid[:112, :112]
    for x, y in ARCFACE_TEMPLATE:
        weight = crop[..., 0] * ((xx - x) ** 2 + (yy - y) ** 2 <= 7**2).astype(float)
        centre = np.array([(weight * xx).sum(), (weight * yy).sum()]) / weight.sum()
        np.testing.assert_allclose(centre, [x, y], atol=0.15)


def test_crops_agree_with_scikit_image():
    transform = pytest.importorskip("skimage.transform")
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (30, 30, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    landmarks = turned_template(240, 1.3, 0.4)
    matrix = np.vstack((similarity_transform(landmarks, ARCFACE_TEMPLATE), [0, 0, 1]))
    expected = transform.warp(image, np.linalg.inv(matrix), output_shape=(112, 112), order=1, preserve_range=True)
    assert np.abs(align(image, landmarks).astype(float) - expected).max() <= 1.5


def test_crops_of_other_sizes_and_at_the_border():
    landmarks = turned_template(200, 1.0, 0.0)
    image = np.full((200, 200, 3), 200, np.uint8)
    assert align(image, landmarks, size=224).shape == (224, 224, 3)
    half_outside = align(image, landmarks - [100, 0])
    assert (half_outside[:, :40] == 0).all() and (half_outside[5:-5, 80:] == 200).all()
    assert (align(image, landmarks + 1000) == 0).all()


def test_all_faces_of_an_image():
    image = paint(200, 300, [])
    found = faces([[50, 60, 150, 160], [160, 20, 220, 90]], (200, 300))
    assert align_faces(image, found).shape == (2, 112, 112, 3)
    assert align_faces(image, Detections.empty((200, 300))).shape == (0, 112, 112, 3)
    for source in (Image.fromarray(image), torch.from_numpy(image).permute(2, 0, 1), image.astype(np.float64)):
        assert np.array_equal(align_faces(source, found), align_faces(image, found))
    with pytest.raises(ImageError, match="found in an image of 300x200 pixels, this has 150x100"):
        align_faces(image[::2, ::2], found)
    with pytest.raises(ImageError, match="one image"):
        align_faces([image], found)


def test_align_rejects():
    landmarks = turned_template(50, 0.3, 0)
    with pytest.raises(ImageError, match="coincide"):
        align(np.zeros((50, 50, 3), np.uint8), np.zeros((5, 2)))
    for image in ("a.png", np.zeros((50, 50), np.uint8), np.zeros((50, 50, 3)), np.zeros((0, 50, 3), np.uint8)):
        with pytest.raises(ImageError, match="aligned crop needs"):
            align(image, landmarks)
