"""What this program is made of: recorded in every manifest."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sentinode import __version__

LIBRARIES = ("ray", "torch", "torchvision", "pyarrow", "pandas", "numpy", "scikit-learn", "pillow", "onnx", "onnxruntime", "openvino")


def library_versions() -> dict[str, str]:
    """Return the versions of Python, of this program and of the libraries that decide results; an absent one is left out."""
    versions = {"sentinode": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def cpu_name() -> str:
    """Return the name of this machine's processor, as it calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Return the commit this program was started from, with `-dirty` where files differ; None outside a git checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        status = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("-dirty" if status.strip() else "")
