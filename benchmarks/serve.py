"""Latency and throughput of the endpoint beside plain FastAPI, LitServe and BentoML, with the same network and the same body.

    pip install --target bentoml-packages bentoml       # its OpenTelemetry does not go with Ray's, so not into the environment
    python -m benchmarks.serve --bundle out/run/bundle --engine auto --bentoml-packages bentoml-packages     # needs Debian's wrk, and two cores
    python -m benchmarks.serve --bundle out/run/bundle --zero --bentoml-packages bentoml-packages            # no network: what the server costs

Arms, one after the other in each round: `plain` (FastAPI and uvicorn, one patch per pass), `litserve`, `litserve-waits` (5 ms for a batch),
`bentoml`, `litserve-torch` (with torch, whatever --engine says), `ours` (Ray Serve's own proxy, one replica) and `ours-haproxy` (HAProxy, and Serve's
throughput settings); by name also `ours-throughput` and `ours-haproxy-only`, with one of both, and `ours-split`, with both and topology `split`. In
each the engine has core 0, and server and load share core 1; all give the same probability. The body is a form with one TIF, or with --format PNG:
of TIFs ours reads the pixels without Pillow, which peers use.

wrk asks with 1, 8, 32 and 128 connections, without pause; then each arm that can keep up with it is asked at 70 % of the rate at which the best peer
was saturated. Before each arm the bare engine decides, in batches, on core 0 alone; `/predict/batch` of ours takes turns with it. Ends with medians
over the rounds, and ratios taken within each round.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import median

import httpx
import numpy as np
import psutil

from benchmarks.serve_arms import ARMS, ENVIRONMENT, loaded, pin_engine
from sentinode.images import UInt8Array
from serve.local import usable_port
from tests.factories import random_patches
from tests.serve.patch_files import encode

CONNECTIONS = (1, 8, 32, 128)
SATURATED = 32
"""Connections with which requests/s are compared."""
OTHER_CORE = 1
PEERS = ("plain", "litserve", "litserve-waits", "bentoml")
OURS = tuple(ENVIRONMENT)
DEFAULT_ARMS = ("plain", "litserve", "litserve-waits", "bentoml", "litserve-torch", "ours", "ours-haproxy")
BARE_BATCHES = (8, 16, 32, 64)
PATCHES_OF_A_BATCH = 512


@dataclass(frozen=True)
class Measured:
    """One run of wrk."""

    requests_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    errors: int
    memory_mib: float
    """Proportional share of memory (PSS) of all the arm's processes, after the run."""


class Bare:
    """The engine without a server, in a thread on its core."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._thread = ThreadPoolExecutor(1, initializer=pin_engine)
        self._predictor = self._thread.submit(loaded, args.bundle, args.engine, args.zero).result()
        self.patches = random_patches(PATCHES_OF_A_BATCH, side_px=self._predictor.manifest.patch_size_px)
        self.probability = self._thread.submit(self._predictor.decide, random_patches(1)).result()[0].probability
        """Of the patch that `body` holds."""

    def images_per_s(self, seconds: float, batches: tuple[int, ...] = BARE_BATCHES) -> dict[int, float]:
        """Return its rate with each of these batch sizes, each tried for `seconds`."""
        return {batch: self._thread.submit(self._rate, batch, seconds).result() for batch in batches}

    def _rate(self, batch: int, seconds: float) -> float:
        piece = self.patches[:batch]
        self._predictor.decide(piece, batch)
        count, began = 0, time.perf_counter()
        while (taken := time.perf_counter() - began) < seconds:
            self._predictor.decide(piece, batch)
            count += batch
        return count / taken


def body(image_format: str) -> tuple[bytes, str]:
    """Return a form with one patch, and its content type."""
    data = encode(random_patches(1)[0], image_format)
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="p.tif"\r\nContent-Type: image/tiff\r\n\r\n'
    return head + data + b"\r\n--b--\r\n", "multipart/form-data; boundary=b"


@contextmanager
def running(arm: str, args: argparse.Namespace, probability: float) -> Iterator[tuple[str, psutil.Process]]:
    """The address of an arm that answers with this probability, and its process."""
    port = usable_port("127.0.0.1", 0)
    command = ["taskset", "-c", str(OTHER_CORE), sys.executable, "-m", "benchmarks.serve_arms", arm, "--bundle", str(args.bundle)]
    command += ["--engine", "torch" if arm == "litserve-torch" else args.engine, "--port", str(port), *(["--zero"] if args.zero else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ENVIRONMENT.get(arm, {})
    if arm == "bentoml" and args.bentoml_packages:
        environment["PYTHONPATH"] = str(args.bentoml_packages.resolve())
    log = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    content, kind = body(args.format)
    try:
        end = time.monotonic() + 120
        while True:
            if process.poll() is not None or time.monotonic() > end:
                log.seek(0)
                raise SystemExit(f"{log.read().decode()}\n{arm} did not start")
            try:
                url = f"http://127.0.0.1:{port}/predict"
                response = httpx.post(url, content=content, headers={"content-type": kind}, timeout=10, trust_env=False)
                if response.status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.3)
        answer = response.json()
        found = (answer[0] if isinstance(answer, list) else answer)["probabilities"]["Metastatic"]
        if abs(found - probability) > 1e-3:
            raise SystemExit(f"{arm} answers {found}, the network {probability}")
        yield url, psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def memory_mib(process: psutil.Process) -> float:
    """Return the memory of a process and all below it; pages that several share are counted once."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 2**20


