"""A tiny model measured on videos made on the spot: files, cache, unreadable and missing ones, ranks."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny import tiny_config, write_data

from miles_fast.data import reading, video_files
from miles_fast.data.augmentation import PillowAugmentation
from miles_fast.data.sampling import evaluation_view, segment_frames
from miles_fast.data.videos import read_frames
from miles_fast.evaluation import embedding
from miles_fast.evaluation.benchmark import measure, measure_probe, table
from miles_fast.evaluation.data_folder import DataFolder, MissingVideosError
from miles_fast.evaluation.embedding import Embedder
from miles_fast.evaluation.linear_probe import probe
from miles_fast.evaluation.protocol import Pinned
from miles_fast.evaluation.protocols import find_protocol
from miles_fast.models.caption_tokens import CaptionEncoder
from miles_fast.models.dual_encoder import build_dual_encoder, unit
from miles_fast.models.text_encoder import load_tokenizer

CAPTIONS = [
    "a red dog moves",
    "a blue cat moves",
    "a green car moves",
    "a white boat moves",
    "a black tree moves",
]


def video(number: int) -> bytes:
    """Ten frames that go from one level of grey to another."""
    import io

    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for step in range(10):
            picture = np.full((48, 64, 3), 20 + 45 * number + 4 * step, np.uint8)
            picture[:, : 6 * step] = 255 - 40 * number
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    write_data(root, 2)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(root / "tokenizer")
    config = dataclasses.replace(tiny_config(root).model, attention="sdpa")
    model = build_dual_encoder(config, len(tokenizer)).eval()
    model.tokenizer = tokenizer
    return model


@pytest.fixture
def folder(tmp_path):
    """Five clips in LSMDC's form."""
    lines = []
    for number, caption in enumerate(CAPTIONS):
        (tmp_path / "clips").mkdir(exist_ok=True)
        (tmp_path / "clips" / f"film_{number}.avi").write_bytes(video(number))
        lines.append(f"film_{number}\t1\t2\t3\t4\t{caption}")
    (tmp_path / "LSMDC16_challenge_1000_publictect.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def protocol():
    return dataclasses.replace(find_protocol("lsmdc"), pinned={"test": Pinned(videos=5, captions=5)})


def embedder(model, **options):
    return Embedder(model=model, device=torch.device("cpu"), num_workers=1, threads=1, **options)


@torch.inference_mode()
def own_similarity(model, folder, frames, numbers):
    """Text by video, clip by clip, without the code that is tested."""
    rows = []
    for number in numbers:
        augmentation = PillowAugmentation(frames, 32, torch.device("cpu"))
        pictures, _ = read_frames(
            folder / "clips" / f"film_{number}.avi", lambda n: segment_frames(n, frames)
        )
        augmentation.submit([pictures], [evaluation_view(48, 64)])
        rows.append(unit(model.embed_video(augmentation.collect()))[0])
    texts = [CAPTIONS[number] for number in numbers]
    ids, attention = torch.from_numpy(CaptionEncoder(model.tokenizer, 16)(texts)).unbind(1)
    return unit(model.embed_text(ids, attention)) @ torch.stack(rows).T


def places(similarity):
    return np.array([1 + (row > row[n]).sum() for n, row in enumerate(similarity.numpy())])


def test_a_protocol_gives_the_ranks_of_embedding_clip_by_clip(model, folder, protocol):
    result = measure(protocol, DataFolder(folder), embedder(model, batch=2))
    similarity = own_similarity(model, folder, 4, range(5))
    assert result.figures["text to video"]["MeanR"] == places(similarity).mean()
    assert result.figures["video to text"]["MeanR"] == places(similarity.T).mean()
    assert (result.videos, result.unreadable, result.missing) == (5, [], [])
    assert result.chance["R@1"] == 0.2 and "chance" in table(result)


def test_unreadable_videos_are_listed_and_not_scored(model, folder, protocol):
    (folder / "clips" / "film_1.avi").write_bytes(b"not a video")
    (folder / "clips" / "film_3.avi").write_bytes(video(3)[:900])
    result = measure(protocol, DataFolder(folder), embedder(model, batch=3))
    assert result.videos == 3 and sorted(bad.key for bad in result.unreadable) == ["film_1", "film_3"]
    assert (
        result.figures["text to video"]["MeanR"] == places(own_similarity(model, folder, 4, [0, 2, 4])).mean()
    )
    assert "2 videos cannot be read and are not scored" in table(result) and "film_3" in table(result)
    for number in (0, 2, 4):
        (folder / "clips" / f"film_{number}.avi").write_bytes(b"")
    with pytest.raises(ValueError, match="none of 5 videos can be read"):
        measure(protocol, DataFolder(folder), embedder(model))


def test_missing_videos_end_it_unless_they_may_be_missing(model, folder, protocol):
    (folder / "clips" / "film_2.avi").unlink()
    with pytest.raises(MissingVideosError, match="1 of 5 videos are missing: film_2"):
        measure(protocol, DataFolder(folder), embedder(model))
    result = measure(protocol, DataFolder(folder, allow_missing=True), embedder(model))
    assert result.missing == ["film_2"] and result.videos == 4
    assert (
        result.figures["text to video"]["MeanR"]
        == places(own_similarity(model, folder, 4, [0, 1, 3, 4])).mean()
    )


def test_the_cache_answers_only_for_the_same_weights_and_files(model, folder, monkeypatch):
    cache = folder / "cache"

    def embed(cache=cache):
        files = DataFolder(folder).videos(["film_0", "film_1"])
        return embedder(model, cache=cache).videos(files, 2)[0]

    first = embed()
    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "_embed_files", None)  # not called
        assert torch.equal(embed(), first)
    (folder / "clips" / "film_0.avi").write_bytes(video(3))
    second = embed()
    assert torch.equal(second[1], first[1]) and not torch.equal(second[0], first[0])
    model.vid_proj[0].weight.data.neg_()
    turned = embed()
    model.vid_proj[0].weight.data.neg_()
    assert not torch.equal(turned, second)
    for part in cache.glob("*.npz"):
        part.write_bytes(b"PK")
    with pytest.raises(ValueError, match="npz: cannot be read .* delete it"):
        embed()


