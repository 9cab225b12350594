"""What every verb's command line shares: configuration options, logging, errors to one line, exit codes."""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from sentinode import RESEARCH_USE_NOTICE
from sentinode.config import Config, ConfigT, load_config
from sentinode.errors import ConfigError, SentinodeError, StoppedError, one_line
from sentinode.retries import await_first_contact

PRESETS = Path(__file__).parent / "presets"
Run = Callable[[argparse.Namespace], dict[str, Any]]

logger = logging.getLogger("sentinode")


def add_common_arguments(parser: argparse.ArgumentParser, config: type[Config] | None, example: str = "epochs=3 augment.dihedral=false") -> None:
    """Add the options of every verb; the configuration ones, with an `example` of a setting, where the verb has a configuration."""
    parser.set_defaults(config_model=config)
    if config is not None:
        parser.add_argument("--config", metavar="YAML", help="file with configuration keys")
        parser.add_argument("--preset", metavar="NAME", help=f"configuration that comes with the program, laid over --config: {_preset_names()}")
        parser.add_argument(
            "--set",
            dest="settings",
            metavar="K=V",
            nargs="+",
            action="extend",
            default=[],
            help=f"configuration keys, e.g. --set {example}",
        )
    parser.add_argument("-v", "--verbose", action="store_true", help="show Ray's own output and tracebacks")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def _preset_names() -> str:
    return ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))


def config_from(args: argparse.Namespace, model: type[ConfigT], **overrides: Any) -> ConfigT:
    """Build the configuration a command line asks for: --config, then --preset, then --set, then overrides."""
    files: list[str | Path] = [args.config] if args.config else []
    if args.preset:
        preset = PRESETS / f"{args.preset}.yaml"
        if not preset.is_file() or Path(args.preset).name != args.preset:
            raise ConfigError(f"--preset {args.preset}: no such preset; there are: {_preset_names()}")
        files.append(preset)
    return load_config(model, files, args.settings, **overrides)


class Parser(argparse.ArgumentParser):
    """An argument parser that tells what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """End the program with exit code 2."""
        self.exit(2, f"sentinode: {' '.join(message.split())}; `{self.prog} --help` tells how it is used\n")


def main_of(prog: str, doc: str | None, add_arguments: Callable[[argparse.ArgumentParser], None], run: Run, argv: Sequence[str] | None = None) -> int:
    """Run one verb as a program and return its exit code: 0 done, 1 failed, 2 wrong use, 3 stopped with a checkpoint.

    `doc`: the docstring of the verb's module; its first line is the description.
    """
    parser = Parser(prog=prog, description=(doc or "").split("\n", 1)[0], epilog=RESEARCH_USE_NOTICE)
    add_arguments(parser)
    return execute(run, parser.parse_args(argv))


def execute(run: Run, args: argparse.Namespace) -> int:
    """Run a verb with parsed arguments: one line for an error (the traceback with -v), JSON last if asked for."""
    _configure_output(args.verbose)
    await_first_contact()
    # One way to stop: SIGTERM takes the road of Ctrl-C, which Ray Train handles by ending its workers in order.
    previous = signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        result = run(args)
    except SentinodeError as error:
        return _report(error, error.exit_code, args.verbose)
    except KeyboardInterrupt:
        return _report(StoppedError("stopped; repeat the command to continue"), StoppedError.exit_code, args.verbose)
    except Exception as error:
        # A full disk, a lost node, a mistake of ours: one line all the same, and -v for the rest.
        what = f"{type(error).__name__}: {one_line(error)} (-v shows the traceback)"
        if isinstance(error, PermissionError) and error.filename:
            what = f"{error.filename}: {error.strerror}"
        return _report(SentinodeError(what), 1, args.verbose, cause=error)
    finally:
        signal.signal(signal.SIGTERM, previous)
    if args.json:
        print(json.dumps(result, allow_nan=False), flush=True)
    return 0


def _as_interrupt(signum: int, frame: FrameType | None) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell starts background commands with SIGINT ignored; SIGTERM must end them all the same.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)


def _report(error: Exception, code: int, verbose: bool, cause: Exception | None = None) -> int:
    print(f"sentinode: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if verbose:
        logger.error("traceback", exc_info=cause or error)
    return code


def _configure_output(verbose: bool) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if verbose:
        return
    for library in ("ray", "ray.data", "ray.train", "ray.tune", "ray.serve"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # Read by Ray's processes when they start.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")


def duration_text(seconds: float) -> str:
    """Return "95 s", "12 min" or "3.4 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def say(text: str, end: str = "\n") -> None:
    """Tell the person at the terminal. That the terminal is gone, or the disk behind it full, must not end the work, nor hide how it ends."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        # Python's own flush at the end would fail too, and make any exit code 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # ValueError: closed
        pass
