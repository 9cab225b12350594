"""Requests at a rate, whatever becomes of those before (an open loop), and how long each took from the moment it was due.

    python -m benchmarks.serve_rate --url http://127.0.0.1:8000/predict --body body --content-type "multipart/form-data; boundary=b" --rate 100

Arrivals are those of a Poisson process with a fixed seed, the same for every server. Prints one line of JSON.
"""

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

import aiohttp
import numpy as np


async def _asked(args: argparse.Namespace) -> dict[str, float]:
    body, headers = args.body.read_bytes(), {"Content-Type": args.content_type}
    gaps = np.random.default_rng(0).exponential(1 / args.rate, int(args.rate * args.seconds))
    latencies: list[float] = []
    errors = 0

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(60)) as session:

        async def one(due: float) -> None:
            nonlocal errors
            try:
                async with session.post(args.url, data=body, headers=headers) as response:
                    await response.read()
                    answered = response.status == 200
            except (aiohttp.ClientError, TimeoutError):
                answered = False
            # Refusals are quick, and would make the percentiles look good.
            errors += not answered
            if answered:
                latencies.append(time.perf_counter() - due)

        tasks = []
        due = time.perf_counter()
        for gap in gaps:
            due += gap
            if (left := due - time.perf_counter()) > 0:
                await asyncio.sleep(left)
            tasks.append(asyncio.create_task(one(due)))
        await asyncio.gather(*tasks)
    p50, p95, p99 = (1000 * float(np.percentile(latencies, share)) for share in (50, 95, 99))
    return {"requests": len(latencies), "errors": errors, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--body", type=Path, required=True)
    parser.add_argument("--content-type", required=True)
    parser.add_argument("--rate", type=float, required=True, help="requests/s")
    parser.add_argument("--seconds", type=float, default=10)
    print(json.dumps(asyncio.run(_asked(parser.parse_args(argv)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
