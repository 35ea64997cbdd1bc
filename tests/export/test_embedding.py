"""Embeddings in use: of paths, patches and words; of whole sets, killed and resumed; searched."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fork_server import Program, run
from PIL import Image
from tiny import caption, write_frames

import miles_fast
from launch import embed
from miles_fast.config import DataConfig, SourceConfig
from miles_fast.data.loader import EvaluationLoader
from miles_fast.data.vocabulary import build_vocabulary
from miles_fast.evaluation.embedding import fingerprint
from miles_fast.evaluation.retrieval import embed_source
from miles_fast.export import search
from miles_fast.export.attention_maps import cls_attention, word_maps
from miles_fast.export.embedding_set import (
    Listed,
    SetDescription,
    embed_set,
    embedded_batches,
    read_set,
)
from miles_fast.models.text_encoder import load_tokenizer


@pytest.fixture(scope="module")
def model(ours):
    return miles_fast.load(ours)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two shards of 23 samples, of which 0004 and 0022 do not decode."""
    folder = tmp_path_factory.mktemp("set")
    paths = write_frames(folder, 23, frames=2, checksums=False)
    for path in paths:
        data = bytearray(path.read_bytes())
        for name in (b"0004.00.jpg", b"0022.00.jpg"):
            place = data.find(name)
            if place >= 0:
                data[place + 512 : place + 514] = b"no"
        path.write_bytes(data)
    return folder


def loader_of(model, shards, batch=4, device="cpu"):
    source = SourceConfig(shards=[str(shards / "*.tar")], name="set")
    data = DataConfig(train=[source], frames_per_clip=2, caption_tokens=8, decode_workers=1, threads=1)
    return EvaluationLoader(
        source, data, image_size=32, tokenizer=model.tokenizer, batch=batch, device=torch.device(device)
    )


def description_of(model, loader, **changes):
    figures = dict(model="m", fingerprint=fingerprint(model), shards=[str(p) for p in loader.shards.paths])
    figures |= dict(
        samples=len(loader), frames=2, caption_tokens=8, dtype="float32", layout="npz", part_size=5
    )
    return SetDescription(**figures | changes)


@pytest.mark.parametrize("layout", ["npz", "parquet"])
def test_a_set_is_what_evaluation_embeds_and_bad_samples_are_listed(model, shards, tmp_path, layout):
    if layout == "parquet":
        pytest.importorskip("pyarrow", reason="pip install 'miles-fast[search]'")
    loader = loader_of(model, shards)
    done = list(embed_set(model, loader, tmp_path / "set", description_of(model, loader, layout=layout)))
    assert done == [0, 4, 8, 12, 16, 20, 22, 23]  # the last batch ends before 0022, which is unreadable
    found = read_set(tmp_path / "set")
    texts, videos, keys, _ = embed_source(model, loader)
    assert found.keys == keys == [f"{i:04d}" for i in range(23) if i not in (4, 22)]
    np.testing.assert_allclose(found.videos, videos, atol=1e-6)
    np.testing.assert_allclose(found.texts, texts, atol=1e-6)
    assert found.captions == [caption(int(key)) for key in keys]
    assert [(bad["key"], bad["cause"]) for bad in found.unreadable] == [
        ("0004", "not decodable"),
        ("0022", "not decodable"),
    ]


def test_keys_that_two_shards_share_are_told_apart(model, tmp_path):
    (path,) = write_frames(tmp_path / "one", 2, shards=1, frames=2, checksums=False)
    for name, spoiled in (("0.tar", True), ("1.tar", False)):
        data = path.read_bytes()
        (tmp_path / f"set-{name}").write_bytes(data.replace(b"\xff\xd8\xff", b"not") if spoiled else data)
    loader = loader_of(model, tmp_path)
    list(embed_set(model, loader, tmp_path / "set", description_of(model, loader)))
    found = read_set(tmp_path / "set")
    assert found.keys == ["0000", "0001"] and {Path(shard).name for shard in found.shards} == {"set-1.tar"}
    assert [Path(bad["shard"]).name for bad in found.unreadable] == ["set-0.tar"] * 2


def test_the_fingerprint_tells_tokenizers_apart(model, ours, tmp_path):
    other = miles_fast.load(ours)
    assert fingerprint(other) == fingerprint(model)
    build_vocabulary(["another", "words"], tmp_path / "words")
    other.tokenizer = load_tokenizer(str(tmp_path / "words"))
    assert fingerprint(other) != fingerprint(model)


