"""How fast a training step is on CPUs, beside what a user would write without Sentinode.

    sentinode prepare --source kaggle/ --out out/data
    python -m benchmarks.train --data out/data --source kaggle/ --pairs 9

Each side has a process of its own; they take turns, on the same rows in the same order, with the same network, batch, precision, threads, weighted
loss and Adam; augmentation is off. Times are of training alone, without validation; the first batch of each side is shown apart. Parts:

full    ResNet-34, everything trains, 96 px, one worker: beside a plain PyTorch loop over tensors in memory. Goal 0.97 of its speed.
frozen  unfreeze_depth 1, 224 px, one worker: beside that loop with the same layers frozen (no gradients, BatchNorm in eval mode). Goal 1.3 times its
        speed, the losses of both within 1e-3 in the first three epochs.
tifs    as full: beside a DataLoader over the TIF files, the best of 0, 1 and 2 worker processes. Goal: ahead of it.
ddp     as full, two workers of one thread each: beside DistributedDataParallel around the plain loop; both in the same processes, under torchrun.
        Goal 0.98.
ray     as ddp, but ours is the command `train` on a Ray of its own, with all that Ray runs beside the workers. Both are started anew for each pair,
        and epochs after the first compared. It trains on the whole of --data: take a small one (`sentinode synth --count 400`). Goal 0.98.
outside what of our own step is not forward, backward and optimiser, with the default augmentation; no peer.

With --cpu-time, full and frozen compare the CPU time of their processes (one thread each), which other programs disturb less; ours then includes the
validation of two patches. Ends with exit code 1 where a goal is missed; a goal is met where the interval of the median reaches it.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from benchmarks.ratios import Median, median_of
from sentinode.config import AugmentConfig, Precision, TrainConfig
from sentinode.dataset import Patches, PreparedDataset
from sentinode.ingest import ResidentRows
from sentinode.learner import Learner
from sentinode.locations import locate
from sentinode.model import build_model
from sentinode.preprocess import network_input
from sentinode.training import Group, Progress, train_epochs
from sentinode.worker import set_up_worker

GOALS = {"full": 0.97, "frozen": 1.3, "tifs": 1.0, "ddp": 0.98, "ray": 0.98}
LOSS_TOLERANCE = 1e-3
# Epochs whose losses are compared. Rounding grows from step to step while a network learns a few rows by heart: after five epochs of 160 rows the
# peer differs from itself, run in another memory format, by more than the tolerance (docs/results.md).
_LOSS_EPOCHS = 3
_PLAIN = AugmentConfig(dihedral=False, colour_jitter=0, hue_jitter=0)
_FROZEN = ("conv1", "bn1", "layer1", "layer2", "layer3")


def config_of(part: str, batch_size: int, precision: Precision = "fp32") -> TrainConfig:
    """Return what is trained in a part."""
    full = part != "frozen"
    return TrainConfig(
        weights="none",
        unfreeze_depth=5 if full else 1,
        input_size_px=96 if full else 224,
        batch_size=batch_size,
        precision=precision,
        schedule="constant",
        early_stopping_patience_epochs=None,
        epochs=10**6,
        augment=AugmentConfig() if part == "outside" else _PLAIN,
    )


def network(config: TrainConfig) -> nn.Module:
    """Return the same random network for both sides."""
    torch.manual_seed(0)
    return build_model(config.arch)


Batches = Callable[[int], Iterable[tuple[torch.Tensor, torch.Tensor]]]


class Ours:
    """Sentinode's loop, one epoch at a time."""

    def __init__(self, config: TrainConfig, rows: Patches, group: Group, learner: type[Learner] = Learner) -> None:
        self.config, self.group, self.progress = config, group, Progress()
        self.learner = learner(network(config), config, device=group.device, world_size=group.world_size)
        self.source = ResidentRows(rows, group.device)
        # Validation is not timed; it needs a row of each class.
        self.val = rows.take(np.array([int(np.flatnonzero(rows.labels == label)[0]) for label in (0, 1)]))

    def epoch(self) -> dict[str, Any]:
        """Train one epoch and return its record."""
        until = self.config.model_copy(update={"epochs": self.progress.epochs_done + 1})
        train_epochs(self.learner, self.source, self.val, until, self.progress, group=self.group)
        return self.progress.history[-1]


