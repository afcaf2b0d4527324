import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ffkernels import BatchNorm


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
