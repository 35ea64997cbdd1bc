"""Videos made for NVDEC: remuxed ones show the original's pixels bit for bit, transcoded ones the rest."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from miles_fast.data import clip_videos
from miles_fast.data.clip_sources import SourceClip
from miles_fast.data.clips import ClipDraw, read_clip
from miles_fast.data.preparation import PreparationError, PreparationOptions, prepare
from miles_fast.data.sampling import View
from miles_fast.data.shards import SampleError, ShardSet
from miles_fast.data.videos import EncodedVideo, read_frames

LEVELS = [20 + 8 * n for n in range(24)]


def everything(count: int) -> np.ndarray:
    return np.arange(count)


def made(source: bytes | Path, layout: str, **options) -> tuple[bytes, dict]:
    clip = SourceClip(video=source, pictures=(), captions=("said",), source={}, name="k")
    members = clip_videos.encode_video("k", clip, PreparationOptions(layout=layout, **options))
    assert list(members) == ["mp4", "txt", "json"] and members["txt"] == b"said"
    record = json.loads(members["json"])
    assert record["video_crc32"] == zlib.crc32(members["mp4"])
    return members["mp4"], record


def stored(data: bytes) -> tuple[int, int]:
    """Size that the mp4's own header promises: what DALI compares with the coded size."""
    place = data.rindex(b"avc1", 0, data.index(b"avcC") if b"avcC" in data else None) + 28
    return int.from_bytes(data[place : place + 2], "big"), int.from_bytes(data[place + 2 : place + 4], "big")


def cause(source, layout: str, **options) -> str:
    with pytest.raises(SampleError) as raised:
        made(source, layout, **options)
    assert layout == "transcode" or "--transcode" in str(raised.value)
    return raised.value.cause


