"""What torch.compile is told that a raw op returns is what the kernels of each backend return, in whole networks."""

from collections import Counter

import pytest
import torch
from backends import backends
from layers import randomize
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from featherface import create_model
from ffkernels import set_fused


def facts(tensor):
    """Dtype, shape, and strides where they mean something."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride()) if size > 1]
    return tensor.dtype, tuple(tensor.shape), strides, tensor.device.type


class Fakes(TorchDispatchMode):
    """Compares the tensors that each raw op returns with those that its fake says."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        if func.namespace == "ffkernels":
            mode = FakeTensorMode()
            given = tree_map(lambda v: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v, args)
            with mode:
                expected = func(*given, **(kwargs or {}))
            real, fake = ([facts(v) for v in tree_leaves(o) if v is not None] for o in (outputs, expected))
            assert real == fake, func
            self.calls[func.__name__.removesuffix(".default")] += 1
        return outputs


@pytest.mark.parametrize(
    "name",
    ["featherface_v2", *(pytest.param(f"featherface_{n}", marks=pytest.mark.slow) for n in ("v2_ultra", "v1_ssh"))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("backend", backends("conv_chain"))
def test_fakes_say_what_kernels_return(backend, form, dtype, name):
    if backend.name == "cpu" and dtype is not torch.float32:
        pytest.skip("the C++ kernels have no bfloat16")
    torch.manual_seed(0)
    model = set_fused(randomize(create_model(name)), backend.policy).to(backend.device, dtype)
    x = torch.randn(2, 3, 32, 64, device=backend.device).to(dtype).contiguous(memory_format=form)
    with Fakes() as fakes:
        sum(y.float().square().mean() for y in model(x)).backward()
        with torch.no_grad():
            model.eval()(x)
    ops = {"_conv_chain", "_bifpn_node", "_multi_head_rows", "_deform_conv2d" if name.endswith("ssh") else "_cbam"}
    assert ops | {f"{op}_backward" for op in ops} <= set(fakes.calls), fakes.calls
