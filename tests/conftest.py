"""Shared by all tiers: nothing is written to the user's home, and Ray runs in a temporary folder of its own."""

import os
import shutil
import tempfile

# Before anything imports Ray. A short path: Ray puts unix sockets below it, and those may have 107 characters at most.
_RAY_FOLDER = tempfile.mkdtemp(prefix="sn-", dir="/tmp")
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_TMPDIR"] = _RAY_FOLDER
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("RAY_ADDRESS", None)


def pytest_unconfigure() -> None:
    shutil.rmtree(_RAY_FOLDER, ignore_errors=True)
