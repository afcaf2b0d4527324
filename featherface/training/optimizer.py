"""Optimiser, learning rate and average of the weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from .config import Optimizer, Schedule
from .muon import Muon


def build_optimizer(network: nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), SGD with Nesterov momentum or Muon; weight decay on matrices alone.

    Muon takes the convolutions that mix channels; depthwise convolutions, maps of single channels and all else are
    AdamW's.
    """
    decayed, plain = [], []
    for name, parameter in network.named_parameters():
        # Fusion weights are vectors; the gates' matrices of a dynamic gate start at zero and must be free to leave it.
        (decayed if parameter.dim() > 1 and "dynamic_gate" not in name else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if config.name == "sgd":
        nesterov = config.momentum > 0
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)
    betas = (config.momentum, config.beta2)
    if config.name == "muon":
        mixing = {
            module.weight: module.groups
            for module in network.modules()
            if isinstance(module, nn.Conv2d) and min(module.out_channels, module.in_channels) > module.groups
        }
        matrices = [parameter for parameter in decayed if parameter in mixing]
        groups[0]["params"] = [parameter for parameter in decayed if parameter not in mixing]
        muon = {"params": matrices, "matrices": [mixing[parameter] for parameter in matrices]}
        return Muon([muon | {"weight_decay": config.weight_decay}, *groups], config.lr, betas)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)


def learning_rate(step: int, steps_per_epoch: int, schedule: Schedule, largest: float) -> float:
    """The learning rate of a step, a function of nothing but its number.

    Warm-up: ``largest (step + 1) / (warm-up + 1)``; then ``largest (f + (1 - f) (1 + cos(pi t)) / 2)`` with t from 0 to
    1 at the last step and f = ``schedule.final``.
    """
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return largest * (step + 1) / (warmup + 1)
    rest = max(schedule.epochs * steps_per_epoch - 1 - warmup, 1)
    position = min((step - warmup) / rest, 1.0)
    return largest * (schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * position)) / 2)


class WeightAverage:
    """Exponential moving average of a model's parameters and running statistics.

    After step n: ``average += (1 - d) (value - average)`` with ``d = min(decay, (1 + n) / (10 + n))``.

    Attributes:
        model: the averaged copy, in evaluation mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        floating: tuple[list, list] = ([], [])
        for own, theirs in zip(self._tensors(self.model), self._tensors(model)):
            if own.is_floating_point():
                floating[0].append(own)
                floating[1].append(theirs)
            else:
                own.copy_(theirs)
        torch._foreach_lerp_(*floating, 1 - decay)

    @staticmethod
    def _tensors(model: nn.Module) -> list[torch.Tensor]:
        return [*model.parameters(), *model.buffers()]
