"""Turns what pydantic says about a config into what its author needs: field, value, range, meaning, place."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pipeline.config.group import CheckedBy, Group

# Where each value was written, by its path of keys and list indexes.
Origins = dict[tuple[str | int, ...], str]
MOST_PROBLEMS = 6
NO_FIELD = ("extra_forbidden", "invalid_key")  # what a field is named that there is not: a word, a number


def show(value: object) -> str:
    """A value as one would write it in YAML, shortened to 70 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 70 else text[:69] + "…"


def explain(
    error: ValidationError, values: Mapping[str, Any], origins: Origins, file: str, schema: type[Group]
) -> str:
    """One screen: per problem the field, what was given, what is allowed, what it means, where it stands."""
    problems: dict[str, list[str]] = {}
    for details in error.errors(include_url=False):
        items = details["input"]
        if details["type"] == "too_short" and len(items) >= details["ctx"]["min_length"]:
            continue  # only because its items have errors, which are told themselves
        if details["type"] == "misplaced_switch":
            details["loc"] = (*details["loc"], *details["ctx"]["at"])
            for key in details["ctx"]["at"]:
                details["input"] = details["input"][key]
        place = _locate(details["loc"], values, schema)
        # A value that fits no member of a union has one error a member: the first one tells all.
        problems.setdefault(place.shown, _tell(details, place, origins, file))
    texts = ["\n".join(lines) for lines in problems.values()]
    count = f"{len(texts)} problem{'s' if len(texts) > 1 else ''}"
    rest = [f"… and {len(texts) - MOST_PROBLEMS} more"] if len(texts) > MOST_PROBLEMS else []
    return "\n".join([f"{file}: {count}", *texts[:MOST_PROBLEMS], *rest])


@dataclass
class _Place:
    """A spot in a config: keys into the raw values, the path as users write it, and the schema there."""

    keys: tuple[str | int, ...]
    shown: str
    annotation: Any
    metadata: list[Any]
    description: str | None
    group: type[Group]  # the group that holds the field
    kinds: list[type[Group]]  # what this group may be instead, where its `tag` chooses
    schema: type[Group]  # of the whole file


def _tell(details: ErrorDetails, place: _Place, origins: Origins, file: str) -> list[str]:
    kind = details["type"]
    given = details["input"]
    head = f"{place.shown} = {show(given)}"
    keys, notes = place.keys, list[str]()
    overrides: set[str] = set()  # that touch what a group-wide rule is about
    if kind == "missing":
        head, keys = f"{place.shown} is missing", keys[:-1]
        notes.append(f"needed: {_describe(place.annotation, place.metadata)}")
    elif kind in NO_FIELD:
        head = f"{place.shown} is no field"
        notes.append(_suggest(str(place.keys[-1]), place))
    elif kind == "value_error":
        reason = str(details["ctx"]["error"])
        if isinstance(given, dict):
            below = [text for at, text in origins.items() if at[: len(keys)] == keys]
            overrides = {text for text in below if text.startswith("override")}
            head = f"{place.shown}: {reason}" if place.shown else reason
        else:
            notes.append(reason)
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = _members(place.annotation)[0].tag
        head = f"{place.shown}.{tag}" + (f" = {show(given[tag])}" if tag in given else " is missing")
        notes.append(f"allowed: {_describe(place.annotation, [])}")
        keys = (*keys, tag)
    else:
        if kind == "misplaced_switch":
            notes.append("YAML reads yes, no, on and off as true and false")
        notes.append(f"allowed: {_describe(place.annotation, place.metadata)}")
    if place.description and kind not in NO_FIELD:
        notes.append(f"meaning: {place.description}")
    while keys and keys not in origins:
        keys = keys[:-1]
    notes.append("in " + ", ".join([origins.get(keys, file), *sorted(overrides - {origins.get(keys)})]))
    return [f"\n  {head}", *(f"      {note}" for note in notes)]


def _plain(annotation: Any) -> tuple[Any, list[Any]]:
    """The type under `Annotated` and `| None`, and the constraints that `Annotated` carried."""
    metadata: list[Any] = []
    if get_origin(annotation) is Annotated:
        annotation, *extras = get_args(annotation)
        for extra in extras:
            if isinstance(extra, CheckedBy):
                return _plain(extra.annotation)
            metadata += extra.metadata if isinstance(extra, FieldInfo) else [extra]
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        if len(members) == 1:
            return _plain(members[0])
    return annotation, metadata


def _members(annotation: Any) -> list[Any]:
    """The types of a union, or the type itself."""
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return [m for m in get_args(annotation) if m is not type(None)] if is_union else [annotation]


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Group)


def _kind(group: type[Group]) -> str:
    return str(get_args(group.model_fields[group.tag].annotation)[0])


