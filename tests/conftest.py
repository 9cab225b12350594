"""Shared by all tiers: nothing is written to the user's home, and Ray runs in a temporary folder of its own."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests import s3

# Before anything imports Ray. A short path: Ray puts unix sockets below it, and those may have 107 characters at most.
_RAY_FOLDER = tempfile.mkdtemp(prefix="sn-", dir="/tmp")
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_TMPDIR"] = _RAY_FOLDER
os.environ["OMP_NUM_THREADS"] = "1"
# Else matplotlib, which Grad-CAM brings, writes into the home folder.
os.environ["MPLCONFIGDIR"] = _RAY_FOLDER
os.environ.pop("RAY_ADDRESS", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", metavar="K/N", help="run only every N-th of the chosen tests, starting at the K-th")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one share of what -m and -k left over."""
    share = config.getoption("--share")
    if share is None:
        return
    number, _, of = share.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise pytest.UsageError(f"--share {share}: expected K/N with 1 <= K <= N, e.g. 2/4")
    kept = items[int(number) - 1 :: int(of)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_unconfigure() -> None:
    shutil.rmtree(_RAY_FOLDER, ignore_errors=True)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[s3.Server]:
    """An S3 server on this machine, named by the environment so that processes started later find it too."""
    with s3.serving() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def s3_folder(s3_server: s3.Server) -> Iterator[str]:
    """URI of a folder in a new bucket."""
    with s3.fresh_clients():
        yield f"{s3_server.new_bucket()}/folder"


@pytest.fixture
def flaky_s3(s3_server: s3.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.FlakyServer]:
    """The same server behind a door that can be told to fail; clients made in the test go through it."""
    with s3.serving_flaky() as flaky, s3.fresh_clients():
        monkeypatch.setenv("AWS_ENDPOINT_URL", flaky.url)
        yield flaky


@pytest.fixture(scope="session")
def ray_session(s3_server: s3.Server) -> Iterator[None]:
    """A local Ray with four logical CPUs and no GPUs, whatever this machine has, shared by all tests that need one; started as verbs start theirs.

    A test of what GPUs do (marked `gpu`) uses them itself, or starts a command on a Ray of its own.
    """
    import ray

    from ray_jobs.cluster import connected

    start = ray.init
    with ExitStack() as session:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray, "init", lambda **options: start(**options | {"num_cpus": 4, "num_gpus": 0}))
            session.enter_context(connected(2))
        yield


@pytest.fixture
def ray_address(ray_session: None) -> str:
    """Address of the shared Ray, for commands that run as processes of their own."""
    import ray

    address: str = ray.get_runtime_context().gcs_address
    return address
