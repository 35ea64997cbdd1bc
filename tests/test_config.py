"""Configs: overrides, and errors that name file, key, value and remedy."""

from pathlib import Path

import pytest
import yaml
from tiny import tiny_tree

from miles_fast.config import ConfigError
from miles_fast.config_tree import load_config, parse_config, to_dict

CONFIGS = sorted((Path(__file__).parents[1] / "launch" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_survive_a_round_trip(path):
    # The model to fine-tune is named on the command line.
    named = ["model.text.weights=distilbert-base-uncased"] if path.stem.startswith("finetune_") else []
    config = load_config(path, named)
    assert parse_config(to_dict(config), "again") == config


def test_overrides_reach_nested_keys_and_list_items(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(tmp_path)))
    config = load_config(path, ["run.steps=9", "method.mask.ratio=0.25", "data.train.0.name=mine"])
    assert (config.run.steps, config.method.mask.ratio, config.data.train[0].name) == (9, 0.25, "mine")
    for bad, message in (
        ("run.steps", "write section.key=value"),
        ("data.train.3.name=x", "not one of the 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(path, [bad])


def test_a_key_that_stands_there_twice_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(tmp_path)) + "method: {view: B}\nmethod: {mask: {ratio: 0.3}}\n")
    with pytest.raises(ConfigError, match="mine.yaml: not valid YAML: .*'method' stands there twice"):
        load_config(path)
    path.write_text("one: &x {a: 1}\ntwo: {<<: *x, a: 2}\n" + yaml.safe_dump(tiny_tree(tmp_path)))
    with pytest.raises(ConfigError, match="unknown key 'one'"):  # merging is no repetition
        load_config(path)


@pytest.mark.parametrize(
    "override,message",
    [
        ("model.video.widht=3", r"unknown key 'model.video.widht'; did you mean 'width'\?"),
        ("methods.view=A", r"unknown key 'methods'; did you mean 'method'\?"),
        ("method.view=C", r"method.view = 'C': Input should be 'A', 'B', 'D' or 'none'"),
        ("method.mask.ratio=1.5", r"method.mask.ratio = 1.5"),
        ("model.video.patch_size=7", r"image_size 32 is not a multiple of patch_size 7"),
        ("data.caption_tokens=99", r"caption_tokens 99 exceeds model.text.max_positions 16"),
        ("data.train.0.weight=0", r"data.train.0.weight = 0: .*greater than 0"),
        ("data.train.0.weight=.inf", r"data.train.0.weight = inf: .*finite"),
        ("data.cache_gib=0", r"data.cache_gib = 0"),
        ("run.steps=many", r"run.steps = 'many'"),
        ("run.freeze=['']", r"run.freeze.0 = '': .*at least 1 character"),
        ("data.crop_scale=[2, 1]", r"data.crop_scale = \[2, 1\]: .*0 < least <= greatest <= 1"),
        ("data.crop_scale=[-1, 0]", r"data.crop_scale = \[-1, 0\]: .*0 < least"),
        ("data.crop_scale=[0.5, .nan]", r"data.crop_scale.1 = nan: .*finite"),
        ("method.predictor.width=33", r"method.predictor: width 33 is not a multiple of heads 6; change one"),
        ("model.text.heads=3", r"model.text: width 16 is not a multiple of heads 3"),
        ("method.contrast.grad_scale=.nan", r"method.contrast.grad_scale = nan: .*finite.*official"),
        ("method.contrast.grad_scale=-1", r"method.contrast.grad_scale = -1: .*greater than 0"),
        ("method.contrast.grad_scale=0", r"method.contrast.grad_scale = 0: .*greater than 0"),
        ("method.contrast.temperature=.inf", r"method.contrast.temperature = inf: .*finite"),
        ("method.regression.weight=.inf", r"method.regression.weight = inf: .*finite"),
        ("run.lr_scale={video_model: .inf}", r"run.lr_scale.video_model = inf: .*finite"),
        ("run.spike_factor=.inf", r"run.spike_factor = inf: .*finite"),
        (
            "data.evaluation=[{shards: [a.tar], name: x}, {shards: [b.tar], name: x}]",
            r"data.evaluation = .*2 sets have the name 'x'.*give each a name of its own",
        ),
        (
            "data.evaluation=[{shards: [a.tar]}, {shards: [b.tar]}]",
            r"data.evaluation = .*2 sets have the name 'train'",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, override, message):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(tmp_path)))
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path, [override])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "data.evaluation=[{shards: [a.tar]}]",
        "data.train=[{shards: [a.tar]}, {shards: [b.tar]}]",  # which nothing is kept by
        "data.crop_scale=[1, 1]",
        "method.contrast.grad_scale=0.25",
        "method.contrast.grad_scale=1e-3",  # a text in YAML 1.1
        "method.contrast.grad_scale=official",
    ],
)
def test_what_may_be_written_so(tmp_path, override):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(tmp_path)))
    load_config(path, [override])


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("run: [")
    with pytest.raises(ConfigError, match="broken.yaml: not valid YAML"):
        load_config(tmp_path / "broken.yaml")
