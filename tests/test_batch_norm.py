import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("affine", [True, False])
def test_a_narrower_dtype_gets_the_statistics_as_part_of_the_affine(affine, eps):
    torch.manual_seed(0)
    module = nn.BatchNorm2d(3, affine=affine, eps=eps)
    module.running_mean.copy_(torch.tensor([-0.01, 0.5, 900.0]))
    module.running_var.copy_(torch.tensor([1e-5, 2.0, 83378.0]))
    if affine:
        nn.init.uniform_(module.weight)
        nn.init.uniform_(module.bias)
    module.eval()
    x = torch.randn(2, 3, 4, 4) * module.running_var.view(1, -1, 1, 1).sqrt() + module.running_mean.view(1, -1, 1, 1)
    for dtype, same in ((torch.float32, True), (torch.float64, True), (torch.bfloat16, False), (torch.float16, False)):
        bn = BatchNorm.of(module)
        weight, bias, mean, var = normalisation_tensors(bn, dtype)
        assert (var is bn.running_var) == same == (mean is bn.running_mean)
        y = F.batch_norm(x, mean, var, weight, bias, eps=bn.eps)
        torch.testing.assert_close(y, module(x), rtol=2e-6, atol=2e-6)
    if affine:
        weight.sum().backward()
        assert module.weight.grad is not None


def test_training_reads_no_statistics():
    bn = BatchNorm.of(nn.BatchNorm2d(3))
    assert normalisation_tensors(bn, torch.float16) == (bn.weight, bn.bias, None, None)
    assert normalisation_tensors(None, torch.float16) == (None,) * 4
