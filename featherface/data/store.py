"""Photographs decoded once into one block of memory, so that no epoch waits for a decoder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from featherface.errors import DataError, ImageError
from featherface.files import atomic_write
from featherface.images import UNREADABLE, from_pil

_UNREADABLE = (*UNREADABLE, ImageError)
_FORMAT = 2

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class PixelStore:
    """Images one after the other, (H, W, 3) uint8 RGB.

    Attributes:
        pixels: (sum of H W 3,) uint8, in memory, mapped from a file, or on a GPU.
        offsets: (n,) int64, where each image starts.
        sizes: (n, 2) int64, height and width; 0 for an image that could not be decoded.
        scales: (n, 2) float64, stored over original height and width: 1 unless the image was reduced.
        failures: number of an image -> why it could not be decoded.
    """

    pixels: Tensor
    offsets: np.ndarray
    sizes: np.ndarray
    scales: np.ndarray
    failures: dict[int, str]

    def __len__(self) -> int:
        return len(self.offsets)

    def image(self, index: int) -> Tensor:
        """(H, W, 3) uint8 RGB view of the stored pixels."""
        height, width = self.sizes[index].tolist()
        start = int(self.offsets[index])
        return self.pixels[start : start + height * width * 3].view(height, width, 3)

    def to(self, device: torch.device | str) -> PixelStore:
        """The same store with its pixels on ``device``."""
        return PixelStore(self.pixels.to(device), self.offsets, self.sizes, self.scales, self.failures)


def decode_images(
    paths: Sequence[Path],
    max_side: int = 0,
    memory_limit_gb: float = 0.0,
    cache_dir: str | os.PathLike | None = None,
    threads: int = 0,
    progress: Progress | None = None,
    upright: Sequence[bool] | None = None,
) -> PixelStore:
    """Decodes images of any mode (:func:`featherface.images.from_pil`) into a :class:`PixelStore`.

    Images that cannot be decoded are recorded and skipped.

    Args:
        paths: the files.
        max_side: images whose longer side is larger are reduced to it (area average); 0 keeps every size.
        memory_limit_gb: refuse a set that would take more memory, before decoding it; 0 for no limit. It does not
            apply to ``cache_dir``, whose pages the system drops and reads again as it needs.
        cache_dir: keep the decoded pixels in a file there and map it into memory. The file is found again by the
            images' paths, sizes and times of change, by any process.
        threads: decoders at work; 0 for one per CPU.
        progress: called with the number of images done and of all images.
        upright: for each image, whether it is turned by its EXIF orientation; by default none is, as annotations mean
            the stored pixels.

    Raises:
        DataError: the set is too large for the memory limit, or the cache cannot be written.
    """
    threads = threads or os.cpu_count() or 1
    upright = [False] * len(paths) if upright is None else upright
    cache = None
    if cache_dir is not None:
        cache = Path(cache_dir) / f"pixels-{_fingerprint(paths, upright, max_side)}.u8"
        if (store := _open_cache(cache, len(paths))) is not None:
            return store
    failures: dict[int, str] = {}
    sizes = np.zeros((len(paths), 2), np.int64)
    scales = np.ones((len(paths), 2))
    with ThreadPoolExecutor(threads) as pool:
        for index, header in enumerate(pool.map(_read_size, paths, upright)):
            if isinstance(header, str):
                failures[index] = header
                continue
            sizes[index] = _reduced(header, max_side)
            scales[index] = sizes[index] / header
        ends = np.cumsum(sizes.prod(axis=1) * 3)
        offsets, total = np.concatenate([[0], ends[:-1]]).astype(np.int64), int(ends[-1]) if len(ends) else 0
        if cache is None and memory_limit_gb and total > memory_limit_gb * 2**30:
            raise DataError(
                f"the {len(paths)} images take {total / 2**30:.1f} GiB decoded, the limit is {memory_limit_gb:g}: "
                'raise data.memory_limit_gb, lower data.max_side, or set data.cache = "disk"'
            )

        def fill(pixels: np.ndarray) -> None:
            def decode(index: int) -> str | None:
                if index in failures:
                    return None
                height, width = sizes[index].tolist()
                slot = pixels[offsets[index] : offsets[index] + height * width * 3].reshape(height, width, 3)
                return _decode(paths[index], slot, upright[index])

            for index, failure in enumerate(pool.map(decode, range(len(paths)))):
                if failure is not None:
                    failures[index] = failure
                if progress is not None:
                    progress(index + 1, len(paths))

        if cache is None:
            pixels = np.empty(total, np.uint8)
            fill(pixels)
        else:
            _write_cache(cache, total, fill)
            pixels = _map(cache, total)
    for index in failures:
        sizes[index] = 0
    store = PixelStore(torch.from_numpy(pixels), offsets, sizes, scales, dict(sorted(failures.items())))
    if cache is not None:
        _write_index(cache, store)
    return store


def _read_size(path: Path, upright: bool) -> tuple[int, int] | str:
    try:
        with Image.open(path) as image:
            turned = upright and image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except _UNREADABLE as error:
        return str(error) or type(error).__name__


def _reduced(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    if not max_side or max(size) <= max_side:
        return size
    scale = max_side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _decode(path: Path, slot: np.ndarray, upright: bool) -> str | None:
    """Decodes into ``slot``; a reason when that is impossible."""
    try:
        with Image.open(path) as image:
            pixels = from_pil(image, upright)
        if pixels.shape != slot.shape:
            reduced = Image.fromarray(pixels).resize((slot.shape[1], slot.shape[0]), Image.Resampling.BOX)
            pixels = np.asarray(reduced)
        slot[...] = pixels
    except _UNREADABLE as error:
        return str(error) or type(error).__name__
    return None


def _fingerprint(paths: Sequence[Path], upright: Sequence[bool], max_side: int) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {max_side}".encode())
    for path, turned in zip(paths, upright):
        try:
            status = path.stat()
            digest.update(f"\n{path.resolve()} {status.st_size} {status.st_mtime_ns} {turned}".encode())
        except OSError:
            digest.update(f"\n{path} missing".encode())
    return digest.hexdigest()[:20]


def _map(cache: Path, total: int) -> np.ndarray:
    # Copy-on-write: PyTorch refuses memory that it may not write, and nothing here writes.
    return np.memmap(cache, np.uint8, "c", shape=(total,)) if total else np.empty(0, np.uint8)


def _write_cache(cache: Path, total: int, fill: Callable[[np.ndarray], None]) -> None:
    try:
        with atomic_write(cache) as temporary:
            if total:
                _reserve(temporary, total)
                pixels = np.memmap(temporary, np.uint8, "r+", shape=(total,))
                fill(pixels)
                pixels.flush()
    except OSError as error:
        raise DataError(f"the pixel cache {cache} cannot be written: {error.strerror or error}") from error


def _reserve(path: Path, total: int) -> None:
    """Takes the space now: a disk that fills up under a mapping kills the process instead of raising."""
    with open(path, "r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, total)
        else:
            file.truncate(total)


def _write_index(cache: Path, store: PixelStore) -> None:
    index = {
        "bytes": int(store.pixels.numel()),
        "offsets": store.offsets.tolist(),
        "sizes": store.sizes.tolist(),
        "scales": store.scales.tolist(),
        "failures": {str(key): value for key, value in store.failures.items()},
    }
    try:
        with atomic_write(cache.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(index), encoding="utf-8")
    except OSError as error:
        raise DataError(f"the pixel cache {cache} cannot be written: {error.strerror or error}") from error


def _open_cache(cache: Path, count: int) -> PixelStore | None:
    try:
        index = json.loads(cache.with_suffix(".json").read_text(encoding="utf-8"))
        if cache.stat().st_size != index["bytes"] or len(index["offsets"]) != count:
            return None
        return PixelStore(
            torch.from_numpy(_map(cache, index["bytes"])),
            np.array(index["offsets"], np.int64),
            np.array(index["sizes"], np.int64).reshape(-1, 2),
            np.array(index["scales"]).reshape(-1, 2),
            {int(key): value for key, value in index["failures"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
