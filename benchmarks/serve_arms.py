"""The servers that `benchmarks.serve` compares, each a process of its own that answers POST /predict about one patch.

    python -m benchmarks.serve_arms ARM --bundle BUNDLE --engine torch --port 8000 [--zero]

`--zero` takes the place of the network: an answer from one pixel. The engine runs on core 0, everything else on the core that this process was given.
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sentinode.bundle import Bundle
from sentinode.config import ServeConfig
from sentinode.predictor import Predictor
from sentinode.probability import Decision

ENGINE_CORE = 0
BATCH = 16
LITSERVE_WAIT_S = {"litserve": 0.0, "litserve-torch": 0.0, "litserve-waits": 0.005}
"""How long LitServe waits for company; 0 is its default, and takes what is there."""


def zero(patches: Any) -> list[Decision]:
    """Decide without a network."""
    return [Decision(0.0, float(patch[0, 0, 0]) / 255, "Normal", 0.5, ()) for patch in patches]


def loaded(bundle: Path, engine: str, is_zero: bool) -> Predictor:
    """Return the predictor all arms share, loaded in a thread on the engine's core, so that an engine's own threads stay there."""
    torch.set_num_threads(1)
    predictor = Predictor.load(bundle, engine=engine)
    if is_zero:
        predictor.decide = lambda patches, batch_size=256: zero(patches)  # type: ignore[method-assign]
    return predictor


def pin_engine() -> None:
    """Keep the calling thread on the engine's core."""
    os.sched_setaffinity(0, {ENGINE_CORE})


def answer_of(decision: Decision) -> dict[str, Any]:
    """What peers answer: the three fields of the original endpoint."""
    probabilities = {"Normal": 1 - decision.probability, "Metastatic": decision.probability}
    return {"prediction": decision.prediction, "confidence": decision.confidence, "probabilities": probabilities}


def decoded(data: bytes) -> Any:
    """Decode as peers do, with Pillow."""
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"))


def plain(args: argparse.Namespace) -> None:
    """FastAPI and uvicorn, one patch per forward pass, in a thread."""
    import uvicorn
    from fastapi import FastAPI, UploadFile

    forward = ThreadPoolExecutor(1, initializer=pin_engine)
    predictor = forward.submit(loaded, args.bundle, args.engine, args.zero).result()
    app = FastAPI()

    @app.post("/predict")
    async def predict(file: UploadFile) -> dict[str, Any]:
        patch = await asyncio.to_thread(decoded, await file.read())
        (decision,) = await asyncio.get_running_loop().run_in_executor(forward, predictor.decide, patch[None])
        return answer_of(decision)

    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="error")


def litserve(args: argparse.Namespace) -> None:
    """LitServe with its own batching."""
    import litserve as ls

    from benchmarks.serve_litserve import Api

    api = Api(args.bundle, args.engine, args.zero, max_batch_size=BATCH, batch_timeout=LITSERVE_WAIT_S[args.arm])
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=60)
    server.run(host="127.0.0.1", port=args.port, log_level="error", generate_client_file=False)


def bentoml(args: argparse.Namespace) -> None:
    """BentoML with its own batching."""
    given = "\n".join((str(args.bundle.resolve()), args.engine, str(args.zero)))
    quiet = {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": tempfile.mkdtemp(prefix="bentoml-"), "SENTINODE_BENCHMARK": given}
    command = ["-m", "bentoml", "serve", "benchmarks.serve_bentoml:Api", "--host", "127.0.0.1", "--port", str(args.port), "--working-dir", "."]
    os.execve(sys.executable, [sys.executable, *command, "--api-workers", "1"], os.environ | quiet)


def ours(args: argparse.Namespace) -> None:
    """The endpoint on a Ray of its own."""
    import ray
    from ray import serve as ray_serve
    from ray.serve.schema import LoggingConfig

    from ray_jobs.cluster import connected
    from serve.app import CLASSIFIER, ENDPOINT, FusedEndpoint, SplitEndpoint, _deployment
    from serve.engine import Classifier

    def pinned(classifier: Classifier, cores: set[int]) -> None:
        os.sched_setaffinity(0, cores)
        classifier._forward_thread.submit(pin_engine).result()
        if args.zero:
            classifier._predictor.decide = lambda patches, batch_size=256: zero(patches)  # type: ignore[method-assign]

    class PinnedFused(FusedEndpoint):  # type: ignore[misc, valid-type]
        async def __init__(self, *given: Any) -> None:  # type: ignore[misc]
            cores = os.sched_getaffinity(0)
            # While the engine is loaded: the threads that it makes stay where the one is that makes them.
            pin_engine()
            await super().__init__(*given)
            pinned(self._classifier, cores)

    class PinnedClassifier(Classifier):
        def __init__(self, *given: Any) -> None:
            cores = os.sched_getaffinity(0)
            pin_engine()
            super().__init__(*given)
            pinned(self, cores)

    manifest = Bundle.open(args.bundle).manifest
    given = {"bundle": str(args.bundle.resolve()), "auth": "none", "engine": args.engine, "max_replicas": 1, "max_ongoing_requests": 256}
    config = ServeConfig(**given, max_batch_size=BATCH)
    if args.arm == "ours-split":
        classifier = _deployment(PinnedClassifier, CLASSIFIER, config, 1, 0, 1000).bind(config, manifest.digest)
        application = _deployment(SplitEndpoint, ENDPOINT, config, 0.5, 0, 1000).bind(classifier, config, manifest, ())
    else:
        application = _deployment(PinnedFused, ENDPOINT, config, 1, 0, 1000).bind(config, manifest, ())
    # As `sentinode serve` has it: replicas write the log line of a request.
    quiet = LoggingConfig(encoding="JSON", enable_access_log=False)
    with connected(2):
        ray_serve.start(
            proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": args.port, "request_timeout_s": 120}, logging_config=quiet
        )
        ray_serve.run(application, name="sentinode")
        threading.Event().wait()
    assert ray.is_initialized()


PEER_ARMS = {"plain": plain, "litserve": litserve, "litserve-waits": litserve, "litserve-torch": litserve, "bentoml": bentoml}
_HAPROXY, _THROUGHPUT = {"RAY_SERVE_ENABLE_HA_PROXY": "1"}, {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
ENVIRONMENT = {
    "ours": {},
    "ours-throughput": _THROUGHPUT,
    "ours-haproxy-only": _HAPROXY,
    "ours-haproxy": _HAPROXY | _THROUGHPUT,
    "ours-split": _HAPROXY | _THROUGHPUT,
}
"""Variables that must stand before Ray starts, of each arm of ours."""
ARMS = PEER_ARMS | dict.fromkeys(ENVIRONMENT, ours)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--zero", action="store_true")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ARMS[args.arm](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
