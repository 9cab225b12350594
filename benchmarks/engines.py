"""Images per second of what can run a network: torch in three ways, ONNX Runtime, OpenVINO; in turns, on random weights.

    python -m benchmarks.engines --rounds 9                           # resnet34, 96 and 224 px, batches of 1, 8 and 32, one thread
    python -m benchmarks.engines --arch resnet18 --sides 32 --batches 1 --rounds 6 --only eager onnxruntime

Normalised input in memory to logits, without resizing; float32 throughout. Each cell is the median rate, then how many times as fast as eager torch
with the 95 % interval of that ratio's median. A way whose library, or compiler, is not there is left out and named. Compilation and warm-up are not
timed.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from benchmarks.ratios import median_of
from sentinode.engine_export import onnx_bytes, times_in_turns
from sentinode.engines import Run, engine_run, library_of
from sentinode.errors import SentinodeError, one_line
from sentinode.model import build_model
from sentinode.versions import cpu_name, library_versions

WAYS = ("eager", "channels_last", "compile", "onnxruntime", "openvino")


def way(name: str, model: nn.Module, side_px: int) -> Run:
    """Return one way to run `model`, which is on the CPU and in eval mode; raises what it needs and lacks."""
    if name == "eager":
        return model
    if name == "channels_last":
        planes_last = deepcopy(model).to(memory_format=torch.channels_last)
        return lambda inputs: planes_last(inputs.to(memory_format=torch.channels_last))
    if name == "compile":
        return torch.compile(deepcopy(model), dynamic=False)
    onnx = onnx_bytes(model, side_px)
    if name == "onnxruntime":
        return engine_run(name, {"model.onnx": onnx})
    openvino = library_of(name)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.xml"
        openvino.save_model(openvino.Core().read_model(onnx), file, compress_to_fp16=False)
        return engine_run(name, {"model.xml": file.read_bytes(), "model.bin": file.with_suffix(".bin").read_bytes()})


def usable(arch: str, side_px: int, names: list[str]) -> Iterator[tuple[str, Run]]:
    """Yield the ways that work here, each after it gave eager torch's answer."""
    torch.manual_seed(0)
    model = build_model(arch, weights="none", input_size_px=side_px).eval()
    inputs = torch.randn(2, 3, side_px, side_px)
    expected = model(inputs)
    for name in names:
        try:
            run = way(name, model, side_px)
            torch.testing.assert_close(run(inputs), expected, rtol=0, atol=1e-3)
        except (SentinodeError, RuntimeError) as error:
            print(f"{name}: left out ({one_line(error)})", file=sys.stderr)
            continue
        yield name, run


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--arch", default="resnet34")
    parser.add_argument("--sides", type=int, nargs="+", default=[96, 224], help="of the network's input, px")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=9, help="at least 6")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    versions = library_versions()
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "onnxruntime", "openvino") if name in versions)
    print(f"{args.arch}, random weights, float32; threads: {args.threads}; {cpu_name()}; {libraries}")
    print(f"{'px':>4} {'batch':>5} {'way':14} {'images/s':>9}  times as fast as eager")
    for side_px in args.sides:
        runs = dict(usable(args.arch, side_px, ["eager", *(name for name in args.only if name != "eager")]))
        for batch in args.batches:
            inputs = torch.randn(batch, 3, side_px, side_px)
            steps: dict[str, Callable[[], object]] = {name: partial(run, inputs) for name, run in runs.items()}
            times = times_in_turns(steps, args.rounds)
            for name, seconds in times.items():
                ratio = median_of(list(np.divide(times["eager"], seconds)))
                print(f"{side_px:4} {batch:5} {name:14} {batch / median(seconds):9.1f}  {'' if name == 'eager' else ratio}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
