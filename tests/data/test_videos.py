from __future__ import annotations

import io
import json

import numpy as np
import pytest

from miles_fast.data import decoding
from miles_fast.data.sampling import segment_frames
from miles_fast.data.shards import SampleError
from miles_fast.data.videos import read_frames

LEVELS = [10 + 9 * n for n in range(24)]


def everything(count: int) -> np.ndarray:
    return np.arange(count)


def means(frames) -> list[float]:
    return [float(frame.mean()) for frame in frames]


def test_frames_times_and_sizes(encode_video, tmp_path):
    data = encode_video(LEVELS)
    path = tmp_path / "-clip.mp4"
    path.write_bytes(data)
    for source in (data, path, str(path)):
        frames, info = read_frames(source, everything)
        assert means(frames) == pytest.approx(LEVELS, abs=2)
        assert frames[0].shape == (48, 64, 3) and frames[0].dtype == np.uint8
        assert (info.num_frames, info.width, info.height, info.rotation) == (24, 64, 48, 0)
        assert info.codec == "h264"
        assert info.duration_seconds == pytest.approx(0.8, abs=1e-3)
        assert info.timestamps_seconds == pytest.approx([n / 30 for n in range(24)], abs=1e-3)


@pytest.mark.parametrize("gop", [1, 6, 250])
@pytest.mark.parametrize("chosen", [[0], [23], [2, 8, 14, 20], [5, 5, 17], [22, 23], list(range(24))])
def test_chosen_frames_are_the_ones_named(encode_video, gop, chosen):
    frames, info = read_frames(encode_video(LEVELS, gop=gop), lambda count: np.array(chosen))
    assert means(frames) == pytest.approx([LEVELS[n] for n in chosen], abs=2)
    assert info.timestamps_seconds == pytest.approx([n / 30 for n in chosen], abs=1e-3)


def test_jumps_spare_decoding(encode_video, monkeypatch):
    fed = []
    decoded = decoding._Feed._decoded
    monkeypatch.setattr(
        decoding._Feed, "_decoded", lambda self: (fed.append(self.position), decoded(self))[1]
    )
    data = encode_video(LEVELS * 5, gop=12, options={"bf": "0", "tune": "zerolatency", "sc_threshold": "0"})
    frames, _ = read_frames(data, lambda count: np.array([1, 61, 110]))
    assert means(frames) == pytest.approx([LEVELS[1], LEVELS[61 % 24], LEVELS[110 % 24]], abs=2)
    assert len(fed) < 30 and {60, 108} <= set(fed)


@pytest.mark.parametrize(
    "codec, container",
    [("libx264", "matroska"), ("libvpx", "webm"), ("mpeg4", "avi"), ("mpeg2video", "mpeg"), ("gif", "gif")],
)
def test_formats_whose_headers_lie_or_lack_times(encode_video, codec, container):
    import av

    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    frames, info = read_frames(encode_video(LEVELS, codec=codec, container=container), everything)
    assert info.num_frames == len(frames) == 24
    assert means(frames) == pytest.approx(LEVELS, abs=20 if codec == "gif" else 5)


def test_variable_rate_and_late_start(encode_video):
    times = [30, 31, 32, 40, 70, 71, 100]
    frames, info = read_frames(encode_video(LEVELS[:7], container="matroska", times=times), everything)
    assert means(frames) == pytest.approx(LEVELS[:7], abs=2)
    assert info.timestamps_seconds == pytest.approx([(t - 30) / 30 for t in times], abs=2e-3)


def test_one_frame(encode_video):
    frames, info = read_frames(encode_video([200]), lambda count: segment_frames(count, 4))
    assert means(frames) == pytest.approx([200] * 4, abs=2)
    assert info.num_frames == 1 and info.timestamps_seconds == (0.0,) * 4


def test_second_video_stream_and_sound_are_left_alone():
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        streams = [output.add_stream("mpeg4", rate=30) for _ in range(2)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(6):
            for stream, level in zip(streams, (50, 200), strict=True):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
                frame.pts = number
                output.mux(stream.encode(frame))
        for stream in streams:
            output.mux(stream.encode(None))
    frames, info = read_frames(buffer.getvalue(), everything)
    assert info.num_frames == 6 and means(frames) == pytest.approx([50] * 6, abs=3)


def test_transparency_is_white():
    from PIL import Image

    pictures = [Image.new("RGBA", (32, 32), (0, 0, 0, 0)) for _ in range(2)]
    pictures[1].paste((255, 0, 0, 255), (0, 0, 16, 32))
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], disposal=2)
    frames, _ = read_frames(buffer.getvalue(), everything)
    assert frames[-1][16, 24].tolist() == [255, 255, 255]
    assert frames[-1][16, 4].tolist() == [255, 0, 0]


