"""From YAML files and `key=value` settings to a configuration; whatever is wrong is one line that names the key."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from sentinode.config.base import Config
from sentinode.config.errors import describe_validation_error
from sentinode.config.paths import merge, set_by_path
from sentinode.errors import ConfigError
from sentinode.locations import Location, locate

ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(model: type[ConfigT], yaml_files: Sequence[str | Path] = (), settings: Sequence[str] = (), **overrides: Any) -> ConfigT:
    """Build a configuration: defaults, then each YAML file, then `a.b=value` settings (values are YAML), then overrides.

    Raises
    ------
    ConfigError
        A file is missing or not a mapping, a key is unknown, or a value is wrong; one line names it.
    """
    fields: dict[str, Any] = {}
    for path in yaml_files:
        for key, value in read_yaml_mapping(path).items():
            fields[key] = merge(fields.get(key), value)
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {setting!r}: expected key=value, e.g. --set epochs=3")
        try:
            value = _parse_yaml(text)
        except ValueError as error:
            raise ConfigError(f"--set {setting!r}: the value is not YAML") from error
        try:
            set_by_path(fields, key, value)
        except ValueError as error:
            raise ConfigError(f"--set {setting!r}: {error}") from error
    fields.update(overrides)
    return parse_config(model, fields)


def parse_config(model: type[ConfigT], fields: Mapping[str, Any]) -> ConfigT:
    """Validate `fields`; a ConfigError names the first wrong key, its value and what was expected."""
    try:
        return model(**fields)
    except ValidationError as error:
        raise ConfigError(describe_validation_error(error, model)) from error


def read_yaml_mapping(path: str | Path | Location) -> dict[str, Any]:
    """Read a YAML file that holds a mapping with string keys (an empty file is an empty mapping).

    Raises
    ------
    ConfigError
        The file is missing, is not YAML, or holds something else.
    """
    try:
        content = _parse_yaml(locate(path).read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"config file {path}: not YAML ({error})") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"config file {path}: expected a mapping of keys to values")
    return content


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, where YAML's own loader lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} stands there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str) -> Any:
    """Parse YAML with a SafeLoader, which runs nothing in it; ValueError of one line where it is malformed."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error
