"""prepare on one machine of a cluster, where there is no folder for the work that all machines see: the data set goes to an object store from there.

The machine with the most CPUs does it all, in a task that plays the driver's part. If it is lost, so is its work, and another one begins anew.
"""

from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data_prep.output import PrepareRequest
from data_prep.prepare import PrepareResult, prepare
from data_prep.tasks import Progress, on_this_node
from ray_jobs.failures import task_error
from ray_jobs.progress import following
from ray_jobs.verb import say
from ray_jobs.waiting import reserved
from sentinode.publishing import staging_of

# More machines than these are not lost one after the other by chance.
_ATTEMPTS = 3
_LOST = (ray.exceptions.NodeDiedError, ray.exceptions.WorkerCrashedError, ray.exceptions.TaskUnschedulableError)


def prepare_on_one_node(request: PrepareRequest, progress: Progress) -> PrepareResult:
    """Do `data_prep.prepare.prepare` on one machine; errors are those of it, and SentinodeError where one machine after the other was lost."""
    _keep_ray_datas_helpers_here()
    with following(lambda record: progress(**record)) as log:
        for attempt in range(1, _ATTEMPTS + 1):
            node = _largest_node()
            place = NodeAffinitySchedulingStrategy(node, soft=False)
            say(f"preparing on one machine, node {node[:8]}: there is no --work folder that all of them see")
            try:
                result: PrepareResult = ray.get(_prepare_here.options(scheduling_strategy=place).remote(request, log))
            except _LOST as error:
                if attempt == _ATTEMPTS:
                    raise task_error(error, "prepare") from error
                say(f"the machine that prepared was lost, and its work with it; beginning again ({attempt + 1} of {_ATTEMPTS})")
            except ray.exceptions.RayError as error:
                raise task_error(error, "prepare") from error
            else:
                return result
    raise AssertionError("not reached")


def _keep_ray_datas_helpers_here() -> None:
    """Make the actors that Ray Data has for a whole cluster on this machine, the head where it is a job.

    Ray Data makes them where it is used first, and they stay for good (`lifetime="detached"`): a machine that was added for this work would never be
    idle again, so that no autoscaler would give it back.
    """
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
    from ray.data._internal.execution.node_trackers import get_or_create_actor_location_tracker
    from ray.data._internal.stats import get_or_create_stats_actor

    for make in (get_or_create_autoscaling_coordinator, get_or_create_actor_location_tracker, get_or_create_stats_actor):
        make()


def _largest_node() -> str:
    """Return the id of the machine with the most CPUs; where there is none yet, wait for one to come."""
    alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if alive:
        return str(max(alive, key=lambda node: (node["Resources"]["CPU"], node["NodeID"]))["NodeID"])
    with reserved(1, 0, "prepare the data set") as place:
        node: str = ray.get(_node_id.options(scheduling_strategy=place).remote())
    return node


@ray.remote(num_cpus=1)
def _node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


# Ray would repeat it on the same machine, which is the lost one.
@ray.remote(num_cpus=0, max_retries=0)
def _prepare_here(request: PrepareRequest, log: Any) -> PrepareResult:
    def tell(stage: str, done: int, total: int, unit: str = "patches") -> None:
        log.add.remote({"stage": stage, "done": done, "total": total, "unit": unit})

    with on_this_node():
        return prepare(replace(request, staging=staging_of(request.out)), progress=tell)
