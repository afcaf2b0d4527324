"""Random views of a photograph: square crop with zoom-out, mirror, colour, grey, blur, JPEG; mosaics of four views.

A view is drawn on the CPU from a generator of its own, so that it depends on (seed, epoch, image) alone and a run can
be resumed exactly; its pixels are computed in batches, on the device where they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ffkernels import Policy, cpu
from ffkernels.cpu.conv import empty_nhwc
from ffkernels.ops.crop_resize import crop_resize
from ffkernels.ops.preprocess import MEAN

from .jpeg import jpeg
from .store import PixelStore

FILL = tuple(round(value) for value in MEAN[::-1])
"""Red, green, blue outside the photograph: the networks' mean, which they see as zero."""

MIRRORED_LANDMARKS = (1, 0, 2, 4, 3)
LUMA = (0.299, 0.587, 0.114)
IGNORED_SIDE = 16.0
"""Faces too small to train on silence the anchors over a square of this many pixels, the smallest anchor's side."""


@dataclass
class Augmentation:
    """What a view may be. Probabilities are 0 to 1.

    Attributes:
        sizes: sides of the network's input in pixels, multiples of 32; each batch draws one.
        scales: sides of the square crop over the photograph's shorter side, one drawn for each view; above 1 the
            photograph is smaller than the input and stands somewhere in it.
        tries: crops drawn until one holds the centre of a face; the first of them is taken where none does.
        anchor_sampling: probability of a crop that shows one of the photograph's faces whole at a chosen side, so that
            large faces are seen as often as small ones (data-anchor-sampling, Tang et al. 2018, PyramidBox).
        anchor_sides: bounds of that side in pixels of the input, from which it is drawn log-uniformly; ``scales`` bound
            the crop here too.
        mosaic: probability of a view made of four of half its size, of four photographs, with the colours of the first
            (Bochkovskiy et al. 2020, YOLOv4): more and smaller faces and more background for the same work.
        min_face: faces whose shorter side is below this many pixels of the input are neither trained on nor negatives.
        mirror: probability of a mirrored view.
        aliased: probability of resizing without a low-pass filter, as detectors' input often is.
        brightness: largest value added, of 255.
        contrast, saturation: largest relative change: factors are drawn from 1 - value to 1 + value.
        hue: largest rotation of colours in degrees.
        distort: probability of each of the four above.
        grey: probability of a grey view.
        blur: probability of a Gaussian blur; ``blur_sigma`` are the bounds of its standard deviation in pixels.
        jpeg: probability of JPEG compression; ``jpeg_quality`` are the bounds of its quality.
    """

    sizes: list[int] = field(default_factory=lambda: [640])
    scales: list[float] = field(default_factory=lambda: [0.3, 0.45, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0])
    tries: int = 50
    anchor_sampling: float = 0.0
    anchor_sides: list[float] = field(default_factory=lambda: [12.0, 640.0])
    mosaic: float = 0.0
    min_face: float = 4.0
    mirror: float = 0.5
    aliased: float = 0.3
    brightness: float = 32.0
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 18.0
    distort: float = 0.5
    grey: float = 0.05
    blur: float = 0.1
    blur_sigma: list[float] = field(default_factory=lambda: [0.4, 2.0])
    jpeg: float = 0.15
    jpeg_quality: list[float] = field(default_factory=lambda: [30.0, 90.0])


class View(NamedTuple):
    """One view of an image of known size.

    Attributes:
        source: x, y, width, height of the part of the photograph that is seen, in its pixels.
        target: x, y, width, height of where that part stands in the input, in its pixels, before mirroring.
        mirror: the input is mirrored.
        aliased: resized without a low-pass filter.
        matrix: (3, 3) float64, colours of the view from colours of the photograph (red, green, blue).
        offset: added to them.
        sigma: of the blur in pixels, 0 for none.
        quality: of the JPEG compression, 0 for none.
    """

    source: tuple[int, int, int, int]
    target: tuple[int, int, int, int]
    mirror: bool
    aliased: bool
    matrix: np.ndarray
    offset: float
    sigma: float
    quality: float

    def window(self, size: int) -> tuple[int, int, int, int]:
        """x1, y1, x2, y2 of the photograph in the (mirrored) input of ``size`` pixels, in pixels."""
        x, y, width, height = self.target
        x = size - x - width if self.mirror else x
        return x, y, x + width, y + height


class Placed(NamedTuple):
    """A view of photograph ``index`` in a square of an image, in pixels."""

    index: int
    view: View
    image: int
    left: int
    top: int
    side: int


