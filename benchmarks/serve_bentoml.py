"""The BentoML arm of `benchmarks.serve`; a module of its own, since BentoML's processes import it anew."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
from PIL.Image import Image

from benchmarks.serve_arms import BATCH, answer_of, loaded, pin_engine

GIVEN = "SENTINODE_BENCHMARK"
"""Environment variable: bundle, engine and whether there is no network, one per line."""


@bentoml.service(workers=1, traffic={"timeout": 60}, metrics={"enabled": False})
class Api:
    """One worker that batches; BentoML decodes the form's image."""

    def __init__(self) -> None:
        bundle, engine, is_zero = os.environ[GIVEN].splitlines()
        self._forward = ThreadPoolExecutor(1, initializer=pin_engine)
        self._predictor = self._forward.submit(loaded, Path(bundle), engine, is_zero == "True").result()

    # Its default of 60 s for the latency means that it never refuses; what it waits for company it finds out by itself.
    @bentoml.api(batchable=True, max_batch_size=BATCH)  # type: ignore[untyped-decorator]
    def predict(self, file: list[Image]) -> list[dict[str, Any]]:
        """Decide about the images of a batch."""
        patches = np.stack([np.asarray(image.convert("RGB")) for image in file])
        return [answer_of(decision) for decision in self._forward.submit(self._predictor.decide, patches).result()]
