"""cluster.yaml: what Ray's own validator accepts, and what it must never open or start. Nothing here talks to AWS."""

import copy
import importlib.metadata
import re
import socket
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from ray_jobs.cluster_file import texts_in
from ray_jobs.sweep.tune_search import SAFE_NODE_RESOURCE

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The file as written; the network is off."""

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("validation went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # Local paths of file_mounts are relative to the folder of the file.
    monkeypatch.chdir(ROOT)
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    return config


def test_rays_validator_accepts_the_file(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    # Ray fills what is missing from its own defaults, some of which are open ones: nothing must be missing.
    assert set(prepared) - set(cluster) <= {"docker"}
    assert prepared["available_node_types"] == cluster["available_node_types"]


@pytest.mark.parametrize("typo", ["idle_timeout_minute", "setup_comands", "security_group"])
def test_an_unknown_top_level_key_is_refused(cluster: dict[str, Any], typo: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match=typo):
        validate_config(prepare_config({**cluster, typo: []}))


def test_no_work_runs_on_the_head(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0, SAFE_NODE_RESOURCE: 1000}
    assert head["max_workers"] == 0
    assert not any(flag in command for command in cluster["head_start_ray_commands"] for flag in ("--num-cpus", "--num-gpus", "--resources"))


def test_workers_scale_from_zero_to_a_ceiling_and_are_given_back(cluster: dict[str, Any]) -> None:
    workers = {name: kind for name, kind in cluster["available_node_types"].items() if name != cluster["head_node_type"]}
    assert set(workers) == {"cpu", "gpu"}
    for kind in workers.values():
        assert kind["min_workers"] == 0
        assert 1 <= kind["max_workers"] <= cluster["max_workers"]
        # Ray counts them from the machine's type, so that the two cannot disagree.
        assert kind["resources"] == {}
    assert 0 < cluster["idle_timeout_minutes"] <= 30
    # Stopped machines keep their disks.
    assert cluster["provider"]["cache_stopped_nodes"] is False


def test_no_port_is_opened(cluster: dict[str, Any]) -> None:
    assert not re.search(r"0\.0\.0\.0|::/0", "\n".join(texts_in(cluster)))
    assert not {"IpPermissions", "security_group"} & set(_keys(cluster))
    for kind in cluster["available_node_types"].values():
        # Where a type names no group of its own, Ray makes one that accepts ssh from everywhere.
        assert kind["node_config"]["SecurityGroupIds"]
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"


def test_the_dashboard_listens_on_localhost_only(cluster: dict[str, Any]) -> None:
    (start,) = _ray_starts(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "--dashboard" not in start.replace("--dashboard-host=127.0.0.1", "")


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_starts_only_with_a_token(cluster: dict[str, Any], key: str) -> None:
    (start,) = _ray_starts(cluster[key])
    before, _, _ = start.partition("ray start")
    assert re.search(r"export [^;]*\bRAY_AUTH_MODE=token\b[^;]*;", before)
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_file_holds_no_secret(cluster: dict[str, Any]) -> None:
    assert "RAY_AUTH_TOKEN" not in "\n".join(texts_in(cluster))
    assert not {"aws_credentials", "ssh_private_key", "KeyName"} & set(_keys(cluster))
    assert not re.search(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|\b[0-9a-f]{32,}\b", "\n".join(texts_in(cluster)))


def test_what_has_no_default_is_marked_in_a_few_places(cluster: dict[str, Any]) -> None:
    marks = {mark for text in texts_in(cluster) for mark in re.findall(r"\b\w+-CHANGE-ME\b", text)}
    assert marks == {"ami-CHANGE-ME", "sg-CHANGE-ME", "fs-CHANGE-ME"}
    # Each stands once; the other node types refer to it.
    lines = [line for line in (ROOT / "cluster.yaml").read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    assert sum("-CHANGE-ME" in line for line in lines) == len(marks)
    nodes = [kind["node_config"] for kind in cluster["available_node_types"].values()]
    assert all(node["ImageId"] == nodes[0]["ImageId"] and node["SecurityGroupIds"] == nodes[0]["SecurityGroupIds"] for node in nodes)


def test_all_machines_and_the_file_system_are_in_one_region(cluster: dict[str, Any]) -> None:
    region, zones = cluster["provider"]["region"], cluster["provider"]["availability_zone"]
    assert all(zone.strip().startswith(region) for zone in zones.split(","))
    (mount,) = (command for command in cluster["initialization_commands"] if "mount -t" in command)
    assert f".efs.{region}.amazonaws.com:/ /shared" in mount


def test_set_up_installs_what_constraints_pin(cluster: dict[str, Any]) -> None:
    installs = [command for command in cluster["setup_commands"] if "pip install" in command]
    assert installs
    assert all("--constraint ~/sentinode/constraints.txt" in command for command in installs)
    assert any("--python 3.11" in command for command in cluster["setup_commands"])
    assert cluster["file_mounts"]["~/sentinode/constraints.txt"] == "constraints.txt"


def test_nodes_get_all_that_an_installation_needs_and_no_more(cluster: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {pattern.removesuffix("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    files = {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml", "constraints.txt"}
    mounts = {remote: local for remote, local in cluster["file_mounts"].items() if local != "~/.ray/auth_token"}
    assert set(mounts.values()) == packages | files
    assert all(remote == f"~/sentinode/{local}" for remote, local in mounts.items())
    assert [local for local in mounts.values() if not (ROOT / local).exists()] == []
    assert {".git", ".venv", "/out", "/demo", "__pycache__"} <= set(cluster["rsync_exclude"])


def test_the_version_of_ray_is_the_projects(cluster: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (required,) = (match[1] for text in project["dependencies"] if (match := re.fullmatch(r"ray\[[^]]*\]==(.+)", text)))
    asserted = re.findall(r'ray\.__version__ == "([^"]+)"', "\n".join(cluster["setup_commands"]))
    pinned = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert asserted == pinned == [required] == [importlib.metadata.version("ray")]


def test_every_key_is_explained() -> None:
    lines = (ROOT / "cluster.yaml").read_text(encoding="utf-8").splitlines()
    assert [line for above, line in pairwise(lines) if re.match("[a-z_]+:", line) and not above.startswith("#")] == []


def _ray_starts(commands: list[str]) -> list[str]:
    return [command for command in commands if "ray start" in command]


def _keys(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item)
