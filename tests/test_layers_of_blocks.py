"""Blocks that are one op and yet an nn.Sequential: hooks, pruning and replaced layers mean what they mean there."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import ffkernels
from ffkernels.nn import ConvBNAct, DeformConvBNAct, DepthwiseSeparable

BLOCKS = {
    "conv": lambda: ConvBNAct(4, 8),
    "separable": lambda: DepthwiseSeparable(4, 8),
    "deformable": lambda: DeformConvBNAct(4, 8, activation="relu"),
}


@pytest.fixture(params=BLOCKS)
def block(request):
    torch.manual_seed(0)
    return BLOCKS[request.param]()


def layer_by_layer(block, x):
    for layer in copy.deepcopy(block):
        x = layer(x)
    return x


@pytest.mark.parametrize("mode", ["0", "1"])
def test_hooks_of_layers_run(block, mode):
    ffkernels.set_fused(block, mode)
    x = torch.randn(2, 4, 6, 5)
    expected = layer_by_layer(block, x)
    torch.testing.assert_close(copy.deepcopy(block)(x), expected)
    seen = []
    for layer in block:
        layer.register_forward_hook(lambda module, arguments, output: seen.append(type(module)))
    torch.testing.assert_close(block(x), expected)
    assert seen == [type(layer) for layer in block]


@pytest.mark.parametrize("mode", ["0", "1"])
def test_pruned_convolutions_train(mode):
    torch.manual_seed(1)
    block = ffkernels.set_fused(ConvBNAct(4, 8), mode)
    prune.l1_unstructured(block[0], "weight", 0.5)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        block(torch.randn(2, 4, 6, 5)).square().mean().backward()
        optimizer.step()
        assert int((block[0].weight == 0).sum()) == block[0].weight.numel() // 2


@pytest.mark.parametrize("mode", ["0", "1"])
def test_replaced_layers_are_used(block, mode):
    block[-1] = nn.Sigmoid()
    ffkernels.set_fused(block, mode)
    x = torch.randn(2, 4, 6, 5)
    expected = layer_by_layer(block, x)
    assert expected.min() > 0 and expected.max() < 1
    torch.testing.assert_close(block(x), expected)


def test_a_chain_uses_replaced_layers():
    torch.manual_seed(2)
    chain = ffkernels.nn.ConvChain(ConvBNAct(4, 8), DepthwiseSeparable(8, 8)).eval()
    chain[0][2] = nn.Sigmoid()
    x = torch.randn(2, 4, 6, 5)
    expected = chain(x)
    torch.testing.assert_close(expected, chain[1](layer_by_layer(chain[0], x)))
    torch.testing.assert_close(ffkernels.set_fused(chain, "1")(x), expected)
    with pytest.raises(ffkernels.FusedKernelRequired, match=r"grouped_conv_bn_act: layer 2 is Sigmoid"):
        ffkernels.set_fused(chain, "require")(x)
    chain[0][2] = nn.ReLU()
    chain[0][0].register_forward_hook(lambda *_: None)
    with pytest.raises(ffkernels.FusedKernelRequired, match="layer 0 has hooks"):
        chain(x)


def test_an_engine_refuses_replaced_layers():
    model = nn.Sequential(ConvBNAct(3, 8))
    model[0][2] = nn.Sigmoid()
    with pytest.raises((ValueError, TypeError), match="ConvBNAct was replaced: layer 2 is Sigmoid"):
        ffkernels.engine.build(model[0].eval(), (1, 3, 8, 8))
