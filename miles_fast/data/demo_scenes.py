"""What a demo clip says and shows: two shapes that move one after the other, drawn from a seed.

In the first half of a clip the first-named object moves, in the second half the other one; otherwise both
rest. Colour, shape, size, direction of motion and order of events are all needed to tell captions apart.
Certain (colour, shape) and (shape, direction) pairs never occur in training; every held-out clip has one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product

import numpy as np

COLOURS = {
    "red": (225, 25, 30),
    "green": (30, 165, 45),
    "blue": (45, 75, 245),
    "yellow": (245, 225, 40),
    "purple": (150, 40, 200),
    "cyan": (50, 215, 225),
    "orange": (250, 130, 15),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 16 / 96, "large": 28 / 96}  # width of the object over the width of the frame
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x, y; y grows downwards
TEMPLATES = (
    "{0} moves {2}, then {1} moves {3}",
    "first {0} moves {2}, after that {1} moves {3}",
    "{0} goes {2} before {1} goes {3}",
)
HELDOUT_LOOKS = frozenset(
    [("red", "star"), ("green", "circle"), ("blue", "triangle")]
    + [("yellow", "cross"), ("purple", "square"), ("cyan", "ring")]
)
HELDOUT_MOTIONS = frozenset([("circle", "up"), ("square", "left"), ("triangle", "right"), ("star", "down")])
SPLITS = ("train", "heldout")

_MARGIN_PIXELS = 1.0
_STREAM_SALT = 0xDE40  # keeps these draws apart from training's own streams of the same seed


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides the corpus' bytes; raise `version` whenever the generator itself changes them.

    `pixels` is the side of the square frame, `travel` the length of a motion over that side. A motion is
    short beside the frame on purpose: the longer it is, the more the place of a resting object says about its
    direction. From exact boxes in one frame, left and right are told apart 50 to 55 % of the time in
    mid-motion and 75 % at rest (all four directions: 40 %); at travel 0.35 it is 93 % at rest.
    Raises ValueError, with the key and the value, for a recipe that cannot be drawn.
    """

    seed: int = 0
    num_train: int = 4096
    num_heldout: int = 512
    frames: int = 16
    fps: int = 8
    gop: int = 8
    pixels: int = 96
    travel: float = 0.25
    crf: int = 20
    shard_clips: int = 512
    version: int = 1

    def __post_init__(self) -> None:
        num_heldout_meanings = len(_meaning_codes("heldout"))
        checks = [
            ("seed", self.seed >= 0, "at least 0"),
            ("num_train", self.num_train >= 1, "at least 1"),
            ("num_heldout", 1 <= self.num_heldout <= num_heldout_meanings, f"1 to {num_heldout_meanings}"),
            ("frames", self.frames >= 4 and self.frames % 2 == 0, "even and at least 4"),
            ("fps", self.fps >= 1, "at least 1"),
            ("gop", self.gop >= 1, "at least 1"),
            ("pixels", self.pixels >= 48 and self.pixels % 16 == 0, "a multiple of 16 and at least 48"),
            ("travel", 0 < self.travel <= 0.35, "above 0 and at most 0.35"),
            ("crf", 0 <= self.crf <= 51, "0 to 51"),
            ("shard_clips", self.shard_clips >= 1, "at least 1"),
        ]
        for name, holds, allowed in checks:
            if not holds:
                raise ValueError(f"demo recipe: {name}={getattr(self, name)} must be {allowed}")

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that differ for every different recipe."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Mover:
    """One object and its motion, as words of the caption."""

    colour: str
    shape: str
    size: str
    direction: str

    def is_heldout(self) -> bool:
        """Whether the object or its motion is one of the pairs that training never shows."""
        return (self.colour, self.shape) in HELDOUT_LOOKS or (self.shape, self.direction) in HELDOUT_MOTIONS


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What a clip shows: `first` moves in its first half, `second` in its second half."""

    first: Mover
    second: Mover

    def caption(self, template: int) -> str:
        """The meaning in the words of TEMPLATES[template]."""
        names = [f"a {mover.size} {mover.colour} {mover.shape}" for mover in (self.first, self.second)]
        return TEMPLATES[template].format(*names, self.first.direction, self.second.direction)


@lru_cache(maxsize=1)
def _all_movers() -> list[Mover]:
    return [
        Mover(colour=colour, shape=shape, size=size, direction=direction)
        for colour, shape, size, direction in product(COLOURS, SHAPES, SIZES, DIRECTIONS)
    ]


@lru_cache(maxsize=len(SPLITS))
def _meaning_codes(split: str) -> np.ndarray:
    """All (first, second) indices into `_all_movers` that `split` may show: (N, 2) integers."""
    movers = _all_movers()
    colour = np.array([mover.colour for mover in movers])
    shape = np.array([mover.shape for mover in movers])
    heldout = np.array([mover.is_heldout() for mover in movers])
    distinct = (colour[:, None] != colour) & (shape[:, None] != shape)
    has_heldout = heldout[:, None] | heldout
    return np.argwhere(distinct & (has_heldout if split == "heldout" else ~has_heldout))


@lru_cache(maxsize=4)
def _heldout_order(seed: int) -> np.ndarray:
    return clip_stream(seed, "heldout", 0, purpose=2).permutation(len(_meaning_codes("heldout")))


def clip_stream(seed: int, split: str, index: int, purpose: int = 0) -> np.random.Generator:
    """Random stream of one clip, apart for each `purpose`: picture (0), meaning (1), held-out order (2)."""
    key = (seed, SPLITS.index(split), index, purpose, _STREAM_SALT)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def draw_meaning(seed: int, split: str, index: int) -> Meaning:
    """Meaning of clip `index`: drawn at random in training, and never twice in the held-out split.

    Raises ValueError for an unknown split and for an index outside it.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {SPLITS}")
    codes = _meaning_codes(split)
    if index < 0 or (split == "heldout" and index >= len(codes)):
        raise ValueError(f"index={index} is outside split {split!r}: it has {len(codes)} different meanings")
    if split == "heldout":
        row = _heldout_order(seed)[index]
    else:
        row = clip_stream(seed, split, index, purpose=1).integers(len(codes))
    movers = _all_movers()
    first, second = codes[row]
    return Meaning(first=movers[first], second=movers[second])


