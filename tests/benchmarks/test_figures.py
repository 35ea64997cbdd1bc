"""The figures of README's tables: their commands are ones, and the kept files are of them."""

import json
import sys
from pathlib import Path

import pytest

from miles_fast.config_tree import load_config
from miles_fast.training.ds_config import read_ds_config

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Of micro.py, of `throughput.py decoders` and of tests/faults/soak.py, which README names.
OTHERS = {"micro", "sweep", "space-sweep", "decoders", "soak"}
# A clip's, by view (README.md).
VIEW_A = ("start-a-128", "step-a-64", "step-a-128", "step-a-192", "step-a-512-budget", "step-ablate-128")
GFLOP = {
    **dict.fromkeys(VIEW_A, 746),
    **{"step-b-96": 1299, "step-d-512": 353, "step-d-full-160": 906, "step-one-frame-768": 193},
}


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import figures

    return figures


def kept():
    return [path for kind in ("json", "txt") for path in sorted(RESULTS.glob(f"h100*-*.{kind}"))]


def test_each_command_is_one_that_throughput_takes(figures, tmp_path):
    from throughput import arguments

    keys = ['data.train=[{"name": "videos", "shards": ["a.tar"]}]', 'model.text={"tokenizer": "words"}']
    for name, figure in figures.FIGURES.items():
        ds_config = tmp_path / f"{name}.json"
        figures.write_ds_config(figure, ds_config)
        made = figures.command(figure, ds_config, keys)
        program = next(place for place, word in enumerate(made) if word.endswith("throughput.py"))
        options = arguments().parse_intermixed_args(made[program + 1 :])
        config = load_config(options.config, options.overrides)
        settings = read_ds_config(options.ds_config, config, cuda=True, ranks=1)
        assert (settings.batch, settings.stage) == (figure.clips, figure.stage), name
        assert settings.tree["zero_optimization"].items() >= figure.zero.items()
        assert config.data.train[0].shards == ["a.tar"] and config.run.init_from is None
        assert config.model.text.tokenizer == "words" and config.model.video.weights is None


@pytest.mark.parametrize("path", kept(), ids=lambda path: path.stem)
def test_a_kept_file_is_of_the_figure_it_is_called_after(figures, path):
    name = path.stem.partition("-")[2]
    if name in OTHERS:
        return
    figure = figures.FIGURES[name]
    if path.suffix == ".txt":
        assert f"batch {figure.clips}," in path.read_text().partition("\n")[0]
        return
    found = json.loads(path.read_text())
    what = figure.arguments.split()[0]
    assert found["batch"] == figure.clips and {what, "fp8"} & set(found)
    assert found.get("quack", True)  # older files do not say
    for row in found.get("step", []):
        assert 1e3 * row["tflops_per_second"] / row["clips_per_second"] == pytest.approx(
            GFLOP[name], rel=0.01
        )


def test_measures_by_name_and_says_what_could_not_be(figures, monkeypatch, tmp_path, capfd):
    programs = {"good": "print('made', *sys.argv[1:3])", "bad": "sys.exit(3)"}
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in programs:
        monkeypatch.setitem(figures.FIGURES, name, figures.Figure(clips=3, arguments=f"{name} --profile 4"))
    (folder / "throughput.py").write_text(
        "import sys\n" + "\n".join(f"if sys.argv[1] == {name!r}: {line}" for name, line in programs.items())
    )
    monkeypatch.setattr(figures, "BENCHMARKS", folder)
    monkeypatch.setattr(
        sys, "argv", ["figures.py", "bad", "good", "--shards", "a.tar", "--output", f"{tmp_path}/out"]
    )
    assert figures.main() == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["here-good.txt"]
    assert (tmp_path / "out" / "here-good.txt").read_text() == "made good --profile\n"
    assert "bad could not be measured" in capfd.readouterr().err


@pytest.mark.parametrize(
    "words,message", [(["step-c"], "no figure is called step-c"), (["step-a-64"], "--shards names")]
)
def test_says_what_is_wrong(figures, monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["figures.py", *words])
    with pytest.raises(SystemExit, match=message):
        figures.main()


def test_lists_every_name_with_its_command(figures, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["figures.py"])
    assert figures.main() == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name}: " in f"\n{printed}" for name in figures.FIGURES)
    assert "method.view=B" in printed and "36 clips, stage3_max_live_parameters 100000000" in printed
