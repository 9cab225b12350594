"""What the cluster may still add: read from the autoscaler's file or the environment, and a real autoscaler that begins with a head without CPUs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from data_prep.synth import synthesize
from ray_jobs import autoscaling, cluster
from ray_jobs.autoscaling import NodeType, growth, node_types, places_on
from ray_jobs.cluster import Need, check_capacity
from sentinode.errors import CapacityError, ConfigError
from tests import s3
from tests.conditions import wait_until
from tests.heads import HeadMachine, machine_for_a_head
from tests.processes import ROOT

CLOUD = {
    "max_workers": 6,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}},
        "cpu": {"resources": {"CPU": 4}, "max_workers": 4},
        "gpu": {"resources": {"CPU": 8, "GPU": 1}},
    },
}
FLOOR = {
    "max_workers": 2,
    "head_node_type": "node",
    "provider": {"type": "local"},
    "available_node_types": {"node": {"resources": {}, "max_workers": 2}},
}
TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
HEAD = {"Alive": True, "Resources": {"node:__internal_head__": 1.0}}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that sets what Ray tells of its nodes, and what the autoscaler's file holds."""

    def tell(config: dict[str, Any] | None, *nodes: dict[str, float]) -> None:
        there = [HEAD, *({"Alive": True, "Resources": node} for node in nodes)]
        total = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
        monkeypatch.setattr("ray.nodes", lambda: there)
        monkeypatch.setattr("ray.cluster_resources", lambda: total)
        monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:1"))
        monkeypatch.setattr("ray._private.state.state.get_max_resources_from_cluster_config", lambda: None)
        monkeypatch.setattr(autoscaling, "_autoscaler_config", lambda _: config)
        for name in ("SENTINODE_CLUSTER_MAX", TIMEOUT):
            # Set first, so that it is as it was again afterwards.
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)

    return tell


def test_a_file_tells_the_kinds_of_nodes_and_how_many_there_may_be() -> None:
    assert node_types(CLOUD) == (6, [NodeType({"CPU": 4.0, "GPU": 0.0}, 4), NodeType({"CPU": 8.0, "GPU": 1.0}, 6)])
    assert node_types(FLOOR) == (2, [NodeType(None, 2)])
    # Ray starts none of an unknown kind for a job.
    assert node_types(FLOOR | {"provider": {"type": "aws"}}) == (2, [])
    assert node_types({}) == (0, [])


def test_a_cluster_that_begins_at_zero_takes_what_it_may_grow_to(told: Any) -> None:
    told(CLOUD)
    assert cluster.capacity() == {"CPU": 48.0, "GPU": 6.0}
    assert cluster.wants_gpus("auto", 6)
    assert not cluster.wants_gpus("auto", 7)
    check_capacity(Need(workers=5, cpus_per_worker=8, gpus_per_worker=1), "train")
    with pytest.raises(CapacityError, match=r"train needs 49 CPUs .*; the cluster has 48 and cannot add more"):
        check_capacity(Need(workers=6, cpus_per_worker=8, gpus_per_worker=1), "train")
    with pytest.raises(CapacityError, match=r"^train: no worker of 9 CPUs each would have room, since each must fit one node$"):
        check_capacity(Need(workers=1, cpus_per_worker=9), "train")
    with pytest.raises(CapacityError, match=r"^train: only 6 of 7 workers of 5 CPUs each would have room, since each must fit one node$"):
        check_capacity(Need(workers=7, cpus_per_worker=5), "train")


def test_nodes_that_are_still_to_come_are_given_the_time_they_take(told: Any) -> None:
    told(None, {"CPU": 4.0})
    check_capacity(Need(workers=1), "train")
    assert os.environ[TIMEOUT] == "60"
    # Also where there is enough: it may be taken.
    told(CLOUD, {"CPU": 4.0})
    check_capacity(Need(workers=1), "train")
    assert os.environ[TIMEOUT] == "900"