def saturate(url: str, connections: int, seconds: float, script: Path, process: psutil.Process) -> Measured:
    """Ask for some seconds, each connection without pause."""
    command = ["taskset", "-c", str(OTHER_CORE), "wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "30s", "-s", str(script), url]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    told = json.loads(text.splitlines()[-1])
    return Measured(**told, memory_mib=memory_mib(process))


def ask_at(rate: float, url: str, folder: Path, seconds: float) -> dict[str, float]:
    """Ask at a rate for some seconds."""
    command = ["taskset", "-c", str(OTHER_CORE), sys.executable, "-m", "benchmarks.serve_rate", "--url", url, "--body", str(folder / "body")]
    command += ["--content-type", body("TIFF")[1], "--rate", f"{rate:g}", "--seconds", f"{seconds:g}"]
    told: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return told


def batch_patches_per_s(url: str, patches: UInt8Array, seconds: float) -> float:
    """Return the patches/s of one caller of `/predict/batch` who sends arrays one after the other."""
    buffer = BytesIO()
    np.save(buffer, patches)
    headers = {"content-type": "application/x-npy"}
    with httpx.Client(timeout=60, trust_env=False) as client:
        count, began = 0, time.perf_counter()
        while (taken := time.perf_counter() - began) < seconds:
            response = client.post(f"{url}/batch", content=buffer.getvalue(), headers=headers)
            assert response.status_code == 200, response.text
            count += len(patches)
    return count / taken


def wrk_script(folder: Path, image_format: str) -> Path:
    """Write what wrk sends and how it tells what it found, and return the script's path."""
    content, kind = body(image_format)
    (folder / "body").write_bytes(content)
    script = folder / "post.lua"
    script.write_text(f"""
local file = io.open("{folder}/body", "rb")
wrk.method = "POST"
wrk.body = file:read("*a")
wrk.headers["Content-Type"] = "{kind}"
function done(summary, latency, requests)
  local e = summary.errors
  local told = '{{"requests_per_s": %f, "p50_ms": %f, "p95_ms": %f, "p99_ms": %f, "errors": %d}}\\n'
  io.write(string.format(told, 1e6 * (summary.requests - e.status) / summary.duration, latency:percentile(50) / 1000, latency:percentile(95) / 1000,
    latency:percentile(99) / 1000, e.connect + e.read + e.write + e.status + e.timeout))
end
""")
    return script


class Rounds:
    """What was measured, each list in the order of the rounds."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args, self._folder, self._script = args, folder, wrk_script(folder, args.format)
        self._bare = Bare(args)
        # After the engine's threads were made on theirs.
        os.sched_setaffinity(0, {OTHER_CORE})
        self.saturated: dict[tuple[str, int], list[Measured]] = {}
        self.of_engine: dict[str, list[float]] = {}
        """Requests/s at SATURATED connections / images/s of the bare engine just before."""
        self.batch_of_engine: dict[str, list[float]] = {}
        self.at_rate: dict[str, list[dict[str, float]]] = {}
        self.bare: list[dict[int, float]] = []
        """Images/s by batch size."""

    def run(self, number: int) -> None:
        """Measure each arm once."""
        args = self._args
        for arm in args.arms[:: 1 if number % 2 else -1]:
            self.bare.append(self._bare.images_per_s(args.seconds / len(BARE_BATCHES)))
            with running(arm, args, self._bare.probability) as (url, process):
                saturate(url, 4, 2, self._script, process)
                for connections in args.connections:
                    found = saturate(url, connections, args.seconds, self._script, process)
                    self.saturated.setdefault((arm, connections), []).append(found)
                    print(number, arm, connections, found, flush=True)
                self.of_engine.setdefault(arm, []).append(self.saturated[arm, SATURATED][-1].requests_per_s / max(self.bare[-1].values()))
                if arm in OURS and not args.zero:
                    self._run_batches(arm, url)

    def _run_batches(self, arm: str, url: str) -> None:
        ratios = []
        for _ in range(3):
            engine = max(self._bare.images_per_s(self._args.seconds / 2, (16, 32)).values())
            ratios.append(batch_patches_per_s(url, self._bare.patches, self._args.seconds) / engine)
        print(arm, "/predict/batch of the bare engine:", [f"{ratio:.2f}" for ratio in ratios], flush=True)
        self.batch_of_engine.setdefault(arm, []).extend(ratios)

    def run_at(self, rate: float, number: int) -> None:
        """Ask each arm at a rate that it can keep up with."""
        for arm in self._args.arms[:: 1 if number % 2 else -1]:
            if median(run.requests_per_s for run in self.saturated[arm, SATURATED]) < rate:
                continue  # its queue would only grow
            with running(arm, self._args, self._bare.probability) as (url, process):
                saturate(url, 4, 2, self._script, process)
                self.at_rate.setdefault(arm, []).append(ask_at(rate, url, self._folder, 2 * self._args.seconds))
                print(arm, self.at_rate[arm][-1], flush=True)

    def best_peer(self, connections: int) -> list[float]:
        """Return the requests/s of the best peer in each round."""
        runs = [self.saturated[peer, connections] for peer in PEERS if (peer, connections) in self.saturated]
        return [max(found.requests_per_s for found in of_round) for of_round in zip(*runs, strict=True)]


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Return the median of the ratios within the rounds, and their range."""
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def report(rounds: Rounds, args: argparse.Namespace) -> None:
    """Print medians and ratios."""
    if not args.zero:
        of_batches = [f"{median(bare[batch] for bare in rounds.bare):.0f} in batches of {batch}" for batch in BARE_BATCHES]
        print("bare engine, images/s:", ", ".join(of_batches))
    print("| arm | connections | requests/s | p50 ms | p95 ms | p99 ms | errors | memory MiB |\n|---|---|---|---|---|---|---|---|")
    for connections in args.connections:
        for arm in args.arms:
            runs = rounds.saturated[arm, connections]
            rate, p50, p95, p99 = (median(getattr(run, name) for run in runs) for name in ("requests_per_s", "p50_ms", "p95_ms", "p99_ms"))
            errors, memory = sum(run.errors for run in runs), max(run.memory_mib for run in runs)
            print(f"| {arm} | {connections} | {rate:.0f} | {p50:.2f} | {p95:.1f} | {p99:.1f} | {errors} | {memory:.0f} |")
    for arm in [] if args.zero else args.arms:
        of_engine = rounds.of_engine[arm]
        print(f"{arm}: requests/s at {SATURATED} connections / bare engine {median(of_engine):.2f} ({min(of_engine):.2f} to {max(of_engine):.2f})")
    for arm in (arm for arm in args.arms if arm in OURS):
        rates = [run.requests_per_s for run in rounds.saturated[arm, SATURATED]]
        if "plain" in args.arms and 1 in args.connections:
            p50 = [[run.p50_ms for run in rounds.saturated[of, 1]] for of in (arm, "plain")]
            print(f"{arm}: p50 at 1 connection / plain {ratio(*p50)}")
        if best := rounds.best_peer(SATURATED):
            print(f"{arm}: requests/s at {SATURATED} connections / best peer {ratio(rates, best)}")
        for peer in ("plain", "litserve-torch"):
            if (peer, SATURATED) in rounds.saturated:
                print(f"{arm}: requests/s / {peer} {ratio(rates, [run.requests_per_s for run in rounds.saturated[peer, SATURATED]])}")
        if batches := rounds.batch_of_engine.get(arm):
            print(f"{arm}: /predict/batch, patches/s / bare engine {median(batches):.2f} ({min(batches):.2f} to {max(batches):.2f})")
    for arm, found in rounds.at_rate.items():
        told = ", ".join(f"{name} {median(run[name] for run in found):.1f}" for name in ("p50_ms", "p95_ms", "p99_ms"))
        print(f"{arm} at {args.rate:.0f} requests/s: {told}, errors {sum(run['errors'] for run in found):.0f}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--zero", action="store_true", help="without a network")
    parser.add_argument("--format", choices=("TIFF", "PNG"), default="TIFF")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--bentoml-packages", type=Path, help="folder that BentoML was installed into")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(DEFAULT_ARMS))
    parser.add_argument("--connections", nargs="+", type=int, default=list(CONNECTIONS))
    args = parser.parse_args(argv)
    if SATURATED not in args.connections:
        parser.error(f"--connections must have {SATURATED}")
    with tempfile.TemporaryDirectory() as folder:
        rounds = Rounds(args, Path(folder))
        for number in range(args.rounds):
            rounds.run(number)
        args.rate = 0.7 * median(rounds.best_peer(SATURATED) or [run.requests_per_s for run in rounds.saturated[args.arms[0], SATURATED]])
        # Without a network the load process, written in Python, would be what is measured.
        for number in range(0 if args.zero else args.rounds):
            rounds.run_at(args.rate, number)
    report(rounds, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
