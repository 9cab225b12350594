"""The whole road in minutes: synth, prepare, train, tune, evaluate, serve, and a few patches posted.

    make demo                     # synthetic patches
    make demo SOURCE=DIR          # a real folder in the Kaggle layout, 400 patches or more

Runs the very commands that it prints. A repeat skips what is complete. Everything it starts is stopped at its end.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import httpx

from ray_jobs.verb import Parser, say
from sentinode import CLASS_NAMES, RESEARCH_USE_NOTICE
from sentinode.dataset import PreparedDataset
from sentinode.errors import StoppedError

_SYNTHETIC_PATCHES = 600
# Small enough for two cores. Epochs are ranked by AUC: after so few steps the loss still jumps with BatchNorm's running statistics.
_TRAIN_SETTINGS = (
    *("arch=resnet18", "weights=none", "unfreeze_depth=5", "input_size_px=64", "learning_rate=1e-3", "batch_size=16", "epochs=4"),
    *("selection_metric=val_roc_auc", "workers=2"),
)
_PATCHES_TO_POST = 4
_SERVER_START_S = 240
_SERVER_STOP_S = 60


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code of the first command that failed, 0 if none did."""
    parser = Parser(prog="python -m ray_jobs.demo", description=(__doc__ or "").split("\n", 1)[0], epilog=RESEARCH_USE_NOTICE)
    parser.add_argument("--source", metavar="DIR", help="folder in the Kaggle layout (default: synthetic patches)")
    parser.add_argument("--out", default="demo", metavar="DIR", help="where everything goes (default: demo)")
    args = parser.parse_args(argv)
    # Ended by SIGTERM, it must still end the server.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.monotonic()
    folder = Path(args.out) / (Path(args.source).resolve().name if args.source else "synthetic")
    data, run, sweep, report = (folder / name for name in ("data", "run", "sweep", "report"))
    bundle = run / "bundle"
    source = args.source or str(folder / "patches")
    commands = [] if args.source else [["synth", "--out", source, "--count", str(_SYNTHETIC_PATCHES)]]
    commands += [
        ["prepare", "--source", source, "--out", str(data)],
        ["train", "--data", str(data), "--out", str(run), "--set", *_TRAIN_SETTINGS],
        ["tune", "--data", str(data), "--out", str(sweep), "--config", "tune_configs/smoke.yaml"],
        ["evaluate", "--bundle", str(bundle), "--data", str(data), "--out", str(report)],
    ]
    for command in commands:
        say(f"\n$ sentinode {' '.join(command)}")
        code = run_to_its_end([sys.executable, "-m", "ray_jobs.cli", *command])
        if code:
            return code
    serve = ["serve", "--bundle", str(bundle), "--port", "0", "--set", "auth=none"]
    say(f"\n$ sentinode {' '.join(serve)}")
    try:
        with _server(serve) as url:
            _post_patches(url, data)
    except (RuntimeError, httpx.HTTPError, OSError) as error:
        print(f"sentinode: {error}", file=sys.stderr)
        return 1
    say(_summary(folder, data, run, sweep, report, bundle, time.monotonic() - started))
    return 0


def run_to_its_end(command: list[str]) -> int:
    """Run one command and return its exit code, 0 only if nobody wished it to stop. It is told of a wish, and waited for."""
    process: subprocess.Popen[bytes] | None = None
    wishes = 0

    def hand_on(signum: int, frame: FrameType | None) -> None:
        nonlocal wishes
        wishes += 1
        if process is not None:
            process.terminate()

    handlers = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        # A session of its own: Ctrl-C would reach it from the terminal too, and a second signal stops at once.
        process = subprocess.Popen(command, start_new_session=True)
        if wishes:
            process.terminate()
        code = process.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if wishes and code == 0:
        return StoppedError.exit_code
    return code if code >= 0 else 128 - code


@contextmanager
def _server(command: list[str]) -> Iterator[str]:
    """Start the endpoint, yield its address once it is ready, and stop it with all that it started."""
    # A session of its own, so that what is left after the grace period can be ended as a group.
    process = subprocess.Popen([sys.executable, "-m", "ray_jobs.cli", *command], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield _wait_for_address(process)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_SERVER_STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for_address(process: "subprocess.Popen[str]") -> str:
    lines: queue.Queue[str | None] = queue.Queue()
    output = process.stdout
    assert output is not None

    def read() -> None:
        for line in output:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    deadline = time.monotonic() + _SERVER_START_S
    try:
        while (line := lines.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
            print(line, end="", flush=True)
            if line.startswith("ready: "):
                return line.split()[1]
    except queue.Empty:
        raise RuntimeError(f"the endpoint was not ready within {_SERVER_START_S} s") from None
    raise RuntimeError(f"the endpoint did not start (exit code {process.wait()})")


def _post_patches(url: str, data: Path) -> None:
    """Post a few test patches, as an application would, and show the answers beside the labels."""
    dataset = PreparedDataset.open(data)
    source = Path(dataset.manifest.source["path"])
    test = sorted((row for row in dataset.index.to_pylist() if row["split"] == "test"), key=lambda row: str(row["id"]))
    by_label = [[row for row in test if row["label"] == label][: _PATCHES_TO_POST // 2] for label in (0, 1)]
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        for row in [*by_label[0], *by_label[1]]:
            path = source / row["source_path"]
            say(f"\n$ curl -F file=@{path} {url}/predict")
            answer: dict[str, Any] = client.post("/predict", files={"file": ("patch.tif", path.read_bytes())}).raise_for_status().json()
            say(json.dumps(answer, indent=2))
            say(f"(the label says {CLASS_NAMES[row['label']]})")


def _summary(folder: Path, data: Path, run: Path, sweep: Path, report: Path, bundle: Path, seconds: float) -> str:
    return f"""
Done in {seconds:.0f} s; nothing was left running. Everything lies in {folder}:
  {data}    the prepared data set; open {data}/report.html
  {run}     the training run; its result is {bundle} (read model_card.md there)
  {sweep}   the sweep; open {sweep}/report.html
  {report}  the evaluation; open {report}/report.html

Next:
  make serve BUNDLE={bundle}                     keep the endpoint up, docs at http://127.0.0.1:8000/docs
  sentinode predict --bundle {bundle} --source DIR --out predictions.parquet
  sentinode train --config {sweep}/best.yaml --data {data} --out {folder}/best
(`sentinode` is .venv/bin/sentinode; `. .venv/bin/activate` puts it on the path.)

{RESEARCH_USE_NOTICE}"""


if __name__ == "__main__":
    sys.exit(main())
