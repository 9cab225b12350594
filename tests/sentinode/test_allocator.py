"""Freed memory is used again without the kernel."""

import subprocess
import sys

import pytest

_PROGRAM = """
import resource, sys
import numpy as np
from sentinode.allocator import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    print("cannot")
    sys.exit()
for turn in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array = np.ones(64 << 20, np.uint8)
    del array
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


def faults_of_the_last_turn(mode: str) -> str:
    return subprocess.run([sys.executable, "-c", _PROGRAM, mode], check=True, capture_output=True, text=True).stdout.strip()


def test_an_array_of_the_same_size_needs_no_new_pages() -> None:
    kept = faults_of_the_last_turn("keep")
    if kept == "cannot":
        pytest.skip("the C library has no mallopt")
    # 64 MiB are 16,384 pages of 4 KiB, or 32 huge ones.
    assert int(kept) < 8
    assert int(faults_of_the_last_turn("default")) >= 32