def test_machines_that_have_not_joined_may_have_anything_and_those_that_have_are_known(told: Any) -> None:
    told(FLOOR, {"CPU": 4.0})
    assert cluster.capacity() == {"CPU": math.inf, "GPU": math.inf}
    check_capacity(Need(workers=2, cpus_per_worker=8), "train")
    # What is not known is not counted on where there is a choice.
    assert not cluster.wants_gpus("auto", 1)
    assert cluster.known_capacity() == {"CPU": 4.0, "GPU": 0.0}
    told(FLOOR, {"CPU": 4.0}, {"CPU": 4.0})
    assert cluster.capacity() == {"CPU": 8.0, "GPU": 0.0}
    with pytest.raises(CapacityError, match="the cluster has 8 and cannot add more"):
        check_capacity(Need(workers=2, cpus_per_worker=8), "train")
    with pytest.raises(CapacityError, match="no worker of 6 CPUs each would have room"):
        check_capacity(Need(workers=1, cpus_per_worker=6), "train")


def test_without_an_autoscaler_that_can_be_read_what_is_there_counts(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told(None, {"CPU": 4.0})
    assert growth() is None
    with pytest.raises(CapacityError, match="the cluster has 4 and cannot add more"):
        check_capacity(Need(workers=4), "prepare")
    monkeypatch.setenv("SENTINODE_CLUSTER_MAX", "CPU=64 GPU=8")
    limit = growth()
    assert limit is not None
    assert limit.limit == {"CPU": 64.0, "GPU": 8.0}
    check_capacity(Need(workers=8, cpus_per_worker=6, gpus_per_worker=1), "train")
    for wrong in ("64", "CPU=many", "cpu=4", " ", "CPU=nan", "GPU=-1"):
        monkeypatch.setenv("SENTINODE_CLUSTER_MAX", wrong)
        with pytest.raises(ConfigError, match="expected amounts like CPU=64 GPU=8"):
            growth()


def test_the_file_is_that_of_the_autoscaler_of_this_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in {"ours": json.dumps(CLOUD), "broken": "{", "list": "[]"}.items():
        (tmp_path / name).write_text(content)
    lines: list[list[str] | None] = []
    monkeypatch.setattr(psutil, "process_iter", lambda _: [SimpleNamespace(info={"cmdline": line, "cwd": str(tmp_path)}) for line in lines])

    def monitor(address: str, file: str) -> list[str]:
        return ["python", "monitor.py", "--logs-dir=/tmp", f"--gcs-address={address}", f"--autoscaling-config={tmp_path / file}"]

    lines += [None, ["raylet"], monitor("127.0.0.1:1111", "list"), monitor("203.0.113.1:2222", "list"), ["x", "--gcs-address=127.0.0.1:2222"]]
    assert autoscaling._autoscaler_config("127.0.0.1:2222") is None
    lines.append(monitor("127.0.0.1:2222", "ours"))
    assert autoscaling._autoscaler_config("127.0.0.1:2222") == CLOUD
    # As Ray passes it on: relative to the folder in which it was started. Others at the same address, of other containers, are passed over.
    lines[-1] = ["monitor.py", "--gcs-address=127.0.0.1:2222", "--autoscaling-config=ours"]
    lines.insert(0, monitor("127.0.0.1:2222", "not here"))
    assert autoscaling._autoscaler_config("127.0.0.1:2222") == CLOUD
    del lines[0]
    # The head is on another machine.
    assert autoscaling._autoscaler_config("203.0.113.1:2222") is None
    for file in ("broken", "list", "none"):
        lines[-1] = monitor("127.0.0.1:2222", file)
        assert autoscaling._autoscaler_config("127.0.0.1:2222") is None


def _scaling_from_zero(machine: HeadMachine) -> dict[str, Any]:
    """A file for Ray's autoscaler that begins without workers and makes them on this machine."""
    provider = {"type": "external", "module": "tests.fake_machines.FakeMachines", "folder": str(machine.folder), "use_node_id_as_ip": True}
    lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    commands = ("head_start_ray_commands", "worker_start_ray_commands")
    return {
        "cluster_name": "from-zero",
        "max_workers": 2,
        "upscaling_speed": 100,
        "idle_timeout_minutes": 0.1,
        "provider": provider | {"disable_node_updaters": True, "disable_launch_config_check": True, "gcs_address": machine.head.ray_address},
        "available_node_types": {
            # The provider knows a head by this name alone.
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "cpu": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{name: [] for name in (*lists, *commands)},
    }


def test_workers_share_a_node_by_whole_ones() -> None:
    node = {"CPU": 8.0, "GPU": 1.0}
    assert [places_on(node, 3, 0), places_on(node, 9, 0), places_on(node, 1, 1), places_on(node, 1, 0.1), places_on({}, 1, 0)] == [2, 0, 1, 8, 0]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", ["1", "2"])
def test_jobs_make_a_cluster_grow_from_nothing_and_it_shrinks_again(version: str, s3_server: s3.Server, tmp_path: Path) -> None:
    environment = s3_server.environment | {
        "RAY_FAKE_CLUSTER": "1",
        "PYTHONPATH": str(ROOT),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1" if version == "2" else "0",
    }
    if version == "2":
        environment |= {"RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}
    source = synthesize(tmp_path / "source", 200, 1)
    network = ["arch=resnet18", "weights=none", "input_size_px=32", "epochs=2", "unfreeze_depth=5"]
    base = "".join(f"  {setting.replace('=', ': ')}\n" for setting in network)
    (tmp_path / "sweep.yaml").write_text(f"space: {{learning_rate: {{grid: [0.0001, 0.001]}}}}\ntrials: 1\nbase:\n{base}")
    with machine_for_a_head(cpus=0, environment=environment) as machine:
        config = _scaling_from_zero(machine)
        if version == "2":
            config["provider"] |= {"launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID}
        (tmp_path / "autoscaler.json").write_text(json.dumps(config))
        machine.extra_arguments.append(f"--autoscaling-config={tmp_path / 'autoscaler.json'}")
        machine.start()
        data, run, report = tmp_path / "data", tmp_path / "run", tmp_path / "report"
        road = [
            # Nothing that the head has on its disk is seen by the machine that will come.
            ["prepare", "--source", source, "--out", f"{s3_server.new_bucket()}/data"],
            ["prepare", "--source", source, "--out", data],
            ["train", "--data", data, "--out", run, "--set", "workers=2", *network],
            ["tune", "--data", data, "--out", tmp_path / "sweep", "--config", tmp_path / "sweep.yaml"],
            ["evaluate", "--bundle", run / "bundle", "--data", data, "--out", report, "--set", "robustness_rows=0"],
        ]
        # The head alone, which has no CPUs: what runs below runs on nodes that were added for it.
        assert _nodes(machine) == 1
        for command in road:
            done = machine.head.run("sentinode", "submit", *command, timeout_s=600)
            assert done.returncode == 0, done.stdout + done.stderr
        refused = machine.head.run("sentinode", "submit", *road[2][:4], tmp_path / "other", "--set", "workers=4", *network)
        assert refused.returncode == 2, refused.stdout + refused.stderr
        assert "train needs 5 CPUs (4 workers x 1 + 1 for driver and data); the cluster has 4 and cannot add more" in refused.stdout
        wait_until(lambda: _nodes(machine) == 1, 180, lambda: "nodes without work are still there", every_s=1)


def _nodes(machine: HeadMachine) -> int:
    code = f"import ray; ray.init({machine.head.ray_address!r}, logging_level='ERROR', log_to_driver=False); "
    code += "print(sum(node['Alive'] for node in ray.nodes()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=machine.head.environment_with(), timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])
