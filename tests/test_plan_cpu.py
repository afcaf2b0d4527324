"""Recorded native calls (csrc/program.h, ffkernels/cpu/plan.py), and calls that leave out the dispatcher."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_checks import CPU, check_float64, needs_cpu_kernels
from layers import conv, norm, tensor
from torch.utils._python_dispatch import TorchDispatchMode

import featherface
import ffkernels
from ffkernels import cpu
from ffkernels.cpu import plan
from ffkernels.native import module
from ffkernels.reference.ssh_grouped import ssh_grouped as reference_ssh

pytestmark = needs_cpu_kernels


class Seen(TorchDispatchMode):
    """Calls go through the dispatcher, and the names of raw ops are kept."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ffkernels":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


def results(model, x, training):
    model.zero_grad()
    outputs = model(x)
    if training:
        sum(y.square().mean() for y in outputs).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [*outputs, *grads, *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["featherface_v2", "featherface_v1"])
def test_direct_calls_have_the_bits_of_raw_ops(name, training):
    torch.manual_seed(0)
    model = featherface.create_model(name, fused="require").train(training).requires_grad_(training)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = 50 * torch.randn(2, 3, 64, 96)
    with torch.set_grad_enabled(training):
        direct = [t.detach().clone() for t in results(model, x, training)]
        model.load_state_dict(state)
        with Seen() as seen:
            raw = results(model, x, training)
    assert {"_conv_chain", "_bifpn_node", "_cbam"} <= seen.names
    assert len(direct) == len(raw)
    for a, b in zip(direct, raw):
        assert torch.equal(a, b)


def test_a_tensor_too_many_or_too_few():
    copy = plan.Plan(torch.float32)
    source, target = copy.base(), copy.base()
    copy.copy(source, 2, 3, target, 4, 3)
    x, y = torch.arange(8.0), torch.zeros(6)
    copy.run("copy", [x.data_ptr(), y.data_ptr()])
    assert y.tolist() == [0, 1, 2, 4, 5, 6]
    for pointers in ([x.data_ptr()], [x.data_ptr(), y.data_ptr(), 0]):
        with pytest.raises(RuntimeError, match="plan has 2 tensors"):
            copy.run("copy", pointers)


def test_arguments_of_a_recorded_call():
    program = module()[0].Program()
    with pytest.raises(ValueError, match="no entry ff_cpu_nothing"):
        program.add("ff_cpu_nothing")
    with pytest.raises(ValueError, match="takes 6 arguments, got 1"):
        program.add("ff_cpu_copy_rows", (2, 0))
    program.add("ff_cpu_copy_rows", (3, 0), 0, 1, 4, (2, 0), 0)
    with pytest.raises(ValueError, match="more bases"):
        program.run([0, 0, 0])
    program.add("ff_cpu_from_double", None, 0, None, 99)
    with pytest.raises(RuntimeError, match="unsupported dtype"):
        x = torch.ones(2)
        ffkernels.native.check(program.run([0, 0, x.data_ptr(), x.data_ptr()]), "program")


def test_plans_are_kept_per_size_and_number_of_threads():
    plan.clear()
    unit = ffkernels.ConvUnit(conv(4, 4, 3, 4), norm(4, True), "relu")
    before = torch.get_num_threads()

    def run(height):
        return ffkernels.conv_chain(tensor(1, 4, height, 5), [unit], policy=CPU)

    try:
        for threads, height, count in ((1, 6, 1), (1, 6, 1), (1, 7, 2), (2, 7, 3)):
            torch.set_num_threads(threads)
            run(height)
            assert len(plan._plans) == count
    finally:
        torch.set_num_threads(before)
    cpu.set_isa(cpu.loaded_isa())
    assert not plan._plans


def test_one_plan_in_two_threads():
    torch.manual_seed(1)
    unit = ffkernels.ConvUnit(conv(8, 4, 3, 2), norm(8, True)._replace(running_mean=None, running_var=None), "relu")
    inputs = [torch.randn(2, 4, 16, 16, dtype=torch.float64) for _ in range(8)]

    def run(x):
        return ffkernels.conv_chain(x, [unit], policy=CPU).detach()

    expected = [run(x) for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        for y, e in zip(pool.map(run, inputs * 4), expected * 4):
            torch.testing.assert_close(y, e)


@pytest.mark.parametrize("groups", [(4, 4, 2, 2, 4), (4, 2, 4, 2, 1), (1, 2, 1, 2, 1)])
@pytest.mark.parametrize("training", [True, False])
def test_ssh_of_convolutions_with_different_groups(groups, training):
    torch.manual_seed(2)
    shapes = ((8, 16), (8, 16), (4, 8), (8, 8), (4, 8))
    convs = [conv(out, channels, 3, g) for (out, channels), g in zip(shapes, groups)]
    bns = [norm(out, training) for out, _ in shapes]
    x = tensor(2, 16, 7, 9)

    def kernel(x, convs, bns):
        return ffkernels.ssh_grouped(x, convs, bns, 4, policy=CPU)

    check_float64(kernel, lambda x, convs, bns: reference_ssh(x, convs, bns, 4), (x, convs, bns))


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_model(training):
    torch.manual_seed(3)
    torch._dynamo.reset()
    model = featherface.create_model("featherface_v2", fused="require").train(training).requires_grad_(training)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = 50 * torch.randn(2, 3, 64, 64)
    with torch.set_grad_enabled(training):
        eager = [t.detach().clone() for t in results(model, x, training)]
        model.load_state_dict(state)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        model.zero_grad()
        outputs = compiled(x)
        if training:
            sum(y.square().mean() for y in outputs).backward()
    found = [*outputs, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]
    assert len(found) == len(eager)
    for a, b in zip(found, eager):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))
    torch._dynamo.reset()