def test_a_set_goes_on_after_its_last_whole_part(model, shards, tmp_path):
    loader = loader_of(model, shards)
    description = description_of(model, loader)
    work = embed_set(model, loader, tmp_path / "set", description)
    assert next(done for done in work if done > 5) == 8
    work.close()
    with pytest.raises(ValueError, match="4 of 5 parts are missing, the first is part-00001.npz"):
        read_set(tmp_path / "set")
    before = (tmp_path / "set" / "part-00000.npz").stat().st_mtime_ns
    again = list(embed_set(model, loader, tmp_path / "set", description))
    assert (again[0], again[-1]) == (5, 23)
    assert (tmp_path / "set" / "part-00000.npz").stat().st_mtime_ns == before
    assert list(embed_set(model, loader, tmp_path / "set", description)) == [23]
    assert read_set(tmp_path / "set").keys == [f"{i:04d}" for i in range(23) if i not in (4, 22)]
    with pytest.raises(ValueError, match="of something else .frames: 2 -> 4"):
        list(embed_set(model, loader, tmp_path / "set", description_of(model, loader, frames=4)))


def test_killed_at_any_moment_nothing_is_lost(ours, model, shards, tmp_path):
    command = ["launch/embed.py", str(ours), "--shards", str(shards / "*.tar"), "--workers", "1"]
    command += ["--output", str(tmp_path), "--part-size", "5", "--batch", "3", "--caption-tokens", "8"]
    killed = Program(*command)
    deadline = time.monotonic() + 120
    while not (tmp_path / "part-00000.npz").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    done = run(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "21 clips" in done.stdout and "{'not decodable': 2}" in done.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["clips"], summary["unreadable"], summary["batch"]) == (21, {"not decodable": 2}, 3)
    found = read_set(tmp_path)
    _, videos, keys, _ = embed_source(model, loader_of(model, shards))
    assert found.keys == keys and not list(tmp_path.glob(".*"))
    np.testing.assert_allclose(found.videos, videos, atol=1e-6)
    assert run(*command).returncode == 0
    assert json.loads((tmp_path / "summary.json").read_text()) == summary  # of the call that encoded


def test_captions_without_room_for_a_word_are_refused_before_the_model_is_read(monkeypatch, capsys):
    command = ["embed.py", "nowhere", "--shards", "x", "--output", "y", "--caption-tokens", "2"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="2"):
        embed.main()
    assert "--caption-tokens: '2': write a whole number, 3 or greater" in capsys.readouterr().err


def test_speed_is_the_median_behind_the_start_up():
    steady = [(50 + 0.25 * batch, 64 * (batch + 1)) for batch in range(41)]
    marks = [(0.0, 0), *steady[:20], *((seconds + 9, done) for seconds, done in steady[20:])]  # a pause
    assert embed.speed(marks) == {"startup_seconds": 50.0, "clips_per_second": 256.0}
    assert embed.speed(marks[:1]) == {"startup_seconds": None, "clips_per_second": None}
    assert embed.speed(marks[:2]) == {"startup_seconds": 50.0, "clips_per_second": None}


@pytest.mark.gpu
def test_compiled_layers_take_batches_that_lost_clips(ours, shards):
    model = miles_fast.load(ours, "cuda")
    plain = list(embedded_batches(model, loader_of(model, shards, device="cuda"), Listed(), range(23)))
    model.compile_layers()
    compiled = list(embedded_batches(model, loader_of(model, shards, device="cuda"), Listed(), range(23)))
    for (numbers, *_, videos, texts), found in zip(plain, compiled, strict=True):
        assert numbers == found[0]
        torch.testing.assert_close((videos, texts), found[2:], atol=1e-3, rtol=0)


def test_search_finds_the_nearest_with_and_without_faiss(monkeypatch):
    generator = np.random.default_rng(0)
    gallery = generator.normal(size=(50, 8)).astype(np.float32)
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    answers = []
    for there in (True, False):
        if not there:
            monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None)
        cosines, places = search.nearest(gallery[[7, 31]], gallery, 4)
        assert places[:, 0].tolist() == [7, 31] and (np.diff(cosines, axis=1) <= 0).all()
        np.testing.assert_allclose(cosines[:, 0], 1, atol=1e-6)
        answers.append(places)
    assert (answers[0] == answers[1]).all()
    with pytest.raises(ValueError, match="the queries are 4 wide, the gallery 8"):
        search.nearest(gallery[:, :4], gallery, 1)


def gif(path, levels):
    pictures = [Image.new("RGB", (56, 40), (level, 90, 200 - level)) for level in levels]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100)
    return path


