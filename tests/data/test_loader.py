"""The loader: DALI against Pillow, resume, substitutes for bad samples, both layouts, captions."""

import io
import json
import pickle
import sys
import tarfile
import time
import types

import numpy as np
import pytest
import torch
from tiny import caption, jpeg, tiny_config, write_data, write_frames

from miles_fast.config import SourceConfig
from miles_fast.data.augmentation import MEAN, STD, build_augmentation
from miles_fast.data.batches import Quarantine
from miles_fast.data.clips import ClipDraw, read_clip
from miles_fast.data.loader import EvaluationLoader, Loader
from miles_fast.data.order import Share
from miles_fast.data.sampling import View, sample_stream, training_view
from miles_fast.data.shards import SampleError, ShardError, ShardSet
from miles_fast.data.vocabulary import build_vocabulary
from miles_fast.models.caption_tokens import CaptionEncoder
from miles_fast.models.text_encoder import load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("loader")
    write_data(place)
    return place


def loader(config, quarantine=None, **share):
    share = Share(**{"batch": 4, **share})
    tokenizer = load_tokenizer(config.model.text.tokenizer_source)
    return Loader(
        config.data,
        image_size=32,
        tokenizer=tokenizer,
        share=share,
        seed=5,
        device=CPU,
        quarantine=quarantine or Quarantine(None),
    )


def only(root, shards):
    """The tiny data section with these shards alone."""
    section = vars(tiny_config(root).data)
    return {**section, "train": [{"shards": [str(path) for path in shards]}], "evaluation": []}


def take(config, first, count, quarantine=None):
    dealer = loader(config, quarantine)
    batches = dealer.batches(first)
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


def augment(kind, frames, views, takes, device=CPU, **options):
    graph = build_augmentation(
        kind, takes=takes, num_clips=4, num_frames=2, size=32, device=device, threads=1, **options
    )
    if takes == "jpeg":
        frames = [[np.frombuffer(image, np.uint8) for image in clip] for clip in frames]
    graph.submit(frames, views)
    return graph.collect()


def views_of(count):
    return [training_view(sample_stream(0, 0, i), 40, 56, (0.5, 1.0)) for i in range(count)]


def test_dali_equals_pillow():
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    frames = [[jpeg(2 * i), jpeg(2 * i + 1)] for i in range(4)]
    dali, pillow = (augment(kind, frames, views_of(4), "jpeg") for kind in ("dali", "pil"))
    assert dali.shape == pillow.shape == (4, 2, 3, 32, 32) and dali.dtype == torch.float32
    assert (dali - pillow).abs().mean() < 0.02  # a grey level is 0.017
    arrays = [[np.random.default_rng(i).integers(0, 256, (40, 56, 3), dtype=np.uint8)] * 2 for i in range(4)]
    raw = [augment(kind, arrays, views_of(4), "pixels") for kind in ("dali", "pil")]
    assert (raw[0] - raw[1]).abs().mean() < 0.03


@pytest.mark.parametrize("others", [False, True], ids=["alone", "beside others of NVIDIA's"])
def test_without_dali_pillow_takes_its_place(monkeypatch, others):
    nvidia = types.ModuleType("nvidia")
    nvidia.__path__ = []
    monkeypatch.setitem(sys.modules, "nvidia", nvidia if others else None)
    monkeypatch.delitem(sys.modules, "nvidia.dali", raising=False)
    frames = [[jpeg(2 * i), jpeg(2 * i + 1)] for i in range(4)]
    assert torch.equal(*(augment(kind, frames, views_of(4), "jpeg") for kind in ("auto", "pil")))
    with pytest.raises(ValueError, match="data.augmentation = dali, but DALI is not installed"):
        augment("dali", frames, views_of(4), "jpeg")


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["nvjpeg", "cpu"])
def test_the_gpu_graph_equals_the_cpu_graph(decoder):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    frames = [[jpeg(2 * i), jpeg(2 * i + 1)] for i in range(4)]
    gpu = augment("dali", frames, views_of(4), "jpeg", torch.device("cuda", 0), jpeg_decoder=decoder)
    assert gpu.is_cuda and gpu.dtype == torch.float16
    assert (gpu.cpu().float() - augment("dali", frames, views_of(4), "jpeg")).abs().mean() < 0.04


def test_a_far_position_is_reached_at_once_and_deals_the_same(root):
    # Two sources whose turns, epochs and places must be known without going through a hundred million steps.
    shards = [str(root / "train" / "*.tar")]
    train = [{"shards": shards}, {"shards": shards, "name": "again", "weight": 0.3}]
    config, far = tiny_config(root, data={"train": train, "evaluation": []}), 10**8
    begun = time.process_time()
    before = take(config, far - 1, 2)
    assert time.process_time() - begun < 30
    (there,) = take(config, far, 1)
    assert there.keys == before[1].keys != before[0].keys
    assert torch.equal(there.video_BTCHW, before[1].video_BTCHW)


