"""Near-duplicates, and a validation part that shares none with the training part."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import interpolate

from .store import PixelStore

HASH_SIDE = 16
MAX_DISTANCE = 40
"""Of 256 bits; photographs that have nothing in common differ in about 128."""


def difference_hashes(store: PixelStore) -> np.ndarray:
    """Difference hash of every image: is a pixel of its 16 x 17 grey thumbnail darker than its right neighbour?

    Returns:
        (n, 32) uint8, 256 bits for each image; zeros for an image that could not be decoded.
    """
    hashes = np.zeros((len(store), HASH_SIDE * HASH_SIDE // 8), np.uint8)
    for index in range(len(store)):
        if store.sizes[index].min() < 1:
            continue
        image = store.image(index).permute(2, 0, 1)[None]
        size = (HASH_SIDE, HASH_SIDE + 1)
        if image.device.type != "cpu":
            image = image.float()
        grey = interpolate(image, size, mode="bilinear", antialias=True)[0].float().mean(0)
        hashes[index] = np.packbits((grey[:, 1:] > grey[:, :-1]).cpu().numpy().ravel())
    return hashes


def group_duplicates(hashes: np.ndarray, max_distance: int = MAX_DISTANCE) -> np.ndarray:
    """Groups of images connected by hashes that differ in at most ``max_distance`` bits.

    Args:
        hashes: (n, bytes) uint8.

    Returns:
        (n,) int64: the lowest number of an image in the same group.
    """
    count = len(hashes)
    bits = torch.from_numpy(np.unpackbits(hashes, axis=1).astype(np.float32)) * 2 - 1
    group = np.arange(count)

    def root(index: int) -> int:
        while group[index] != index:
            group[index] = group[group[index]]
            index = group[index]
        return index

    width = bits.shape[1] if count else 0
    for start in range(0, count, 1024):
        distance = (width - bits[start : start + 1024] @ bits.T) / 2
        for a, b in torch.nonzero(distance <= max_distance).tolist():
            a, b = root(start + a), root(b)
            group[max(a, b)] = min(a, b)
    return np.array([root(index) for index in range(count)], np.int64)


def validation_groups(names: Sequence[str], groups: np.ndarray, fractions: Sequence[float], seed: int) -> np.ndarray:
    """Which images are kept for validation: whole groups, chosen by a hash of their names.

    The choice for a group depends on the seed and its names alone, not on the order of the images or on what else is
    there. A group with images of several fractions takes the largest.

    Args:
        names: of the images.
        groups: (n,), from :func:`group_duplicates`.
        fractions: (n,), the share that each image's source gives.

    Returns:
        (n,) bool.
    """
    chosen = np.zeros(len(names), bool)
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups.tolist()):
        members.setdefault(group, []).append(index)
    for indices in members.values():
        fraction = max(fractions[i] for i in indices)
        name = min(names[i] for i in indices)
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        chosen[indices] = int.from_bytes(digest[:8], "big") < fraction * 2**64
    return chosen