class Plain:
    """What a user would write: tensors in memory, the network in train mode, cross-entropy, Adam."""

    def __init__(self, config: TrainConfig, rows: Patches, group: Group, batches: Batches, channels_last: bool = False) -> None:
        self.config, self.batches, self.epochs_done, self.group = config, batches, 0, group
        model = network(config)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.frozen = [model.get_submodule(name) for name in _FROZEN] if config.unfreeze_depth == 1 else []
        for module in self.frozen:
            module.requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.model = DistributedDataParallel(model) if group.world_size > 1 else model
        self.optimiser = torch.optim.Adam(trained, lr=config.learning_rate)
        positive = int(rows.labels.sum())
        self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, (len(rows) - positive) / positive]))

    def epoch(self) -> dict[str, Any]:
        """Train one epoch; its seconds, those of its first batch and its mean loss."""
        started, first = time.monotonic(), None
        self.model.train()
        for module in self.frozen:
            module.eval()
        total, weights = 0.0, 0.0
        for patches, labels in self.batches(self.epochs_done):
            inputs = network_input(patches, self.config.input_size_px, self.config.mean, self.config.std)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
                z = self.model(inputs)
            loss = self.criterion(z.float(), labels)
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            # The mean over an epoch's rows, as ours, not over its batches, of which each has its own sum of weights.
            weight = self.criterion.weight[labels].sum().item()
            total, weights = total + weight * loss.item(), weights + weight
            first = first or time.monotonic() - started
        self.epochs_done += 1
        return {"seconds": time.monotonic() - started, "first_batch_seconds": first, "train_loss": total / weights}


def from_memory(config: TrainConfig, rows: Patches, group: Group) -> Batches:
    """Batches of tensors in memory, in the order of ours."""
    images, labels = torch.from_numpy(rows.images.copy()), torch.from_numpy(rows.labels)
    source = ResidentRows(rows, "cpu")

    def batches(epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = source.order(config.seed, epoch, group.world_size, config.batch_size)
        for index in torch.from_numpy(np.array_split(order, group.world_size)[group.rank]).split(config.batch_size):
            yield images[index], labels[index]

    return batches


class TifRows(Dataset[tuple[torch.Tensor, int]]):
    """One TIF after the other, as a user would read them first."""

    def __init__(self, folder: Path, rows: Patches) -> None:
        self.paths = [folder / "train" / f"{name}.tif" for name in rows.ids]
        self.labels = rows.labels.tolist()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[row]) as image:
            return torch.from_numpy(np.array(image)), self.labels[row]


def from_tifs(folder: Path, rows: Patches, batch_size: int, workers: int) -> Batches:
    """Batches of a DataLoader."""
    loader = DataLoader(TifRows(folder, rows), batch_size=batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    return lambda epoch: loader


@dataclass(frozen=True)
class Side:
    """How to make one side in a process of its own."""

    part: str
    config: TrainConfig
    data: str
    rows: int
    threads: int
    plain: bool
    tifs: Path | None = None
    workers: int = 0
    channels_last: bool = False

    def make(self) -> "Ours | Plain":
        """Make it, in the process that is to run it."""
        rows = PreparedDataset.open(self.data).read_split("train").take(np.arange(self.rows))
        if not self.plain:
            set_up_worker(self.threads)
            return Ours(self.config, rows, Group())
        torch.set_num_threads(self.threads)
        if self.tifs is not None:
            return Plain(self.config, rows, Group(), from_tifs(self.tifs, rows, self.config.batch_size, self.workers))
        return Plain(self.config, rows, Group(), from_memory(self.config, rows, Group()), self.channels_last)


class Process:
    """A side in its process: `epoch` waits for one epoch."""

    def __init__(self, side: Side) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(side, theirs))
        self._process.start()

    def epoch(self) -> dict[str, Any]:
        """Train one epoch and return its record."""
        self._pipe.send(True)
        record: dict[str, Any] = self._pipe.recv()
        return record

    def end(self) -> None:
        """End the process."""
        self._pipe.send(False)
        self._process.join()


def _serve(side: Side, pipe: Any) -> None:
    runner = side.make()
    while pipe.recv():
        started = time.process_time()
        record = runner.epoch()
        pipe.send(record | {"cpu_seconds": time.process_time() - started})


