"""Backends for the HTTP application, without Ray."""

from collections.abc import Awaitable, Callable

from sentinode.answers import Speaker
from sentinode.errors import UsageError
from sentinode.explain import overlay
from sentinode.images import UInt8Array
from sentinode.predictor import Predictor
from sentinode.probability import Decision
from serve.backend import NotExplainableError

Classify = Callable[[UInt8Array], Awaitable[Decision]]


class InProcess:
    """A predictor in this process; `classify` takes the place of its decision about one patch."""

    def __init__(self, predictor: Predictor, classify: Classify | None = None) -> None:
        self._predictor, self._other = predictor, classify
        self._speaker = Speaker.of(predictor.manifest, predictor.engine)
        self.pieces: list[int] = []

    async def classify(self, patch: UInt8Array) -> tuple[Decision, Speaker]:
        decision = self._predictor.decide(patch[None])[0] if self._other is None else await self._other(patch)
        return decision, self._speaker

    async def classify_many(self, patches: UInt8Array) -> tuple[list[Decision], Speaker]:
        self.pieces.append(len(patches))
        return self._predictor.decide(patches), self._speaker

    async def explain(self, patch: UInt8Array, opacity: float) -> tuple[UInt8Array, Speaker]:
        if opacity == 0:
            return patch, self._speaker
        try:
            explainer = self._predictor.explainer()
        except UsageError as error:
            raise NotExplainableError(str(error)) from error
        return overlay(patch, explainer.maps(patch[None])[0], opacity), self._speaker
