"""Charts and pictures of the report as inline SVG and JPEG, coloured by the page's own variables."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

_WIDTH, _HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 34
_HEAT = np.array(
    [[0, 0, 4], [66, 10, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]], np.float64
)  # inferno's, at even distances

Points = Sequence[tuple[float, float]]


def line_chart(series: dict[str, Points], *, unit: str, title: str, from_zero: bool = False) -> str:
    """Lines over training steps, at most three, named beside each other above; the y axis has `unit`."""
    finite = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in series.items()
    }
    every = [point for points in finite.values() for point in points]
    if not every:
        return '<p class="quiet">The log has no figures for this chart.</p>'
    xs, ys = [x for x, _ in every], [y for _, y in every]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 5), ticks(0 if from_zero else min(ys), max(ys), 5)
    low_x, high_x = min(xs), max(max(xs), min(xs) + 1)
    low_y, high_y = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        right, down = (x - low_x) / (high_x - low_x), (y - low_y) / (high_y - low_y)
        return (
            round(_LEFT + right * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - down * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">',
    ]
    for tick in y_ticks:
        _, y = place(low_x, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        if low_x <= tick <= high_x:
            x, _ = place(tick, low_y)
            parts.append(f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">step</text>')
    for number, points in enumerate(finite.values(), start=1):
        line = " ".join(f"{x},{y}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline class="line s{number}" points="{line}"/>')
        if len(points) == 1:
            x, y = place(*points[0])
            parts.append(f'<circle class="dot s{number}" cx="{x}" cy="{y}" r="3"/>')
    legend = "".join(
        f'<span class="key s{number}">{html.escape(name)} <b>{points[-1][1]:.4g}</b></span>'
        for number, (name, points) in enumerate(finite.items(), start=1)
        if points
    )
    return (
        f'<figure class="chart"><figcaption>{html.escape(title)} <span class="quiet">({html.escape(unit)}, '
        f"last value bold)</span></figcaption><p>{legend}</p>{''.join(parts)}</svg></figure>"
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that enclose `low` to `high`; at least two."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def picture(pixels_HWC: np.ndarray, alt: str) -> str:
    """An embedded JPEG of (H, W, 3) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    height, width = pixels_HWC.shape[:2]
    size = f'width="{width}" height="{height}"'
    return f'<img {size} alt="{html.escape(alt)}" src="data:image/jpeg;base64,{data}">'


def heat_over(pixels_HWC: np.ndarray, map_GG: np.ndarray, low: float, high: float) -> np.ndarray:
    """A frame in grey under the colours of a map, scaled from `low`..`high` and enlarged smoothly."""
    height, width = pixels_HWC.shape[:2]
    scaled = np.clip((map_GG - low) / max(high - low, 1e-12), 0, 1).astype(np.float32)
    smooth = np.asarray(Image.fromarray(scaled).resize((width, height), Image.Resampling.BICUBIC))
    at = np.clip(smooth, 0, 1) * (len(_HEAT) - 1)
    below = np.minimum(at.astype(int), len(_HEAT) - 2)
    colours = _HEAT[below] + (at - below)[..., None] * (_HEAT[below + 1] - _HEAT[below])
    grey = pixels_HWC.astype(np.float64).mean(-1, keepdims=True)
    return np.clip(0.45 * grey + 0.55 * colours, 0, 255).astype(np.uint8)


def confusion_grid(classes: Sequence[str], counts: np.ndarray) -> str:
    """Rows are the true classes, columns the predicted ones, fuller is more of the row; then the worst."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size, cell = len(classes), 18 if len(classes) <= 24 else 5
    left = 120 if cell == 18 else 4
    side = left + size * cell + 4
    parts = [f'<svg viewBox="0 0 {side} {size * cell + 4}" width="{side}" role="img" aria-label="confusion">']
    for row in range(size):
        if cell == 18:
            parts.append(
                f'<text x="{left - 6}" y="{row * cell + 15}" text-anchor="end">'
                f"{html.escape(str(classes[row])[:18])}</text>"
            )
        for column in np.flatnonzero(shares[row]):
            kind = "right" if row == column else "wrong"
            said = f"{classes[row]} taken for {classes[column]}: {counts[row, column]}"
            parts.append(
                f'<rect class="{kind}" x="{left + column * cell}" y="{row * cell + 2}" width="{cell - 1}" '
                f'height="{cell - 1}" opacity="{max(shares[row, column], 0.08):.2f}"><title>'
                f"{html.escape(said)}</title></rect>"
            )
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:10]
    pairs = [divmod(int(place), size) for place in order if wrong.flat[place]]
    listed = "".join(
        f"<li>{html.escape(str(classes[a]))} taken for {html.escape(str(classes[b]))}: {counts[a, b]} of "
        f"{counts[a].sum()}</li>"
        for a, b in pairs
    )
    return f'<div class="scroll">{"".join(parts)}</svg></div><ol>{listed}</ol>'