@torch.inference_mode()
def test_videos_by_path_patches_and_words(model, tmp_path):
    paths = [gif(tmp_path / "a.gif", [0, 50, 100, 150]), gif(tmp_path / "b.gif", [200, 10])]
    video = model.read_videos(paths)
    # Middle frames of two segments; red of level 0 is (0 - .485) / .229 after normalisation.
    assert video.shape == (2, 2, 3, 32, 32)
    np.testing.assert_allclose(
        video[0, :, 0].mean((1, 2)), (np.array([0, 100]) / 255 - 0.485) / 0.229, atol=0.03
    )
    assert torch.equal(model.encode_video(paths), model.encode_video(video))
    one_by_one = torch.cat([model.encode_video([path], batch=1) for path in paths])
    torch.testing.assert_close(model.encode_video(paths), one_by_one)
    patches = model.encode_patches(paths)
    tokens = model.video_model(video)[:, 1:]
    expected = torch.nn.functional.normalize(model.vid_proj(tokens), dim=-1)
    torch.testing.assert_close(patches, expected.reshape(2, 2, 4, 4, 16))
    words, embeddings = model.encode_words("a red dog moves")
    assert words == ["a", "red", "dog", "moves"]
    maps = word_maps(model, video[:1], "a red dog moves")
    assert list(maps) == ["red", "dog", "moves"]
    torch.testing.assert_close(maps["dog"][1, 2, 3], patches[0, 1, 2, 3] @ embeddings[2])


def test_captions_of_every_length_the_model_takes(model):
    captions = ["a red dog moves", "a"]
    for length in (3, 16):
        assert model.encode_text(captions, length=length).shape == (2, 16)
    assert torch.equal(model.encode_text(captions), model.encode_text(captions, length=16))


@torch.inference_mode()
def test_cls_attention_is_the_softmax_of_the_last_block(model):
    video = torch.randn(2, 2, 3, 32, 32)
    kept = []
    block = model.video_model.blocks[-1]
    hook = block.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    model.video_model(video)
    hook.remove()
    time_BND = kept[0] + block.timeattn(block.norm3(kept[0]), 2)
    query, key, _ = block.attn.qkv(block.norm1(time_BND)).chunk(3, dim=-1)
    maps = torch.zeros(2, 33)
    for head in range(2):
        part = slice(12 * head, 12 * (head + 1))
        maps += torch.softmax(key[:, :, part] @ query[:, 0, part, None] / 12**0.5, dim=1)[..., 0] / 2
    expected = maps[:, 1:] / maps[:, 1:].sum(1, keepdim=True)
    torch.testing.assert_close(cls_attention(model, video), expected.reshape(2, 2, 4, 4))


def test_mistakes_name_the_file_and_the_remedy(model, shards, tmp_path):
    loader = loader_of(model, shards)
    (tmp_path / "bad.mp4").write_text("not a video")
    for argument, message in (
        ([tmp_path / "bad.mp4"], "bad.mp4"),
        ([tmp_path / "gone.mp4"], "gone.mp4: no such file"),
        ([], "at least one"),
        (torch.zeros(1, 2, 3, 16, 16), r"expected \(B, T, 3, 32, 32\)"),
        (torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8), "normalise it"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode_video(argument)
    with pytest.raises(ValueError, match="list of captions"):
        model.encode_text("a dog")
    for length in (0, 1, 2, 17):
        with pytest.raises(ValueError, match=f"length {length}: this model takes captions of 3 to 16 tokens"):
            model.encode_text(["a dog"], length=length)
    for call in (model.encode_video, model.encode_patches, model.read_videos):
        with pytest.raises(ValueError, match="num_frames 0: must be at least 1"):
            call([gif(tmp_path / "a.gif", [0, 50])], num_frames=0)
    for call, given in (
        (model.encode_video, torch.zeros(1, 2, 3, 32, 32)),
        (model.encode_patches, torch.zeros(1, 2, 3, 32, 32)),
        (model.encode_text, ["a dog"]),
    ):
        for batch in (0, -1):
            with pytest.raises(ValueError, match=f"batch {batch}: must be at least 1"):
                call(given, batch=batch)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "summary.json").touch()
    with pytest.raises(ValueError, match="mine holds another program's summary.json: name another --output"):
        next(embed_set(model, loader, tmp_path / "mine", description_of(model, loader)))
    (tmp_path / "set.json").write_text(json.dumps({"format": "x"}))
    with pytest.raises(ValueError, match="name a folder that launch/embed.py wrote"):
        read_set(tmp_path)
