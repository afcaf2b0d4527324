"""Boxes, scores and landmarks drawn into a picture."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from .detections import Detections
from .images import ImageLike, upright_pixels

BOX_COLOUR = (0, 220, 90)
TEXT_COLOUR = (0, 0, 0)
LANDMARK_COLOURS = ((255, 64, 64), (64, 128, 255), (255, 220, 0), (255, 64, 255), (0, 230, 230))


def draw_faces(
    image: ImageLike,
    detections: Detections,
    scores: bool = True,
    landmarks: bool = True,
    line_width: int | None = None,
) -> Image.Image:
    """A copy of the picture with every face marked.

    Args:
        image: what the faces were found in, as :meth:`featherface.FaceDetector.detect` takes it.
        detections: the faces.
        scores: write each score, in percent, above its box, or inside where the picture ends; boxes narrower than the
            text go without.
        landmarks: draw the five points, each in its own colour.
        line_width: in pixels; by default it follows the sizes of the picture and of the face.

    Returns:
        A new RGB image, upright.

    Raises:
        ImageError: the image cannot be read, or has another size than the one the faces were found in.
    """
    picture = Image.fromarray(upright_pixels(image, detections.image_size))
    canvas = ImageDraw.Draw(picture)
    widest = line_width or max(1, round(max(picture.size) / 300))
    # The best face is drawn last, on top of the others.
    for box, score, points in zip(detections.boxes[::-1], detections.scores[::-1], detections.landmarks[::-1]):
        x1, y1, x2, y2 = (float(v) for v in box)
        side = min(x2 - x1, y2 - y1)
        width = line_width or max(1, min(widest, round(side / 20)))
        canvas.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=BOX_COLOUR, width=width)
        if landmarks:
            radius = max(0.5, min(1.5 * widest, side / 30))
            for (x, y), colour in zip(points.tolist(), LANDMARK_COLOURS):
                canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        if scores:
            text = f"{100 * float(score):.0f}"
            font = ImageFont.load_default(size=max(9, 4 * width + 6))
            left, top, right, bottom = font.getbbox(text)
            text_width, text_height = right - left + 4, bottom - top + 4
            if text_width <= x2 - x1:
                y = y1 - text_height if y1 >= text_height else y1
                canvas.rectangle((x1, y, x1 + text_width - 1, y + text_height - 1), fill=BOX_COLOUR)
                canvas.text((x1 + 2 - left, y + 2 - top), text, fill=TEXT_COLOUR, font=font)
    return picture
