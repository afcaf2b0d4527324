"""The network's input from an image: against literal loops and the definition of an antialiased resize."""

import math

import numpy as np
import pytest
import torch

import ffkernels
from ffkernels import cpu, registry
from ffkernels.ops.preprocess import MEAN, preprocess
from ffkernels.reference.preprocess import preprocess as reference

needs_native = pytest.mark.skipif(cpu.unavailable() is not None, reason="the C++ kernels are not built")


@pytest.fixture(autouse=True, params=["reference", "cpu"])
def backend(request):
    if reason := registry.backend_unavailable(request.param, "cpu"):
        pytest.skip(reason)
    with ffkernels.use("1", request.param):
        yield request.param


@pytest.fixture(params=["generic", "avx2", "avx512"])
def isa(request):
    if request.param not in cpu.instruction_sets():
        pytest.skip(f"{request.param} was not built or this machine does not run it")
    before = cpu.loaded_isa()
    yield cpu.set_isa(request.param)
    cpu.set_isa(before)


def image(h, w, seed=0, dtype=torch.uint8):
    return torch.randint(0, 256, (h, w, 3), generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_double_precision_images(backend):
    x = torch.rand(2, 9, 13, 3, dtype=torch.float64) * 255
    policy = ffkernels.Policy("require" if backend == "cpu" else "1", backend)
    for size in ((9, 13), (4, 5)):
        y = preprocess(x, size, dtype=torch.float64, policy=policy)
        expected = reference(x, size, size, (0, 0), True, MEAN, torch.float64)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)


def triangle_weights(source, target):
    """(target, source) weights of a bilinear resize whose triangle is widened by the reduction."""
    scale = source / target
    support = max(scale, 1.0)
    weights = np.zeros((target, source))
    for i in range(target):
        centre = (i + 0.5) * scale
        for j in range(source):
            weights[i, j] = max(0.0, 1 - abs(j + 0.5 - centre) / support)
    return weights / weights.sum(axis=1, keepdims=True)


def test_channels_are_reversed_and_the_mean_subtracted():
    x = image(5, 7)
    out = preprocess(x)
    assert out.shape == (1, 3, 5, 7) and out.dtype == torch.float32 and out.is_contiguous()
    for channel in range(3):
        torch.testing.assert_close(out[0, channel], x[..., 2 - channel].float() - MEAN[channel], rtol=0, atol=0)
    torch.testing.assert_close(preprocess(x.flip(-1), order="bgr"), out, rtol=0, atol=0)


@pytest.mark.parametrize("source, target", [((9, 13), (4, 5)), ((4, 5), (9, 13)), ((8, 8), (3, 17)), ((1, 1), (6, 4))])
def test_resize_is_the_antialiased_triangle(source, target):
    x = image(*source)
    rows, columns = triangle_weights(source[0], target[0]), triangle_weights(source[1], target[1])
    expected = np.einsum("ih,jw,hwc->cij", rows, columns, x.numpy()[..., ::-1]) - np.reshape(MEAN, (3, 1, 1))
    out = preprocess(x, size=target, dtype=torch.float64)
    np.testing.assert_allclose(out[0].numpy(), expected, atol=1e-9)
    np.testing.assert_allclose(preprocess(x, size=target)[0].numpy(), expected, atol=1e-3)


def test_letterbox_places_the_image_on_zeros():
    x = image(6, 4)
    out = preprocess(x, size=(3, 2), canvas=(8, 9), offset=(1, 5))
    torch.testing.assert_close(out[:, :, 1:4, 5:7], preprocess(x, size=(3, 2)), rtol=0, atol=0)
    rest = out.clone()
    rest[:, :, 1:4, 5:7] = 0
    assert not rest.any()
    assert preprocess(x, offset=(2, 3)).shape == (1, 3, 8, 7)


def test_batches_and_strides_and_dtypes():
    x = torch.stack((image(6, 5, 1), image(6, 5, 2)))
    out = preprocess(x, size=(4, 4))
    for i in range(2):
        torch.testing.assert_close(out[i], preprocess(x[i], size=(4, 4))[0], rtol=0, atol=0)
    planar = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(preprocess(planar, size=(4, 4)), out)
    torch.testing.assert_close(preprocess(x.float(), size=(4, 4)), out)
    torch.testing.assert_close(preprocess(x.flip(1).flip(1)), preprocess(x), rtol=0, atol=0)
    half = preprocess(x, size=(4, 4), dtype=torch.float16)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), out, rtol=1e-3, atol=1e-2)
    assert preprocess(x[:0]).shape == (0, 3, 6, 5)


@pytest.mark.parametrize(
    "source, target",
    [
        ((1, 1), (1, 1)),
        ((37, 53), (37, 53)),
        ((37, 53), (16, 64)),
        ((2, 300), (5, 7)),
        ((480, 20), (31, 20)),
        ((9, 9), (128, 131)),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_native_kernel_is_no_worse_than_pytorch(isa, source, target, threads):
    x = image(*source)
    canvas, offset = (target[0] + 3, target[1] + 2), (2, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for order in ("rgb", "bgr"):
            arguments = (target, canvas, offset, order == "rgb", MEAN)
            exact = reference(x, *arguments, torch.float64)
            with ffkernels.use("require", "cpu"):
                result = preprocess(x, target, canvas, offset, order=order)
                double = preprocess(x, target, canvas, offset, order=order, dtype=torch.float64)
            torch_error = (reference(x, *arguments, torch.float32) - exact).abs().max()
            assert (result - exact).abs().max() <= 2 * torch_error + 4 * torch.finfo(torch.float32).eps * 255
            torch.testing.assert_close(double, exact, rtol=0, atol=1e-11)
    finally:
        torch.set_num_threads(before)


@needs_native
def test_native_op_passes_opcheck():
    arguments = (image(6, 5), [4, 4], [8, 8], [1, 2], True, list(MEAN), torch.float32, "cpu")
    torch.library.opcheck(torch.ops.ffkernels._preprocess.default, arguments)


@needs_native
def test_native_kernel_refuses_half_output():
    with ffkernels.use("require", "cpu"), pytest.raises(registry.FusedKernelRequired, match="no float16 output"):
        preprocess(image(4, 4), dtype=torch.float16)


def test_nan_stays_nan():
    x = image(4, 4, dtype=torch.float32)
    x[1, 2, 0] = math.nan
    assert preprocess(x)[0, 2, 1, 2].isnan() and preprocess(x).isnan().sum() == 1


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"image": torch.zeros(4, 4, dtype=torch.uint8)}, "expected \\(H, W, 3\\)"),
        ({"image": torch.zeros(4, 4, 4, dtype=torch.uint8)}, "expected \\(H, W, 3\\)"),
        ({"image": torch.zeros(0, 4, 3, dtype=torch.uint8)}, "expected \\(H, W, 3\\)"),
        ({"image": torch.zeros(4, 4, 3, dtype=torch.int64)}, "int64"),
        ({"order": "hsv"}, "order"),
        ({"mean": (1.0, 2.0)}, "mean"),
        ({"size": (0, 3)}, "does not fit"),
        ({"canvas": (3, 9)}, "does not fit"),
        ({"offset": (-1, 0)}, "does not fit"),
        ({"offset": (1, 0), "canvas": (4, 4)}, "does not fit"),
    ],
)
def test_rejects(kwargs, message):
    with pytest.raises(ValueError, match=message):
        preprocess(**{"image": image(4, 4), **kwargs})