class Faces(NamedTuple):
    """Faces in a view; coordinates are fractions of the input's side.

    Attributes:
        boxes: (n, 4) float32, ``x1 y1 x2 y2``, cut at the input's border.
        landmarks: (n, 5, 2) float32, NaN where unknown.
        ignored: (m, 4) float32, regions in which nothing is a negative.
    """

    boxes: np.ndarray
    landmarks: np.ndarray
    ignored: np.ndarray


def generator(seed: int, epoch: int, index: int, time: int = 0) -> np.random.Generator:
    """The random numbers of image ``index`` in ``epoch``, where it is seen there for the ``time``-th time from 0 on: a
    Philox stream of its own."""
    key = np.array([seed % 2**64, (epoch << 32) + index], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, time]))


def draw_view(
    rng: np.random.Generator, width: int, height: int, boxes: np.ndarray, config: Augmentation, size: int
) -> View:
    """Draws a view of an image.

    Args:
        boxes: (n, 4), ``x1 y1 x2 y2`` of the faces to train on, in pixels.
        size: side of the view in pixels.
    """
    if len(boxes) and config.anchor_sampling and rng.random() < config.anchor_sampling:
        corner, side = _around_face(rng, width, height, boxes, config, size)
    else:
        corner, side = _around_centre(rng, width, height, boxes, config)
    source, target = _fit(corner, side, (width, height), size)
    mirror, aliased = rng.random() < config.mirror, rng.random() < config.aliased
    matrix, offset = _draw_colours(rng, config)
    sigma = rng.uniform(*config.blur_sigma) if rng.random() < config.blur else 0.0
    quality = rng.uniform(*config.jpeg_quality) if rng.random() < config.jpeg else 0.0
    return View(source, target, bool(mirror), bool(aliased), matrix, offset, float(sigma), float(quality))


def _around_centre(
    rng: np.random.Generator, width: int, height: int, boxes: np.ndarray, config: Augmentation
) -> tuple[list[int], int]:
    """Corner and side of a crop that holds the centre of a face, if there is one."""
    tries = config.tries if len(boxes) else 1
    sides = np.maximum(1, np.rint(rng.choice(config.scales, tries) * min(width, height))).astype(np.int64)
    corners = np.stack([_place(rng, length, sides) for length in (width, height)], axis=1)
    chosen = 0
    if len(boxes):
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = (centres >= corners[:, None]) & (centres < (corners + sides[:, None])[:, None])
        chosen = int(inside.all(axis=2).any(axis=1).argmax())
    return corners[chosen].tolist(), int(sides[chosen])


def _around_face(
    rng: np.random.Generator, width: int, height: int, boxes: np.ndarray, config: Augmentation, size: int
) -> tuple[list[int], int]:
    """Corner and side of a crop that holds a whole face, which it shows at a side drawn from ``anchor_sides``."""
    face = boxes[rng.integers(len(boxes))]
    extent = max(face[2:] - face[:2])
    smallest, largest = config.anchor_sides
    shown = math.exp(rng.uniform(math.log(smallest), math.log(max(smallest, min(largest, size)))))
    shorter = min(width, height)
    side = min(max(extent * size / shown, min(config.scales) * shorter), max(config.scales) * shorter)
    side = max(1, math.ceil(max(side, extent)))
    corner = []
    for low, high, length in zip(face[:2], face[2:], (width, height)):
        # Where the face is inside, and of those places the ones inside the photograph.
        first, last = high - side, low
        inside = np.clip([first, last], min(0, length - side), max(0, length - side))
        corner.append(math.floor(rng.uniform(*inside)))
    return corner, side


def _place(rng: np.random.Generator, length: int, sides: np.ndarray) -> np.ndarray:
    """Where crops of ``sides`` start along an axis: inside the photograph, or around it where they are longer."""
    room = length - sides
    return np.minimum(room, 0) + np.floor(rng.random(len(sides)) * (np.abs(room) + 1)).astype(np.int64)


