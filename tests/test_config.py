import logging

import pytest
import torch
from torch import nn

import ffkernels
from ffkernels import Policy, config, registry
from ffkernels.nn import FusedModule


class Shuffle(FusedModule):
    ff_op = "channel_shuffle"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return ffkernels.channel_shuffle(x * self.weight, 2, policy=self.ff_policy)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("FF_USE_FUSED", raising=False)
    monkeypatch.delenv("FF_BACKEND", raising=False)


def model() -> nn.Module:
    return nn.Sequential(Shuffle(), nn.Sequential(Shuffle()))


def policies(module: nn.Module) -> set:
    return {m.ff_policy for m in module.modules() if isinstance(m, FusedModule)}


def test_plain_pytorch_is_the_default():
    assert policies(model()) == {Policy("0", "auto")}
    assert config.requested_policy() is None


@pytest.mark.parametrize("value", ["0", "1", "require"])
def test_environment_is_read_when_the_model_is_built(monkeypatch, value):
    monkeypatch.setenv("FF_USE_FUSED", value)
    built = model()
    monkeypatch.setenv("FF_USE_FUSED", "0")
    assert policies(built) == {Policy(value, "auto")}
    assert config.requested_policy() == Policy("0", "auto"), "an explicit 0 is not the same as unset"


def test_backend_is_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("FF_USE_FUSED", "1")
    monkeypatch.setenv("FF_BACKEND", "reference")
    assert policies(model()) == {Policy("1", "reference")}


def test_a_backend_alone_asks_for_kernels(monkeypatch):
    monkeypatch.setenv("FF_BACKEND", "reference")
    assert policies(model()) == {Policy("1", "reference")}
    monkeypatch.setenv("FF_USE_FUSED", "0")
    assert policies(model()) == {Policy("0", "reference")}
    monkeypatch.delenv("FF_USE_FUSED")
    monkeypatch.setenv("FF_BACKEND", "auto")
    assert config.requested_policy() is None


