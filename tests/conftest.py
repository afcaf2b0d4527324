import os
from pathlib import Path

import pytest
import torch

# What the caller set for kernels is no part of what the tests say; before ffkernels is imported.
for name in ("FF_USE_FUSED", "FF_BACKEND", "FF_CPU_ISA"):
    os.environ.pop(name, None)

import ffkernels.cuda  # noqa: E402
from ffkernels.ops import checks  # noqa: E402

# References are float32 where they say so.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

if emulation := os.environ.get("FF_TEST_CUDA_EMULATION"):
    # test_cuda_emulation.py starts such processes. What torch.empty returns is NaN, so that unwritten outputs show.
    ffkernels.cuda.emulate(emulation)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of shared data named by FEATHERFACE_DATA; tests that ask for it skip when it is missing."""
    value = os.environ.get("FEATHERFACE_DATA")
    if not value:
        pytest.skip("FEATHERFACE_DATA is not set: it names the folder with the shared weights and photographs")
    folder = Path(value).expanduser().resolve()
    if not folder.is_dir():
        pytest.skip(f"FEATHERFACE_DATA={value} is not a folder")
    return folder


@pytest.fixture(scope="session")
def teacher_weights(data_dir: Path) -> Path:
    """The published checkpoint of featherface_v1_ssh."""
    path = data_dir / "weights" / "featherface_v1_published.pth"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    return path


@pytest.fixture
def autocast(monkeypatch):
    """``torch.autocast`` as kernels of a GPU understand it, on the CPU too, where it would mean float32 for them."""

    def context(gpu, dtype):
        if gpu.emulated:
            monkeypatch.setattr(
                checks, "autocast_dtype", lambda kind: dtype if torch.is_autocast_enabled(kind) else None
            )
        return torch.autocast(gpu.device, dtype)

    return context
