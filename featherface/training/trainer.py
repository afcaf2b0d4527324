"""The training loop."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from featherface.data import Batch, FaceData, Loader
from featherface.errors import CheckpointError, FeatherFaceError
from featherface.evaluation import SIZES
from featherface.files import atomic_write
from featherface.losses import FeatureAdapters, assign, distillation_loss, task_loss
from featherface.models import FeatherFace, create_model, list_models, save_weights, transfer_weights
from featherface.models.anchors import anchors
from ffkernels.config import build_policy, make_policy
from ffkernels.engine import Engine
from ffkernels.engine import build as build_engine

from .config import Config, from_dict
from .curves import draw_curves
from .data import read_data
from .network import Network, Predictions, Teacher, check_anchors, set_prior
from .optimizer import WeightAverage, build_optimizer, learning_rate
from .progress import Display
from .run_folder import RunFolder, Table, TrainingError, differences, git_revision
from .validation import detect_validation, score, validation_indices

TASK_TERMS = ("class", "box", "landmark")
TEACHER_TERMS = ("teacher_class", "teacher_box", "teacher_landmark", "teacher_feature")
DIVERGENCE_STEPS = 100
"""Steps before the loss is compared with its running mean, whose time constant this also is."""


@dataclass
class Result:
    """What a call of :func:`train` came to.

    Attributes:
        folder: of the run.
        finished: the schedule is over; False when the call was stopped and can be resumed.
        step, epoch: optimiser steps and epochs done.
        ap: validation AP of the last validation by group ("all" and sizes); empty before the first.
        best_ap: the highest "all" so far.
        signal: the signal that stopped the run; 0 for none.
    """

    folder: Path
    finished: bool
    step: int
    epoch: int
    ap: dict[str, float] = field(default_factory=dict)
    best_ap: float = float("nan")
    signal: int = 0


def train(
    config: Config,
    folder: str | os.PathLike,
    resume: bool = False,
    stop_after: float | None = None,
    quiet: bool = False,
) -> Result:
    """Trains a model, from the start or from the run's last checkpoint.

    Under torchrun every process calls it with the same arguments; the first one writes.

    Args:
        config: what to do.
        folder: the run's folder, see :class:`~featherface.training.run_folder.RunFolder`.
        resume: go on from the last checkpoint, if there is one. Without it a folder with a checkpoint is refused.
        stop_after: seconds after which the run stops with a checkpoint.
        quiet: say nothing.

    Raises:
        FeatherFaceError: of the kind that says what is wrong; before the first step wherever it can be known then.
    """
    config.check()
    with _distributed(config) as world:
        trainer = Trainer(config, folder, resume, world, quiet)
        try:
            return trainer.run(stop_after)
        finally:
            trainer.close()
            del trainer  # and with it what holds the group of processes


@dataclass(frozen=True)
class World:
    """The processes that train together, and this one's device."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def _distributed(config: Config) -> Iterator[World]:
    rank, size, local = (int(os.environ.get(name, default)) for name, default in _TORCHRUN)
    name = config.runtime.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise FeatherFaceError(f"runtime.device is {name!r}; expected auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise FeatherFaceError(f"runtime.device is {name}, and PyTorch finds no CUDA device; set it to cpu or auto")
        if device.index is None:
            device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise FeatherFaceError(f"runtime.device is {name!r}; training runs on cpu or cuda")
    if size == 1:
        yield World(rank, size, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(rank, size, device)
    finally:
        # Threads of the group end with the last module that holds it; one that outlives the interpreter aborts it.
        gc.collect()
        dist.destroy_process_group()


_TORCHRUN = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


class Trainer:
    """A run: built, checked, and ready for its next step. See :func:`train`."""

    def __init__(
        self, config: Config, folder: str | os.PathLike, resume: bool, world: World, quiet: bool = False
    ) -> None:
        self.config, self.world, self.device = copy.deepcopy(config), world, world.device
        self.quiet = quiet or not world.first
        self.folder: RunFolder | None = None
        self.display: Display | None = None
        self.board: Any = None
        self.loader: Loader | None = None
        self.path = Path(folder)
        if world.first:
            self.folder = RunFolder(folder)
        try:
            self._build(resume)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.loader is not None:
            self.loader.close()
        if self.display is not None:
            self.display.close()
        if self.board is not None:
            self.board.close()
        if self.folder is not None:
            self.folder.close()

    def say(self, text: str) -> None:
        if self.display is not None:
            self.display.message(text)
        elif not self.quiet:
            Display(0).message(text)

    # Building, in the order in which mistakes are cheapest to find.

    def _build(self, resume: bool) -> None:
        config, runtime = self.config, self.config.runtime
        checkpoint = self._checkpoint(resume)
        asked = build_policy()
        config.model.fused = config.model.fused or asked.mode
        self.policy = make_policy(config.model.fused, asked.backend if asked.backend != "auto" else None)
        torch.manual_seed(runtime.seed)
        if runtime.deterministic:
            torch.use_deterministic_algorithms(True)
        self.student = self._student(resumed=checkpoint is not None)
        self.teacher = self._teacher()
        adapters = None
        self.teacher_channels = check_anchors(self.teacher.model, "the teacher") if self.teacher else []
        channels = check_anchors(self.student, f"the student {config.model.name}")
        if self.teacher and config.distillation.feature_weight:
            adapters = FeatureAdapters(channels[0], self.teacher_channels[0]).to(self.device)
        self.network = Network(self.student, adapters)
        if runtime.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.network, config.optimizer)
        self.average = WeightAverage(self.student, config.average.decay) if config.average.decay else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=runtime.amp == "fp16")
        if self.folder is not None:
            # Weights, average and the optimiser's two moments, twice, and as much again for what else is written.
            self.folder.check_space(16 * sum(p.numel() * 4 for p in self.network.parameters()) + 2**24)

        self.data = self._data()
        if not self.teacher and (unlabelled := self._unlabelled()):
            raise TrainingError(
                f"{unlabelled} of the images to train on have no annotations and there is no teacher; name one in "
                "distillation.teacher, or remove their source"
            )
        batches = config.batches
        self.loader = Loader(
            self.data,
            config.augmentation,
            batches.size,
            runtime.seed,
            self.device,
            batches.workers,
            batches.views,
            self.world.rank,
            self.world.size,
            batches.accumulate,
        )
        self.steps_per_epoch = self.loader.batches_per_epoch // batches.accumulate
        self.total_steps = self.steps_per_epoch * config.schedule.epochs
        self.priors = {size: anchors(size, size).to(self.device) for size in config.augmentation.sizes}
        self.terms = [*TASK_TERMS, *(TEACHER_TERMS if self.teacher else ())]
        self.metrics = Table(
            self.path / "metrics.csv",
            ["step", "epoch", "lr", "loss", *self.terms, "gradient_norm", "images_per_second", "loader_share"],
        )
        self.validations = Table(
            self.path / "validation.csv", ["epoch", "step", "ap_all", *(f"ap_{name}" for name in SIZES)]
        )

        self.step = self.epoch = self.batch = 0
        self.sums = {name: torch.zeros((), device=self.device) for name in ("loss", *self.terms, "gradient_norm")}
        self.summed = 0
        self.mean_loss, self.mean_steps = 0.0, 0
        self.ap: dict[str, float] = {}
        self.best_ap = float("nan")
        lengths = (0, 0)
        if checkpoint is not None:
            lengths = self._restore(checkpoint)
        if self.folder is not None:
            if checkpoint is None:
                self.folder.begin(config)
            for table, length in zip((self.metrics, self.validations), lengths):
                if not table.restore(length):
                    self.say(f"{table.path} is shorter than the checkpoint says; rows are missing")
        self.model: nn.Module = self.network
        if self.world.size > 1:
            self.model = nn.parallel.DistributedDataParallel(
                self.network, device_ids=[self.device.index] if self.device.type == "cuda" else None
            )
        if runtime.compile:
            # The gradient of a maximum is shared by the values that equal it. Computed again in float32, none equals
            # the maximum that was rounded to bfloat16, and it is divided by a count of 0.
            options = {"emulate_precision_casts": True} if runtime.amp != "off" else None
            self.model = torch.compile(self.model, options=options)
        if runtime.tensorboard and self.world.first:
            self.board = _tensorboard(self.path)

    def _checkpoint(self, resume: bool) -> dict[str, Any] | None:
        """The checkpoint to go on from, the same in every process."""
        if self.folder is not None and self.folder.has_checkpoint() and not resume:
            raise TrainingError(f"{self.path} holds a run already; resume it (--resume) or choose another run folder")
        self.world.wait()
        if not resume:
            return None
        checkpoint = RunFolder.peek(self.path)
        if checkpoint is None:
            return None
        # Options that did not exist when the run began have their defaults.
        begun = from_dict(checkpoint["config"])
        # Empty is what FF_USE_FUSED said when the run began.
        self.config.model.fused = self.config.model.fused or begun.model.fused
        if changed := differences(begun.to_dict(), self.config.to_dict()):
            raise TrainingError(
                f"{self.path} was begun with other values of {', '.join(changed)}; resume it with the configuration "
                f"that it has in config.toml, or choose another run folder"
            )
        return checkpoint

    def _student(self, resumed: bool) -> FeatherFace:
        model = self.config.model
        names = (model.weights, model.transfer_weights, model.backbone_weights)
        # What a resumed run started from is in its checkpoint.
        model_weights, transfer, backbone = (self.config.path(name) if name and not resumed else None for name in names)
        student = create_model(
            model.name,
            weights=model_weights,
            # The file with more weights wins.
            backbone_weights=None if model_weights or transfer else backbone,
            fused=self.policy,
            **model.options,
        )
        if model.prior and not model_weights:
            set_prior(student, model.prior)
        if transfer and not model_weights:
            taken, total = transfer_weights(student, transfer)
            self.say(f"starts from {taken} of its {total} tensors in {transfer}")
        return student.to(self.device)

    def _teacher(self) -> Teacher | None:
        config = self.config.distillation
        if not config.teacher:
            return None
        if not config.weights:
            raise TrainingError(
                f"the teacher {config.teacher} has no weights; name its file in distillation.weights, or set "
                'distillation.teacher = "" to train without a teacher'
            )
        if config.teacher not in list_models():
            raise TrainingError(f"there is no teacher {config.teacher!r}; choose from: {', '.join(list_models())}")
        model = create_model(config.teacher, weights=self.config.path(config.weights), fused=self.policy).to(
            self.device
        )
        if self.config.runtime.channels_last:
            model.to(memory_format=torch.channels_last)
        engine = self._teacher_engine(model)
        if config.dtype == "bfloat16" and engine is None:
            model.bfloat16()
        return Teacher(model, config.cache_gb, self.config.batches.views, engine)

    def _teacher_engine(self, teacher: FeatherFace) -> Engine | None:
        """The teacher's inference engine, where fused kernels were asked for and no features are distilled."""
        policy = teacher.ff_policy
        asked = policy.mode != "0" and policy.backend in ("auto", "cpu")
        if not asked or self.device.type != "cpu" or self.config.distillation.feature_weight:
            return None
        size = self.config.augmentation.sizes[0]
        try:
            return build_engine(teacher, (1, 3, size, size), self.config.distillation.dtype, outputs="raw")
        except (TypeError, ValueError, RuntimeError) as error:
            if policy.mode == "require":
                raise
            self.say(f"the teacher runs without an inference engine: {error}")
            return None

    def _data(self) -> FaceData:
        cache = self.config.data.cache

        def load() -> FaceData:
            return read_data(self.config, self.path, self.say if self.world.first else None)

        # With a cache on disk, one process makes it and the others find it.
        if self.world.first or cache != "disk":
            data = load()
        self.world.wait()
        if not self.world.first and cache == "disk":
            data = load()
        if cache == "device":
            data = FaceData(**{**vars(data), "store": data.store.to(self.device)})
        self.say(
            f"{len(data.train)} images to train on ({self._unlabelled(data)} without annotations), "
            f"{len(data.validation)} to validate on"
        )
        distillation, task = self.config.distillation, self.config.task
        known = any(np.isfinite(data.landmarks[index]).any() for index in data.train)
        if not (distillation.teacher and distillation.landmark_weight) and not (
            known and task.landmark_weight and (distillation.task_weight or not distillation.teacher)
        ):
            self.say(
                "landmarks are not trained: no term of the loss has any to learn from (annotations without landmarks, "
                "or weights of 0 in task.landmark_weight and distillation.landmark_weight)"
            )
        return data

    def _unlabelled(self, data: FaceData | None = None) -> int:
        data = data or self.data
        return sum(data.records[index].annotation is None for index in data.train)

    # The loop.

    def run(self, stop_after: float | None = None) -> Result:
        """Steps until the schedule, a signal or ``stop_after`` ends it."""
        config = self.config
        deadline = math.inf if stop_after is None else time.monotonic() + stop_after
        save_at = time.monotonic() + 60 * config.runtime.checkpoint_minutes
        if self.world.first:
            self.display = Display(self.total_steps, self.step, self.quiet)
        received: list[int] = []
        # Not by steps: a run that was stopped at its last one has yet to validate.
        finished = self.epoch >= config.schedule.epochs
        self._clock()
        with _signals(received):
            while not finished:
                batches = self.loader.epoch(self.epoch, self.batch)
                while self.batch < self.loader.batches_per_epoch:
                    self._step([next(batches) for _ in range(config.batches.accumulate)])
                    self.batch += config.batches.accumulate
                    if self.step % config.runtime.log_every == 0 or self.step == self.total_steps:
                        self._log()
                    if self.display is not None:
                        self.display.step(self.step)
                    if self._agreed(bool(received) or time.monotonic() > deadline):
                        batches.close()
                        self._check_pending()
                        self._save()
                        return self._result(False, received[0] if received else 0)
                    if time.monotonic() > save_at and self.batch < self.loader.batches_per_epoch:
                        self._save()
                        save_at = time.monotonic() + 60 * config.runtime.checkpoint_minutes
                batches.close()
                self.epoch, self.batch = self.epoch + 1, 0
                self._check_pending()
                finished = self.epoch >= config.schedule.epochs
                every = config.validation.every
                if finished or (every and self.epoch % every == 0):
                    self._validate()
                self._save()
        self._export()
        return self._result(True, 0)

    def _result(self, finished: bool, number: int) -> Result:
        return Result(self.path, finished, self.step, self.epoch, self.ap, self.best_ap, number)

    def _step(self, batches: list[Batch]) -> None:
        """One step of the optimiser on ``batches``, whose gradients are averaged."""
        config = self.config
        rate = learning_rate(self.step, self.steps_per_epoch, config.schedule, config.optimizer.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            # Gradients of all but the last batch stay in their process.
            quiet = contextlib.nullcontext() if last or self.world.size == 1 else self.model.no_sync()
            with quiet:
                terms = self._losses(batch)
                loss = torch.stack([*terms.values()]).sum()
                if self.device.type == "cpu":
                    self._check(batch, float(loss.detach()), float("nan"), terms)
                self.scaler.scale(loss / len(batches)).backward()
            for name, value in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0) + value.detach() / len(batches)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.optimizer.clip or math.inf)
        if self.device.type == "cpu" and not self.scaler.is_enabled():
            self._check(batches[-1], float(sums["loss"]), float(norm), sums, gradients=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.student, self.step)
        self.step += 1
        self.summed += 1
        for name, value in {**sums, "gradient_norm": norm}.items():
            self.sums[name] += value
        self.images += len(batches) * config.batches.size * self.world.size
        if self.device.type != "cpu":
            # Looked at a step later, so that the GPU need not be waited for.
            self._check_pending()
            self.pending = (batches[-1], sums, self.step)

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms of one batch."""
        config, runtime = self.config, self.config.runtime
        images = batch.images.contiguous(
            memory_format=torch.channels_last if runtime.channels_last else torch.contiguous_format
        )
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(runtime.amp)
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            student = Predictions(*self.model(images))
            teacher = self.teacher(batch, images) if self.teacher else None
        size = images.shape[-1]
        priors = self.priors[size]
        assignment = assign(config.task, student.bbox, student.cls, batch.targets, priors, (size, size))
        terms = task_loss(
            config.task,
            student.bbox,
            student.cls,
            student.landmarks,
            batch.targets,
            priors,
            assignment,
            self._mean_count,
        )
        if teacher is None:
            return terms
        terms = {name: config.distillation.task_weight * value for name, value in terms.items()}
        return terms | distillation_loss(
            config.distillation,
            student[:3],
            teacher[:3],
            priors,
            batch.targets.labelled,
            student.features,
            teacher.features,
            self._mean_count,
        )

    def _mean_count(self, count: Tensor) -> Tensor:
        """The mean over the processes of what each divides its sums by."""
        if self.world.size > 1:
            count = count.clone()
            dist.all_reduce(count)
            count /= self.world.size
        return count

    def _check_pending(self) -> None:
        pending, self.pending = getattr(self, "pending", None), None
        if pending is not None:
            batch, sums, _ = pending
            self._check(batch, float(sums["loss"]), float("nan"), sums)

    def _check(self, batch: Batch, loss: float, norm: float, terms: dict[str, Tensor], gradients: bool = False) -> None:
        """Stops the run, with the batch that caused it saved, when the loss is not finite or has run away."""
        reason = ""
        if not math.isfinite(loss):
            reason = f"the loss is {loss}"
        elif gradients and not math.isfinite(norm):
            reason = f"the norm of the gradients is {norm}"
        limit = self.config.runtime.divergence
        if not gradients and not reason:
            if limit and self.mean_steps >= DIVERGENCE_STEPS and loss > limit * max(self.mean_loss, 1e-6):
                reason = f"the loss is {loss:.4g}, {limit:g} times its running mean of {self.mean_loss:.4g}"
            else:
                self.mean_steps += 1
                self.mean_loss += (loss - self.mean_loss) / min(self.mean_steps, DIVERGENCE_STEPS)
        if not reason:
            return
        path = self.path / (f"bad_batch_{self.world.rank}.pt" if self.world.size > 1 else "bad_batch.pt")
        values = {name: float(value.detach()) for name, value in terms.items()}
        try:
            with atomic_write(path) as temporary:
                torch.save(
                    {
                        "images": batch.images.cpu(),
                        "targets": batch.targets.to("cpu")._asdict(),
                        "names": [self.data.records[index].name for index in batch.indices],
                        "epoch": batch.epoch,
                        "step": self.step,
                        "terms": values,
                    },
                    temporary,
                )
            saved = f"the batch is saved in {path}"
        except OSError as error:
            saved = f"the batch could not be saved ({error.strerror or error})"
        listed = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "loss")
        harmless = ", or, if it is harmless, resume with --set runtime.divergence=0" if math.isfinite(loss) else ""
        raise TrainingError(
            f"step {self.step}: {reason} ({listed}); {saved}; look at it and begin a new run with a lower "
            f"optimizer.lr, from weights of this one if it has validated some (model.weights = best.safetensors)"
            f"{harmless}"
        )

    def _agreed(self, stop: bool) -> bool:
        """Whether to stop now; together with the other processes, which are asked every tenth step."""
        if self.world.size == 1:
            return stop
        if self.step % 10:
            return False
        flag = torch.tensor(float(stop), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    # What is written.

    def _clock(self) -> None:
        self.images, self._since, self._waited = 0, time.perf_counter(), self.loader.wait_seconds

    def _log(self) -> None:
        values = {name: float(total) / self.summed for name, total in self.sums.items()}
        for total in self.sums.values():
            total.zero_()
        self.summed = 0
        seconds = time.perf_counter() - self._since
        row = {
            "step": self.step,
            "epoch": self.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            **{name: round(value, 7) for name, value in values.items()},
            "images_per_second": round(self.images / seconds, 2),
            "loader_share": round((self.loader.wait_seconds - self._waited) / seconds, 4),
        }
        self._clock()
        if self.folder is None:
            return
        self.metrics.add(row)
        self.display.row(row)
        if self.board is not None:
            for name, value in row.items():
                if name not in ("step", "epoch"):
                    self.board.add_scalar(f"train/{name}", value, self.step)

    def _validate(self) -> None:
        started = time.perf_counter()
        indices = validation_indices(self.data, self.config.validation)
        if not len(indices):
            return
        model = self.average.model if self.average is not None else self.student
        own = indices[self.world.rank :: self.world.size]
        found = detect_validation(model, self.data, own, self.config.validation, self.config.runtime.channels_last)
        if self.world.size > 1:
            parts: list[Any] = [None] * self.world.size
            dist.all_gather_object(parts, found)
            found = {name: rows for part in parts for name, rows in part.items()}
        self.ap = score(found, self.data, indices)
        better = not self.best_ap >= self.ap["all"]
        if better:
            self.best_ap = self.ap["all"]
        if self.folder is not None:
            rounded = {f"ap_{name}": round(value, 6) for name, value in self.ap.items()}
            self.validations.add({"epoch": self.epoch, "step": self.step, **rounded})
            self.display.validated(self.epoch, self.ap)
            if better:
                self._write_weights("best.safetensors", model)
            self._draw()
            if self.board is not None:
                for name, value in rounded.items():
                    self.board.add_scalar(f"validation/{name}", value, self.step)
        # The time it took is not the training's.
        self._since += time.perf_counter() - started

    def _draw(self) -> None:
        try:
            draw_curves(self.metrics.read(), self.validations.read(), self.path / "curves.png")
        except OSError as error:
            raise TrainingError(f"curves.png cannot be written: {error.strerror or error}") from error

    def _write_weights(self, name: str, model: FeatherFace) -> None:
        config = self.config
        metadata = {
            "step": str(self.step),
            "epoch": str(self.epoch),
            "validation_ap": f"{self.ap.get('all', float('nan')):.4f}",
            "teacher": config.distillation.teacher,
            "sources": ", ".join(source.folder for source in config.data.sources),
            "revision": git_revision() or "",
        }
        save_weights(model, self.path / name, {key: value for key, value in metadata.items() if value})

    def _export(self) -> None:
        if self.folder is None:
            return
        from .model_card import model_card

        self._write_weights("final.safetensors", self.average.model if self.average is not None else self.student)
        self._draw()
        self.folder.write("model_card.md", model_card(self.path))

    def _state(self) -> dict[str, Any]:
        return {
            "config": self.config.to_dict(),
            "network": self.network.state_dict(),
            "average": self.average.model.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "sums": self.sums,
            "summed": self.summed,
            "mean": [self.mean_loss, self.mean_steps],
            "ap": self.ap,
            "best_ap": self.best_ap,
            "threads": torch.get_num_threads(),
            "lengths": [self.metrics.length(), self.validations.length()],
            "world_size": self.world.size,
            "batches_per_epoch": self.loader.batches_per_epoch,
        }

    def _save(self) -> None:
        self._check_pending()
        if self.folder is not None:
            self.metrics.sync()
            self.validations.sync()
            self.folder.save(self._state())

    def _restore(self, state: dict[str, Any]) -> tuple[int, int]:
        """Takes over a checkpoint; returns the lengths of the two tables."""
        if (state["world_size"], state["batches_per_epoch"]) != (self.world.size, self.loader.batches_per_epoch):
            raise TrainingError(
                f"{self.path} was trained by {state['world_size']} processes with {state['batches_per_epoch']} batches "
                f"an epoch, this is {self.world.size} with {self.loader.batches_per_epoch}: the number of processes or "
                "the images have changed; resume with those of before"
            )
        try:
            self.network.load_state_dict(state["network"])
            if self.average is not None:
                self.average.model.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint in {self.path} is of another model: {error}") from error
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.summed = state["summed"]
        self.mean_loss, self.mean_steps = state["mean"]
        self.ap, self.best_ap = dict(state["ap"]), state["best_ap"]
        self.say(f"resumed at step {self.step} of {self.total_steps}, epoch {self.epoch}")
        before, threads = state.get("threads"), torch.get_num_threads()
        if self.device.type == "cpu" and before not in (None, threads):
            self.say(
                f"it ran with {before} CPU threads and goes on with {threads}: sums round differently "
                f"(OMP_NUM_THREADS={before} keeps the bits)"
            )
        return tuple(state["lengths"])


@contextlib.contextmanager
def _signals(received: list[int]) -> Iterator[None]:
    """SIGTERM and SIGINT end the step that is under way, not the process; a second one of them does."""

    def handle(number: int, frame: Any) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(number)

    before = {}
    # Handlers belong to the main thread; elsewhere the caller has its own.
    with contextlib.suppress(ValueError):
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tensorboard(path: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError(
            "runtime.tensorboard needs tensorboard: pip install 'featherface[train]', or set it to false"
        ) from error
    return SummaryWriter(path / "tensorboard")
