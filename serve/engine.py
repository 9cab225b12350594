"""The classifier inside a Serve replica: one loaded bundle that decides about patches in batches."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from sentinode.answers import Speaker
from sentinode.config import ServeConfig
from sentinode.errors import ManifestError, SentinodeError, UsageError
from sentinode.explain import EnsembleExplainer, Explainer, overlay
from sentinode.images import UInt8Array
from sentinode.predictor import Predictor
from sentinode.probability import Decision
from serve.backend import NotExplainableError
from serve.batching import Batcher
from serve.measures import measures
from serve.patches import probe_patch

PROBE_AFTER_IDLE_S = 30.0
"""A replica that finished a batch this lately is healthy; only one that did not is probed, for probing busy replicas kills them."""

_Result = TypeVar("_Result")


class EngineError(SentinodeError):
    """The network gave no usable answer."""


class Classifier:
    """The bundle at work inside a Serve replica.

    Parameters
    ----------
    config : ServeConfig
        Its `bundle` is an absolute path.
    digest : str
        Digest that the bundle must have. Pinned when the application is built, so that a replica that starts later, after the folder was replaced,
        cannot answer with another model under the old one's name.

    Raises
    ------
    ManifestNotFoundError, ManifestError
        The bundle is missing on this node, damaged, or not the one deployed.
    """

    def __init__(self, config: ServeConfig, digest: str) -> None:
        # Set here because Ray reserves CPUs but does not hold torch to them: without it each replica takes every core.
        torch.set_num_threads(max(1, int(config.cpus_per_replica)))
        self._predictor = Predictor.load(config.bundle, engine=config.engine, device="cuda" if config.gpus_per_replica > 0 else "cpu")
        if self._predictor.manifest.digest != digest:
            raise ManifestError(f"{config.bundle}: was replaced by another bundle since this application was deployed; deploy it again")
        self._speaker = Speaker.of(self._predictor.manifest, self._predictor.engine)
        self._probe = probe_patch(self._predictor.manifest.patch_size_px)
        self._engine_timeout_s = config.engine_timeout_s
        # One thread: forward passes take turns, the event loop stays free.
        self._forward_thread = ThreadPoolExecutor(1, thread_name_prefix="forward")
        self._batcher = Batcher(self._decide_batch, max_batch_size=config.max_batch_size, wait_s=config.batch_wait_timeout_s)
        self._explainer: Explainer | EnsembleExplainer | None = None
        # The first pass is slow (allocations, kernel choice) and shows whether the network works at all: better now than under a request.
        self._predictor.decide(self._probe[None])
        self._last_pass_at = time.monotonic()
        self._running_since: float | None = None

    async def classify(self, patch: UInt8Array) -> tuple[Decision, Speaker]:
        """Decide about one uint8 patch (patch_size_px, patch_size_px, 3), RGB, in a batch with others that wait.

        Raises
        ------
        SentinodeError
            The network's answer is not a number.
        """
        return await self._batcher.classify(patch), self._speaker

    async def classify_many(self, patches: UInt8Array) -> tuple[list[Decision], Speaker]:
        """Decide about uint8 patches (n, patch_size_px, patch_size_px, 3), RGB, in one forward pass of their own; in order; raises as `classify`."""
        decisions = await self._forward(lambda: self._predictor.decide(patches))
        measures().passed(len(patches))
        return decisions, self._speaker

    async def explain(self, patch: UInt8Array, opacity: float) -> tuple[UInt8Array, Speaker]:
        """Return a patch, uint8 (patch_size_px, patch_size_px, 3), RGB, under its Grad-CAM map; 0 = the patch alone, 1 = the map alone.

        Raises
        ------
        NotExplainableError
            There is no map for this kind of network.
        """
        return await self._forward(lambda: self._overlaid(patch, opacity)), self._speaker

    async def check_health(self) -> None:
        """Raise if the network hangs or does not work. Called by Serve, which replaces the replica after some such answers."""
        running_since = self._running_since
        if running_since is not None:
            # A probe would only wait behind what runs.
            if time.monotonic() - running_since > self._engine_timeout_s:
                raise EngineError(f"a forward pass has been running for more than {self._engine_timeout_s:g} s")
        elif time.monotonic() - self._last_pass_at >= PROBE_AFTER_IDLE_S:
            await self._decide_batch([self._probe])

    async def _decide_batch(self, patches: list[UInt8Array]) -> list[Decision]:
        # Here, not in the engine's thread, which would wait for its turn of the interpreter while the engine stands still.
        stacked = np.stack(patches)
        decisions = await self._forward(lambda: self._predictor.decide(stacked))
        measures().passed(len(patches))
        return decisions

    async def _forward(self, work: Callable[[], _Result]) -> _Result:
        """Run the network in its thread, where passes take turns."""

        def run() -> _Result:
            started = self._running_since = time.monotonic()
            try:
                return work()
            finally:
                measures().engine(time.monotonic() - started)
                self._last_pass_at, self._running_since = time.monotonic(), None

        return await asyncio.get_running_loop().run_in_executor(self._forward_thread, run)

    def _overlaid(self, patch: UInt8Array, opacity: float) -> UInt8Array:
        if opacity == 0:
            return patch
        if self._explainer is None:
            try:
                self._explainer = self._predictor.explainer()
            except UsageError as error:
                raise NotExplainableError(str(error)) from error
        return overlay(patch, self._explainer.maps(patch[None])[0], opacity)
