import torch
from torch import Tensor

from ..cpu.detection import decode_with, detect_with
from ..native import DTYPES, check, module
from . import on_device, stream


def decode(bbox: Tensor, landmarks: Tensor, priors: Tensor, variances: tuple[float, float]) -> tuple[Tensor, Tensor]:
    native, _ = module()
    with on_device(bbox):
        return decode_with(native.ff_cuda_decode, (stream(bbox),), bbox, landmarks, priors, variances)


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

    def run(arguments: list[float], anchors: int, top_k: int, kept: int) -> Tensor:
        count = bbox.new_empty((), dtype=torch.int64)
        workspace = bbox.new_empty(native.ff_cuda_detection_workspace(anchors, top_k), dtype=torch.uint8)
        code = native.ff_cuda_detect(
            *arguments, count.data_ptr(), workspace.data_ptr(), DTYPES[bbox.dtype], stream(bbox)
        )
        check(code, "detect", bbox, scores, landmarks, priors)
        return count

    thresholds = score_threshold, nms_threshold
    with on_device(bbox):
        return detect_with(run, bbox, scores, landmarks, priors, thresholds, top_k, keep_top_k, variances)
