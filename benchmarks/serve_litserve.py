"""The LitServe arm of `benchmarks.serve`; a module of its own, since LitServe's processes import it anew."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import litserve as ls
import numpy as np
from fastapi import Request

from benchmarks.serve_arms import answer_of, decoded, loaded, pin_engine
from sentinode.probability import Decision


class Api(ls.LitAPI):  # type: ignore[misc]
    """Decodes, batches and decides, each as LitServe has a hook for it."""

    def __init__(self, bundle: Path, engine: str, is_zero: bool, **options: Any) -> None:
        super().__init__(**options)
        self._given = bundle, engine, is_zero

    def setup(self, device: str) -> None:
        """Load the network in the process that runs it."""
        # A thread of its own, as in the other arms: the rest of LitServe's process stays on the other core.
        self._forward = ThreadPoolExecutor(1, initializer=pin_engine)
        self._predictor = self._forward.submit(loaded, *self._given).result()

    def decode_request(self, request: Request) -> Any:
        """Return the pixels of the form's file."""
        return decoded(request["file"].file.read())  # type: ignore[index]

    def batch(self, inputs: list[Any]) -> Any:
        """Stack patches."""
        return np.stack(inputs)

    def predict(self, batch: Any) -> list[Decision]:
        """Decide about them."""
        return self._forward.submit(self._predictor.decide, batch).result()

    def unbatch(self, output: list[Decision]) -> list[Decision]:
        """Return each decision."""
        return output

    def encode_response(self, output: Decision) -> dict[str, Any]:
        """Return the answer."""
        return answer_of(output)
