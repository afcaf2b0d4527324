"""Drop-in modules backed by the ops of ``ffkernels``."""

from .conv import ConvBNAct, ConvChain, DepthwiseSeparable
from .deform_conv import DeformConv, DeformConvBNAct
from .module import FusedModule

__all__ = ["ConvBNAct", "ConvChain", "DeformConv", "DeformConvBNAct", "DepthwiseSeparable", "FusedModule"]
