"""Time each op against its reference, eager and compiled, at the trainer's shapes.

    python benchmarks/micro.py [--op token_gather] [--sweep] [--json benchmarks/results/micro.json]

An op that breaks the tests' error rule is not timed and the exit status is 1; without a CUDA GPU it is 2. A
rival that fails is named with its error. Times are medians of CUDA graphs; what no graph takes is timed
without one, bound by the host, and marked. Backward is forward and backward together less forward.
GB/s are the bytes any implementation must move (kernels/cases.py) over the time, for every implementation
alike, so that an implementation that moves more shows a smaller figure; "of copy" is their share of a
device-to-device copy timed in the same run. TFLOP/s are those of the matrix products. Peak memory is what one
forward and backward needs beyond its inputs. `--sweep` times a backward table's entries together with
forward.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
from contests import CONTESTS, Contest, LaunchTable

from miles_fast.kernels import cases
from miles_fast.kernels.dispatch import triton

COPY_BYTES = 1 << 30
PRODUCT_SIZE = 8192
DEVICE = "cuda"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One row of the table: one implementation of one op at one case."""

    op: str
    case: str
    implementation: str
    graph: bool
    forward_ms: float
    backward_ms: float
    both_ms: float
    forward_gb_per_second: float
    backward_gb_per_second: float
    both_gb_per_second: float
    forward_share_of_copy: float
    backward_share_of_copy: float
    both_share_of_copy: float
    forward_tflops_per_second: float | None
    peak_mib: float


def median_ms(call: Callable, *, graph: bool = True) -> float:
    """Median GPU time of a call with a cold L2 cache; in a CUDA graph, what Python takes does not count."""
    from triton.testing import do_bench

    if not graph:
        return do_bench(call, return_mode="median")
    stream, captured = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    # A capture that fails leaves its own stream the current one.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(captured):
        call()
    return do_bench(captured.replay, return_mode="median")


def medians_ms(*calls: Callable) -> tuple[bool, list[float]]:
    """Whether CUDA graphs take the calls, all of them, and their median times in graphs or without."""
    try:
        return True, [median_ms(call) for call in calls]
    except Exception as error:
        print(f"timed without a CUDA graph: {_said(error)}", file=sys.stderr)
    torch.cuda.synchronize()
    return False, [median_ms(call, graph=False) for call in calls]


def copy_gb_per_second() -> float:
    """Bytes read plus bytes written of a large device-to-device copy, per second."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    destination = torch.empty_like(source)
    # Not in a graph, which copies a fifth slower.
    return 2 * COPY_BYTES / median_ms(lambda: destination.copy_(source), graph=False) / 1e6


def product_tflops_per_second() -> float:
    """A large product's of bf16 matrices, in TFLOP/s."""
    matrix = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, dtype=torch.bfloat16, device=DEVICE)
    return 2 * PRODUCT_SIZE**3 / median_ms(lambda: matrix @ matrix) / 1e9


