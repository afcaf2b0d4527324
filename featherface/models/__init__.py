"""The detectors and their parts."""

from .attention import CBAM, CBAM_Plus, SharedCBAMManager
from .backbone import MobileNetV1
from .base import FeatherFace
from .bifpn import BiFPN, BiFPN_Light
from .checkpoint import load_weights, save_weights
from .context import ChannelShuffle_Light, SSH_Deformable, SSH_Grouped
from .heads import SharedMultiHead
from .registry import create_model, list_models, transfer_weights
from .ultra import FeatherFaceV2Ultra
from .v1 import FeatherFaceV1
from .v2 import FeatherFaceV2

__all__ = [
    "CBAM",
    "BiFPN",
    "BiFPN_Light",
    "CBAM_Plus",
    "ChannelShuffle_Light",
    "FeatherFace",
    "FeatherFaceV1",
    "FeatherFaceV2",
    "FeatherFaceV2Ultra",
    "MobileNetV1",
    "SSH_Deformable",
    "SSH_Grouped",
    "SharedCBAMManager",
    "SharedMultiHead",
    "create_model",
    "list_models",
    "load_weights",
    "save_weights",
    "transfer_weights",
]
