"""How a bundle is evaluated on, or run over, patches."""

from typing import Annotated, Literal

from pydantic import Field

from sentinode.config.base import Config, Engine, Seed


class EvaluateConfig(Config):
    """How a bundle is evaluated on a prepared data set."""

    split: Literal["train", "val", "test"] = "test"
    """Which rows. Validation chose epochs, calibration and threshold, so figures on it are optimistic."""
    engine: Engine = "auto"
    """What runs the network."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Patches per step."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Inference actors."""
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """CPUs reserved for, and torch threads used by, each actor."""
    use_gpu: Literal["auto"] | bool = "auto"
    """One GPU per actor; `auto` = where the cluster has enough of them."""
    bootstrap_samples: Annotated[int, Field(ge=100)] = 1000
    """Resamples behind each interval."""
    seed: Seed = 42
    """Of the bootstrap."""
    robustness_rows: Annotated[int, Field(ge=0)] = 250
    """About how many rows are also seen changed (stain, brightness, blur, JPEG, symmetries: 18 more answers each); 0 = none."""
    error_examples: Annotated[int, Field(ge=0, le=64)] = 12
    """Worst false negatives, and worst false positives, that the report shows; 0 = none."""


class PredictConfig(Config):
    """How a bundle is run over images: a folder, an archive, a table, HDF5 or a prepared data set."""

    engine: Engine = "auto"
    """What runs the network."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Patches per forward pass; batches are filled across files. A GPU may want more; a CPU is as fast with 64 as with 256, in less memory."""
    rows_per_part: Annotated[int, Field(ge=1)] = 2048
    """Inputs per Parquet part, and the unit that a repeated command does not do again. Best a multiple of `batch_size`."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Inference actors, each with a network of its own. Changes nothing in the output."""
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """CPUs reserved for, torch threads used by, and threads that read and decode ahead of the network in each actor."""
    use_gpu: Literal["auto"] | bool = "auto"
    """One GPU per actor; `auto` = where the cluster has enough of them."""
