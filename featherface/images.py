"""Images from files, Pillow, NumPy and PyTorch, as (H, W, 3) arrays of red, green and blue, 0 to 255."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ffkernels.ops.preprocess import MEAN

from .errors import ImageError

ImageLike = str | os.PathLike | Image.Image | np.ndarray | Tensor
"""One image: a path, a Pillow image, an (H, W, 3) array, a (3, H, W) tensor."""

SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "dib", "gif", "tif", "tiff", "avif", "mpo"),
        *("ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "tga"),
    )
)
"""File names that are taken for images in a folder. A file that is named itself may have any name."""

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error),
    Image.DecompressionBombError,
    AssertionError,
)
"""What Pillow raises for damaged files, for larger ones than it opens, and for closed ones."""


class Source(NamedTuple):
    """An image that is read when it is needed: its name for messages, and how to get it."""

    name: str
    read: Callable[[], np.ndarray | Tensor]


def load(path: str | os.PathLike) -> np.ndarray:
    """Read an image file as an (H, W, 3) uint8 array of red, green, blue, turned upright by its EXIF orientation.

    Every format and mode that Pillow reads is served: see :func:`from_pil`. Of an animation, the first frame.

    Raises:
        ImageError: the file is missing, empty, truncated, too large or not an image.
    """
    path = Path(path)
    if path.is_dir():
        raise ImageError(f"{path} is a folder, not an image file")
    try:
        if path.is_file() and path.stat().st_size == 0:
            raise ImageError(f"{path} is an empty file")
        with Image.open(path) as image:
            return from_pil(image)
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist") from None
    except PermissionError:
        raise ImageError(f"{path} may not be read (permission denied)") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path} is not an image of a known format") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise ImageError(f"{path} has more than {limit} million pixels; reduce it or cut it into parts") from None
    except UNREADABLE as error:
        raise ImageError(f"{path} is damaged or truncated ({error})") from error


def from_pil(image: Image.Image, upright: bool = True) -> np.ndarray:
    """(H, W, 3) uint8 red, green, blue of a Pillow image in any mode, turned upright by its EXIF orientation unless
    ``upright`` is False.

    Transparent pixels show the networks' mean colour; 16-bit values are divided by 257; values of 32-bit images are
    taken as 8-bit, as 16-bit or, beyond that, relative to the largest one, and floating point up to 1 as a share.

    Raises:
        ImageError: the image has no pixels.
    """
    if 0 in image.size:
        raise ImageError(f"the image has no pixels (width {image.width}, height {image.height})")
    if upright:
        image = ImageOps.exif_transpose(image)
    if image.mode in _SIXTEEN_BIT or image.mode in ("I", "F"):
        return _grey_to_rgb(_to_8_bit(np.asarray(image), image.mode in _SIXTEEN_BIT, image.mode == "F"))
    if image.has_transparency_data:
        return _flatten_alpha(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def from_array(array: np.ndarray) -> np.ndarray:
    """(H, W, 3) array of red, green, blue from an array of one, three or four channels (grey, RGB, RGBA) or of two
    dimensions (grey): uint8, uint16 (divided by 257), integers 0 to 255, or floating point 0 to 255, which stay so.

    Raises:
        ImageError: shape, dtype or values are not those of an image.
    """
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        hint = "; move the channels last" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise ImageError(f"an array of shape {array.shape} is not an image: expected (height, width, 3){hint}")
    if 0 in array.shape:
        raise ImageError(f"an array of shape {array.shape} has no pixels")
    if array.dtype.newbyteorder("=") == np.uint16:
        array = _to_8_bit(array, sixteen=True)
    elif array.dtype != np.uint8:
        if array.dtype == np.bool_ or not (
            np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)
        ):
            raise ImageError(f"an array of {array.dtype} is not an image: expected uint8, or floating point 0 to 255")
        floating = np.issubdtype(array.dtype, np.floating)
        _check_range(float(array.min()), float(array.max()), floating)
        array = array.astype(np.float32 if floating else np.uint8)
    if array.ndim == 2 or array.shape[2] == 1:
        return _grey_to_rgb(array.reshape(array.shape[:2]))
    return _flatten_alpha(array) if array.shape[2] == 4 else array


def from_tensor(tensor: Tensor) -> Tensor:
    """(H, W, 3) view of a (3, H, W) tensor, uint8 or floating point 0 to 255.

    Raises:
        ImageError: shape, dtype or values are not those of an image.
    """
    if tensor.dim() != 3 or tensor.shape[0] != 3:
        hint = "; move the channels first" if tensor.dim() == 3 and tensor.shape[-1] == 3 else ""
        raise ImageError(f"a tensor of shape {tuple(tensor.shape)} is not an image: expected (3, height, width){hint}")
    if 0 in tensor.shape:
        raise ImageError(f"a tensor of shape {tuple(tensor.shape)} has no pixels")
    if tensor.dtype != torch.uint8:
        if not tensor.is_floating_point():
            raise ImageError(f"a tensor of {tensor.dtype} is not an image: expected uint8, or floating point 0 to 255")
        low, high = tensor.detach().aminmax()
        _check_range(float(low), float(high), floating=True)
        tensor = tensor.detach()
    return tensor.permute(1, 2, 0)


def upright_pixels(image: ImageLike, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 of one image that must have the height and width ``size``, in which faces were found.

    Raises:
        ImageError: the image cannot be read, is a collection, or has another size.
    """
    images, single = sources(image)
    if not single:
        raise ImageError("expected one image, not a collection of images")
    pixels = next(images).read()
    if isinstance(pixels, Tensor):
        pixels = pixels.cpu().float().numpy()
    if pixels.shape[:2] != tuple(size):
        (height, width), (of_height, of_width) = pixels.shape[:2], size
        raise ImageError(
            f"the faces were found in an image of {of_width}x{of_height} pixels, this has {width}x{height}"
        )
    return np.ascontiguousarray(np.rint(pixels).astype(np.uint8))


