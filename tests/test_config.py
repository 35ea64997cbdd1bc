"""Configs: overrides, and errors that name file, key, value and remedy."""

from pathlib import Path

import pytest
import yaml
from tiny import tiny_tree

from miles_fast.config import ConfigError, load_config, parse_config, to_dict

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
    ],
)
def test_mistakes_are_named(tmp_path, override, message):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(tmp_path)))
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path, [override])
    assert str(path) in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("run: [")
    with pytest.raises(ConfigError, match="broken.yaml: not valid YAML"):
        load_config(tmp_path / "broken.yaml")
