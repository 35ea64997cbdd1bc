"""The video encoder alone, forward and backward, on pixels that lie on the device."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, replace

import torch
from energy import joules
from variants import PLAIN_OPS, ops

from miles_fast.config import Config, RunConfig
from miles_fast.models.flops import peak_flops, video_flops
from miles_fast.models.fp8 import use_fp8
from miles_fast.models.video_encoder import SpaceTimeTransformer

WARMUP = 3


@dataclass(frozen=True, kw_only=True)
class EncoderRow:
    """One way to run the encoder: milliseconds and model TFLOP/s of a pass, memory and energy of the GPU."""

    name: str
    clips_per_second: float
    milliseconds: float
    tflops_per_second: float
    mfu: float | None
    memory_gib: float | None
    joules_per_clip: float | None


def measure_encoder(
    config: Config, batch: int, passes: int, device: torch.device, *, alone: bool = False
) -> list[EncoderRow]:
    """The encoder as configured and, unless `alone`, eager with SDPA and as published (bf16, fp32)."""
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    plain = replace(config.run, compile=False, cuda_graphs=False, precision=None, activation_memory_budget=1)
    ways = [
        ("as configured", config.model.attention, half, config.run),
        ("eager, SDPA", "sdpa", half, plain),
    ]
    if half is torch.bfloat16:
        ways.append(("as published, bf16", "eager", half, plain))
    ways.append(("as published, fp32", "eager", torch.float32, plain))
    rows = []
    for way in ways[:1] if alone else ways:
        with ops(plain=PLAIN_OPS if way[-1] is plain else ()):
            rows.append(_measure(config, batch, passes, device, *way))
        # A graph keeps its memory for as long as the encoder is there, which is part of a cycle.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _measure(
    config: Config,
    batch: int,
    passes: int,
    device: torch.device,
    name: str,
    attention: str,
    dtype: torch.dtype,
    run: RunConfig,
) -> EncoderRow:
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # a graph allocates what it needs when it is captured
    frames, size = config.data.frames_per_clip, config.model.video.image_size
    encoder = SpaceTimeTransformer(config.model.video, attention).to(device=device, dtype=dtype)
    if run.precision == "fp8":
        use_fp8(encoder, device)
    if run.compile:
        encoder.compile_layers(run.activation_memory_budget)
    video = torch.randn(batch, frames, 3, size, size, device=device, dtype=dtype)
    if run.cuda_graphs and device.type == "cuda":
        encoder = torch.cuda.make_graphed_callables(encoder, (video,))
    weight = torch.randn(config.model.video.width, device=device, dtype=dtype)

    def step() -> None:
        encoder.zero_grad(set_to_none=True)
        (encoder(video) @ weight).mean().backward()

    for _ in range(WARMUP):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    drawn, start = joules(), time.perf_counter()
    for _ in range(passes):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / passes
    if drawn is not None:
        drawn = (joules() - drawn) / (passes * batch)
    blocks, patch = video_flops(config.model.video, frames)
    rate = batch * (3 * blocks + 2 * patch) / seconds
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    return EncoderRow(
        name=name,
        clips_per_second=batch / seconds,
        milliseconds=1000 * seconds,
        tflops_per_second=rate / 1e12,
        mfu=rate / peak if peak else None,
        memory_gib=torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        joules_per_clip=drawn,
    )


def table(rows: list[EncoderRow]) -> str:
    """The rows for people, each with its speed against the first."""
    columns = ("clips/s", "of first", "ms", "TFLOP/s", "MFU %", "GiB", "J/clip")
    lines = [f"{'video encoder, forward + backward':<40}" + "".join(f"{column:>10}" for column in columns)]
    for row in rows:
        mfu = f"{100 * row.mfu:>10.1f}" if row.mfu else f"{'-':>10}"
        memory = f"{row.memory_gib:>10.1f}" if row.memory_gib else f"{'-':>10}"
        energy = f"{row.joules_per_clip:>10.2f}" if row.joules_per_clip else f"{'-':>10}"
        ratio = row.clips_per_second / rows[0].clips_per_second
        lines.append(
            f"{row.name:<40}{row.clips_per_second:>10.1f}{ratio:>10.2f}{row.milliseconds:>10.1f}"
            f"{row.tflops_per_second:>10.2f}{mfu}{memory}{energy}"
        )
    return "\n".join(lines)
