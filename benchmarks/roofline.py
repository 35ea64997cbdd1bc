"""TFLOP/s against FLOPs a byte, under what the GPU copies and multiplies: micro.py's roofline."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

_WIDTH, _HEIGHT = 640, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 16, 36


def roofline(micro: dict[str, Any], levels: Sequence[tuple[str, float]] = ()) -> str:
    """Forward passes of `micro`'s ops that multiply matrices; `levels` are TFLOP/s whose bytes nobody counts.

    What micro.py's JSON does not hold is not drawn; nothing is without a point, or without a ceiling.
    """
    points = {
        f"{row['op']} {row['case']} {row['implementation']}": (
            1000 * row["forward_tflops_per_second"] / row["forward_gb_per_second"],
            row["forward_tflops_per_second"],
        )
        for row in micro.get("timings", [])
        if row.get("forward_tflops_per_second")
    }
    copy, product = micro.get("copy_gb_per_second"), micro.get("product_tflops_per_second")
    if not points or not (copy or product):
        return ""

    def roof(intensity: float) -> float:
        return min(copy * intensity / 1000 if copy else math.inf, product or math.inf)

    ridge = [1000 * product / copy] if copy and product else []
    low_x, high_x = _decades([x for x, _ in points.values()] + ridge)
    corners = [10.0**low_x, *ridge, 10.0**high_x]
    heights = [y for _, y in points.values()] + [height for _, height in levels]
    low_y, high_y = _decades(heights + [roof(x) for x in corners])

    def place(x: float, y: float) -> tuple[float, float]:
        right = (math.log10(x) - low_x) / (high_x - low_x)
        up = (math.log10(y) - low_y) / (high_y - low_y)
        return (
            round(_LEFT + right * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    parts = []
    for power in range(low_y, high_y + 1):
        x, y = place(corners[0], 10.0**power)
        parts.append(f'<line class="grid" x1="{x}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{10.0**power:g}</text>')
    for power in range(low_x, high_x + 1):
        x, y = place(10.0**power, 10.0**low_y)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{y}"/>')
        anchor = "end" if power == high_x else "middle"
        parts.append(f'<text x="{x}" y="{y + 15}" text-anchor="{anchor}">{10.0**power:g}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">FLOPs a byte</text>')
    line = " ".join(f"{x},{y}" for x, y in (place(x, roof(x)) for x in corners))
    parts.append(f'<polyline class="line s3" points="{line}"/>')
    for number, (name, height) in enumerate(levels):
        x, y = place(corners[0], height)
        parts.append(f'<line class="line s2" x1="{x}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        beside = x + 6 + 200 * number  # levels may lie upon each other
        parts.append(f'<text x="{beside}" y="{y - 4}">{html.escape(name)}</text>')
    unnamed = {name.split()[0] for name in points}
    for name, point in points.items():
        x, y = place(*point)
        op, kind = name.split()[0], "dot"
        if name.endswith(" miles_fast"):
            kind = "dot first"
            if op in unnamed:
                unnamed.remove(op)
                parts.append(f'<text x="{x + 7}" y="{y + 4}">{html.escape(op)}</text>')
        said = f"{name}: {point[1]:.1f} TFLOP/s, {point[0]:.1f} FLOPs a byte"
        parts.append(
            f'<circle class="{kind}" cx="{x}" cy="{y}" r="4"><title>{html.escape(said)}</title></circle>'
        )
    ceilings = [f"copy {copy:,.0f} GB/s"] if copy else []
    ceilings += [f"product {product:,.0f} TFLOP/s"] if product else []
    parts.append("</svg></figure>")
    return (
        f"<h2>Roofline: TFLOP/s of forward passes, this project's coloured; {', '.join(ceilings)}</h2>"
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="roofline">{"".join(parts)}'
    )


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten that enclose the values."""
    low = math.floor(math.log10(min(values)))
    return low, max(math.ceil(math.log10(max(values))), low + 1)
