"""What a training run is told: dataclasses, TOML and YAML files, overrides."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featherface.data import Augmentation, Source
from featherface.errors import FeatherFaceError
from featherface.losses import Distillation, Task


class ConfigError(FeatherFaceError):
    """A configuration has an unknown option, or a value of the wrong kind."""


@dataclass
class Model:
    """The network that is trained.

    Attributes:
        name: one of featherface.list_models().
        options: of the model, such as innovations of featherface_v2_ultra.
        weights: a weights file to start from; empty: random values.
        transfer_weights: a weights file of another model to start from: tensors of the same names and shapes are taken.
        backbone_weights: a weights file to start the backbone from: of any model, or of an ImageNet classifier.
        prior: probability of a face that every anchor starts with (Lin et al. 2017, focal loss), where the heads start
            from random values; 0 leaves them as they are.
        fused: 0, 1 or require, as FF_USE_FUSED; empty: what FF_USE_FUSED says.
    """

    name: str = "featherface_v2"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str = ""
    transfer_weights: str = ""
    backbone_weights: str = ""
    prior: float = 0.01
    fused: str = ""


@dataclass
class Data:
    """What is trained on.

    Attributes:
        root: folders of sources and weights files are relative to it.
        sources: the mixture.
        split_seed: chooses the validation part.
        max_side: photographs whose longer side is larger are reduced to it; 0 keeps every size.
        cache: where decoded pixels are: memory, disk (a file mapped into memory, made once) or device (the GPU).
        cache_dir: folder of that file; empty: the run folder.
        memory_limit_gb: largest set that memory may take, in GiB; 0 for no limit.
    """

    root: str = "."
    sources: list[Source] = field(default_factory=list)
    split_seed: int = 0
    max_side: int = 1280
    cache: str = "memory"
    cache_dir: str = ""
    memory_limit_gb: float = 8.0


@dataclass
class Batches:
    """How views come to the network.

    Attributes:
        size: views in a batch of one process.
        accumulate: batches whose gradients are added before a step.
        workers: threads, or with pixels on a GPU processes, that prepare batches ahead; 0 prepares them in between.
        views: 0 draws new views in every epoch; n repeats them after n epochs.
    """

    size: int = 32
    accumulate: int = 1
    workers: int = 2
    views: int = 0


@dataclass
class Optimizer:
    """The step.

    Attributes:
        name: adamw, sgd (with Nesterov momentum) or muon (Jordan et al. 2024; with adamw for depthwise convolutions and
            all that is no convolution).
        lr: largest learning rate.
        weight_decay: of convolution and linear weights; biases, normalisation and fusion weights have none.
        momentum: of sgd; beta1 of adamw, also of muon's.
        beta2: of adamw, also of muon's.
        clip: largest norm of the gradients; 0 for no limit.
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    beta2: float = 0.999
    clip: float = 10.0


@dataclass
class Schedule:
    """The learning rate: linear warm-up, then a cosine.

    Attributes:
        epochs: passes over the mixture.
        warmup_epochs: of rising learning rate.
        final: last learning rate over the largest.
    """

    epochs: int = 400
    warmup_epochs: float = 5.0
    final: float = 0.01


@dataclass
class Average:
    """The exponential moving average of the weights, which is what is validated and exported.

    Attributes:
        decay: of a step; 0 for no average. In the first steps it is (1 + n) / (10 + n).
    """

    decay: float = 0.9998


@dataclass
class Validation:
    """Average precision on the validation part.

    Attributes:
        every: epochs between two validations; 0 for none but the last.
        limit: use at most so many images; 0 for all.
        long_side: images are resized until their longer side has this many pixels; 0 leaves the stored size.
        score_threshold, nms_threshold: of the detections.
    """

    every: int = 10
    limit: int = 0
    long_side: int = 0
    score_threshold: float = 0.02
    nms_threshold: float = 0.4