def sources(images: ImageLike | Iterable[ImageLike]) -> tuple[Iterator[Source], bool]:
    """Images to be read one after the other, and whether it was a single one rather than a collection.

    A 4-D array (B, H, W, 3) or tensor (B, 3, H, W) is a collection.
    """
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return iter([_source(images, 0)]), True
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim != 4:
        return iter([_source(images, None)]), True
    if isinstance(images, (bytes, bytearray, memoryview)):
        raise ImageError("bytes are not an image: open them with PIL.Image.open(io.BytesIO(data))")
    if not isinstance(images, Iterable):
        raise ImageError(
            f"{type(images).__name__} is not an image: expected a path, a Pillow image, an array or a tensor"
        )
    return (_source(image, i) for i, image in enumerate(images)), False


def _source(image: ImageLike, index: int | None) -> Source:
    if isinstance(image, (str, os.PathLike)):
        return Source(str(image), lambda: load(image))
    name = "the image" if index is None else f"image {index}"
    readers = {Image.Image: from_pil, np.ndarray: from_array, Tensor: from_tensor}
    reader = next((reader for kind, reader in readers.items() if isinstance(image, kind)), None)

    def read() -> np.ndarray | Tensor:
        if reader is None:
            raise ImageError(f"{name}: {type(image).__name__} is not a path, a Pillow image, an array or a tensor")
        try:
            return reader(image)
        except ImageError as error:
            raise ImageError(f"{name}: {error}") from None
        except UNREADABLE as error:
            if not isinstance(image, Image.Image):
                raise
            raise ImageError(f"{name} is damaged or truncated ({error})") from error

    return Source(name, read)


def _check_range(low: float, high: float, floating: bool) -> None:
    if low != low or high != high:
        raise ImageError("the values contain NaN; an image holds numbers from 0 to 255")
    if low < 0 or high > 255:
        raise ImageError(f"the values go from {low:g} to {high:g}; an image holds numbers from 0 to 255")
    if floating and 0 < high <= 1:
        raise ImageError("the values go from 0 to 1; multiply them by 255")


def _to_8_bit(values: np.ndarray, sixteen: bool, fractions: bool = False) -> np.ndarray:
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    highest = values.max()
    if fractions and 0 < highest <= 1:
        values = values * 255
    elif sixteen or 255 < highest <= 65535:
        values = values / 257
    elif highest > 65535:
        values = values * (255 / highest)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _flatten_alpha(rgba: np.ndarray) -> np.ndarray:
    colour, alpha = rgba[..., :3].astype(np.float32), rgba[..., 3:].astype(np.float32) / 255
    flat = colour * alpha + np.asarray(MEAN[::-1], np.float32) * (1 - alpha)
    return np.rint(flat).astype(np.uint8) if rgba.dtype == np.uint8 else flat
