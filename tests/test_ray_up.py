"""deploy/clusters/local.yaml on four machines in a network: `ray up`, jobs through ssh, workers that join, `ray down`, as docs/cluster.md says."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from data_prep.synth import synthesize
from tests.conditions import wait_until
from tests.hosts import HOME, Host, hosts, missing
from tests.processes import ROOT

# Waits for two cores that others may use as well.
pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1800)]

GUARD = {"RAY_AUTH_MODE": "token"}
JOB_SERVER = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265"}

# Machines reach no network from here, so what the set-up would fetch is there already, as in an image made beforehand: this environment, which the
# guards of the file's own set-up commands find. Of uv is left what installs the project, from what is there: a layer of the machine's own takes it.
UV = f"""#!/bin/sh
test "$1 $2" = "pip install" || exit 1
while [ "$1" != --constraint ]; do shift; done
exec {HOME}/venv/bin/python -m pip install --quiet --disable-pip-version-check --no-index --no-build-isolation --no-deps "$@"
"""


@dataclass(frozen=True)
class Cluster:
    here: Host
    """Where the commands are given. The file is filled in on its disk, so that the project's own stays as it is."""
    head: Host
    workers: list[Host]

    @property
    def nodes(self) -> list[Host]:
        return [self.head, *self.workers]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster that `ray up` has started."""
    if lacking := missing():
        pytest.skip(f"machines need {lacking}")
    with hosts("here", "head", "worker1", "worker2") as (here, head, *workers):
        cluster = Cluster(here, head, workers)
        for host in cluster.nodes:
            host.path(f"{HOME}/.local/bin").mkdir(parents=True)
            host.path(f"{HOME}/.local/bin/uv").write_text(UV)
            host.path(f"{HOME}/.local/bin/uv").chmod(0o755)
            host.path(f"{HOME}/venv").symlink_to(sys.prefix)
        for start in ("sed", "ray get-auth-token", "chmod", "sentinode doctor"):
            succeeds(here, documented(start))
        succeeds(here, documented("ray up") + " -y")
        yield cluster


def documented(start: str) -> str:
    """The command that docs/cluster.md gives for such machines."""
    section = (ROOT / "docs/cluster.md").read_text(encoding="utf-8").partition("\n## On machines that are there already\n")[2].partition("\n## ")[0]
    (line,) = (line for line in section.splitlines() if line.startswith(start))
    command = line.partition("  #")[0].rstrip()
    # The installed command runs the installed code, which need not be this one.
    return re.sub(r"^sentinode ", "python -m ray_jobs.cli ", command)


def succeeds(host: Host, command: str, **environment: str) -> str:
    done = host.run("bash", "-c", command, **GUARD | environment)
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


def living_nodes(cluster: Cluster) -> dict[str, str]:
    """Address and id of the nodes that are in the cluster, as the head tells them; none while it does not answer."""
    command = ["ray", "list", "nodes", "--filter=state=ALIVE", "--format=json"]
    done = cluster.head.run(*command, **GUARD)
    return {node["node_ip"]: node["node_id"] for node in json.loads(done.stdout)} if done.returncode == 0 else {}


def all_join(cluster: Cluster, but: frozenset[str] = frozenset()) -> dict[str, str]:
    """Wait until every machine is in the cluster, with none of the ids `but`."""

    def joined() -> dict[str, str] | None:
        nodes = living_nodes(cluster)
        return nodes if set(nodes) == {host.address for host in cluster.nodes} and not but & set(nodes.values()) else None

    return wait_until(joined, 240, lambda: f"{living_nodes(cluster)}\n{monitor_log(cluster)}", every_s=1)


def monitor_log(cluster: Cluster) -> str:
    return cluster.head.run("bash", "-c", "tail -n 100 /tmp/ray/session_latest/logs/monitor.*").stdout


@pytest.fixture(scope="module")
def tunnel(cluster: Cluster) -> Iterator[None]:
    """The job server, brought here by ssh."""
    command = cluster.here.command(["bash", "-c", f"exec {documented('ray dashboard')}"], **GUARD)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: reaches(cluster.here, "127.0.0.1", 8265), 60, lambda: "no tunnel", every_s=1)
        yield
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def reaches(host: Host, address: str, port: int) -> bool:
    """Whether something listens there for this host."""
    return host.run("bash", "-c", f"exec 3<> /dev/tcp/{address}/{port}").returncode == 0


def submits(cluster: Cluster, *argv: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "ray_jobs.cli", "submit", *argv]
    return cluster.here.run(*command, **GUARD | JOB_SERVER | environment)


def test_every_machine_joins(cluster: Cluster) -> None:
    all_join(cluster)
    for host in cluster.nodes:
        # The raylet writes objects there both when it spills and when nothing can be spilled.
        assert "--fallback_directory=/var/tmp/ray_spill" in host.run("ps", "-eo", "args").stdout
        # Installed is what file_mounts brought, not what lay on the machine before.
        where = succeeds(host, "cd / && env -u PYTHONPATH ~/venv/bin/python -c 'import sentinode; print(sentinode.__file__)'")
        assert where.strip() == f"{HOME}/sentinode/sentinode/__init__.py"
    assert "--logging-rotate-bytes=104857600 --logging-rotate-backup-count=2" in cluster.head.run("ps", "-eo", "args").stdout


def test_the_dashboard_listens_on_the_heads_localhost_only(cluster: Cluster) -> None:
    listening = succeeds(cluster.head, "ss -ltnH 'sport = :8265'")
    assert [line.split()[3] for line in listening.splitlines()] == ["127.0.0.1:8265"]
    assert reaches(cluster.head, "127.0.0.1", 8265)
    for host in (cluster.here, *cluster.workers):
        assert not reaches(host, cluster.head.address, 8265)
        assert reaches(host, cluster.head.address, 22)


@pytest.mark.parametrize("guard", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "wrong" * 16}])
def test_without_the_token_no_job_is_taken(cluster: Cluster, tunnel: None, guard: dict[str, str]) -> None:
    refused = submits(cluster, "prepare", "--source", "/shared/source", "--out", "/shared/refused", **guard)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "token" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not cluster.head.path("/shared/refused").exists()


def test_a_job_trains_on_workers(cluster: Cluster, tunnel: None) -> None:
    nodes = all_join(cluster)
    synthesize(cluster.here.path("/shared/source"), 120, 1)
    prepared = submits(cluster, "prepare", "--source", "/shared/source", "--out", "/shared/data")
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr
    # Each rank wants all CPUs of a machine, so that no two find room on one.
    (total,) = {node["resources_total"]["CPU"] for node in json.loads(succeeds(cluster.head, "ray list nodes --detail --format=json"))}
    small = "arch=resnet18 weights=none unfreeze_depth=5 input_size_px=32 epochs=1 use_gpu=false"
    sets = [*small.split(), "workers=2", f"cpus_per_worker={total:g}"]
    trained = submits(cluster, "train", "--data", "/shared/data", "--out", "/shared/run", "--set", *sets)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert cluster.here.path("/shared/run/bundle").is_dir()
    ranks = json.loads(succeeds(cluster.head, "ray list actors --filter class_name=RayTrainWorker --format=json"))
    ran_on = {rank["node_id"] for rank in ranks}
    assert len(ran_on) == 2
    assert ran_on & {nodes[host.address] for host in cluster.workers}


def test_a_job_that_is_stopped_has_time_for_a_checkpoint(cluster: Cluster, tunnel: None) -> None:
    # Twice what Ray allows where nobody says otherwise.
    job = """import pathlib, signal, sys, time
