"""What the doctor says of this machine, and of what is wrong."""

import json
import socket
import sys
from pathlib import Path

import pytest

import ray_jobs.doctor as doctor
from ray_jobs.doctor import Check, run_checks
from sentinode.locations import Location, locate
from tests import s3
from tests.processes import sentinode


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_this_machine_is_told_line_by_line() -> None:
    done = sentinode("doctor", "--json", ray_address=None)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ok"] is True
    checks = {check["name"]: check for check in told["checks"]}
    assert {
        "python",
        "torch",
        "ray",
        "gpu",
        "memory",
        "shared memory",
        "disk here",
        "disk for Ray",
        "open files",
        "port 8000",
        "other Ray",
        "token",
        "weights",
    } <= checks.keys()
    assert {check["status"] for check in checks.values()} <= {"ok", "warn"}
    # Whatever is not well comes with what to do.
    assert all(check["do"] for check in checks.values() if check["status"] != "ok")
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in checks["python"]["found"]


def test_what_fails_is_said_and_is_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = sentinode("doctor", "--storage", tmp_path / "file/below", "--address", "http://127.0.0.1:9", ray_address=None)
    assert done.returncode == 1
    assert f"FAIL  storage {tmp_path}/file/below" in done.stdout
    assert "FAIL  cluster: http://127.0.0.1:9: no Ray job server can be reached there" in done.stdout
    assert "2 of " in done.stderr
    told = sentinode("doctor", "--json", "--address", "http://127.0.0.1:9", ray_address=None)
    assert told.returncode == 1
    assert json.loads(told.stdout.splitlines()[-1])["ok"] is False
    assert done.stderr.count("\n") == 1


def test_storage_is_written_to_read_and_left_as_it_was(tmp_path: Path, s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in (str(tmp_path / "new"), s3_folder):
        (check,) = run_checks([doctor.storage(uri)])
        assert check.status == "ok", check
        assert is_empty(uri)

    def refused(self: Location) -> bytes:
        raise PermissionError(13, "Access Denied", str(self))

    monkeypatch.setattr(Location, "read_bytes", refused)
    for uri in (str(tmp_path / "new"), s3_folder):
        (check,) = run_checks([doctor.storage(uri)])
        assert (check.status, "Access Denied" in check.found) == ("fail", True)
        assert is_empty(uri)


def is_empty(uri: str) -> bool:
    try:
        return not locate(uri).entries()
    except FileNotFoundError:
        return True  # a store knows no empty folders


def test_a_bucket_that_is_not_there_is_a_failed_check(s3_server: s3.Server) -> None:
    with s3.fresh_clients():
        (check,) = run_checks([doctor.storage("s3://no-such-bucket-of-ours/folder")])
    assert check.status == "fail"
    assert check.found == "there is no such bucket"
    assert check.do


def test_a_port_that_is_taken_and_a_folder_that_is_full_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(doctor, "_PORTS", {port: "ours"})
        assert by_name(run_checks([doctor.this_machine]))[f"port {port}"].status == "warn"
        monkeypatch.setattr(doctor, "_HEAD_PORTS", (port,))
        assert f"port {port}" not in by_name(run_checks([lambda: doctor.this_machine("http://a-cluster:8265")]))
    monkeypatch.setattr(doctor, "_DISK_FAIL_GIB", 1e9)
    assert by_name(run_checks([doctor.memory_and_disk]))["disk here"].status == "fail"


def test_a_token_that_others_may_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    token = tmp_path / "token"
    token.write_text("secret-token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    for mode, status in ((0o644, "warn"), (0o600, "ok")):
        token.chmod(mode)
        (check,) = run_checks([doctor.token])
        assert (check.status, "secret" in check.found) == (status, False)
    token.unlink()
    assert run_checks([doctor.token])[0].status == "fail"
    # Empty counts as not set, as with Ray.
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    assert run_checks([doctor.token])[0].status == "fail"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert run_checks([doctor.token])[0].status == "warn"


def test_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._common.utils.get_system_memory", lambda: 4 << 30)
    memory = by_name(run_checks([doctor.memory_and_disk]))["memory"]
    assert (memory.status, memory.found) == ("warn", "4.0 GiB")


def test_a_check_that_breaks_does_not_keep_the_others_from_being_made() -> None:
    def broken():  # type: ignore[no-untyped-def]
        raise RuntimeError("oops")
        yield

    def whole():  # type: ignore[no-untyped-def]
        yield Check("whole", "ok", "yes")

    assert [(check.name, check.status) for check in run_checks([broken, whole])] == [("broken", "fail"), ("whole", "ok")]


def test_ray_of_another_version_and_a_gpu_that_torch_cannot_use_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ray

    monkeypatch.setattr(ray, "__version__", "2.59.0")
    assert by_name(run_checks([doctor.python]))["ray"].status == "fail"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert by_name(run_checks([doctor.gpus]))["gpu"].status == "warn"
    # The program is on many machines that have no GPU: it counts when it lists one.
    for answer, status in ((0, "fail"), (9, "warn")):
        program.write_text(f"#!/bin/sh\nexit {answer}\n")
        program.chmod(0o755)
        assert by_name(run_checks([doctor.gpus]))["gpu"].status == status