@pytest.mark.parametrize("size", [(64, 48), (66, 50), (200, 150), (176, 144)])
def test_a_remuxed_clip_shows_the_same_pixels(encode_video, size):
    data = encode_video(LEVELS, size=size, options={"bf": "2"}, times=[*range(12), *range(20, 32)])
    copy, record = made(data, "remux")
    assert copy == made(data, "remux")[0]
    coded = tuple(-(-side // 16) * 16 for side in size)
    assert stored(copy) == (record["width"], record["height"]) == coded
    assert record.get("crop") == (None if coded == size else list(size))
    crop = tuple(record["crop"]) if "crop" in record else None
    original, info = read_frames(data, everything)
    whole, whole_info = read_frames(copy, everything)
    assert whole[0].shape == (*coded[::-1], 3) and whole_info.timestamps_seconds == info.timestamps_seconds
    shown, shown_info = read_frames(copy, everything, crop=crop)
    assert len(shown) == len(original) == record["num_frames"] == 24
    assert all(np.array_equal(one, other) for one, other in zip(shown, original, strict=True))
    assert (shown_info.width, shown_info.height) == shown_info.square_size == size
    assert record["source"]["width"] == size[0] and record["source"]["num_frames"] == 24


def test_remuxing_other_containers_and_hevc(encode_video):
    for options in ({"container": "matroska"}, {"codec": "libx265"}):
        if "codec" in options:
            options["options"] = {"x265-params": "log-level=0"}
        data = encode_video(LEVELS, size=(72, 56), **options)
        copy, record = made(data, "remux")
        original, _ = read_frames(data, everything)
        shown, info = read_frames(copy, everything, crop=tuple(record.get("crop", (72, 56))))
        assert all(np.array_equal(one, other) for one, other in zip(shown, original, strict=True)), options
        assert info.timestamps_seconds == pytest.approx([n / 30 for n in range(24)], abs=2e-3)


def test_what_cannot_be_remuxed_is_refused_by_cause(encode_video, real_clips):
    assert cause(encode_video(LEVELS, codec="libvpx", container="webm"), "remux") == "codec not remuxed"
    assert cause(encode_video(LEVELS, size=(72, 56), container="mpegts"), "remux") == "not remuxed"
    assert cause(encode_video(LEVELS, times=list(range(-6, 18)), gop=4), "remux") == "hidden frames"
    edge = real_clips / "edge"
    assert cause(edge / "decord_video_90.mov", "remux") == "rotated"
    picture = SourceClip(video=None, pictures=(b"",), captions=("x",), source={}, name="k")
    with pytest.raises(SampleError, match="prepare it as frames"):
        clip_videos.encode_video("k", picture, PreparationOptions(layout="remux"))


def test_a_crop_inside_the_frame_is_refused():
    data = _pattern_cropped_at(16)
    assert read_frames(data, everything)[0][0].shape[0] == 48  # FFmpeg keeps columns for its alignment
    assert cause(data, "remux") == "crop inside the frame"


def _pattern_cropped_at(offset: int) -> bytes:
    """An H.264 clip whose shown picture begins `offset` pixels inside the coded one."""
    import av
    from av.bitstream import BitStreamFilterContext

    plain, cropped = io.BytesIO(), io.BytesIO()
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    wanted = f"h264_metadata=crop_left={offset}:crop_top={offset}:crop_right=0:crop_bottom=0"
    with av.open(plain, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    plain.seek(0)
    with av.open(plain) as source, av.open(cropped, "w", format="mp4") as output:
        stream = source.streams.video[0]
        copy = output.add_stream_from_template(stream)
        crop = BitStreamFilterContext(wanted, stream, copy)
        copy.codec_context.width = copy.codec_context.height = 64 - offset
        for packet in [*source.demux(stream)]:
            for changed in crop.filter(packet if packet.size else None):
                changed.stream = copy
                output.mux(changed)
    return cropped.getvalue()


def test_a_transcoded_clip_has_the_size_rate_and_key_frames_asked_for(encode_video):
    import av

    data = encode_video([level for level in LEVELS for _ in range(4)], size=(200, 150))
    copy, record = made(data, "transcode", short_side=96, fps=10.0, gop=4)
    assert copy == made(data, "transcode", short_side=96, fps=10.0, gop=4)[0]
    assert stored(copy) == (record["width"], record["height"]) == (128, 96) and "crop" not in record
    frames, info = read_frames(copy, everything)
    assert info.num_frames == record["num_frames"] == 32
    assert info.timestamps_seconds == pytest.approx([n / 10 for n in range(32)])
    expected = [LEVELS[(3 * n + 1) // 4] for n in range(32)]
    assert [float(frame.mean()) for frame in frames] == pytest.approx(expected, abs=1.5)
    with av.open(io.BytesIO(copy)) as container:
        keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
    assert keys == [n % 4 == 0 for n in range(32)]


def test_without_a_rate_frames_keep_their_times(encode_video):
    times = [*range(12), *range(40, 52)]
    data = encode_video(LEVELS, container="matroska", times=times)
    copy, _ = made(data, "transcode")
    frames, info = read_frames(copy, everything)
    assert info.timestamps_seconds == pytest.approx([t / 30 for t in times], abs=2e-3)
    assert [float(frame.mean()) for frame in frames] == pytest.approx(LEVELS, abs=2)
    slow, record = made(encode_video(LEVELS[:6]), "transcode", fps=60.0)  # no frame is made up
    assert record["num_frames"] == 6 and read_frames(slow, everything)[1].duration_seconds == pytest.approx(
        0.2
    )


def test_transcoding_keeps_colours_and_sets_clips_upright(real_clips):
    for name in ("decord_video_90.mov", "tc_h264_10bits.mp4", "tc_testsrc2_vp9.webm", "tc_animated.gif"):
        path = real_clips / "edge" / name
        copy, _ = made(path, "transcode", short_side=192)
        original, info = read_frames(path, lambda count: np.array([0]))
        shown, _ = read_frames(copy, lambda count: np.array([0]))
        assert (shown[0].shape[0] > shown[0].shape[1]) == (info.height > info.width)
        assert shown[0].mean((0, 1)) == pytest.approx(original[0].mean((0, 1)), abs=3), name


@pytest.fixture
def tar(tmp_path, write_tar, encode_video) -> Path:
    members = []
    for number in range(6):
        vp9 = number == 2
        kind = {"codec": "libvpx", "container": "webm"} if vp9 else {}
        video = encode_video([level + number for level in LEVELS], size=(200, 150), **kind)
        members += [(f"k{number}.{'webm' if vp9 else 'mp4'}", video), (f"k{number}.txt", b"said")]
    return write_tar(tmp_path / "videos.tar", members)


def test_remuxed_shards_train_as_the_originals_do(tar, tmp_path):
    summary = prepare([tar], tmp_path / "out", PreparationOptions(layout="remux", workers=1))
    assert (summary.kept, summary.dropped) == (5, {"codec not remuxed": 1})
    shards, originals = ShardSet(summary.shards, missing_index="error"), ShardSet([tar])
    assert shards[0].extensions == ("json", "mp4", "txt")
    pixels = ClipDraw(num_frames=4, takes="pixels")
    for seed in range(3):
        one, other = (read_clip(s, 0, pixels, np.random.default_rng(seed)) for s in (shards, originals))
        assert one.view == other.view
        assert all(np.array_equal(a, b) for a, b in zip(one.frames, other.frames, strict=True))
    encoded = read_clip(shards, 0, ClipDraw(num_frames=4, takes="video"), np.random.default_rng(2))
    assert isinstance(encoded.frames, EncodedVideo)
    assert (encoded.frames.width, encoded.frames.height) == (200, 150)
    assert encoded.frames.shown_yx == (150 / 160, 200 / 208)
    assert encoded.view == other.view.within((150 / 160, 200 / 208))
    frames = prepare(
        summary.shards, tmp_path / "frames", PreparationOptions(workers=1, short_side=150)
    ).shards
    assert ShardSet(frames)[0].record()["width"] == 200
    again = prepare(summary.shards, tmp_path / "again", PreparationOptions(layout="remux", workers=1)).shards
    assert ShardSet(again)[0].record()["crop"] == [200, 150]


def test_a_view_of_a_frame_that_is_not_all_shown():
    view = View(start_yx=(0.5, 0.25), end_yx=(1.0, 0.75), mirror=True)
    assert view.within((0.5, 0.8)) == View(start_yx=(0.25, 0.2), end_yx=(0.5, 0.75 * 0.8), mirror=True)


def test_damaged_video_members_are_refused(tmp_path, write_tar, encode_video):
    video = encode_video(LEVELS)
    records = {"a": {"video_crc32": 1}, "b": {"crop": [999, 9]}, "c": {"crop": "x"}}
    members = [
        part
        for key, record in records.items()
        for part in (
            (f"{key}.mp4", video),
            (f"{key}.txt", b"x"),
            (f"{key}.json", json.dumps(record).encode()),
        )
    ]
    shards = ShardSet([write_tar(tmp_path / "x.tar", members)])
    for number, wanted in enumerate(("wrong checksum", "wrong crop", "wrong crop")):
        for takes in ("pixels", "video"):
            with pytest.raises(SampleError) as raised:
                read_clip(shards, number, ClipDraw(num_frames=2, takes=takes), None)
            assert raised.value.cause == wanted


def test_options_of_videos():
    with pytest.raises(PreparationError, match="gop is 1"):
        PreparationOptions(layout="transcode", gop=1)
    with pytest.raises(PreparationError, match="remux keeps the frames"):
        PreparationOptions(layout="remux", fps=8.0)
    with pytest.raises(PreparationError, match="layout is 'x'"):
        PreparationOptions(layout="x")
