"""Sources, the pixel store, near-duplicates, splits and the order of batches."""

import json

import numpy as np
import pytest
import torch
from faces import landmarks_of, make_faces
from PIL import Image

from featherface.data import (
    Augmentation,
    Loader,
    Source,
    decode_images,
    difference_hashes,
    epoch_order,
    group_duplicates,
    load_data,
    read_source,
    validation_groups,
)
from featherface.data.loader import times_before
from featherface.errors import DataError

SMALL = Augmentation(sizes=[64])


@pytest.fixture
def folder(tmp_path):
    return make_faces(tmp_path / "set", 6)


def test_sources_with_and_without_annotations(folder):
    records = read_source(folder)
    assert [r.name for r in records] == [f"set/group/{i}.png" for i in range(6)]
    assert [len(r.annotation.boxes) for r in records] == [1, 2] * 3
    unlabelled = read_source(folder, labels="none")
    assert len(unlabelled) == 6 and all(r.annotation is None for r in unlabelled)


def test_images_and_labels_must_belong_together(folder, tmp_path):
    Image.new("RGB", (8, 8)).save(folder / "images" / "extra.png")
    with pytest.raises(DataError, match=r"1 of 7 images .* not named .* extra\.png"):
        read_source(folder)
    assert len(read_source(folder, unlisted="skip")) == 6
    assert [r.annotation for r in read_source(folder, unlisted="unlabelled")][6] is None
    (folder / "images" / "group" / "3.png").unlink()
    with pytest.raises(DataError, match=r"1 of 6 images named in .* missing.*3\.png"):
        read_source(folder, unlisted="skip")
    (tmp_path / "empty").mkdir()
    for labels, message in (("auto", "has no annotations"), ("none", "holds no images"), ("a.txt", "a.txt is missing")):
        with pytest.raises(DataError, match=message):
            read_source(tmp_path / "empty", labels)
    with pytest.raises(DataError, match="is not a folder"):
        read_source(tmp_path / "absent")


def test_decoded_pixels_are_pillows(folder):
    paths = [r.path for r in read_source(folder)]
    store = decode_images(paths, threads=2)
    for index, path in enumerate(paths):
        assert np.array_equal(store.image(index).numpy(), np.array(Image.open(path).convert("RGB")))
    assert not store.failures and (store.scales == 1).all()
    reduced = decode_images(paths, max_side=40)
    assert reduced.sizes.max() == 40
    np.testing.assert_allclose(reduced.scales, reduced.sizes / store.sizes)


