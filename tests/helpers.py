"""The accuracy rule of kernels: no worse than PyTorch, both measured against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def convert(
    value: Any,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    memory_format: torch.memory_format = torch.preserve_format,
) -> Any:
    """Nested tuples and lists with every floating tensor converted, detached; leaves that take gradients still do.

    ``memory_format`` is that of four-dimensional tensors.
    """
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return value.to(device)
        kept = torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=device) if dense(value) else None
        copy = value.detach().to(device, dtype) if kept is None else kept.copy_(value.detach())
        if value.dim() == 4 and memory_format != torch.preserve_format:
            copy = copy.contiguous(memory_format=memory_format)
        return copy.requires_grad_(value.requires_grad)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(convert(item, dtype, device, memory_format) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(convert(item, dtype, device, memory_format) for item in value)
    return value


def dense(x: Tensor) -> bool:
    return x.dim() == 4 and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))


def tensors(value: Any) -> list[Tensor]:
    """The tensors inside nested tuples and lists, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors(item)]
    return []


def assert_no_worse(actual: Tensor, baseline: Tensor, exact: Tensor, factor: float, what: str) -> None:
    """|actual - exact| <= factor * (what ``baseline`` is off by, at most) + 4 eps * (largest magnitude of ``exact``).

    Args:
        actual: what the kernel computed, float32 or half.
        baseline: what PyTorch computed in the same dtype.
        exact: the same in float64.
        factor: 2 for outputs, 3 for gradients.
        what: name in the message.
    """
    exact = exact.detach().cpu()
    error = (actual.detach().cpu().double() - exact).abs()
    theirs = (baseline.detach().cpu().double() - exact).abs()
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    limit = factor * theirs.max().item() + 4 * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    worst = error.max().item()
    if not worst <= limit:
        flat = error.flatten().nan_to_num(nan=float("inf")).topk(min(5, error.numel()))
        places = [
            f"  {tuple(int(j) for j in torch.unravel_index(i, exact.shape))}: {actual.flatten()[i].item():.9g}, "
            f"PyTorch {baseline.flatten()[i].item():.9g}, exact {exact.flatten()[i].item():.9g}"
            for i in flat.indices
        ]
        raise AssertionError(
            f"{what}: off by {worst:.3g}, PyTorch by {theirs.max().item():.3g}, allowed {limit:.3g}\n"
            + "\n".join(places)
        )


def compare_kernel(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: Sequence[Any],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    gradients: bool = True,
) -> None:
    """Runs ``kernel`` in ``dtype`` and ``reference`` in ``dtype`` and float64 on copies of ``arguments`` (float64), and
    holds outputs to 2x, gradients of every leaf and the state left in other tensors to 3x PyTorch's own error.

    PyTorch's error is the larger one of its two memory formats, which add up in different orders: one sum alone is now
    and then exact by chance, and no other order can be held to that.

    Gradients that cancel out (those of weights in front of a BatchNorm over few values, say: below 1e-2 of the largest
    gradient in exact arithmetic) carry the rounding of what cancels: up to 1e-6 of the largest gradient is allowed.
    """
    same, channels_last = torch.preserve_format, torch.channels_last
    runs = []
    for run, kind, form in (
        (kernel, dtype, same),
        (reference, dtype, same),
        (reference, dtype, channels_last),
        (reference, torch.float64, same),
    ):
        copies = convert(tuple(arguments), kind, device, form)
        outputs = tensors(run(*copies))
        leaves = [t for t in tensors(copies) if t.requires_grad]
        state = [t for t in tensors(copies) if not t.requires_grad and t.is_floating_point()]
        grads: list[Tensor | None] = []
        if gradients and leaves:
            generator = torch.Generator().manual_seed(1)
            weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
            grads = list(torch.autograd.grad(outputs, leaves, weights, allow_unused=True))
        runs.append((outputs, grads, state))
    for part, name, factor in ((0, "output", 2.0), (1, "gradient", 3.0), (2, "state", 3.0)):
        exact_values = [t for t in runs[-1][part] if t is not None]
        largest = max((t.abs().max().item() for t in exact_values if t.numel()), default=0.0)
        for i, (mine, *theirs, exact) in enumerate(zip(*(run[part] for run in runs), strict=True)):
            assert (mine is None) == (exact is None), f"{name} {i}: {mine is None=}, {exact is None=}"
            if exact is None:
                continue
            cancels = part == 1 and exact.numel() and exact.abs().max().item() < 1e-2 * largest
            if cancels and (mine.double() - exact).abs().max().item() <= 1e-6 * largest:
                continue
            worse = max(theirs, key=lambda t: (t.double() - exact).abs().sum().item())
            assert_no_worse(mine, worse, exact, factor, f"{name} {i}")
