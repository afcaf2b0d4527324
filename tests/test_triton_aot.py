"""Every Triton kernel compiles to machine code without a GPU, and spills no registers."""

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from ffkernels.triton.channel_shuffle import channel_shuffle_kernel  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHUFFLE = {"total": "i64", "channels": "i32", "inner": "i32", "groups": "i32"}
KERNELS = [
    pytest.param(
        channel_shuffle_kernel,
        {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", **SHUFFLE},
        {"BLOCK": 1024},
        id=f"channel_shuffle-{dtype}",
    )
    for dtype in ("fp32", "fp16", "bf16", "fp64")
]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel,signature,constants", KERNELS)
def test_compiles_without_spills(kernel, signature, constants, capability, tmp_path):
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, signature, {(list(signature).index(k),): v for k, v in constants.items()})
    options = {"enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    assert registers <= 255
    assert stack == 0, usage
