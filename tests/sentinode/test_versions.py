"""What is recorded in every manifest about the program itself."""

import subprocess
from pathlib import Path

import pytest

from sentinode import __version__, versions
from sentinode.versions import git_commit, library_versions


def test_the_libraries_that_decide_results_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = library_versions()
    assert recorded["sentinode"] == __version__
    assert {"python", "torch", "torchvision", "numpy", "pillow"} <= recorded.keys()
    monkeypatch.setattr(versions, "LIBRARIES", ("numpy", "no-such-library"))
    assert library_versions().keys() == {"sentinode", "python", "numpy"}


def test_the_commit_is_recorded_with_whether_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "sentinode" / "versions.py"
    module.parent.mkdir()
    module.write_text("# first\n")
    monkeypatch.setattr(versions, "__file__", str(module))
    assert git_commit() is None

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        return subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    assert git_commit() == git("rev-parse", "HEAD")
    module.write_text("# second\n")
    assert git_commit() == git("rev-parse", "HEAD") + "-dirty"


def test_a_machine_without_git_records_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "sentinode" / "versions.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None
