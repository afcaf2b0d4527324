"""Training: configuration, loop, distillation from a teacher, checkpoints that resume exactly."""

from .config import Config, ConfigError, dump, from_dict, load_config, override
from .presets import PRESETS, preset
from .run_folder import TrainingError
from .trainer import Result, Trainer, train

__all__ = [
    "PRESETS",
    "Config",
    "ConfigError",
    "Result",
    "Trainer",
    "TrainingError",
    "dump",
    "from_dict",
    "load_config",
    "override",
    "preset",
    "train",
]
