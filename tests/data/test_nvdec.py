"""Videos that DALI decodes itself: NVDEC on a GPU; the same graph runs VP9 on the CPU."""

import json

import numpy as np
import pytest
import torch
from tiny import caption, tiny_config, write_data

from miles_fast.data import loader as loader_module
from miles_fast.data.augmentation import HardwareDecodeError, build_augmentation
from miles_fast.data.batches import Quarantine
from miles_fast.data.clips import ClipDraw, read_clip
from miles_fast.data.loader import Loader
from miles_fast.data.order import Share
from miles_fast.data.sampling import View, evaluation_view
from miles_fast.data.shards import SampleError, ShardSet
from miles_fast.data.videos import EncodedVideo, locate_frames, read_frames
from miles_fast.models.text_encoder import load_tokenizer

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
CPU = torch.device("cpu")
WHOLE = View(start_yx=(0, 0), end_yx=(1, 1), mirror=False)
MIRRORED = View(start_yx=(0, 0), end_yx=(1, 1), mirror=True)


SIZE = (176, 144)  # NVDEC takes nothing smaller


def vp9(encode_video, levels):
    options = {"deadline": "realtime", "lag-in-frames": "0"}
    return encode_video(levels, codec="libvpx-vp9", options=options, size=SIZE)


def graph(device=CPU, num_clips=4):
    return build_augmentation(
        "auto", takes="video", num_clips=num_clips, num_frames=2, size=32, device=device, threads=1
    )


def test_frames_are_located_by_display_order(encode_video):
    data = encode_video(range(0, 240, 10), options={"bf": "2"}, size=SIZE)
    found = locate_frames(data, lambda count: np.array([count - 1, 3, 3]))
    assert isinstance(found, EncodedVideo) and found.frames.tolist() == [23, 3, 3]
    assert (found.height, found.width) == (144, 176) and found.data.tobytes() == data


