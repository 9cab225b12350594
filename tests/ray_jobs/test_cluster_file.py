"""The strict check of files for `ray up`, and the files that come with the project."""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_jobs.cluster_file import check_cluster_file
from sentinode.errors import ConfigError
from tests.processes import ROOT

FILES = ["cluster.yaml", "deploy/clusters/gcp.yaml", "deploy/clusters/local.yaml"]


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    # Local paths of file_mounts are relative to where `ray up` runs.
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", FILES)
def test_our_files_are_right_and_say_what_is_to_be_filled_in(name: str) -> None:
    check_cluster_file(name, filled_in=False)
    with pytest.raises(ConfigError, match=r"still to be filled in: \S*CHANGE-ME"):
        check_cluster_file(name)


def bent(tmp_path: Path, name: str, bend: Callable[[dict[str, Any]], None]) -> Path:
    content = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    bend(content)
    path = tmp_path / "bent.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_what_every_cloud_knows_of_addresses_is_no_mistake(tmp_path: Path) -> None:
    for name in ("cluster.yaml", "deploy/clusters/gcp.yaml"):
        content = yaml.safe_load((ROOT / name).read_text())
        content["provider"] |= {"use_internal_ips": True, "use_external_head_ip": True}
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(content))
        check_cluster_file(tmp_path / "cluster.yaml", filled_in=False)


def _rename(mapping: dict[str, Any], old: str, new: str) -> None:
    mapping[new] = mapping.pop(old)


@pytest.mark.parametrize(
    ("name", "bend", "message"),
    [
        ("cluster.yaml", lambda c: _rename(c, "setup_commands", "setup_comands"), "setup_comands"),
        ("cluster.yaml", lambda c: _rename(c["auth"], "ssh_user", "ssh_usr"), "ssh_usr"),
        ("cluster.yaml", lambda c: _rename(c["provider"], "region", "regoin"), r"unknown key provider\.regoin; did you mean region\?"),
        (
            "cluster.yaml",
            lambda c: _rename(c["available_node_types"]["gpu"]["node_config"], "SecurityGroupIds", "SecurityGroupId"),
            r"unknown key available_node_types\.gpu\.node_config\.SecurityGroupId; did you mean SecurityGroupIds\?",
        ),
        ("cluster.yaml", lambda c: c["available_node_types"]["cpu"].update(min_worker=1), "min_worker"),
        ("cluster.yaml", lambda c: c.update(max_workers="8"), "'8' is not of type 'integer'"),
        ("deploy/clusters/gcp.yaml", lambda c: _rename(c["provider"], "project_id", "project"), r"unknown key provider\.project; did you mean"),
        ("deploy/clusters/gcp.yaml", lambda c: c["available_node_types"]["gpu"]["node_config"].update(ImageId="x"), r"node_config\.ImageId"),
        ("deploy/clusters/local.yaml", lambda c: _rename(c["provider"], "worker_ips", "workers_ips"), "worker"),
        ("deploy/clusters/local.yaml", lambda c: c["provider"].update(type="azure2"), "azure2"),
    ],
)
def test_a_key_that_ray_would_pass_over_is_named(tmp_path: Path, name: str, bend: Callable[[dict[str, Any]], None], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_cluster_file(bent(tmp_path, name, bend), filled_in=False)
    assert "\n" not in str(caught.value)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a token and a key."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (".ray/auth_token", ".ssh/id_ed25519"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    return tmp_path


def filled_in(tmp_path: Path, name: str, **ids: str) -> Path:
    """What docs/cluster.md's command makes of a file, with these ids instead of right ones."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for prefix in ("ami", "sg", "fs"):
        text = text.replace(f"{prefix}-CHANGE-ME", ids.get(prefix, f"{prefix}-01"))
    path = tmp_path / "my-cluster.yaml"
    path.write_text(re.sub(r"[a-z0-9]+-CHANGE-ME", "10.0.0.1", text))
    return path


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_filled_in_passes_where_what_it_copies_is_here(home: Path, name: str) -> None:
    check_cluster_file(filled_in(home, name))
    (home / ".ray/auth_token").unlink()
    with pytest.raises(ConfigError, match=r"file_mounts: ~/\.ray/auth_token: there is no such file; `ray get-auth-token --generate` makes it"):
        check_cluster_file(filled_in(home, name))
    if name.endswith("local.yaml"):
        (home / ".ray/auth_token").touch()
        (home / ".ssh/id_ed25519").unlink()
        with pytest.raises(ConfigError, match=r"auth\.ssh_private_key: ~/\.ssh/id_ed25519: there is no such file"):
            check_cluster_file(filled_in(home, name))


def test_what_a_command_that_failed_leaves_of_an_id_is_refused(home: Path) -> None:
    for prefix, wrong, message in (
        ("ami", "", r"head\.node_config\.ImageId: got None, expected an id"),
        ("ami", "None", r"head\.node_config\.ImageId: got 'None', expected an id"),
        ("sg", "", r"head\.node_config\.SecurityGroupIds: got \[\], expected ids"),
        ("sg", "None", r"head\.node_config\.SecurityGroupIds: got \['None'\], expected ids"),
        ("fs", "", r"expected the id of a file system"),
        ("fs", "None", r"expected the id of a file system"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_cluster_file(filled_in(home, "cluster.yaml", **{prefix: wrong}))


@pytest.mark.parametrize("name", FILES)
def test_no_port_is_opened_and_ray_asks_for_a_token(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    written = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    content = yaml.safe_load(text)
    assert not re.search(r"0\.0\.0\.0|::/0", written)
    assert "RAY_AUTH_TOKEN" not in written
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = (command for command in content[key] if "ray start" in command)
        assert re.search(r"export [^;]*\bRAY_AUTH_MODE=token\b", start.partition("ray start")[0])
    assert "--dashboard-host=127.0.0.1" in "\n".join(content["head_start_ray_commands"])
    assert content["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("name", FILES)
def test_every_top_level_key_is_explained(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert [line for above, line in pairwise(lines) if re.match("[a-z_]+:", line) and not above.startswith("#")] == []


def test_all_files_install_the_same_on_every_node() -> None:
    first, *others = (yaml.safe_load((ROOT / name).read_text(encoding="utf-8")) for name in FILES)
    for other in others:
        for key in ("setup_commands", "file_mounts", "rsync_exclude", "worker_start_ray_commands"):
            assert other[key] == first[key], key
        # On machines that are there already the head asks for another autoscaler, and for nothing else.
        started = [text.replace("export RAY_enable_autoscaler_v2=0; ", "") for text in other["head_start_ray_commands"]]
        assert started == first["head_start_ray_commands"]
