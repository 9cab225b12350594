"""Constant load on an endpoint from a process of its own, which checks every answer: what was lost, what was wrong, which model spoke.

    python -m benchmarks.serve_load --url http://127.0.0.1:8000 --patches patches.npz --raw 4 --client 4

`patches.npz` holds `patches`, uint8 (n, side, side, 3), and `digests`, the models that may answer, with `probabilities`, float64 (digests, n).
`--raw` tasks send each request once and count what becomes of it; `--client` tasks use `sentinode.client`, through which nothing may fail. A line
of JSON tells every half second how far it is; SIGTERM ends it, with the whole count as the last line.
"""

import argparse
import asyncio
import json
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from sentinode.client import AsyncClient
from sentinode.errors import SentinodeError

TOLERANCE = 1e-5
_TELL_EVERY_S = 0.5
# A client that never pauses would show how fast an endpoint is, not whether it loses anything.
_PAUSE_S = 0.01


@dataclass
class Tally:
    """What became of the requests."""

    raw: Counter[str] = field(default_factory=Counter)
    """By status, or kind of error, of those sent once."""
    client: Counter[str] = field(default_factory=Counter)
    digests: Counter[str] = field(default_factory=Counter)
    """Answers by model."""
    wrong: int = 0
    longest_s: float = 0.0
    """Longest time from asking to an answer, through the client."""
    last_failures: list[str] = field(default_factory=list)

    def told(self, **more: Any) -> dict[str, Any]:
        """Return it for a line of JSON."""
        fields = {"raw": self.raw, "client": self.client, "digests": self.digests, "wrong": self.wrong, "longest_s": round(self.longest_s, 2)}
        return fields | {"last_failures": self.last_failures[-5:]} | more


class Load:
    """The tasks that ask."""

    def __init__(self, url: str, key: str | None, patches: dict[str, Any]) -> None:
        self._url, self._key = url, key
        self._files = [_png(patch) for patch in patches["patches"]]
        self._expected = {str(digest): row for digest, row in zip(patches["digests"], patches["probabilities"], strict=True)}
        self.tally = Tally()
        self.over = asyncio.Event()

    async def run(self, raw: int, client: int) -> None:
        """Ask until `over` is set, and tell how far it is."""
        async with (
            httpx.AsyncClient(base_url=self._url, headers={"X-API-Key": self._key} if self._key else {}, timeout=60, trust_env=False) as plain,
            AsyncClient(self._url, self._key, give_up_after_s=120) as library,
        ):
            tasks = [asyncio.create_task(self._ask_plainly(plain, number)) for number in range(raw)]
            tasks += [asyncio.create_task(self._ask(library, raw + number)) for number in range(client)]
            while not self.over.is_set():
                print(json.dumps(self.tally.told()), flush=True)
                try:
                    await asyncio.wait_for(self.over.wait(), _TELL_EVERY_S)
                except TimeoutError:
                    continue
            await asyncio.gather(*tasks)

    async def _ask_plainly(self, client: httpx.AsyncClient, number: int) -> None:
        while not self.over.is_set():
            number = (number + 7) % len(self._files)
            try:
                response = await client.post("/v1/predict", files={"file": ("p", self._files[number])})
            except httpx.HTTPError as error:
                self._lost(self.tally.raw, type(error).__name__)
            else:
                if response.status_code == 200:
                    answer = response.json()
                    self._check(number, answer["model"]["digest"], answer["probabilities"]["Metastatic"])
                    self.tally.raw["200"] += 1
                else:
                    self._lost(self.tally.raw, str(response.status_code), response.text)
            await asyncio.sleep(_PAUSE_S)

    async def _ask(self, client: AsyncClient, number: int) -> None:
        while not self.over.is_set():
            number = (number + 7) % len(self._files)
            started = time.monotonic()
            try:
                answer = await client.predict(self._files[number])
            except SentinodeError as error:
                self._lost(self.tally.client, type(error).__name__, str(error))
            else:
                self._check(number, answer.model.digest, answer.probabilities.Metastatic)
                self.tally.client["200"] += 1
            self.tally.longest_s = max(self.tally.longest_s, time.monotonic() - started)
            await asyncio.sleep(_PAUSE_S)

    def _check(self, number: int, digest: str, probability: float) -> None:
        self.tally.digests[digest] += 1
        if digest not in self._expected or abs(self._expected[digest][number] - probability) > TOLERANCE:
            self.tally.wrong += 1

    def _lost(self, counts: Counter[str], kind: str, detail: str = "") -> None:
        counts[kind] += 1
        self.tally.last_failures.append(f"{kind} {detail[:200]}")


def _png(patch: Any) -> bytes:
    buffer = BytesIO()
    Image.fromarray(patch).save(buffer, "PNG")
    return buffer.getvalue()


async def _main(args: argparse.Namespace) -> None:
    load = Load(args.url, args.key, dict(np.load(args.patches)))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, load.over.set)
    await load.run(args.raw, args.client)
    print(json.dumps(load.tally.told(over=True)), flush=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--key", default=None)
    parser.add_argument("--patches", type=Path, required=True)
    parser.add_argument("--raw", type=int, default=4, help="tasks that send each request once")
    parser.add_argument("--client", type=int, default=4, help="tasks that use the client library")
    asyncio.run(_main(parser.parse_args(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
