import io
import json
import re
import tarfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from miles_fast.data.demo_corpus import build_demo_corpus
from miles_fast.data.demo_scenes import (
    COLOURS,
    DIRECTIONS,
    HELDOUT_LOOKS,
    HELDOUT_MOTIONS,
    SHAPES,
    SIZES,
    TEMPLATES,
    Recipe,
    clip_stream,
    draw_boxes,
    draw_meaning,
    render_clip,
)

TINY = Recipe(num_train=20, num_heldout=6, shard_clips=8)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return build_demo_corpus(tmp_path_factory.mktemp("demo"), TINY, workers=1)


def read_samples(tars):
    samples = {}
    for tar in tars:
        with tarfile.open(tar) as archive:
            for member in archive:
                key, extension = member.name.split(".")
                samples.setdefault(key, {})[extension] = archive.extractfile(member).read()
    return samples


def decode(mp4):
    av = pytest.importorskip("av")
    with av.open(io.BytesIO(mp4)) as container:
        track = container.streams.video[0]
        assert track.codec_context.name == "h264" and track.codec_context.pix_fmt == "yuv420p"
        assert track.average_rate == TINY.fps
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(track)])


def movers(meaning):
    return meaning.first, meaning.second


def heldout_pairs(mover):
    return [(mover.colour, mover.shape) in HELDOUT_LOOKS, (mover.shape, mover.direction) in HELDOUT_MOTIONS]


def test_layout_of_shards(corpus):
    assert [tar.name for tar in corpus.train_tars] == ["00000.tar", "00001.tar", "00002.tar"]
    assert [tar.name for tar in corpus.heldout_tars] == ["00000.tar"]
    with tarfile.open(corpus.train_tars[1]) as archive:
        members = archive.getmembers()
    assert [member.name for member in members[:3]] == ["000000008.json", "000000008.mp4", "000000008.txt"]
    assert len(members) == 3 * 8 and {member.mtime for member in members} == {0}
    samples = read_samples(corpus.train_tars)
    assert list(samples) == [f"{index:09d}" for index in range(20)]
    assert all(set(sample) == {"json", "mp4", "txt"} for sample in samples.values())


def test_same_recipe_writes_the_same_bytes_in_any_number_of_processes(corpus, tmp_path):
    again = build_demo_corpus(tmp_path, TINY, workers=2)
    for name in ("train_tars", "heldout_tars"):
        before, after = getattr(corpus, name), getattr(again, name)
        assert [tar.read_bytes() for tar in before] == [tar.read_bytes() for tar in after]


def test_samples_do_not_depend_on_the_number_of_clips_or_the_shard_size(corpus, tmp_path):
    recipe = replace(TINY, num_train=5, num_heldout=1, shard_clips=3)
    fewer = read_samples(build_demo_corpus(tmp_path, recipe, workers=1).train_tars)
    assert fewer == dict(list(read_samples(corpus.train_tars).items())[:5])


def test_another_seed_draws_other_clips():
    captions = [[draw_meaning(seed, "train", index) for index in range(20)] for seed in (0, 1)]
    assert captions[0] != captions[1]
    assert draw_meaning(0, "heldout", 0) != draw_meaning(1, "heldout", 0)


def test_heldout_pairs_never_train_and_are_in_every_heldout_clip():
    train = [draw_meaning(0, "train", index) for index in range(4096)]
    heldout = [draw_meaning(0, "heldout", index) for index in range(512)]
    assert not any(any(heldout_pairs(mover)) for meaning in train for mover in movers(meaning))
    assert all(any(heldout_pairs(meaning.first) + heldout_pairs(meaning.second)) for meaning in heldout)
    assert len(set(heldout)) == 512
    for meaning in train + heldout:
        assert meaning.first.colour != meaning.second.colour and meaning.first.shape != meaning.second.shape
    looks = {(mover.colour, mover.shape) for meaning in train for mover in movers(meaning)}
    motions = {(mover.shape, mover.direction) for meaning in train for mover in movers(meaning)}
    assert len(looks) == 8 * 6 - len(HELDOUT_LOOKS) and len(motions) == 6 * 4 - len(HELDOUT_MOTIONS)


