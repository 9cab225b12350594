"""An endpoint under constant load from another process, while its replicas are killed, frozen, replaced and taken away.

Through the client library nothing fails, and no answer, to anybody, is wrong: each is compared with the offline one of the model that it names.
With RAY_SERVE_ENABLE_HA_PROXY=1 in the environment the same happens behind HAProxy (docs/serving.md).
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray import serve as ray_serve

from sentinode.bundle import Bundle
from sentinode.client import RETRIED_STATUSES
from sentinode.config import ServeConfig
from sentinode.predictor import Predictor
from serve.app import ENDPOINT, FusedEndpoint, _deployment, build_app
from serve.local import usable_port
from tests.clusters import cluster_of, node_that_runs
from tests.conditions import wait_until
from tests.factories import make_bundle, random_patches
from tests.processes import ROOT, running

pytestmark = [pytest.mark.chaos, pytest.mark.serve, pytest.mark.ray]

REPLICA = r"ray::ServeReplica.*Endpoint"
# What may become of a request that is sent once.
RETRYABLE = {"200", *map(str, RETRIED_STATUSES), "ReadError", "ConnectError", "RemoteProtocolError", "ReadTimeout"}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return [make_bundle(folder / f"{seed}", seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def patches(bundles: list[Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the load sends, and what each bundle says of it."""
    images = random_patches(50, seed=21)
    probabilities = [[decision.probability for decision in Predictor(bundle).decide(images)] for bundle in bundles]
    path = tmp_path_factory.mktemp("load") / "patches.npz"
    np.savez(path, patches=images, digests=[bundle.manifest.digest for bundle in bundles], probabilities=probabilities)
    return path


def config(bundle: Bundle, **changes: Any) -> ServeConfig:
    settings = {"auth": "none", "min_replicas": 2, "max_replicas": 2, "max_batch_size": 8, "drain_timeout_s": 20, "engine": "torch"}
    return ServeConfig(**settings | {"bundle": str(bundle.path)} | changes)


@contextmanager
def endpoint(settings: ServeConfig, application: ray_serve.Application | None = None) -> Iterator[str]:
    port = usable_port("127.0.0.1", 0)
    ray_serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 60})
    try:
        ray_serve.run(application or build_app(settings), name="sentinode")
        yield f"http://127.0.0.1:{port}"
    finally:
        ray_serve.shutdown()
        # It gives up after 30 s, for which replicas drain behind HAProxy: the next endpoint would be given to a controller that is about to die.
        wait_until(lambda: not controller_is_there(), 120, lambda: "Serve's controller is still there")


def controller_is_there() -> bool:
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


