"""The model card: what a run's config and log say of its model, and nothing that they do not."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from miles_fast.evaluation.retrieval import Ranking, chance
from miles_fast.export.pretrained import Pretrained
from miles_fast.training.progress import read_log

_FRONT = """---
library_name: transformers
pipeline_tag: feature-extraction
tags: [video-text-retrieval, miles, miles_fast]
---
# {title}

A dual encoder for video-text retrieval with the architecture of MILES (Ge et al., ECCV 2022, arXiv
2204.12408), {by}.

```python
import miles_fast.export.hugging_face  # pip install miles-fast; before transformers
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained("."), AutoProcessor.from_pretrained(".")
output = model(**processor(videos=[frames], text=["a dog jumps into water"]))  # frames: RGB uint8, in order
```
"""


def model_card(found: Pretrained) -> str:
    """Markdown; with the run at hand its data, recipe, throughput and evaluation."""
    video, text = found.config.video, found.config.text
    parameters = sum(tensor.numel() for tensor in found.weights.values())
    by = "trained by miles_fast" if found.run else "converted by miles_fast"
    lines = [
        _FRONT.format(title=found.run.name if found.run else "MILES", by=by),
        "## Model",
        f"- {parameters:,} parameters; embeddings of {found.config.embedding}",
        f"- video: ViT with divided space-time attention, {video.depth} blocks of {video.width}, "
        f"{video.num_frames} frames of {video.image_size} x {video.image_size}, patch {video.patch_size}",
        f"- text: DistilBERT, {text.depth} layers of {text.width}, {found.vocabulary_size:,} word embeddings",
        *(f"- {note}" for note in found.notes),
        "",
    ]
    lines += _of_run(found.run, found.step) if found.run else [_UNKNOWN]
    return "\n".join(lines) + "\n"


_UNKNOWN = """## Data, recipe, throughput, evaluation
Not known to the conversion: the weights came without a run's config and log."""


def _of_run(run: Path, step: int | None) -> list[str]:
    config = json.loads((run / "config.json").read_text())
    log = [record for record in read_log(run) if step is None or record["step"] <= step]
    steps = [record for record in log if "loss" in record]
    data, method = config["data"], config["method"]
    lines = ["## Data"]
    for source in data["train"]:
        lines.append(f"- {source['name']} (weight {source['weight']:g}): `{' '.join(source['shards'])}`")
    lines += [
        f"- {data['frames_per_clip']} frames a clip, {data['caption_tokens']} caption tokens, crops of "
        f"{data['crop_scale'][0]:g} to {data['crop_scale'][1]:g} of the area, flip {data['flip']:g}",
        "",
        "## Recipe",
        f"- {log[-1]['step'] if log else step} of {config['run']['steps']} steps, "
        f"seed {config['run']['seed']}",
        f"- view {method['view']}; mask {method['mask']['kind']} at {method['mask']['ratio']:g}; snapshot "
        f"{method['snapshot']['update']} from {method['snapshot']['momentum']:g} to "
        f"{method['snapshot']['final_momentum']:g}; temperature {method['contrast']['temperature']:g}",
        f"- initial weights: video {config['model']['video']['weights'] or 'random'}, "
        f"text {config['model']['text']['weights'] or 'random'}, run {config['run']['init_from'] or 'none'}",
    ]
    if steps:
        highest = max(record["learning_rate"] for record in steps)
        lines.append(
            f"- {_clips_per_step(steps)} clips a step, learning rate up to {highest:g}, loss "
            f"{steps[0]['loss']:.3f} (step {steps[0]['step']}) to {steps[-1]['loss']:.3f} "
            f"(step {steps[-1]['step']})"
        )
        lines += ["", "## Throughput", *_throughput(steps)]
    lines += ["", "## Evaluation", *_evaluation(log)]
    return lines


def _clips_per_step(steps: list[dict[str, Any]]) -> int:
    return round(steps[-1]["clips_per_second"] * steps[-1]["step_milliseconds"] / 1000)


def _throughput(steps: list[dict[str, Any]]) -> list[str]:
    def median(name: str) -> float:
        return statistics.median(record[name] for record in steps)

    lines = [
        f"- {median('clips_per_second'):,.0f} clips/s (median over the run), of each step "
        f"{100 * median('data_wait_milliseconds') / median('step_milliseconds'):.1f} % waiting for data"
    ]
    if all("mfu" in record for record in steps):
        lines.append(f"- MFU {100 * median('mfu'):.1f} %")
    if all("memory_gib" in record for record in steps):
        lines.append(f"- {max(record['memory_gib'] for record in steps):.1f} GiB of GPU memory")
    return lines


def _evaluation(log: list[dict[str, Any]]) -> list[str]:
    found = [record for record in log if "evaluation" in record]
    if not found:
        return ["The run made none."]
    lines = [
        f"Retrieval at step {found[-1]['step']}, ties counted half:",
        "",
        "| set | gallery | direction | R@1 | R@5 | R@10 | MedR |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in found[-1]["evaluation"].items():
        rows = [("text to video", Ranking(**result["text_to_video"]))]
        rows += [("video to text", Ranking(**result["video_to_text"])), ("chance", chance(result["gallery"]))]
        for direction, r in rows:
            lines.append(
                f"| {name} | {result['gallery']} | {direction} | {100 * r.r1:.2f} | {100 * r.r5:.2f} | "
                f"{100 * r.r10:.2f} | {r.median_rank:g} |"
            )
    return lines