def test_ranks_share_the_parts_and_all_get_the_whole(model, folder, monkeypatch):
    monkeypatch.setattr(embedding, "PART", 2)
    monkeypatch.setattr(embedding, "world_size", lambda: 2)
    shares: list[dict] = []
    monkeypatch.setattr(embedding, "gather_objects", lambda item: shares.append(item) or [item])
    files = DataFolder(folder).videos([f"film_{n}" for n in range(5)])
    for rank in (0, 1):
        monkeypatch.setattr(embedding, "rank", lambda rank=rank: rank)
        embedder(model).videos(files, 4)
    assert [sorted(share) for share in shares] == [[0, 4], [2]]
    monkeypatch.setattr(embedding, "gather_objects", lambda item: shares)
    joined, _ = embedder(model).videos(files, 4)
    monkeypatch.undo()
    torch.testing.assert_close(joined, embedder(model).videos(files, 4)[0])


def test_reading_processes_live_over_all_parts(model, folder, monkeypatch):
    (folder / "clips" / "film_2.avi").write_bytes(b"not a video")
    files = DataFolder(folder).videos([f"film_{n}" for n in range(5)])
    whole, bad = embedder(model, batch=3).videos(files, 4)  # batches reach over the ends of parts
    started = []
    monkeypatch.setattr(embedding, "PART", 2)
    monkeypatch.setattr(video_files, "ReadingPool", lambda *a: started.append(a) or reading.ReadingPool(*a))
    parts, bad_parts = embedder(model, batch=3).videos(files, 4)
    assert len(started) == 1 and [sample.key for sample in bad_parts] == ["film_2"] == [bad[0].key]
    np.testing.assert_array_equal(parts, whole)
    assert np.isnan(parts[2]).all() and not np.isnan(parts[[0, 1, 3, 4]]).any()