def checkpoint(*_):
    time.sleep(6)
    pathlib.Path("/shared/checkpoint").touch()
    sys.exit()
signal.signal(signal.SIGTERM, checkpoint)
pathlib.Path("/shared/began").touch()
time.sleep(600)
"""
    cluster.here.path("/shared/job.py").write_text(job)
    succeeds(cluster.here, "ray job submit --no-wait --submission-id long -- python /shared/job.py", **JOB_SERVER)
    wait_until(lambda: cluster.here.path("/shared/began").exists(), 120, lambda: "the job did not begin")
    succeeds(cluster.here, "ray job stop long", **JOB_SERVER)
    assert cluster.here.path("/shared/checkpoint").exists()


def test_a_machine_that_was_lost_comes_back(cluster: Cluster) -> None:
    before = all_join(cluster)
    lost = cluster.workers[0]
    succeeds(lost, "~/venv/bin/ray stop --force")
    all_join(cluster, but=frozenset({before[lost.address]}))


def test_up_again_brings_all_machines_back(cluster: Cluster) -> None:
    before = all_join(cluster)
    succeeds(cluster.here, documented("ray up") + " -y")
    all_join(cluster, but=frozenset(before.values()))


def test_down_ends_ray_on_every_machine(cluster: Cluster) -> None:
    all_join(cluster)
    succeeds(cluster.here, documented("ray down") + " -y")
    assert "gcs_server" not in cluster.head.run("ps", "-eo", "args").stdout
    # Nobody tells the others: they end once the head has not answered for a minute.
    running = [host for host in cluster.nodes if "raylet" in host.run("ps", "-eo", "args").stdout]
    wait_until(lambda: "raylet" not in "".join(host.run("ps", "-eo", "args").stdout for host in running), 180, lambda: str(running), every_s=1)


def test_hosts_leave_nothing_behind() -> None:
    if lacking := missing():
        pytest.skip(f"machines need {lacking}")
    links = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    with hosts("one", "two") as running:
        one, two = running
        two.path("/shared/written").write_text("by two")
        assert one.path("/shared/written").read_text() == "by two"
        two.path("/etc/written").write_text("by two")
        assert not one.path("/etc/written").exists()
        assert reaches(one, two.address, 22)
    assert not any(psutil.pid_exists(host.pid) for host in running)
    assert "sn-hosts" not in Path("/proc/self/mounts").read_text()
    assert subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout == links
