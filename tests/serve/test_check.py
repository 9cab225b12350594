from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

import serve
from sentinode.config import ServeConfig
from sentinode.errors import ConfigError
from serve.check import check_serve_file
from tests.processes import ROOT

SHIPPED = sorted(Path(serve.__file__).parent.glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_pass(path: Path) -> None:
    check_serve_file(path)


def test_the_shipped_file_shows_every_field_with_its_default() -> None:
    content = yaml.safe_load((Path(serve.__file__).parent / "config.yaml").read_text())
    assert content["applications"][0]["args"] == ServeConfig().model_dump()


def test_what_a_file_leaves_to_the_environment_is_said(tmp_path: Path) -> None:
    content = yaml.safe_load((Path(serve.__file__).parent / "config.yaml").read_text())
    application, path = content["applications"][0], tmp_path / "config.yaml"

    def left_open() -> list[str]:
        path.write_text(yaml.safe_dump(content))
        return [line.partition(" is empty: ")[0] for line in check_serve_file(path)]

    assert left_open() == ["applications[0].args.bundle", "applications[0].args.api_keys_file"]
    application["runtime_env"] = {"env_vars": {"SENTINODE_BUNDLE": "/shared/bundle"}}
    assert left_open() == ["applications[0].args.api_keys_file"]
    application["args"]["auth"] = "none"
    assert left_open() == []
    application.pop("runtime_env")
    application["args"] |= {"auth": "keys", "api_keys_file": "/shared/keys", "bundle": "/shared/bundle"}
    assert left_open() == []


@pytest.mark.parametrize("name", ["config.yaml", "config.gpu.yaml"])
def test_shipped_files_listen_on_this_machine_and_leave_timeouts_to_us(name: str) -> None:
    content = yaml.safe_load((Path(serve.__file__).parent / name).read_text())
    args = content["applications"][0]["args"]
    assert args.keys() == ServeConfig().model_dump().keys()
    assert content["http_options"]["host"] == "127.0.0.1"
    assert content["http_options"]["request_timeout_s"] > max(args["request_timeout_s"], args["batch_request_timeout_s"])
    assert args["target_ongoing_requests"] <= args["max_ongoing_requests"]


GOOD: dict[str, Any] = {
    "proxy_location": "HeadOnly",
    "http_options": {"host": "127.0.0.1", "port": 8000},
    "grpc_options": {"port": 9000},
    "logging_config": {"encoding": "JSON"},
    "applications": [
        {
            "name": "s",
            "route_prefix": "/",
            "import_path": "serve.app:build_app",
            "runtime_env": {"env_vars": {"SENTINODE_BUNDLE": "/b"}},
            "args": {"bundle": "/b", "max_batch_size": 8},
            "deployments": [
                {
                    "name": "Endpoint",
                    "max_ongoing_requests": 64,
                    "autoscaling_config": {
                        "min_replicas": 1,
                        "max_replicas": 2,
                        "policy": {"policy_function": "ray.serve.autoscaling_policy:default_autoscaling_policy"},
                    },
                    "ray_actor_options": {"num_cpus": 1, "runtime_env": {"env_vars": {}}},
                    "backpressure_config": {"status_code": 429},
                    "user_config": {"anything": {"goes": 1}},
                    "logging_config": {"encoding": "JSON"},
                    "placement_group_bundles": [{"CPU": 1, "accelerator": 1}],
                }
            ],
        },
        {"name": "other", "route_prefix": "/other", "import_path": "elsewhere:app", "args": {"whatever": 1}},
    ],
}
APP = ("applications", 0)
DEPLOYMENT = (*APP, "deployments", 0)


def check(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    check_serve_file(path)


def changed(where: tuple[str | int, ...], key: str, value: Any) -> dict[str, Any]:
    content = deepcopy(GOOD)
    target: Any = content
    for part in where:
        target = target[part]
    target.pop("num_replicas", None)
    target[key] = value
    return content


def test_a_full_correct_file_passes(tmp_path: Path) -> None:
    check(tmp_path, GOOD)


@pytest.mark.parametrize(
    ("where", "key", "hint"),
    [
        ((), "proxy_locaton", "unknown key proxy_locaton; did you mean proxy_location?"),
        (("http_options",), "prot", "unknown key http_options.prot; did you mean port?"),
        (("grpc_options",), "prot", "unknown key grpc_options.prot"),
        (("logging_config",), "log_levl", "unknown key logging_config.log_levl; did you mean log_level?"),
        (APP, "import_paht", r"unknown key applications\[0\].import_paht; did you mean import_path?"),
        ((*APP, "args"), "max_batch_sise", r"applications\[0\].args: unknown key max_batch_sise; did you mean max_batch_size?"),
        ((*APP, "runtime_env"), "env_var", r"unknown key applications\[0\].runtime_env.env_var; did you mean env_vars?"),
        (DEPLOYMENT, "max_ongoing_reqests", r"applications\[0\].deployments\[0\].max_ongoing_reqests; did you mean max_ongoing_requests?"),
        ((*DEPLOYMENT, "autoscaling_config"), "min_replica", r"deployments\[0\].autoscaling_config.min_replica; did you mean min_replicas?"),
        ((*DEPLOYMENT, "autoscaling_config", "policy"), "policy_functoin", r"autoscaling_config.policy.policy_functoin; did you mean"),
        ((*DEPLOYMENT, "ray_actor_options"), "num_cpu", r"ray_actor_options.num_cpu; did you mean num_cpus?"),
        ((*DEPLOYMENT, "ray_actor_options", "runtime_env"), "pips", r"ray_actor_options.runtime_env.pips; did you mean pip?"),
        ((*DEPLOYMENT, "backpressure_config"), "retry_after", r"backpressure_config.retry_after; did you mean retry_after_s?"),
        ((*DEPLOYMENT, "logging_config"), "encodig", r"deployments\[0\].logging_config.encodig; did you mean encoding?"),
    ],
)
def test_a_typo_is_caught_at_every_level(tmp_path: Path, where: tuple[str | int, ...], key: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint.replace("?", r"\?")) as caught:
        check(tmp_path, changed(where, key, 1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("where", "key", "value", "says"),
    [
        (("http_options",), "port", "eight", "http_options: port: got 'eight'"),
        ((*APP, "args"), "auth", "open", r"applications\[0\].args: auth: got 'open'"),
        ((*APP, "args"), "max_ongoing_requests", 2, "max_ongoing_requests 2 must be at least max_batch_size 8"),
        ((*DEPLOYMENT, "autoscaling_config"), "max_replicas", 0, r"autoscaling_config: max_replicas: got 0"),
        (DEPLOYMENT, "name", "Classifier", r"deployments\[0\].name: got 'Classifier', expected Endpoint with topology fused"),
        ((*DEPLOYMENT, "autoscaling_config", "policy"), "policy_function", "no_such_module:f", r"autoscaling_config.policy: No module named"),
        ((), "applications", None, "applications"),
        ((), "applications", [1], "applications"),
        ((), "applications", [{"name": "x"}], "import_path: missing"),
    ],
)
def test_a_wrong_value_is_caught(tmp_path: Path, where: tuple[str | int, ...], key: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        check(tmp_path, changed(where, key, value))
    assert "\n" not in str(caught.value)


def test_split_admits_both_deployments(tmp_path: Path) -> None:
    content = changed(DEPLOYMENT, "name", "Classifier")
    content["applications"][0]["args"]["topology"] = "split"
    check(tmp_path, content)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        check_serve_file(tmp_path / "none.yaml")


def test_a_mistyped_path_to_our_own_application_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("applications:\n  - {name: a, route_prefix: /, import_path: 'serve.app:buid_app', args: {bundel: x}}\n")
    with pytest.raises(ConfigError, match=r"applications\[0\]\.import_path: got 'serve\.app:buid_app', expected serve\.app:build_app"):
        check_serve_file(path)


def test_a_proxy_that_would_not_wait_for_our_answer_is_refused(tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    # Serve takes a number in quotes too.
    for too_short in (300, "300"):
        content["http_options"]["request_timeout_s"] = too_short
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(ConfigError, match=r"http_options\.request_timeout_s: got 300, expected more than the 300 of args"):
            check_serve_file(tmp_path / "config.yaml")
    content["http_options"]["request_timeout_s"] = "310"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    check_serve_file(tmp_path / "config.yaml")
