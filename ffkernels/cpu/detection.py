from collections.abc import Callable

import torch
from torch import Tensor

from ..native import DTYPES, check, module


def decode(bbox: Tensor, landmarks: Tensor, priors: Tensor, variances: tuple[float, float]) -> tuple[Tensor, Tensor]:
    native, _ = module()
    return decode_with(native.ff_cpu_decode, (), bbox, landmarks, priors, variances)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> tuple[Tensor, Tensor]:
    native, _ = module()
    boxes = boxes.contiguous()
    count, dtype = boxes.shape[0], DTYPES[boxes.dtype]
    keep = boxes.new_empty(count, dtype=torch.int64)
    workspace = boxes.new_empty(native.ff_cpu_detection_workspace(count, count, dtype), dtype=torch.uint8)
    found = native.ff_cpu_nms(
        boxes.data_ptr(),
        scores.data_ptr(),
        scores.stride(0),
        count,
        iou_threshold,
        keep.data_ptr(),
        workspace.data_ptr(),
        dtype,
    )
    check(min(found, 0), "nms", boxes, scores)
    return keep, keep.new_tensor(found)


def detect(
    bbox: Tensor,
    scores: Tensor,
    landmarks: Tensor,
    priors: Tensor,
    score_threshold: float,
    nms_threshold: float,
    top_k: int,
    keep_top_k: int,
    variances: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    native, _ = module()

    def run(arguments: list[float], anchors: int, top_k: int, kept: int) -> Tensor:
        dtype = DTYPES[bbox.dtype]
        workspace = bbox.new_empty(native.ff_cpu_detection_workspace(anchors, kept, dtype), dtype=torch.uint8)
        found = native.ff_cpu_detect(*arguments, workspace.data_ptr(), dtype)
        check(min(found, 0), "detect", bbox, scores, landmarks, priors)
        return torch.tensor(found, device=bbox.device)

    thresholds = score_threshold, nms_threshold
    return detect_with(run, bbox, scores, landmarks, priors, thresholds, top_k, keep_top_k, variances)


def decode_with(
    entry: Callable[..., int],
    runner: tuple[int, ...],
    bbox: Tensor,
    landmarks: Tensor,
    priors: Tensor,
    variances: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """:func:`decode` by a native entry; ``runner`` ends its arguments."""
    bbox, landmarks, priors = bbox.contiguous(), landmarks.contiguous(), priors.contiguous()
    boxes, points = torch.empty_like(bbox), torch.empty_like(landmarks)
    anchors = priors.shape[0]
    code = entry(
        bbox.data_ptr(),
        landmarks.data_ptr(),
        priors.data_ptr(),
        boxes.data_ptr(),
        points.data_ptr(),
        bbox.numel() // (4 * anchors) if anchors else 0,
        anchors,
        landmarks.shape[-1],
        *variances,
        DTYPES[bbox.dtype],
        *runner,
    )
    check(code, "decode", bbox, landmarks, priors)
    return boxes, points


def detect_with(
    run: Callable[[list[float], int, int, int], Tensor],
    bbox: Tensor,
    scores: Tensor,
    landmarks: Tensor,
    priors: Tensor,
    thresholds: tuple[float, float],
    top_k: int,
    keep_top_k: int,
    variances: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`detect` where ``run(arguments, anchors, top_k, kept)`` calls a native entry, whose first arguments it
    gets, and returns the count."""
    bbox, landmarks, priors = bbox.contiguous(), landmarks.contiguous(), priors.contiguous()
    anchors = bbox.shape[0]
    top_k = min(top_k, anchors)
    kept = min(keep_top_k, top_k)
    boxes, kept_scores = bbox.new_empty(kept, 4), bbox.new_empty(kept)
    points = bbox.new_empty(kept, landmarks.shape[1])
    arguments = [
        bbox.data_ptr(),
        scores.data_ptr(),
        scores.stride(0),
        landmarks.data_ptr(),
        priors.data_ptr(),
        anchors,
        landmarks.shape[1],
        *thresholds,
        top_k,
        kept,
        *variances,
        boxes.data_ptr(),
        kept_scores.data_ptr(),
        points.data_ptr(),
    ]
    return boxes, kept_scores, points, run(arguments, anchors, top_k, kept)
