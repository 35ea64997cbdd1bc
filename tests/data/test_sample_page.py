from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from data import malicious
from PIL import Image

from miles_fast.data import sample_page
from miles_fast.data.preparation import PreparationOptions, prepare
from miles_fast.data.sample_page import write_sample_page

ROOT = Path(sample_page.__file__).resolve().parents[2]


@pytest.fixture
def tar(tmp_path, write_tar, encode_video) -> Path:
    members = [("bad.mp4", b"broken"), ("bad.txt", b"x")]
    for sample in range(45):
        members += [(f"k{sample:02d}.mp4", encode_video([sample * 5] * 12, size=(320, 96)))]
        members += [(f"k{sample:02d}.txt", f"<b>caption & {sample}</b>".encode())]
    return write_tar(tmp_path / "videos.tar", members)


def test_preparation_ends_with_a_page(tar, tmp_path):
    options = PreparationOptions(workers=1, frames=3, short_side=64)
    summary = prepare([tar], tmp_path / "out", options)
    page = (tmp_path / "out/sample.html").read_text()
    assert page.count("<article>") == 40 and "45 kept, 1 dropped" in page
    assert "http" not in page and len(page) < 500_000
    numbers = [int(n) for n in re.findall(r"&lt;b&gt;caption &amp; (\d+)&lt;/b&gt;", page)]
    assert len(numbers) == 40 and numbers == sorted(numbers) and numbers != list(range(40))
    pictures = re.findall(r"base64,([^\"]+)\"", page)
    assert len(pictures) == 120
    picture = Image.open(io.BytesIO(base64.b64decode(pictures[-1])))
    assert picture.size == (213, 64)
    assert abs(picture.convert("L").resize((1, 1)).getpixel((0, 0)) - 5 * numbers[-1]) < 5
    assert "0.03 s" in page and "3 frames, 213x64" in page and "shard videos.tar" in page
    written = json.loads((tmp_path / "out/summary.json").read_text())
    assert written["clips_per_second"] == pytest.approx(46 / written["seconds"], rel=0.1)
    assert (written["kept"], written["dropped"], written["num_bytes"]) == (
        45,
        {"not decodable": 1},
        summary.num_bytes,
    )


def test_look_at_shards_that_exist(tar, tmp_path):
    page = tmp_path / "deep/page.html"
    command = [sys.executable, str(ROOT / "launch/prepare.py"), str(tar), "--look", "--output", str(page)]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == f"wrote {page}\n", done.stderr
    text = page.read_text()
    assert text.count("<article>") == 40 and "12 frames, 320x96" in text
    again = subprocess.run([*command[:2], "absent.tar", *command[3:]], capture_output=True, text=True,
                           env={"PYTHONPATH": str(ROOT)}, timeout=60)  # fmt: skip
    assert again.returncode == 1 and again.stderr.startswith("prepare: no shard matches")


def test_a_gigapixel_is_shown_as_its_problem(tmp_path):
    page = tmp_path / "page.html"
    write_sample_page([malicious.with_huge_image(tmp_path / "x.tar", "jpg", False)], page, seed="", about="")
    assert "its header says 65535x65535 pixels" in page.read_text()
