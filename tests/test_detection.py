"""Decoding, filtering, top-k and non-maximum suppression against slow literal versions."""

import math

import numpy as np
import pytest
import torch

import ffkernels
from ffkernels import cpu, registry
from ffkernels.ops.detection import decode, detect, nms
from ffkernels.reference import detection as reference

BACKENDS = ["reference", *(b for b in registry.implementations("detection") if b == "cpu")]

needs_native = pytest.mark.skipif(cpu.unavailable() is not None, reason="the C++ kernels are not built")


@pytest.fixture(autouse=True, params=BACKENDS)
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


def literal_nms(boxes, scores, threshold):
    """Greedy suppression as a textbook writes it, one candidate at a time, in the dtype of the boxes."""
    boxes, scores = boxes.numpy(), scores.numpy()
    threshold = boxes.dtype.type(threshold)
    zero = boxes.dtype.type(0)
    with np.errstate(all="ignore"):
        area = np.maximum(boxes[:, 2] - boxes[:, 0], zero) * np.maximum(boxes[:, 3] - boxes[:, 1], zero)
        usable = [i for i in range(len(boxes)) if np.isfinite([*boxes[i], area[i]]).all() and not math.isnan(scores[i])]
        keep = []
        for i in sorted(usable, key=lambda i: (-scores[i], i)):
            for j in keep:
                w = max(min(boxes[i, 2], boxes[j, 2]) - max(boxes[i, 0], boxes[j, 0]), zero)
                h = max(min(boxes[i, 3], boxes[j, 3]) - max(boxes[i, 1], boxes[j, 1]), zero)
                if w * h > threshold * (area[i] + area[j] - w * h):
                    break
            else:
                keep.append(i)
    return keep


def random_boxes(n, spread, generator, dtype=torch.float32):
    centre = torch.rand(n, 2, generator=generator) * spread
    size = torch.rand(n, 2, generator=generator) * 40 + 1
    return torch.cat((centre - size / 2, centre + size / 2), dim=1).to(dtype)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.4, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(
    "n, spread", [(0, 10), (1, 10), (2, 10), (63, 60), (64, 60), (65, 60), (400, 100), (400, 1000)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nms_is_greedy(n, spread, threshold, dtype):
    generator = torch.Generator().manual_seed(n + spread)
    boxes = random_boxes(n, spread, generator, dtype)
    scores = torch.rand(n, generator=generator, dtype=dtype)
    assert nms(boxes, scores, threshold).tolist() == literal_nms(boxes, scores, threshold)


def test_nms_settles_long_chains_of_suppression():
    # Box i overlaps only its neighbours, so every second one of 1,000 stays: the deepest possible dependency.
    left = torch.arange(1000.0) * 4
    boxes = torch.stack((left, torch.zeros(1000), left + 10, torch.ones(1000)), dim=1)
    scores = torch.linspace(1, 0.1, 1000)
    assert nms(boxes, scores, 0.4).tolist() == list(range(0, 1000, 2))


def test_nms_breaks_ties_by_position():
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 3 + [[100.0, 0, 110, 10]] * 2)
    assert nms(boxes, torch.full((5,), 0.5), 0.4).tolist() == [0, 3]
    generator = torch.Generator().manual_seed(0)
    boxes = random_boxes(300, 120, generator)
    scores = torch.randint(0, 3, (300,), generator=generator) / 4
    assert nms(boxes, scores, 0.3).tolist() == literal_nms(boxes, scores, 0.3)


def test_nms_allows_an_overlap_equal_to_the_threshold():
    boxes = torch.tensor([[0.0, 0, 2, 1], [0, 0, 1, 1]])
    scores = torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, 0.5).tolist() == [0, 1]
    assert nms(boxes, scores, 0.499).tolist() == [0]


