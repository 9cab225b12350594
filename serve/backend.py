"""What the HTTP application asks, with failures told apart and the last success remembered."""

import asyncio
import time
from collections.abc import Awaitable
from typing import Protocol, TypeVar

from sentinode.answers import Speaker
from sentinode.errors import PatchError, SentinodeError
from sentinode.images import UInt8Array
from sentinode.probability import Decision
from serve.middleware import logger
from serve.patches import probe_patch
from serve.problems import ProblemError

READY_FOR_S = 10.0
"""A prediction that succeeded this lately is proof enough: a busy endpoint is never probed."""
PROBE_TIMEOUT_S = 10.0
UNREADY_FOR_S = 1.0
"""Whoever asks so soon after a probe failed is told so: each would else hold a place for as long as a probe takes, and nobody needs a key to ask."""

_Answer = TypeVar("_Answer")


class Overloaded(SentinodeError):
    """Raised by a backend that takes no more requests now; trying again after `retry_after_s` seconds is worth it."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("too many requests are waiting")
        self.retry_after_s = retry_after_s


class NotExplainableError(SentinodeError):
    """There is no map for networks of this kind."""


class Backend(Protocol):
    """A classifier: in this process, or behind a handle. Whoever answers says which model it is, since two may serve side by side for a while."""

    async def classify(self, patch: UInt8Array) -> tuple[Decision, Speaker]:
        """Decide about one patch, uint8 (side, side, 3), RGB."""

    async def classify_many(self, patches: UInt8Array) -> tuple[list[Decision], Speaker]:
        """Decide about patches, uint8 (n, side, side, 3), RGB; in order."""

    async def explain(self, patch: UInt8Array, opacity: float) -> tuple[UInt8Array, Speaker]:
        """Return a patch under its Grad-CAM map of an opacity of 0..1; raises NotExplainableError."""


class WatchedBackend:
    """A backend whose failures end a request with a problem; the methods are those of `Backend`."""

    def __init__(self, backend: Backend, patch_size_px: int) -> None:
        self._backend = backend
        self._probe = probe_patch(patch_size_px)
        self._last_success = self._last_failed_probe = float("-inf")
        self._probing = asyncio.Lock()

    async def classify(self, patch: UInt8Array) -> tuple[Decision, Speaker]:
        return self._succeeded(await self._watched(self._backend.classify(patch)))

    async def classify_many(self, patches: UInt8Array) -> tuple[list[Decision], Speaker]:
        return self._succeeded(await self._watched(self._backend.classify_many(patches)))

    async def explain(self, patch: UInt8Array, opacity: float) -> tuple[UInt8Array, Speaker]:
        return await self._watched(self._backend.explain(patch, opacity))

    async def require_ready(self) -> None:
        """Return if a prediction succeeded lately or succeeds now; else end the request with a 503."""
        async with self._probing:
            if time.monotonic() - self._last_success < READY_FOR_S:
                return
            if time.monotonic() - self._last_failed_probe < UNREADY_FOR_S:
                raise _not_ready()
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    await self.classify(self._probe)
            except (ProblemError, TimeoutError) as error:
                self._last_failed_probe = time.monotonic()
                raise _not_ready() from error

    async def _watched(self, asked: Awaitable[_Answer]) -> _Answer:
        """Wait for an answer, or end the request with a 429 or 503 that says it may be retried."""
        try:
            return await asked
        except Overloaded as error:
            raise ProblemError("overloaded", "too many requests are waiting; try again", {"Retry-After": str(error.retry_after_s)}) from error
        except NotExplainableError as error:
            raise ProblemError("not_explainable", str(error)) from error
        except PatchError:
            raise
        except Exception as error:
            # The boundary to the model: whatever broke there, the caller learns that trying again may help, the log learns what it was.
            logger.exception("the engine failed")
            raise ProblemError("engine_failed", "the model could not be reached or failed; try again", {"Retry-After": "1"}) from error

    def _succeeded(self, answer: _Answer) -> _Answer:
        self._last_success = time.monotonic()
        return answer


def _not_ready() -> ProblemError:
    return ProblemError("not_ready", "a prediction on a built-in patch failed; try again", {"Retry-After": "1"})
