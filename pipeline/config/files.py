"""From a YAML file and dotted overrides to a checked `Config`, and back.

`extends: other.yaml` (relative to the file) starts from another file: groups merge, lists and values
replace, and a group whose `kind` changes starts afresh. Overrides come last: `train.steps=10` sets a value,
`train.variants.multi_view.steps=5` or `data.sources.0.path=books` reach into a list by name or index.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from pipeline.config.errors import Origins, explain, show
from pipeline.config.group import Group
from pipeline.config.schema import Config
from pipeline.config.yaml_text import MOST_LEVELS, read_yaml
from pipeline.errors import ConfigError, hide_credentials

Schema = TypeVar("Schema", bound=Group)


class _Dumper(yaml.SafeDumper):
    """Groups one field a line, lists of plain values on one line, no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        return super().represent_mapping(tag, mapping, flow_style=False)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A pipeline's config; errors as of `load_group`."""
    return load_group(Config, path, overrides)


def load_group(schema: type[Schema], path: str | Path, overrides: Sequence[str] = ()) -> Schema:
    """Read a config file, what it extends, and `overrides`, and check the result.

    Raises:
        ConfigError: on anything wrong, all problems of the fields at once, in one screen of text.
    """
    values, origins = _read(Path(path), ())
    for override in overrides:
        apply_override(override, values, origins)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, values, origins, str(path), schema)) from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML, fields in the schema's order; `load_config` reads it back equal.

    The text ends up in logs and artifacts, so user and password in `tracking.uri` are left out.
    """
    values = config.model_dump()
    if config.tracking.uri:
        values["tracking"]["uri"] = hide_credentials(config.tracking.uri)
    return yaml.dump(
        values,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=110,
        default_flow_style=None,
    )


def _read(path: Path, below: tuple[Path, ...]) -> tuple[dict[str, Any], Origins]:
    """Values of one file over those that it extends, and where each stands. `below` extend this file."""
    if path.resolve() in below:
        chain = " → ".join(file.name for file in (*below[below.index(path.resolve()) :], path))
        raise ConfigError(f"{below[-1]}: `extends` goes in a circle: {chain}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        asked_by = f" (which {below[-1]} extends)" if below else ""
        raise ConfigError(f"there is no file {path}{asked_by}{_near_files(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from None
    try:
        node, values = read_yaml(text, str(path))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold fields such as `name: …`, not {show(values)}")
    origins: Origins = {}
    _note_lines(node, (), str(path), origins)
    base = values.pop("extends", None)
    if base is None:
        return values, origins
    if not isinstance(base, str):
        raise ConfigError(f"{path}: `extends` takes one file name, not {show(base)}")
    base_values, base_origins = _read(path.parent / base, (*below, path.resolve()))
    return _merge(base_values, values), base_origins | origins


def _near_files(path: Path) -> str:
    folders = {folder.resolve(): folder for folder in (Path("conf"), path.parent)}
    files = {file.stem: str(file) for folder in folders.values() for file in sorted(folder.glob("*.yaml"))}
    near = difflib.get_close_matches(path.stem, files, n=3, cutoff=0.6)
    if near:
        return "; did you mean " + " or ".join(files[stem] for stem in near) + "?"
    return f"; there are {', '.join(sorted(files.values()))}" if files else ""


def _note_lines(node: yaml.Node | None, at: tuple[str | int, ...], file: str, origins: Origins) -> None:
    """Record for each value below `node` the file and line that it stands on."""
    children: list[tuple[str | int, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
    elif isinstance(node, yaml.SequenceNode):
        children = [(index, item, item) for index, item in enumerate(node.value)]
    for key, marked, child in children:
        origins[(*at, key)] = f"{file}, line {marked.start_mark.line + 1}"
        _note_lines(child, (*at, key), file, origins)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    if "kind" in base and over.get("kind", base["kind"]) != base["kind"]:
        return over
    merged = dict(base)
    for key, value in over.items():
        both_groups = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both_groups else value
    return merged


def apply_override(override: str, values: dict[str, Any], origins: Origins) -> None:
    """Set one `dotted.path=value` in `values`, making groups on the way."""
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    told = override if len(override) <= 200 else override[:199] + "…"
    if not equals or not all(keys):
        raise ConfigError(f"override {told!r} has not the form group.field=value, as train.steps=10 has")
    if len(keys) > MOST_LEVELS:
        raise ConfigError(f"override {told!r}: its name has more than {MOST_LEVELS} parts")
    try:
        _, value = read_yaml(text, "the value")
    except yaml.YAMLError as error:
        raise ConfigError(f"override {told!r}: the value is not valid YAML: {error}") from None
    node: Any = values
    at: tuple[str | int, ...] = ()
    for depth, key in enumerate(keys):
        where = ".".join(keys[:depth])
        name: Any
        if isinstance(node, list):
            name = _list_index(node, key, where, told)
        elif isinstance(node, dict):
            # Keys of budgets are integers in YAML and text in a dotted path.
            name = next((known for known in node if str(known) == key), key)
        else:
            raise ConfigError(f"override {told!r}: {where} is {show(node)}, which has no field {key!r}")
        at = (*at, name)
        last = depth == len(keys) - 1
        if last or (isinstance(node, dict) and node.get(name) is None):
            node[name] = value if last else {}
            for old in [place for place in origins if place[: len(at)] == at]:
                del origins[old]
            origins[at] = f"override {told}"
        node = node[name]


def _list_index(items: list[Any], key: str, where: str, told: str) -> int:
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if key in names:
        return names.index(key)
    if re.fullmatch(r"\d+", key) and int(key) < len(items):
        return int(key)
    known = ", ".join(str(name) for name in names if name is not None)
    known = f" (names: {known})" if known else ""
    raise ConfigError(f"override {told!r}: {where} has {len(items)} items{known}, and none is {key!r}")
