"""The demo: train on the generated corpus, evaluate on held-out clips, export, and print one table."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

from miles_fast.training.progress import read_log

RUN, SHARDS = Path("runs/demo"), "data/demo/frames/heldout/*.tar"


def main() -> None:
    _call("deepspeed", "launch/pretrain.py", "--ds_config", "ds.json")
    _call(sys.executable, "launch/export.py", str(RUN), "--output", str(RUN / "export"))
    steps = [record for record in read_log(RUN) if "loss" in record]
    speed = statistics.median(record["clips_per_second"] for record in steps)
    _call(
        *(sys.executable, "launch/evaluate.py", str(RUN / "export"), "--shards", SHARDS),
        *("--caption-tokens", "24"),
    )
    print(f"loss             {steps[0]['loss']:.3f} (step {steps[0]['step']}) -> ", end="")
    print(f"{steps[-1]['loss']:.3f} (step {steps[-1]['step']})")
    print(f"clips/s          {speed:.1f} (median over the run)")
    print(f"exported         {RUN / 'export' / 'model.safetensors'}")


def _call(*command: str) -> None:
    print("$ " + " ".join(command), flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
