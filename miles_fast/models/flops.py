"""Model FLOPs of one clip (spec/miles.md 10: 1 MAC = 2 FLOPs; norms, softmax and embeddings not counted)."""

from __future__ import annotations

from miles_fast.config import ModelConfig, VideoEncoderConfig

# Dense bf16 peak by the name that torch reports, in FLOP/s (vendor datasheets).
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def video_flops(config: VideoEncoderConfig, num_frames: int) -> tuple[float, float]:
    """Forward FLOPs of one clip: (transformer blocks, patch embedding)."""
    width, positions = config.width, config.grid**2
    tokens = num_frames * positions + 1
    linear = (16 + 4 * config.mlp_ratio) * tokens * width**2
    time = 4 * num_frames * positions * (num_frames + 1) * width + 4 * tokens * width
    space = 4 * num_frames * positions * (positions + 1) * width + 4 * tokens * width
    patch = 2 * num_frames * positions * width * 3 * config.patch_size**2
    return config.depth * (linear + time + space), patch


def text_flops(config: ModelConfig, caption_tokens: int) -> float:
    """Forward FLOPs of one caption of `caption_tokens` tokens, padding counted."""
    text, length = config.text, caption_tokens
    layer = 8 * length * text.width**2 + 4 * length * text.width * text.hidden + 4 * length**2 * text.width
    return text.depth * layer + 2 * text.width * config.embedding


def training_flops(config: ModelConfig, view: str, num_frames: int, caption_tokens: int) -> float:
    """FLOPs that one clip needs in one step of view A, B or none; recomputation is never counted."""
    blocks, patch = video_flops(config.video, num_frames)
    forward_backward = 3 * blocks + 2 * patch
    text = 3 * text_flops(config, caption_tokens)
    if view == "none":
        return forward_backward + text
    passes = 2 if view == "B" else 1
    return passes * forward_backward + blocks + patch + text


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU in FLOP/s; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)
