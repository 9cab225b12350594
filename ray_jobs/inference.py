"""Running a bundle over many patches with Ray Data actors; what evaluate and predict share.

The unit of work is a shard of a prepared data set or a block of image files. An actor reads it itself, so pixels never pass through the object
store, and the same unit gives the same numbers whichever actor gets it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
import torch

from ray_jobs.cluster import Need, check_capacity, wants_gpus
from sentinode.config import EvaluateConfig, PredictConfig
from sentinode.errors import SentinodeError, one_line, root_of
from sentinode.predictor import Predictor

Work = Callable[[Predictor, int], pa.Table]
"""What is done with one unit: (predictor, number of the unit) -> rows of the result."""


class BundleActor:
    """A Ray Data actor that holds a loaded bundle."""

    def __init__(self, bundle: str, engine: str, device: str, threads: int, work: Work) -> None:
        torch.set_num_threads(threads)
        self._predictor = Predictor.load(bundle, engine=engine, device=device)
        self._work = work

    def __call__(self, units: pa.Table) -> pa.Table:
        """Do the units numbered in column `unit`."""
        return pa.concat_tables([self._work(self._predictor, unit) for unit in units["unit"].to_pylist()])


def run_units(bundle: Path, units: int, work: Work, config: EvaluateConfig | PredictConfig, verb: str, show: Callable[[int, int], None]) -> pa.Table:
    """Do `units` units of work on `config.workers` actors and return all their rows.

    Ray must be initialised. `show(rows_done, units)` is called as results arrive.

    Raises
    ------
    CapacityError
        The cluster has too few CPUs or GPUs.
    SentinodeError
        What `work` raises.
    """
    workers = min(config.workers, units)
    use_gpu = wants_gpus(config.use_gpu, workers)
    # One CPU beside the actors feeds them.
    check_capacity(Need(workers, config.cpus_per_worker, int(use_gpu)), verb)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Otherwise the type and the causes of what an actor raises are lost on the way.
    context.raise_original_map_exception = True
    # One block per unit, so that units spread over the actors.
    source = ray.data.from_arrow([pa.table({"unit": [unit]}) for unit in range(units)])
    results = source.map_batches(
        BundleActor,
        fn_constructor_args=(str(bundle), config.engine, "cuda" if use_gpu else "cpu", config.cpus_per_worker, work),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=config.cpus_per_worker,
        num_gpus=int(use_gpu),
    )
    tables: list[Any] = []
    done = 0
    try:
        for table in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            tables.append(table)
            done += table.num_rows
            show(done, units)
    except ray.exceptions.RayError as error:
        root = root_of(error)
        raise root if isinstance(root, SentinodeError) else SentinodeError(f"{verb} failed: {one_line(root)}") from error
    return pa.concat_tables(tables)
