"""The faults that need no GPU, at full size, as the table F1-F12: python tests/faults/table.py [FAULT ...]

Every row is one or several tests; each is a test of CI too, smaller there. F11 takes its time: make soak.
"""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# fault: what it is, and the tests that bring it in
FAULTS = {
    "F1": (
        "killed while saving",
        ["tests/faults/test_checkpoints.py::test_killed_at_random_moments_of_saving"],
    ),
    "F2": (
        "killed, then resumed",
        [
            "tests/training/test_pretrain.py::test_six_steps_equal_three_resumed_bitwise",
            "tests/data/test_order.py",
            "tests/data/test_mixture.py::test_a_mixture_resumes_with_the_same_batches",
            "tests/data/test_remote_training.py::test_a_killed_run_goes_on_with_the_same_batches",
        ],
    ),
    "F3": (
        "other ranks and ZeRO stages",
        [
            "tests/faults/test_equality.py",
            "tests/training/test_ranks.py",
            "tests/launch/test_large_models.py",
        ],
    ),
    "F4": (
        "spoiled clips",
        [
            "tests/data/test_containment.py",
            "tests/data/test_clip_videos.py",
            "tests/data/test_awkward_videos.py",
            "tests/data/test_loader.py",
        ],
    ),
    "F5": ("spoiled shards and indexes", ["tests/data/test_shards.py"]),
    "F6": ("numbers that are not finite", ["tests/faults/test_numerics.py"]),
    "F7": (
        "SIGTERM, SIGUSR1",
        ["tests/faults/test_ends.py", "tests/faults/test_launchers.py", "-k", "signal or launchers"],
    ),
    "F8": (
        "disk full, read-only, slow",
        [
            "tests/faults/test_checkpoints.py",
            "tests/faults/test_ends.py",
            "tests/training/test_pretrain.py",
            "-k",
            "slow_disk or read_only or failed_save or disk",
        ],
    ),
    "F9": ("ranks that hang or are gone, memory", ["tests/faults/test_ends.py", "-k", "hangs or memory"]),
    "F10": (
        "malicious shards and checkpoints",
        [
            "tests/faults/test_checkpoints.py::test_malicious_checkpoints_are_refused_without_side_effect",
            "tests/data/test_closed.py",
            "tests/launch/test_programs.py::test_deepspeeds_pickles_are_loaded_with_the_flag_only",
        ],
    ),
    "F12": ("flipped bytes in a checkpoint", ["tests/faults/test_checkpoints.py", "-k", "flipped"]),
}


def run(fault: str) -> tuple[int, int, list[str]]:
    """Tests passed, tests that were to pass, and the figures they gave."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "-o", "timeout=3000"]
        subprocess.run(
            [*command, *FAULTS[fault][1]],
            cwd=ROOT,
            env={**os.environ, "MILES_FAST_FAULTS": "full"},
            stdout=sys.stderr,
        )
        suite = ElementTree.parse(report).getroot()
    cases = [case for case in suite.iter("testcase") if case.find("skipped") is None]
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    figures: dict[str, None] = defaultdict()
    for case in cases:
        given = {item.get("name"): item.get("value") for item in case.iter("property")}
        if given.get("fault") == fault:
            figures[given["figure"] or ""] = None
    return len(cases) - len(failed), len(cases), list(figures)


def main() -> None:
    wanted = sys.argv[1:] or list(FAULTS)
    bad = False
    rows = []
    for fault in wanted:
        passed, tests, figures = run(fault)
        bad |= passed != tests or not tests
        rows.append((fault, FAULTS[fault][0], f"{passed} of {tests}", "; ".join(figures)))
        print("  ".join(rows[-1]), file=sys.stderr, flush=True)
    print("| fault | what | tests passed | figures |\n| --- | --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    sys.exit(int(bad))


if __name__ == "__main__":
    main()