class Load:
    """The load process, and what it told last."""

    def __init__(self, url: str, patches: Path, raw: int = 3, client: int = 3) -> None:
        command = [sys.executable, "-m", "benchmarks.serve_load", "--url", url, "--patches", str(patches), "--raw", str(raw), "--client", str(client)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.told: dict[str, Any] = {"client": {}, "raw": {}, "digests": {}}
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.told = json.loads(line)

    def wait_for(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float = 120) -> None:
        wait_until(lambda: condition(self.told), timeout_s, lambda: str(self.told))

    def wait_for_more(self, count: int) -> None:
        """Wait for so many more answers through the client."""
        target = self.told["client"].get("200", 0) + count
        self.wait_for(lambda told: told["client"].get("200", 0) >= target)

    def stop(self) -> dict[str, Any]:
        self.process.terminate()
        assert self.process.wait(150) == 0
        wait_until(lambda: "over" in self.told, 10, lambda: str(self.told))
        return self.told


@contextmanager
def load_on(url: str, patches: Path, **options: Any) -> Iterator[Load]:
    load = Load(url, patches, **options)
    try:
        load.wait_for(lambda told: told["client"].get("200", 0) > 20)
        yield load
    finally:
        if load.process.poll() is None:
            load.process.kill()
        load.process.wait()


def check_nothing_lost(load: Load, case: str) -> None:
    told = load.stop()
    print(f"{case}: {json.dumps(told)}")
    assert told["wrong"] == 0
    assert list(told["client"]) == ["200"], told
    # Whatever was lost without the library may be asked again.
    assert set(told["raw"]) <= RETRYABLE, told
    assert told["raw"]["200"] > 0.9 * sum(told["raw"].values())


def replica_pids() -> list[int]:
    """Processes of the endpoint's replicas in the cluster that this process is in."""
    from ray.util.state import list_actors

    actors = list_actors(filters=[("state", "=", "ALIVE")], detail=True)
    return [actor.pid for actor in actors if "ServeReplica" in actor.class_name and ENDPOINT in actor.class_name and actor.pid]


def replicas_running() -> int:
    deployments = ray_serve.status().applications["sentinode"].deployments
    return int(deployments[ENDPOINT].replica_states.get("RUNNING", 0))


def test_a_replica_that_is_killed_is_replaced(ray_session: None, bundles: list[Bundle], patches: Path) -> None:
    with endpoint(config(bundles[0])) as url, load_on(url, patches) as load:
        for _ in range(2):
            before = replica_pids()
            assert len(before) == 2
            os.kill(before[0], signal.SIGKILL)
            wait_until(lambda before=before: len(set(replica_pids()) - {before[0]}) == 2, 120, lambda: str(replica_pids()))  # type: ignore[misc]
            load.wait_for_more(50)
        check_nothing_lost(load, "replica killed twice")


def test_a_classifier_behind_an_ingress_that_is_killed_is_replaced(ray_session: None, bundles: list[Bundle], patches: Path) -> None:
    from ray.util.state import list_actors

    settings = config(bundles[0], topology="split", cpus_per_ingress=0.5, cpus_per_replica=0.5)
    with endpoint(settings) as url, load_on(url, patches) as load:
        for deployment in ("Classifier", ENDPOINT):
            actors = [actor for actor in list_actors(filters=[("state", "=", "ALIVE")], detail=True) if deployment in actor.class_name and actor.pid]
            os.kill(actors[0].pid, signal.SIGKILL)
            load.wait_for_more(100)
        check_nothing_lost(load, "classifier and ingress killed")


def test_a_proxy_that_is_killed_is_replaced(ray_session: None, bundles: list[Bundle], patches: Path) -> None:
    from ray.util.state import list_actors

    def proxies() -> list[int]:
        # With HAProxy the second is its keeper, and the first only its fallback.
        actors = list_actors(filters=[("state", "=", "ALIVE")], detail=True)
        return [actor.pid for actor in actors if actor.class_name in ("ProxyActor", "HAProxyManager") and actor.pid]

    with endpoint(config(bundles[0])) as url, load_on(url, patches) as load:
        before = proxies()
        assert before
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(proxies()) == len(before) and not set(proxies()) & set(before), 120, lambda: f"{before} {proxies()}")
        load.wait_for_more(100)
        told = load.stop()
        print(f"proxy killed: {json.dumps(told)}")
        # Nobody can be let in while there is no door; whoever asks again is answered. A new proxy says 404 until it knows the routes.
        assert told["wrong"] == 0
        assert list(told["client"]) == ["200"], told
        assert set(told["raw"]) <= RETRYABLE | {"404"}, told


@pytest.mark.slow
def test_a_replica_that_hangs_is_replaced(ray_session: None, bundles: list[Bundle], patches: Path) -> None:
    with endpoint(config(bundles[0])) as url, load_on(url, patches) as load:
        (frozen, *_) = replica_pids()
        os.kill(frozen, signal.SIGSTOP)
        try:
            wait_until(lambda: frozen not in replica_pids(), 240, lambda: "the frozen replica is still there")
            load.wait_for_more(50)
            told = load.stop()
        finally:
            if psutil.pid_exists(frozen):
                os.kill(frozen, signal.SIGKILL)
        assert told["wrong"] == 0
        assert list(told["client"]) == ["200"], told


