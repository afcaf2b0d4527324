"""What happens around the network, and the whole detector: ``pytest --benchmark-only -k stages``.

The faces stage is 16,800 anchors with 300 faces left, on one thread.
"""

import functools

import pytest
import torch
from ops import measure

from featherface import create_model
from featherface.benchmark import Setup, stages


@functools.cache
def cases():
    torch.manual_seed(0)
    return stages(Setup(create_model("featherface_v2"), threads=1))


@pytest.mark.parametrize("contender", ["PyTorch", "default"])
@pytest.mark.parametrize("stage", ["preprocess", "faces", "image in, faces out"])
def test_stages(benchmark, stage, contender):
    benchmark.group = stage
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            measure(benchmark, cases()[stage][contender], "cpu")
    finally:
        torch.set_num_threads(before)