def compare(ours: "Ours | Process", plain: "Plain | Process", pairs: int, clock: str = "seconds") -> dict[str, Any]:
    """Take turns; each side's first epoch only warms up. Returns the speed of ours as a part of theirs, per pair, and both sides' losses."""
    warm = ours.epoch(), plain.epoch()
    ratios, losses, their_losses = [], [abs(warm[0]["train_loss"] - warm[1]["train_loss"])], [warm[1]["train_loss"]]
    for pair in range(pairs):
        sides: list[Any] = [ours, plain] if pair % 2 else [plain, ours]
        done = {id(side): side.epoch() for side in sides}
        mine, theirs = done[id(ours)], done[id(plain)]
        ratios.append(theirs[clock] / mine[clock])
        losses.append(abs(theirs["train_loss"] - mine["train_loss"]))
        their_losses.append(theirs["train_loss"])
    first = [record["first_batch_seconds"] for record in warm]
    return {"ratios": ratios, "first_batch_seconds": first, "loss_differences": losses[:_LOSS_EPOCHS], "peer_losses": their_losses[:_LOSS_EPOCHS]}


def compare_processes(ours: Side, plain: Side, pairs: int, clock: str = "seconds") -> dict[str, Any]:
    """As `compare`, each side in a process of its own."""
    processes = [Process(ours), Process(plain)]
    try:
        return compare(*processes, pairs, clock)
    finally:
        for process in processes:
            process.end()


def report(part: str, result: dict[str, Any], note: str = "") -> bool:
    """Print one line; return whether the goal is met."""
    ratio: Median = median_of(result["ratios"])
    met = ratio.high >= GOALS[part]
    first = " and ".join(f"{seconds:.2f} s" for seconds in result["first_batch_seconds"])
    print(
        f"{part}: {ratio} of the peer's speed{note}; goal {GOALS[part]}: {'met' if met else 'MISSED'}; first batch, ours and theirs: {first}",
        flush=True,
    )
    if part == "frozen":
        same = max(result["loss_differences"]) <= LOSS_TOLERANCE
        ours, peers = (", ".join(f"{value:.1e}" for value in result[name]) for name in ("loss_differences", "peer_differences"))
        print(f"frozen: losses differ by {ours} in the first epochs; goal {LOSS_TOLERANCE:g}: {_verdict(same)}")
        print(f"frozen: the peer's losses differ by {peers} from its own in the memory format channels_last")
        met = met and same
    return met


def differences_of_peer(peer: Side, losses: list[float]) -> list[float]:
    """Return by how much the peer's first losses change if only the order of its additions does: the same loop in another memory format."""
    process = Process(replace(peer, channels_last=True))
    try:
        return [abs(process.epoch()["train_loss"] - loss) for loss in losses]
    finally:
        process.end()


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


