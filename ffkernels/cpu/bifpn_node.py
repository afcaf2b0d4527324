"""Calls into csrc/cpu/bifpn_node.cpp, and the convolutions behind the fusion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..native import DTYPES, check, module
from ..ops.bifpn_node import Fusion
from ..ops.conv_chain import Link, nhwc
from . import conv_chain
from .channel_shuffle import channel_shuffle
from .conv import ACTIVATIONS, empty_nhwc, pointer, workspace

SILU = ACTIVATIONS["silu"]


def arguments(inputs: Sequence[Tensor], fusion_weight: Tensor, fusion: Fusion) -> list[int | float]:
    """What both entries begin with; inputs are NHWC, absent ones NULL."""
    missing = 3 - len(inputs)
    target = inputs[fusion.resample.index(0)]
    sizes = [n for x in inputs for n in x.shape[2:]]
    return [
        *(x.data_ptr() for x in inputs),
        *[0] * missing,
        *fusion.resample,
        *[0] * missing,
        *sizes,
        *[0] * (2 * missing),
        fusion_weight.data_ptr(),
        fusion_weight.shape[0],
        fusion.epsilon,
        int(fusion.same),
        *target.shape,
    ]


def in_order_of_convolution(link: Link, groups: int) -> Link:
    """The normalisation of shuffled channels, for use in front of the shuffle."""
    if groups == 1:
        return link
    fields = ("bn_weight", "bn_bias", "running_mean", "running_var")
    moved = {name: getattr(link, name) for name in fields if getattr(link, name) is not None}
    return link._replace(**{name: t.view(-1, groups).T.flatten() for name, t in moved.items()})


def forward(
    inputs: Sequence[Tensor], fusion_weight: Tensor, links: list[Link], fusion: Fusion, save: bool
) -> tuple[Tensor, Tensor, list[Tensor | None], list[Tensor]]:
    """The output (NHWC), the fused map v, and ``stats`` and raw outputs of the convolutions before the shuffle."""
    native, _ = module()
    inputs = [nhwc(x) for x in inputs]
    v = empty_nhwc(inputs[fusion.resample.index(0)].shape, inputs[0])
    code = native.ff_cpu_bifpn_fuse(
        *arguments(inputs, fusion_weight, fusion), v.data_ptr(), DTYPES[v.dtype], torch.get_num_threads()
    )
    check(code, "bifpn_node", *inputs)
    links = [*links[:-1], in_order_of_convolution(links[-1], fusion.shuffle_groups)]
    y, stats, raw = conv_chain.forward(v, links, save, SILU)
    return channel_shuffle(y, fusion.shuffle_groups) if fusion.shuffle_groups > 1 else y, v, stats, raw


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
    grad = nhwc(grad)
    if fusion.shuffle_groups > 1:
        grad = channel_shuffle(grad, grad.shape[1] // fusion.shuffle_groups)
    links = [*links[:-1], in_order_of_convolution(links[-1], fusion.shuffle_groups)]
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
    grad_weight = torch.empty(fusion_weight.shape, dtype=torch.float64) if needs_weight else None
    threads = torch.get_num_threads()
    memory = workspace(native.ff_cpu_bifpn_fuse_workspace(threads))
    code = native.ff_cpu_bifpn_fuse_backward(
        *arguments(inputs, fusion_weight, fusion),
        grad_v.data_ptr(),
        *(pointer(g) for g in grads),
        *[0] * (3 - count),
        pointer(grad_weight),
        memory.data_ptr(),
        DTYPES[v.dtype],
        threads,
    )
    check(code, "bifpn_node backward", *inputs)
    return [*grads, None if grad_weight is None else grad_weight.to(fusion_weight.dtype), *grad_links]
