"""Base class of modules whose forward is one fused op."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn

from .. import config


class FusedModule(nn.Module):
    """A module that runs the op named ``ff_op`` under ``ff_policy``, which it takes from the environment (or from
    :func:`ffkernels.use`) when it is built and keeps. Parameters, ``state_dict``, hooks and initialisation do not
    depend on the policy.

    ``forward`` passes ``policy=self.ff_policy`` to a public function of ``ffkernels.ops``. ``ff_facts`` describes the
    call to the registry without making it, for :func:`ffkernels.report`.
    """

    ff_op: ClassVar[str | None] = None
    ff_policy: config.Policy

    def __init__(self) -> None:
        super().__init__()
        self.ff_policy = config.build_policy()

    def ff_facts(self) -> dict[str, Any]:
        """What the op tells the registry about this module's calls, as keyword facts of ``registry.select``."""
        return {}

    def ff_absorbed(self) -> Iterable[nn.Module]:
        """Modules whose work this module's op does: it reads their parameters and never calls them."""
        return ()

    def extra_repr(self) -> str:
        mode, backend = self.ff_policy
        return "" if mode == "0" else f"fused={mode}, backend={backend}"
