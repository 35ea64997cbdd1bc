"""Model FLOPs of one clip (spec/miles.md 10: 1 MAC = 2 FLOPs; norms, softmax and embeddings not counted)."""

from __future__ import annotations

from dataclasses import replace

from miles_fast.config import MethodConfig, ModelConfig, VideoEncoderConfig

# Dense bf16 peak by the name that torch reports, in FLOP/s (vendor datasheets).
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def video_flops(
    config: VideoEncoderConfig, num_frames: int, visible: int | None = None
) -> tuple[float, float]:
    """Forward FLOPs of one clip, all or `visible` patches a frame: (transformer blocks, patch embedding)."""
    width, positions = config.width, config.grid**2 if visible is None else visible
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


def predictor_flops(config: ModelConfig, method: MethodConfig, num_frames: int) -> float:
    """Forward FLOPs of view D's predictor for one clip."""
    sizes, positions = method.predictor, config.video.grid**2
    narrow = replace(config.video, width=sizes.width, heads=sizes.heads, depth=sizes.depth, mlp_ratio=4.0)
    masked = num_frames * method.mask.masked_per_frame(config.video.grid)
    visible = 1 + num_frames * positions - masked
    target = config.embedding if method.regression.feature == "projected" else config.video.width
    ends = 2 * sizes.width * (visible * config.video.width + masked * target)
    return video_flops(narrow, num_frames)[0] + ends


def training_flops(config: ModelConfig, method: MethodConfig, num_frames: int, caption_tokens: int) -> float:
    """FLOPs that one clip needs in one step; recomputation is never counted."""
    blocks, patch = video_flops(config.video, num_frames)
    forward_backward = 3 * blocks + 2 * patch
    text = 3 * text_flops(config, caption_tokens)
    if method.view == "none":
        return forward_backward + text
    rest = blocks + patch + text  # the snapshot's pass, and the captions
    if method.view != "D":
        return (2 if method.view == "B" else 1) * forward_backward + rest
    visible = config.video.grid**2 - method.mask.masked_per_frame(config.video.grid)
    kept_blocks, kept_patch = video_flops(config.video, num_frames, visible)
    dropped = 3 * kept_blocks + 2 * kept_patch + 3 * predictor_flops(config, method, num_frames)
    return dropped + (forward_backward if method.contrast.clip == "full" else 0.0) + rest


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU in FLOP/s, what fp8 is measured against too; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)