def peak_mib(call: Callable) -> float:
    """Memory that a call allocates on top of what is there, at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def time_case(
    name: str, contest: Contest, case: cases.Case, copy_rate: float
) -> tuple[list[Timing], dict[str, str]]:
    """Ours and its rivals on the same inputs, and the errors of those that do not run, by name."""
    inputs = case.inputs(DEVICE)
    torch._dynamo.reset()
    timings, errors = [], {}
    for implementation, op in {"miles_fast": contest.op, **contest.rivals}.items():
        try:
            timings.append(_time(name, contest, case, inputs, implementation, op, copy_rate))
        except Exception as error:
            errors[implementation] = _said(error)
    return timings, errors


def _time(
    name: str,
    contest: Contest,
    case: cases.Case,
    inputs: cases.Inputs,
    implementation: str,
    op: Callable,
    copy_rate: float,
) -> Timing:
    def forward():
        return case.call(op, inputs)

    def both():
        output = case.call(op, inputs)
        return torch.autograd.grad(output, inputs.leaf, inputs.d_output.to(output.dtype))

    both()
    graph, (forward_ms, both_ms) = medians_ms(forward, both)
    backward_ms = both_ms - forward_ms
    forward_rate = case.forward_bytes / forward_ms / 1e6
    backward_rate = case.backward_bytes / backward_ms / 1e6
    both_rate = (case.forward_bytes + case.backward_bytes) / both_ms / 1e6
    return Timing(
        op=name,
        case=case.name,
        implementation=implementation,
        graph=graph,
        forward_ms=forward_ms,
        backward_ms=backward_ms,
        both_ms=both_ms,
        forward_gb_per_second=forward_rate,
        backward_gb_per_second=backward_rate,
        both_gb_per_second=both_rate,
        forward_share_of_copy=forward_rate / copy_rate,
        backward_share_of_copy=backward_rate / copy_rate,
        both_share_of_copy=both_rate / copy_rate,
        forward_tflops_per_second=contest.flops(case) / forward_ms / 1e9 if contest.flops else None,
        peak_mib=peak_mib(both),
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def sweep_table(contest: Contest, case: cases.Case, launch_table: LaunchTable) -> dict:
    """Time every candidate of a table at one case; the table is left as it was."""
    table, backward = launch_table.entries, launch_table.backward
    inputs, key = case.inputs(DEVICE), contest.key(case)
    before = table.get(key)

    def measured():
        output = case.call(contest.op, inputs)
        if backward:  # of which forward, the same for all, is a part
            return torch.autograd.grad(output, inputs.leaf, inputs.d_output.to(output.dtype))
        return output

    milliseconds = {}
    median_ms(measured)  # an idle GPU takes a while to reach its clock
    try:
        for candidate in launch_table.candidates(case):
            table[key] = candidate
            try:
                milliseconds[candidate] = median_ms(measured)
            except triton.TritonError as error:
                print(f"{case.name}: {candidate} does not fit ({_said(error)})")
    finally:
        if before is None:
            table.pop(key, None)
        else:
            table[key] = before
    ranked = sorted(milliseconds, key=milliseconds.get)
    chosen = ranked[0] if ranked else None
    print(f"{case.name} {launch_table.name}: {key}: {chosen}, now {before}")
    for candidate in ranked[:5] + ([before] if before in ranked[5:] else []):
        print(f"    {candidate}: {milliseconds[candidate]:.4f} ms")
    return {
        "case": case.name,
        "table": launch_table.name,
        "key": str(key),
        "chosen": chosen,
        "now": before,
        "milliseconds": {str(candidate): milliseconds[candidate] for candidate in ranked},
    }


def print_table(timings: list[Timing], copy_rate: float, product_rate: float) -> None:
    """The timings as one Markdown table; * where no CUDA graph was taken."""
    print(
        f"\n{torch.cuda.get_device_name()}, copy {copy_rate:.0f} GB/s, product {product_rate:.0f} TFLOP/s\n"
    )
    numbers = ("fwd ms", "of copy", "TFLOP/s", "bwd ms", "of copy", "both ms", "of copy", "MiB")
    print(f"| op | case | implementation | {' | '.join(numbers)} |")
    print("| --- | --- | --- |" + " ---: |" * len(numbers))
    for row in timings:
        flops = "-" if row.forward_tflops_per_second is None else f"{row.forward_tflops_per_second:.0f}"
        cells = (
            f"{row.op} | {row.case} | {row.implementation}{'' if row.graph else ' *'}"
            f" | {row.forward_ms:.4f} | {row.forward_share_of_copy:.0%} | {flops}"
            f" | {row.backward_ms:.4f} | {row.backward_share_of_copy:.0%}"
            f" | {row.both_ms:.4f} | {row.both_share_of_copy:.0%} | {row.peak_mib:.0f}"
        )
        print(f"| {cells} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=sorted(CONTESTS), action="append", help="only this op (repeatable)")
    parser.add_argument("--first", action="store_true", help="only the first case of each op")
    parser.add_argument(
        "--sweep", action="store_true", help="time the launch parameters instead, once a table entry"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results and the versions here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/micro.py needs a CUDA GPU: none is available", file=sys.stderr)
        return 2
    copy_rate, product_rate = copy_gb_per_second(), product_tflops_per_second()
    timings, sweeps, refused, ours = [], [], [], False
    for name in options.op or CONTESTS:
        contest, swept = CONTESTS[name], set()
        for case in contest.trainer_cases[: 1 if options.first else None]:
            try:
                broken = cases.violations(case, contest.op, contest.reference, DEVICE)
            except Exception as error:
                broken = [_said(error)]
            torch.cuda.empty_cache()
            if broken:
                refused.append(f"{name} {case.name}: breaks the error rule: {'; '.join(broken)}")
                ours = True
            elif not options.sweep:
                timed, errors = time_case(name, contest, case, copy_rate)
                timings += timed
                refused += [f"{name} {case.name}: {rival}: {error}" for rival, error in errors.items()]
                ours |= "miles_fast" in errors
            elif contest.key(case) not in swept:
                swept.add(contest.key(case))
                with mock.patch("miles_fast.kernels.dispatch._QUACK", False):  # the tables are Triton's
                    sweeps += [sweep_table(contest, case, table) for table in contest.tables]
    if timings:
        print_table(timings, copy_rate, product_rate)
    for line in refused:
        print(f"not timed: {line}", file=sys.stderr)
    if options.json is not None:
        result = {
            "gpu": torch.cuda.get_device_name(),
            "copy_gb_per_second": copy_rate,
            "product_tflops_per_second": product_rate,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "cuda": torch.version.cuda,
            },
            "timings": [asdict(timing) for timing in timings],
            "sweeps": sweeps,
            "refused": refused,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(ours)


if __name__ == "__main__":
    sys.exit(main())
