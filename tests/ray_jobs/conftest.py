from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray import cloudpickle

from ray_jobs import ensemble, evaluate
from ray_jobs.train import TrainResult, train
from sentinode.bundle import Bundle
from sentinode.config import TrainConfig
from sentinode.dataset import PreparedDataset
from sentinode.predictor import Predictor
from tests.factories import make_dataset

QUICK = {"arch": "resnet18", "weights": "none", "unfreeze_depth": 5, "input_size_px": 32, "epochs": 2, "batch_size": 16, "learning_rate": 1e-3}
"""A training that takes seconds once its workers are up."""


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    # Counts that neither two workers nor any batch size divides.
    return make_dataset(tmp_path_factory.mktemp("jobs") / "data", train=97, val=41, test=43)


@pytest.fixture(scope="session")
def trained(ray_session: None, dataset: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The result of one run with two DDP workers, shared by the tests that only read it."""
    return train(TrainConfig(**QUICK, workers=2), dataset.path, tmp_path_factory.mktemp("jobs") / "run")


@pytest.fixture
def units_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate` and `ensemble` do their units in this process, without Ray, but as if sent to another one."""

    def run_units(bundle: Bundle, units: list[int], work: Callable[[Predictor, int], pa.Table], *_: Any) -> pa.Table:
        sent, predictor = cloudpickle.loads(cloudpickle.dumps(work)), Predictor.load(bundle.where)
        return pa.concat_tables([sent(predictor, unit) for unit in units])

    for module in (ensemble, evaluate):
        monkeypatch.setattr(module, "run_units", run_units)
        monkeypatch.setattr(module, "connected", lambda *_, **__: nullcontext())


@pytest.fixture
def free_cpus(ray_session: None) -> Iterator[None]:
    """Fail a test that leaves CPUs of the cluster taken: Ray may need seconds to free them, but not a minute."""
    yield
    wait_until_all_free(60)


def wait_until_all_free(deadline_s: float) -> None:
    import threading
    import time

    import ray

    end = time.monotonic() + deadline_s
    tick = threading.Event()
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < end, f"still taken: {ray.available_resources()} of {ray.cluster_resources()}"
        tick.wait(0.2)


def folder_of(result: TrainResult) -> Path:
    return result.bundle.path.parent
