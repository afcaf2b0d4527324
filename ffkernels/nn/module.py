"""Base class of modules whose forward is one fused op."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn

from .. import config, registry
from ..params import ConvParams


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks, such as those of pruning."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def called_for_itself(module: nn.Module) -> bool:
    """Whether a call of this module may do something that others of its class do not: it runs hooks, or its ``forward``
    was replaced."""
    return hooked(module) or "forward" in vars(module)


def overrides(layer: nn.Module, stock: type[nn.Module]) -> bool:
    """Whether the layer's class computes something else than ``stock``."""
    calls = ("forward", "_conv_forward")
    return any(getattr(type(layer), call, None) is not getattr(stock, call, None) for call in calls)


class FusedModule(nn.Module):
    """A module that runs the op named ``ff_op`` under ``ff_policy``, which it takes from the environment (or from
    :func:`ffkernels.use`) when it is built and keeps. Parameters, ``state_dict``, initialisation and the module's own
    hooks do not depend on the policy.

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

    def ff_bypassed(self) -> str | None:
        """Why this module does not call its op, for :func:`ffkernels.report`; None where it does."""
        return None

    def ff_absorbed(self) -> Iterable[nn.Module]:
        """Modules whose work this module's op does: it reads their parameters and never calls them."""
        return ()

    def extra_repr(self) -> str:
        mode, backend = self.ff_policy
        return "" if mode == "0" else f"fused={mode}, backend={backend}"


class FusedSequential(FusedModule, nn.Sequential):
    """An ``nn.Sequential`` of known layers that is run as one op, and as what it is where that would not be the same:
    as plain PyTorch, and where a layer has hooks or is not of the class that :meth:`ff_stock` says."""

    negative_slope: float

    def ff_stock(self) -> tuple[type[nn.Module], ...]:
        """The class of each layer that the op stands for."""
        raise NotImplementedError

    def ff_replaced(self) -> str | None:
        """Which layer is not the stock layer that the op knows; None where all are."""
        for name, layer, stock in zip(self._modules, self, self.ff_stock(), strict=True):
            if overrides(layer, stock):
                return f"layer {name} is {type(layer).__name__}"
            if "forward" in vars(layer):
                return f"layer {name} has a forward of its own"
            if isinstance(layer, nn.LeakyReLU) and layer.negative_slope != self.negative_slope:
                return f"layer {name} has the slope {layer.negative_slope}, the block {self.negative_slope}"
            if isinstance(layer, nn.Conv2d):
                try:
                    ConvParams.of(layer)
                except ValueError as error:
                    return f"layer {name}: {error}"
        return None

    def ff_altered(self) -> str | None:
        """Why the layers must be called one by one: one was replaced, or has hooks. None where the op does."""
        if (reason := self.ff_replaced()) is not None:
            return reason
        for name, layer in self._modules.items():
            if hooked(layer) or any(map(hooked, layer._modules.values())):
                return f"layer {name} has hooks"
        return None

    def ff_bypassed(self) -> str | None:
        return self.ff_altered()

    def ff_layers_run(self) -> bool:
        """Whether ``forward`` calls the layers one by one.

        Raises:
            FusedKernelRequired: it must, and the policy is ``"require"``.
        """
        # A report asks the op also where it is plain PyTorch.
        if self.ff_policy.mode == "0":
            return not registry.recording()
        reason = self.ff_altered()
        if reason is not None and self.ff_policy.mode == "require":
            raise registry.FusedKernelRequired(f"{self.ff_op}: {reason}; set FF_USE_FUSED=1 to fall back to PyTorch")
        return reason is not None

    def ff_check_stock(self) -> None:
        """
        Raises:
            ValueError: a layer was replaced, so that no plan of the known layers stands for this block.
        """
        if (reason := self.ff_replaced()) is not None:
            raise ValueError(f"a layer of {type(self).__name__} was replaced: {reason}")
