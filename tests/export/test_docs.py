"""The examples of docs/use.md run as they are written."""

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image
from tiny import jpeg

ROOT = Path(__file__).parents[2]


def test_the_three_examples_run(ours, data, tmp_path, monkeypatch):
    examples = re.findall(r"```(python|bash)\n(.*?)```", (ROOT / "docs" / "use.md").read_text(), re.S)
    assert [language for language, _ in examples] == ["python", "bash", "python"]
    for name, place in (("exported", ours), ("shards", data / "heldout"), ("launch", ROOT / "launch")):
        (tmp_path / name).symlink_to(place)
    (tmp_path / "clips").mkdir()
    for number, name in enumerate(("first.gif", "second.gif")):
        (tmp_path / "frame.jpg").write_bytes(jpeg(number))
        picture = Image.open(tmp_path / "frame.jpg")
        picture.save(tmp_path / "clips" / name, save_all=True, append_images=[picture] * 3, duration=100)
    monkeypatch.chdir(tmp_path)
    first, second, third = (code for _, code in examples)
    names: dict = {}
    exec(compile(first, "docs/use.md: 1", "exec"), names)
    assert names["videos"].shape == (2, 16) and names["best"].shape == (2,)
    exec(compile(third, "docs/use.md: 3", "exec"), names)
    assert names["similarity"].shape == (2, 4, 4) and 0 <= names["frame"] < 2
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", "-e", "-c", second],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert (
        "10 clips" in run.stdout and len(re.findall(r"^ +\d  -?\d\.\d{3}  \d{4}  a ", run.stdout, re.M)) == 3
    )