def _locate(loc: tuple[str | int, ...], values: Any, schema: type[Group]) -> _Place:
    """Follow pydantic's location through the schema, leaving out its names of union members."""
    place = _Place((), "", schema, [], None, schema, [], schema)
    about_key = loc[-1:] == ("[key]",)  # the last step says that the key itself is wrong
    for step in loc[:-1] if about_key else loc:
        annotation, members = place.annotation, _members(place.annotation)
        origin = get_origin(annotation)
        if len(members) > 1:
            chosen = [m for m in members if _is_group(m) and _kind(m) == step]
            if not chosen:  # "int", "literal['full']": the whole union is what is allowed
                break
            place.annotation, place.kinds = chosen[0], members
            continue
        name = str(step)
        if _is_group(annotation):
            field = annotation.model_fields.get(step)
            if place.group is not annotation and annotation not in place.kinds:
                place.kinds = []
            place.group = annotation
            if field:
                place.annotation, metadata = _plain(field.annotation)
                place.metadata, place.description = [*field.metadata, *metadata], field.description
            else:
                place.annotation, place.metadata, place.description = Any, [], None
        elif origin in (tuple, list):
            place.annotation, place.metadata = _plain(get_args(annotation)[0])
        elif origin is dict:
            place.annotation, place.metadata = get_args(annotation)[0 if about_key else 1], []
        if isinstance(values, list) and isinstance(step, int):
            values = values[step]
            if isinstance(values, dict) and isinstance(values.get("name"), str):
                name = values["name"]
        elif isinstance(values, dict):
            values = values.get(step)
        place.keys = (*place.keys, step)
        place.shown = f"{place.shown}.{name}" if place.shown else name
    return place


def _describe(annotation: Any, metadata: list[Any]) -> str:
    """What a field takes, in words: type, range, number of items, pattern."""
    annotation, more = _plain(annotation)
    members = _members(annotation)
    bounds = {
        name: getattr(item, name)
        for item in [*metadata, *more]
        for name in ("ge", "gt", "le", "lt", "min_length", "pattern")
        if getattr(item, name, None) is not None
    }
    if all(_is_group(member) for member in members):
        if len(members) == 1:
            return f"a group with {', '.join(members[0].model_fields)}"
        return f"{members[0].tag}: " + ", ".join(_kind(member) for member in members)
    if len(members) > 1:
        text = " or ".join(_describe(member, []) for member in members)
    elif get_origin(annotation) is Literal:
        text = ", ".join(str(value) for value in get_args(annotation))
    elif get_origin(annotation) in (tuple, list):
        least = f" of at least {bounds.pop('min_length')}" if "min_length" in bounds else ""
        text = f"a list{least}, each item {_describe(get_args(annotation)[0], [])}"
    elif get_origin(annotation) is dict:
        key, value = get_args(annotation)
        text = "fields of your own" if value is Any else f"{_describe(key, [])} → {_describe(value, [])}"
    else:
        text = {int: "an integer", float: "a number", str: "text", bool: "true or false"}[annotation]
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    limits = [f"{word} {bounds[name]}" for name, word in words.items() if name in bounds]
    if "min_length" in bounds:
        limits.append(f"at least {bounds['min_length']} characters")
    if "pattern" in bounds:
        limits.append(f"matching {bounds['pattern']}")
    return text + (", " + " and ".join(limits) if limits else "")


def _suggest(name: str, place: _Place) -> str:
    """The nearest field of the group; else such a name elsewhere; else all fields of the group."""
    own = list(place.group.model_fields)
    others = [_kind(other) for other in place.kinds if name in other.model_fields]
    if others:
        tag = place.group.tag
        return f"it belongs to {tag} {' and '.join(others)}, and this is {tag} {_kind(place.group)}"
    elsewhere: dict[str, list[str]] = {}
    for path in _all_fields(place.schema, ""):
        elsewhere.setdefault(path.rpartition(".")[2], []).append(path)
    near = difflib.get_close_matches(name, own, n=1, cutoff=0.7 if name in elsewhere else 0.6)
    if near:
        return f"did you mean {near[0]}?"
    there = [name] if name in elsewhere else difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.6)
    if there:
        paths = elsewhere[there[0]]
        depth = min(path.count(".") for path in paths)
        return "did you mean " + " or ".join(path for path in paths if path.count(".") == depth) + "?"
    return f"the fields of {place.shown.rpartition('.')[0] or 'a config'} are {', '.join(own)}"


def _all_fields(group: type[Group], prefix: str) -> Iterator[str]:
    """Dotted paths of all fields, `<name>` standing for items of lists; each path once."""
    seen = set()
    for name, field in group.model_fields.items():
        annotation, _ = _plain(field.annotation)
        below = f"{prefix}{name}."
        if get_origin(annotation) is tuple:
            annotation, _ = _plain(get_args(annotation)[0])
            below += "<name>."
        paths = [prefix + name]
        for member in _members(annotation):
            if _is_group(member):
                paths += _all_fields(member, below)
        for path in paths:
            if path not in seen:
                seen.add(path)
                yield path
