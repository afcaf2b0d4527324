"""The choice between GPU backends by measurements."""

import pytest
import torch

from ffkernels import Policy, measurements, registry

ROWS = [
    {"op": "cbam", "dtype": "float16", "elements": 1 << 10, "ms": {"cuda": 1.0, "triton": 2.0}},
    {"op": "cbam", "dtype": "float16", "elements": 1 << 20, "ms": {"cuda": 2.0, "triton": 1.0}},
    {"op": "cbam", "dtype": "float32", "elements": 1 << 20, "ms": {"triton": 1.0}},
]


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(measurements, "table", lambda: measurements.by_op_and_dtype(ROWS))


def tried(dtype, size, backend="auto"):
    """The backends in the order in which the registry tries them, on a machine that has none of them."""
    request = registry.Request("cuda", dtype, False, True, {}, size)
    selection = registry.explain("cbam", Policy("1", backend), request)
    return [*(name for name, _ in selection.refused), selection.backend]


def test_the_committed_table():
    for (op, dtype), rows in measurements.table().items():
        assert op in registry.ops() and isinstance(dtype, torch.dtype)
        assert all(row["elements"] > 0 and set(row["ms"]) <= set(registry.PREFERENCE["cuda"]) for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at refusals, and a GPU refuses nothing")
def test_the_nearest_size_decides(table):
    assert tried(torch.float16, 9)[:2] == ["cuda", "triton"]
    assert tried(torch.float16, 30)[:2] == ["triton", "cuda"]
    assert tried(torch.float32, 30)[:2] == ["triton", "cuda"]
    assert tried(torch.float16, 0)[:2] == ["cuda", "triton"], "the default"
    assert "triton" not in tried(torch.float16, 30, "cuda"), "FF_BACKEND forces"


def test_size_counts_only_where_there_are_rows(table):
    class Cuda:
        is_cuda, dtype = True, torch.float16

        def numel(self):
            return 1 << 12

    assert measurements.size_of("cbam", Cuda(), False) == 13
    assert measurements.size_of("cbam", Cuda(), True) == 0
    assert measurements.size_of("ssh_grouped", Cuda(), False) == 0
    assert measurements.size_of("cbam", torch.ones(1, dtype=torch.float16), False) == 0
