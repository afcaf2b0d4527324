"""Preprocessing on GPUs: against the reference, in every dtype they take."""

import pytest
import torch
from backends import backends

from ffkernels import FusedKernelRequired
from ffkernels.ops.preprocess import MEAN, preprocess
from ffkernels.reference.preprocess import preprocess as reference


def image(h, w, seed=0, dtype=torch.uint8):
    return torch.randint(0, 256, (h, w, 3), generator=torch.Generator().manual_seed(seed)).to(dtype)


GPUS = [p for p in backends("preprocess") if p.values[0].name != "cpu"]


@pytest.mark.parametrize("gpu", GPUS)
def test_what_the_kernel_cannot_do_is_refused(gpu):
    x = image(2, 2).to(gpu.device)
    with pytest.raises(FusedKernelRequired, match="no int32 output"):
        preprocess(x, dtype=torch.int32, policy=gpu.policy)
    with pytest.raises(FusedKernelRequired, match="more than 65,535 images"):
        preprocess(x.expand(65536, 2, 2, 3), policy=gpu.policy)
    with pytest.raises(FusedKernelRequired, match="524,280 rows"):
        preprocess(x, canvas=(524281, 2), policy=gpu.policy)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    "source, size, canvas, offset",
    [
        ((9, 13), (4, 5), (7, 9), (2, 3)),
        ((4, 5), (19, 33), (19, 33), (0, 0)),
        ((31, 37), (31, 37), (33, 64), (1, 27)),
        ((1, 1), (6, 4), (6, 4), (0, 0)),
        ((100, 3), (3, 40), (8, 40), (0, 0)),
    ],
)
def test_gpu_preprocess(gpu, source, size, canvas, offset, pixels, dtype):
    x = torch.stack([image(*source, seed, pixels) for seed in range(2)])
    wide = torch.zeros(2, source[0], source[1] + 3, 4, dtype=pixels)
    wide[:, :, : source[1], :3] = x
    exact = reference(x.double(), size, canvas, offset, True, MEAN, torch.float64)
    rounded = reference(x, size, canvas, offset, True, MEAN, dtype)
    allowed = 2 * (rounded - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
    for view in (x, wide[:, :, : source[1], :3]):
        out = preprocess(view.to(gpu.device), size, canvas, offset, dtype=dtype, policy=gpu.policy).cpu()
        assert out.shape == (2, 3, *canvas) and out.dtype == dtype and out.is_contiguous()
        assert (out - exact).abs().max() <= allowed
    single = preprocess(x[1].flip(-1).to(gpu.device), size, canvas, offset, order="bgr", dtype=dtype, policy=gpu.policy)
    assert torch.equal(single[0].cpu(), out[1])
