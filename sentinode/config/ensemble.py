"""How bundles are combined into one."""

from typing import Annotated, Literal

from pydantic import Field

from sentinode.config.base import Config, Engine, Seed
from sentinode.config.train import ReviewRule


class EnsembleConfig(Config):
    """How bundles are combined into one."""

    target_recall: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Recall whose lower 95 % bound on the calibration rows the threshold must reach."""
    review: ReviewRule = ReviewRule()
    """When a prediction is flagged for a human; stored in the bundle."""
    bootstrap_samples: Annotated[int, Field(ge=100)] = 1000
    """Group-bootstrap resamples behind each interval."""
    seed: Seed = 42
    """Of the bootstrap."""
    engine: Engine = "auto"
    """What runs the members while they are calibrated together."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Patches per step."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Inference actors."""
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """CPUs reserved for, and torch threads used by, each actor."""
    use_gpu: Literal["auto"] | bool = "auto"
    """One GPU per actor; `auto` = where the cluster has enough of them."""
