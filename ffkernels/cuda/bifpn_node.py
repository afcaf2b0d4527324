"""Calls into csrc/cuda/bifpn_node.cu, and the convolutions behind the fusion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cpu.bifpn_node import arguments, in_order_of_convolution
from ..native import DTYPES, check, module
from ..ops.bifpn_node import Fusion
from ..ops.checks import ACTIVATIONS
from ..ops.conv_chain import Link, nhwc
from . import conv_chain, on_device, stream
from .conv_chain import Source, batch_norm_apply, empty_nhwc, pointer
from .seam import join, split

SILU = ACTIVATIONS.index("silu")


def forward(
    inputs: Sequence[Tensor], fusion_weight: Tensor, links: list[Link], fusion: Fusion, save: bool
) -> tuple[Tensor, Tensor, list[Tensor | None], list[Tensor]]:
    """The output (NHWC), the fused map v, and ``stats`` and raw outputs of the convolutions before the shuffle."""
    native, _ = module()
    with on_device(inputs[0]):
        inputs = [nhwc(x) for x in inputs]
        v = empty_nhwc(inputs[fusion.resample.index(0)].shape, inputs[0])
        code = native.ff_cuda_bifpn_fuse(
            *arguments(inputs, fusion_weight, fusion),
            0 if save else SILU,
            v.data_ptr(),
            DTYPES[v.dtype],
            stream(v),
        )
        check(code, "bifpn_node", *inputs)
        links = [*links[:-1], in_order_of_convolution(links[-1], fusion.shuffle_groups)]
        output, stats, raw = conv_chain.deferred(v, links, save, SILU if save else 0)
        if fusion.shuffle_groups > 1:
            y = join([output], fusion.shuffle_groups)
        else:
            y = output.x if output.plain else batch_norm_apply(output, torch.empty_like(output.x))
    return y, v, stats, raw


def backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    fusion_weight: Tensor,
    v: Tensor,
    links: list[Link],
    stats: list[Tensor | None],
    raw: list[Tensor],
    fusion: Fusion,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of the inputs, of fusion_weight, and of the parameters of the links; None where ``needs`` is False."""
    native, _ = module()
    count = len(inputs)
    needs_inputs, needs_weight, needs_links = needs[:count], needs[count], needs[count + 1 :]
    links = [*links[:-1], in_order_of_convolution(links[-1], fusion.shuffle_groups)]
    with on_device(grad):
        grad = nhwc(grad)
        if fusion.shuffle_groups > 1:
            (grad,) = split(grad, [Source(raw[-1], stats[-1])], fusion.shuffle_groups)
        wanted = needs_weight or any(needs_inputs)
        found = iter(conv_chain.backward(grad, v, links, stats, raw, [wanted, *needs_links], SILU))
        grad_v = next(found) if wanted else None
        grad_links = [next(found) if needed else None for needed in needs_links]
        for i in (-2, -1):
            if grad_links[i] is not None and fusion.shuffle_groups > 1:
                grad_links[i] = grad_links[i].view(fusion.shuffle_groups, -1).T.flatten()
        if not wanted:
            return [None] * (count + 1) + grad_links
        inputs = [nhwc(x) for x in inputs]
        grads = [empty_nhwc(x.shape, x) if needed else None for x, needed in zip(inputs, needs_inputs)]
        grad_weight = torch.empty_like(fusion_weight) if needs_weight else None
        memory = grad_v.new_empty(native.ff_cuda_bifpn_fuse_workspace(*v.shape), dtype=torch.uint8)
        code = native.ff_cuda_bifpn_fuse_backward(
            *arguments(inputs, fusion_weight, fusion),
            grad_v.data_ptr(),
            *(pointer(g) for g in grads),
            *[0] * (3 - count),
            pointer(grad_weight),
            memory.data_ptr(),
            DTYPES[v.dtype],
            stream(v),
        )
        check(code, "bifpn_node backward", *inputs)
    return [*grads, grad_weight, *grad_links]