@pytest.mark.parametrize("kind", ["auto", "pil"])
def test_crop_flip_and_normalisation(kind):
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 40:, 0] = 255  # the right half is red
    whole = View(start_yx=(0, 0), end_yx=(1, 1), mirror=False)
    mirrored = View(start_yx=(0, 0), end_yx=(1, 1), mirror=True)
    right = View(start_yx=(0, 0.5), end_yx=(1, 1), mirror=False)
    out = augment(kind, [[image, image]] * 3, [whole, mirrored, right], "pixels")
    bright, dark = (1 - MEAN[0]) / STD[0], -MEAN[0] / STD[0]
    torch.testing.assert_close(out[0, 0, 0, 16, [4, 28]], torch.tensor([dark, bright]), atol=1e-3, rtol=0)
    torch.testing.assert_close(out[1, 1, 0, 16, [4, 28]], torch.tensor([bright, dark]), atol=1e-3, rtol=0)
    # Antialiasing looks one pixel past the crop, so its first column is left out.
    torch.testing.assert_close(out[2, 0, 0, :, 1:], torch.full((32, 31), bright), atol=1e-3, rtol=0)
    torch.testing.assert_close(out[2, 0, 1], torch.full((32, 32), -MEAN[1] / STD[1]), atol=1e-3, rtol=0)


def test_a_batch_holds_its_samples_and_a_resumed_loader_the_same_ones(root):
    config = tiny_config(root)
    whole = take(config, 0, 8)
    again = take(config, 3, 5)
    for one, two in zip(whole[3:], again, strict=True):
        assert one.keys == two.keys
        assert torch.equal(one.video_BTCHW, two.video_BTCHW) and torch.equal(
            one.token_ids_BL, two.token_ids_BL
        )
    keys = [key for batch in whole[:6] for key in batch.keys]
    assert sorted(keys) == [f"{i:04d}" for i in range(24)]
    captions = [caption(int(key)) for key in whole[0].keys]
    expected = load_tokenizer(root / "tokenizer")(
        captions, padding="max_length", truncation=True, max_length=8, return_tensors="pt"
    )
    assert torch.equal(whole[0].token_ids_BL, expected["input_ids"])
    assert torch.equal(whole[0].attention_BL, expected["attention_mask"])


def test_ranks_split_the_batch(root):
    config = tiny_config(root)
    joined = [batch.keys for batch in take(config, 0, 3)]
    parts = []
    for rank in (0, 1):
        dealer = loader(config, batch=2, rank=rank, ranks=2)
        batches = dealer.batches(0)
        parts.append([next(batches).keys for _ in range(3)])
        batches.close()
    assert [a + b for a, b in zip(*parts, strict=True)] == joined


def spoil(tar, folder, damage):
    """Copy a tar with members changed by `damage(name, data) -> data or None`."""
    folder.mkdir()
    with tarfile.open(tar) as source, tarfile.open(folder / tar.name, "w") as target:
        for member in source:
            data = damage(member.name, source.extractfile(member).read())
            if data is not None:
                info = tarfile.TarInfo(member.name)
                info.size = len(data)
                target.addfile(info, io.BytesIO(data))


