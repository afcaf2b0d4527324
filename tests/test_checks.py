"""Tensors on another device than the input are refused: kernels would read their addresses."""

import subprocess
import sys

import pytest
import torch
from layers import conv, norm, tensor
from torch.autograd import forward_ad

import ffkernels
from ffkernels import ChannelMLP, HeadParams, Policy

CPU = Policy("1", "cpu")


def calls():
    """Per op its name, a function of named tensors, and these."""
    x = tensor(1, 4, 6, 6).detach()
    dense, depthwise, point = conv(4, 4, 3, bias=True), conv(4, 4, 3, groups=4), conv(4, 4, 1)
    bn = norm(4, False)

    def with_bn(call):
        return lambda **given: call(bn._replace(**given))

    fields = {name: getattr(bn, name) for name in ("weight", "bias", "running_mean", "running_var")}
    yield "grouped_conv_bn_act", with_bn(lambda bn: ffkernels.grouped_conv_bn_act(x, dense, bn, policy=CPU)), fields
    yield (
        "grouped_conv_bn_act",
        lambda **given: ffkernels.grouped_conv_bn_act(x, dense._replace(**given), None, policy=CPU),
        {"weight": dense.weight, "bias": dense.bias},
    )
    yield (
        "depthwise_separable",
        with_bn(lambda bn: ffkernels.depthwise_separable(x, depthwise, bn, point, norm(4, False), policy=CPU)),
        fields,
    )
    yield (
        "bifpn_node",
        lambda other, fusion_weight: ffkernels.bifpn_node(
            [x, other], ["none", "none"], fusion_weight, depthwise, point, bn, policy=CPU
        ),
        {"other": x, "fusion_weight": torch.ones(2, dtype=x.dtype)},
    )
    mlp = ChannelMLP(*(tensor(*shape).detach() for shape in ((2, 4), (2,), (4, 2), (4,))))
    gate, gate_bn = conv(1, 2, 7), norm(1, False)
    yield (
        "cbam",
        lambda **given: ffkernels.cbam(x, mlp._replace(**given), gate, [gate_bn], policy=CPU),
        mlp._asdict(),
    )
    yield (
        "deform_conv2d",
        lambda offset, mask: ffkernels.deform_conv2d(x, offset, mask, dense, bn, policy=CPU),
        {"offset": torch.zeros(1, 18, 6, 6, dtype=x.dtype), "mask": torch.ones(1, 9, 6, 6, dtype=x.dtype)},
    )
    head = HeadParams(None, None, *(conv(2 * k, 4, 1, bias=True) for k in (2, 4, 10)))
    yield "multi_head", lambda second: ffkernels.multi_head([x, second], [head, head], policy=CPU), {"second": x}
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [5.0, 5.0, 9.0, 9.0]])
    yield "nms", lambda scores: ffkernels.nms(boxes, scores, 0.4, policy=CPU), {"scores": torch.ones(2)}
    raw = {"landmarks": torch.zeros(2, 10), "priors": torch.ones(2, 4)}
    yield "decode", lambda **given: ffkernels.decode(boxes, **given, policy=CPU), raw
    yield (
        "detect",
        lambda **given: ffkernels.detect(boxes, **given, policy=CPU),
        {"scores": torch.ones(2), **raw},
    )


@pytest.mark.parametrize(
    "op, call, tensors, name",
    [
        pytest.param(op, call, tensors, name, id=f"{op}-{name}")
        for op, call, tensors in calls()
        for name, value in tensors.items()
        if value is not None
    ],
)
def test_tensors_of_another_device_are_refused(op, call, tensors, name):
    call(**tensors)
    with pytest.raises(ValueError, match=f"{op}: .* is on meta and the input on cpu"):
        call(**{**tensors, name: tensors[name].to("meta")})


@pytest.mark.parametrize("op", ["conv", "shuffle"])
def test_forward_mode_keeps_its_tangents(op):
    params, bn = conv(4, 4, 3), norm(4, False)
    run = {
        "conv": lambda x, policy: ffkernels.grouped_conv_bn_act(x, params, bn, policy=policy),
        "shuffle": lambda x, policy: ffkernels.channel_shuffle(x, 2, policy=policy),
    }[op]
    x, tangent = tensor(1, 4, 6, 6).detach(), tensor(1, 4, 6, 6).detach()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        mine, theirs = (forward_ad.unpack_dual(run(dual, policy)).tangent for policy in (CPU, Policy("0")))
    torch.testing.assert_close(mine, theirs)


def test_a_raw_op_loads_its_kernels():
    """As where a graph that was saved elsewhere is the first to call it."""
    script = (
        "import torch, ffkernels; x = torch.arange(4.0).view(1, 4, 1, 1);"
        "print(torch.ops.ffkernels._channel_shuffle(x, 2, 'cpu').flatten().tolist())"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert result.stdout == "[0.0, 2.0, 1.0, 3.0]\n", result.stderr


def test_code_for_a_gpu():
    from ffkernels.cuda import has_code

    assert has_code(["80", "90"], 8, 0) and has_code(["80", "90"], 8, 6) and has_code(["80", "90"], 9, 0)
    assert has_code(["80", "90"], 10, 0), "by the PTX of the newest"
    assert not has_code(["80", "90"], 7, 5) and not has_code(["90"], 8, 9) and not has_code(["86"], 8, 0)
    assert has_code(["70"], 7, 5) and has_code(["75", "80"], 9, 0)
    assert not has_code(["75"], 9, 0) and not has_code(["75", "90a"], 8, 0), "no code for tensor cores"
    assert has_code(["90a"], 9, 0) and not has_code(["90a"], 10, 0) and not has_code(["100a"], 10, 3)
    assert has_code(["100f"], 10, 3) and not has_code(["100f"], 12, 0)
