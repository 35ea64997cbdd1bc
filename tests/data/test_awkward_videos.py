"""Videos whose headers say more than their pixels: aspects, turns, edit lists, depths, ranges, HDR."""

from __future__ import annotations

import io
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from miles_fast.data import tone_map
from miles_fast.data.preparation import PreparationError, PreparationOptions, prepare
from miles_fast.data.shards import SampleError, ShardSet
from miles_fast.data.videos import locate_frames, read_frames


def made(
    planes: list,
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv444p",
    container: str = "mp4",
    aspect: Fraction | None = None,
    rotation: int | None = None,
    colour: dict | None = None,
    first_time: int = 0,
    movflags: str = "",
) -> bytes:
    """A lossless video of frames that are given as planes (Y, U, V)."""
    import av

    buffer = io.BytesIO()
    lossless = {"libx264": {"qp": "0"}, "libx265": {"x265-params": "lossless=1:log-level=0"}}
    with av.open(buffer, "w", format=container, options={"movflags": movflags} if movflags else {}) as output:
        stream = output.add_stream(codec, rate=30, options=lossless.get(codec, {}))
        stream.height, stream.width = planes[0][0].shape
        stream.pix_fmt = pixel_format
        stream.gop_size = 4
        stream.codec_context.max_b_frames = 0
        for name, value in (colour or {}).items():
            setattr(stream.codec_context, name, value)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number, picture in enumerate(planes):
            frame = av.VideoFrame(stream.width, stream.height, pixel_format)
            for plane, values in zip(frame.planes, picture, strict=True):
                rows = np.zeros((plane.height, plane.line_size // values.itemsize), values.dtype)
                rows[:, : values.shape[1]] = values
                plane.update(rows.tobytes())
            for name, value in (colour or {}).items():
                setattr(frame, name, value)
            frame.pts, frame.time_base = first_time + number, Fraction(1, 30)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def grey(level: int, height: int, width: int, chroma: int = 1, dtype=np.uint8) -> tuple:
    depth = 128 if dtype is np.uint8 else 512
    small = np.full((-(-height // chroma), -(-width // chroma)), depth, dtype)
    return np.full((height, width), level, dtype), small, small


def read(data: bytes, *chosen: int, **options):
    return read_frames(data, lambda count: np.array(chosen), **options)


@pytest.fixture
def prepared(tmp_path, write_tar):
    def prepare_one(data: bytes, **options):
        tar = write_tar(tmp_path / "x.tar", [("a.mp4", data), ("a.txt", b"said")])
        wanted = PreparationOptions(**{"workers": 1, "frames": 2, "short_side": 48} | options)
        sample = ShardSet(prepare([tar], tmp_path / "out", wanted).shards)[0]
        return Image.open(io.BytesIO(sample.read("00.jpg"))), sample.record()

    return prepare_one


@pytest.mark.parametrize("aspect, square", [(Fraction(16, 11), (128, 48)), (Fraction(8, 11), (88, 66))])
def test_anamorphic_pixels_become_square(prepared, aspect, square):
    data = made([grey(90, 48, 88)] * 4, aspect=aspect)
    frames, info = read(data, 0)
    assert frames[0].shape == (48, 88, 3) and (info.width, info.height) == (88, 48)
    assert info.square_size == square and info.pixel_aspect == aspect
    picture, record = prepared(data)
    assert picture.size == (record["width"], record["height"]) == (128 if aspect > 1 else 64, 48)
    assert record["source"]["pixel_aspect"] == f"{aspect.numerator}:{aspect.denominator}"
    assert (record["source"]["width"], record["source"]["height"]) == (88, 48)


def test_anamorphic_pixels_of_a_turned_video(prepared):
    data = made([grey(90, 48, 88)] * 4, aspect=Fraction(16, 11), rotation=90)
    _, info = read(data, 0)
    assert (info.width, info.height, info.square_size) == (48, 88, (48, 128))
    assert prepared(data)[0].size == (48, 128)


def test_anamorphic_pixels_shape_the_crops_of_hardware_decoding(encode_video):
    data = made([grey(90, 144, 176, 2)] * 3, aspect=Fraction(2), pixel_format="yuv420p")
    found = locate_frames(data, lambda count: np.array([0]))
    assert (found.width, found.height) == (352, 144)


def test_absurd_pixels_are_refused():
    with pytest.raises(SampleError, match="pixels 20:1 wide") as raised:
        read(made([grey(90, 48, 88)], aspect=Fraction(20)), 0)
    assert raised.value.cause == "pixel aspect"


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_turned_videos_are_set_upright(rotation):
    y = np.full((32, 48), 40, np.uint8)
    y[:16, :24] = 200  # the stored picture's upper left corner is bright
    frames, info = read(made([(y, *grey(0, 32, 48)[1:])], rotation=rotation), 0)
    stored = read(made([(y, *grey(0, 32, 48)[1:])]), 0)[0][0]
    assert np.array_equal(frames[0], np.rot90(stored, rotation // 90))
    assert frames[0].shape[:2] == ((48, 32) if rotation != 180 else (32, 48))


def test_an_edit_list_hides_the_frames_before_it():
    planes = [grey(20 + 10 * n, 48, 64) for n in range(16)]
    data = made(planes, first_time=-6)  # mp4 writes times below 0 as an edit list
    frames, info = read(data, 0, 4, 9)
    assert info.num_frames == 10
    shown = [read(made([planes[n]]), 0)[0][0] for n in (6, 10, 15)]
    assert all(np.array_equal(one, other) for one, other in zip(frames, shown, strict=True))
    assert info.timestamps_seconds == pytest.approx((0, 4 / 30, 9 / 30), abs=1e-3)
    assert info.duration_seconds == pytest.approx(10 / 30, abs=1e-3)


def test_fragmented_mp4():
    planes = [grey(20 + 10 * n, 48, 64) for n in range(16)]
    fragmented = made(planes, movflags="frag_keyframe+empty_moov+default_base_moof")
    assert fragmented.count(b"moof") == 4
    frames, info = read(fragmented, 0, 7, 15)
    plain, plain_info = read(made(planes), 0, 7, 15)
    assert all(np.array_equal(one, other) for one, other in zip(frames, plain, strict=True))
    assert (info.num_frames, info.timestamps_seconds) == (16, plain_info.timestamps_seconds)
    cut = fragmented[: fragmented.rindex(b"mdat") + 30]
    try:  # without a table of all frames, a cut can only be seen where it hits a frame
        assert read(cut, 0)[1].num_frames < 16
    except SampleError as error:
        assert error.cause in ("truncated", "not decodable", "missing frames")


@pytest.mark.parametrize("height, width", [(49, 65), (1, 1), (3, 200), (48, 67)])
def test_odd_sizes(prepared, height, width):
    ramp = np.tile(np.linspace(30, 220, width).astype(np.uint8), (height, 1))
    data = made([(ramp, *grey(0, height, width)[1:])] * 2)
    frames, info = read(data, 0)
    assert frames[0].shape == (height, width, 3) and (info.width, info.height) == (width, height)
    expected = (ramp.astype(float) - 16) * 255 / 219  # the far edges are the picture's, not the padding's
    assert np.abs(frames[0].mean(2) - expected).max() < 2
    assert prepared(data)[0].size == (width, height) if height < 48 else True


@pytest.mark.parametrize("colour_range, white", [(1, 255), (2, 235)])
@pytest.mark.parametrize("pixel_format", ["yuv444p", "yuv444p10le"])
def test_depth_and_range(pixel_format, colour_range, white):
    deep = "10" in pixel_format
    planes = grey(940 if deep else 235, 48, 64, dtype=np.uint16 if deep else np.uint8)
    data = made([planes], pixel_format=pixel_format, colour={"color_range": colour_range})
    assert abs(int(read(data, 0)[0][0].mean()) - white) <= 1


def pq(nits: float) -> float:
    """The PQ signal of a brightness (SMPTE ST 2084)."""
    power = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


HDR10 = {"color_trc": 16, "color_primaries": 9, "colorspace": 9, "color_range": 1}


def test_hdr_is_refused_or_mapped(tmp_path, prepared):
    nits = [0, 1, 10, 100, 203, 1000, 10000]
    y = np.repeat([round(64 + 876 * pq(n)) for n in nits], 16).astype(np.uint16)
    planes = (np.tile(y, (48, 1)), *grey(0, 48, 112, dtype=np.uint16)[1:])
    data = made([planes] * 2, pixel_format="yuv444p10le", colour=HDR10)
    with pytest.raises(PreparationError, match="'hdr video': 1"):
        prepared(data)
    frames, _ = read(data, 0, allow_hdr=True)
    levels = [int(level) for level in frames[0][24, 8::16].mean(1)]
    assert levels[0] == 0 and sorted(levels) == levels and levels[-1] >= 250
    assert levels[2] < 75 < 115 < levels[3] < levels[4] < 205  # paper white is bright, with room above it
    assert np.ptp(frames[0][24, 8::16], axis=1).max() <= 2  # grey stays grey


def test_real_hdr_is_mapped(real_clips):
    path = real_clips / "edge" / "tc_bt2020_10bit.mp4"
    frames, _ = read_frames(path, lambda count: np.array([0]), allow_hdr=True)
    # Bars of BT.2020's full colours, farther than an ordinary screen goes: each ends at its nearest.
    assert frames[0][200, 100].tolist() == pytest.approx([0, 255, 0], abs=6)
    assert frames[0][200, 150].tolist() == pytest.approx([255, 255, 0], abs=6)


def test_colours_that_are_not_known_stay_refused():
    data = made(
        [grey(512, 48, 64, dtype=np.uint16)], pixel_format="yuv444p10le", colour=HDR10 | {"colorspace": 10}
    )
    with pytest.raises(SampleError, match="matrix 10") as raised:
        read(data, 0, allow_hdr=True)
    assert raised.value.cause == "hdr video"
    with pytest.raises(SampleError, match="Dolby Vision"):
        tone_map.refuse_dolby("dvh1", "x")


def test_an_ffmpeg_without_the_filter_is_named_at_once(tmp_path, monkeypatch):
    def lacking(*_):
        raise ValueError("no option out_transfer")

    monkeypatch.setattr(tone_map, "_graph", lacking)
    with pytest.raises(PreparationError, match="no option out_transfer.*install av"):
        prepare([tmp_path], tmp_path / "out", PreparationOptions(allow_hdr=True))
