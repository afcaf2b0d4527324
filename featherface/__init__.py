"""FeatherFace: a 256 K parameter face detector."""

from .detections import Detections
from .detector import FaceDetector
from .models import create_model, list_models

__all__ = ["Detections", "FaceDetector", "create_model", "list_models"]