@dataclass
class Runtime:
    """How it runs; nothing here changes what is learnt, but for rounding and the seed.

    Attributes:
        seed: of initial weights, order and views.
        device: auto, cpu, cuda or cuda:1; with torchrun, each process takes its own GPU.
        amp: off, bf16 or fp16 (with loss scaling).
        compile: torch.compile the network.
        channels_last: memory format of the network and its input.
        deterministic: refuse algorithms that may differ from run to run; needed on GPUs alone.
        log_every: steps between two rows of metrics.csv.
        checkpoint_minutes: time between two checkpoints; one is also written after every epoch.
        divergence: stop when the loss is this many times its running mean; 0 for never.
        tensorboard: also write TensorBoard's files (needs featherface[train]).
    """

    seed: int = 0
    device: str = "auto"
    amp: str = "off"
    compile: bool = False
    channels_last: bool = True
    deterministic: bool = False
    log_every: int = 20
    checkpoint_minutes: float = 5.0
    divergence: float = 50.0
    tensorboard: bool = False


CHOICES = {
    "model.fused": ("", "0", "1", "require"),
    "data.cache": ("memory", "disk", "device"),
    "distillation.dtype": ("float32", "bfloat16"),
    "optimizer.name": ("muon", "adamw", "sgd"),
    "runtime.amp": ("off", "bf16", "fp16"),
}
LEAST = {
    "augmentation.tries": 1,
    "batches.size": 1,
    "batches.accumulate": 1,
    "batches.workers": 0,
    "batches.views": 0,
    "schedule.epochs": 1,
    "schedule.warmup_epochs": 0,
    "optimizer.lr": 0,
    "optimizer.clip": 0,
    "validation.every": 0,
    "validation.limit": 0,
    "validation.long_side": 0,
    "runtime.log_every": 1,
    "task.atss_top_k": 1,
    "task.ohem_ratio": 0,
    "task.face_balance": 0,
    "distillation.temperature": 1e-3,
    "distillation.cache_gb": 0,
    "data.max_side": 0,
    "data.memory_limit_gb": 0,
    "augmentation.min_face": 0,
    "augmentation.brightness": 0,
    "optimizer.weight_decay": 0,
    "runtime.checkpoint_minutes": 0,
    "runtime.divergence": 0,
    **{f"task.{name}_weight": 0 for name in ("class", "box", "landmark")},
    **{f"distillation.{name}_weight": 0 for name in ("task", "class", "box", "landmark", "feature", "unlabelled")},
}
SHARES = (
    *(f"augmentation.{name}" for name in ("anchor_sampling", "mosaic", "mirror", "aliased", "distort", "grey")),
    *(f"augmentation.{name}" for name in ("blur", "jpeg", "contrast", "saturation")),
    "schedule.final",
    "task.multibox_threshold",
    "task.multibox_override",
    "validation.score_threshold",
    "validation.nms_threshold",
    "distillation.mask_threshold",
    "distillation.positive_threshold",
)
"""Options from 0 to 1."""

BELOW_ONE = ("model.prior", "average.decay", "optimizer.momentum", "optimizer.beta2")


MOST_OFTEN = 10_000
"""Largest weight of a source: how often an image may be seen in one epoch."""


