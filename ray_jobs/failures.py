"""One line for what Ray raises when a run or a task of ours fails."""

import ray

from sentinode.errors import SentinodeError, TrainingError, one_line, root_of
from sentinode.locations import Location


def training_error(error: Exception, folder: Location) -> SentinodeError:
    """Turn what Ray Train raises into one line; an error of our own inside a worker comes back as itself."""
    failures = getattr(error, "worker_failures", None) or {}
    controller = getattr(error, "controller_failure", None)
    root = worker_root(failures) if failures else root_of(controller or error)
    if isinstance(root, SentinodeError):
        return root
    return TrainingError(f"training failed: {one_line(root)} (checkpoints so far in {folder}; -v shows the traceback)")


def worker_root(failures: dict[int, Exception]) -> BaseException:
    """Return the root of what the workers of one group raised."""
    # Ray Train wraps what a worker's function raised, and does not name it as the cause.
    roots = [root_of(getattr(failure, "_base_exc", failure)) for failure in failures.values()]
    # Where one rank fails, the others fail on the broken connection to it: an error of our own says more than theirs.
    return next((root for root in roots if isinstance(root, SentinodeError)), roots[0])


def task_error(error: ray.exceptions.RayError, what: str) -> SentinodeError:
    """Turn the failure of a Ray task of ours into one line."""
    root = root_of(error)
    return root if isinstance(root, SentinodeError) else SentinodeError(f"{what} failed: {one_line(root)}")