@pytest.mark.parametrize(
    "damage, cause", [(lambda d: d[: len(d) // 2], "not decodable"), (lambda d: b"", None)]
)
def test_what_is_broken_never_reaches_the_hardware(encode_video, damage, cause):
    with pytest.raises(SampleError) as caught:
        locate_frames(damage(encode_video([9] * 30)), lambda count: np.array([0]))
    assert cause in (None, caught.value.cause)


def test_small_videos_and_other_codecs_stay_with_the_cpu(encode_video):
    assert locate_frames(encode_video([9] * 9, size=(176, 142)), lambda count: np.array([0])) is None
    gif = encode_video([0, 90, 200], codec="gif", container="gif")
    assert locate_frames(gif, lambda count: np.array([0])) is None


def test_real_rotated_deep_and_exotic_clips_stay_with_the_cpu(real_clips):
    listed = {clip["file"]: clip for clip in json.loads((real_clips / "manifest.json").read_text())}
    taken = 0
    for name, clip in listed.items():
        try:
            found = locate_frames((real_clips / name).read_bytes(), lambda count: np.array([0]))
        except SampleError:
            continue
        if found is not None:
            taken += 1
            assert clip["rotation"] == 0 and "10" not in clip["pix_fmt"], name
            assert clip["codec"] in ("h264", "hevc", "vp8", "vp9", "mpeg4"), name
    assert taken > 100


def test_the_graph_decodes_the_named_frames_and_keeps_the_order_of_the_clips(encode_video):
    levels = [40, 80, 120, 160, 200, 240]
    videos = [vp9(encode_video, levels), vp9(encode_video, levels[::-1])]
    clips = [locate_frames(data, lambda count: np.array([1, 4])) for data in videos]
    pixels, _ = read_frames(videos[0], lambda count: np.array([0, 2]))
    augmentation = graph()
    augmentation.submit([clips[0], pixels, clips[1]], [WHOLE, MIRRORED, WHOLE])
    mixed = augmentation.collect()
    assert mixed.shape == (3, 2, 3, 32, 32)
    grey = (mixed.mean((2, 3, 4)) * 0.2265 + 0.4490) * 255  # the mean of the three channels' statistics
    expected = torch.tensor([[80.0, 200.0], [40.0, 120.0], [200.0, 80.0]])
    torch.testing.assert_close(grey, expected, atol=3.0, rtol=0)


def test_a_clip_that_does_not_decode_costs_its_batch_alone(encode_video):
    good = locate_frames(vp9(encode_video, [50, 100, 150]), lambda count: np.array([0, 2]))
    bad = EncodedVideo(
        data=np.frombuffer(b"no video" * 99, np.uint8), frames=good.frames, height=48, width=64
    )
    short = EncodedVideo(data=good.data, frames=np.array([0, 9], np.int32), height=144, width=176)
    augmentation = graph()
    for spoiled in (bad, short):
        augmentation.submit([good, spoiled], [WHOLE, WHOLE])
        with pytest.raises(HardwareDecodeError):
            augmentation.collect()
        augmentation.submit([good], [WHOLE])
        assert augmentation.collect().std() > 0.1


@pytest.fixture
def root(tmp_path, encode_video, write_tar):
    write_data(tmp_path, 4)
    for codec in ("h264", "vp9"):
        members = []
        for number in range(6):
            levels = [(37 * number + 11 * frame) % 256 for frame in range(12)]
            video = vp9(encode_video, levels) if codec == "vp9" else encode_video(levels, size=SIZE)
            members += [(f"v{number}.mp4", video), (f"v{number}.txt", caption(number).encode())]
        write_tar(tmp_path / f"{codec}.tar", members)
    return tmp_path


def video_batches(root, decoder, device=CPU, count=3, codec="h264"):
    data = {
        **vars(tiny_config(root).data),
        "train": [{"shards": [str(root / f"{codec}.tar")]}],
        "evaluation": [],
        "video_decoder": decoder,
        "decode_workers": 1,
    }
    config = tiny_config(root, data=data)
    dealer = Loader(
        config.data,
        image_size=32,
        tokenizer=load_tokenizer(config.model.text.tokenizer_source),
        share=Share(batch=4),
        seed=5,
        device=device,
        quarantine=Quarantine(None),
    )
    batches = dealer.batches(0)
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


def test_nvdec_without_a_gpu_is_refused(root):
    with pytest.raises(ValueError, match="video_decoder = nvdec needs a CUDA GPU; use cpu"):
        video_batches(root, "nvdec")


def test_batches_decoded_by_dali_equal_pyavs(root, monkeypatch, caplog):
    monkeypatch.setattr(loader_module, "_input", lambda *_: "video")
    by_dali = video_batches(root, "nvdec", codec="vp9")
    monkeypatch.undo()
    for one, two in zip(by_dali, video_batches(root, "cpu", codec="vp9"), strict=True):
        assert one.keys == two.keys and torch.equal(one.token_ids_BL, two.token_ids_BL)
        assert 0 < (one.video_BTCHW - two.video_BTCHW).abs().mean() < 0.1  # a grey level is 0.017
    assert "NVDEC failed" not in caplog.text


def test_pyav_decodes_the_same_clips_where_the_hardware_fails(root, monkeypatch, caplog):
    # DALI's CPU build has no H.264, so that every batch fails as a batch with a bad clip would on a GPU.
    monkeypatch.setattr(loader_module, "_input", lambda *_: "video")
    fallen_back = video_batches(root, "nvdec")
    monkeypatch.undo()
    assert "NVDEC failed on a batch" in caplog.text
    for one, two in zip(fallen_back, video_batches(root, "cpu"), strict=True):
        assert one.keys == two.keys
        assert torch.equal(one.video_BTCHW, two.video_BTCHW)
        assert torch.equal(one.token_ids_BL, two.token_ids_BL)


@pytest.mark.gpu
def test_nvdec_batches_equal_pyavs(root):
    cuda = torch.device("cuda", 0)
    for one, two in zip(*(video_batches(root, kind, cuda) for kind in ("nvdec", "cpu")), strict=True):
        assert one.keys == two.keys
        assert (one.video_BTCHW - two.video_BTCHW).abs().float().mean() < 0.1  # a grey level is 0.017


@pytest.mark.gpu
def test_nvdec_decodes_real_clips_as_pyav_does(real_clips):
    clips, differences = 0, {}
    augmentation = graph(torch.device("cuda", 0), num_clips=1)
    for path in sorted(
        path for path in real_clips.rglob("*") if path.suffix in (".mp4", ".mkv", ".webm", ".mov")
    ):
        data = path.read_bytes()
        try:
            video = locate_frames(data, lambda count: np.array([count // 4, 3 * count // 4]))
            pixels, info = read_frames(data, lambda count: np.array([count // 4, 3 * count // 4]))
        except SampleError:
            continue
        if video is None:
            continue
        found = []
        for frames in (video, pixels):
            augmentation.submit([frames], [evaluation_view(info.height, info.width)])
            found.append(augmentation.collect().float())
        differences[path.name] = float((found[0] - found[1]).abs().mean())
        clips += 1
    print(sorted(differences.items(), key=lambda pair: -pair[1])[:12])
    assert clips > 100
    assert max(differences.values()) < 0.25, differences  # wrong frames differ by about 1


def test_a_video_among_frame_shards_is_counted_as_bad(root):
    shards = ShardSet([root / "h264.tar"])
    with pytest.raises(SampleError, match="its layout is video") as caught:
        read_clip(shards, 0, ClipDraw(num_frames=2, takes="jpeg"), None)
    assert caught.value.cause == "other layout"
