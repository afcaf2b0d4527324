"""``pytest`` collects tests/, ``pytest --benchmark-only`` collects benchmarks/ (pytest.ini: python_files)."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent

if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of OpenMP that wait by spinning, as they do unless told otherwise, take the cores from other workers.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_ignore_collect(collection_path, config):
    skipped = "tests" if config.getoption("--benchmark-only", default=False) else "benchmarks"
    return True if (ROOT / skipped) in (collection_path, *collection_path.parents) else None


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="run every Nth test only (scripts/sanitize.sh)")


LONGEST = ("test_cuda_emulation.py", "test_triton_interpreter.py")
"""Files that workers of pytest-xdist run first, so that none is left alone with one at the end."""


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config, items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.path.name not in LONGEST)
    left_out = [item for number, item in enumerate(items) if number % config.getoption("--every")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