def test_images_without_annotations_are_turned_upright(folder, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = folder / "images" / "group" / "0.png"
    pixels = np.array(Image.open(path).convert("RGB"))[:40]
    Image.fromarray(pixels).save(path, exif=exif)
    for labels, expected in (("auto", pixels), ("none", np.rot90(pixels, -1))):
        for cache in (None, tmp_path / "cache"):
            data = load_data([Source("set", labels=labels)], folder.parent, cache_dir=cache)
            assert np.array_equal(data.store.image(0).numpy(), expected)
    reduced = load_data([Source("set", labels="none")], folder.parent, max_side=20)
    assert reduced.store.image(0).shape == (20, round(20 * expected.shape[1] / expected.shape[0]), 3)


def test_damaged_images_are_reported_and_skipped(folder):
    (folder / "images" / "group" / "1.png").write_bytes(b"not an image")
    cut = folder / "images" / "group" / "4.png"
    cut.write_bytes(cut.read_bytes()[:300])
    messages = []
    data = load_data([Source("set")], folder.parent, report=messages.append)
    assert len(messages) == 2 and "1.png" in messages[0] and "4.png" in messages[1]
    assert data.train.tolist() == [0, 2, 3, 5]
    for number in (0, 2, 3):
        (folder / "images" / "group" / f"{number}.png").write_bytes(b"")
    with pytest.raises(DataError, match="5 of 6 images cannot be decoded"):
        load_data([Source("set")], folder.parent)


def test_memory_limit_is_checked_before_decoding(folder):
    paths = [r.path for r in read_source(folder)]
    with pytest.raises(DataError, match="memory_limit_gb"):
        decode_images(paths, memory_limit_gb=1e-5)
    decode_images(paths, memory_limit_gb=1.0)


def test_the_cache_is_found_again_and_notices_changes(folder, tmp_path):
    paths = [r.path for r in read_source(folder)]
    fresh = decode_images(paths)
    first = decode_images(paths, cache_dir=tmp_path / "cache")
    files = sorted(p.name for p in (tmp_path / "cache").iterdir())
    assert len(files) == 2
    again = decode_images(
        paths, cache_dir=tmp_path / "cache", progress=lambda done, total: pytest.fail("decoded again")
    )
    for store in (first, again):
        assert torch.equal(store.pixels, fresh.pixels) and np.array_equal(store.offsets, fresh.offsets)
        assert np.array_equal(store.sizes, fresh.sizes)
    Image.new("RGB", (30, 30)).save(paths[0])
    changed = decode_images(paths, cache_dir=tmp_path / "cache")
    assert changed.sizes[0].tolist() == [30, 30]
    for index in (tmp_path / "cache").glob("*.json"):
        index.write_text(json.dumps({"bytes": 3}))
    assert torch.equal(decode_images(paths, cache_dir=tmp_path / "cache").pixels, changed.pixels)


def test_an_unwritable_cache_is_one_sentence(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="pixel cache"):
        decode_images([r.path for r in read_source(folder)], cache_dir=tmp_path / "file")


def test_near_duplicates_are_found_and_stay_together(tmp_path):
    make_faces(tmp_path / "set", 8)
    group = tmp_path / "set" / "images" / "group"
    with Image.open(group / "2.png") as image:
        image.resize((70, 66)).save(group / "copy.jpg", quality=60)
    label = tmp_path / "set" / "label.txt"
    label.write_text(label.read_text() + "# group/copy.jpg\n10 10 20 20\n")
    records = read_source(tmp_path / "set")
    store = decode_images([r.path for r in records])
    groups = group_duplicates(difference_hashes(store))
    assert groups.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 2]
    names = [r.name for r in records]
    for seed in range(8):
        chosen = validation_groups(names, groups, [0.5] * 9, seed)
        assert chosen[2] == chosen[8]
        order = np.random.default_rng(seed).permutation(9)
        shuffled = validation_groups([names[i] for i in order], groups[order], [0.5] * 9, seed)
        assert np.array_equal(shuffled, chosen[order])
    share = validation_groups([f"image {i}" for i in range(4000)], np.arange(4000), [0.1] * 4000, 0).mean()
    assert 0.08 < share < 0.12


def test_chains_of_duplicates_are_one_group():
    hashes = np.zeros((4, 32), np.uint8)
    hashes[1, :3] = 255
    hashes[2, :6] = 255
    hashes[3, 16:] = 255
    assert group_duplicates(hashes, 26).tolist() == [0, 0, 0, 3]
    assert group_duplicates(np.empty((0, 32), np.uint8)).tolist() == []


def test_a_duplicate_of_a_validation_image_is_not_trained_on(tmp_path):
    make_faces(tmp_path / "a", 12)
    make_faces(tmp_path / "b", 12)
    data = load_data([Source("a", validation=0.4), Source("b", labels="none")], tmp_path, seed=3)
    held = {data.records[i].name.removeprefix("a/") for i in data.validation}
    assert held and all(data.records[i].source == 0 for i in data.validation)
    trained = {data.records[i].name.partition("/")[2] for i in data.train}
    assert not held & trained and len(trained) + len(held) == 12


def test_boxes_are_cut_ignored_and_scaled(tmp_path):
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 200, 3), np.uint8)).save(
        folder / "images" / "a.png"
    )
    rows = ["a.png", "5", "10 10 20 20 0 0 0 0 0 0", "190 90 20 20 0 0 0 0 0 0", "50 50 10 10 0 0 0 1 0 0"]
    (folder / "x_bbx_gt.txt").write_text("\n".join([*rows, "5 5 0 9 0 0 0 0 0 0", "300 300 9 9 0 0 0 0 0 0"]))
    data = load_data([Source("set")], tmp_path, max_side=100)
    np.testing.assert_allclose(data.boxes[0], [[5, 5, 15, 15], [95, 45, 100, 50]])
    np.testing.assert_allclose(data.ignored[0], [[25, 25, 30, 30]])
    annotation = data.annotation(0)
    assert annotation.ignore.tolist() == [False, False, True] and len(annotation.boxes) == 3


def test_mixtures_follow_their_weights(tmp_path):
    train, source = np.arange(100, 160), np.repeat([0, 1, 2], 20)
    counts = np.zeros(60)
    for epoch in range(200):
        order = epoch_order(train, source, [2.0, 0.25, 0.0], 5, epoch)
        counts += np.bincount(order - 100, minlength=60)
    assert (counts[:20] == 400).all() and (counts[40:] == 0).all()
    assert 35 < counts[20:40].mean() < 65
    assert np.array_equal(order, epoch_order(train, source, [2.0, 0.25, 0.0], 5, 199))
    assert not np.array_equal(order[:10], epoch_order(train, source, [2.0, 0.25, 0.0], 5, 198)[:10])


