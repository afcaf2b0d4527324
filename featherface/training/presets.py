"""Configurations by name."""

from __future__ import annotations

from typing import Any

from .config import Config, ConfigError, from_dict

PUBLISHED_TEACHER = "weights/featherface_v1_published.pth"

# Folders below data.root. The teacher has seen WIDER FACE train; its own backbone is the best start for a student's.
_COMMON: dict[str, Any] = {
    "model": {"backbone_weights": PUBLISHED_TEACHER},
    "data": {
        "sources": [
            {"folder": "faces/wider_val_train", "validation": 0.1},
            {"folder": "faces/eden_mask"},
            {"folder": "faces/demo", "labels": "none"},
        ]
    },
    # In short trainings the exponent of 1 was worth 1.8 points and the teacher's features nothing, which cost time and
    # keep the teacher out of an engine (benchmarks/results/training_ablation*.md).
    "distillation": {
        "teacher": "featherface_v1_ssh",
        "weights": PUBLISHED_TEACHER,
        "focal_beta": 1.0,
        "feature_weight": 0.0,
    },
}

PRESETS: dict[str, dict[str, Any]] = {
    "default": _COMMON,
    # The default's recipe with less work: smaller views, fewer epochs.
    "cpu": {
        **_COMMON,
        "data": {"sources": _COMMON["data"]["sources"][:2]},
        "augmentation": {"sizes": [320], "scales": [0.3, 0.45, 0.6, 0.8, 1.0, 1.3, 1.6]},
        "batches": {"size": 16, "workers": 1},
        "optimizer": {"lr": 3e-3},
        "schedule": {"epochs": 45, "warmup_epochs": 2.0},
        "average": {"decay": 0.9995},
        "validation": {"every": 9, "limit": 110},
    },
    "seed": {
        **_COMMON,
        "model": {**_COMMON["model"], "prior": 0.0},
        "augmentation": {
            "scales": [0.3, 0.45, 0.6, 0.8, 1.0],
            "min_face": 0.0,
            "grey": 0.0,
            "blur": 0.0,
            "jpeg": 0.0,
        },
        "task": {
            "assigner": "multibox",
            "classification": "ohem",
            "box": "smooth_l1",
            "class_weight": 1.0,
            "box_weight": 2.0,
            "landmark_weight": 1.0,
        },
        "distillation": {
            **_COMMON["distillation"],
            "task_weight": 0.3,
            "class_weight": 0.7,
            "class_kind": "kl",
            "temperature": 4.0,
            "box_weight": 0.0,
            "landmark_weight": 0.0,
        },
        "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 5e-4, "clip": 0.0},
        "schedule": {"epochs": 350, "warmup_epochs": 5.0, "final": 0.01},
        "average": {"decay": 0.0},
    },
}


def preset(name: str) -> Config:
    """The configuration of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}; choose from: {', '.join(PRESETS)}")
    return from_dict(PRESETS[name], Config())
