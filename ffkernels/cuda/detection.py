import torch
from torch import Tensor

from ..native import DTYPES, check, module
from . import on_device, stream


def decode(bbox: Tensor, landmarks: Tensor, priors: Tensor, variances: tuple[float, float]) -> tuple[Tensor, Tensor]:
    native, _ = module()
    bbox, landmarks, priors = bbox.contiguous(), landmarks.contiguous(), priors.contiguous()
    boxes, points = torch.empty_like(bbox), torch.empty_like(landmarks)
    anchors = priors.shape[0]
    with on_device(bbox):
        code = native.ff_cuda_decode(
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
            stream(bbox),
        )
    check(code, "decode", bbox, landmarks, priors)
    return boxes, points


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> tuple[Tensor, Tensor]:
    """Indices to keep, of which the first ``count`` count; ``count`` stays on the device."""
    native, _ = module()
    boxes = boxes.contiguous()
    candidates = boxes.shape[0]
    keep = boxes.new_empty(candidates, dtype=torch.int64)
    count = boxes.new_empty((), dtype=torch.int64)
    workspace = boxes.new_empty(native.ff_cuda_detection_workspace(candidates, candidates), dtype=torch.uint8)
    with on_device(boxes):
        code = native.ff_cuda_nms(
            boxes.data_ptr(),
            scores.data_ptr(),
            scores.stride(0),
            candidates,
            iou_threshold,
            keep.data_ptr(),
            count.data_ptr(),
            workspace.data_ptr(),
            DTYPES[boxes.dtype],
            stream(boxes),
        )
    check(code, "nms", boxes, scores)
    return keep, count


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
    """Rows of boxes, scores and points, of which the first ``count`` count; ``count`` stays on the device."""
    native, _ = module()
    bbox, landmarks, priors = bbox.contiguous(), landmarks.contiguous(), priors.contiguous()
    anchors = bbox.shape[0]
    top_k = min(top_k, anchors)
    kept = min(keep_top_k, top_k)
    boxes, kept_scores = bbox.new_empty(kept, 4), bbox.new_empty(kept)
    points = bbox.new_empty(kept, landmarks.shape[1])
    count = bbox.new_empty((), dtype=torch.int64)
    workspace = bbox.new_empty(native.ff_cuda_detection_workspace(anchors, top_k), dtype=torch.uint8)
    with on_device(bbox):
        code = native.ff_cuda_detect(
            bbox.data_ptr(),
            scores.data_ptr(),
            scores.stride(0),
            landmarks.data_ptr(),
            priors.data_ptr(),
            anchors,
            landmarks.shape[1],
            score_threshold,
            nms_threshold,
            top_k,
            kept,
            *variances,
            boxes.data_ptr(),
            kept_scores.data_ptr(),
            points.data_ptr(),
            count.data_ptr(),
            workspace.data_ptr(),
            DTYPES[bbox.dtype],
            stream(bbox),
        )
    check(code, "detect", bbox, scores, landmarks, priors)
    return boxes, kept_scores, points, count
