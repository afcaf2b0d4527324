"""torch.export and torch.compile on whole models, on the reference ops."""

import pytest
import torch
from layers import randomize

from featherface import create_model, list_models

# Each takes ten seconds and more; the students are checked in every run.
HEAVY = {"featherface_v1", "featherface_v1_dcn", "featherface_v1_ssh"}
MODELS = [pytest.param(name, marks=[pytest.mark.slow] if name in HEAVY else []) for name in list_models()]


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def close(outputs, expected):
    for y, e in zip(outputs, expected, strict=True):
        torch.testing.assert_close(y, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_export_with_dynamic_sizes(name):
    model = randomize(create_model(name)).eval()
    dynamic = torch.export.Dim.DYNAMIC
    example = torch.randn(2, 3, 97, 130)
    program = torch.export.export(model, (example,), dynamic_shapes={"x": {0: dynamic, 2: dynamic, 3: dynamic}})
    exported = program.module()
    with torch.no_grad():
        for shape in ((2, 3, 97, 130), (1, 3, 64, 64), (3, 3, 201, 75)):
            x = torch.randn(shape)
            close(exported(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_compile_in_one_graph(name):
    model = randomize(create_model(name)).eval()
    x = torch.randn(2, 3, 97, 130)
    with torch.no_grad():
        close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in list_models()])
def test_compiled_training(name):
    plain, compiled = (randomize(create_model(name)) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 96, 96)
    for model, run in ((plain, plain), (compiled, torch.compile(compiled, fullgraph=True, backend="aot_eager"))):
        sum(y.square().mean() for y in run(x)).backward()
        model.eval()
    gradients = [[p.grad for p in model.parameters()] for model in (plain, compiled)]
    for got, expected in zip(*gradients):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * max(1.0, float(expected.abs().max())))
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[key], value, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["featherface_v2", "featherface_v2_ultra"])
def test_inductor(name):
    model = randomize(create_model(name)).eval()
    x = torch.randn(2, 3, 97, 130)
    with torch.no_grad():
        close(torch.compile(model, fullgraph=True)(x), model(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_trace_keeps_sizes_dynamic(name):
    model = randomize(create_model(name)).eval()
    traced = torch.jit.trace(model, torch.randn(1, 3, 96, 128), check_trace=False)
    with torch.no_grad():
        for shape in ((2, 3, 97, 131), (1, 3, 33, 7), (0, 3, 64, 64)):
            x = torch.randn(shape)
            close(traced(x), model(x))