@pytest.fixture
def actions(folder):
    """The same clips as two classes in UCF101's form, each in the training part too."""
    for number in range(5):
        (folder / "clips" / f"film_{number}.avi").rename(folder / "clips" / f"v_{number}.avi")
        (folder / "clips" / f"t_{number}.avi").write_bytes(video(number))
    (folder / "classInd.txt").write_text("1 RedDog\n2 BlueCat\n")
    names = [("BlueCat" if n % 2 else "RedDog", n) for n in range(5)]
    for fold in (1, 2, 3):
        (folder / f"testlist0{fold}.txt").write_text("".join(f"{c}/v_{n}.avi\n" for c, n in names))
        train = "".join(f"{c}/t_{n}.avi {1 + n % 2}\n" for c, n in names)
        (folder / f"trainlist0{fold}.txt").write_text(train)
    return folder


def test_zero_shot_actions_with_every_prompt_and_frame_count(model, actions):
    protocol = dataclasses.replace(find_protocol("ucf101"), pinned={}, folds=(1, 2))
    result = measure(protocol, DataFolder(actions), embedder(model))
    names = {f"{p} prompt, {f} frames" for p in ("bare", "one", "ensemble") for f in (4, 16)}
    assert set(result.figures) == names and result.videos == 10 and result.chance["top-1"] == 0.5
    labels = torch.tensor([0, 1, 0, 1, 0])
    files = DataFolder(actions).videos([f"v_{n}" for n in range(5)])
    videos, _ = embedder(model).videos(files, 16)
    sentences = embedder(model).texts(["red dog", "blue cat"], 32)
    right = float(((videos @ sentences.T).argmax(1) == labels).double().mean())
    assert result.figures["bare prompt, 16 frames"]["top-1"] == pytest.approx(right)


def test_a_probe_is_fitted_to_the_features_of_the_training_part(model, actions):
    protocol = dataclasses.replace(find_protocol("ucf101"), pinned={}, folds=(2,))
    result = measure_probe(protocol, DataFolder(actions), embedder(model), 4)
    parts = [DataFolder(actions).videos([f"{p}_{n}" for n in range(5)]) for p in "tv"]
    train, test = (embedder(model).videos(files, 4, projected=False)[0] for files in parts)
    labels = torch.tensor([0, 1, 0, 1, 0])
    found, _ = probe(train, labels, test, 2)
    right = float((found.argmax(1) == labels).double().mean())
    assert train.shape == (5, 24) and result.figures["linear probe, 4 frames"]["top-1"] == right
    assert json.dumps(dataclasses.asdict(result)) and result.videos == 5
    with pytest.raises(ValueError, match="is retrieval: a probe needs classes"):
        measure_probe(find_protocol("lsmdc"), DataFolder(actions), embedder(model), 4)


def test_reversed_frames_are_another_clip(model, folder):
    files = DataFolder(folder).videos(["film_0"])
    forth, back = (embedder(model).videos(files, 2, reverse=reverse)[0] for reverse in (False, True))
    with torch.no_grad():
        model.video_model.temporal_embed.normal_()
    turned = [embedder(model).videos(files, 2, reverse=reverse)[0] for reverse in (False, True)]
    model.video_model.temporal_embed.data.zero_()
    torch.testing.assert_close(forth, back, atol=1e-5, rtol=1e-5)  # without times the order is not seen
    assert (turned[0] - turned[1]).abs().max() > 1e-3


def test_templates_are_measured_forwards_and_backwards(model, folder):
    names = {"Lifting [something]": "0", "Pushing [something]": "1"}
    (folder / "labels.json").write_text(json.dumps(names))
    entries = [{"id": f"film_{n}", "template": list(names)[n % 2]} for n in range(5)]
    (folder / "validation.json").write_text(json.dumps(entries))
    protocol = dataclasses.replace(find_protocol("ssv2_templates"), pinned={})
    figures = measure(protocol, DataFolder(folder), embedder(model)).figures
    assert list(figures) == [
        *("template to video", "video to template"),
        *("template to video, frames reversed", "video to template, frames reversed"),
    ]


def test_dual_softmax_is_named_in_the_table_and_for_retrieval_only(model, folder, protocol):
    assert "not comparable" in table(measure(protocol, DataFolder(folder), embedder(model), dual=True))
    with pytest.raises(ValueError, match="--dual-softmax is for retrieval"):
        measure(find_protocol("ucf101"), DataFolder(folder), embedder(model), dual=True)
