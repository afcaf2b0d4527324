"""Blocks that are one op and yet an nn.Sequential: hooks, pruning and replaced layers mean what they mean there."""

import copy

import pytest
import torch
from kernel_checks import needs_cpu_kernels
from torch import nn
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor

import ffkernels
from ffkernels.nn import ConvBNAct, ConvChain, DeformConvBNAct, DepthwiseSeparable

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


class Residual(ConvBNAct):
    def forward(self, x):
        return super().forward(x) + x


class Doubled(nn.Conv2d):
    def _conv_forward(self, *arguments):
        return 2 * super()._conv_forward(*arguments)


def patched(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 1
    return layer


CHANGES = {
    "slope": lambda block: setattr(block[2], "negative_slope", 0.4),
    "subclass": lambda block: block.__setitem__(0, Doubled(4, 4, 3, padding=1)),
    "own forward": lambda block: patched(block[0]),
    "dilated": lambda block: block.__setitem__(0, nn.Conv2d(4, 4, 3, padding=2, dilation=2)),
    "reflecting": lambda block: block.__setitem__(0, nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_layers_are_used(change):
    torch.manual_seed(2)
    block = ConvBNAct(4, 4, activation="leaky_relu")
    CHANGES[change](block)
    chain, x = ConvChain(block, ConvBNAct(4, 8)).eval(), torch.randn(2, 4, 6, 5)
    expected = layer_by_layer(chain, x)
    torch.testing.assert_close(ffkernels.set_fused(chain, "1")(x), expected)
    assert [row.backend for row in ffkernels.report(chain)][:2] == ["reference"] * 2
    ffkernels.set_fused(chain, "require")
    with pytest.raises(ffkernels.FusedKernelRequired, match=r"layer \d"):
        chain(x)


@pytest.mark.parametrize("first", [lambda: Residual(4, 4), nn.Identity, lambda: patched(ConvBNAct(4, 4))])
def test_a_chain_calls_blocks_that_are_not_its_own(first):
    torch.manual_seed(3)
    chain, x = ConvChain(ConvBNAct(4, 4), ConvBNAct(4, 8)).eval(), torch.randn(2, 4, 6, 5)
    chain[0] = first().eval()
    expected = layer_by_layer(chain, x)
    torch.testing.assert_close(ffkernels.set_fused(chain, "1")(x), expected)
    row, *blocks = ffkernels.report(chain)
    assert (row.op, row.backend) == ("conv_chain", "reference") and "one by one" in row.reason and blocks


@pytest.mark.parametrize("mode", ["0", "1"])
def test_a_pruned_filter_of_a_deformable_convolution_is_refused(mode):
    block = ffkernels.set_fused(DeformConvBNAct(4, 8), mode)
    prune.l1_unstructured(block[0].regular_conv, "weight", 0.5)
    with pytest.raises(ValueError, match=r"regular_conv of a deformable .*pruning's"):
        block(torch.randn(2, 4, 6, 5))
    prune.remove(block[0].regular_conv, "weight")
    block(torch.randn(2, 4, 6, 5)).sum().backward()


@needs_cpu_kernels
def test_report_knows_what_a_block_is_made_of():
    for block in (ConvBNAct(4, 4, kernel_size=9), ConvChain(ConvBNAct(4, 4), ConvBNAct(4, 4, kernel_size=9))):
        (row,) = ffkernels.report(ffkernels.set_fused(block, "1"))
        assert row.backend == "reference" and "kernels larger than 7x7" in row.reason
        assert ffkernels.report(block, torch.zeros(1, 4, 12, 12))[-1].reason == row.reason


@needs_cpu_kernels
@pytest.mark.parametrize("training", [False, True])
def test_a_default_device_is_not_that_of_the_kernels(training):
    torch.manual_seed(4)
    x, large = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 96, 95)
    for make in (*BLOCKS.values(), lambda: ConvChain(ConvBNAct(4, 4), ConvBNAct(4, 8))):
        block = ffkernels.set_fused(make(), "1").train(training)
        twin = copy.deepcopy(block)
        for image in (x, large):
            expected = twin(image)
            with torch.device("meta"):
                y = block(image)
                if training:
                    y.square().sum().backward()
            torch.testing.assert_close(y, expected)


@needs_cpu_kernels
def test_parameters_of_a_subclass_have_no_address():
    torch.manual_seed(5)
    block, x = ffkernels.set_fused(ConvBNAct(4, 4), "1").eval(), torch.randn(2, 4, 6, 5)
    expected = block(x)
    weight = block[0].weight.detach()
    conv = ffkernels.ConvParams(TwoTensor(weight, weight.clone()), None, 1, 1)
    with torch.no_grad():
        y = ffkernels.grouped_conv_bn_act(x, conv, ffkernels.BatchNorm.of(block[1]), "relu")
    torch.testing.assert_close(y.a, expected)


@needs_cpu_kernels
def test_batched_gradients_are_refused():
    block, x = ffkernels.set_fused(ConvBNAct(4, 2), "1").eval(), torch.randn(1, 4, 3, 3, requires_grad=True)
    y = block(x).flatten()
    with pytest.raises(RuntimeError, match="no batched gradients"):
        torch.autograd.grad(y, x, torch.eye(len(y)), is_grads_batched=True)


@pytest.mark.parametrize("mode", ["0", "1"])
def test_report_of_a_chain_with_a_convolution_that_no_op_describes(mode):
    chain = ffkernels.set_fused(ConvChain(ConvBNAct(4, 4), ConvBNAct(4, 8)), mode)
    chain[0][0] = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
    assert {row.backend for row in ffkernels.report(chain)[:2]} == {"reference"}
