"""A run on one page: curves, retrieval, attention, confusion, config; no other file, nothing from the net."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from miles_fast.data.augmentation import MEAN, STD
from miles_fast.data.loader import EvaluationLoader
from miles_fast.evaluation.retrieval import chance, ranking
from miles_fast.export.attention_maps import cls_attention, word_maps
from miles_fast.export.embedding_set import Listed, embedded_batches
from miles_fast.export.encoder import VideoTextEncoder
from miles_fast.export.report_charts import confusion_grid, heat_over, line_chart, picture
from miles_fast.files import write_whole

THUMBNAIL = 112  # pixels of a side
SHOWN = 5  # answers to a query
_STYLE = (Path(__file__).with_name("report.css")).read_text


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Clips in order: keys, captions, thumbnails (3, P, P) uint8, unit embeddings (G, E) of both."""

    name: str
    keys: list[str]
    captions: list[str]
    thumbnails: list[np.ndarray]
    videos: Tensor
    texts: Tensor
    unreadable: int


@dataclass(frozen=True, kw_only=True)
class Looked:
    """One clip to look into: normalised pixels (1, T, 3, H, W), a text, what to call it."""

    video: Tensor
    caption: str
    name: str


@torch.inference_mode()
def collect_gallery(
    model: VideoTextEncoder, loader: EvaluationLoader, limit: int, looked: int
) -> tuple[Gallery, list[Looked]]:
    """The first `limit` clips of a source, embedded, and the first `looked` of them whole.

    Raises ValueError when none can be read.
    """
    quarantine = Listed()
    keys, captions, thumbnails, videos, texts, whole = [], [], [], [], [], []
    samples = range(min(limit, len(loader)))
    for _, batch, video_BE, text_BE in embedded_batches(model, loader, quarantine, samples):
        for row in range(min(looked - len(whole), len(batch.keys))):
            clip = batch.video_BTCHW[row : row + 1]
            whole.append(Looked(video=clip, caption=batch.captions[row], name=batch.keys[row]))
        keys += batch.keys
        captions += batch.captions
        thumbnails += list(shown(batch.video_BTCHW[:, batch.video_BTCHW.shape[1] // 2]))
        videos.append(video_BE)
        texts.append(text_BE)
    if not keys:
        raise ValueError(f"source {loader.name!r}: no readable sample ({dict(quarantine.counts)})")
    gallery = Gallery(
        name=loader.name,
        keys=keys,
        captions=captions,
        thumbnails=thumbnails,
        videos=torch.cat(videos),
        texts=torch.cat(texts),
        unreadable=quarantine.counts.total(),
    )
    return gallery, whole


def shown(frames_TCHW: Tensor) -> np.ndarray:
    """Normalised frames as thumbnails, (T, P, P, 3) uint8."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    pixels = frames_TCHW.float().cpu() * std + mean
    pixels = F.interpolate(pixels, size=(THUMBNAIL, THUMBNAIL), mode="bilinear", antialias=True)
    return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def write_report(
    page: Path,
    *,
    name: str,
    log: list[dict[str, Any]],
    config: dict[str, Any],
    model: VideoTextEncoder,
    gallery: Gallery | None,
    looked: Sequence[Looked],
    actions: dict[str, Any] | None,
    queries: int,
) -> None:
    """Write the page of a run, or of a model without one (an empty log); parts without data say so."""
    sections = [
        ("Training", curves(log) if log else _quiet("There is no log of a run beside the model.")),
        ("Evaluation", evaluations(log)),
        ("Retrieval", retrieval(gallery, queries) if gallery else _quiet("No set of clips was named.")),
        (
            "Where it looks",
            "".join(map(lambda clip: look(model, clip), looked)) or _quiet("No clip was given."),
        ),
    ]
    if actions:
        sections.append(("Zero-shot actions", confusion(actions)))
    text = yaml.safe_dump(config, sort_keys=False, width=100)
    sections.append(
        ("Config", f"<details open><summary>as resolved</summary><pre>{_safe(text)}</pre></details>")
    )
    body = "".join(f"<section><h2>{_safe(title)}</h2>{content}</section>" for title, content in sections)
    write_whole(
        page,
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_safe(name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<style>{_STYLE()}</style></head><body><header><h1>{_safe(name)}</h1>"
        f"{summary(log, config)}</header><main>{body}</main></body></html>\n",
    )


def summary(log: list[dict[str, Any]], config: dict[str, Any]) -> str:
    """The figures that one asks for first."""
    steps = [record for record in log if "loss" in record]
    tiles = [("step", f"{log[-1]['step']:,} of {config['run']['steps']:,}")] if log else []
    if steps:
        tiles += [("loss", f"{steps[-1]['loss']:.3f}")]
        speeds = [record["clips_per_second"] for record in steps]
        tiles += [("clips/s, median", f"{np.median(speeds):,.0f}")]
    evaluated = [record["evaluation"] for record in log if "evaluation" in record]
    for name, result in (evaluated[-1] if evaluated else {}).items():
        tiles.append((f"{name} R@1", f"{100 * result['text_to_video']['r1']:.1f} %"))
    return "<dl>" + "".join(f"<div><dt>{_safe(k)}</dt><dd>{_safe(v)}</dd></div>" for k, v in tiles) + "</dl>"


def curves(log: list[dict[str, Any]]) -> str:
    """Loss and throughput over steps."""
    steps = [record for record in log if "loss" in record]

    def points(name: str) -> list[tuple[float, float]]:
        return [(record["step"], record[name]) for record in steps if name in record]

    losses = {name: points(name) for name in ("loss", "contrastive", "regression")}
    speeds = {"clips/s": points("clips_per_second")}
    return (
        '<div class="charts">'
        + line_chart(losses, unit="nats and cosine distance", title="Loss", from_zero=True)
        + line_chart(speeds, unit="clips per second", title="Throughput", from_zero=True)
        + "</div>"
    )


def evaluations(log: list[dict[str, Any]]) -> str:
    """Recall of every evaluation of the run, beside chance."""
    rows = []
    for record in log:
        for name, result in record.get("evaluation", {}).items():
            if not isinstance(result, dict) or "text_to_video" not in result:
                continue
            forth, back = result["text_to_video"], result["video_to_text"]
            rows.append(
                f"<tr><td>{record['step']}</td><td>{_safe(name)}</td><td>{result['gallery']}</td>"
                + "".join(f"<td>{100 * forth[k]:.1f} / {100 * back[k]:.1f}</td>" for k in ("r1", "r5", "r10"))
                + f"<td>{100 * chance(result['gallery']).r1:.2f}</td></tr>"
            )
    if not rows:
        return _quiet("No evaluation was logged.")
    head = "".join(
        f"<th>{name}</th>" for name in ("step", "set", "gallery", "R@1", "R@5", "R@10", "chance R@1")
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>' + _quiet(
        "Text to video / video to text, in %; ties count half."
    )


def retrieval(gallery: Gallery, queries: int) -> str:
    """Some queries with their nearest clips, the true one marked, and its rank where it is not among them."""
    similarity = gallery.texts @ gallery.videos.T
    r = ranking(similarity)
    order = similarity.argsort(dim=1, descending=True, stable=True)
    chosen = np.linspace(0, len(gallery.keys) - 1, min(queries, len(gallery.keys))).round().astype(int)
    articles = []
    for query in dict.fromkeys(chosen.tolist()):
        own = similarity[query, query]
        rank = 1 + int((similarity[query] > own).sum())
        answers = []
        for place in order[query, :SHOWN].tolist():
            right = place == query
            mark = '<b class="true">true</b>' if right else ""
            answers.append(
                f'<figure class="{"true" if right else ""}">'
                f"{picture(gallery.thumbnails[place], gallery.captions[place])}"
                f"<figcaption>{float(similarity[query, place]):.3f} {mark}</figcaption></figure>"
            )
        if rank > SHOWN:
            answers.append(
                f'<figure class="true far">{picture(gallery.thumbnails[query], gallery.captions[query])}'
                f'<figcaption>{float(own):.3f} <b class="true">true, rank {rank}</b></figcaption></figure>'
            )
        articles.append(
            f"<article><p>{_safe(gallery.captions[query])}</p>"
            f'<div class="answers">{"".join(answers)}</div></article>'
        )
    said = (
        f"{len(gallery.keys)} clips of {gallery.name}: text to video R@1 {100 * r.r1:.1f} %, R@5 "
        f"{100 * r.r5:.1f} %, chance {100 / len(gallery.keys):.2f} %. {gallery.unreadable} unreadable. "
        "Queries at even distances, not chosen; under each clip its cosine."
    )
    return _quiet(said) + "".join(articles)


def look(model: VideoTextEncoder, clip: Looked) -> str:
    """The frames of a clip, [CLS]'s attention over them, and the similarity of words with their patches."""
    frames = shown(clip.video[0])
    attention = cls_attention(model, clip.video)[0].numpy()
    rows = [("frames", list(frames)), ("[CLS] attention", _heated(frames, attention, 0.0))]
    for word, values in word_maps(model, clip.video, clip.caption).items():
        array = values.numpy()
        low, high = float(array.min()), float(array.max())
        rows.append((f"{word} ({low:.2f} to {high:.2f})", _heated(frames, array, low)))
    strips = "".join(
        f'<div class="strip"><span>{_safe(name)}</span><div>'
        + "".join(picture(image, f"{name}, frame {number}") for number, image in enumerate(images, start=1))
        + "</div></div>"
        for name, images in rows
    )
    title = f'<p>{_safe(clip.caption)} <span class="quiet">{_safe(clip.name)}</span></p>'
    return f"<article>{title}{strips}</article>"


def _heated(frames: np.ndarray, maps_TGG: np.ndarray, low: float) -> list[np.ndarray]:
    """One scale for all frames of a clip."""
    high = float(maps_TGG.max())
    return [heat_over(frame, values, low, high) for frame, values in zip(frames, maps_TGG, strict=True)]


def read_actions(path: Path) -> dict[str, Any]:
    """{"classes": [names], "confusion": [[counts]]}, a row for each true class. Raises ValueError."""
    try:
        found = json.loads(path.read_text())
        classes, counts = list(found["classes"]), np.array(found["confusion"], dtype=np.int64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected json with `classes` (names) and `confusion` (counts, a row for each true "
            f"class); {error}"
        ) from error
    if len(classes) < 2:
        raise ValueError(f"{path}: `classes` names {len(classes)} class; confusion needs at least two")
    if counts.shape != (len(classes), len(classes)) or (counts < 0).any():
        raise ValueError(
            f"{path}: `confusion` is {counts.shape}, expected {len(classes)} rows of as many counts"
        )
    return {"classes": classes, "counts": counts, "name": str(found.get("name", path.stem))}


def confusion(actions: dict[str, Any]) -> str:
    """The matrix and what is confused most."""
    counts = actions["counts"]
    share = 100 * counts.trace() / max(counts.sum(), 1)
    said = f"{actions['name']}: {counts.sum()} clips, {len(counts)} classes, {share:.1f} % right, chance "
    said += f"{100 / len(counts):.1f} %. Rows are the true classes, columns, in the same order, what they "
    said += "were taken for."
    return _quiet(said) + confusion_grid(actions["classes"], counts)


def _quiet(text: str) -> str:
    return f'<p class="quiet">{_safe(text)}</p>'


def _safe(text: object) -> str:
    return html.escape(str(text))
