"""Batches of views, in an order that depends on (seed, epoch) alone."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from featherface.losses.targets import Targets

from .augment import (
    Augmentation,
    Faces,
    Look,
    Placed,
    View,
    crop,
    crop_table,
    develop,
    draw_view,
    generator,
    join_quarters,
    view_faces,
)
from .dataset import FaceData
from .workers import Processes, in_threads

_INDEX_BITS = 32
"""Of the number of an image, where what stands above says how often it was seen before."""


class Batch(NamedTuple):
    """What one step trains on.

    Attributes:
        images: (B, 3, S, S) float32, BGR minus the mean; S is one of the augmentation's sizes.
        targets: the faces.
        indices: (B,) int64, numbers of the images in the data set.
        epoch: the epoch that the views were drawn for.
    """

    images: Tensor
    targets: Targets
    indices: np.ndarray
    epoch: int


class _Drawn(NamedTuple):
    table: Tensor
    look: Look
    targets: Targets
    indices: np.ndarray
    size: int
    epoch: int


class _Undeveloped(NamedTuple):
    pixels: Tensor
    look: Look
    targets: Targets
    indices: np.ndarray
    epoch: int


def epoch_order(train: np.ndarray, source: np.ndarray, weights: list[float], seed: int, epoch: int) -> np.ndarray:
    """The images of one epoch, in the order in which they are seen.

    An image whose source has the weight w is there floor(w) times, and once more in a share w - floor(w) of the epochs.

    Args:
        train: (n,) int64, numbers of images.
        source: (n,) int64, the source of each.
        weights: per source.
    """
    rng = generator(seed, epoch, 2**32 - 1)
    whole = np.floor(np.asarray(weights))[source].astype(np.int64)
    rest = np.asarray(weights)[source] - whole
    order = np.repeat(train, whole + (rng.random(len(train)) < rest))
    return order[rng.permutation(len(order))]


def epoch_sizes(sizes: list[int], batches: int, seed: int, epoch: int) -> np.ndarray:
    """The side of the views of each batch of an epoch, in pixels: drawn from ``sizes``, the same in every process."""
    return generator(seed, epoch, 2**32 - 2).choice(np.asarray(sizes, np.int64), batches)


def times_before(order: np.ndarray) -> np.ndarray:
    """How often each element of ``order`` stands before its place."""
    places = np.argsort(order, kind="stable")
    values = order[places]
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    times = np.empty_like(order)
    times[places] = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    return times


def _chances(weights: np.ndarray) -> np.ndarray | None:
    """Probabilities in the ratio of ``weights``; None, which is all alike, where all are 0."""
    total = weights.sum()
    return weights / total if total > 0 else None


class Loader:
    """Batches of one epoch after another.

    Args:
        data: the training set.
        augmentation: of the views.
        batch_size: views in a batch of this process.
        seed: of order and views.
        device: where batches are wanted. With the data set's pixels on a GPU, views are made there.
        workers: threads that prepare batches ahead, or, with the data set's pixels on a GPU, processes that draw what
            they show; 0 prepares them when they are asked for. The batches do not depend on it.
        views: 0 draws new views in every epoch; n draws the same views again after n epochs.
        rank, world_size: of this process among those that train together; each gets its own part of every batch.
        multiple: the number of batches in an epoch is a multiple of this.

    Attributes:
        batches_per_epoch: batches of this process in an epoch.
        wait_seconds: time spent waiting for batches so far.
    """

    def __init__(
        self,
        data: FaceData,
        augmentation: Augmentation,
        batch_size: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        workers: int = 0,
        views: int = 0,
        rank: int = 0,
        world_size: int = 1,
        multiple: int = 1,
    ) -> None:
        self.data, self.augmentation, self.batch_size, self.seed = data, augmentation, batch_size, seed
        self.device, self.workers, self.views = torch.device(device), workers, views
        self.rank, self.world_size = rank, world_size
        self.wait_seconds = 0.0
        self._processes: Processes | None = None
        self._source = np.array([data.records[index].source for index in data.train], np.int64)
        annotated = np.array([data.records[index].annotation is not None for index in data.train], bool)
        weights = np.asarray(data.weights, np.float64)[self._source]
        # Images that a mosaic may take, and the chance of each.
        self._annotated, self._unannotated = (
            (data.train[chosen], _chances(weights[chosen])) for chosen in (annotated, ~annotated)
        )
        views = weights.sum()
        self.batches_per_epoch = max(1, int(views) // (batch_size * world_size * multiple)) * multiple

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from number ``first`` on. What is left over at its end is not seen in it."""
        order = epoch_order(self.data.train, self._source, self.data.weights, self.seed, epoch)
        together = self.batch_size * self.world_size
        # A set smaller than a batch, or an epoch whose draw came out a little short, starts over.
        order = np.resize(order if len(order) else self.data.train, self.batches_per_epoch * together)
        if not self.views:
            order = order + (times_before(order) << _INDEX_BITS)
        indices = order.reshape(-1, self.world_size, self.batch_size)[first:, self.rank]
        sizes = epoch_sizes(self.augmentation.sizes, self.batches_per_epoch, self.seed, epoch)[first:]
        batches = list(zip(indices, sizes.tolist()))
        prepared = self._ahead(batches, epoch) if self.workers else (self.prepare(*b, epoch) for b in batches)
        while True:
            start = time.perf_counter()
            batch = next(prepared, None)
            if batch is not None:
                batch = self._finish(batch)
            self.wait_seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def prepare(self, indices: np.ndarray, size: int, epoch: int) -> _Undeveloped | Batch:
        """The views of some images, ``size`` pixels wide and high: geometry, and on the CPU also colours. See
        :meth:`draw`."""
        return self._crop(self.draw(indices, size, epoch))

    def draw(self, indices: np.ndarray, size: int, epoch: int) -> _Drawn:
        """What the views of some images are, without their pixels.

        Args:
            indices: numbers of the images, and above ``_INDEX_BITS`` bits how often each was seen in the epoch before.
        """
        times, indices = indices >> _INDEX_BITS, indices & ((1 << _INDEX_BITS) - 1)
        placed: list[Placed] = []
        views, windows, faces = [], [], []
        for image, (index, before) in enumerate(zip(indices.tolist(), times.tolist())):
            drawn = generator(self.seed, epoch % self.views if self.views else epoch, index, before)
            if self.augmentation.mosaic and drawn.random() < self.augmentation.mosaic:
                quarters, own, seen = self._mosaic(index, drawn, image, size)
                view = quarters[0].view
                placed += quarters
            else:
                view, seen = self._view(index, drawn, size)
                own = [view.window(size)]
                placed.append(Placed(index, view, image, 0, 0, size))
            views.append(view)
            windows.append(own)
            faces.append(seen)
        targets = Targets.build(
            [f.boxes for f in faces],
            [f.landmarks for f in faces],
            [f.ignored for f in faces],
            [self.data.records[index].annotation is not None for index in indices],
        )
        return _Drawn(crop_table(self.data.store, placed), Look.of(views, windows), targets, indices, size, epoch)

    def _crop(self, drawn: _Drawn) -> _Undeveloped | Batch:
        pixels = crop(self.data.store.pixels, drawn.table, len(drawn.indices), drawn.size)
        batch = _Undeveloped(pixels, drawn.look, drawn.targets, drawn.indices, drawn.epoch)
        if self.device.type == "cpu":
            return self._finish(batch)
        if pixels.device.type == "cpu":
            batch = batch._replace(pixels=pixels.pin_memory(), targets=batch.targets.pin_memory())
        return batch

    def _view(self, index: int, drawn: np.random.Generator, size: int) -> tuple[View, Faces]:
        """Draws a view of an image, ``size`` pixels wide and high."""
        data, augmentation = self.data, self.augmentation
        height, width = data.store.sizes[index].tolist()
        boxes = data.boxes[index]
        view = draw_view(drawn, width, height, boxes, augmentation, size)
        return view, view_faces(view, boxes, data.landmarks[index], data.ignored[index], size, augmentation.min_face)

    def _mosaic(
        self, index: int, drawn: np.random.Generator, image: int, size: int
    ) -> tuple[list[Placed], list[tuple[int, int, int, int]], Faces]:
        """Draws four views, of an image and of three others with annotations if it has them, else without.

        Returns:
            The views, where the four photographs stand, and the faces.
        """
        others, chances = self._annotated if self.data.records[index].annotation is not None else self._unannotated
        half = size // 2
        corners = [(0, 0), (half, 0), (0, half), (half, half)]
        placed, windows, faces = [], [], []
        for chosen, (x, y) in zip([index, *drawn.choice(others, 3, p=chances).tolist()], corners):
            view, seen = self._view(chosen, drawn, half)
            x1, y1, x2, y2 = view.window(half)
            placed.append(Placed(chosen, view, image, x, y, half))
            windows.append((x + x1, y + y1, x + x2, y + y2))
            faces.append(seen)
        return placed, windows, join_quarters(faces)

    def _finish(self, batch: _Undeveloped | Batch) -> Batch:
        if isinstance(batch, Batch):
            return batch
        images = develop(batch.pixels.to(self.device, non_blocking=True), batch.look)
        return Batch(images, batch.targets.to(self.device, non_blocking=True), batch.indices, batch.epoch)

    def _ahead(self, batches: list[tuple[np.ndarray, int]], epoch: int) -> Iterator[_Undeveloped | Batch]:
        calls = [(indices, size, epoch) for indices, size in batches]
        if self.data.store.pixels.device.type == "cpu" or "fork" not in multiprocessing.get_all_start_methods():
            return in_threads(self.prepare, calls, self.workers)
        # What is left to do on a CPU is Python's own work, which threads would do one at a time.
        if self._processes is None:
            self._processes = Processes(self.draw, self.workers)
        return map(self._crop, self._processes.map(calls))

    def close(self) -> None:
        """Ends the processes that draw views."""
        if self._processes is not None:
            self._processes.close()
            self._processes = None
