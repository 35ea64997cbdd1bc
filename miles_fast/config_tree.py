"""A config as a tree of plain values: read from YAML and `section.key=value` overrides, checked, compared."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from miles_fast.config import Config, ConfigError, ModelConfig
from miles_fast.files import unique_keys


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dict of a config (for yaml or json), tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        try:
            unique_keys([(key.value, None) for key, _ in node.value if key.tag == "tag:yaml.org,2002:str"])
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None
        return super().construct_mapping(node, deep=deep)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `section.key=value` overrides (values are YAML; list items by number).

    Raises ConfigError naming the file, the key, its value and what was expected.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; launch/configs holds examples") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected sections (run, data, model, method), found {type(tree).__name__}"
        )
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], source: str) -> Config:
    """Check a dict against Config; `source` names its file in errors. Raises ConfigError."""
    return _parse(Config, tree, source)


def parse_model(tree: dict[str, Any], source: str) -> ModelConfig:
    """Check the model section alone (an exported architecture file). Raises ConfigError."""
    return _parse(ModelConfig, tree, source)


def _parse(kind: type, tree: dict[str, Any], source: str) -> Any:
    try:
        return TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        lines = [_explain(kind, item) for item in error.errors(include_url=False)]
        raise ConfigError(f"{source}: " + f"\n{source}: ".join(lines)) from None


def _explain(kind: type, item: Any) -> str:
    location, value = [str(part) for part in item["loc"]], item.get("input")
    key = ".".join(location)
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(kind, location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key '{key}'; {hint}"
    if item["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"key '{key}' is missing"
    shown = "" if isinstance(value, dict) else f" = {value!r}"
    return f"{key or 'config'}{shown}: {item['msg'].removeprefix('Value error, ')}"


def _known_keys(kind: type, location: Sequence[str]) -> list[str]:
    for part in location:
        if part.isdigit():
            continue
        hint = get_type_hints(kind).get(part)
        kind = next((c for c in (hint, *get_args(hint)) if dataclasses.is_dataclass(c)), kind)
    return [field.name for field in dataclasses.fields(kind)]


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override '{override}': write section.key=value")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': value is not valid YAML: {error}") from None
    node: Any = tree
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(f"override '{override}': '{part}' is not one of the {len(node)} list items")
            part = int(part)  # type: ignore[assignment]
        elif not isinstance(node, dict):
            raise ConfigError(f"override '{override}': '{'.'.join(parts[:depth])}' is a value, not a section")
        if last:
            node[part] = value
        elif isinstance(node, list):
            node = node[part]
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]


def section_difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "model") -> list[str]:
    """Lines `key: old -> new` for every leaf in which two sections differ."""
    lines = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += section_difference(before, after, f"{prefix}.{key}")
        elif before != after:
            lines.append(f"{prefix}.{key}: {before!r} -> {after!r}")
    return lines


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines `section.key: old -> new` of the sections of `new`."""
    return [
        line
        for section, values in new.items()
        for line in section_difference(old.get(section, {}), values, section)
    ]
