"""What a detector returns for one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

LANDMARK_NAMES = ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")
"""Order of the five landmarks; left and right as seen in the picture."""


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """Faces of one image, best score first, in pixels of the original image (upright, if EXIF says it is turned).

    Pixel (0, 0) covers the square from (0, 0) to (1, 1). Boxes lie inside the image, landmarks may lie outside.

    Attributes:
        boxes: (n, 4) float32, ``x1 y1 x2 y2``.
        scores: (n,) float32, probability of a face.
        landmarks: (n, 5, 2) float32, x and y in the order of :data:`LANDMARK_NAMES`.
        image_size: (height, width) of the image.
    """

    boxes: np.ndarray
    scores: np.ndarray
    landmarks: np.ndarray
    image_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: slice | np.ndarray | list[int] | int) -> Detections:
        """Some of the faces: by slice, mask, indices or, as a result with one face, by number."""
        if isinstance(index, (int, np.integer)):
            index = range(len(self))[index]
            index = slice(index, index + 1)
        return Detections(self.boxes[index], self.scores[index], self.landmarks[index], self.image_size)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        height, width = self.image_size
        best = f", best score {self.scores[0]:.3f}" if len(self) else ""
        return f"Detections({len(self)} face{'' if len(self) == 1 else 's'} in {width}x{height}{best})"

    @classmethod
    def empty(cls, image_size: tuple[int, int]) -> Detections:
        """No faces in an image of (height, width)."""
        return cls(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros((0, 5, 2), np.float32), image_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON: ``width``, ``height`` and ``faces``, each with ``box`` (x1 y1 x2 y2),
        ``score`` and ``landmarks`` (name to [x, y])."""
        height, width = self.image_size
        faces = [
            {
                "box": _rounded(box),
                "score": round(float(score), 6),
                "landmarks": {name: _rounded(point) for name, point in zip(LANDMARK_NAMES, points)},
            }
            for box, score, points in zip(self.boxes, self.scores, self.landmarks)
        ]
        return {"width": width, "height": height, "faces": faces}


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 3) for value in values]
