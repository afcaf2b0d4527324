"""Decoding, top-k and suppression on GPUs: against the reference, box for box, in every dtype they take."""

import math

import pytest
import torch
from backends import backend_dtypes

from ffkernels.ops.detection import decode, detect, nms
from ffkernels.reference import detection as reference

GPU = [p for p in backend_dtypes("detection") if p.values[0].name != "cpu"]


def random_boxes(n, spread, generator, dtype=torch.float32):
    centre = torch.rand(n, 2, generator=generator) * spread
    size = torch.rand(n, 2, generator=generator) * 40 + 1
    return torch.cat((centre - size / 2, centre + size / 2), dim=1).to(dtype)


def raw_predictions(n, generator):
    priors = torch.cat((torch.rand(n, 2, generator=generator), torch.rand(n, 2, generator=generator) * 0.1 + 0.02), 1)
    bbox = torch.randn(n, 4, generator=generator)
    landmarks = torch.randn(n, 10, generator=generator)
    scores = torch.rand(n, generator=generator)
    return bbox, scores, landmarks, priors


def nms_on(gpu, boxes, scores, threshold):
    return nms(boxes.to(gpu.device), scores.to(gpu.device), threshold, policy=gpu.policy).cpu()


@pytest.mark.parametrize("gpu,dtype", GPU)
@pytest.mark.parametrize("n", [1, 64, 65, 700, 1500])
def test_gpu_nms_is_greedy(gpu, dtype, n):
    generator = torch.Generator().manual_seed(n)
    boxes = random_boxes(n, 150, generator, dtype)
    scores = (torch.rand(n, generator=generator) * 50).round().div(50).to(dtype)
    boxes[::11, 2], scores[::13] = math.nan, math.nan
    scores[n // 2 :: 7], scores[n // 3 :: 9] = -0.0, 0.0
    assert torch.equal(nms_on(gpu, boxes, scores, 0.4), reference.nms(boxes, scores, 0.4))


@pytest.mark.parametrize("gpu,dtype", GPU)
def test_gpu_nms_of_degenerate_and_chained_boxes(gpu, dtype):
    left = torch.arange(200.0) * 4
    chain = torch.stack((left, torch.zeros(200), left + 10, torch.ones(200)), dim=1).to(dtype)
    odd = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 0, 10, 10], [4, 0, 4, 10], [9, 9, 1, 1], [8, 2, 3, 7]]).to(
        dtype
    )
    same = torch.tensor([[0.0, 0, 10, 10]] * 3 + [[100.0, 0, 110, 10]] * 2).to(dtype)
    for boxes, scores in ((chain, torch.linspace(1, 0.1, 200)), (odd, torch.rand(6)), (same, torch.full((5,), 0.5))):
        for threshold in (0.0, 0.4, 1.0):
            kept = nms_on(gpu, boxes, scores.to(dtype), threshold)
            assert torch.equal(kept, reference.nms(boxes, scores.to(dtype), threshold))
    assert nms_on(gpu, chain[:0], chain[:0, 0], 0.4).shape == (0,)


@pytest.mark.parametrize("gpu,dtype", GPU)
def test_gpu_decode(gpu, dtype):
    bbox, _, landmarks, priors = (t.to(dtype) for t in raw_predictions(300, torch.Generator().manual_seed(4)))
    bbox = torch.stack((bbox, -bbox))
    landmarks = torch.stack((landmarks, -landmarks))
    found = decode(*(t.to(gpu.device) for t in (bbox, landmarks, priors)), policy=gpu.policy)
    exact = reference.decode(bbox.double(), landmarks.double(), priors.double())
    expected = reference.decode(bbox, landmarks, priors)
    for result, truth, torch_result in zip(found, exact, expected):
        assert result.dtype == dtype
        allowed = 2 * (torch_result - truth).abs().max() + 4 * torch.finfo(dtype).eps * truth.abs().max()
        assert (result.cpu() - truth).abs().max() <= allowed


@pytest.mark.parametrize("gpu,dtype", GPU)
@pytest.mark.parametrize("n, top_k, keep_top_k", [(1, 5000, 750), (700, 5000, 750), (2000, 300, 20), (4500, 4400, 300)])
def test_gpu_detect_is_filter_topk_decode_nms(gpu, dtype, n, top_k, keep_top_k):
    generator = torch.Generator().manual_seed(n)
    bbox, scores, landmarks, priors = raw_predictions(n, generator)
    scores = (scores * 200).round() / 200
    bbox[:: n // 3 + 2, 0], landmarks[1 :: n // 2 + 2, 3], scores[2 :: n // 2 + 2] = math.nan, math.inf, math.nan
    bbox, scores, landmarks, priors = (t.to(dtype).to(gpu.device) for t in (bbox, scores, landmarks, priors))
    found = detect(bbox, scores, landmarks, priors, 0.05, 0.3, top_k, keep_top_k, policy=gpu.policy)
    assert all(t.dtype == dtype for t in found)
    # Suppression of the boxes that this device decodes: a last bit of exp may differ from the CPU's.
    boxes, points = (t.cpu() for t in decode(bbox, landmarks, priors, policy=gpu.policy))
    values = scores.cpu()
    order = torch.sort(values.nan_to_num(-1), descending=True, stable=True).indices
    order = order[values[order] > 0.05][:top_k]
    order = order[torch.isfinite(points[order]).all(1)]
    kept = order[reference.nms(boxes[order], values[order], 0.3)][:keep_top_k]
    for result, expected in zip(found, (boxes[kept], values[kept], points[kept])):
        assert torch.equal(result.cpu(), expected)


@pytest.mark.parametrize("gpu,dtype", GPU)
def test_gpu_detect_of_nothing(gpu, dtype):
    for n in (0, 5):
        tensors = (torch.zeros(n, 4), torch.zeros(n), torch.zeros(n, 10), torch.rand(n, 4))
        found = detect(*(t.to(gpu.device, dtype) for t in tensors), policy=gpu.policy)
        assert [tuple(t.shape) for t in found] == [(0, 4), (0,), (0, 10)]
