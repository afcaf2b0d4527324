"""scripts/train_weights.sh from the first stage to the last, on a handful of tiny synthetic photographs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from faces import make_faces

import featherface
from featherface.models.checkpoint import read_metadata

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_weights.sh"
SMALL = (
    "schedule.epochs=1",
    "schedule.warmup_epochs=0",
    "augmentation.sizes=[64]",
    "batches.size=2",
    "batches.workers=0",
    "validation.long_side=64",
    "runtime.device=cpu",
)


@pytest.mark.slow
def test_one_command_trains_both_models(tmp_path):
    data, runs, tools = tmp_path / "data", tmp_path / "runs", tmp_path / "tools"
    make_faces(data / "faces" / "wider_val_train", 30)
    make_faces(data / "faces" / "eden_mask", 3, seed=1)
    (data / "weights").mkdir()
    teacher = featherface.create_model("featherface_v1_ssh")
    torch.save(teacher.state_dict(), data / "weights" / "featherface_v1_published.pth")
    tools.mkdir()
    command = tools / "featherface"
    small = " ".join(f"'--set={value}'" for value in SMALL)
    command.write_text(
        f'#!/bin/sh\n[ "$1" = train ] && set -- "$@" {small} --quiet\nexec "{sys.executable}" -m featherface "$@"\n'
    )
    command.chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def run() -> dict[str, torch.Tensor]:
        result = subprocess.run(
            [SCRIPT, data, runs], env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert result.returncode == 0, result.stderr
        files = {path: safetensors.torch.load_file(path) for path in runs.rglob("*.safetensors")}
        return {f"{path} {name}": tensor for path, tensors in files.items() for name, tensor in tensors.items()}

    written = run()
    v2, ultra = (runs / name / "final.safetensors" for name in ("v2_training_annealed", "v2_ultra_training_mild"))
    assert featherface.create_model("featherface_v2", weights=v2).training
    featherface.create_model("featherface_v2_ultra", weights=ultra)
    assert read_metadata(runs / "v2_average_restart.safetensors")["average_of"].count("share") == 2
    # A second call goes on where the first ended, which is the end.
    again = run()
    assert again.keys() == written.keys() and all(torch.equal(again[name], written[name]) for name in written)