def _fit(
    corner: list[int], side: int, lengths: tuple[int, int], size: int
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """The seen part of the photograph, and its place in the input; both in whole pixels and never empty."""
    starts, extents, targets, target_extents = [], [], [], []
    for low, length in zip(corner, lengths):
        first, last = max(low, 0), min(low + side, length)
        begin = min(round((first - low) * size / side), size - 1)
        end = max(round((last - low) * size / side), begin + 1)
        starts.append(first)
        extents.append(last - first)
        targets.append(begin)
        target_extents.append(end - begin)
    return (*starts, *extents), (*targets, *target_extents)


def _draw_colours(rng: np.random.Generator, config: Augmentation) -> tuple[np.ndarray, float]:
    brightness, contrast, saturation, hue = np.where(rng.random(4) < config.distort, rng.uniform(-1, 1, 4), 0.0)
    luma = np.tile(np.array(LUMA), (3, 1))
    # A rotation about the grey axis, after a change of the distance from it.
    angle = math.radians(config.hue * hue)
    third, cross = (1 - math.cos(angle)) / 3, math.sin(angle) / math.sqrt(3)
    rotation = math.cos(angle) * np.eye(3) + third + cross * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    factor = 1 + config.saturation * saturation
    matrix = rotation @ (factor * np.eye(3) + (1 - factor) * luma)
    if rng.random() < config.grey:
        matrix = luma
    return matrix * (1 + config.contrast * contrast), float(config.brightness * brightness)


def view_faces(
    view: View, boxes: np.ndarray, landmarks: np.ndarray, ignored: np.ndarray, size: int, min_face: float
) -> Faces:
    """The faces that a view shows: those whose centre it holds.

    Args:
        boxes: (n, 4), ``x1 y1 x2 y2`` in pixels of the photograph.
        landmarks: (n, 5, 2), NaN where unknown.
        ignored: (m, 4), boxes of faces that are not to be trained on.
        size: side of the view in pixels.
        min_face: see :class:`Augmentation`.
    """
    seen = _move(view, boxes, size)
    centres = (seen[:, :2] + seen[:, 2:]) / 2
    inside = ((centres >= 0) & (centres < size)).all(axis=1)
    points = _move(view, landmarks.reshape(-1, 10), size).reshape(-1, 5, 2)
    if view.mirror:
        points = points[:, MIRRORED_LANDMARKS]
    seen, points = np.clip(seen[inside], 0, size), points[inside]
    large = (seen[:, 2:] - seen[:, :2]).min(axis=1, initial=np.inf) >= max(min_face, 1e-3)
    small = seen[~large]
    centre, half = (small[:, :2] + small[:, 2:]) / 2, np.maximum((small[:, 2:] - small[:, :2]) / 2, IGNORED_SIDE / 2)
    silenced = np.concatenate([centre - half, centre + half], axis=1)
    silenced = np.concatenate([np.clip(_move(view, ignored, size), 0, size), silenced])
    silenced = silenced[((silenced[:, 2:] - silenced[:, :2]) > 0).all(axis=1)]
    return Faces(
        (seen[large] / size).astype(np.float32),
        (points[large] / size).astype(np.float32),
        (silenced / size).astype(np.float32),
    )


def join_quarters(quarters: list[Faces]) -> Faces:
    """The faces of a mosaic from those of its quarters: upper left, upper right, lower left, lower right."""
    corners = np.array([(0, 0), (0.5, 0), (0, 0.5), (0.5, 0.5)], np.float32)
    boxes, landmarks, ignored = (
        np.concatenate(parts)
        for parts in zip(
            *(
                (f.boxes / 2 + np.tile(corner, 2), f.landmarks / 2 + corner, f.ignored / 2 + np.tile(corner, 2))
                for f, corner in zip(quarters, corners)
            )
        )
    )
    return Faces(boxes, landmarks, ignored)


def _move(view: View, xy: np.ndarray, size: int) -> np.ndarray:
    """(n, 2 k) coordinates x, y, ... of the photograph in pixels of the view; of boxes, x1 stays the smaller one."""
    xy = np.array(xy, np.float64).reshape(len(xy), np.shape(xy)[1] // 2, 2)
    source, target = np.array(view.source, np.float64), np.array(view.target, np.float64)
    xy = (xy - source[:2]) * (target[2:] / source[2:]) + target[:2]
    if view.mirror:
        xy[..., 0] = size - xy[..., 0]
        if xy.shape[1] == 2:
            xy[..., 0] = xy[:, ::-1, 0]
    return xy.reshape(len(xy), 2 * xy.shape[1])


def crop_table(store: PixelStore, views: Sequence[Placed]) -> Tensor:
    """The views as :func:`ffkernels.ops.crop_resize.crop_resize` takes them, (V, 16) int64."""
    rows = [
        (
            int(store.offsets[index]),
            int(store.sizes[index, 1]),
            *view.source,
            *view.target,
            view.mirror,
            not view.aliased,
            image,
            left,
            top,
            side,
        )
        for index, view, image, left, top, side in views
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 16)


def crop(pixels: Tensor, table: Tensor, images: int, size: int) -> Tensor:
    """The geometry of views: parts of photographs, resized, mirrored, on the mean colour.

    Args:
        pixels: of a :class:`PixelStore`.
        table: from :func:`crop_table`: views in squares of ``images`` images of ``size`` pixels.

    Returns:
        (images, 3, size, size) uint8 RGB, where the pixels are.
    """
    policy = Policy("0" if pixels.device.type == "cpu" else "1")
    return crop_resize(pixels, table, images, size, FILL, policy=policy)


class Look(NamedTuple):
    """What is done to the colours of a batch of views.

    Attributes:
        matrix: (B, 3, 3) float32, and offset: (B,) float32, of the colours.
        windows: (B, k, 4) int64, x1 y1 x2 y2 of the photographs in the (mirrored) input, in pixels; zeros for none.
        sigma, quality: B floats each.
    """

    matrix: Tensor
    offset: Tensor
    windows: Tensor
    sigma: list[float]
    quality: list[float]

    @classmethod
    def of(cls, views: list[View], windows: list[list[tuple[int, int, int, int]]]) -> Look:
        """The colours of ``views``, of which the photographs stand in ``windows``: a list for each view."""
        most = max(map(len, windows), default=1)
        padded = [own + [(0, 0, 0, 0)] * (most - len(own)) for own in windows]
        return cls(
            torch.from_numpy(np.array([view.matrix for view in views], np.float32).reshape(-1, 3, 3)),
            torch.tensor([view.offset for view in views], dtype=torch.float32),
            torch.tensor(padded, dtype=torch.int64).reshape(-1, most, 4),
            [view.sigma for view in views],
            [view.quality for view in views],
        )


def develop(images: Tensor, look: Look) -> Tensor:
    """Colours, blur, JPEG compression; then blue, green, red minus the mean, as the networks take it.

    Args:
        images: (B, 3, S, S) uint8 RGB, from :func:`crop`, on any device.
        look: on the CPU.

    Returns:
        (B, 3, S, S) float32, channels last, exactly 0 outside the photograph.
    """
    if images.device.type != "cpu":
        return _develop(images, look).contiguous(memory_format=torch.channels_last)
    x = _kept(images.shape)
    # One image at a time, which a cache can hold.
    for number in range(len(images)):
        part = slice(number, number + 1)
        x[part] = _develop(images[part], Look(*(values[part] for values in look)))
    return x


def _kept(shape: torch.Size) -> Tensor:
    """Memory for a batch, where possible that of one before: that of the system costs more than computing the views."""
    if cpu.unavailable() is None:
        return empty_nhwc(tuple(shape), torch.empty(0))
    return torch.empty(shape, memory_format=torch.channels_last)


def _develop(images: Tensor, look: Look) -> Tensor:
    device, (batch, _, height, width) = images.device, images.shape
    # Rows of the matrix from the last to the first: blue, green, red.
    matrix, offset = look.matrix.flip(1).to(device), look.offset.to(device)
    offsets = offset[:, None, None].expand(batch, 3, 1)
    x = torch.baddbmm(offsets, matrix, images.flatten(2).float()).view(batch, 3, height, width).clamp_(0, 255)
    if blurred := [i for i, sigma in enumerate(look.sigma) if sigma > 0]:
        x[blurred] = blur(x[blurred], [look.sigma[i] for i in blurred])
    if compressed := [i for i, quality in enumerate(look.quality) if quality > 0]:
        x[compressed] = jpeg(x[compressed].flip(1), [look.quality[i] for i in compressed]).flip(1)
    x -= torch.tensor(MEAN, dtype=torch.float32, device=device).view(3, 1, 1)
    if bool((look.windows[:, 0] == torch.tensor([0, 0, width, height])).all()):
        return x
    x1, y1, x2, y2 = look.windows.to(device)[..., None].unbind(2)
    columns, rows = torch.arange(width, device=device), torch.arange(height, device=device)
    across, down = (columns >= x1) & (columns < x2), (rows >= y1) & (rows < y2)
    return x.mul_((down[..., None] & across[:, :, None]).any(1, keepdim=True))


def blur(images: Tensor, sigma: list[float]) -> Tensor:
    """Gaussian blur, one standard deviation in pixels for each image of (B, 3, H, W); borders repeat the last pixel."""
    radius = max(1, math.ceil(3 * max(sigma)))
    distance = torch.arange(-radius, radius + 1, dtype=torch.float32, device=images.device)
    weights = torch.exp(-0.5 * (distance / torch.tensor(sigma, device=images.device)[:, None]) ** 2)
    weights = (weights / weights.sum(1, keepdim=True))[..., None, None, None].unbind(1)
    x = pad(images, (radius,) * 4, mode="replicate")
    # Sums of shifted images: convolutions of so few channels are several times slower on a CPU.
    for axis in (2, 3):
        parts = [x.narrow(axis, shift, images.shape[axis]) for shift in range(2 * radius + 1)]
        x = parts[0] * weights[0]
        for part, weight in zip(parts[1:], weights[1:]):
            x.addcmul_(part, weight)
    return x
