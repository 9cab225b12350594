"""What pydantic says about a wrong configuration, told in one line: key, value, what was expected."""

import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_Location = tuple[int | str, ...]


def describe_validation_error(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for the first problem: key, value, what was expected; the nearest key for an unknown one; how many more there are."""
    by_key: dict[_Location, list[ErrorDetails]] = {}
    for problem in error.errors(include_url=False):
        by_key.setdefault(_key_at(model, problem["loc"])[0], []).append(problem)
    # An unknown key often explains the other complaints (a misspelt required key, for instance), so it goes first.
    location, problems = min(by_key.items(), key=lambda item: item[1][0]["type"] != "extra_forbidden")
    key = ".".join(map(str, location))
    first = min(problems, key=lambda problem: len(problem["loc"]))
    more = f" (and {len(by_key) - 1} more)" if len(by_key) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}{_hint(model, first['loc'])}{more}"
    if first["type"] == "missing":
        if isinstance(location[-1], int):
            return f"{'.'.join(map(str, location[:-1]))}: value {location[-1] + 1} of the list is missing{more}"
        return f"{key}: missing{more}"
    message = first["msg"].removeprefix("Value error, ") if first["type"] != "tuple_type" else "Input should be a list in brackets"
    if not key:
        return f"{message}{more}"
    if first["type"] == "value_error":
        return f"{key}: {message}{more}"
    # A value that may be of several kinds has one complaint per kind.
    others = dict.fromkeys(problem["msg"].removeprefix("Input should be ") for problem in problems if problem is not first)
    return f"{key}: got {first['input']!r}, {' or '.join([message[0].lower() + message[1:], *others])}{more}"


def known_keys_hint(key: str, known: Iterable[str]) -> str:
    """Return what follows "unknown key …": the nearest of the known keys, else all of them."""
    among = sorted(known)
    close = difflib.get_close_matches(key, among, n=1)
    return f"; did you mean {close[0]}?" if close else (f"; known keys: {', '.join(among)}" if among else "")


def _hint(model: type[BaseModel], location: _Location) -> str:
    parent = _key_at(model, location[:-1])[1]
    return known_keys_hint(str(location[-1]), parent.model_fields if _is_model(parent) else ())


def _key_at(model: type[BaseModel], location: _Location) -> tuple[_Location, Any]:
    """The part of a location that a person wrote, and the type there: pydantic adds a name for the arm of a union that it tried."""
    annotation: Any = model
    key: list[int | str] = []
    for part in location:
        arms = _arms(annotation)
        if len(arms) > 1:
            annotation = next((arm for arm in arms if _is_model(arm) and _is_named(arm, str(part))), None)
            if annotation is None:
                break
            continue
        key.append(part)
        field = arms[0].model_fields.get(str(part)) if _is_model(arms[0]) else None
        annotation = field.annotation if field else None
    arms = _arms(annotation)
    return tuple(key), arms[0] if len(arms) == 1 else None


def _arms(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Annotated:
        return _arms(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [found for arm in typing.get_args(annotation) if arm is not type(None) for found in _arms(arm)]
    return [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _is_named(arm: type[BaseModel], name: str) -> bool:
    """Whether pydantic calls an arm by this name: its class, or the value of the field that tells the arms apart."""
    return name == arm.__name__ or any(name in typing.get_args(field.annotation) for field in arm.model_fields.values())
