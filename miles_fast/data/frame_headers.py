"""What an encoded frame says of itself, read without decoding it: its size, and whether it is cut off."""

from __future__ import annotations

import io

from miles_fast.data.shards import SampleError

MAX_FRAME_PIXELS = 8192 * 8192  # of pictures and videos: some bytes of header may ask for any memory
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # Huffman tables, reserved, arithmetic


def frame_size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) by the header. SampleError: not decodable, frame too large."""
    size = _jpeg_size(data) or _image_size(data, name)
    check_pixels(*size, name)
    return size


def check_pixels(width: int, height: int, name: str) -> None:
    """Refuse a size that no frame has. SampleError: frame too large."""
    if width * height > MAX_FRAME_PIXELS:
        raise SampleError(
            f"{name}: its header says {width}x{height} pixels, the limit is {MAX_FRAME_PIXELS}",
            "frame too large",
        )


def check_complete(data: bytes, name: str) -> None:
    """Refuse what DALI decodes to a damaged picture, or dies of. SampleError: truncated, not decodable."""
    if data[:2] != b"\xff\xd8":
        _image_size(data, name, verify=True)
    elif b"\xff\xd9" not in data[-64:]:
        raise SampleError(f"{name}: JPEG ends before its end marker", "truncated")


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG whose segments follow one another as they should, in a microsecond or two."""
    at, end = 2, len(data) - 9
    if data[:2] != b"\xff\xd8":
        return None
    while at <= end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _START_OF_FRAME:
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            return (width, height) if width and height else None
        if not 0xC0 <= marker < 0xFF or 0xD0 <= marker <= 0xDA:  # no length follows, or the picture does
            return None
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def _image_size(data: bytes, name: str, verify: bool = False) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            if verify:
                image.verify()
            return image.size
    except Image.DecompressionBombError as error:
        raise SampleError(f"{name}: {error}", "frame too large") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise SampleError(f"{name}: not a readable image ({error})", "not decodable") from error
