"""Aligned crops: faces turned, scaled and moved so that their five landmarks sit where recognisers expect them."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from .detections import Detections
from .errors import ImageError
from .images import ImageLike, upright_pixels

ARCFACE_TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""(5, 2) landmarks in a 112 x 112 crop as ArcFace (Deng et al., CVPR 2019) and its successors are trained with:
pixel centres at whole numbers."""


def similarity_transform(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Rotation, uniform scale and shift that bring ``source`` closest to ``target``.

    Minimises ``sum_i |target_i - (s R source_i + t)|^2`` over s > 0, rotations R and shifts t in closed form
    (Umeyama, PAMI 1991, equations 40 to 42).

    Args:
        source: (K, 2) points, K >= 2.
        target: (K, 2) points.

    Returns:
        (2, 3) float64 matrix ``[s R | t]``.

    Raises:
        ValueError: the shapes differ, a value is not finite, or all source points coincide.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if source.shape != target.shape or source.ndim != 2 or source.shape[1] != 2:
        raise ValueError(f"points of shapes {source.shape} and {target.shape}, expected two of the same (K, 2)")
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise ValueError("the points are not finite")
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    a, b = source - source_mean, target - target_mean
    spread = (a**2).sum()
    if spread <= 1e-12 * max(1.0, (source**2).sum()):
        raise ValueError("the points coincide, so they have no scale or direction")
    u, d, vt = np.linalg.svd(b.T @ a)
    # A reflection would fit mirrored points better, but is no face.
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt)) or 1.0])
    rotation = u @ np.diag(sign) @ vt
    scale = (d * sign).sum() / spread
    matrix = np.empty((2, 3))
    matrix[:, :2] = scale * rotation
    matrix[:, 2] = target_mean - matrix[:, :2] @ source_mean
    return matrix


def align(image: np.ndarray, landmarks: np.ndarray, size: int = 112) -> np.ndarray:
    """One aligned face.

    Args:
        image: (H, W, 3) uint8.
        landmarks: (5, 2) in pixels of the image, as in :class:`featherface.Detections`.
        size: side of the crop; the landmarks come to ``ARCFACE_TEMPLATE * size / 112``.

    Returns:
        (size, size, 3) uint8; black where the image does not reach.

    Raises:
        ImageError: the landmarks coincide or are not finite, or ``image`` is not (H, W, 3) uint8.
    """
    if not isinstance(image, np.ndarray):
        raise ImageError(f"an aligned crop needs an (H, W, 3) uint8 image, got {type(image).__name__}")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ImageError(f"an aligned crop needs an (H, W, 3) uint8 image, got {image.dtype} {image.shape}")
    # Recognisers are trained on crops that count both from the centre of pixel (0, 0); Pillow counts from its corner.
    try:
        matrix = similarity_transform(landmarks + 0.5, (ARCFACE_TEMPLATE + 0.5) * (size / 112))
    except ValueError as error:
        raise ImageError(f"a face cannot be aligned: {error}") from None
    inverse = np.linalg.inv(np.vstack((matrix, [0, 0, 1])))
    corners = inverse[:2] @ np.array([[0, size, 0, size], [0, 0, size, size], [1, 1, 1, 1]], np.float64)
    scale = math.hypot(inverse[0, 0], inverse[1, 0])
    factor = max(1, int(scale))
    left, top = np.floor(corners.min(axis=1) - 2 * factor).astype(int)
    right, bottom = np.ceil(corners.max(axis=1) + 2 * factor).astype(int)
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, image.shape[1]), min(bottom, image.shape[0])
    if left >= right or top >= bottom:
        return np.zeros((size, size, 3), np.uint8)
    part = Image.fromarray(np.ascontiguousarray(image[top:bottom, left:right]))
    # Averaging whole blocks first keeps a large face from aliasing in the bilinear sampling below.
    part = part.reduce(factor)
    to_part = np.array([[1 / factor, 0, -left / factor], [0, 1 / factor, -top / factor]]) @ inverse
    crop = part.transform((size, size), Image.Transform.AFFINE, to_part.ravel(), Image.Resampling.BILINEAR)
    return np.asarray(crop)


def align_faces(image: ImageLike, detections: Detections, size: int = 112) -> np.ndarray:
    """(n, size, size, 3) uint8 aligned crops of all faces. See :func:`align`.

    Args:
        image: what the faces were found in, as :meth:`featherface.FaceDetector.detect` takes it.
        detections: the faces.

    Raises:
        ImageError: the image cannot be read or has another size than the one the faces were found in, or as
            :func:`align`.
    """
    pixels = upright_pixels(image, detections.image_size)
    crops = [align(pixels, landmarks, size) for landmarks in detections.landmarks]
    return np.stack(crops) if crops else np.zeros((0, size, size, 3), np.uint8)
