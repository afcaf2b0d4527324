import copy

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import needs_cpu_kernels
from layers import conv, norm
from torch import nn

import ffkernels
from ffkernels import BatchNorm
from ffkernels.batch_norm import _at_once, normalisation_tensors, update_running_statistics


def run(module: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    bn = BatchNorm.of(module)
    mean, var = bn.running_mean, bn.running_var
    return F.batch_norm(x, mean, var, bn.weight, bn.bias, bn.training, bn.momentum, bn.eps)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_same_as_the_module(training, track, affine, momentum):
    stock = nn.BatchNorm2d(4, momentum=momentum, affine=affine, track_running_stats=track).train(training).double()
    ours = copy.deepcopy(stock)
    for _ in range(3):
        x = torch.randn(2, 4, 3, 3, dtype=torch.float64) * 3 + 1
        assert torch.equal(stock(x), run(ours, x))
    for expected, got in zip(stock.state_dict().items(), ours.state_dict().items()):
        assert expected[0] == got[0] and torch.equal(expected[1], got[1])


def test_statistics_that_are_no_longer_tracked():
    """In evaluation they are used, in training the batch's are, as nn.BatchNorm2d has it."""
    stock = nn.BatchNorm2d(4)
    stock.running_mean.uniform_()
    stock.track_running_stats = False
    x = torch.randn(2, 4, 3, 3)
    for training in (True, False):
        ours = copy.deepcopy(stock.train(training))
        assert torch.equal(stock(x), run(ours, x)) and torch.equal(stock.running_mean, ours.running_mean)


@pytest.mark.parametrize("track", [True, False])
def test_statistics_of_another_use(track):
    module = nn.BatchNorm2d(2, track_running_stats=track)
    mean, var, count = torch.zeros(2), torch.ones(2), torch.tensor(0)
    bn = BatchNorm.of(module, mean, var, count)
    assert bn.running_mean is mean and bn.running_var is var and count == 1
    assert not track or module.num_batches_tracked == 0
    assert not BatchNorm.of(module.eval(), mean, var, count).training


def test_other_normalisations_are_refused():
    with pytest.raises(TypeError, match="SyncBatchNorm"):
        BatchNorm.of(nn.SyncBatchNorm(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dense", [True, False])
def test_running_statistics(dense, dtype):
    torch.manual_seed(0)
    uses, expected = [], []
    for momentum in (0.1, 0.0, 0.7, 1.0):
        running = torch.rand(2, 5, 2).to(dtype) if not dense else torch.rand(2, 5).to(dtype)
        mean, var = running if dense else running[:, :, 0]
        statistics_dtype = torch.promote_types(dtype, torch.float32)
        batch_mean, batch_var = torch.rand(2, 5, dtype=statistics_dtype)
        uses.append((BatchNorm(None, None, mean, var, True, momentum, 1e-5), batch_mean, batch_var, 11))
        for old, new in ((mean, batch_mean), (var, batch_var * 11 / 10)):
            expected.append((1 - momentum) * old.double() + momentum * new.double())
    versions = [(bn.running_mean._version, bn.running_var._version) for bn, *_ in uses]
    update_running_statistics([*uses, (BatchNorm(None, None, None, None, True, 0.1, 1e-5), mean, var, 11)])
    got = [t for bn, *_ in uses for t in (bn.running_mean, bn.running_var)]
    for old, new in zip(expected, got):
        torch.testing.assert_close(new.double(), old, rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert all(
        bn.running_mean._version > v[0] and bn.running_var._version > v[1] for (bn, *_), v in zip(uses, versions)
    )


def test_statistics_that_are_named_twice_are_updated_one_after_the_other():
    def use(running, momentum):
        return BatchNorm(None, None, running, running, True, momentum, 1e-5), running, running, 2

    a, b, c = torch.zeros(2), torch.zeros(2), torch.zeros(2)
    uses = [use(a, 0.1), use(b, 0.1), use(a, 0.1), use(c, 0.2), use(a, 0.2), use(b, 0.1), use(a, 0.1)]
    groups = _at_once(uses)
    for tensor in (a, b, c):
        assert all(sum(bn.running_mean is tensor for bn, *_ in group) < 2 for group in groups)
        places = [n for n, group in enumerate(groups) for bn, *_ in group if bn.running_mean is tensor]
        momenta = [groups[n][0][0].momentum for n in places]
        assert momenta == [bn.momentum for bn, *_ in uses if bn.running_mean is tensor]
    assert all(len({bn.momentum for bn, *_ in group}) == 1 for group in groups)
    assert sum(map(len, groups)) == len(uses) and len(groups[0]) == 2


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_leaves_a_float32_normalisation_as_it_is(training, affine):
    module = nn.BatchNorm2d(3, affine=affine).train(training)
    bn = BatchNorm.of(module)
    own = (bn.weight, bn.bias, *((None, None) if training else (bn.running_mean, bn.running_var)))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert all(found is tensor for found, tensor in zip(normalisation_tensors(bn, dtype), own))
    for dtype, stored in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        found = normalisation_tensors(BatchNorm.of(module.to(stored)), dtype)
        assert all(t is None or t.dtype is dtype for t in found)
    assert normalisation_tensors(None, torch.float16) == (None,) * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_normalisation_stays_half_unless_one_tensor_is_not(dtype):
    bn = BatchNorm.of(nn.BatchNorm2d(3).eval().to(dtype))
    assert all(found is tensor for found, tensor in zip(normalisation_tensors(bn, dtype), bn[:4]))
    mixed = bn._replace(running_var=torch.tensor([1.0, 2.0, 83378.0]))
    found = normalisation_tensors(mixed, dtype)
    assert all(t.dtype is torch.float32 for t in found) and found[3] is mixed.running_var
    found[0].sum().backward()
    assert bn.weight.grad.dtype is dtype


def test_statistics_of_two_dtypes_are_refused():
    bn = BatchNorm.of(nn.BatchNorm2d(4))._replace(running_var=torch.ones(4, dtype=torch.float64))
    conv = ffkernels.ConvParams(torch.zeros(4, 4, 1, 1))
    with pytest.raises(ValueError, match=r"bn.running_mean is torch.float32 and .*running_var torch.float64"):
        ffkernels.grouped_conv_bn_act(torch.zeros(2, 4, 3, 3), conv, bn)


@needs_cpu_kernels
@pytest.mark.parametrize("training", [True, False])
def test_eps_and_momentum_are_those_of_the_layer(training):
    torch.manual_seed(0)
    x, policy = torch.randn(3, 8, 6, 5).double(), ffkernels.Policy("require", "cpu")
    plain = ffkernels.Policy("0", "auto")
    mlp = ffkernels.ChannelMLP(torch.randn(4, 8).double(), None, torch.randn(8, 4).double(), None)
    offset, mask = torch.randn(3, 18, 6, 5).double(), torch.rand(3, 9, 6, 5).double()
    calls = {
        8: lambda bn, policy: ffkernels.grouped_conv_bn_act(x, conv(8, 8, 3), bn, policy=policy),
        1: lambda bn, policy: ffkernels.cbam(x, mlp, conv(1, 2, 7), [bn], policy=policy),
        4: lambda bn, policy: ffkernels.deform_conv2d(x, offset, mask, conv(4, 8, 3), bn, policy=policy),
    }
    for channels, call in calls.items():
        bns = []
        for chosen in (policy, plain):
            torch.manual_seed(1)
            bns.append(norm(channels, training)._replace(momentum=0.3, eps=0.02))
            bns[-1] = (bns[-1], call(bns[-1], chosen))
        (own, y), (other, expected) = bns
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(own.running_mean, other.running_mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(own.running_var, other.running_var, rtol=1e-9, atol=1e-9)
