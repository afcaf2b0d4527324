"""Every Triton kernel compiles to machine code without a GPU and keeps hardly anything on its stack.

The launchers run on CPU tensors with the launch replaced: what they would launch is compiled for the GPU they ask for.
"""

import os
import re
import runpy
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from ffkernels.ops.bifpn_node import Fusion  # noqa: E402
from ffkernels.ops.cbam import Application  # noqa: E402
from ffkernels.ops.conv_chain import Link  # noqa: E402
from ffkernels.triton import (  # noqa: E402
    batch_norm,
    bifpn_node,
    blocks,
    cbam,
    conv,
    conv_chain,
    deform_conv2d,
    multi_head,
    separable,
    ssh_grouped,
)
from ffkernels.triton.channel_shuffle import channel_shuffle_kernel  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
LAUNCHERS = (batch_norm, cbam, conv, deform_conv2d, ssh_grouped, multi_head, bifpn_node, separable)
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MOST_STACK = 64
"""Bytes: ptxas keeps a few values there in some variants, with registers to spare."""
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}


def check(kernel, signature, constants, attributes, options, capability, tmp_path, stack_limit: int) -> None:
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    signature = {name: signature[name] for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    assert registers <= 255
    assert stack <= stack_limit, f"{kernel.__name__} {constants}: {usage}"


@contextmanager
def collected(capability: int, monkeypatch) -> Iterator[dict]:
    """Launches made inside the block: name of the kernel -> what was launched, the first of each kind."""
    launches: dict[tuple, tuple] = {}

    def collect(kernel, grid, *arguments, warps=4, stages=2, **constants):
        names = [name for name in kernel.arg_names if name not in constants]
        assert len(names) == len(arguments) and all(n > 0 for n in grid)
        signature, attributes = {}, {}
        for name, value in zip(names, arguments):
            if value is None or (type(value) is int and value == 1):
                constants[name] = value
                continue
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                aligned = value.storage_offset() * value.element_size() % 16 == 0
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
                aligned = isinstance(value, int) and value % 16 == 0
            if aligned:
                attributes[(kernel.arg_names.index(name),)] = [["tt.divisibility", 16]]
        key = kernel.__name__, *signature.items(), *sorted(constants.items(), key=str), *attributes
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        launches.setdefault(key, (kernel, signature, constants, attributes, options))

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "capability", lambda device: capability)
        for module in LAUNCHERS:
            patch.setattr(module, "launch", collect)
        patch.setattr(bifpn_node, "channel_shuffle", lambda x, groups: x)
        yield launches


def compile_all(launches: dict, capability: int, tmp_path, one_of_each: bool, stack_limit: int = MOST_STACK) -> None:
    """Compiles what was launched, or the last variant of every kernel; ``stack_limit``: bytes of a thread's stack."""
    found = list(launches.values())
    if one_of_each:
        found = list({launch[0].__name__: launch for launch in found}.values())
    for launch in found:
        check(*launch, capability, tmp_path, stack_limit)


