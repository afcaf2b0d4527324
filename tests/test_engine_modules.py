"""Engines of networks of one's own: blocks in orders that no shipped model has."""

from __future__ import annotations

import pytest
import torch
from test_engine import assert_reads_nothing_unwritten, image
from test_engine import check as check_float32
from test_engine_bf16 import LEVELS, computed  # noqa: F401
from test_engine_bf16 import check as check_bfloat16
from torch import Tensor, nn

from featherface.models.attention import CBAM_Plus, SharedCBAMManager, SpatialGate
from featherface.models.context import ChannelShuffle_Light, SSH_Deformable, SSH_Grouped
from featherface.models.heads import SharedMultiHead
from ffkernels import engine, multi_head
from ffkernels.engine.graph import Value
from ffkernels.nn import ConvBNAct, DepthwiseSeparable

pytestmark = pytest.mark.skipif(engine.unavailable() is not None, reason=f"no engine: {engine.unavailable()}")
CHECKS = {"float32": check_float32, "bfloat16": check_bfloat16}


class Network(nn.Module):
    """A stem of 8 channels, the blocks, one head."""

    def __init__(self, channels: int, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem = ConvBNAct(3, 8, stride=2, activation="leaky_relu")
        self.blocks = nn.Sequential(*blocks)
        self.head = SharedMultiHead(channels)
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return multi_head([self.blocks(self.stem(x))], [self.head.params()], True)

    def ff_plan(self, builder: engine.Builder, x: Value) -> None:
        value = builder.module(self.blocks, builder.module(self.stem, x))
        builder.multi_head([value], [builder.module(self.head)])


class Attention(nn.Module):
    """Shared attention with a spatial gate of ``groups`` groups, applied once with a residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.manager = SharedCBAMManager({"level": channels}, spatial_gate=SpatialGate(groups))

    def forward(self, x: Tensor) -> Tensor:
        return self.manager(x, "level", True)

    def ff_plan(self, builder: engine.Builder, x: Value) -> Value:
        return self.manager.ff_plan(builder, x, "level", True)


BLOCKS = {
    "attention of an odd number of groups of 8": lambda: (
        DepthwiseSeparable(8, 40),
        Attention(40, 5),
        ConvBNAct(40, 32, 1),
    ),
    "attention of groups of 10": lambda: (DepthwiseSeparable(8, 40), Attention(40, 4), ConvBNAct(40, 32, 1)),
    "attention before a stride": lambda: (DepthwiseSeparable(8, 32), CBAM_Plus(32), ConvBNAct(32, 32, 1, stride=2)),
    "attention before a 3x3": lambda: (DepthwiseSeparable(8, 32), CBAM_Plus(32), ConvBNAct(32, 32, 3)),
    "grouped behind a shuffle": lambda: (
        DepthwiseSeparable(8, 32),
        ChannelShuffle_Light(32, 4),
        ConvBNAct(32, 32, 3, groups=4),
    ),
    "a concatenation of 56 channels": lambda: (
        DepthwiseSeparable(8, 32),
        SSH_Deformable(32, 56),
        ConvBNAct(56, 32, 1),
    ),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Network(32, *BLOCKS[name]())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", CHECKS)
@pytest.mark.parametrize("name", BLOCKS)
def test_networks(computed, name: str, dtype: str, level: str, threads: int):  # noqa: F811
    computed(level)
    CHECKS[dtype](network(name), image(33, 47), threads=threads)


@pytest.mark.parametrize("dtype", CHECKS)
@pytest.mark.parametrize("name", BLOCKS)
def test_nothing_unwritten_is_read(computed, name: str, dtype: str):  # noqa: F811
    x = image(33, 47)
    assert_reads_nothing_unwritten(engine.build(network(name), x.shape, dtype=dtype, threads=2), x)


REFUSED = {
    "contexts in a row": (lambda: (DepthwiseSeparable(8, 32), SSH_Grouped(32, 32), SSH_Grouped(32, 32)), 32, "float32"),
    "a block behind a context": (
        lambda: (DepthwiseSeparable(8, 32), SSH_Grouped(32, 32), DepthwiseSeparable(32, 32)),
        32,
        "float32",
    ),
    "too many channels joined": (lambda: (DepthwiseSeparable(8, 256), SSH_Grouped(256, 320)), 320, "bfloat16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_planned_is_refused(computed, name: str):  # noqa: F811
    blocks, channels, dtype = REFUSED[name]
    with pytest.raises(ValueError, match="an engine"):
        engine.build(Network(channels, *blocks()), (1, 3, 32, 32), dtype=dtype)


class Planned(nn.Module):
    """A network of whatever its function plans."""

    def __init__(self, plan) -> None:
        super().__init__()
        self.first = ConvBNAct(3, 8, stride=2)
        self.second, self.third = ConvBNAct(8, 32), ConvBNAct(32, 32, 1)
        self.joined = ConvBNAct(64, 32, 1)
        self.separable = DepthwiseSeparable(3, 16)
        self.head = SharedMultiHead(32)
        self.plan = plan

    def ff_plan(self, builder: engine.Builder, x: Value) -> None:
        self.plan(self, builder, x)


def shuffled_sum(net: Planned, builder: engine.Builder, x: Value) -> None:
    x = builder.module(net.second, builder.module(net.first, x))
    builder.multi_head([builder.add_resized(builder.channel_shuffle(x, 4), [(x, 0.5)])], [builder.module(net.head)])


def part_read_twice(net: Planned, builder: engine.Builder, x: Value) -> None:
    x = builder.module(net.second, builder.module(net.first, x))
    part = builder.conv(x, net.third[0])
    whole = builder.concat([part, builder.conv(x, net.third[0])])
    builder.conv(part, net.third[0])
    builder.multi_head([builder.module(net.joined, whole)], [builder.module(net.head)])


def separable_first(net: Planned, builder: engine.Builder, x: Value) -> None:
    builder.module(net.separable, x)


def shuffled_image(net: Planned, builder: engine.Builder, x: Value) -> None:
    builder.module(net.first, builder.channel_shuffle(x, 3))


@pytest.mark.parametrize(
    "plan, message",
    [
        (shuffled_sum, "adds to no shuffled maps"),
        (part_read_twice, "concatenates what nothing else reads"),
        (separable_first, "first block is a 3x3 convolution"),
        (shuffled_image, "first block is a 3x3 convolution"),
    ],
)
@pytest.mark.parametrize("dtype", CHECKS)
def test_plans_that_an_engine_has_no_kernels_for(computed, plan, message: str, dtype: str):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        engine.build(Planned(plan), (1, 3, 32, 32), dtype=dtype)