@pytest.mark.parametrize("name,value", [("FF_USE_FUSED", "yes"), ("FF_USE_FUSED", "2"), ("FF_BACKEND", "opencl")])
def test_wrong_environment_names_the_right_values(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    allowed = "0, 1, require" if name == "FF_USE_FUSED" else "auto, cpu, cuda, triton, reference"
    with pytest.raises(ValueError, match=f"{name}='{value}' is not a valid value; use one of: {allowed}"):
        model()


def test_unavailable_backend_raises_when_the_model_is_built(monkeypatch):
    monkeypatch.setattr(registry, "backend_unavailable", lambda b, d=None: "no device" if b == "cuda" else None)
    monkeypatch.setenv("FF_USE_FUSED", "1")
    monkeypatch.setenv("FF_BACKEND", "cuda")
    with pytest.raises(
        ffkernels.BackendUnavailable, match=r"backend 'cuda' is not available: no device; available: auto, cpu"
    ):
        model()


def test_set_fused_reaches_every_module_and_keeps_the_state_dict():
    built = model()
    before = list(built.state_dict())
    assert ffkernels.set_fused(built, "require") is built
    assert policies(built) == {Policy("require", "auto")}
    ffkernels.set_fused(built, True, backend="reference")
    assert policies(built) == {Policy("1", "reference")}
    ffkernels.set_fused(built, False)
    assert policies(built) == {Policy("0", "auto")}
    assert list(built.state_dict()) == before


@pytest.mark.parametrize("fused", ["on", 2, "2"])
def test_set_fused_refuses_other_values(fused):
    with pytest.raises(ValueError, match="use one of: 0, 1, require"):
        ffkernels.set_fused(model(), fused)


def test_use_governs_models_built_inside_and_nests():
    with ffkernels.use("require"):
        outer = model()
        with ffkernels.use(False):
            inner = model()
        assert policies(model()) == {Policy("require", "auto")}
    assert policies(outer) == {Policy("require", "auto")}
    assert policies(inner) == policies(model()) == {Policy("0", "auto")}


def test_use_overrides_the_environment(monkeypatch):
    monkeypatch.setenv("FF_USE_FUSED", "require")
    with ffkernels.use(False):
        assert policies(model()) == {Policy("0", "auto")}


def test_use_with_a_model_gives_its_policies_back_even_after_an_error():
    built = model()
    ffkernels.set_fused(built[1], True)
    with pytest.raises(KeyError), ffkernels.use("require", model=built):
        assert policies(built) == {Policy("require", "auto")}
        raise KeyError
    assert built[0].ff_policy == Policy("0", "auto")
    assert built[1][0].ff_policy == Policy("1", "auto")


def test_forward_does_not_read_the_environment(monkeypatch):
    built = model()
    monkeypatch.setenv("FF_USE_FUSED", "nonsense")
    built(torch.zeros(1, 4, 2, 2))
    ffkernels.channel_shuffle(torch.zeros(1, 4, 2, 2), 2)


def test_repr_shows_the_policy():
    assert "fused" not in repr(model())
    assert "fused=require, backend=auto" in repr(ffkernels.set_fused(model(), "require"))


def test_require_raises_where_only_the_reference_is_left():
    x = torch.zeros(1, 4, 2, 2, dtype=torch.complex64)
    with pytest.raises(
        ffkernels.FusedKernelRequired, match=r"channel_shuffle: no fused kernel for complex64 \(1, 4, 2, 2\)"
    ):
        ffkernels.channel_shuffle(x, 2, policy=Policy("require"))
    assert ffkernels.channel_shuffle(x, 2, policy=Policy("require", "reference")).shape == x.shape


def test_fallback_is_logged_once_with_its_reason(caplog):
    registry._cache.clear()
    registry._logged.clear()
    x = torch.zeros(1, 4, 2, 2, dtype=torch.complex64)
    with caplog.at_level(logging.WARNING, logger="ffkernels"):
        for _ in range(3):
            ffkernels.channel_shuffle(x, 2, policy=Policy("1"))
            registry._cache.clear()
    assert [r.message for r in caplog.records] == ["channel_shuffle runs on plain PyTorch (cpu: no complex64 kernel)"]


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in registry.backend_unavailable("triton", "cpu")


def test_supports_can_refuse_by_facts():
    registry.register("test_op", "cpu", (torch.float32,), supports=lambda r: "too wide" if r.facts["k"] > 3 else None)
    try:
        x = torch.zeros(1)
        assert registry.select("test_op", x, Policy("1"), k=3) == "cpu"
        assert registry.select("test_op", x, Policy("1"), k=5) == "reference"
        with pytest.raises(ffkernels.FusedKernelRequired, match="cpu: too wide"):
            registry.select("test_op", x, Policy("require"), k=5)
        registry.register("test_op", "cpu", (torch.float32,), backward=False)
        assert registry.select("test_op", x, Policy("1"), needs_grad=True) == "reference"
    finally:
        del registry._implementations["test_op"]


def test_report_lists_every_module_with_its_reason():
    built = ffkernels.set_fused(model(), True)
    rows = ffkernels.report(built)
    assert [(r.layer, r.op, r.backend) for r in rows] == [
        ("0", "channel_shuffle", "cpu"),
        ("1.0", "channel_shuffle", "cpu"),
    ]
    text = str(ffkernels.report(ffkernels.set_fused(built, False)))
    assert text.splitlines()[0].split() == ["layer", "op", "backend", "reason"]
    assert "reference" in text and "FF_USE_FUSED=0" in text


def test_report_with_an_input_lists_the_calls_and_leaves_the_model_alone():
    built = ffkernels.set_fused(model(), True).train()
    built[1].eval()
    rows = ffkernels.report(built, torch.zeros(1, 4, 2, 2))
    assert [(r.layer, r.backend) for r in rows] == [("0", "cpu"), ("1.0", "cpu")]
    rows = ffkernels.report(built.double(), torch.zeros(1, 4, 2, 2, dtype=torch.complex64))
    assert {r.backend for r in rows} == {"reference"} and "complex" in rows[0].reason
    assert built.training and not built[1].training
    assert not built[0]._forward_hooks and not built[0]._forward_pre_hooks
