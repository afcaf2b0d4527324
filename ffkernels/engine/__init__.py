"""Inference engines: a whole network, planned once for an input size, run many times. CPU.

>>> engine = ffkernels.engine.build(model, (1, 3, 640, 640))     # doctest: +SKIP
>>> bbox, cls, landmarks = engine(x)                             # doctest: +SKIP
>>> print(engine.plan())                                         # doctest: +SKIP

See docs/engine.md for the design.
"""

from .builder import Builder
from .engine import DTYPES, Engine, Faces, build, peak, unavailable

__all__ = ["DTYPES", "Builder", "Engine", "Faces", "build", "peak", "unavailable"]
