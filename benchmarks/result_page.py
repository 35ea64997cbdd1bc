"""Figures of a benchmark as one self-contained html page of bars, and a roofline."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from roofline import roofline

from miles_fast.export.report_charts import line_chart

STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1b1f24, #e6e8eb); --page: light-dark(#fff, #15181c);
  --bar: light-dark(#9db4cc, #46607c); --first: light-dark(#1f6feb, #58a6ff) }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin-top: 2rem }
dl { display: grid; grid-template-columns: minmax(8rem, 18rem) 1fr 5.5rem; gap: .35rem .8rem; margin: 0 }
dt { overflow-wrap: anywhere } dd { margin: 0; align-self: center }
dd.value { text-align: right; font-variant-numeric: tabular-nums }
.bar { height: 1rem; background: var(--bar); border-radius: 2px } .first { background: var(--first) }
figure { margin: 2rem 0 0 } svg { width: 100%; max-width: 40rem }
svg text { fill: var(--ink); font-size: 11px }
.grid { stroke: var(--bar); stroke-width: .5 } .line { fill: none; stroke: var(--bar); stroke-width: 2 }
.line.s2 { stroke-dasharray: 7 3 } .line.s3 { stroke: var(--first) } .dot { fill: var(--bar) }
.dot.first { fill: var(--first) } .key { margin-right: 1rem }
.key::before { content: ""; display: inline-block; width: 1.2rem; margin-right: .4rem;
  border-top: 2px solid var(--bar) }
.key.s2::before { border-top-style: dashed } .key.s3::before { border-color: var(--first) }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr 5.5rem } dt { grid-column: 1 / -1 } }
"""


def write_page(path: Path, head: dict[str, Any], figures: dict[str, Any]) -> None:
    """Write the page. `head` names machine, torch and batch; `figures` are throughput.py's by program.

    And micro.py's, as `micro`. What is not in them is left out.
    """
    parts = [f"<h1>miles_fast on {html.escape(head['machine'])}</h1>"]
    parts.append(f"<p>{head['batch']} clips a batch, torch {html.escape(head['torch'])}</p>")
    levels = []
    for name, title in (("step", "Training step, clips/s"), ("model", "Video encoder, clips/s")):
        ran = [row for row in figures.get(name, []) if "error" not in row]
        if ran:
            parts.append(_bars(title, [(row["name"], row["clips_per_second"]) for row in ran]))
            levels.append((f"{title.partition(',')[0]}, {ran[0]['name']}", ran[0]["tflops_per_second"]))
            if any(row["mfu"] for row in ran):
                shares = [(row["name"], 100 * row["mfu"]) for row in ran]
                parts.append(_bars("Share of the GPU's peak in model FLOPs, %", shares, full=100))
    if figures.get("parts"):  # empty without a GPU
        parts.append(_bars("GPU time of a step by part, ms", list(figures["parts"].items())))
    parts.append(roofline(figures.get("micro", {}), levels))
    for title, curves in (
        ("Loss, same seed and data", figures.get("curves")),
        ("Loss in bf16, with another seed, and in fp8", figures.get("fp8", {}).get("losses")),
    ):
        if curves:
            lines = {name: list(enumerate(losses, 1)) for name, losses in curves.items()}
            parts.append(line_chart(lines, unit="nats", title=title))
    for name, title in (("loader", "Loader"), ("decoders", "Decoders"), ("spoiled", "Spoiled shards")):
        rows = [
            (key.replace("_", " "), value)
            for key, value in figures.get(name, {}).items()
            if key.endswith(("clips_per_second", "clips/s"))
        ]
        if rows:
            parts.append(_bars(f"{title}, clips/s", rows))
    stages = [
        (stage, figures["loader"][f"{key}_milliseconds"])
        for stage, key in (("all together", "batch"), ("reading", "reading"), ("decoding", "decoding"))
        if "loader" in figures
    ]
    if stages:
        parts.append(_bars("Loader by stage, each alone, ms a batch", stages))
    body = "\n".join(parts)
    path.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>miles_fast throughput</title><style>{STYLE}</style><body>{body}</body></html>\n"
    )


def _bars(title: str, rows: Sequence[tuple[str, float]], full: float | None = None) -> str:
    longest = full or max(value for _, value in rows)
    lines = []
    for number, (name, value) in enumerate(rows):
        kind = "bar first" if number == 0 else "bar"
        lines.append(
            f'<dt>{html.escape(name)}</dt><dd><div class="{kind}" style="width:{100 * value / longest:.1f}%">'
            f'</div></dd><dd class="value">{value:,.1f}</dd>'
        )
    return f"<h2>{html.escape(title)}</h2><dl>{''.join(lines)}</dl>"
