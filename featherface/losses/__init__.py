"""Losses and target assignment, computed for a whole batch at once."""

from .assignment import Assignment, atss, multibox, nearest_anchors, simota
from .boxes import box_loss, corners, decode_boxes, encode_boxes, encode_landmarks, overlap, pairwise_overlap, smooth_l1
from .classification import face_logit, ohem_cross_entropy, quality_focal
from .distillation import Distillation, FeatureAdapters, distillation_loss
from .targets import Targets
from .task import Task, assign, task_loss

__all__ = [
    "Assignment",
    "Distillation",
    "FeatureAdapters",
    "Targets",
    "Task",
    "assign",
    "atss",
    "box_loss",
    "corners",
    "decode_boxes",
    "distillation_loss",
    "encode_boxes",
    "encode_landmarks",
    "face_logit",
    "multibox",
    "nearest_anchors",
    "ohem_cross_entropy",
    "overlap",
    "pairwise_overlap",
    "quality_focal",
    "simota",
    "smooth_l1",
    "task_loss",
]