def same(a, b):
    return (
        np.array_equal(a.indices, b.indices)
        and torch.equal(a.images, b.images)
        and all(torch.equal(x, y) for x, y in zip(a.targets, b.targets))
    )


def test_batches_do_not_depend_on_workers_or_on_where_one_begins(folder):
    data = load_data([Source("set", weight=2.0)], folder.parent)
    batches = list(Loader(data, SMALL, 4, seed=1).epoch(0))
    assert len(batches) == 3 and batches[0].images.shape == (4, 3, 64, 64)
    assert all(map(same, batches, Loader(data, SMALL, 4, seed=1, workers=2).epoch(0)))
    assert all(map(same, batches[1:], Loader(data, SMALL, 4, seed=1).epoch(0, first=1)))
    assert not same(batches[0], next(Loader(data, SMALL, 4, seed=2).epoch(0)))
    assert not same(batches[0], next(Loader(data, SMALL, 4, seed=1).epoch(1)))


def test_views_repeat_when_asked(folder):
    data = load_data([Source("set")], folder.parent)
    loader = Loader(data, SMALL, 1, views=2)
    epochs = [{int(b.indices[0]): b.images for b in loader.epoch(e)} for e in range(4)]
    assert all(torch.equal(epochs[0][i], epochs[2][i]) for i in epochs[0])
    assert any(not torch.equal(epochs[0][i], epochs[1][i]) for i in epochs[0])


def test_processes_share_out_every_batch(folder):
    data = load_data([Source("set", weight=2.0)], folder.parent)
    whole = list(Loader(data, SMALL, 4, seed=1).epoch(0))
    parts = [list(Loader(data, SMALL, 2, seed=1, rank=r, world_size=2).epoch(0)) for r in range(2)]
    for batch, first, second in zip(whole, *parts):
        assert batch.indices.tolist() == [*first.indices, *second.indices]
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))


def test_a_set_smaller_than_a_batch_is_repeated(folder):
    data = load_data([Source("set")], folder.parent)
    (batch,) = Loader(data, SMALL, 16).epoch(0)
    assert batch.images.shape[0] == 16 and set(batch.indices.tolist()) == set(range(6))


def test_batches_carry_faces_landmarks_and_missing_labels(folder, tmp_path):
    make_faces(tmp_path / "plain", 3, seed=9)
    data = load_data([Source("set"), Source("plain", labels="none")], tmp_path)
    config = Augmentation(sizes=[64], scales=[3.0], mirror=0.0, min_face=0.0)
    batch = Loader(data, config, 9).prepare(np.arange(9), 64, 0)
    assert batch.targets.labelled.tolist() == [True] * 6 + [False] * 3
    assert batch.targets.image.tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5]
    assert batch.targets.has_landmarks.all()
    for box, points in zip(batch.targets.boxes.numpy(), batch.targets.landmarks.view(-1, 5, 2).numpy()):
        np.testing.assert_allclose(points, landmarks_of(box), atol=2e-3)


def test_a_mosaic_shows_four_photographs_of_the_same_kind(folder, tmp_path):
    make_faces(tmp_path / "plain", 3, seed=9)
    data = load_data([Source("set"), Source("plain", labels="none")], tmp_path)
    config = Augmentation(sizes=[64], scales=[3.0], mirror=0.0, min_face=0.0, mosaic=1.0)
    loader = Loader(data, config, 9, seed=4)
    batch = loader.prepare(np.arange(9), 64, 0)
    assert batch.targets.labelled.tolist() == [True] * 6 + [False] * 3
    boxes = batch.targets.boxes.numpy()
    for number in range(6):
        own = boxes[(batch.targets.image == number).numpy()]
        quarters = {(x > 0.5, y > 0.5) for x, y in ((own[:, :2] + own[:, 2:]) / 2).tolist()}
        assert len(quarters) == 4
    for box, points in zip(boxes, batch.targets.landmarks.view(-1, 5, 2).numpy()):
        np.testing.assert_allclose(points, landmarks_of(box), atol=2e-3)
    assert same(batch, loader.prepare(np.arange(9), 64, 0))
    assert not same(batch, loader.prepare(np.arange(9), 64, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"weight": -1.0}, "weight"), ({"validation": 1.0}, "validation"), ({"unlisted": "maybe"}, "unlisted")],
)
def test_senseless_sources_are_refused(folder, change, message):
    with pytest.raises(DataError, match=message):
        load_data([Source("set", **change)], folder.parent)


