"""Whole models beside other runtimes: ``pytest --benchmark-only -k models``.

Each contender is timed on its own here; ``featherface benchmark`` times them in turn and prints one table. Both share
the set-up, the input and the check that the outputs are the same.
"""

import functools

import pytest
import torch
from ops import measure

from featherface import create_model, list_models
from featherface.benchmark import Setup, Unavailable, contenders, prepare

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CASES = [(device, name) for device in DEVICES for name in contenders(device)]


@pytest.fixture(autouse=True)
def only_when_asked(request):
    if not request.config.getoption("benchmark_only"):
        pytest.skip("whole models are timed with --benchmark-only")


@functools.cache
def setup(model: str, device: str) -> Setup:
    torch.manual_seed(0)
    return Setup(create_model(model), device)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("size", [320, 640])
@pytest.mark.parametrize("model", ["featherface_v2", *(m for m in list_models() if m != "featherface_v2")])
@pytest.mark.parametrize("device, contender", CASES)
def test_models(benchmark, model, device, contender, size, batch):
    benchmark.group = f"{model} {batch}x3x{size}x{size} {device}"
    prepared = setup(model, device)
    x = prepared.input(batch, size)
    with torch.no_grad():
        try:
            run, difference = prepare(contender, prepared, x)
        except Unavailable as error:
            pytest.skip(f"no {contender}: {error}")
        benchmark.extra_info["difference"] = difference
        measure(benchmark, run, device)