def _cause(source, choose=everything, **options) -> str:
    with pytest.raises(SampleError) as raised:
        read_frames(source, choose, **options)
    return raised.value.cause


def test_broken_files_have_causes(encode_video, tmp_path):
    data = encode_video(LEVELS, container="mp4", options={"movflags": "faststart"})
    assert _cause(b"") == "not decodable"
    assert _cause(b"<html>not found</html>" * 40) == "not decodable"
    assert _cause(data[: len(data) // 2]) in ("not decodable", "truncated")
    assert _cause(b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n") == "not decodable"
    assert _cause(tmp_path / "absent.mp4") == "not readable"


def test_damage_inside_the_stream(encode_video):
    rng = np.random.default_rng(0)
    noise = [int(level) for level in rng.integers(20, 230, 48)]
    data = bytearray(encode_video(noise, container="matroska", size=(128, 96)))
    data[len(data) // 3 : 2 * len(data) // 3] = bytes(len(data) // 3)
    try:
        frames, info = read_frames(bytes(data), everything)
    except SampleError as error:
        assert error.cause in ("not decodable", "missing frames", "truncated", "no frames")
    else:
        assert len(frames) == info.num_frames < 48


def test_sound_alone_is_no_video():
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    assert _cause(buffer.getvalue()) == "no video stream"


def test_choice_out_of_range_is_the_callers_mistake(encode_video):
    for wrong in ([24], [-1], []):
        with pytest.raises(ValueError, match="chosen out of 24") as raised:
            read_frames(encode_video(LEVELS), lambda count, wrong=wrong: np.array(wrong))
        assert not isinstance(raised.value, SampleError)


def test_hdr_is_refused_by_name(real_clips):
    path = real_clips / "edge" / "tc_nasa_13013_hdr.mp4"
    assert _cause(path, lambda count: np.arange(1)) == "hdr video"


EDGE_CAUSES = {
    "decord_corrupted.mp4": "not decodable",
    "made_truncated_half.mp4": "not decodable",
    "made_truncated_moov_first.mp4": "truncated",
    "made_empty.mp4": "not decodable",
    "made_not_a_video.mp4": "not decodable",
    "tc_bt2020_10bit.mp4": "hdr video",
    "tc_nasa_13013_hdr.mp4": "hdr video",
}


def test_awkward_real_files(real_clips, capfd):
    entries = [e for e in json.loads((real_clips / "manifest.json").read_text()) if e["set"] == "edge"]
    causes = {}
    for entry in entries:
        try:
            frames, info = read_frames(
                (real_clips / entry["file"]).read_bytes(), lambda count: segment_frames(count, min(count, 3))
            )
        except SampleError as error:
            causes[entry["file"].removeprefix("edge/")] = error.cause
            continue
        size = (entry["w"], entry["h"])
        assert (info.width, info.height) == (size[::-1] if abs(entry["rotation"]) == 90 else size), entry[
            "file"
        ]
        assert info.num_frames == entry["frames"], entry["file"]
        assert all(frame.shape == (info.height, info.width, 3) for frame in frames)
        assert all(
            later > earlier
            for earlier, later in zip(info.timestamps_seconds, info.timestamps_seconds[1:], strict=False)
        )
        if entry["duration"]:
            assert info.duration_seconds == pytest.approx(entry["duration"], abs=0.1), entry["file"]
    assert causes == EDGE_CAUSES
    assert capfd.readouterr().err == ""


def test_rotation_turns_the_right_way(real_clips):
    """Looked at once: at -90 degrees the letters stand upright after three left turns."""
    import av

    path = real_clips / "edge" / "decord_video_90.mov"
    upright, info = read_frames(path, lambda count: np.arange(1))
    with av.open(str(path)) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert info.rotation == -90
    assert np.array_equal(upright[0], np.rot90(stored, 3))


def test_real_clips_have_the_frames_their_manifest_says(real_clips):
    entries = [e for e in json.loads((real_clips / "manifest.json").read_text()) if e["set"] != "edge"]
    for entry in entries[::8]:
        _, info = read_frames(real_clips / entry["file"], lambda count: np.zeros(1))
        assert info.num_frames == entry["frames"], entry["file"]
