"""F11: that the soak counts what it says; whether memory grows shows in long runs only."""

import json
from pathlib import Path

from fork_server import run

SOAK = str(Path(__file__).with_name("soak.py"))


def test_a_short_soak_counts_steps_saves_and_memory(tmp_path):
    figures = tmp_path / "figures.json"
    done = run(SOAK, "--steps", "60", "--limit=-1e9", "--json", str(figures), "run.save_every=20")
    assert done.returncode == 1 and "memory grows by" in done.stderr, done.stderr[-3000:]
    found = json.loads(figures.read_text())
    assert (
        found["steps"] == 60 and 1 <= found["saves"] <= 3
    )  # one that is due while one is written is left out
    assert found["resident_mib_first"] > 50 and found["resident_mib_last"] > 50


def test_a_soak_of_given_shards_ends_in_time(tmp_path, root):
    figures = tmp_path / "figures.json"
    shards = ("--shards", str(root / "train" / "*.tar"), "--batch", "2")
    done = run(SOAK, "--minutes", "0.1", *shards, "--limit", "inf", "--json", str(figures))
    assert done.returncode == 0 and "stopped by SIGUSR1" in done.stderr, done.stderr[-3000:]
    found = json.loads(figures.read_text())
    assert found["steps"] > 10 and found["saves"] >= 1
