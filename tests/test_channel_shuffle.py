"""Channel shuffle on every backend: the template for the tests of an op."""

import pytest
import torch
from backends import FORMATS, backend_dtypes, backends
from torch import nn

import ffkernels
from ffkernels import cpu
from ffkernels.ops.channel_shuffle import _raw, channels_last
from ffkernels.reference.channel_shuffle import channel_shuffle as reference

OP = "channel_shuffle"
# The models' layers (small maps under Triton's interpreter), then sizes around vector widths and group limits.
SHAPES = [
    ((2, 32, 8, 8), 4),
    ((1, 74, 5, 4), 2),
    ((1, 56, 3, 5), 28),
    ((3, 12, 7, 1), 3),
    ((1, 6, 1, 1), 6),
    ((2, 6, 1, 13), 1),
    ((1, 1, 4, 4), 1),
    ((0, 8, 3, 3), 4),
    ((2, 8, 0, 3), 2),
    ((2, 34, 3, 3), 17),
    ((1, 256, 2, 2), 8),
    ((1, 40, 3, 3), 10),
]


def by_index(x: torch.Tensor, groups: int) -> torch.Tensor:
    """The definition, channel by channel."""
    per_group = x.shape[1] // groups
    y = torch.empty_like(x)
    for i in range(per_group):
        for j in range(groups):
            y[:, i * groups + j] = x[:, j * per_group + i]
    return y


def make(shape: tuple, dtype: torch.dtype, device: str, form: torch.memory_format) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return x.contiguous(memory_format=form)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape,groups", SHAPES)
def test_reference_is_the_definition(shape, groups, form):
    x = make(shape, torch.float64, "cpu", form)
    y = reference(x, groups)
    assert torch.equal(y, by_index(x, groups))
    assert x.numel() == 0 or y.is_contiguous(memory_format=form)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape,groups", SHAPES)
@pytest.mark.parametrize("backend,dtype", backend_dtypes(OP))
def test_forward(backend, dtype, shape, groups, form):
    x = make(shape, dtype, backend.device, form)
    before = x.clone()
    y = ffkernels.channel_shuffle(x, groups, policy=backend.policy)
    assert torch.equal(y, by_index(x, groups))
    assert y.stride() == x.stride()
    assert torch.equal(x, before)


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("backend", backends(OP))
def test_gradient(backend, form):
    x = make((2, 6, 3, 5), torch.float64, backend.device, form).requires_grad_()

    def run(t):
        return ffkernels.channel_shuffle(t, 3, policy=backend.policy)

    assert torch.autograd.gradcheck(run, x, fast_mode=backend.emulated)
    assert torch.autograd.gradgradcheck(run, x, fast_mode=backend.emulated)


@pytest.mark.parametrize("backend", backends(OP))
def test_gradient_of_an_expanded_tensor_is_not_overwritten(backend):
    x = torch.randn(2, 8, 3, 3, device=backend.device, requires_grad=True)
    grad = torch.ones((), device=backend.device).expand(2, 8, 3, 3)
    ffkernels.channel_shuffle(x, 2, policy=backend.policy).backward(grad)
    assert torch.equal(x.grad, torch.ones_like(x))
    assert grad.sum() == grad.numel()


@pytest.mark.parametrize("backend", backends(OP))
def test_views_are_read_by_their_strides(backend):
    x = torch.randn(3, 16, 9, 11, device=backend.device)
    for view in (x[:, 4:12, 1:7, ::2], x[:, ::2], x.transpose(2, 3), x[:1].expand(4, -1, -1, -1)):
        assert torch.equal(ffkernels.channel_shuffle(view, 4, policy=backend.policy), by_index(view, 4))


@pytest.mark.parametrize("backend", backends(OP))
def test_nan_and_infinity_pass(backend):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0], device=backend.device).view(1, 4, 1, 1)
    y = ffkernels.channel_shuffle(x, 2, policy=backend.policy)
    assert torch.equal(y.view(torch.int32), by_index(x, 2).view(torch.int32))


@pytest.mark.parametrize("isa", cpu.instruction_sets())
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_every_instruction_set(isa, form):
    try:
        assert cpu.set_isa(isa) == cpu.loaded_isa() == isa
        for shape, groups in SHAPES:
            x = make(shape, torch.float32, "cpu", form)
            y = ffkernels.channel_shuffle(x, groups, policy=ffkernels.Policy("require", "cpu"))
            assert torch.equal(y, by_index(x, groups))
    finally:
        cpu.set_isa()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_thread_counts_agree(threads, form):
    x = make((2, 32, 40, 41), torch.float32, "cpu", form)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(ffkernels.channel_shuffle(x, 4), by_index(x, 4))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", backends(OP))
def test_raw_op_is_registered_correctly(backend):
    x = torch.randn(2, 8, 3, 5, device=backend.device)
    for sample in (x, x.contiguous(memory_format=torch.channels_last), x[:, :, 1:]):
        torch.library.opcheck(_raw, (sample, 4, backend.name))


@pytest.mark.parametrize("backend", backends(OP))
def test_compiles_without_graph_breaks(backend):
    def run(t):
        return ffkernels.channel_shuffle(t, 4, policy=backend.policy) * 2

    x = torch.randn(2, 8, 3, 5, device=backend.device, requires_grad=True)
    y = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, by_index(x.detach(), 4) * 2)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))


def test_exports():
    class Shuffle(nn.Module):
        def forward(self, x):
            return ffkernels.channel_shuffle(x, 4)

    x = torch.randn(2, 8, 3, 5)
    program = torch.export.export(Shuffle(), (x,))
    assert torch.equal(program.module()(x), by_index(x, 4))


def test_torch_func_transforms_fall_back_to_the_reference():
    x = torch.randn(3, 2, 8, 2, 2)
    y = torch.func.vmap(lambda t: ffkernels.channel_shuffle(t, 4))(x)
    assert torch.equal(y, torch.stack([by_index(t, 4) for t in x]))


@pytest.mark.parametrize("shape,groups", [((2, 8, 4), 2), ((8,), 2), ((1, 8, 2, 2), 3), ((1, 8, 2, 2), 0)])
def test_bad_arguments(shape, groups):
    with pytest.raises(ValueError, match=r"channel_shuffle: (x must be|groups=)"):
        ffkernels.channel_shuffle(torch.zeros(shape), groups)


@pytest.mark.parametrize(
    "shape", [(2, 3, 20, 31), (1, 3, 1, 1), (3, 1, 4, 5), (2, 37, 5, 4), (0, 3, 4, 4), (2, 3, 5, 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_channels_last(shape, dtype):
    x = torch.randn(shape).to(dtype)
    for source in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        y = channels_last(source)
        assert torch.equal(y, x) and y.is_contiguous(memory_format=torch.channels_last)
    if dtype is torch.float64 and x.numel() < 500:
        assert torch.autograd.gradcheck(channels_last, x.requires_grad_())


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("mode", ["0", "1"])
def test_the_result_is_a_tensor_of_its_own(mode, groups):
    x = torch.ones(2, 4, 3, 3)
    ffkernels.channel_shuffle(x, groups, policy=ffkernels.Policy(mode, "auto")).zero_()
    assert bool((x == 1).all())
