"""Is this machine, or a cluster, able to run Sentinode, and if not, what to do.

    sentinode doctor
    sentinode doctor --address http://127.0.0.1:8265 --storage s3://bucket/folder

One line for each check: ok, warn (it will run, with this drawback) or FAIL (it will not). Exit code 1 where one fails.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ray_jobs.verb import add_common_arguments, main_of, say
from sentinode.errors import SentinodeError

_GIB = 1 << 30
_DISK_WARN_GIB, _DISK_FAIL_GIB = 20, 2
"""A run's checkpoints, Ray's spilled objects and a prepared data set of 220,025 patches (6 GB) fit into the first; nothing does into the second."""
_SHARED_MEMORY_SHARE = 0.3
"""Ray's object store takes this share of the memory, in /dev/shm; what does not fit there lies on disk, which is far slower."""
_OPEN_FILES = 4096
_PORTS = {8265: "Ray's dashboard and job server", 6379: "Ray's head", 8000: "the endpoint"}
_HEAD_PORTS = (8265, 6379)


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, what was found, and what to do where it is not ok."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    do: str = ""


def python() -> Iterator[Check]:
    """Look at the interpreter and the libraries that must fit each other."""
    fits = (3, 11) <= sys.version_info[:2] <= (3, 12)
    yield Check("python", "ok" if fits else "fail", platform.python_version(), "" if fits else "use Python 3.11 or 3.12")
    try:
        import torchvision

        found = f"torch {_version('torch')}, torchvision {torchvision.__version__}"
        yield Check("torch", "ok", found)
    except Exception as error:
        yield Check(
            "torch", "fail", f"{type(error).__name__}: {error}", "install torch and torchvision of one build: pip install --force-reinstall both"
        )
    try:
        import ray

        wanted = "2.60.0"
        fits = ray.__version__ == wanted
        yield Check("ray", "ok" if fits else "fail", ray.__version__, "" if fits else f"install ray=={wanted}: other versions were not tried")
    except ImportError as error:
        yield Check("ray", "fail", str(error), "pip install -e .")


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def gpus() -> Iterator[Check]:
    """Look at GPUs, their driver and NCCL."""
    import torch

    if not torch.cuda.is_available():
        driver = _sees_a_gpu()
        status: Literal["warn", "fail"] = "fail" if driver else "warn"
        do = (
            "the driver is older than torch's CUDA, or torch has none"
            if driver
            else "fine for trying out and for serving; training a whole set takes days"
        )
        yield Check("gpu", status, f"torch {torch.__version__} sees none", do)
        return
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    yield Check("gpu", "ok", f"{', '.join(names)}; CUDA {torch.version.cuda}")
    try:
        yield Check("nccl", "ok", ".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]
    except Exception as error:
        yield Check("nccl", "fail", str(error), "workers on several GPUs cannot talk; install torch with NCCL")


def _sees_a_gpu() -> bool:
    """Tell whether NVIDIA's driver sees a GPU; its program alone is on many machines that have none."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=20, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def memory_and_disk() -> Iterator[Check]:
    """Look at memory, shared memory, disks and open files."""
    from ray._common.utils import get_system_memory

    # As Ray counts it: of a container, what it may use.
    total = get_system_memory()
    yield Check(
        "memory", "ok" if total >= 8 * _GIB else "warn", _gib(total), "" if total >= 8 * _GIB else "8 GiB or more: each worker takes one or two"
    )
    shared = shutil.disk_usage("/dev/shm")
    enough = shared.total >= _SHARED_MEMORY_SHARE * total
    do = f"Ray's object store wants {_gib(_SHARED_MEMORY_SHARE * total)}; in a container: --shm-size"
    yield Check("shared memory", "ok" if enough else "warn", f"{_gib(shared.free)} free of {_gib(shared.total)}", "" if enough else do)
    for name, folder in (("disk here", Path.cwd()), ("disk for Ray", Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        status: Literal["ok", "warn", "fail"] = "fail" if free < _DISK_FAIL_GIB * _GIB else "warn" if free < _DISK_WARN_GIB * _GIB else "ok"
        do = (
            ""
            if status == "ok"
            else f"{_DISK_WARN_GIB} GiB or more; {'set RAY_TMPDIR to a larger disk' if name == 'disk for Ray' else 'write --out elsewhere'}"
        )
        yield Check(name, status, f"{_gib(free)} free in {folder}", do)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < _OPEN_FILES
    yield Check("open files", "warn" if few else "ok", f"{soft} allowed", "ulimit -n 65536: Ray keeps many connections open" if few else "")


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / _GIB:.1f} GiB"


def this_machine(cluster_address: str | None = None) -> Iterator[Check]:
    """Look at ports and at another Ray on this machine; with the address of a cluster not at those that a head would need here."""
    for port, what in _PORTS.items():
        if cluster_address and port in _HEAD_PORTS:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                yield Check(f"port {port}", "ok", f"free ({what})")
            except OSError as error:
                yield Check(
                    f"port {port}", "warn", f"{error.strerror} ({what})", "something listens there already; choose another with --port or ray start"
                )
    heads = _processes("gcs_server")
    if len(heads) > 1 or (heads and not os.environ.get("RAY_ADDRESS")):
        do = "set RAY_ADDRESS to the one to use (`ray stop` would end all of them): with several, Ray's own tools pick one"
        yield Check("other Ray", "warn", f"running here: process {', '.join(map(str, heads))}", do)
    else:
        yield Check("other Ray", "ok", "none that could be mistaken")
    leftover = _processes("haproxy")
    if leftover and not heads:
        yield Check(
            "haproxy", "warn", f"running without a Ray: process {', '.join(map(str, leftover))}", "left behind by a Ray that was killed? end it: kill"
        )


def _processes(name: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "comm").read_text().strip() == name:
                    found.append(int(entry.name))
            except OSError:
                continue  # it has ended, or is another user's
    return sorted(found)


def weights() -> Iterator[Check]:
    """Look whether ImageNet weights are at hand."""
    import torch

    folder = Path(torch.hub.get_dir(), "checkpoints")
    found = sorted(path.name for path in folder.glob("resnet*.pth")) if folder.is_dir() else []
    do = "the first training fetches them; without a network set weights to a file, a bundle or none"
    yield Check("weights", "ok" if found else "warn", ", ".join(found) or f"none in {folder}", "" if found else do)


def token() -> Iterator[Check]:
    """Look at how Ray is guarded."""
    from ray_jobs.ray_address import missing_token_file

    mode = os.environ.get("RAY_AUTH_MODE", "")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if mode == "disabled":
        yield Check("token", "warn", "RAY_AUTH_MODE=disabled", "whoever reaches Ray's ports runs code here; set RAY_AUTH_MODE=token")
    elif os.environ.get("RAY_AUTH_TOKEN"):
        yield Check("token", "ok", "in RAY_AUTH_TOKEN")
    elif missing := missing_token_file():
        yield Check("token", "fail", missing, "bring the cluster's token there, or unset the variable")
    elif path.is_file():
        open_to_all = path.stat().st_mode & 0o077 != 0
        yield Check("token", "warn" if open_to_all else "ok", str(path), f"others may read it: chmod 600 {path}" if open_to_all else "")
    else:
        yield Check("token", "ok", "none; a local Ray gets one of its own", "for a cluster: ray get-auth-token --generate")


def cluster(address: str) -> Callable[[], Iterator[Check]]:
    """Look at a cluster through its job server."""

    def check() -> Iterator[Check]:
        from ray_jobs.job_server import connect

        do = "the tunnel of `ray dashboard`, the address, the token, or `pip install ray==` its version"
        yield _judged("cluster", lambda: connect(address), f"{address} answers, takes the token and runs the same Ray", do)

    return check


def storage(uri: str) -> Callable[[], Iterator[Check]]:
    """Write to a folder, read back and remove."""

    def check() -> Iterator[Check]:
        from sentinode.locations import locate

        name = f"storage {uri}"
        try:
            probe = locate(uri) / f"sentinode-doctor-{uuid.uuid4().hex}"
            content = uuid.uuid4().bytes
            if probe.is_local:
                probe.local.parent.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(content)
            try:
                read = probe.read_bytes()
            finally:
                probe.remove()
        except (SentinodeError, OSError) as error:
            what = f"{type(error).__name__}: {error}"
            yield Check(
                name,
                "fail",
                locate(uri).why_nothing(what) if isinstance(error, FileNotFoundError) else what,
                "check the name, the credentials in the environment, and the rights to put, get and delete (a sentinode-doctor-… may be left there)",
            )
        else:
            same = read == content
            yield Check(name, "ok" if same else "fail", "written, read, removed" if same else "reads back something else", "")

    return check


def cluster_file(path: str) -> Callable[[], Iterator[Check]]:
    """Check a file for `ray up`, strictly."""

    def check() -> Iterator[Check]:
        from ray_jobs.cluster_file import check_cluster_file

        found = f"{path}: every key is known, every value filled in"
        yield _judged("cluster file", lambda: check_cluster_file(path), found, "docs/cluster.md says what goes there")

    return check


def _judged(name: str, judge: Callable[[], object], found: str, do: str) -> Check:
    """Return `found` where `judge` has nothing against it, else what it raised."""
    try:
        judge()
    except SentinodeError as error:
        return Check(name, "fail", str(error), do)
    return Check(name, "ok", found)


def run_checks(checks: Sequence[Callable[[], Iterator[Check]]]) -> list[Check]:
    """Run checks, telling each line as it is known; one that breaks is a failed check, and the others go on."""
    found: list[Check] = []
    for check in checks:
        try:
            for one in check():
                _tell(one)
                found.append(one)
        except Exception as error:
            broken = Check(getattr(check, "__name__", "check"), "fail", f"{type(error).__name__}: {error}", "this check itself broke")
            _tell(broken)
            found.append(broken)
    return found


def _tell(check: Check) -> None:
    status = "FAIL" if check.status == "fail" else check.status
    say(f"{status:5} {check.name}: {check.found}" + (f"\n      -> {check.do}" if check.do and check.status != "ok" else ""))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--address", metavar="URL", help="also look at the cluster with this job server (default: RAY_API_SERVER_ADDRESS, where set)")
    parser.add_argument("--storage", metavar="URI", nargs="+", default=[], help="also write to, read from and remove from these folders")
    parser.add_argument("--cluster-file", metavar="YAML", help="also check a file for `ray up`")
    add_common_arguments(parser, None)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Look at everything; raises SentinodeError where something fails."""
    address = args.address or os.environ.get("RAY_API_SERVER_ADDRESS")
    checks: list[Callable[[], Iterator[Check]]] = [python, gpus, memory_and_disk, partial(this_machine, address), token, weights]
    checks += [cluster(address)] if address else []
    checks += [cluster_file(args.cluster_file)] if args.cluster_file else []
    found = run_checks([*checks, *(storage(uri) for uri in args.storage)])
    failed = [check.name for check in found if check.status == "fail"]
    result = {"ok": not failed, "checks": [asdict(check) for check in found]}
    if failed:
        if args.json:
            # Also then, and then above all, a program wants to know.
            print(json.dumps(result), flush=True)
        raise SentinodeError(f"{len(failed)} of {len(found)} checks fail: {', '.join(failed)}")
    say(f"{len(found)} checks: nothing that keeps it from running")
    return result


def main(argv: Sequence[str] | None = None, prog: str = "python -m ray_jobs.doctor") -> int:
    """Entry point; returns the exit code."""
    return main_of(prog, __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
