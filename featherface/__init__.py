"""FeatherFace: a 256 K parameter face detector."""

from .align import align_faces
from .detections import Detections
from .detector import FaceDetector
from .draw import draw_faces
from .models import create_model, list_models

__all__ = ["Detections", "FaceDetector", "align_faces", "create_model", "draw_faces", "list_models"]
