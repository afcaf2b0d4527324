"""Small synthetic photographs with annotations, for tests of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def draw_face(draw: ImageDraw.ImageDraw, box) -> None:
    x1, y1, x2, y2 = box
    width, height = x2 - x1, y2 - y1
    draw.ellipse(box, fill=(224, 172, 140))
    for cx in (0.3, 0.7):
        draw.ellipse(
            (x1 + (cx - 0.1) * width, y1 + 0.3 * height, x1 + (cx + 0.1) * width, y1 + 0.45 * height), fill=(20, 20, 40)
        )
    draw.rectangle((x1 + 0.3 * width, y1 + 0.7 * height, x1 + 0.7 * width, y1 + 0.8 * height), fill=(150, 30, 40))


def landmarks_of(box) -> np.ndarray:
    """(5, 2): where :func:`draw_face` puts eyes, nose and corners of the mouth."""
    x1, y1, x2, y2 = box
    points = np.array([(0.3, 0.37), (0.7, 0.37), (0.5, 0.55), (0.3, 0.75), (0.7, 0.75)])
    return points * (x2 - x1, y2 - y1) + (x1, y1)


def make_faces(folder: Path, count: int = 6, size: int = 96, seed: int = 0, landmarks: bool = True) -> Path:
    """Writes ``folder/images/group/*.png`` and ``folder/label.txt`` (RetinaFace's format); returns ``folder``."""
    rng = np.random.default_rng(seed)
    images = folder / "images" / "group"
    images.mkdir(parents=True)
    lines = []
    for number in range(count):
        width, height = size + int(rng.integers(0, 24)), size + int(rng.integers(0, 24))
        noise = Image.fromarray(rng.integers(0, 255, (5, 6, 3), np.uint8))
        picture = noise.resize((width, height), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(picture)
        lines.append(f"# group/{number}.png")
        for column in range(1 + number % 2):
            side = int(rng.integers(24, size // 2 - 4))
            x = int(rng.integers(0, width // 2 - side)) + column * (width // 2)
            y = int(rng.integers(0, height - side))
            box = (x, y, x + side, y + side)
            draw_face(draw, box)
            row = [x, y, side, side]
            if landmarks:
                row += [value for px, py in landmarks_of(box) for value in (round(px, 2), round(py, 2), 0)] + [1]
            lines.append(" ".join(map(str, row)))
        picture.save(images / f"{number}.png")
    (folder / "label.txt").write_text("\n".join(lines) + "\n")
    return folder