def test_nms_of_degenerate_boxes():
    empty = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 0, 10, 10], [4, 0, 4, 10], [9, 9, 1, 1], [8, 2, 3, 7]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    assert nms(empty, scores, 0.0).tolist() == literal_nms(empty, scores, 0.0) == [0, 1, 2, 3, 4, 5]


def test_nms_drops_what_is_not_finite():
    inf, nan = math.inf, math.nan
    boxes = torch.tensor(
        [
            [0, 0, 10, 10],
            [nan, 0, 10, 10],
            [0, 0, inf, 10],
            [-inf, 0, 10, 10],
            [20, 0, 30, 10],
            [-3e38, -3e38, 3e38, 3e38],
        ]
    )
    scores = torch.tensor([0.5, 0.9, 0.9, 0.9, nan, 0.9])
    assert nms(boxes, scores, 0.4).tolist() == [0]
    assert nms(boxes[:1], torch.tensor([inf]), 0.4).tolist() == [0]


def test_nms_of_huge_coordinates():
    boxes = torch.tensor([[0.0, 0, 1e15, 1e15], [1e14, 0, 1e15, 1e15], [2e15, 0, 3e15, 1e15]])
    assert nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.4).tolist() == [1, 2]


def test_nms_of_many_equals_the_literal_one():
    generator = torch.Generator().manual_seed(3)
    boxes = random_boxes(1500, 300, generator)
    scores = torch.rand(1500, generator=generator)
    assert nms(boxes, scores, 0.4).tolist() == literal_nms(boxes, scores, 0.4)


@pytest.mark.parametrize(
    "boxes, scores, threshold, message",
    [
        (torch.zeros(3, 5), torch.zeros(3), 0.4, "boxes"),
        (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3), 0.4, "floating point"),
        (torch.zeros(3, 4), torch.zeros(4), 0.4, "scores"),
        (torch.zeros(3, 4), torch.zeros(3), 1.5, "iou_threshold"),
        (torch.zeros(3, 4), torch.zeros(3), math.nan, "iou_threshold"),
    ],
)
def test_nms_rejects(boxes, scores, threshold, message):
    with pytest.raises(ValueError, match=message):
        nms(boxes, scores, threshold)


