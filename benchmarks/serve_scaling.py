"""How replicas follow load: heavy load for a while over a light one, sampled, as a table and as a picture.

    python -m benchmarks.serve_scaling --bundle out/run/bundle --out docs/serving/scaling.svg

Starts a Ray with `--cpus` logical CPUs and the endpoint on it with 1 to 3 replicas and the delays of serve/config.yaml, but for the one before they
leave (`--downscale-delay`). Two light callers ask all the time, `--heavy` more from second 10 to second `10 + --seconds`; all through the client
library. Prints when replicas were wanted and when they answered, and every quarter second goes into the picture: replicas that run, and the mean
time of the answers of that time.
"""

import argparse
import asyncio
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve as ray_serve

from ray_jobs.cluster import connected
from sentinode.client import AsyncClient
from sentinode.config import ServeConfig
from sentinode.errors import SentinodeError
from serve.app import ENDPOINT, build_app
from serve.local import usable_port
from tests.factories import random_patches

BEFORE_S, SAMPLE_S = 10.0, 0.25


@dataclass(frozen=True)
class Sample:
    """One look: seconds since the start, replicas that run, seconds of answers since the last look, failures since then."""

    at: float
    replicas: int
    answers_s: list[float]
    failed: int


class Load:
    """Callers, some of whom come and go."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._patches = random_patches(16, seed=1)
        self.heavy = self.over = False
        self.taken_s: list[float] = []
        self.failed = 0

    async def run(self, light: int, heavy: int) -> None:
        """Ask until `over`; the heavy callers only while `heavy`."""
        async with AsyncClient(self._url, give_up_after_s=60) as client:
            await asyncio.gather(*(self._ask(client, number, only_heavy=number >= light) for number in range(light + heavy)))

    async def _ask(self, client: AsyncClient, number: int, *, only_heavy: bool) -> None:
        while not self.over:
            if only_heavy and not self.heavy:
                await asyncio.sleep(0.05)
                continue
            started = time.monotonic()
            try:
                await client.predict(self._patches[number % len(self._patches)])
                self.taken_s.append(time.monotonic() - started)
            except SentinodeError:
                self.failed += 1
            await asyncio.sleep(0 if only_heavy else 0.2)


def sampled(url: str, heavy: int, heavy_s: float, until_quiet_s: float) -> list[Sample]:
    """Run the load, and look until one replica is left again."""
    load = Load(url)
    thread = threading.Thread(target=lambda: asyncio.run(load.run(2, heavy)), daemon=True)
    thread.start()
    start, found, seen, failed = time.monotonic(), [], 0, 0
    tick = threading.Event()
    while True:
        at = time.monotonic() - start
        load.heavy = BEFORE_S <= at < BEFORE_S + heavy_s
        replicas = ray_serve.status().applications["sentinode"].deployments[ENDPOINT].replica_states.get("RUNNING", 0)
        count = len(load.taken_s)
        found.append(Sample(at, int(replicas), load.taken_s[seen:count], load.failed - failed))
        seen, failed = count, load.failed
        after = at - BEFORE_S - heavy_s
        if (after > 5 and replicas == 1) or after > until_quiet_s:
            break
        tick.wait(SAMPLE_S)
    load.over = True
    thread.join(60)
    return found


def draw(samples: list[Sample], heavy_s: float, path: Path) -> None:
    """Draw replicas and answer times over time."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "sentinode"
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 4.2), height_ratios=(1, 1.3))
    for axes in (above, below):
        axes.axvspan(BEFORE_S, BEFORE_S + heavy_s, color="#e7eaef", linewidth=0)
        axes.spines[["top", "right"]].set_visible(False)
    above.step([sample.at for sample in samples], [sample.replicas for sample in samples], where="post", color="#24598f")
    above.set_ylabel("replicas")
    above.set_yticks(range(1, max(sample.replicas for sample in samples) + 1))
    with_answers = [sample for sample in samples if sample.answers_s]
    means = [1000 * sum(sample.answers_s) / len(sample.answers_s) for sample in with_answers]
    below.plot([sample.at for sample in with_answers], means, color="#24598f", linewidth=1)
    below.set_ylabel("answer, ms (mean)")
    below.set_ylim(bottom=0)
    below.set_xlabel("seconds; grey: heavy load")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 1 where a request failed, or replicas did not come or go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="an .svg file")
    parser.add_argument("--heavy", type=int, default=24, help="callers of the heavy load")
    parser.add_argument("--seconds", type=float, default=45, help="of heavy load")
    parser.add_argument("--downscale-delay", type=float, default=10.0, help="s of quiet before replicas leave; the default of the endpoint is 120")
    parser.add_argument("--cpus", type=int, default=4)
    args = parser.parse_args(argv)
    config = ServeConfig(bundle=str(args.bundle), auth="none", max_replicas=3, downscale_delay_s=args.downscale_delay)
    with connected(args.cpus):
        port = usable_port("127.0.0.1", 0)
        options: dict[str, Any] = {"host": "127.0.0.1", "port": port, "request_timeout_s": 60}
        ray_serve.start(proxy_location="HeadOnly", http_options=options)
        ray_serve.run(build_app(config), name="sentinode")
        samples = sampled(f"http://127.0.0.1:{port}", args.heavy, args.seconds, 180)
        ray_serve.shutdown()
    draw(samples, args.seconds, args.out)
    most = max(sample.replicas for sample in samples)
    for wanted in range(2, most + 1):
        first = next(sample.at for sample in samples if sample.replicas >= wanted)
        print(f"{wanted} replicas answered {first - BEFORE_S:.1f} s after the load began")
    last = next((sample.at for sample in reversed(samples) if sample.replicas > 1), 0.0)
    print(f"1 replica again {last - BEFORE_S - args.seconds:.1f} s after it ended")
    failed = sum(sample.failed for sample in samples)
    print(f"{sum(len(sample.answers_s) for sample in samples)} answers, {failed} failed through the client")
    return 0 if failed == 0 and most == 3 and samples[-1].replicas == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
