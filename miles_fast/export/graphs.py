"""Both encoders as graphs for other runtimes: ONNX files, or torch.export programs.

The batch is free, of captions the length too; the number of frames is the model's own, for the temporal
embedding and the attention over time depend on it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from miles_fast.data.augmentation import MEAN, STD
from miles_fast.export.pretrained import Pretrained, build_model
from miles_fast.files import whole_folder
from miles_fast.models.dual_encoder import DualEncoder, unit
from miles_fast.models.text_encoder import load_tokenizer

OUTPUTS = ("unit_embedding", "token_features")  # names that no node inside has
_OPSET = 20


class VideoGraph(nn.Module):
    """(B, T, 3, H, W) normalised pixels -> unit embeddings (B, E), tokens after the last norm (B, N, D)."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.video_model, self.vid_proj = model.video_model, model.vid_proj

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        tokens_BND = self.video_model(video)
        return unit(self.vid_proj(tokens_BND[:, 0])), tokens_BND


class TextGraph(nn.Module):
    """Token ids and attention mask (B, L) int64 -> unit embeddings (B, E), hidden states (B, L, D)."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.text_model, self.text_proj = model.text_model, model.text_proj

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.text_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return unit(self.text_proj(hidden[:, 0])), hidden


def write_onnx(found: Pretrained, folder: Path) -> None:
    """video_encoder.onnx, text_encoder.onnx (weights beside them), tokenizer/, inputs.json.

    Each is run by onnxruntime on a batch of another size and compared with torch. Raises ValueError when the
    packages for it are missing or the figures differ.
    """
    needed = [
        name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None
    ]
    if needed:
        raise ValueError(f"--to onnx needs {', '.join(needed)}: pip install 'miles-fast[onnx]'")
    with whole_folder(folder, spare_others=True) as partial:
        for name, graph, example in _graphs(found):
            program = _export(graph, example)
            with _quiet():
                onnx = torch.onnx.export(
                    program, dynamo=True, output_names=list(OUTPUTS), opset_version=_OPSET, verbose=False
                )
                onnx.save(partial / f"{name}.onnx", external_data=True)
            _check(name, graph, example, _onnx_runner(partial / f"{name}.onnx"), 1e-4)
        _describe(found, partial, "onnx")


def write_programs(found: Pretrained, folder: Path) -> None:
    """video_encoder.pt2 and text_encoder.pt2 for torch.export.load, tokenizer/, inputs.json; both checked."""
    with whole_folder(folder, spare_others=True) as partial:
        for name, graph, example in _graphs(found):
            torch.export.save(_export(graph, example), partial / f"{name}.pt2")
            program = torch.export.load(partial / f"{name}.pt2").module()
            _check(name, graph, example, lambda inputs, run=program: run(*inputs), 1e-6)
        _describe(found, partial, "pt2")


def _graphs(found: Pretrained) -> Iterator[tuple[str, nn.Module, tuple[Tensor, ...]]]:
    # Triton's ops do not leave torch; SDPA is the same function (tests/models compares the backends).
    config = dataclasses.replace(found.config, attention="sdpa")
    model = build_model(dataclasses.replace(found, config=config))
    video = config.video
    pixels = torch.randn(2, video.num_frames, 3, video.image_size, video.image_size)
    yield "video_encoder", VideoGraph(model).eval(), (pixels,)
    ids = torch.zeros(2, min(8, config.text.max_positions), dtype=torch.int64)
    yield "text_encoder", TextGraph(model).eval(), (ids, torch.ones_like(ids))


def _export(graph: nn.Module, example: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    free = {0: torch.export.Dim.DYNAMIC}
    if len(example) == 2:
        free[1] = torch.export.Dim.DYNAMIC
    with torch.no_grad(), _quiet():
        return torch.export.export(graph, example, dynamic_shapes=tuple(dict(free) for _ in example))


def _onnx_runner(path: Path):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(array) for array in session.run(list(OUTPUTS), feed)]

    return run


def _check(name: str, graph: nn.Module, example: tuple[Tensor, ...], run, tolerance: float) -> None:
    inputs = tuple(torch.cat([tensor, tensor[:1]]) for tensor in example)
    with torch.no_grad():
        wanted, given = graph(*inputs), run(inputs)
    for output, mine, theirs in zip(OUTPUTS, wanted, given, strict=True):
        difference = float((mine - theirs).abs().max())
        if not difference <= tolerance * max(1.0, float(mine.abs().max())):
            raise ValueError(
                f"{name}: its {output} differs from torch's by {difference:.2g}; nothing was written"
            )


def _describe(found: Pretrained, folder: Path, suffix: str) -> None:
    video = found.config.video
    about = {
        f"video_encoder.{suffix}": {
            "video": ["batch", video.num_frames, 3, video.image_size, video.image_size],
            "pixels": "RGB in 0..1, minus mean, by std; frames: middle of equal segments, centre square",
            "mean": MEAN,
            "std": STD,
        },
        f"text_encoder.{suffix}": {"input_ids": ["batch", "tokens"], "attention_mask": ["batch", "tokens"]},
        "outputs": {
            "unit_embedding": ["batch", found.config.embedding],
            "token_features": "after the last layer; 0 is [CLS]",
        },
        "max_tokens": found.config.text.max_positions,
        "notes": found.notes,
    }
    (folder / "inputs.json").write_text(json.dumps(about, indent=2) + "\n")
    load_tokenizer(found.tokenizer).save_pretrained(folder / "tokenizer")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own insides."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
