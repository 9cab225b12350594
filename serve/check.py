"""Strict check of a Serve config file. Serve itself drops keys it does not know, at nearly every level, without a word."""

import copy
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ray.runtime_env import RuntimeEnv
from ray.serve.schema import ServeDeploySchema

from sentinode.config import ServeConfig, describe_validation_error, known_keys_hint, parse_config, read_yaml_mapping
from sentinode.errors import ConfigError
from serve.app import BUNDLE_VARIABLE, CLASSIFIER, ENDPOINT, IMPORT_PATH
from serve.auth import KEYS_VARIABLE


def check_serve_file(path: str | Path) -> list[str]:
    """Check a file for `serve run` or `serve deploy`, and return what it leaves to the environment of the cluster, a line each.

    Every key at every level must be one that Serve's own schema has, every value must pass that schema, and the `args` (and names under
    `deployments`) of our application must be ours.

    Raises
    ------
    ConfigError
        One line: file, path of the key, what was expected, the nearest known key.
    """
    content = read_yaml_mapping(path)
    left_open: list[str] = []
    try:
        _check_keys(content, ServeDeploySchema, "")
        _check_values(content, ServeDeploySchema, "")
        for index, application in enumerate(content["applications"]):
            where = f"applications[{index}]"
            import_path = application["import_path"]
            if import_path == IMPORT_PATH:
                config = _check_own_application(application, where)
                _check_proxy_waits(content, config)
                left_open += _left_open(application, config, where)
            elif import_path.partition(".")[0] == IMPORT_PATH.partition(".")[0]:
                raise ConfigError(f"{where}.import_path: got {import_path!r}, expected {IMPORT_PATH}")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return left_open


def _check_own_application(application: Mapping[str, Any], where: str) -> ServeConfig:
    try:
        config = parse_config(ServeConfig, application.get("args") or {})
    except ConfigError as error:
        raise ConfigError(f"{where}.args: {error}") from error
    names = (ENDPOINT, CLASSIFIER) if config.topology == "split" else (ENDPOINT,)
    for index, deployment in enumerate(application.get("deployments") or []):
        if (name := deployment.get("name")) not in names:
            raise ConfigError(f"{where}.deployments[{index}].name: got {name!r}, expected {' or '.join(names)} with topology {config.topology}")
    return config


def _left_open(application: Mapping[str, Any], config: ServeConfig, where: str) -> Iterator[str]:
    set_here = (application.get("runtime_env") or {}).get("env_vars") or {}
    for key, is_open, variable in (
        ("bundle", not config.bundle, BUNDLE_VARIABLE),
        ("api_keys_file", config.auth == "keys" and not config.api_keys_file, KEYS_VARIABLE),
    ):
        if is_open and variable not in set_here:
            yield f"{where}.args.{key} is empty: {variable} must be set where the endpoint runs"


def _check_proxy_waits(content: Mapping[str, Any], config: ServeConfig) -> None:
    waits_s = (content.get("http_options") or {}).get("request_timeout_s")
    longest_s = max(config.request_timeout_s, config.batch_request_timeout_s)
    # Serve takes a number in quotes for one.
    if waits_s is not None and float(waits_s) <= longest_s:
        raise ConfigError(
            f"http_options.request_timeout_s: got {float(waits_s):g}, expected more than the {longest_s:g} of args; "
            "else callers get Ray's bare 408 instead of our 504"
        )


def _check_keys(value: Any, annotation: Any, where: str) -> None:
    """Walk a value next to its annotation and refuse mapping keys that no model there has."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            for inner in _arguments_of(annotation, list):
                _check_keys(item, inner, f"{where}[{index}]")
        return
    if not isinstance(value, dict):
        return
    if models := list(_models_of(annotation)):
        known = {name: field.annotation for model in models for name, field in _fields_by_key(model)}
        _refuse_unknown(value, known, where)
        for key, inner in value.items():
            if key == "runtime_env":
                _check_runtime_env(inner, _join(where, key))
            else:
                _check_keys(inner, known[key], _join(where, key))
        return
    # A mapping of names of the user's choice: only what the names stand for can be checked.
    for inner in _arguments_of(annotation, dict):
        for key, item in value.items():
            _check_keys(item, inner, _join(where, str(key)))


def _check_runtime_env(value: Any, where: str) -> None:
    # Free-form in the schema, but Ray knows the fields; an `env_var` for `env_vars` would lose the bundle's name on every replica.
    if isinstance(value, dict):
        _refuse_unknown(value, RuntimeEnv.known_fields, where)


def _check_values(value: Any, annotation: Any, where: str) -> None:
    """Validate with every model of the annotation, innermost first.

    Separately, because in `dict | AutoscalingConfig` the dict accepts what the model would refuse.
    """
    models = list(_models_of(annotation))
    if isinstance(value, list):
        for index, item in enumerate(value):
            for inner in _arguments_of(annotation, list):
                _check_values(item, inner, f"{where}[{index}]")
    elif isinstance(value, dict) and models:
        for model in models:
            for name, field in _fields_by_key(model):
                if name in value:
                    _check_values(value[name], field.annotation, _join(where, name))
            try:
                # A copy, because some of Serve's validators write into what they are given.
                model.model_validate(copy.deepcopy(value))
            except ValidationError as error:
                problem = describe_validation_error(error, model)
                raise ConfigError(f"{where}: {problem}" if where else problem) from error
            except (ImportError, AttributeError) as error:
                # Serve's validators import what is named by dotted path.
                raise ConfigError(f"{where}: {error}") from error


def _refuse_unknown(value: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    for key in value:
        if key not in known:
            raise ConfigError(f"unknown key {_join(where, str(key))}{known_keys_hint(str(key), known)}")


def _fields_by_key(model: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        yield field.alias or name, field


def _models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a mapping may be read as: the annotation itself or members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        for argument in typing.get_args(annotation):
            yield from _models_of(argument)


def _arguments_of(annotation: Any, container: type) -> Iterator[Any]:
    """The annotations of what a list or dict holds, looking through unions."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is container and arguments:
        yield arguments[-1]
    elif origin in (typing.Union, types.UnionType, typing.Annotated):
        for argument in arguments:
            yield from _arguments_of(argument, container)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
