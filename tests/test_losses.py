"""Assignment and losses against literal versions with loops."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from featherface.losses import (
    Assignment,
    Distillation,
    FeatureAdapters,
    Targets,
    Task,
    assign,
    atss,
    box_loss,
    corners,
    decode_boxes,
    distillation_loss,
    encode_boxes,
    encode_landmarks,
    multibox,
    ohem_cross_entropy,
    overlap,
    pairwise_overlap,
    quality_focal,
    simota,
    smooth_l1,
    task_loss,
)
from featherface.losses.distillation import foreground
from featherface.models.anchors import STEPS, anchors, level_sizes
from ffkernels.reference.detection import decode

SIZE = (96, 96)
PRIORS = anchors(*SIZE)


def random_boxes(rng, count, low=4, high=90):
    side = np.exp(rng.uniform(np.log(low), np.log(high), (count, 2))) / SIZE[0]
    centre = rng.uniform(0, 1, (count, 2))
    return np.clip(np.concatenate([centre - side / 2, centre + side / 2], 1), 0, 1).astype(np.float32)


def random_targets(seed, counts=(3, 0, 7, 1), ignored=(1, 2, 0, 0), labelled=(True, True, True, False)):
    rng = np.random.default_rng(seed)
    boxes = [random_boxes(rng, n) for n in counts]
    landmarks = [rng.uniform(0, 1, (n, 5, 2)).astype(np.float32) for n in counts]
    for points in landmarks:
        points[::2] = np.nan
    return Targets.build(boxes, landmarks, [random_boxes(rng, n, 20) for n in ignored], labelled)


def literal_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def image_faces(targets, image):
    return [f for f in range(len(targets.boxes)) if int(targets.image[f]) == image]


def literal_negative(targets, face):
    boxes = corners(PRIORS).tolist()
    negative = torch.zeros(face.shape, dtype=torch.bool)
    regions = list(zip(targets.ignored_image.tolist(), targets.ignored.tolist()))
    for image in range(face.shape[0]):
        for n, box in enumerate(boxes):
            hidden = False
            for where, region in regions:
                if where == image:
                    width = max(min(box[2], region[2]) - max(box[0], region[0]), 0)
                    height = max(min(box[3], region[3]) - max(box[1], region[1]), 0)
                    hidden |= width * height >= 0.5 * (box[2] - box[0]) * (box[3] - box[1])
            negative[image, n] = bool(targets.labelled[image]) and face[image, n] < 0 and not hidden
    return negative


def test_targets_flatten_the_images_in_order():
    targets = random_targets(0)
    assert targets.image.tolist() == [0] * 3 + [2] * 7 + [3]
    assert targets.ignored_image.tolist() == [0, 1, 1]
    assert targets.has_landmarks.tolist() == [False, True, False, *[False, True] * 3, False, False]
    assert (targets.landmarks[~targets.has_landmarks] == 0).all()


def test_pairwise_overlap_is_the_literal_one():
    rng = np.random.default_rng(1)
    a, b = torch.from_numpy(random_boxes(rng, 6)), torch.from_numpy(random_boxes(rng, 9))
    expected = [[literal_iou(x, y) for y in b.tolist()] for x in a.tolist()]
    torch.testing.assert_close(pairwise_overlap(a, b), torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_encoding_is_the_inverse_of_the_detectors_decoding():
    boxes = corners(PRIORS) + 0.01 * torch.rand(len(PRIORS), 4)
    landmarks = torch.rand(len(PRIORS), 10)
    decoded, points = decode(encode_boxes(boxes, PRIORS), encode_landmarks(landmarks, PRIORS), PRIORS)
    torch.testing.assert_close(decoded, boxes, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(points, landmarks, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(decode_boxes(encode_boxes(boxes, PRIORS), PRIORS), boxes, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_multibox_is_the_literal_matching(seed):
    targets = random_targets(seed)
    iou = pairwise_overlap(targets.boxes, corners(PRIORS))
    values = iou.tolist()
    expected = torch.full((len(targets.labelled), len(PRIORS)), -1)
    for image in range(len(targets.labelled)):
        faces = image_faces(targets, image)
        for n in range(len(PRIORS)):
            best = max(faces, key=lambda f: (values[f][n], -f), default=-1)
            if best >= 0 and values[best][n] >= np.float32(0.35):
                expected[image, n] = best
        for f in faces:
            n = int(iou[f].argmax())
            if iou[f, n] >= 0.2:
                expected[image, n] = f
    result = multibox(targets, PRIORS)
    assert torch.equal(result.face, expected)
    assert torch.equal(result.negative, literal_negative(targets, expected))


@pytest.mark.parametrize("seed", range(4))
def test_atss_is_the_literal_selection(seed):
    targets = random_targets(seed)
    boxes, centres = corners(PRIORS), PRIORS[:, :2] * SIZE[0]
    levels, start = [], 0
    for rows, columns in level_sizes(*SIZE):
        levels.append(range(start, start + 2 * rows * columns))
        start += 2 * rows * columns
    expected = torch.full((len(targets.labelled), len(PRIORS)), -1)
    for image in range(len(targets.labelled)):
        faces = image_faces(targets, image)
        claims, candidates = {}, {}
        for f in faces:
            face = targets.boxes[f]
            middle = (face[:2] + face[2:]) / 2 * SIZE[0]
            chosen = []
            for level in levels:
                distance = (middle - centres[list(level)]).square().sum(1)
                chosen += [level[i] for i in distance.topk(min(9, len(level)), largest=False).indices.tolist()]
            ious = {n: literal_iou(face.tolist(), boxes[n].tolist()) for n in chosen}
            candidates[f] = ious
            values = torch.tensor(list(ious.values()))
            threshold = float(values.mean() + values.std())
            for n, value in ious.items():
                x, y = PRIORS[n, :2].tolist()
                inside = min(x - face[0], y - face[1], face[2] - x, face[3] - y) > 1e-7
                if inside and value >= threshold and value > 0:
                    claims.setdefault(n, []).append((value, -f))
        for n, who in claims.items():
            expected[image, n] = -max(who)[1]
        rescue = {}
        for f in faces:
            if not any(expected[image, n] == f for n in candidates[f]):
                free = {n: v for n, v in candidates[f].items() if v > 0 and expected[image, n] < 0}
                if free:
                    n = max(free, key=lambda n: free[n])
                    rescue.setdefault(n, []).append((free[n], -f))
        for n, who in rescue.items():
            expected[image, n] = -max(who)[1]
    result = atss(targets, PRIORS, SIZE)
    assert torch.equal(result.face, expected)
    assert torch.equal(result.negative, literal_negative(targets, expected))


@pytest.mark.parametrize("seed", range(3))
def test_simota_is_the_literal_assignment(seed):
    targets = random_targets(seed)
    generator = torch.Generator().manual_seed(seed)
    bbox = torch.randn(4, len(PRIORS), 4, generator=generator)
    score = torch.randn(4, len(PRIORS), generator=generator)
    steps = [s for s, (r, c) in zip(STEPS, level_sizes(*SIZE)) for _ in range(2 * r * c)]
    predicted = decode_boxes(bbox, PRIORS)
    expected = torch.full((4, len(PRIORS)), -1)
    for image in range(4):
        claims = {}
        for f in image_faces(targets, image):
            face = targets.boxes[f]
            middle = (face[:2] + face[2:]) / 2
            away = ((PRIORS[:, :2] - middle).abs() * SIZE[0]).amax(1)
            chosen = [n for n in range(len(PRIORS)) if away[n] < 2.5 * steps[n]]
            assert chosen
            ious = {n: literal_iou(face.tolist(), predicted[image, n].tolist()) for n in chosen}
            k = max(1, int(sum(sorted(ious.values(), reverse=True)[:10])))
            cost = {n: math.log1p(math.exp(-float(score[image, n]))) - 3 * math.log(ious[n] + 1e-8) for n in chosen}
            for n in sorted(chosen, key=lambda n: cost[n])[:k]:
                claims.setdefault(n, []).append((cost[n], f))
        for n, who in claims.items():
            expected[image, n] = min(who)[1]
    assert torch.equal(simota(targets, PRIORS, SIZE, bbox, score).face, expected)


@pytest.mark.parametrize("assigner", ["multibox", "atss", "simota"])
def test_assigners_take_batches_without_faces_and_give_every_face_an_anchor(assigner):
    config = Task(assigner=assigner)
    bbox, cls = torch.zeros(2, len(PRIORS), 4), torch.zeros(2, len(PRIORS), 2)
    nothing = Targets.build([np.empty((0, 4)), np.empty((0, 4))])
    assert not assign(config, bbox, cls, nothing, PRIORS, SIZE).positive.any()
    # Eight pixels wide, on a corner of four cells and in the middle of one.
    tiny = Targets.build([np.array([[28, 28, 36, 36]]) / 96, np.array([[40, 40, 48, 48]]) / 96])
    result = assign(config, bbox, cls, tiny, PRIORS, SIZE)
    assert result.positive.any(1).tolist() == [True, True] or assigner == "multibox"


def test_box_losses_are_their_formulas():
    rng = np.random.default_rng(3)
    a, b = torch.from_numpy(random_boxes(rng, 50)).double(), torch.from_numpy(random_boxes(rng, 50)).double()
    for i in range(50):
        (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a[i].tolist(), b[i].tolist()
        iou = literal_iou(a[i].tolist(), b[i].tolist())
        width, height = max(ax2, bx2) - min(ax1, bx1), max(ay2, by2) - min(ay1, by1)
        shift = ((ax1 + ax2 - bx1 - bx2) / 2) ** 2 + ((ay1 + ay2 - by1 - by2) / 2) ** 2
        diou = 1 - iou + shift / (width**2 + height**2)
        stretch = ((ax2 - ax1 - bx2 + bx1) / width) ** 2 + ((ay2 - ay1 - by2 + by1) / height) ** 2
        for kind, value in (("iou", 1 - iou), ("diou", diou), ("eiou", diou + stretch)):
            assert float(box_loss(a[i], b[i], kind)) == pytest.approx(value, abs=1e-9)
    with pytest.raises(ValueError, match="giou"):
        box_loss(a, b, "giou")
    assert torch.equal(overlap(a, a), torch.ones(50, dtype=torch.float64))
    difference = torch.tensor([[0.5, -3.0]])
    assert float(smooth_l1(difference, torch.zeros(1, 2))) == 0.125 + 2.5


def test_ohem_takes_the_hardest_negatives_of_each_image():
    generator = torch.Generator().manual_seed(0)
    cls = torch.randn(3, 40, 2, generator=generator)
    positive = torch.rand(3, 40, generator=generator) < 0.06
    positive[2] = False
    negative = ~positive & (torch.rand(3, 40, generator=generator) < 0.8)
    total = 0.0
    for image in range(3):
        losses = []
        for n in range(40):
            log_p = torch.log_softmax(cls[image, n], 0)
            if positive[image, n]:
                total -= float(log_p[1])
            elif negative[image, n]:
                losses.append(-float(log_p[0]))
        total += sum(sorted(losses, reverse=True)[: 7 * int(positive[image].sum())])
    assert float(ohem_cross_entropy(cls, positive, negative)) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_quality_focal_is_its_formula(beta):
    for logit, quality in ((0.3, 0.0), (-2.0, 0.7), (4.0, 1.0)):
        p = 1 / (1 + math.exp(-logit))
        expected = -(abs(quality - p) ** beta) * (quality * math.log(p) + (1 - quality) * math.log(1 - p))
        result = quality_focal(torch.tensor(logit), torch.tensor(quality), beta)
        assert float(result) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_quality_focal_has_a_finite_gradient_where_prediction_and_quality_agree(beta):
    logit = torch.tensor([0.0, -1e4, 1e4], requires_grad=True)
    quality_focal(logit, torch.tensor([0.5, 0.0, 1.0]), beta).sum().backward()
    assert torch.equal(logit.grad, torch.zeros(3))


@pytest.mark.parametrize("section", [Task, Distillation])
def test_exponents_without_a_finite_gradient_are_refused(section):
    for beta in (-1.0, 0.5, float("nan")):
        with pytest.raises(ValueError, match="focal_beta"):
            section(focal_beta=beta)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_teachers_focal_term_has_its_exponent(beta):
    student, teacher = outputs(0), outputs(1)
    config = Distillation(focal_beta=beta, class_weight=1.5, box_weight=0, landmark_weight=0, feature_weight=0)
    result = distillation_loss(config, student, teacher, PRIORS, torch.tensor([True, True]))
    q, p = (torch.softmax(out[1].double(), 2)[..., 1] for out in (teacher, student))
    focal = (q - p).abs() ** beta * -(q * p.log() + (1 - q) * (1 - p).log())
    assert float(result["teacher_class"]) == pytest.approx(float(1.5 * focal.sum() / q.sum()), rel=1e-4)


def literal_task_loss(config, bbox, cls, landmarks, targets, assignment):
    box = classification = landmark = 0.0
    count = known = 0
    negatives = []
    anchors = Counter(assignment.face[assignment.face >= 0].tolist())
    weights = {face: number**-config.face_balance for face, number in anchors.items()}
    mean = sum(weights[face] * anchors[face] for face in anchors) / max(sum(anchors.values()), 1)
    for image in range(bbox.shape[0]):
        easy = []
        for n in range(bbox.shape[1]):
            face, logit = int(assignment.face[image, n]), cls[image, n]
            quality, weight = 0.0, 1.0
            if face >= 0:
                count += 1
                weight = weights[face] / mean
                target, prior = targets.boxes[face], PRIORS[n]
                predicted = decode_boxes(bbox[image, n], prior)
                quality = float(overlap(predicted, target))
                if config.box == "smooth_l1":
                    box += weight * float(smooth_l1(bbox[image, n], encode_boxes(target, prior)))
                else:
                    box += weight * float(box_loss(predicted, target, config.box))
                if targets.has_landmarks[face]:
                    known += 1
                    wanted = encode_landmarks(targets.landmarks[face], prior)
                    landmark += float(smooth_l1(landmarks[image, n], wanted))
            log_p = torch.log_softmax(logit, 0)
            if config.classification == "quality_focal":
                if face >= 0 or assignment.negative[image, n]:
                    classification += weight * float(quality_focal(logit[1] - logit[0], torch.tensor(quality)))
            elif face >= 0:
                classification -= weight * float(log_p[1])
            elif assignment.negative[image, n]:
                easy.append(-float(log_p[0]))
        negatives.append(sum(sorted(easy, reverse=True)[: 7 * int((assignment.face[image] >= 0).sum())]))
    classification += sum(negatives)
    return {
        "class": config.class_weight * classification / count,
        "box": config.box_weight * box / count,
        "landmark": config.landmark_weight * landmark / max(known, 1),
    }


@pytest.fixture(params=["rows that learn", "all rows"])
def rows(request, monkeypatch):
    """Losses of the rows that learn, as on a CPU, and of all of them with weights of zero, as on a GPU."""
    if request.param == "all rows":
        for module in ("task", "distillation"):
            monkeypatch.setattr(f"featherface.losses.{module}.rows_of", lambda mask: slice(None))


@pytest.mark.parametrize(
    "config",
    [
        Task(),
        Task(box="smooth_l1", landmark_weight=1.0),
        Task(assigner="atss", classification="quality_focal"),
        Task(assigner="simota", classification="quality_focal", box="eiou"),
        Task(face_balance=1.0),
        Task(assigner="atss", classification="quality_focal", face_balance=0.5),
    ],
    ids=["default", "seed", "atss", "simota", "faces alike", "faces nearly alike"],
)
def test_task_loss_is_the_literal_one(config, rows):
    targets = random_targets(5)
    generator = torch.Generator().manual_seed(1)
    bbox, cls, landmarks = (torch.randn(4, len(PRIORS), k, generator=generator) for k in (4, 2, 10))
    assignment = assign(config, bbox, cls, targets, PRIORS, SIZE)
    result = task_loss(config, bbox, cls, landmarks, targets, PRIORS, assignment)
    expected = literal_task_loss(config, bbox, cls, landmarks, targets, assignment)
    assert {k: float(v) for k, v in result.items()} == pytest.approx(expected, rel=1e-4)


def test_losses_stay_finite_where_nothing_is_learnt(rows):
    targets = Targets.build([np.empty((0, 4))])
    bbox = torch.full((1, len(PRIORS), 4), 1e4, requires_grad=True)
    cls = torch.zeros(1, len(PRIORS), 2, requires_grad=True)
    landmarks = torch.full((1, len(PRIORS), 10), torch.inf, requires_grad=True)
    assignment = assign(Task(), bbox, cls, targets, PRIORS, SIZE)
    teacher = (torch.full_like(bbox, 1e4), torch.tensor([9.0, -9.0]).expand(1, len(PRIORS), 2), landmarks.detach())
    loss = sum(task_loss(Task(), bbox, cls, landmarks, targets, PRIORS, assignment).values())
    config = Distillation(feature_weight=0.0)
    loss = loss + sum(distillation_loss(config, (bbox, cls, landmarks), teacher, PRIORS, targets.labelled).values())
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(x.grad).all() for x in (bbox, cls, landmarks))


def test_unlabelled_images_have_no_negatives():
    targets = random_targets(2, labelled=(False,) * 4)
    result = multibox(targets, PRIORS)
    assert not result.negative.any()


def outputs(seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, len(PRIORS), k, generator=generator) for k in (4, 2, 10))


def test_distillation_terms_are_zero_for_the_teacher_itself():
    teacher = outputs(0)
    maps = [torch.rand(2, 8, *size) for size in level_sizes(*SIZE)]
    for kind in ("kl", "masked", "focal"):
        config = Distillation(class_kind=kind)
        terms = distillation_loss(config, teacher, teacher, PRIORS, torch.tensor([True, False]), maps, maps)
        assert set(terms) == {"teacher_class", "teacher_box", "teacher_landmark", "teacher_feature"}
        assert all(abs(float(value)) < 1e-6 for value in terms.values())


def test_seed_distillation_is_the_literal_divergence():
    student, teacher = outputs(0), outputs(1)
    config = Distillation(class_kind="kl", class_weight=0.7, box_weight=0, landmark_weight=0, feature_weight=0)
    result = distillation_loss(config, student, teacher, PRIORS, torch.tensor([True, True]))
    total = 0.0
    for s, t in zip(student[1].reshape(-1, 2).tolist(), teacher[1].reshape(-1, 2).tolist()):
        p = [math.exp(v / 4) / sum(math.exp(w / 4) for w in t) for v in t]
        q = [math.exp(v / 4) / sum(math.exp(w / 4) for w in s) for v in s]
        total += sum(a * math.log(a / b) for a, b in zip(p, q))
    assert set(result) == {"teacher_class"}
    assert float(result["teacher_class"]) == pytest.approx(0.7 * 16 * total / (2 * len(PRIORS)), rel=1e-4)


def test_teachers_positives_are_distilled_literally(rows):
    student, teacher = outputs(0), outputs(1)
    config = Distillation(
        class_kind="masked", class_weight=3.0, landmark_weight=0.1, feature_weight=0.0, unlabelled_weight=0.5
    )
    result = distillation_loss(config, student, teacher, PRIORS, torch.tensor([True, False]))
    box = landmark = classification = strength = mass = 0.0
    for image, weight in ((0, 1.0), (1, 0.5)):
        for n, prior in enumerate(PRIORS):
            p, q = (float(torch.softmax(out[1][image, n], 0)[1]) for out in (student, teacher))
            mass += weight * q
            if q > 0.1 or p > 0.1:
                classification += weight * (p - q) ** 2
            if q >= 0.5:
                strength += weight * q
                own, theirs = (decode_boxes(out[0][image, n], prior) for out in (student, teacher))
                box += weight * q * float(box_loss(own, theirs, "diou"))
                landmark += weight * q * float(smooth_l1(student[2][image, n], teacher[2][image, n]))
    assert float(result["teacher_class"]) == pytest.approx(3 * classification / mass, rel=1e-4)
    assert float(result["teacher_box"]) == pytest.approx(box / strength, rel=1e-4)
    assert float(result["teacher_landmark"]) == pytest.approx(0.1 * landmark / strength, rel=1e-4)


def test_processes_share_what_they_divide_by(rows):
    """Twice the count, as where another process has three times as many positives, is half of each term."""
    targets = random_targets(5)
    student, teacher = outputs(0, 4), outputs(1, 4)
    assignment = assign(Task(), *student[:2], targets, PRIORS, SIZE)
    configs = [Distillation(class_kind=kind, feature_weight=0.0) for kind in ("focal", "masked")]

    def terms(**options):
        yield task_loss(Task(), *student, targets, PRIORS, assignment, **options)
        for config in configs:
            yield distillation_loss(config, student, teacher, PRIORS, targets.labelled, **options)

    for own, shared in zip(terms(), terms(mean_count=lambda count: 2 * count)):
        assert len(own) == 3 and min(map(float, own.values())) > 0
        assert {k: 2 * float(v) for k, v in shared.items()} == pytest.approx({k: float(v) for k, v in own.items()})


def test_feature_masks_follow_the_anchors():
    probability = torch.zeros(1, len(PRIORS))
    # The second anchor of row 2, column 4 on P4, which begins after 12 x 12 cells.
    probability[0, 2 * 144 + 2 * (2 * 6 + 4) + 1] = 0.9
    masks = foreground(probability, level_sizes(*SIZE))
    assert [mask.shape for mask in masks] == [(1, 1, 12, 12), (1, 1, 6, 6), (1, 1, 3, 3)]
    assert float(masks[0].sum()) == 0 == float(masks[2].sum())
    expected = torch.zeros(6, 6)
    expected[1:4, 3:6] = 0.9
    assert torch.equal(masks[1][0, 0], expected)


def test_feature_adapters_change_channels_only():
    maps = [torch.rand(2, 8, 4, 4), torch.rand(2, 8, 2, 2)]
    assert [x.shape for x in FeatureAdapters(8, 14, 2)(maps)] == [(2, 14, 4, 4), (2, 14, 2, 2)]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="hungarian"):
        Task(assigner="hungarian")
    with pytest.raises(ValueError, match="class_kind"):
        Distillation(class_kind="l3")


def test_half_precision_predictions_are_scored_in_float32():
    targets = random_targets(5)
    bbox, cls, landmarks = (x.half() for x in outputs(0, 4))
    assignment = assign(Task(), bbox, cls, targets, PRIORS, SIZE)
    assert isinstance(assignment, Assignment)
    terms = task_loss(Task(), bbox, cls, landmarks, targets, PRIORS, assignment)
    assert all(value.dtype == torch.float32 for value in terms.values())


def test_the_feature_term_is_the_difference_where_faces_are_over_the_teachers_energy():
    student, teacher = outputs(0), outputs(1)
    sizes = level_sizes(*SIZE)
    own, theirs = (
        [torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed)) for size in sizes] for seed in (0, 1)
    )
    for features in own:
        features.requires_grad_()
    config = Distillation(class_weight=0, box_weight=0, landmark_weight=0, feature_weight=0.7)
    labelled = torch.tensor([True, True])
    (result,) = distillation_loss(config, student, teacher, PRIORS, labelled, own, theirs).values()
    masks = foreground(torch.softmax(teacher[1], -1)[..., 1], sizes)
    levels = zip(masks, own, theirs, strict=True)
    expected = 0.7 / 3 * sum((m * (a - b) ** 2).sum() / (m * b**2).sum() for m, a, b in levels)
    torch.testing.assert_close(result, expected)
    for gradient, wanted in zip(torch.autograd.grad(result, own), torch.autograd.grad(expected, own), strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_each_level_has_an_adapter_of_its_own():
    adapters = FeatureAdapters(2, 3)
    maps = [torch.randn(1, 2, 4, 4)] * 3
    results = adapters(maps)
    assert [tuple(r.shape) for r in results] == [(1, 3, 4, 4)] * 3
    for result, layer in zip(results, adapters.levels, strict=True):
        torch.testing.assert_close(result, layer(maps[0]))
    assert not torch.equal(results[0], results[1])


@pytest.mark.parametrize(
    "task,expected",
    [
        (Task(multibox_threshold=0.5, multibox_override=0.1), lambda t: multibox(t, PRIORS, 0.5, 0.1)),
        (Task(assigner="atss", atss_top_k=4), lambda t: atss(t, PRIORS, SIZE, 4)),
    ],
    ids=["multibox", "atss"],
)
def test_options_of_the_assigners_are_used(task, expected):
    targets = random_targets(5)
    bbox, cls, _ = outputs(1, batch=4)
    faces = assign(task, bbox, cls, targets, PRIORS, SIZE).face
    assert torch.equal(faces, expected(targets).face)
    default = assign(Task(assigner=task.assigner), bbox, cls, targets, PRIORS, SIZE).face
    assert not torch.equal(faces, default)


def test_weights_and_ratios_of_the_task_are_used():
    targets = random_targets(5)
    values = outputs(1, batch=4)
    assignment = assign(Task(), *values[:2], targets, PRIORS, SIZE)

    def terms(**options):
        return task_loss(Task(**options), *values, targets, PRIORS, assignment)

    plain = terms()
    for name in ("class", "box", "landmark"):
        weight = getattr(Task(), f"{name}_weight")
        torch.testing.assert_close(terms(**{f"{name}_weight": 3 * weight})[name], 3 * plain[name])
    assert terms(ohem_ratio=1.0)["class"] < plain["class"]
    focal = [terms(classification="quality_focal", focal_beta=beta)["class"] for beta in (1.0, 2.0)]
    assert focal[1] < focal[0]