class _Timed(Learner):
    """A learner that notes how long forward, backward and optimiser take (on CPU, where calls wait)."""

    seconds = 0.0

    def _noted(self, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        self.seconds += time.perf_counter() - started
        return result

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        z: torch.Tensor = self._noted(lambda: super(_Timed, self).forward(inputs))
        return z

    def backward(self, loss: torch.Tensor) -> None:
        self._noted(lambda: super(_Timed, self).backward(loss))

    def step(self) -> None:
        self._noted(lambda: super(_Timed, self).step())


def outside(config: TrainConfig, rows: Patches, epochs: int) -> list[float]:
    """Return, per epoch, the part of the time that is not forward, backward and optimiser."""
    ours = Ours(config, rows, Group(), _Timed)
    learner: Any = ours.learner
    ours.epoch()
    parts = []
    for _ in range(epochs):
        learner.seconds = 0.0
        whole = ours.epoch()["seconds"]
        parts.append(1 - learner.seconds / whole)
    return parts


def run_rank(args: argparse.Namespace) -> None:
    """One process of the part ddp, started by torchrun."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = Group(dist.get_rank(), dist.get_world_size())
    rows = PreparedDataset.open(args.data).read_split("train").take(np.arange(args.steps * args.batch_size * group.world_size))
    config = config_of("ddp", args.batch_size)
    result = compare(Ours(config, rows, group), Plain(config, rows, group, from_memory(config, rows, group)), args.pairs)
    if group.rank == 0:
        Path(args.result).write_text(json.dumps(result))
    dist.destroy_process_group()


def run_ddp(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Start torchrun and return what its rank 0 measured."""
    own = ["-m", "benchmarks.train", "--part", "rank", "--data", args.data, "--result", str(scratch)]
    own += ["--pairs", str(args.pairs), "--steps", str(args.steps), "--batch-size", str(args.batch_size)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, *own], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    result: dict[str, Any] = json.loads(scratch.read_text())
    return result


def run_peer(args: argparse.Namespace) -> None:
    """One process of the peer of the part ray, started by torchrun."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = Group(dist.get_rank(), dist.get_world_size())
    rows = PreparedDataset.open(args.data).read_split("train")
    config = config_of("ray", args.batch_size)
    peer = Plain(config, rows, group, from_memory(config, rows, group))
    records = [peer.epoch() for _ in range(args.epochs)]
    if group.rank == 0:
        Path(args.result).write_text(json.dumps(records))
    dist.destroy_process_group()


def peer_epochs(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Run the plain loop under torchrun; its epochs."""
    own = ["-m", "benchmarks.train", "--part", "peer", "--data", args.data, "--result", str(scratch / "peer.json")]
    own += ["--epochs", str(args.epochs), "--batch-size", str(args.batch_size)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, *own], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    records: list[dict[str, Any]] = json.loads((scratch / "peer.json").read_text())
    return records


def command_epochs(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Run the command `train` with two workers; its epochs."""
    from ray_jobs.checkpoints import best_and_last

    config = config_of("ray", args.batch_size).model_copy(update={"epochs": args.epochs, "workers": 2, "trackers": ()})
    (scratch / "train.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "ray_jobs.train", "--data", args.data, "--out", str(scratch / "run"), "--config", str(scratch / "train.yaml")]
    subprocess.run(command, check=True)
    _, last = best_and_last(locate(scratch / "run"))
    assert last is not None, "the run left no checkpoint"
    shutil.rmtree(scratch / "run")
    return last.progress.history


def compare_commands(args: argparse.Namespace) -> dict[str, Any]:
    """Take turns between the command and torchrun; as `compare`."""
    ratios, losses, first = [], [], (0.0, 0.0)
    with tempfile.TemporaryDirectory(prefix="sentinode-bench-") as folder:
        for pair in range(args.pairs):
            sides = [command_epochs, peer_epochs] if pair % 2 else [peer_epochs, command_epochs]
            done = {side: side(args, Path(folder)) for side in sides}
            mine, theirs = done[command_epochs], done[peer_epochs]
            first = mine[0]["first_batch_seconds"], theirs[0]["first_batch_seconds"]
            ratios.append(sum(record["seconds"] for record in theirs[1:]) / sum(record["seconds"] for record in mine[1:]))
            losses.append(abs(mine[-1]["train_loss"] - theirs[-1]["train_loss"]))
    return {"ratios": ratios, "first_batch_seconds": first, "loss_differences": losses}


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a prepared data set")
    parser.add_argument("--source", type=Path, help="the Kaggle-layout folder it was prepared from (part tifs)")
    parser.add_argument("--part", default="all", choices=["full", "frozen", "tifs", "ddp", "ray", "outside", "all", "rank", "peer"])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=6, help="steps an epoch")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of one run (part ray)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of both sides")
    parser.add_argument("--cpu-time", action="store_true", help="parts full and frozen: compare CPU time, on a machine that does other work too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "rank":
        run_rank(args)
        return 0
    if args.part == "peer":
        run_peer(args)
        return 0
    met = []
    for part in ("full", "frozen", "tifs", "ddp", "outside") if args.part == "all" else (args.part,):
        config = config_of(part, args.batch_size, args.precision)
        ours = Side(part, config, args.data, args.steps * args.batch_size, args.threads, plain=False)
        peer = replace(ours, plain=True)
        if part == "ddp":
            scratch = Path(args.result or f"ddp-{os.getpid()}.json")
            try:
                met.append(report(part, run_ddp(args, scratch)))
            finally:
                scratch.unlink(missing_ok=True)
        elif part == "ray":
            met.append(report(part, compare_commands(args)))
        elif part == "outside":
            set_up_worker(args.threads)
            rows = PreparedDataset.open(args.data).read_split("train").take(np.arange(ours.rows))
            print(f"outside: {100 * median_of(outside(config, rows, args.pairs)).value:.1f} % of a step is not forward, backward and optimiser")
        elif part == "tifs":
            if args.source is None:
                parser.error("part tifs needs --source")
            results = {workers: compare_processes(ours, replace(peer, tifs=args.source, workers=workers), args.pairs) for workers in (0, 1, 2)}
            best = min(results, key=lambda workers: median_of(results[workers]["ratios"]).value)
            met.append(report(part, results[best], f" with {best} worker processes"))
        else:
            result = compare_processes(ours, peer, args.pairs, "cpu_seconds" if args.cpu_time else "seconds")
            if part == "frozen":
                result["peer_differences"] = differences_of_peer(peer, result["peer_losses"])
            met.append(report(part, result))
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