def test_every_word_trains_about_equally_often():
    for place in (0, 1):
        drawn = [movers(draw_meaning(3, "train", index))[place] for index in range(2000)]
        for name, values in [
            ("colour", COLOURS),
            ("shape", SHAPES),
            ("size", SIZES),
            ("direction", DIRECTIONS),
        ]:
            count = Counter(getattr(mover, name) for mover in drawn)
            assert set(count) == set(values)
            assert min(count.values()) > 0.6 * len(drawn) / len(values)


def test_heldout_captions_are_unique_and_all_templates_train(corpus):
    assert len({sample["txt"] for sample in read_samples(corpus.heldout_tars).values()}) == 6
    templates = [
        json.loads(sample["json"])["template"] for sample in read_samples(corpus.train_tars).values()
    ]
    assert set(templates) == set(range(len(TEMPLATES)))


def test_caption_says_the_meaning(corpus):
    meaning = draw_meaning(0, "train", 0)
    first, second = (f"a {mover.size} {mover.colour} {mover.shape}" for mover in movers(meaning))
    there, then = meaning.first.direction, meaning.second.direction
    assert [meaning.caption(template) for template in range(3)] == [
        f"{first} moves {there}, then {second} moves {then}",
        f"first {first} moves {there}, after that {second} moves {then}",
        f"{first} goes {there} before {second} goes {then}",
    ]
    pattern = re.compile(r"a (small|large) (\w+) (\w+) (?:moves|goes) (\w+)")
    for split, tars in (("train", corpus.train_tars), ("heldout", corpus.heldout_tars)):
        for key, sample in read_samples(tars).items():
            facts, caption = json.loads(sample["json"]), sample["txt"].decode()
            meaning = draw_meaning(TINY.seed, split, int(key))
            told = [(mover.size, mover.colour, mover.shape, mover.direction) for mover in movers(meaning)]
            assert pattern.findall(caption) == told and facts["caption"] == caption
            written = [
                tuple(entry[name] for name in ("size", "colour", "shape", "direction"))
                for entry in facts["objects"]
            ]
            assert written == told


def test_decoded_pixels_show_each_object_in_its_box(corpus):
    for sample in read_samples(corpus.train_tars).values():
        facts, clip = json.loads(sample["json"]), decode(sample["mp4"])
        assert clip.shape == (16, facts["height"], facts["width"], 3) == (16, 96, 96, 3)
        assert facts["duration"] == 2.0 and facts["fps"] == 8
        for entry in facts["objects"]:
            for image, (x0, y0, x1, y1) in zip(clip, entry["boxes"], strict=True):
                row = (y0 + y1) / 2 if entry["shape"] != "ring" else y0 + 0.12 * (y1 - y0)
                shown = image[int(row), int((x0 + x1) / 2)].astype(int)
                distance = {name: np.abs(shown - colour).sum() for name, colour in COLOURS.items()}
                assert min(distance, key=distance.get) == entry["colour"], (facts["caption"], shown)


def test_boxes_are_tight_around_every_shape_and_size():
    for shape in SHAPES:
        for size in SIZES:
            meaning = next(
                found
                for found in (draw_meaning(0, "train", index) for index in range(5000))
                if (found.first.shape, found.first.size) == (shape, size)
            )
            boxes = draw_boxes(meaning, clip_stream(0, "train", 0))
            with_first = render_clip(meaning, clip_stream(0, "train", 1), boxes=boxes)
            other_colour = next(
                name for name in COLOURS if name not in (meaning.first.colour, meaning.second.colour)
            )
            changed = replace(meaning, first=replace(meaning.first, colour=other_colour))
            without = render_clip(changed, clip_stream(0, "train", 1), boxes=boxes)
            for frame in (0, 4, 15):
                rows, columns = np.nonzero((with_first[frame] != without[frame]).any(axis=-1))
                found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                np.testing.assert_allclose(found, boxes[0, frame], atol=1.51)


def test_each_object_moves_in_its_half_and_in_the_named_direction():
    for index in range(100):
        meaning = draw_meaning(5, "train", index)
        boxes = draw_boxes(meaning, clip_stream(5, "train", index))
        assert boxes.min() >= 1 and boxes.max() <= 95
        for place, mover in enumerate(movers(meaning)):
            moving, resting = (slice(0, 8), slice(8, 16)) if place == 0 else (slice(8, 16), slice(0, 8))
            steps = np.diff(boxes[place, moving, :2], axis=0)
            expected = np.array(DIRECTIONS[mover.direction]) * 24 / 7
            np.testing.assert_allclose(steps, np.broadcast_to(expected, (7, 2)), atol=1e-9)
            assert np.ptp(boxes[place, resting], axis=0).max() == 0
        overlap = np.minimum(boxes[0, :, 2:], boxes[1, :, 2:]) - np.maximum(boxes[0, :, :2], boxes[1, :, :2])
        assert (overlap.min(axis=1) <= 1e-9).all()