def link(out, channels, kernel, groups=1, stride=1, dtype=torch.float32, activation=2, mode=1):
    weight = torch.empty(out, channels // groups, kernel, kernel, dtype=dtype)
    norm = [torch.empty(out, dtype=dtype) for _ in range(4)]
    tensors = (None, *norm) if mode else (norm[0], None, None, None, None)
    return Link(weight, *tensors, stride, kernel // 2, groups, activation, mode, 0.1, 1e-5)


def nhwc_map(channels, height, width, dtype, batch=2):
    return torch.empty(batch, channels, height, width, dtype=dtype).to(memory_format=torch.channels_last)


def run_chain(dtype, channels, links):
    x = nhwc_map(channels, 32, 32, dtype)
    conv_chain.forward(x, links, save=False)
    y, stats, raw = conv_chain.forward(x, links, save=True)
    norm = links[0].normalisation > 0
    conv_chain.backward(torch.empty_like(y), x, links, stats, raw, [True, *[True, not norm, norm, norm] * len(links)])


def stage(dtype, mode=1):
    """A block of the backbone, then a grouped and a dense 3x3 convolution."""
    links = [
        link(64, 64, 3, 64, 2, dtype, mode=mode),
        link(128, 64, 1, 1, 1, dtype, mode=mode),
        link(32, 128, 3, 4, 1, dtype, 3, mode),
        link(16, 32, 3, 1, 1, dtype, 1, mode),
    ]
    run_chain(dtype, 64, links)


def evaluation(dtype, mode=2):
    """Pairs that run as one kernel: the widest of the backbone, a node's four groups, V1's odd width."""
    mode = mode if mode != 1 else 2
    for channels, out, groups, stride in ((256, 256, 1, 1), (8, 16, 1, 2), (32, 32, 4, 1), (74, 74, 1, 1)):
        links = [link(channels, channels, 3, channels, stride, dtype, mode=mode)]
        links.append(link(out, channels, 1, groups, 1, dtype, mode=mode))
        conv_chain.forward(nhwc_map(channels, 32, 32, dtype), links, False, 3 if groups == 4 else 0)


def stem(dtype, mode=1):
    run_chain(dtype, 3, [link(8, 3, 3, 1, 2, dtype, mode=mode), link(8, 8, 3, 8, 1, dtype, mode=mode)])


def ssh(dtype, mode=1):
    """The block of V2."""
    mode = mode or 1
    shapes = [(16, 32), (8, 32), (8, 8), (8, 8), (8, 8)]
    links = [link(o, i, 3, 4, 1, dtype, 1, mode) for o, i in shapes]
    x = nhwc_map(32, 20, 20, dtype)
    ssh_grouped.forward(x, links, 4, save=False)
    y, stats, raw = ssh_grouped.forward(x, links, 4, save=True)
    ssh_grouped.backward(torch.empty_like(y), x, links, stats, raw, 4, [True, *[True, False, True, True] * 5])


def heads(dtype, mode=1):
    maps = [nhwc_map(32, 20, 20, dtype), nhwc_map(32, 10, 10, dtype)]
    for softmax in (False, True):
        outputs = multi_head.scatter(maps, softmax)
        multi_head.gather(outputs, outputs[1] if softmax else None, [z.shape for z in maps])


def bifpn(dtype, mode=1):
    """The nodes of V2 and one with the padding of V1."""
    links = [link(32, 32, 3, 32, 1, dtype, 0, 0), link(32, 32, 1, 4, 1, dtype, 0, mode)]
    links[0] = links[0]._replace(bias=None)
    weight = torch.empty(3, dtype=dtype)
    for resample, same in (((0, 1), False), ((0, 0, 2), True), ((0, 0, 2), False)):
        inputs = [nhwc_map(32, n, n, dtype) for n in (20, 10 if resample[1] == 1 else 20, 40)[: len(resample)]]
        fusion = Fusion(resample, 4, same, 1e-4)
        bifpn_node.forward(inputs, weight, links, fusion, save=False)
        y, v, stats, raw = bifpn_node.forward(inputs, weight, links, fusion, save=True)
        needs = [True] * (len(inputs) + 1) + [True, False, False, False, True, mode == 0, mode > 0, mode > 0]
        bifpn_node.backward(torch.empty_like(y), inputs, weight, v, links, stats, raw, fusion, needs)


def attention(dtype, mode=1):
    """The shared gate of V2 on 128 channels."""
    shapes = ((2, 64), (2,), (64, 2), (64,), (4, 2, 7, 7), (4,), (4,), (4,), (4,))
    params = [torch.empty(shape) for shape in shapes]
    app = Application(*params, 0, True, True, mode != 2, 0.1, 1e-5)
    x = nhwc_map(128, 20, 20, dtype)
    y, _, saved = cbam.forward(x, None, app)
    cbam.backward(torch.empty_like(y), x, y, app, saved, [True, False, *[True] * 7])


def deform(dtype, mode=1):
    """The first layer of the teacher's context module."""
    x, offset, mask = (nhwc_map(n, 20, 20, dtype) for n in (56, 18, 9))
    layer = link(28, 56, 3, 1, 1, dtype, 1, mode)
    deform_conv2d.forward(x, offset, mask, layer, save=False)
    y, stats, z = deform_conv2d.forward(x, offset, mask, layer, save=True)
    needs = [True, True, True, True, not mode, mode > 0, mode > 0]
    deform_conv2d.backward(torch.empty_like(y), x, offset, mask, layer, stats, z, needs)


CALLS = {
    "deform": deform,
    "attention": attention,
    "stem": stem,
    "ssh": ssh,
    "heads": heads,
    "bifpn": bifpn,
    "stage": stage,
    "evaluation": evaluation,
}


@pytest.mark.parametrize("dtype,capability", [(torch.float32, 80), (torch.float16, 90), (torch.bfloat16, 100)], ids=str)
def test_one_variant_of_every_kernel(dtype, capability, monkeypatch, tmp_path):
    with collected(capability, monkeypatch) as launches:
        for call in CALLS.values():
            call(dtype)
    compile_all(launches, capability, tmp_path, one_of_each=True, stack_limit=0)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("call", CALLS)
def test_all_variants(call, mode, dtype, capability, monkeypatch, tmp_path):
    with collected(capability, monkeypatch) as launches:
        CALLS[call](dtype, mode)
    compile_all(launches, capability, tmp_path, one_of_each=False)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", blocks.DEFAULTS)
def test_candidates_of_the_tuning_script_compile(kind, dtype, capability, monkeypatch, tmp_path):
    """They may spill: their time will show. One variant of every kernel whose block is of the kind."""
    script = Path(__file__).parent.parent / "scripts" / "tune_triton.py"
    if not script.exists():
        pytest.skip("needs the source folder")

    def launched(found: list) -> dict:
        monkeypatch.setitem(blocks.DEFAULTS, kind, found)
        with collected(capability, monkeypatch) as launches:
            for call in CALLS.values():
                call(dtype)
        return launches

    defaults = launched(blocks.DEFAULTS[kind])
    for candidate in runpy.run_path(str(script))["CANDIDATES"][kind, dtype.itemsize]:
        launches = launched([(0, 4, candidate)])
        changed = {
            key: launch for key, launch in launches.items() if key not in defaults or launch[-1] != defaults[key][-1]
        }
        compile_all(changed, capability, tmp_path, one_of_each=True, stack_limit=2**20)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "fp64"])
def test_channel_shuffle(dtype, capability, tmp_path):
    signature = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "total": "i64"}
    signature |= dict.fromkeys(("channels", "inner", "groups"), "i32")
    options = {"enable_fp_fusion": False}
    check(channel_shuffle_kernel, signature, {"BLOCK": 1024}, {}, options, capability, tmp_path, stack_limit=0)