def test_nothing_to_train_on_is_an_error(folder, tmp_path):
    with pytest.raises(DataError, match="no images"):
        load_data([])
    with pytest.raises(DataError, match="left to train on"):
        load_data([Source("set", weight=0.0)], tmp_path)
    with pytest.raises(DataError, match="two sources"):
        load_data([Source("set"), Source("set")], tmp_path)
    with pytest.raises(DataError, match="chosen for validation"):
        load_data([Source("set", validation=1e-9)], tmp_path)


def test_each_batch_draws_its_size_and_keeps_it_when_resumed(folder):
    data = load_data([Source("set")], folder.parent)
    config = Augmentation(sizes=[32, 64, 96])

    def shapes(epoch, first=0, **options):
        return [batch.images.shape[2:] for batch in Loader(data, config, 1, seed=3, **options).epoch(epoch, first)]

    epochs = [shapes(epoch) for epoch in range(8)]
    assert {height for epoch in epochs for height, _ in epoch} == {32, 64, 96}
    assert all(height == width for epoch in epochs for height, width in epoch)
    assert shapes(5, first=2) == epochs[5][2:]
    assert shapes(5, workers=2) == epochs[5]
    other = Loader(data, config, 1, seed=3, rank=1, world_size=2)
    assert [batch.images.shape[2:] for batch in other.epoch(5)] == epochs[5][: other.batches_per_epoch]


def test_landmarks_are_scaled_as_boxes_are(tmp_path):
    make_faces(tmp_path / "set", 6)
    whole, small = (load_data([Source("set")], tmp_path, max_side=side) for side in (0, 40))
    assert any(np.isfinite(points).any() for points in whole.landmarks)
    for before, after, scale in zip(whole.landmarks, small.landmarks, small.store.scales, strict=True):
        assert (scale < 1).all()
        np.testing.assert_allclose(after, before * scale[::-1])


def test_names_of_one_file_are_one(tmp_path):
    folder = tmp_path / "set"
    make_faces(folder, 4)
    (labels,) = folder.glob("*.txt")
    text = labels.read_text()
    names = sorted(path.relative_to(folder / "images").as_posix() for path in (folder / "images").rglob("*.*"))
    changes = (
        f"./{names[0]}",
        names[1].replace("/", "//"),
        str(folder / "images" / names[2]),
        names[3].replace("/", "\\"),
    )
    for name, changed in zip(names, changes, strict=True):
        assert name in text and name != changed
        text = text.replace(name, changed)
    labels.write_text(text)
    data = load_data([Source("set", unlisted="unlabelled")], tmp_path)
    assert sorted(record.name for record in data.records) == [f"set/{name}" for name in names]
    assert all(record.annotation is not None for record in data.records)


def test_mosaics_take_photographs_by_the_weights_of_their_sources(tmp_path):
    make_faces(tmp_path / "often", 4)
    make_faces(tmp_path / "seldom", 4, seed=1)
    data = load_data([Source("often", weight=1.0), Source("seldom", weight=0.05)], tmp_path)
    loader = Loader(data, Augmentation(sizes=[64], mosaic=1.0), 2)
    seen = []
    view = loader._view
    loader._view = lambda index, *rest: seen.append(data.records[index].source) or view(index, *rest)
    for epoch in range(20):
        for _ in loader.epoch(epoch):
            pass
    assert seen.count(1) < 0.15 * len(seen)


def test_an_image_that_is_seen_several_times_in_an_epoch_is_seen_differently(tmp_path):
    make_faces(tmp_path / "set", 4)
    data = load_data([Source("set", weight=3.0)], tmp_path)

    def epoch(views):
        loader = Loader(data, Augmentation(sizes=[64]), 4, views=views)
        batches = list(loader.epoch(0))
        indices = np.concatenate([batch.indices for batch in batches])
        assert sorted(indices.tolist()) == sorted(3 * data.train.tolist())
        return {image.numpy().tobytes() for batch in batches for image in batch.images}

    assert len(epoch(0)) == 12
    assert len(epoch(2)) == 4
    assert times_before(np.array([5, 3, 5, 5, 3, 1])).tolist() == [0, 0, 1, 2, 1, 0]
