"""The demo: train on the generated corpus, evaluate on held-out clips, export, and print one table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from miles_fast.training.progress import read_log

RUN, SHARDS = Path("runs/demo"), "data/demo/frames/heldout/*.tar"


def main() -> None:
    _call("deepspeed", "launch/pretrain.py", "--ds_config", "ds.json")
    _call(sys.executable, "launch/export.py", str(RUN), "--output", str(RUN / "export"))
    metrics = RUN / "heldout.json"
    _call(
        *(sys.executable, "launch/evaluate.py", str(RUN / "export"), "--shards", SHARDS),
        *("--caption-tokens", "24", "--json", str(metrics)),
    )
    steps = [record for record in read_log(RUN) if "loss" in record]
    result = json.loads(metrics.read_text())
    gallery = result["gallery"]
    speed = sorted(record["clips_per_second"] for record in steps)[len(steps) // 2]
    print(f"\n{'':<16}{'R@1 %':>8}{'R@5 %':>8}{'R@10 %':>8}{'MedR':>8}")
    for name in ("text_to_video", "video_to_text"):
        ranks = result[name]
        row = "".join(f"{100 * ranks[key]:>8.2f}" for key in ("r1", "r5", "r10"))
        print(f"{name.replace('_', ' '):<16}{row}{ranks['median_rank']:>8.1f}")
    row = "".join(f"{100 * k / gallery:>8.2f}" for k in (1, 5, 10))
    print(f"{'chance':<16}{row}{(gallery + 1) / 2:>8.1f}")
    print(f"loss             {steps[0]['loss']:.3f} (step {steps[0]['step']}) -> ", end="")
    print(f"{steps[-1]['loss']:.3f} (step {steps[-1]['step']})")
    print(f"clips/s          {speed:.1f} (median over the run)")
    print(f"exported         {RUN / 'export' / 'model.safetensors'}")


def _call(*command: str) -> None:
    print("$ " + " ".join(command), flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
