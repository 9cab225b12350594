"""What a process that trains sets up first, the same in a run and in what measures one."""

import torch

from sentinode.allocator import keep_freed_memory


def set_up_worker(threads: int, device: torch.device | str = "cpu") -> None:
    """Make this process one that trains on `device` with so many torch threads; on a CPU with the same result each time."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    if torch.device(device).type == "cpu":
        torch.use_deterministic_algorithms(True)
        # Memory that is about to be written would be filled with NaN before: a help in search of mistakes, paid for at every step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