@pytest.mark.slow
def test_a_replica_whose_engine_hangs_is_replaced(ray_session: None, bundles: list[Bundle], patches: Path, tmp_path: Path) -> None:
    flag, victim = tmp_path / "hang", tmp_path / "pid"

    class HangsOnce(FusedEndpoint):  # type: ignore[misc, valid-type]
        async def __init__(self, *given: Any) -> None:  # type: ignore[misc]
            await super().__init__(*given)
            decide = self._classifier._predictor.decide

            def decide_or_hang(batch: Any) -> Any:
                with suppress(FileNotFoundError):
                    flag.unlink()
                    victim.write_text(str(os.getpid()))
                    threading.Event().wait()
                return decide(batch)

            self._classifier._predictor.decide = decide_or_hang

    settings = config(bundles[0], engine_timeout_s=3, request_timeout_s=5)
    deployment = _deployment(HangsOnce, ENDPOINT, settings, 1, 0, 8)
    with endpoint(settings, deployment.bind(settings, bundles[0].manifest, ())) as url, load_on(url, patches) as load:
        flag.touch()
        wait_until(victim.exists, 30, lambda: "no pass took the flag")
        wait_until(lambda: bool(victim.read_text()) and int(victim.read_text()) not in replica_pids(), 180, lambda: "the replica is still there")
        wait_until(lambda: replicas_running() == 2, 60, lambda: f"{replicas_running()} replicas")
        load.wait_for_more(100)
        told = load.stop()
        print(f"engine hung: {json.dumps(told)}")
        # Those who were sent to it were told to ask again, and its neighbour answered.
        assert told["wrong"] == 0
        assert list(told["client"]) == ["200"], told
        assert set(told["raw"]) <= RETRYABLE, told


def test_another_bundle_takes_over_under_load_and_back(ray_session: None, bundles: list[Bundle], patches: Path) -> None:
    first, second = (bundle.manifest.digest for bundle in bundles)
    with endpoint(config(bundles[0])) as url, load_on(url, patches) as load:
        for bundle in (bundles[1], bundles[0]):
            ray_serve.run(build_app(config(bundle)), name="sentinode")
            digest, other = bundle.manifest.digest, first if bundle is bundles[1] else second
            load.wait_for_more(30)
            seen = dict(load.told["digests"])
            load.wait_for_more(60)
            # Deployed means: nobody is answered by the other one any more.
            assert load.told["digests"][digest] > seen.get(digest, 0)
            assert load.told["digests"][other] == seen[other]
        check_nothing_lost(load, "another bundle and back")


def test_load_brings_replicas_and_their_leaving_loses_nothing(ray_session: None, bundles: list[Bundle], patches: Path) -> None:
    settings = config(
        bundles[0],
        min_replicas=1,
        max_replicas=3,
        # Above what the light load can have in flight, so that one replica is enough for it.
        target_ongoing_requests=2.5,
        upscale_delay_s=0,
        downscale_delay_s=3,
        max_batch_size=1,
        cpus_per_replica=1,
    )
    with endpoint(settings) as url, load_on(url, patches, raw=1, client=1) as light:
        with load_on(url, patches, raw=6, client=6) as heavy:
            wait_until(lambda: replicas_running() == 3, 120, lambda: f"{replicas_running()} replicas")
            heavy.wait_for_more(100)
            check_nothing_lost(heavy, "scale-up")
        wait_until(lambda: replicas_running() == 1, 180, lambda: f"{replicas_running()} replicas")
        light.wait_for_more(30)
        check_nothing_lost(light, "scale-down")


@pytest.mark.slow
def test_a_node_that_is_lost_takes_no_request_with_it(bundles: list[Bundle], patches: Path) -> None:
    sets = [f"--set={name}={value}" for name, value in (("auth", "none"), ("min_replicas", 2), ("max_replicas", 2), ("engine", "torch"))]
    # Two nodes for the replicas and one to spare; none on the head, where the proxy is.
    with (
        cluster_of(nodes=3, head_cpus=0) as cluster,
        running("serve", "--bundle", bundles[0].path, "--port", "0", *sets, ray_address=cluster.address) as command,
    ):
        url = command.wait_for_line("ready: ", 180).split()[1]
        with load_on(url, patches) as load:
            cluster.remove_node(node_that_runs(cluster, REPLICA), allow_graceful=False)
            load.wait_for_more(300)
            check_nothing_lost(load, "node lost")