def draw_boxes(meaning: Meaning, stream: np.random.Generator, recipe: Recipe | None = None) -> np.ndarray:
    """Boxes of both objects in every frame: (2, T, 4) float64, x0 y0 x1 y1 in pixels (0 is the edge).

    The middle of a path is uniform over the places where the whole path stays inside the frame, the same for
    a direction and its opposite. Placements where the boxes overlap in any frame are drawn again.
    """
    recipe = recipe or Recipe()
    steps = recipe.frames // 2 - 1
    times = np.arange(recipe.frames)
    movers = (meaning.first, meaning.second)
    half_width = np.array([_width(mover, recipe) / 2 for mover in movers])
    progress = np.stack([np.clip((times - start) / steps, 0, 1) for start in (0, recipe.frames // 2)])
    heading = np.array([DIRECTIONS[mover.direction] for mover in movers]) * recipe.travel * recipe.pixels
    offset = (progress[:, :, None] - 0.5) * heading[:, None]
    low = _MARGIN_PIXELS + half_width[:, None] + np.abs(heading) / 2
    for _ in range(10_000):
        middle = stream.uniform(low, recipe.pixels - low)
        centre = middle[:, None] + offset
        if (np.abs(centre[0] - centre[1]).max(axis=1) >= half_width.sum()).all():
            reach = half_width[:, None, None]
            return np.concatenate([centre - reach, centre + reach], axis=2)
    raise AssertionError(f"no placement found for {meaning} with {recipe}")


def render_clip(
    meaning: Meaning,
    stream: np.random.Generator,
    recipe: Recipe | None = None,
    boxes: np.ndarray | None = None,
) -> np.ndarray:
    """Frames of one clip, uint8 (T, H, W, 3) RGB; `boxes` (2, T, 4) are drawn from `stream` when left out."""
    recipe = recipe or Recipe()
    if boxes is None:
        boxes = draw_boxes(meaning, stream, recipe)
    clip = np.repeat(_background(stream, recipe.pixels)[None], recipe.frames, axis=0)
    for mover, box in zip((meaning.first, meaning.second), boxes, strict=True):
        corners, frame_to_corner = np.unique(box[:, :2], axis=0, return_inverse=True)
        width = _width(mover, recipe)
        origin = np.floor(corners - 0.5).astype(np.int64)
        pixel = np.arange(width + 2) + 0.5
        point = (origin - corners - width / 2)[:, :, None] + pixel
        alpha = np.clip(0.5 - _signed_distance(mover.shape, point[:, 0], point[:, 1], width / 2), 0, 1)
        colour = np.array(COLOURS[mover.colour], np.float32)
        for frame, corner in zip(clip, frame_to_corner.reshape(-1), strict=True):
            x, y = origin[corner]
            patch = frame[y : y + width + 2, x : x + width + 2]
            patch += alpha[corner, :, :, None] * (colour - patch)
    return (clip + 0.5).astype(np.uint8)


def _width(mover: Mover, recipe: Recipe) -> int:
    return round(SIZES[mover.size] * recipe.pixels)


def _background(stream: np.random.Generator, pixels: int, cells: int = 7) -> np.ndarray:
    """Smooth dim noise, float32 (H, W, 3): a random grid of `cells`, joined by raised cosines."""
    position = (np.arange(pixels) + 0.5) / pixels * (cells - 1)
    distance = np.abs(position[:, None] - np.arange(cells))
    weight = np.where(distance < 1, 0.5 + 0.5 * np.cos(np.pi * distance), 0)
    grey = stream.uniform(20, 75, (1, cells, cells))
    tint = stream.uniform(-14, 14, (3, cells, cells))
    return (weight @ (grey + tint) @ weight.T).transpose(1, 2, 0).astype(np.float32)


def _polygon(shape: str) -> np.ndarray:
    """Vertices (V, 2) that touch all four sides of the box from -1 to 1."""
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    if shape == "triangle":
        return np.array([(0, -1), (1, 1), (-1, 1)], float)
    if shape == "cross":
        arm = np.array([(-0.34, -1), (0.34, -1), (0.34, -0.34)])
        turns = [np.array([(c, s), (-s, c)]) for c, s in [(1, 0), (0, 1), (-1, 0), (0, -1)]]
        return np.concatenate([arm @ turn for turn in turns])
    angle = np.arange(10) * np.pi / 5
    star = np.where(np.arange(10) % 2, 0.45, 1.0)[:, None] * np.stack([np.sin(angle), -np.cos(angle)], axis=1)
    low, high = star.min(axis=0), star.max(axis=0)
    return (star - low) / (high - low) * 2 - 1


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the outline in pixels, negative inside: float32 (N, P, P) for x and y (N, P)."""
    x, y = x[:, None, :].astype(np.float32), y[:, :, None].astype(np.float32)
    if shape in ("circle", "ring"):
        length = np.sqrt(x * x + y * y)
        return length - radius if shape == "circle" else np.abs(length - 0.76 * radius) - 0.24 * radius
    vertices = _polygon(shape).astype(np.float32) * radius
    square = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf, np.float32)
    inside = np.zeros(square.shape, bool)
    for (ax, ay), (bx, by) in zip(vertices, np.roll(vertices, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        square = np.minimum(square, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
        if ey:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * ex / ey)
    return np.where(inside, -1, 1) * np.sqrt(square)
