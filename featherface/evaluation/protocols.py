"""Test protocols: at what size an image is shown to the network.

The same network moves by tens of points of AP between protocols, so every result names its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import interpolate

from ..errors import DataError

SCORE_THRESHOLD = 0.02
NMS_THRESHOLD = 0.4


@dataclass(frozen=True)
class Protocol:
    """How an image is resized. It is never padded: the networks take any size.

    Attributes:
        name: ``orig``, ``vga640``, ``qvga320`` or ``s1600``.
        description: one sentence.
        short: the length that the short side is brought to; None leaves the size alone.
        long: the largest length of the long side; it wins over ``short``.
    """

    name: str
    description: str
    short: int | None = None
    long: int | None = None

    def scale(self, width: int, height: int) -> float:
        """Factor by which an image of this size is enlarged or reduced."""
        scale = self.short / min(width, height) if self.short else 1.0
        if self.long and round(scale * max(width, height)) > self.long:
            scale = self.long / max(width, height)
        return scale

    def resize(self, image: np.ndarray) -> np.ndarray:
        """The image as the network is to see it.

        Bilinear with pixel centres at halves and without a low-pass filter (OpenCV's ``INTER_LINEAR``, which the
        published results of these protocols used); a side is ``max(1, round(side * scale))``.

        Args:
            image: (H, W, 3) uint8.

        Returns:
            (H', W', 3) uint8; the same array when the size does not change.
        """
        height, width = image.shape[:2]
        scale = self.scale(width, height)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        if size == (height, width):
            return image
        planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
        planes = interpolate(planes, size=size, mode="bilinear", align_corners=False, antialias=False)
        return planes[0].permute(1, 2, 0).round().clamp(0, 255).byte().contiguous().numpy()


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("orig", "image at its original size"),
        Protocol("vga640", "long side limited to 640 pixels, smaller images unchanged", long=640),
        Protocol("qvga320", "long side limited to 320 pixels, smaller images unchanged", long=320),
        Protocol("s1600", "short side 1600 pixels, long side at most 2150", short=1600, long=2150),
    )
}


def get_protocol(name: str | Protocol) -> Protocol:
    """The protocol of that name.

    Raises:
        DataError: there is none.
    """
    if isinstance(name, Protocol):
        return name
    if name not in PROTOCOLS:
        raise DataError(f"there is no protocol {name!r}; choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
