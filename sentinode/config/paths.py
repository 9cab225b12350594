"""Nested mappings addressed by dotted keys."""

from collections.abc import Mapping
from typing import Any


def merge(old: Any, new: Any) -> Any:
    """Overlay nested mappings; anything else is replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: merge(old.get(key), value) for key, value in new.items()}
    return new


def set_by_path(fields: dict[str, Any], path: str, value: Any) -> None:
    """Set `fields["a"]["b"] = value` for the path `a.b`, copying the mappings on the way; ValueError where `a` is not a mapping."""
    head, dot, rest = path.partition(".")
    if not head or (dot and not rest):
        raise ValueError("a key has an empty part")
    if not rest:
        fields[head] = value
        return
    inner = fields.get(head, {})
    if not isinstance(inner, Mapping):
        raise ValueError(f"{head} is {inner!r}, not a mapping")
    copied = dict(inner)
    set_by_path(copied, rest, value)
    fields[head] = copied
