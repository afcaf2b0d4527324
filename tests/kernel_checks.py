"""What every kernel of the CPU is held to, as functions of kernel, reference and arguments (nested tuples)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import compare_kernel, convert, tensors
from torch import Tensor

from ffkernels import Policy, cpu, registry

CPU = Policy("require", "cpu")
_reason = registry.backend_unavailable("cpu")
needs_cpu_kernels = pytest.mark.skipif(_reason is not None, reason=f"backend cpu: {_reason}")
every_isa = pytest.mark.parametrize("isa", [] if _reason else cpu.instruction_sets())

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second column": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "some channels": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]],
    "expanded": lambda x: x[:, :1].expand_as(x),
}
GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": torch.randn_like,
    "stride 0": lambda y: torch.ones((), dtype=y.dtype).expand(y.shape),
    "sliced": lambda y: torch.randn(*y.shape[:3], 2 * y.shape[3], dtype=y.dtype)[..., ::2],
    "transposed": lambda y: torch.randn(y.shape[::-1], dtype=y.dtype).permute(3, 2, 1, 0),
}


def leaves(arguments: Any) -> list[Tensor]:
    return [t for t in tensors(arguments) if t.requires_grad]


def run(function: Callable[..., Tensor], arguments: Sequence[Any], grad: Callable[[Tensor], Tensor]) -> list[Any]:
    """Output, gradients and state after one call on copies of ``arguments``."""
    copies = convert(tuple(arguments), torch.float64)
    y = function(*copies)
    torch.manual_seed(1)
    grads = torch.autograd.grad(y, leaves(copies), grad(y), allow_unused=True)
    return [y, *grads, *(t for t in tensors(copies) if not t.requires_grad and t.is_floating_point())]


def check_float64(kernel: Callable[..., Tensor], reference: Callable[..., Tensor], arguments: Sequence[Any]) -> None:
    """Output, every gradient and running statistics equal the reference's in float64."""
    results = (run(f, arguments, torch.randn_like) for f in (kernel, reference))
    for i, (mine, theirs) in enumerate(zip(*results, strict=True)):
        assert (mine is None) == (theirs is None), i
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10, msg=lambda m, i=i: f"result {i}: {m}")


def check_float32(
    kernel: Callable[..., Tensor], reference: Callable[..., Tensor], arguments: Sequence[Any], isa: str
) -> None:
    """No worse than PyTorch, with one instruction set."""
    before = cpu.loaded_isa()
    cpu.set_isa(isa)
    try:
        compare_kernel(kernel, reference, arguments)
    finally:
        cpu.set_isa(before)


def check_threads(
    kernel: Callable[..., Tensor], reference: Callable[..., Tensor], arguments: Sequence[Any], threads: int
) -> None:
    """Right on any number of threads, and the same bits twice."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_float64(kernel, reference, arguments)
        first, second = (run(kernel, arguments, torch.randn_like) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "two runs differ"
    finally:
        torch.set_num_threads(before)


def check_layout(
    kernel: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    maps: Sequence[Tensor],
    layout: str,
    gradient: str,
) -> None:
    """Inputs and gradients of any strides give the reference's results, and are left alone.

    ``kernel`` and ``reference`` take ``maps``, (B, C, H, W) tensors, and nothing else that has a gradient.
    """
    inputs = [LAYOUTS[layout](x.detach()).requires_grad_() for x in maps]
    before = [x.detach().clone() for x in inputs]
    y, expected = kernel(*inputs), reference(*inputs)
    if layout in ("nchw", "channels_last"):
        form = torch.contiguous_format if layout == "nchw" else torch.channels_last
        assert y.is_contiguous(memory_format=form)
    grad = GRADIENTS[gradient](y)
    grad_before = grad.clone()
    for g, e in zip(*(torch.autograd.grad(out, inputs, grad) for out in (y, expected))):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    assert all(torch.equal(x, b) for x, b in zip(inputs, before)) and torch.equal(grad, grad_before)


def check_some_gradients(kernel: Callable[..., Tensor], reference: Callable[..., Tensor], arguments: Any) -> None:
    """Gradients only where they are required: each leaf alone."""
    everything = leaves(arguments)
    for chosen in range(len(everything)):
        for i, leaf in enumerate(everything):
            leaf.requires_grad_(i == chosen)
        grads = [torch.autograd.grad(f(*arguments).square().sum(), everything[chosen])[0] for f in (kernel, reference)]
        torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)
    for leaf in everything:
        leaf.requires_grad_()


def check_double_backward(kernel: Callable[..., Tensor], arguments: Sequence[Any]) -> None:
    (grad,) = torch.autograd.grad(kernel(*arguments).square().sum(), leaves(arguments)[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def check_not_finite(kernel: Callable[..., Tensor], reference: Callable[..., Tensor], arguments: Sequence[Any]) -> None:
    """Where PyTorch's result is finite or NaN, so is the kernel's."""
    mine, theirs = (f(*convert(tuple(arguments), torch.float64)) for f in (kernel, reference))
    assert torch.equal(mine.isfinite(), theirs.isfinite())
    assert torch.equal(mine.isnan(), theirs.isnan())


def check_compiled(module: torch.nn.Module, *inputs: Tensor) -> None:
    """torch.compile(fullgraph=True) gives the eager outputs, gradients and statistics."""
    results = []
    for call in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        for part in module.modules():
            if hasattr(part, "reset_running_stats"):
                part.reset_running_stats()
        module.zero_grad()
        y = call(*inputs)
        y.square().sum().backward()
        statistics = [b.clone() for b in module.buffers()]
        results.append([y, *statistics, *(p.grad.clone() for p in module.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