@dataclass
class Config:
    """A training run. See the sections' classes for the options."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augmentation: Augmentation = field(default_factory=Augmentation)
    batches: Batches = field(default_factory=Batches)
    task: Task = field(default_factory=Task)
    distillation: Distillation = field(default_factory=Distillation)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    average: Average = field(default_factory=Average)
    validation: Validation = field(default_factory=Validation)
    runtime: Runtime = field(default_factory=Runtime)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        return dataclasses.asdict(self)

    def path(self, name: str) -> Path:
        """A file or folder named in the configuration."""
        return Path(self.data.root).expanduser() / Path(name).expanduser()

    def _value(self, key: str) -> Any:
        section, name = key.split(".")
        return getattr(getattr(self, section), name)

    def check(self) -> None:
        """Refuses values that cannot be meant.

        Raises:
            ConfigError: naming the option.
        """
        for section in dataclasses.fields(self):
            for option in dataclasses.fields(getattr(self, section.name)):
                value = getattr(getattr(self, section.name), option.name)
                for number in value if isinstance(value, list) else [value]:
                    if isinstance(number, float) and not math.isfinite(number):
                        raise ConfigError(f"{section.name}.{option.name} is {value!r}; it must be finite")
        for source in self.data.sources:
            if not 0 <= source.weight <= MOST_OFTEN:
                raise ConfigError(
                    f"data.sources: {source.folder} has weight {source.weight}; expected 0 to {MOST_OFTEN}"
                )
        if not abs(self.runtime.seed) < 2**63:
            raise ConfigError(f"runtime.seed is {self.runtime.seed}; it must fit into 64 bits")
        for key, choices in CHOICES.items():
            value = self._value(key)
            if value not in choices:
                raise ConfigError(f"{key} is {value!r}; choose from: {', '.join(filter(None, choices))}")
        for key, least in LEAST.items():
            value = self._value(key)
            if not value >= least:
                raise ConfigError(f"{key} is {value!r}; it must be at least {least:g}")
        for key in SHARES:
            value = self._value(key)
            if not 0 <= value <= 1:
                raise ConfigError(f"{key} is {value!r}; it must be from 0 to 1")
        sizes = self.augmentation.sizes
        if not sizes or min(sizes) < 32 or any(size % 32 for size in sizes):
            raise ConfigError(f"augmentation.sizes is {sizes}; expected at least one side, each a multiple of 32")
        if not self.augmentation.scales or min(self.augmentation.scales) <= 0:
            raise ConfigError("augmentation.scales must name at least one scale, all above 0")
        for key in BELOW_ONE:
            value = self._value(key)
            if not 0 <= value < 1:
                raise ConfigError(f"{key} is {value:g}; it must be at least 0 and below 1")
        for key in ("anchor_sides", "blur_sigma", "jpeg_quality"):
            bounds = getattr(self.augmentation, key)
            if len(bounds) != 2 or bounds[0] > bounds[1]:
                raise ConfigError(f"augmentation.{key} is {bounds}; expected the lowest and the highest value")
        if self.augmentation.anchor_sides[0] <= 0:
            raise ConfigError(f"augmentation.anchor_sides is {self.augmentation.anchor_sides}; sides must be above 0")
        if self.distillation.cache_gb and (
            not self.batches.views or self.distillation.feature_weight or len(set(sizes)) > 1
        ):
            raise ConfigError(
                "distillation.cache_gb needs views that repeat (batches.views above 0, a single size in "
                "augmentation.sizes) and no feature term (distillation.feature_weight = 0): only then are the "
                "teacher's outputs worth keeping"
            )


def from_dict(values: Mapping[str, Any], base: Config | None = None) -> Config:
    """A configuration from nested dictionaries; what they leave out is as in ``base``, by default the defaults.

    Raises:
        ConfigError: an option is unknown, or a value of the wrong kind.
    """
    config = _build(Config, values, base or Config(), "")
    config.check()
    return config


def load_config(path: str | os.PathLike, base: Config | None = None) -> Config:
    """Reads a ``.toml``, ``.yaml``, ``.yml`` or ``.json`` file.

    Raises:
        ConfigError: the file cannot be read, or as :func:`from_dict`.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {path} cannot be read: {error}") from error
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".yaml", ".yml", ".json"):
        raise ConfigError(f"the configuration {path} must be a .toml, .yaml or .json file")
    try:
        if suffix == ".toml":
            values = _toml().loads(text)
        elif suffix == ".json":
            values = json.loads(text)
        else:
            values = _yaml().safe_load(text) or {}
    except FeatherFaceError:
        raise
    except Exception as error:
        raise ConfigError(f"the configuration {path} is malformed: {error}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"the configuration {path} holds a {type(values).__name__}; expected sections with options")
    try:
        return from_dict(values, base)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def override(config: Config, assignments: Sequence[str]) -> Config:
    """Applies ``section.option=value`` strings; a value is written as in TOML, quotes around strings may be left out.

    Raises:
        ConfigError: an assignment is malformed, or as :func:`from_dict`.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts) or len(parts) < 2:
            raise ConfigError(f"{assignment!r} is not section.option=value, such as optimizer.lr=5e-4")
        place = values
        for part in parts[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{assignment!r}: {part} was given a value before and has no options of its own")
        place[parts[-1]] = _value(text.strip())
    return from_dict(values, config)


def dump(config: Config, comments: bool = True) -> str:
    """The configuration as TOML, every option with what it means."""
    lines: list[str] = []
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if comments:
            lines.append(f"# {(inspect.getdoc(type(value)) or '').splitlines()[0]}")
        lines.append(f"[{section.name}]")
        tables = []
        texts = _documentation(type(value)) if comments else {}
        for option in dataclasses.fields(value):
            item = getattr(value, option.name)
            if isinstance(item, list) and item and dataclasses.is_dataclass(item[0]):
                tables.append((option.name, item))
                continue
            lines += _comment(texts.get(option.name))
            lines.append(f"{option.name} = {_toml_value(item)}")
        lines.append("")
        for name, items in tables:
            for number, item in enumerate(items):
                texts = _documentation(type(item)) if comments and not number else {}
                lines.append(f"[[{section.name}.{name}]]")
                for option in dataclasses.fields(item):
                    lines += _comment(texts.get(option.name))
                    lines.append(f"{option.name} = {_toml_value(getattr(item, option.name))}")
                lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _build(cls: type, values: Mapping[str, Any], base: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')} is {values!r}; expected options by name")
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, 1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"there are: {', '.join(hints)}"
            raise ConfigError(f"unknown option {prefix}{name}; {hint}")
    made = {
        name: _convert(hint, values[name], getattr(base, name), f"{prefix}{name}")
        if name in values
        else _copy(base, name)
        for name, hint in hints.items()
    }
    try:
        return cls(**made)
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from error


def _copy(base: Any, name: str) -> Any:
    value = getattr(base, name)
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value)
    return list(value) if isinstance(value, list) else dict(value) if isinstance(value, dict) else value


def _convert(hint: Any, value: Any, base: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, base, f"{key}.")
    if typing.get_origin(hint) is list:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key} is {value!r}; expected a list")
        (inner,) = typing.get_args(hint)
        empty = inner() if dataclasses.is_dataclass(inner) else None
        return [_convert(inner, item, empty, f"{key}[{i}]") for i, item in enumerate(value)]
    if typing.get_origin(hint) is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} is {value!r}; expected options by name")
        return dict(value)
    if hint is float and not isinstance(value, bool):
        # YAML 1.1 takes 1e-3, without a point, for a string.
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif hint is str and isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    elif hint is bool and isinstance(value, bool):
        return value
    names = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}
    raise ConfigError(f"{key} is {value!r}; expected {names[hint]}")


def _value(text: str) -> Any:
    try:
        return _toml().loads(f"value = {text}")["value"]
    except ConfigError:
        pass
    except Exception:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _toml() -> Any:
    for name in ("tomllib", "tomli"):
        try:
            return __import__(name)
        except ModuleNotFoundError:
            continue
    raise ConfigError("reading TOML needs Python 3.11 or the package tomli; a .json file needs neither")


def _yaml() -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ConfigError(
            "reading YAML needs pyyaml: pip install 'featherface[train]', or write the configuration as .toml or .json"
        ) from error
    return yaml


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


def _comment(text: str | None) -> list[str]:
    if not text:
        return []
    text = text.replace("``", "")
    return textwrap.wrap(text[:1].upper() + text[1:], 118, initial_indent="# ", subsequent_indent="# ")


def _documentation(cls: type) -> dict[str, str]:
    """Option -> what its class's docstring says of it."""
    _, _, attributes = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in attributes.splitlines():
        match = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
        if match:
            names = match[1].split(", ")
            texts.update(dict.fromkeys(names[:1], match[2]))
        elif names and line.startswith("      "):
            texts[names[0]] += " " + line.strip()
    known = {option.name for option in dataclasses.fields(cls)}
    return {name: text for name, text in texts.items() if name in known}
