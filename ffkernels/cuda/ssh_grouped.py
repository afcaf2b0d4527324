"""The SSH block on a CUDA device: one kernel in evaluation mode (csrc/cuda/ssh_block.cu), else five convolutions and
two seams (csrc/cuda/ssh_grouped.cu)."""

from __future__ import annotations

from array import array

from torch import Tensor

from ..cpu.conv_chain import link_gradients
from ..native import DTYPES, OUT_OF_MEMORY, check, module
from ..ops.checks import ACTIVATIONS
from ..ops.conv_chain import Link, nhwc
from . import on_device, stream
from .conv_chain import (
    Source,
    batch_norm_backward,
    batch_norm_reduce,
    batch_statistics,
    conv_forward,
    conv_input_gradient,
    conv_weight_gradient,
    empty_nhwc,
    given_statistics,
    normalisation_dtype,
    pointer,
)
from .seam import join, split

RELU = ACTIVATIONS.index("relu")
INPUTS = (None, None, 1, 1, 3)
"""Which layer each one reads, None being x."""
OUTPUTS = (0, 2, 4)


def forward(
    x: Tensor, links: list[Link], shuffle_groups: int, save: bool
) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
    """The output (NHWC), ``stats`` of the five layers, and with ``save`` their raw outputs."""
    with on_device(x):
        x = nhwc(x)
        if not save and (y := whole_block(x, links, shuffle_groups)) is not None:
            return y, [None] * len(links), []
        sources: list[Source] = []
        all_stats = given_statistics(links)
        for i, (link, index) in enumerate(zip(links, INPUTS)):
            stats = all_stats[i]
            at_once = not save and not link.batch_statistics
            z = conv_forward(
                Source(x) if index is None else sources[index], link, Source(x, stats, RELU) if at_once else None
            )
            if link.batch_statistics:
                all_stats[i] = stats = batch_statistics(z, link)
            sources.append(Source(z) if at_once else Source(z, stats, RELU))
        y = join([sources[i] for i in OUTPUTS], shuffle_groups)
        return y, all_stats, [s.x for s in sources] if save else []


def whole_block(x: Tensor, links: list[Link], shuffle_groups: int) -> Tensor | None:
    """The output by the kernel of evaluation mode; None where it does not serve the block."""
    if not all(link.given_statistics for link in links):
        return None
    native, _ = module()
    layers = array("q")
    for link in links:
        tensors = [pointer(t) for t in link[:6]]
        layers.extend([*tensors, normalisation_dtype(link), link.weight.shape[0], link.groups])
    eps = array("d", [link.eps for link in links])
    y = empty_nhwc((x.shape[0], sum(links[i].weight.shape[0] for i in OUTPUTS), *x.shape[2:]), x)
    code = native.ff_cuda_ssh_grouped_eval(
        x.data_ptr(),
        layers.buffer_info()[0],
        eps.buffer_info()[0],
        y.data_ptr(),
        *x.shape,
        shuffle_groups,
        DTYPES[x.dtype],
        stream(x),
    )
    if code == OUT_OF_MEMORY:
        return None
    check(code, "ssh_grouped", x, *(link.weight for link in links))
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    links: list[Link],
    stats: list[Tensor],
    raw: list[Tensor],
    shuffle_groups: int,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x and of weight, bias, bn_weight, bn_bias of every link, those that ``needs`` marks."""
    with on_device(x):
        x, grad = nhwc(x), nhwc(grad)
        sources = [Source(z, s, RELU) for z, s in zip(raw, stats)]
        # By layer, and x last: the gradient of its normalised output, and whether that is of any use.
        of_output: list[Tensor | None] = [None] * 6
        wanted = [any(needs[1 + 4 * i : 5 + 4 * i]) for i in range(5)] + [needs[0]]
        for i, index in enumerate(INPUTS):
            wanted[i] = wanted[i] or wanted[5 if index is None else index]
        for i, g in zip(OUTPUTS, split(grad, [sources[i] for i in OUTPUTS], shuffle_groups)):
            of_output[i] = g
        grads: list[Tensor | None] = [None] * len(needs)
        for i in (4, 3, 2, 1, 0):
            if not wanted[i]:
                continue
            link, output, marks = links[i], Source(raw[i], stats[i]), needs[2 + 4 * i : 5 + 4 * i]
            sums = batch_norm_reduce(of_output[i], output) if link.batch_statistics or any(marks) else None
            if sums is not None:
                grads[2 + 4 * i : 5 + 4 * i] = link_gradients(link, output.stats, sums, marks)
            index = 5 if INPUTS[i] is None else INPUTS[i]
            source = Source(x) if index == 5 else sources[index]
            grad_z = batch_norm_backward(of_output[i], output, sums if link.batch_statistics else None, link.eps)
            if needs[1 + 4 * i]:
                grads[1 + 4 * i] = conv_weight_gradient(grad_z, source, link)
            if wanted[index]:
                part = conv_input_gradient(grad_z, source, link)
                of_output[index] = part if of_output[index] is None else of_output[index].add_(part)
        grads[0] = of_output[5]
    return [g for g, needed in zip(grads, needs) if needed]
