"""Normalisation keeps its float32 parameters beside half-precision maps, as that of PyTorch does."""

import pytest
import torch
from backends import backend_dtypes
from helpers import convert
from layers import tensor
from test_bifpn_node_cpu import make as bifpn_arguments
from test_conv_chain_cpu import DW, PW, make_units
from test_deform_conv2d_cpu import make as deform_arguments
from test_ssh_and_heads_cpu import ssh_params

import ffkernels
from ffkernels import BatchNorm
from ffkernels.reference.bifpn_node import bifpn_node
from ffkernels.reference.conv_chain import conv_chain
from ffkernels.reference.deform_conv2d import deform_conv2d
from ffkernels.reference.ssh_grouped import ssh_grouped

REFERENCES = {f.__name__: f for f in (bifpn_node, conv_chain, deform_conv2d, ssh_grouped)}


def arguments_of(op: str, kind: str) -> tuple:
    training = kind == "train"
    if op == "bifpn_node":
        return bifpn_arguments("last", training)
    if op == "deform_conv2d":
        return deform_arguments("bias", kind, "silu")
    if op == "ssh_grouped":
        return tensor(2, 8, 5, 4), *ssh_params(8, 16, 4, training), 4
    return tensor(2, 8, 6, 5), make_units(8, [DW, PW], kind)


def norms(value: object) -> list[BatchNorm]:
    if isinstance(value, BatchNorm):
        return [value]
    return [bn for item in value for bn in norms(item)] if isinstance(value, (tuple, list)) else []


CALLS = [
    pytest.param(*param.values, op, id=f"{op}-{param.id}", marks=param.marks)
    for op in REFERENCES
    for param in backend_dtypes(op)
    if param.values[1] in (torch.float16, torch.bfloat16) and param.values[0].name != "cpu"
]


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("gpu,dtype,op", CALLS)
def test_shift_and_mean_that_cancel(gpu, dtype, op, record, autocast):
    """y = scale * z + 0.25, told as (z - mean) * scale + bias: rounded to the dtype, mean and bias would be off by more
    than what is left of them."""
    torch.manual_seed(0)
    arguments = arguments_of(op, "eval")
    for bn in norms(arguments):
        with torch.no_grad():
            bn.running_mean.copy_(700.3 + torch.arange(len(bn.running_mean)) / 7)
            scale = bn.weight.abs_().add_(0.5) / (bn.running_var + bn.eps).sqrt()
            bn.bias.copy_(bn.running_mean * scale + 0.25)
    exact = REFERENCES[op](*arguments).detach()
    own = convert(arguments, torch.float32, gpu.device)
    with torch.set_grad_enabled(record), autocast(gpu, dtype):
        y = getattr(ffkernels, op)(*own, policy=gpu.policy)
    assert y.requires_grad == record
    assert y.dtype is dtype
    error = (y.detach().double().cpu() - exact).abs().max()
    assert error <= 16 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("kind", ["train", "eval"])
@pytest.mark.parametrize("gpu,dtype,op", CALLS)
def test_affine(gpu, dtype, op, kind, autocast):
    """The mean output shows a bias that the dtype does not have, since roundings of values around it cancel; its
    gradient is a sum of more digits than the dtype has."""
    torch.manual_seed(1)
    arguments = arguments_of(op, kind)
    eps = torch.finfo(dtype).eps
    with torch.no_grad():
        for bn in norms(arguments):
            bn.weight.fill_(0.05)
            bn.bias.fill_(3 + 0.9 * eps)
    own = convert(arguments, torch.float32, gpu.device)
    exact = REFERENCES[op](*arguments)
    with autocast(gpu, dtype):
        y = getattr(ffkernels, op)(*own, policy=gpu.policy)
    assert y.dtype is dtype
    for value in (exact, y):
        value.backward(torch.full_like(value, 1 + eps))
    if not (gpu.name == "triton" and gpu.emulated and dtype is torch.bfloat16):  # the interpreter cuts digits off
        assert abs(y.double().mean().cpu() - exact.mean()) <= 0.3 * eps
    last, expected = norms(own)[-1].bias.grad, norms(arguments)[-1].bias.grad
    torch.testing.assert_close(last.cpu().double(), expected, rtol=eps / 50, atol=0)