def test_bad_samples_are_replaced_counted_and_listed(root, tmp_path):
    write_frames(tmp_path / "good", 24, shards=1)
    bad = {"0001": "truncated", "0002": "wrong checksum", "0003": "no caption", "0004": "empty caption"}

    def damage(name, data):
        key, kind = name.split(".", 1)
        if key == "0001" and kind.endswith("jpg"):
            return data[: len(data) // 2]
        if key == "0001" and kind == "json":
            return None
        if key == "0002" and kind.endswith("jpg"):
            return data[:-20] + bytes(20)
        if kind == "txt" and key in ("0003", "0004"):
            return None if key == "0003" else b"  "
        return data

    spoil(tmp_path / "good" / "00000.tar", tmp_path / "bad", damage)
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    data = only(root, [tmp_path / "bad" / "*.tar"])
    config = tiny_config(root, data=data)
    batches = take(config, 0, 12, quarantine)
    assert set(quarantine.counts) == set(bad.values())
    assert min(quarantine.counts.values()) >= 2  # two epochs; a substitute may be bad too
    listed = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert {entry["key"]: entry["cause"] for entry in listed} == bad and len(listed) == 4
    assert all("bad/00000.tar" in entry["shard"] for entry in listed)
    assert not bad.keys() & {key for batch in batches for key in batch.keys}
    good_data = {**data, "train": [{"shards": [str(tmp_path / "good" / "*.tar")]}]}
    for one, two in zip(take(tiny_config(root, data=good_data), 0, 6), batches[:6], strict=True):
        for row, (was, now) in enumerate(zip(one.keys, two.keys, strict=True)):
            if was not in bad:
                assert was == now and torch.equal(one.video_BTCHW[row], two.video_BTCHW[row])


def test_evaluation_leaves_bad_samples_out(root, tmp_path):
    write_frames(tmp_path / "good", 7, shards=1)
    spoil(
        tmp_path / "good" / "00000.tar",
        tmp_path / "bad",
        lambda name, data: None if name == "0003.txt" else data,
    )
    config, quarantine = tiny_config(root), Quarantine(None)
    source = SourceConfig(shards=[str(tmp_path / "bad" / "*.tar")])
    loader = EvaluationLoader(
        source,
        config.data,
        image_size=32,
        tokenizer=load_tokenizer(root / "tokenizer"),
        batch=4,
        device=CPU,
    )
    batches = list(loader.batches(quarantine))
    assert [key for b in batches for key in b.keys] == ["0000", "0001", "0002", "0004", "0005", "0006"]
    assert quarantine.counts == {"no caption": 1}


def test_a_set_of_nothing_but_bad_samples_stops_with_its_name(root, tmp_path):
    write_frames(tmp_path / "good", 6, shards=1)
    spoil(
        tmp_path / "good" / "00000.tar",
        tmp_path / "bad",
        lambda name, data: None if name.endswith("txt") else data,
    )
    data = only(root, [tmp_path / "bad" / "*.tar"])
    with pytest.raises(ShardError, match="100 unusable samples in a row.*no caption.*bad/00000.tar"):
        take(tiny_config(root, data=data), 0, 1)


def test_missing_shards_are_named(root, tmp_path):
    data = only(root, [tmp_path / "none-*.tar"])
    with pytest.raises(ShardError, match="none-"):
        loader(tiny_config(root, data=data))


def test_a_pass_that_takes_more_than_the_set_holds_is_said(root, caplog):
    config = tiny_config(root)
    clips = len(loader(config, ranks=2).shard_sets[0])
    assert "negatives" not in caplog.text
    loader(config, batch=clips, ranks=2)
    said = f"train holds {clips} clips, a pass of all ranks takes {2 * clips}: clips are among their own"
    assert said in caplog.text


def test_captions_of_any_length_are_padded_or_cut(root):
    tokenizer = load_tokenizer(root / "tokenizer")
    encode = pickle.loads(pickle.dumps(CaptionEncoder(tokenizer, 8)))
    captions = ["red dog", "red " * 10_000, "unheard-of"]
    ids, attention = encode(captions).swapaxes(0, 1)
    expected = tokenizer(captions, padding="max_length", truncation=True, max_length=8, return_tensors="np")
    assert np.array_equal(ids, expected["input_ids"])
    assert np.array_equal(attention, expected["attention_mask"])
    assert encode([]).shape == (0, 2, 8)
    assert attention.sum(1).tolist()[:2] == [4, 8]
    assert tokenizer.convert_ids_to_tokens(ids[1].tolist()) == ["[CLS]", *["red"] * 6, "[SEP]"]


def test_the_vocabulary_is_a_function_of_the_captions(tmp_path):
    captions = ["a cat, a dog", "the cat"]
    for folder in ("one", "two"):
        build_vocabulary(captions, tmp_path / folder)
    assert (tmp_path / "one/tokenizer.json").read_text() == (tmp_path / "two/tokenizer.json").read_text()
    tokenizer = load_tokenizer(tmp_path / "one")
    assert tokenizer.tokenize("A Cat, a god") == ["a", "cat", ",", "a", "g", "##o", "##d"]


def test_videos_are_decoded_in_processes(root, tmp_path):
    from miles_fast.data.demo_corpus import Recipe, build_demo_corpus

    corpus = build_demo_corpus(tmp_path, Recipe(num_train=8, num_heldout=2), workers=1)
    data = only(root, corpus.train_tars)
    batches = take(tiny_config(root, data=data), 0, 2)
    assert len({key for batch in batches for key in batch.keys}) == 8
    assert batches[0].video_BTCHW.shape == (4, 2, 3, 32, 32) and batches[0].video_BTCHW.std() > 0.1


def test_real_clips_make_batches(root, shared, tmp_path):
    from miles_fast.data.preparation import PreparationOptions, prepare

    options = PreparationOptions(frames=4, short_side=64, limit=12, samples_per_shard=12)
    prepare([shared / "clips"], tmp_path / "frames", options, captions=shared / "clips" / "manifest.json")
    data = only(root, [tmp_path / "frames/*.tar"])
    (batch,) = take(tiny_config(root, data=data), 0, 1)
    assert torch.isfinite(batch.video_BTCHW).all() and 0.3 < batch.video_BTCHW.std() < 2


def test_an_unreadable_image_is_a_sample_error(tmp_path):
    (path,) = write_frames(tmp_path, 1, shards=1, checksums=False)
    spoil(path, tmp_path / "bad", lambda name, data: b"not an image" if name.endswith("jpg") else data)
    with pytest.raises(SampleError) as caught:
        read_clip(ShardSet([tmp_path / "bad" / path.name]), 0, ClipDraw(num_frames=2, takes="jpeg"), None)
    assert caught.value.cause == "not decodable"
