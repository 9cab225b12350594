"""Running a bundle over many patches with Ray Data actors; what evaluate, predict and ensemble share.

The unit of work is a shard of a prepared data set or a part of the predictions. An actor reads it itself, so pixels never pass through the object
store, and the same unit gives the same numbers whichever actor gets it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray.data
import torch

from ray_jobs.cluster import Need, check_capacity, wants_gpus
from ray_jobs.waiting import data_tasks_run, wait_told
from sentinode.allocator import keep_freed_memory
from sentinode.bundle import Bundle
from sentinode.config import EnsembleConfig, EvaluateConfig, PredictConfig
from sentinode.engines import choose_engine
from sentinode.errors import SentinodeError, UsageError, one_line, root_of
from sentinode.predictor import Predictor

_OUTCOME_SCHEMA = pa.schema([("unit", pa.int64()), ("result", pa.binary()), ("error", pa.string()), ("exit_code", pa.int64())])

Work = Callable[[Predictor, int], pa.Table]
"""What is done with one unit: (predictor, number of the unit) -> rows of the result."""


class BundleActor:
    """A Ray Data actor that holds a loaded bundle."""

    def __init__(self, bundle: str, engine: str, device: str, threads: int, work: Work) -> None:
        torch.set_num_threads(threads)
        keep_freed_memory()
        self._predictor = Predictor.load(bundle, engine=engine, device=device)
        self._work = work
        self._failure: dict[str, Any] | None = None

    def __call__(self, units: pa.Table) -> pa.Table:
        """Do the units numbered in column `unit`; what fails comes back as a row too.

        Raised, an error would leave Ray Data's actors, and their CPUs, taken until the driver's garbage collector finds the last reference.
        After one failure no other unit is begun: nothing of the result would be used, and the rest might take hours.
        """
        rows: list[dict[str, Any]] = []
        for unit in units["unit"].to_pylist():
            if self._failure is not None:
                rows.append({"unit": unit} | self._failure)
                continue
            try:
                rows.append({"unit": unit, "result": _to_bytes(self._work(self._predictor, unit))})
            except (SentinodeError, OSError) as error:
                self._failure = {"error": one_line(error), "exit_code": getattr(error, "exit_code", 1)}
                rows.append({"unit": unit} | self._failure)
        return pa.Table.from_pylist(rows, schema=_OUTCOME_SCHEMA)


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def run_units(
    bundle: Bundle,
    units: Sequence[int],
    work: Work,
    config: EvaluateConfig | PredictConfig | EnsembleConfig,
    verb: str,
    show: Callable[[int], None],
) -> pa.Table:
    """Do units of work, by their numbers, on `config.workers` actors and return all their rows, in the order of `units`.

    Ray must be initialised. `show(rows_done)` is called as results arrive.

    Raises
    ------
    CapacityError
        The cluster has too few CPUs or GPUs.
    ManifestError, UsageError
        The bundle or an engine in it is damaged, or has not the engine that is asked for.
    SentinodeError
        What `work` raises.
    """
    workers = min(config.workers, len(units))
    use_gpu = wants_gpus(config.use_gpu, workers)
    # One CPU beside the actors feeds them.
    check_capacity(Need(workers, config.cpus_per_worker, int(use_gpu)), verb)
    device = "cuda" if use_gpu else "cpu"
    # Chosen here, once: actors on nodes that differ would each choose their own, and the rows would come from several engines.
    engine = choose_engine(bundle, config.engine, device)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Otherwise the type and the causes of what an actor raises are lost on the way.
    context.raise_original_map_exception = True
    # One block per unit, so that units spread over the actors.
    tables = [pa.table({"unit": [unit]}) for unit in units]
    outcomes: dict[int, dict[str, Any]] = {}
    rows = 0
    try:
        with wait_told(config.cpus_per_worker, int(use_gpu), verb, data_tasks_run):
            # from_arrow waits for a task already.
            results = ray.data.from_arrow(tables).map_batches(
                BundleActor,
                fn_constructor_args=(str(bundle.where), engine, device, config.cpus_per_worker, work),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=workers),
                num_cpus=config.cpus_per_worker,
                num_gpus=int(use_gpu),
            )
            for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
                for outcome in batch.to_pylist():
                    if outcome["error"] is None:
                        outcome["result"] = pa.ipc.open_stream(outcome["result"]).read_all()
                        rows += outcome["result"].num_rows
                    outcomes[outcome["unit"]] = outcome
                show(rows)
    except ray.exceptions.RayError as error:
        root = root_of(error)
        raise root if isinstance(root, SentinodeError) else SentinodeError(f"{verb} failed: {one_line(root)}") from error
    if len(outcomes) != len(units):
        raise SentinodeError(f"{verb} failed: {len(outcomes)} of {len(units)} results came back")
    for unit in units:
        if outcomes[unit]["error"] is not None:
            kind = UsageError if outcomes[unit]["exit_code"] == UsageError.exit_code else SentinodeError
            raise kind(outcomes[unit]["error"])
    return pa.concat_tables([outcomes[unit]["result"] for unit in units])
