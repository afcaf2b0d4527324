"""Average precision on the validation part, during training."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from featherface.data import FaceData
from featherface.evaluation import evaluate_average_precision
from featherface.models import FeatherFace
from featherface.models.anchors import VARIANCES, anchors
from ffkernels.ops.detection import detect
from ffkernels.ops.preprocess import MEAN

from .config import Validation


@lru_cache(maxsize=64)
def _anchors(height: int, width: int, device: torch.device) -> Tensor:
    return anchors(height, width).to(device)


@torch.no_grad()
def detect_validation(
    model: FeatherFace, data: FaceData, indices: np.ndarray, config: Validation, channels_last: bool = True
) -> dict[str, np.ndarray]:
    """Detections on stored images: name -> (n, 5) ``x1 y1 x2 y2 score`` in pixels of the stored image."""
    device = next(model.parameters()).device
    mean = torch.tensor(MEAN, device=device).view(1, 3, 1, 1)
    was_training = model.training
    model.eval()
    found: dict[str, np.ndarray] = {}
    for index in indices.tolist():
        image = data.store.image(index).to(device).permute(2, 0, 1)[None].flip(1).float() - mean
        stored_height, stored_width = image.shape[2:]
        if config.long_side:
            scale = config.long_side / max(stored_height, stored_width)
            sides = [max(1, round(side * scale)) for side in (stored_height, stored_width)]
            image = interpolate(image, sides, mode="bilinear", antialias=True)
        if channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        height, width = image.shape[2:]
        bbox, cls, landmarks = (tensor[0].float() for tensor in model(image, logits=False))
        boxes, scores, _ = detect(
            bbox,
            cls[:, 1],
            landmarks,
            _anchors(height, width, device),
            config.score_threshold,
            config.nms_threshold,
            variances=VARIANCES,
        )
        boxes = boxes * boxes.new_tensor([stored_width, stored_height] * 2)
        found[data.records[index].name] = torch.cat([boxes, scores[:, None]], 1).double().cpu().numpy()
    model.train(was_training)
    return found


def validation_indices(data: FaceData, config: Validation) -> np.ndarray:
    """The images that are validated on, spread evenly over the part."""
    count = len(data.validation)
    if config.limit and config.limit < count:
        return data.validation[np.arange(config.limit) * count // config.limit]
    return data.validation


def score(predictions: dict[str, np.ndarray], data: FaceData, indices: np.ndarray) -> dict[str, float]:
    """Plain AP at IoU 0.5 over all faces and by size of face, see
    :func:`featherface.evaluation.evaluate_average_precision`; groups without faces are NaN."""
    return evaluate_average_precision(predictions, [data.annotation(index) for index in indices.tolist()]).ap
