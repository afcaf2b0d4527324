"""Weights files: reading them without running code, fitting them to a model, writing them whole."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import atomic_write

# Where training programs put the state_dict inside a checkpoint.
CONTAINERS = ("state_dict", "model_state_dict", "model")
# Prefixes of nn.DataParallel and torch.compile.
WRAPPERS = ("module.", "_orig_mod.")
# Buffers that the thop profiler leaves in the checkpoints of models it has counted.
EXTRAS = ("total_ops", "total_params")

NODES = {"conv4_up": "p4_up", "conv3_up": "p3_out", "conv4_down": "p4_out", "conv5_down": "p5_out"}
FUSION = {"p4_w1": "p4_up", "p3_w1": "p3_out", "p4_w2": "p4_out", "p5_w2": "p5_out"}
PUBLISHED_V1 = (
    (re.compile(r"(bifpn\.\d\.)(p[34]_w[12]|p5_w2)$"), lambda m: f"{m[1]}{FUSION[m[2]]}.fusion_weight"),
    (
        re.compile(r"(bifpn\.\d\.)(conv[345]_(?:up|down))\.(depthwise|pointwise)_conv\.conv\."),
        lambda m: f"{m[1]}{NODES[m[2]]}.{m[3]}.",
    ),
    (re.compile(r"(bifpn\.\d\.)(conv[345]_(?:up|down))\.bn\."), lambda m: f"{m[1]}{NODES[m[2]]}.bn."),
    (
        re.compile(r"(bifpn\.0\.)p([345])_down_channel\.(?:(0)\.conv|(1))\."),
        lambda m: f"{m[1]}laterals.{int(m[2]) - 3}.{m[3] or m[4]}.",
    ),
    (
        re.compile(r"(bifpn\.0\.)p([45])_down_channel_2\.(?:(0)\.conv|(1))\."),
        lambda m: f"{m[1]}bottom_up_laterals.{int(m[2]) - 4}.{m[3] or m[4]}.",
    ),
    (re.compile(r"((?:Class|Bbox|Landmark)Head\.\d\.)conv1x1\."), lambda m: m[1]),
)


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a PyTorch checkpoint (any other suffix), on the CPU.

    Names are brought to those of this package: prefixes of wrappers are removed, the published V1's names are
    translated, and what profilers left is dropped. A pickle that holds anything but tensors and plain values is refused
    without running it.

    Raises:
        CheckpointError: the file is missing, unreadable, damaged, refused, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path} is {'a directory' if path.is_dir() else 'missing'}: give the path of a weights file"
        )
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:
        if "unsupported global" in str(error).lower():
            raise CheckpointError(
                f"{path} holds more than tensors and was refused, because loading it could run code: "
                "save its state_dict alone, best as .safetensors"
            ) from error
        raise CheckpointError(f"{path} is damaged or is not a weights file: get it again") from error
    for key in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds no weights by name, but a {type(content).__name__}: save a state_dict")
    tensors = {
        ours(name): value for name, value in content.items() if isinstance(value, Tensor) and isinstance(name, str)
    }
    tensors = {name: value for name, value in tensors.items() if name.rpartition(".")[2] not in EXTRAS}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors: save a state_dict")
    return tensors


def ours(name: str) -> str:
    """The name that this package gives to the tensor ``name`` of a foreign checkpoint; its own names stay."""
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    for pattern, replacement in PUBLISHED_V1:
        name = pattern.sub(replacement, name)
    return name


def shared_names(model: nn.Module) -> list[list[str]]:
    """Names in the state_dict of every tensor of ``model``: more than one where modules share it."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], source: str | os.PathLike) -> None:
    """Copies ``tensors`` into ``model``; every tensor must be there under one of its names, and none besides.

    Raises:
        CheckpointError: tensors are missing, unknown, of another shape, or differ where the model has one. The model is
            then as it was.
    """
    state = model.state_dict()
    complete: dict[str, Tensor] = {}
    missing: list[str] = []
    for names in shared_names(model):
        found = [tensors[name] for name in names if name in tensors]
        if not found:
            missing.append(names[0])
            continue
        if not all(value.shape == found[0].shape and torch.equal(value, found[0]) for value in found[1:]):
            raise CheckpointError(
                f"{source} does not fit: {listed(names)} are one tensor in the model and differ in the file"
            )
        complete.update(dict.fromkeys(names, found[0]))
    unknown = [name for name in tensors if name not in state]
    reshaped = [
        f"{name} {tuple(value.shape)} instead of {tuple(state[name].shape)}"
        for name, value in complete.items()
        if value.shape != state[name].shape
    ]
    problems = [
        f"{what} {listed(names)}"
        for what, names in (("it lacks", missing), ("it holds unknown", unknown), ("it holds", reshaped))
        if names
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(complete)


def load_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Loads a weights file into ``model``. See :func:`read_tensors` and :func:`load_tensors`."""
    load_tensors(model, read_tensors(path), path)


def load_backbone(model: nn.Module, path: str | os.PathLike) -> None:
    """Loads the backbone of any FeatherFace checkpoint, or an ImageNet classifier's, into ``model.body``.

    Raises:
        CheckpointError: the file cannot be read, or holds no MobileNetV1 x0.25.
    """
    tensors = read_tensors(path)
    body = {name.removeprefix("body."): value for name, value in tensors.items() if name.startswith("body.")}
    if not body:
        body = {name: value for name, value in tensors.items() if name.startswith("stage")}
    if not body:
        raise CheckpointError(
            f"{path} holds no backbone: its names start with {listed(tensors)}, none with body or stage"
        )
    load_tensors(model.body, body, f"the backbone in {path}")


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """What :func:`save_weights` noted in a ``.safetensors`` file; nothing for other files or unreadable ones."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, safetensors.SafetensorError):
        return {}


def save_weights(model: nn.Module, path: str | os.PathLike, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the state_dict of ``model``: ``.safetensors``, with each shared tensor once, or ``.pth``.

    A ``.safetensors`` file also holds ``metadata``, the model's name as ``model`` and its options, in JSON, as
    ``options``: :func:`featherface.create_model` follows them. The same model and metadata make the same bytes.
    The file is complete or not there at all.

    Raises:
        CheckpointError: the suffix is neither ``.safetensors`` nor ``.pth`` or ``.pt``, a ``.pth`` file is to hold a
            model with other than the usual options, which it has no place for, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise CheckpointError(f"{path}: weights are written as .safetensors, .pth or .pt")
    if path.suffix != ".safetensors" and (options := getattr(model, "options", None)):
        with torch.device("meta"):
            usual = type(model)().options
        if options != usual:
            raise CheckpointError(f"{path}: only a .safetensors file tells the model's options, {dict(options)}")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        with atomic_write(path) as temporary:
            if path.suffix == ".safetensors":
                unique = {names[0]: state[names[0]] for names in shared_names(model)}
                noted = {"format": "pt", **(metadata or {})}
                if name := getattr(model, "name", None):
                    noted |= {"model": name, "options": json.dumps(dict(model.options))}
                temporary.write_bytes(_in_order(safetensors.torch.save(unique, noted)))
            else:
                torch.save(state, temporary)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the library writes it in an order of its own each time."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[end:]


def listed(names: Iterable[str], limit: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
