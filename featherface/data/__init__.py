"""Training data: sources of photographs, decoded once, augmented in batches."""

from .augment import Augmentation, View, draw_view
from .dataset import FaceData, Source, load_data
from .duplicates import difference_hashes, group_duplicates, validation_groups
from .jpeg import jpeg
from .loader import Batch, Loader, epoch_order
from .sources import Record, read_source
from .store import PixelStore, decode_images

__all__ = [
    "Augmentation",
    "Batch",
    "FaceData",
    "Loader",
    "PixelStore",
    "Record",
    "Source",
    "View",
    "decode_images",
    "difference_hashes",
    "draw_view",
    "epoch_order",
    "group_duplicates",
    "jpeg",
    "load_data",
    "read_source",
    "validation_groups",
]
