"""Building the application: settings that reach Serve, and mistakes that stop it. Ray is not started."""

import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest
from ray.serve.exceptions import RayServeException

from sentinode.config import ServeConfig
from sentinode.errors import ConfigError, UsageError
from serve.app import ServeArgs, build_app
from serve.local import usable_port
from tests.factories import make_bundle
from tests.sentinode.test_engines import add_engine


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_bundle(tmp_path_factory.mktemp("bundle") / "bundle").path)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SENTINODE_BUNDLE", raising=False)
    monkeypatch.delenv("SENTINODE_API_KEYS", raising=False)


def settings_of(application: Any) -> dict[str, Any]:
    deployment = application._bound_deployment
    config: dict[str, Any] = deployment._deployment_config.model_dump()
    return config | {"name": deployment.name, "actor": deployment.ray_actor_options}


def test_settings_reach_serve(bundle: str) -> None:
    config = ServeConfig(
        bundle=bundle, auth="none", min_replicas=2, max_replicas=3, max_queued_requests=9, upscale_delay_s=1, downscale_delay_s=50, drain_timeout_s=12
    )
    settings = settings_of(build_app(config))
    assert settings["name"] == "Endpoint"
    assert settings["max_ongoing_requests"] == 64
    assert settings["max_queued_requests"] == 9
    assert settings["backpressure_config"] == {"status_code": 429, "retry_after_s": 1}
    assert settings["graceful_shutdown_timeout_s"] == 12
    assert settings["max_surge_percent"] > 0
    scaling = settings["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (2, 3)
    assert (scaling["upscale_delay_s"], scaling["downscale_delay_s"]) == (1, 50)
    assert settings["actor"]["num_cpus"] == 1


def test_the_bundle_may_be_named_by_the_environment(bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENTINODE_BUNDLE", bundle)
    build_app(ServeArgs(auth="none"))
    with pytest.raises(ConfigError, match="other"):
        build_app(ServeArgs(bundle="/no/such/other", auth="none"))


def engine_of(args: ServeArgs) -> str:
    """What replicas are told."""
    (config,) = (arg for arg in build_app(args)._bound_deployment.init_args if isinstance(arg, ServeConfig))
    return config.engine


def test_all_replicas_get_the_engine_that_was_chosen_when_the_application_was_built(bundle: str, tmp_path: Path) -> None:
    assert engine_of(ServeArgs(bundle=bundle, auth="none")) == "torch"
    made = make_bundle(tmp_path / "bundle")
    add_engine(made, "onnxruntime", times_as_fast=2.0)
    for topology in ("fused", "split"):
        assert engine_of(ServeArgs(bundle=str(made.path), auth="none", topology=topology)) == "onnxruntime"
    assert engine_of(ServeArgs(bundle=str(made.path), auth="none", gpus_per_replica=1)) == "torch"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"auth": "none"}, "bundle: missing; .* SENTINODE_BUNDLE"),
        ({"auth": "none", "bundle": "/no/such"}, "not a model bundle: /no/such"),
        ({"auth": "none", "bundle": "BUNDLE", "engine": "openvino"}, "no engine openvino in it"),
        ({"auth": "none", "bundle": "http://host/b"}, "http:// is not supported"),
        ({"bundle": "BUNDLE"}, "sentinode serve --new-key NAME"),
        ({"bundle": "BUNDLE", "api_keys_file": "/no/such"}, "api_keys_file /no/such"),
        ({"bundel": "BUNDLE"}, "args: unknown key bundel; did you mean bundle?"),
        ({"max_batch_size": 0}, "args: max_batch_size: got 0"),
    ],
)
def test_a_mistake_is_one_line_that_serve_shows_as_it_is(bundle: str, args: dict[str, Any], says: str) -> None:
    args = {key: bundle if value == "BUNDLE" else value for key, value in args.items()}
    # Serve's controller shows a RayServeException's message alone, anything else with its traceback.
    with pytest.raises(RayServeException, match=says.replace("?", r"\?")) as caught:
        build_app(ServeArgs.model_validate(args))
    assert isinstance(caught.value, ConfigError)
    assert "\n" not in str(caught.value)


def test_a_damaged_bundle_is_refused_before_anything_starts(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    manifest = json.loads((bundle.path / "bundle.json").read_text())
    manifest["threshold"] = 0.9
    (bundle.path / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="digest does not match"):
        build_app(ServeConfig(bundle=str(bundle.path), auth="none"))


def test_no_auth_is_loud(bundle: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="ray.serve.sentinode"):
        build_app(ServeConfig(bundle=bundle, auth="none"))
    assert any(record.levelno == logging.WARNING and "auth: none" in record.message for record in caplog.records)


def test_plain_keys_do_not_travel_to_replicas(bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENTINODE_API_KEYS", "plain-key-1")
    deployment = build_app(ServeConfig(bundle=bundle))._bound_deployment
    assert "plain-key-1" not in repr(deployment.init_args)


def test_a_taken_port_is_reported_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match=r"cannot listen on 127\.0\.0\.1 port .*choose another"):
            usable_port("127.0.0.1", taken.getsockname()[1])
