"""``pytest`` collects tests/, ``pytest --benchmark-only`` collects benchmarks/ (pytest.ini: python_files)."""

from pathlib import Path

ROOT = Path(__file__).parent


def pytest_ignore_collect(collection_path, config):
    skipped = "tests" if config.getoption("--benchmark-only", default=False) else "benchmarks"
    return True if (ROOT / skipped) in (collection_path, *collection_path.parents) else None
