"""How much work a network is: floating-point operations of one patch, which do not depend on the machine."""

import torch

from sentinode.model import build_model


def gflops_per_patch(arch: str, input_size_px: int, tta: int = 1) -> float:
    """Return billions of floating-point operations of a forward pass, a multiplication and an addition counted as two.

    Convolutions, matrix products and attention are counted, as torch's own counter (`torch.utils.flop_counter`) does.

    Parameters
    ----------
    arch : str
        As in TrainConfig.
    input_size_px : int
        Side of what the network sees.
    tta : int
        Views of a patch that are averaged.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.random.fork_rng(devices=[]):
        model = build_model(arch, weights="none", input_size_px=input_size_px).eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, input_size_px, input_size_px))
    return float(counter.get_total_flops() * tta / 1e9)
