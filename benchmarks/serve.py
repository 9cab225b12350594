"""Latency and throughput of the endpoint beside plain FastAPI and LitServe, with the same network and the same body.

    python -m benchmarks.serve --bundle out/run/bundle --engine auto          # needs Debian's wrk and two cores
    python -m benchmarks.serve --bundle out/run/bundle --zero                 # a network that costs nothing: what the server costs

Arms, one after the other in each round: `plain` (FastAPI and uvicorn, one patch per pass), `litserve`, `ours` (Ray Serve's own proxy) and
`ours-haproxy` (HAProxy, and Serve's throughput settings). In each the engine has core 0, and server and load share core 1. wrk asks with 1, 8 and 32
connections, without pause. Ends with medians over the rounds, and ratios to `plain` and to the best peer.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx

from benchmarks.serve_arms import ARMS, ENVIRONMENT
from serve.local import usable_port
from tests.factories import random_patches
from tests.serve.patch_files import encode

CONNECTIONS = (1, 8, 32)
OTHER_CORE = 1
PEERS = ("plain", "litserve")


@dataclass(frozen=True)
class Measured:
    """One run of wrk."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    errors: int


def body() -> tuple[bytes, str]:
    """Return a form with one TIF, and its content type."""
    data = encode(random_patches(1)[0])
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="p.tif"\r\nContent-Type: image/tiff\r\n\r\n'
    return head + data + b"\r\n--b--\r\n", "multipart/form-data; boundary=b"


@contextmanager
def running(arm: str, args: argparse.Namespace) -> Iterator[str]:
    """The address of an arm that answers."""
    port = usable_port("127.0.0.1", 0)
    command = ["taskset", "-c", str(OTHER_CORE), sys.executable, "-m", "benchmarks.serve_arms", arm]
    command += ["--bundle", str(args.bundle), "--engine", args.engine, "--port", str(port), *(["--zero"] if args.zero else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ENVIRONMENT.get(arm, {})
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    content, kind = body()
    try:
        end = time.monotonic() + 120
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{arm} did not start")
            try:
                url = f"http://127.0.0.1:{port}/predict"
                if httpx.post(url, content=content, headers={"content-type": kind}, timeout=10, trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.3)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def measure(url: str, connections: int, seconds: float, script: Path) -> Measured:
    """Ask for some seconds."""
    command = [
        "taskset",
        "-c",
        str(OTHER_CORE),
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds:g}s",
        "--timeout",
        "30s",
        "--latency",
        "-s",
        str(script),
        url,
    ]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    latency = {name: _ms(value) for name, value in re.findall(r"^\s+(50|99)%\s+(\S+)$", text, re.MULTILINE)}
    errors = sum(int(count) for count in re.findall(r"(?:connect|read|write|timeout|responses:) (\d+)", text))
    rate = re.search(r"Requests/sec:\s+([0-9.]+)", text)
    assert rate, text
    return Measured(float(rate[1]), latency["50"], latency["99"], errors)


def _ms(text: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)(us|ms|s|m)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"us": 0.001, "ms": 1, "s": 1000, "m": 60_000}[unit]


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--zero", action="store_true", help="without a network")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args = parser.parse_args(argv)
    content, kind = body()
    found: dict[tuple[str, int], list[Measured]] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "body").write_bytes(content)
        script = Path(folder) / "post.lua"
        lines = [
            f'local file = io.open("{folder}/body", "rb")',
            'wrk.method = "POST"',
            'wrk.body = file:read("*a")',
            f'wrk.headers["Content-Type"] = "{kind}"',
        ]
        script.write_text("\n".join(lines) + "\n")
        for number in range(args.rounds):
            for arm in args.arms[:: 1 if number % 2 else -1]:
                with running(arm, args) as url:
                    measure(url, 4, 2, script)
                    for connections in CONNECTIONS:
                        found.setdefault((arm, connections), []).append(measure(url, connections, args.seconds, script))
                        print(number, arm, connections, found[arm, connections][-1], flush=True)
    print("| arm | connections | requests/s | p50 ms | p99 ms | errors |\n|---|---|---|---|---|---|")
    for (arm, connections), runs in sorted(found.items(), key=lambda one: (one[0][1], args.arms.index(one[0][0]))):
        rate, p50, p99 = (median(getattr(run, name) for run in runs) for name in ("requests_per_s", "p50_ms", "p99_ms"))
        print(f"| {arm} | {connections} | {rate:.0f} | {p50:.2f} | {p99:.1f} | {sum(run.errors for run in runs)} |")
    for arm in args.arms:
        if arm in PEERS or "plain" not in args.arms:
            continue
        latency = [ours.p50_ms / plain.p50_ms for ours, plain in zip(found[arm, 1], found["plain", 1], strict=True)]
        rates = [
            ours.requests_per_s / max(found[peer, 32][number].requests_per_s for peer in PEERS if peer in args.arms)
            for number, ours in enumerate(found[arm, 32])
        ]
        print(f"{arm}: p50 at 1 connection / plain {median(latency):.2f}; requests/s at 32 connections / best peer {median(rates):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