def test_one_frame_does_not_give_the_direction_away():
    """Best threshold on the resting place: a middle path of 40 px in 96 would reach 100 %, chance is 50 %."""
    places = {"left": [], "right": []}
    for index in range(1600):
        meaning = draw_meaning(7, "train", index)
        if meaning.first.direction in places:
            boxes = draw_boxes(meaning, clip_stream(7, "train", index))
            places[meaning.first.direction].append(boxes[0, :, [0, 2]].mean(axis=0))
    left, right = (np.array(places[name]) for name in ("left", "right"))
    middle = [(side[:, 3] + side[:, 4]).mean() / 2 for side in (left, right)]
    np.testing.assert_allclose(middle, [48, 48], atol=2)
    thresholds = np.arange(96)[:, None]
    for frame in (0, 7, 15):
        hits = (left[:, frame] > thresholds).mean(axis=1) + (right[:, frame] <= thresholds).mean(axis=1)
        assert max(hits.max(), 2 - hits.min()) / 2 < 0.82
        assert left[:, frame].min() < right[:, frame].max() and right[:, frame].min() < left[:, frame].max()


def test_cache_is_kept_and_interrupted_or_changed_builds_are_made_anew(tmp_path):
    recipe = Recipe(num_train=3, num_heldout=1, shard_clips=2)
    tars = build_demo_corpus(tmp_path, recipe, workers=1).train_tars
    bytes_before = [tar.read_bytes() for tar in tars]
    written = [tar.stat().st_mtime_ns for tar in tars]
    assert json.loads((tmp_path / "video/recipe.json").read_text())["fingerprint"] == recipe.fingerprint()

    build_demo_corpus(tmp_path, recipe, workers=1)
    assert [tar.stat().st_mtime_ns for tar in tars] == written

    (tmp_path / "video/recipe.json").rename(tmp_path / "video/recipe.json.partial")
    tars[1].rename(tars[1].with_name("00001.tar.partial"))
    build_demo_corpus(tmp_path, recipe, workers=1)
    assert tars[0].stat().st_mtime_ns == written[0] and tars[1].stat().st_mtime_ns != written[1]
    assert [tar.read_bytes() for tar in tars] == bytes_before
    assert not list((tmp_path / "video").rglob("*.partial"))

    changed = build_demo_corpus(tmp_path, replace(recipe, num_train=2, version=2), workers=1)
    assert [tar.name for tar in changed.train_tars] == ["00000.tar"] and not tars[1].exists()
    assert tars[0].stat().st_mtime_ns != written[0]


def test_files_of_another_origin_are_left_alone(tmp_path):
    (tmp_path / "video").mkdir()
    (tmp_path / "video" / "mine.mp4").write_bytes(b"mine")
    with pytest.raises(ValueError, match="recipe.json"):
        build_demo_corpus(tmp_path, TINY, workers=1)
    assert (tmp_path / "video" / "mine.mp4").read_bytes() == b"mine"


def test_fingerprint_differs_for_every_field():
    changed = dict(seed=1, num_train=9, num_heldout=9, frames=8, fps=9, gop=9, pixels=112, travel=0.2)
    changed |= dict(crf=23, shard_clips=9, version=9)
    assert set(changed) == set(Recipe.__dataclass_fields__)
    prints = {Recipe(**{name: value}).fingerprint() for name, value in changed.items()}
    assert len(prints | {Recipe().fingerprint()}) == len(changed) + 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("pixels", 100), ("frames", 15), ("travel", 0.6), ("num_heldout", 10**6), ("num_train", 0), ("crf", 60)],
)
def test_recipes_that_cannot_be_drawn_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        Recipe(**{field: value})


def test_unknown_splits_indices_and_worker_counts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="split='test'"):
        draw_meaning(0, "test", 0)
    with pytest.raises(ValueError, match="index=-1"):
        draw_meaning(0, "train", -1)
    with pytest.raises(ValueError, match="workers=0"):
        build_demo_corpus(tmp_path, TINY, workers=0)