def test_decode_by_hand():
    priors = torch.tensor([[0.5, 0.25, 0.2, 0.1]], dtype=torch.float64)
    bbox = torch.tensor([[1.0, -2.0, math.log(2) / 0.2, 0.0]], dtype=torch.float64)
    landmarks = torch.tensor([[0.0, 0, 1, 1, -1, 0, 0, 10, 5, -5]], dtype=torch.float64)
    boxes, points = decode(bbox, landmarks, priors)
    # centre (0.5 + 0.02, 0.25 - 0.02), size (0.4, 0.1)
    torch.testing.assert_close(boxes, torch.tensor([[0.32, 0.18, 0.72, 0.28]], dtype=torch.float64))
    expected = torch.tensor([[0.5, 0.25, 0.52, 0.26, 0.48, 0.25, 0.5, 0.35, 0.6, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(points, expected)


def test_decode_of_nothing_predicted_is_the_anchors_and_batches_agree():
    priors = torch.rand(7, 4) + 0.1
    boxes, points = decode(torch.zeros(2, 7, 4), torch.zeros(2, 7, 10), priors)
    expected = torch.cat((priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2), dim=1)
    torch.testing.assert_close(boxes, expected.expand(2, 7, 4))
    torch.testing.assert_close(points, priors[:, :2].repeat(1, 5).expand(2, 7, 10))
    bbox, landmarks = torch.randn(3, 7, 4), torch.randn(3, 7, 10)
    boxes, points = decode(bbox, landmarks, priors)
    for i in range(3):
        torch.testing.assert_close((boxes[i], points[i]), decode(bbox[i], landmarks[i], priors))


def test_decode_has_gradients():
    priors = torch.rand(4, 4, dtype=torch.float64) + 0.1
    bbox = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    landmarks = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b, p: decode(b, p, priors), (bbox, landmarks))


@pytest.mark.parametrize(
    "shapes, message",
    [
        (((5, 3), (5, 10), (5, 4)), "bbox"),
        (((5, 4), (4, 10), (5, 4)), "landmarks"),
        (((5, 4), (5, 9), (5, 4)), "landmarks"),
        (((5, 4), (5, 10), (6, 4)), "priors"),
    ],
)
def test_decode_rejects(shapes, message):
    with pytest.raises(ValueError, match=message):
        decode(*(torch.zeros(s) for s in shapes))


def raw_predictions(n, generator):
    priors = torch.cat((torch.rand(n, 2, generator=generator), torch.rand(n, 2, generator=generator) * 0.1 + 0.02), 1)
    bbox = torch.randn(n, 4, generator=generator)
    landmarks = torch.randn(n, 10, generator=generator)
    scores = torch.rand(n, generator=generator)
    return bbox, scores, landmarks, priors


@pytest.mark.parametrize("top_k, keep_top_k", [(5000, 750), (100, 750), (5000, 7), (1, 1)])
def test_detect_is_filter_topk_decode_nms(top_k, keep_top_k):
    bbox, scores, landmarks, priors = raw_predictions(700, torch.Generator().manual_seed(1))
    scores = (scores * 20).round() / 20
    all_boxes, all_points = decode(bbox, landmarks, priors)
    candidates = sorted((i for i in range(700) if scores[i] > 0.5), key=lambda i: (-scores[i], i))[:top_k]
    kept = [candidates[i] for i in literal_nms(all_boxes[candidates], scores[candidates], 0.3)][:keep_top_k]
    boxes, kept_scores, points = detect(bbox, scores, landmarks, priors, 0.5, 0.3, top_k, keep_top_k)
    torch.testing.assert_close(boxes, all_boxes[kept])
    torch.testing.assert_close(kept_scores, scores[kept], rtol=0, atol=0)
    torch.testing.assert_close(points, all_points[kept])


def test_detect_drops_nan_scores_and_boxes_that_are_not_finite():
    bbox, scores, landmarks, priors = raw_predictions(6, torch.Generator().manual_seed(2))
    scores[:] = torch.tensor([0.9, math.nan, 0.9, 0.9, 0.9, 0.3])
    bbox[2, 2], bbox[3, 0], landmarks[4, 7] = 1e4, math.nan, math.nan
    boxes, kept, points = detect(bbox, scores, landmarks, priors, 0.5, 1.0)
    assert kept.tolist() == [pytest.approx(0.9)]
    torch.testing.assert_close(boxes[0], decode(bbox[:1], landmarks[:1], priors[:1])[0][0])
    assert points.shape == (1, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_kernels_give_the_reference(isa, dtype):
    generator = torch.Generator().manual_seed(5)
    for n in (1, 17, 2000):
        bbox, scores, landmarks, priors = (t.to(dtype) for t in raw_predictions(n, generator))
        cls = torch.stack((1 - scores, scores), dim=1)
        cls[::7, 1] = cls[0, 1]
        bbox[:: n // 3 + 1, 0] = math.nan
        expected_boxes, expected_points = reference.decode(bbox, landmarks, priors)
        exact = torch.finfo(dtype).eps * 4
        with ffkernels.use("require", "cpu"):
            boxes, points = decode(bbox, landmarks, priors)
            torch.testing.assert_close(boxes, expected_boxes, rtol=exact, atol=exact, equal_nan=True)
            torch.testing.assert_close(points, expected_points, rtol=exact, atol=exact)
            assert torch.equal(nms(boxes, cls[:, 1], 0.3), reference.nms(boxes, cls[:, 1], 0.3))
            for limits in ((5000, 750), (300, 20)):
                found = detect(bbox, cls[:, 1], landmarks, priors, 0.1, 0.3, *limits)
                expected = reference.detect(bbox, cls[:, 1], landmarks, priors, 0.1, 0.3, *limits)
                torch.testing.assert_close(found, expected, rtol=exact, atol=exact)
            again = detect(bbox, cls[:, 1], landmarks, priors, 0.1, 0.3, *limits)
            assert all(torch.equal(a, b) for a, b in zip(found, again))


@needs_native
def test_native_ops_pass_opcheck():
    bbox, scores, landmarks, priors = raw_predictions(9, torch.Generator().manual_seed(0))
    ops = torch.ops.ffkernels
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops._decode.default, (bbox, landmarks, priors, [0.1, 0.2], "cpu"), test_utils=tests)
    torch.library.opcheck(ops._nms.default, (bbox, scores, 0.4, "cpu"), test_utils=tests)
    settings = (0.5, 0.4, 5000, 750, [0.1, 0.2], "cpu")
    # Rows beyond the count are not written, so two runs need not agree on them.
    torch.library.opcheck(ops._detect.default, (bbox, scores, landmarks, priors, *settings), test_utils=tests[1:])


@needs_native
def test_what_the_native_kernels_refuse():
    bbox, scores, landmarks, priors = raw_predictions(9, torch.Generator().manual_seed(0))
    with ffkernels.use("require", "cpu"):
        with pytest.raises(registry.FusedKernelRequired, match="different dtypes"):
            detect(bbox.double(), scores, landmarks, priors)
        with pytest.raises(registry.FusedKernelRequired, match="no backward"):
            decode(bbox.requires_grad_(), landmarks, priors)


def test_detect_of_nothing():
    for n in (0, 5):
        boxes, scores, points = detect(torch.zeros(n, 4), torch.zeros(n), torch.zeros(n, 10), torch.rand(n, 4))
        assert boxes.shape == (0, 4) and scores.shape == (0,) and points.shape == (0, 10)


def test_detect_rejects():
    bbox, scores, landmarks, priors = raw_predictions(4, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="of one image"):
        detect(bbox[None], scores[None], landmarks[None], priors)
    with pytest.raises(ValueError, match="of one image"):
        detect(bbox, scores, landmarks, priors[:3])
    with pytest.raises(ValueError, match="nms_threshold"):
        detect(bbox, scores, landmarks, priors, nms_threshold=-1)
    with pytest.raises(ValueError, match="top_k"):
        detect(bbox, scores, landmarks, priors, top_k=0)


@pytest.mark.parametrize("mode,backend", [("1", "reference"), ("require", "cpu")])
def test_variances_are_used(mode, backend):
    if reason := registry.backend_unavailable(backend, "cpu"):
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    priors = torch.rand(50, 4, generator=generator) * 0.1 + 0.2
    bbox, landmarks = (torch.randn(50, k, generator=generator) for k in (4, 10))
    scores = torch.rand(50, generator=generator)
    with ffkernels.use(mode, backend):
        boxes, points = decode(bbox, landmarks, priors, (0.3, 0.5))
        found, _, found_points = detect(bbox, scores, landmarks, priors, 0.0, 1.0, variances=(0.3, 0.5))
    centre = priors[:, :2] + bbox[:, :2] * 0.3 * priors[:, 2:]
    half = priors[:, 2:] * (bbox[:, 2:] * 0.5).exp() / 2
    torch.testing.assert_close(boxes, torch.cat([centre - half, centre + half], 1))
    places = priors[:, None, :2] + landmarks.view(50, 5, 2) * 0.3 * priors[:, None, 2:]
    torch.testing.assert_close(points, places.flatten(1))
    order = scores.argsort(descending=True)
    torch.testing.assert_close(found, boxes[order])
    torch.testing.assert_close(found_points, points[order])
    for wrong in ((0.1,), (0.1, 0.2, 0.3)):
        with pytest.raises(ValueError, match="expected two"):
            decode(bbox, landmarks, priors, wrong)
        with pytest.raises(ValueError, match="expected two"):
            detect(bbox, scores, landmarks, priors, variances=wrong)
