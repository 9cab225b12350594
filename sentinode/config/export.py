"""How an engine is made from a bundle and measured."""

from typing import Annotated

from pydantic import Field

from sentinode.config.base import Config


class ExportConfig(Config):
    """How an engine is made from a bundle and measured."""

    validation_rows: Annotated[int, Field(ge=1)] | None = None
    """How many rows of the validation split it is compared with torch on, evenly chosen; null = all."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Patches per step of this comparison."""
    calibration_rows: Annotated[int, Field(ge=1)] = 256
    """Rows of the training split that the ranges of an int8 engine are taken from."""
    timing_batch_size: Annotated[int, Field(ge=1)] = 16
    """Patches per step while images/s are measured; the endpoint's `max_batch_size` is as large."""
    timing_rounds: Annotated[int, Field(ge=1)] = 7
    """Timed steps of the engine and of torch, in turns; the medians count."""
    timing_threads: Annotated[int, Field(ge=1)] = 1
    """Threads of both meanwhile; as many as `cpus_per_worker` and `cpus_per_replica` have by default."""
