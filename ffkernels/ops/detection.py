"""From raw predictions to faces: decoding, filtering, top-k and non-maximum suppression."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import registry
from ..config import Policy, call_policy
from ..reference import detection as reference
from ..registry import Request
from .checks import same_device
from .library import define, kernels, needs_grad

OP = "detection"

VARIANCES = (0.1, 0.2)


def _supports(request: Request) -> str | None:
    return None if request.facts.get("same_dtype", True) else "the tensors have different dtypes"


registry.register(OP, "cpu", (torch.float32, torch.float64), backward=False, supports=_supports)
registry.register(OP, "cuda", (torch.float32, torch.float16, torch.bfloat16), backward=False, supports=_supports)


def _run_decode(
    bbox: Tensor, landmarks: Tensor, priors: Tensor, variances: Sequence[float], backend: str
) -> tuple[Tensor, Tensor]:
    return kernels(backend, OP).decode(bbox, landmarks, priors, variances)


def _fake_decode(
    bbox: Tensor, landmarks: Tensor, priors: Tensor, variances: Sequence[float], backend: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(bbox.contiguous()), torch.empty_like(landmarks.contiguous())


_raw_decode = define(
    "_decode(Tensor bbox, Tensor landmarks, Tensor priors, float[] variances, str backend) -> (Tensor, Tensor)",
    _run_decode,
    _fake_decode,
)


def _run_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, backend: str) -> tuple[Tensor, Tensor]:
    return kernels(backend, OP).nms(boxes, scores, iou_threshold)


def _fake_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, backend: str) -> tuple[Tensor, Tensor]:
    return boxes.new_empty(boxes.shape[0], dtype=torch.int64), boxes.new_empty((), dtype=torch.int64)


_raw_nms = define(
    "_nms(Tensor boxes, Tensor scores, float iou_threshold, str backend) -> (Tensor keep, Tensor count)",
    _run_nms,
    _fake_nms,
)


def _run_detect(bbox: Tensor, scores: Tensor, landmarks: Tensor, priors: Tensor, *args) -> tuple[Tensor, ...]:
    *settings, backend = args
    return kernels(backend, OP).detect(bbox, scores, landmarks, priors, *settings)


def _fake_detect(bbox: Tensor, scores: Tensor, landmarks: Tensor, priors: Tensor, *args) -> tuple[Tensor, ...]:
    top_k, keep_top_k = args[2:4]
    kept = min(bbox.shape[0], top_k, keep_top_k)
    shapes = ((kept, 4), (kept,), (kept, landmarks.shape[1]))
    return *(bbox.new_empty(shape) for shape in shapes), bbox.new_empty((), dtype=torch.int64)


_raw_detect = define(
    "_detect(Tensor bbox, Tensor scores, Tensor landmarks, Tensor priors, float score_threshold, float nms_threshold, "
    "int top_k, int keep_top_k, float[] variances, str backend) -> (Tensor, Tensor, Tensor, Tensor count)",
    _run_detect,
    _fake_detect,
)


def _same_dtype(*tensors: Tensor) -> bool:
    return len({t.dtype for t in tensors}) == 1


def decode(
    bbox: Tensor,
    landmarks: Tensor,
    priors: Tensor,
    variances: Sequence[float] = VARIANCES,
    *,
    policy: Policy | None = None,
) -> tuple[Tensor, Tensor]:
    """Boxes and landmarks in the units of ``priors`` from a network's regressions against them.

    With an anchor ``(cx, cy, w, h)``, variances ``(v0, v1)`` and regressions ``t``::

        centre = (cx, cy) + t[0:2] * v0 * (w, h)
        size   = (w, h) * exp(t[2:4] * v1)
        box    = centre - size / 2, centre + size / 2
        point  = (cx, cy) + t * v0 * (w, h)

    Args:
        bbox: (..., N, 4) regressions of centre and logarithm of size.
        landmarks: (..., N, 2 K) regressions of K points, x then y.
        priors: (N, 4) anchors ``cx cy w h``.
        variances: scale of the offsets and of the log sizes.

    Returns:
        boxes (..., N, 4) as ``x1 y1 x2 y2`` and points (..., N, 2 K).

    Raises:
        ValueError: the last dimensions or the numbers of anchors do not fit.
    """
    if bbox.dim() < 2 or bbox.shape[-1] != 4:
        raise ValueError(f"decode: bbox is {tuple(bbox.shape)}, expected (..., N, 4)")
    if priors.dim() != 2 or priors.shape[-1] != 4 or priors.shape[0] != bbox.shape[-2]:
        raise ValueError(f"decode: priors are {tuple(priors.shape)}, expected ({bbox.shape[-2]}, 4) as bbox")
    if landmarks.shape[:-1] != bbox.shape[:-1] or landmarks.shape[-1] % 2:
        raise ValueError(f"decode: landmarks are {tuple(landmarks.shape)}, expected {(*bbox.shape[:-1], '2 K')}")
    for name, tensor in (("landmarks", landmarks), ("priors", priors)):
        same_device("decode", name, tensor, bbox)
    _check_variances("decode", variances)
    record = needs_grad(bbox, landmarks, priors)
    same = _same_dtype(bbox, landmarks, priors)
    backend = registry.select(OP, bbox, policy or call_policy(), record, function="decode", same_dtype=same)
    if backend == "reference":
        return reference.decode(bbox, landmarks, priors, variances)
    return _raw_decode(bbox, landmarks, priors, list(variances), backend)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, policy: Policy | None = None) -> Tensor:
    """Greedy non-maximum suppression: indices of the boxes to keep, best score first.

    Boxes are visited in descending order of score, equal scores in the order they came in. A box is kept unless its
    overlap with a box kept before it satisfies ``intersection > iou_threshold * union``, all in the dtype of ``boxes``.
    So boxes without area neither suppress nor are suppressed, and an overlap equal to the threshold is allowed.

    Args:
        boxes: (N, 4) floating point, ``x1 y1 x2 y2``. A box with a coordinate or an area that is not finite is dropped.
        scores: (N,). A box with a NaN score is dropped.
        iou_threshold: 0 to 1.

    Returns:
        (M,) int64 indices into ``boxes``.

    Raises:
        ValueError: shapes or dtypes do not fit, or the threshold is outside 0 to 1.
    """
    if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise ValueError(f"nms: boxes are {boxes.dtype} {tuple(boxes.shape)}, expected floating point (N, 4)")
    if scores.shape != boxes.shape[:1]:
        raise ValueError(f"nms: scores are {tuple(scores.shape)}, expected ({boxes.shape[0]},) as boxes")
    same_device("nms", "scores", scores, boxes)
    _check_threshold("nms", "iou_threshold", iou_threshold)
    same = _same_dtype(boxes, scores)
    backend = registry.select(OP, boxes, policy or call_policy(), function="nms", same_dtype=same)
    with torch.no_grad():
        if backend == "reference":
            return reference.nms(boxes, scores, iou_threshold)
        keep, count = _raw_nms(boxes, scores, iou_threshold, backend)
        return keep[: int(count)]


def detect(
    bbox: Tensor,
    scores: Tensor,
    landmarks: Tensor,
    priors: Tensor,
    score_threshold: float = 0.5,
    nms_threshold: float = 0.4,
    top_k: int = 5000,
    keep_top_k: int = 750,
    variances: Sequence[float] = VARIANCES,
    *,
    policy: Policy | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Faces of one image: filter, top-k, :func:`decode`, :func:`nms`.

    Anchors with ``score > score_threshold`` (never NaN) are candidates; the ``top_k`` best of them, equal scores in the
    order of the anchors, are decoded; those with a coordinate or an area that is not finite are dropped; :func:`nms`
    follows, and the ``keep_top_k`` best are returned.

    Args:
        bbox: (N, 4) regressions.
        scores: (N,) probability of a face.
        landmarks: (N, 2 K) regressions.
        priors: (N, 4) anchors ``cx cy w h``.
        score_threshold: candidates score more than this.
        nms_threshold: largest intersection over union of two faces.
        top_k: candidates that enter suppression, at most.
        keep_top_k: faces returned, at most.
        variances: see :func:`decode`.

    Returns:
        boxes (M, 4), scores (M,) and points (M, 2 K) in the units of ``priors``, by descending score.

    Raises:
        ValueError: shapes do not fit, or a threshold or limit is out of range.
    """
    anchors = scores.shape[0] if scores.dim() == 1 else -1
    shapes = (tuple(bbox.shape), tuple(landmarks.shape[:-1]), tuple(priors.shape))
    if shapes != ((anchors, 4), (anchors,), (anchors, 4)) or landmarks.shape[-1] % 2:
        raise ValueError(
            f"detect: bbox {tuple(bbox.shape)}, scores {tuple(scores.shape)}, landmarks {tuple(landmarks.shape)}, "
            f"priors {tuple(priors.shape)}; expected (N, 4), (N,), (N, 2 K), (N, 4) of one image"
        )
    for name, tensor in (("scores", scores), ("landmarks", landmarks), ("priors", priors)):
        same_device("detect", name, tensor, bbox)
    _check_threshold("detect", "nms_threshold", nms_threshold)
    if not all(isinstance(limit, int) and limit >= 1 for limit in (top_k, keep_top_k)):
        raise ValueError(f"detect: top_k={top_k}, keep_top_k={keep_top_k}; both must be whole numbers of at least 1")
    _check_variances("detect", variances)
    same = _same_dtype(bbox, scores, landmarks, priors)
    backend = registry.select(OP, bbox, policy or call_policy(), function="detect", same_dtype=same)
    settings = (score_threshold, nms_threshold, top_k, keep_top_k, list(variances))
    with torch.no_grad():
        if backend == "reference":
            return reference.detect(bbox, scores, landmarks, priors, *settings)
        boxes, kept_scores, points, count = _raw_detect(bbox, scores, landmarks, priors, *settings, backend)
        found = int(count)
        return boxes[:found], kept_scores[:found], points[:found]


def _check_variances(function: str, variances: Sequence[float]) -> None:
    if len(variances) != 2:
        raise ValueError(
            f"{function}: variances are {tuple(variances)}, expected two: of the offsets and of the log sizes"
        )


def _check_threshold(function: str, name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{function}: {name} is {value}, expected 0 to 1")
