"""What a training step's GPU time is made of, by kind of kernel, from torch's profiler."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import torch

# The first pattern that a kernel's name holds decides its part.
PARTS = (
    (
        "attention",
        r"flash|fmha|attend|attention|(query|key)_gradient_|_differentiate_kernel|_combine_(output|gradient)_",
    ),
    ("products with GELU", r"^_linear_gelu_kernel|GemmMod__((scaled_)?gelu_|product_slope)"),
    ("gradient of GELU", r"^_gelu_gradient_kernel"),
    ("other products", r"gemm|nvjet|cutlass|xmma|cublas|splitK"),
    ("optimizer and snapshot", r"adam|lerp|multi_tensor|foreach"),
    ("memory copies", r"memcpy|memset|Memcpy|Memset"),
    ("communication", r"nccl"),
    ("decoding", r"jpeg|resample|dali|nvimgcodec|SliceFlip|BatchedSeparable|Idct|huffman"),
    ("LayerNorm and pointwise", r"triton_|^_differentiate_norm_kernel|layer_norm"),
)
LONGEST = 24  # kernels of each part that are listed
# Annotations of the profiler's own: their kernels are listed by themselves.
_ANNOTATIONS = re.compile(r"ProfilerStep|Optimizer\.")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Kernels of one kind: milliseconds and launches a step, in all and of the longest by name."""

    name: str
    milliseconds: float
    launches: float
    longest: tuple[tuple[str, float, float], ...]


def _part(kernel: str) -> str:
    return next((name for name, pattern in PARTS if re.search(pattern, kernel)), "other")


def parts_of(profile: torch.profiler.profile, num_steps: int) -> list[Part]:
    """Parts of the recorded steps, longest first; all streams added up."""
    found: dict[str, list] = defaultdict(list)
    for event in profile.key_averages():
        milliseconds = event.self_device_time_total / 1000
        if _ANNOTATIONS.match(event.key):
            continue
        if milliseconds and event.device_type == torch.autograd.DeviceType.CUDA:
            found[_part(event.key)].append((milliseconds / num_steps, event.count / num_steps, event.key))
    parts = [
        Part(
            name=name,
            milliseconds=sum(kernel[0] for kernel in kernels),
            launches=sum(kernel[1] for kernel in kernels),
            longest=tuple(
                (key, ms, launches) for ms, launches, key in sorted(kernels, reverse=True)[:LONGEST]
            ),
        )
        for name, kernels in found.items()
    ]
    return sorted(parts, key=lambda part: -part.milliseconds)


def idle_table(profile: torch.profiler.profile, num_steps: int) -> str:
    """Milliseconds a step in which no kernel ran, with and without decoding and its copies; the longest gaps.

    From the first kernel to the last. What decodes the next batches runs beside the step, or where it idles.
    """
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not _ANNOTATIONS.match(event.name)
    )
    step = [k for k in kernels if _part(k[-1]) != "decoding" and not k[-1].startswith("Memcpy HtoD")]
    lines = []
    for name, these in (("idle", kernels), ("idle, or decoding alone", step)):
        gaps = _gaps(these)
        idle = sum(gap for gap, *_ in gaps) / num_steps
        lines.append(f"{name:<28}{idle:>9.2f} ms{len(gaps) / num_steps:>8.0f} gaps")
        longest = sorted(gaps, reverse=True)[:12]
        lines += [f"    {ms:>7.2f} ms  {one[:50]} -> {other[:50]}" for ms, one, other in longest]
    return "\n".join(lines)


def _gaps(kernels: list[tuple[float, float, str]]) -> list[tuple[float, str, str]]:
    """Milliseconds between kernels sorted by their start, and the kernels before and behind."""
    gaps, end, last = [], float("inf"), ""
    for start, stop, name in kernels:
        if start > end:
            gaps.append(((start - end) / 1000, last, name))
        if stop > end or not last:
            end, last = stop, name
    return gaps


def host_table(profile: torch.profiler.profile, num_steps: int) -> str:
    """What the host spends a step on, by operator: milliseconds of its own and calls a step."""
    events = [event for event in profile.key_averages() if event.self_cpu_time_total]
    events.sort(key=lambda event: -event.self_cpu_time_total)
    lines = []
    for event in events[:16]:
        milliseconds, calls = event.self_cpu_time_total / 1000 / num_steps, event.count / num_steps
        lines.append(f"    {milliseconds:>7.2f} ms{calls:>8.0f} x  {event.key[:90]}")
    return "\n".join(["host, profiled", *lines])


def table(parts: list[Part]) -> str:
    """The parts for people, each with its longest kernels."""
    lines = []
    for part in parts:
        lines.append(f"{part.name:<28}{part.milliseconds:>9.2f} ms{part.launches:>8.0f} launches")
        lines += [f"    {ms:>7.2f} ms{number:>8.0f} x  {name[:100]}" for name, ms, number in part.longest]
    total = sum(part.milliseconds for part in parts)
    return "\n".join([*lines, f"{'all kernels':<28}{total:>9.2f} ms"])
