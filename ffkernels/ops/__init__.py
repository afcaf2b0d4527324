"""Public ops: argument checks, choice of a backend, autograd. One file per op."""

from .bifpn_node import bifpn_node
from .cbam import cbam
from .channel_shuffle import channel_shuffle
from .conv_chain import conv_chain
from .crop_resize import crop_resize
from .deform_conv2d import deform_conv2d
from .depthwise_separable import depthwise_separable
from .detection import decode, detect, nms
from .grouped_conv_bn_act import grouped_conv_bn_act
from .multi_head import multi_head
from .preprocess import preprocess
from .ssh_grouped import ssh_grouped

__all__ = [
    "bifpn_node",
    "cbam",
    "channel_shuffle",
    "conv_chain",
    "crop_resize",
    "decode",
    "deform_conv2d",
    "depthwise_separable",
    "detect",
    "grouped_conv_bn_act",
    "multi_head",
    "nms",
    "preprocess",
    "ssh_grouped",
]
