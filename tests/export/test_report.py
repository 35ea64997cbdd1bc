"""The report page: what it says, that it needs nothing else, and how a browser lays it out."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from tiny import tiny_tree

import miles_fast
from miles_fast.config import DataConfig, SourceConfig
from miles_fast.data.loader import EvaluationLoader
from miles_fast.export.report_charts import heat_over, line_chart, ticks
from miles_fast.export.report_page import collect_gallery, read_actions, write_report
from miles_fast.training.progress import read_log

EVALUATION = {
    "text_to_video": {"r1": 0.25, "r5": 0.5, "r10": 0.75, "median_rank": 4.0, "mean_rank": 5.0},
    "video_to_text": {"r1": 0.125, "r5": 0.5, "r10": 0.75, "median_rank": 4.0, "mean_rank": 5.0},
    "gallery": 40,
    "unreadable": 0,
}


@pytest.fixture(scope="module")
def page(ours, data, tmp_path_factory):
    """A page of a made-up log and of real retrieval on the ten held-out clips."""
    run = tmp_path_factory.mktemp("report") / "run <one>"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(tiny_tree(data)))
    records = [
        {
            "step": step,
            "loss": 9 - step,
            "contrastive": 8 - step,
            "regression": 1,
            "clips_per_second": 100 * step,
        }
        for step in (1, 2, 3)
    ]
    records.append({"step": 3, "evaluation": {"heldout": EVALUATION}})
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "actions.json").write_text(json.dumps({"classes": ["run", "jump"], "confusion": [[9, 1], [4, 6]]}))
    model = miles_fast.load(ours)
    source = SourceConfig(shards=[str(data / "heldout" / "*.tar")], name="heldout")
    config = DataConfig(train=[source], frames_per_clip=2, caption_tokens=8, decode_workers=1)
    loader = EvaluationLoader(
        source, config, image_size=32, tokenizer=model.tokenizer, batch=4, device=torch.device("cpu")
    )
    gallery, looked = collect_gallery(model, loader, 10, 1)
    write_report(
        run / "page.html",
        name=run.name,
        log=read_log(run),
        config=json.loads((run / "config.json").read_text()),
        model=model,
        gallery=gallery,
        looked=looked,
        actions=read_actions(run / "actions.json"),
        queries=3,
    )
    return run / "page.html", gallery


def test_the_page_says_what_the_log_and_the_gallery_say(page):
    text, gallery = page[0].read_text(), page[1]
    assert gallery.keys == [f"{i:04d}" for i in range(10)] and gallery.captions[1] == "a green dog moves"
    for said in ("run &lt;one&gt;", "3 of 6", "<b>6</b>", "<b>300</b>", "25.0 / 12.5", "max_positions: 16"):
        assert said in text, said
    assert "20 clips, 2 classes, 75.0 % right, chance 50.0 %" in text
    assert "jump taken for run: 4 of 10" in text
    # Every query marks its true clip once; the rank is that of the similarities.
    articles = re.findall(r'<article><p>([^<]*)</p><div class="answers">(.*?)</article>', text)
    similarity = gallery.texts @ gallery.videos.T
    assert [caption for caption, _ in articles] == [gallery.captions[i] for i in (0, 4, 9)]
    for query, (_, answers) in zip((0, 4, 9), articles, strict=True):
        rank = 1 + int((similarity[query] > similarity[query, query]).sum())
        figures = re.findall(r'<figure class="([^"]*)">', answers)
        assert [number for number, kind in enumerate(figures, 1) if kind] == [min(rank, 6)]
        assert (f"true, rank {rank}" in answers) == (rank > 5)
    assert text.count("[CLS] attention, frame") == 2 and "red (" in text and "dog (" in text


def test_the_page_needs_nothing_else(page):
    text = page[0].read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text) and "http" not in text
    assert "<script" not in text and "@import" not in text and "url(" not in text


def test_ticks_enclose_the_figures_in_round_steps():
    assert ticks(0, 10.3, 5) == [0, 5, 10, 15]
    assert ticks(0.12, 0.19, 5) == [0.12, 0.14, 0.16, 0.18, 0.2]
    assert len(ticks(3, 3, 5)) >= 2


def test_a_line_is_where_its_figures_are():
    chart = line_chart({"loss": [(0, 0), (100, 5), (200, 10)]}, unit="u", title="t", from_zero=True)
    (points,) = re.findall(r'points="([^"]*)"', chart)
    places = np.array([[float(v) for v in pair.split(",")] for pair in points.split()])
    np.testing.assert_allclose(np.diff(places[:, 0]), 178, atol=0.2)
    np.testing.assert_allclose(np.diff(places[:, 1]), -93, atol=0.2)
    assert "no figures" in line_chart({"loss": [(0, float("nan"))]}, unit="u", title="t")


def test_heat_is_bright_where_the_map_is_high():
    map_GG = np.zeros((4, 4), np.float32)
    map_GG[0, 3] = 1
    heat = heat_over(np.full((64, 64, 3), 128, np.uint8), map_GG, 0.0, 1.0).sum(-1)
    assert heat[8, 56] > 2 * heat[56, 8] and np.unravel_index(heat.argmax(), heat.shape)[0] < 16


@pytest.mark.parametrize(
    "content,message",
    [
        ('{"classes": ["run"], "confusion": [[3]]}', "names 1 class; confusion needs at least two"),
        ('{"classes": ["a", "b"], "confusion": [[3, 1]]}', r"`confusion` is \(1, 2\), expected 2 rows"),
        ('{"confusion": []}', "expected json with `classes`"),
    ],
)
def test_a_confusion_that_is_none_is_refused(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_actions(tmp_path / "x.json")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = """<script>addEventListener("load", () => {
const body = getComputedStyle(document.body), wide = document.documentElement.scrollWidth;
const broken = [...document.images].filter(image => !image.naturalWidth).length;
const out = [...document.querySelectorAll("h1,h2,p,dd,figure,img,svg,pre")].filter(
    element => !element.closest(".scroll") && element.getBoundingClientRect().right > innerWidth + 1).length;
const colours = {paper: body.backgroundColor, ink: body.color};
parent.postMessage(JSON.stringify({wide, inner: innerWidth, broken, out, ...colours}), "*");
})</script>"""
# A window is at least 500 pixels wide; a frame in it may be narrower.
FRAME = """<!doctype html><title></title><script>
addEventListener("message", message => { document.title = message.data; });
</script><iframe src="page.html" width="{width}" height="900" style="border:0"></iframe>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_lays_it_out(page, tmp_path, width, scheme):
    copy = tmp_path / "page.html"
    copy.write_text(page[0].read_text().replace("</head>", MEASURE + "</head>"))
    (tmp_path / "frame.html").write_text(FRAME.replace("{width}", str(width)))
    settings = "preferredColorScheme=0" if scheme == "dark" else "preferredColorScheme=1"
    run = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
        + [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900"]
        + [f"--blink-settings={settings}", (tmp_path / "frame.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = json.loads(re.search(r"<title>(\{.*?\})</title>", run.stdout)[1])
    assert found["inner"] == width and found["wide"] <= width
    assert found["broken"] == 0 and found["out"] == 0
    paper, ink = (sum(map(int, re.findall(r"\d+", found[name])[:3])) / 3 for name in ("paper", "ink"))
    assert paper > 230 and ink < 60 if scheme == "light" else paper < 60 and ink > 200
