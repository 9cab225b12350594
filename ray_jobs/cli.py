"""The console script `sentinode`. The one module that may import any room, and only inside a subcommand."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from ray_jobs.verb import Parser, add_common_arguments, config_from, main_of, say
from sentinode import RESEARCH_USE_NOTICE, __version__
from sentinode.errors import ManifestError, UsageError

JOBS = {
    "prepare": "Turn patches and labels into a prepared data set",
    "train": "Fine-tune a network on a prepared data set",
    "tune": "Search learning rate, unfreeze depth or any other setting",
    "evaluate": "Evaluate a bundle on a split of a prepared data set",
    "predict": "Run a bundle over images: a folder, an archive, a table, HDF5 or a data set",
    "ensemble": "Combine bundles into one, calibrated on rows that none was trained on",
    "export": "Add an engine to a bundle: ONNX Runtime or OpenVINO",
}
"""Verbs that are `python -m ray_jobs.<verb>` too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `sentinode`; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    tools = {"verify": (verify, _verify_arguments), "serve": (serve, _serve_arguments), "synth": (synth, _synth_arguments)}
    parser = Parser(prog="sentinode", epilog=RESEARCH_USE_NOTICE, description="Finds metastatic tissue in lymph-node patches.")
    parser.add_argument("--version", action="version", version=f"sentinode {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, text in JOBS.items():
        verbs.add_parser(name, help=text, add_help=False)
    for name, (run, _) in tools.items():
        verbs.add_parser(name, help=(run.__doc__ or "").split(".", 1)[0], add_help=False)
    verbs.add_parser("submit", help="Run a verb as a job of a Ray cluster", add_help=False)
    verbs.add_parser("doctor", help="Tell whether this machine, or a cluster, is able to run it", add_help=False)
    verb = arguments[0] if arguments else None
    if verb in JOBS or verb in ("submit", "doctor"):
        return int(importlib.import_module(f"ray_jobs.{verb}").main(arguments[1:], prog=f"sentinode {verb}"))
    if verb in tools:
        run, add_arguments = tools[verb]
        return main_of(f"sentinode {verb}", run.__doc__, add_arguments, run, arguments[1:])
    parser.parse_args(arguments)
    return 0


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a prepared data set, a bundle or a folder of predictions")
    add_common_arguments(parser, None)


def verify(args: argparse.Namespace) -> dict[str, Any]:
    """Re-check every checksum and count of a data set, a bundle or predictions."""
    from sentinode.verify import verify_folder

    kind, problems = verify_folder(args.path)
    if problems:
        for problem in problems[1:]:
            say(f"{args.path}: {problem}")
        raise ManifestError(f"{args.path}: {problems[0]}")
    say(f"{args.path}: a whole {kind}")
    return {"path": args.path, "kind": kind}


def _synth_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make, in the Kaggle layout")
    parser.add_argument("--count", required=True, type=int, metavar="N", help="number of patches")
    parser.add_argument("--seed", type=int, default=42, metavar="S", help="the same seed gives the same bytes (default: 42)")
    add_common_arguments(parser, None)


def synth(args: argparse.Namespace) -> dict[str, Any]:
    """Make H&E-like synthetic patches in the Kaggle layout. They teach nothing about real tissue."""
    from data_prep.synth import synthesize

    path = synthesize(args.out, args.count, args.seed)
    say(f"{args.count} synthetic patches: {path}")
    return {"source": str(path), "count": args.count, "seed": args.seed}


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    from sentinode.config import ServeConfig

    parser.add_argument("--bundle", metavar="BUNDLE", help="folder made by train or tune")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: 8000)")
    parser.add_argument("--tls-certificate", metavar="FILE", help="serve https with this certificate (PEM, with its chain)")
    parser.add_argument("--tls-key", metavar="FILE", help="its private key (PEM)")
    parser.add_argument("--check", metavar="FILE", help="only check a Serve config file, strictly")
    parser.add_argument("--new-key", metavar="NAME", help="only make an API key: prints it once, with its line for api_keys_file")
    add_common_arguments(parser, ServeConfig)


def serve(args: argparse.Namespace) -> dict[str, Any]:
    """Serve a bundle over HTTP on this machine until stopped. On a cluster use `serve deploy serve/config.yaml`."""
    from sentinode.config import ServeConfig

    if args.check:
        from serve.check import check_serve_file

        for line in check_serve_file(args.check):
            say(f"note: {line}")
        say(f"{args.check}: every key and value is known")
        return {"checked": args.check}
    if args.new_key:
        return _new_key(args.new_key)
    config = config_from(args, ServeConfig, **({"bundle": args.bundle} if args.bundle else {}))
    from ray_jobs.cluster import Need, check_capacity, connected
    from serve.app import BUNDLE_VARIABLE, ServeArgs, build_app
    from serve.local import run_local, usable_port, usable_tls

    if not args.verbose:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # Whatever is wrong with the arguments shows before Ray starts, and before the application warns of anything.
    if not config.bundle and BUNDLE_VARIABLE not in os.environ:
        raise UsageError(f"name a bundle: --bundle FOLDER, or the environment variable {BUNDLE_VARIABLE}")
    port, tls = usable_port(args.host, args.port), usable_tls(args.tls_certificate, args.tls_key)
    application = build_app(ServeArgs(**config.model_dump()))
    ingress_cpus = config.cpus_per_ingress if config.topology == "split" else 0
    with connected(config.max_replicas * (config.cpus_per_replica + ingress_cpus), verbose=args.verbose):
        check_capacity(Need(config.min_replicas, config.cpus_per_replica, config.gpus_per_replica, config.min_replicas * ingress_cpus), "serve")
        try:
            run_local(
                application,
                request_timeout_s=max(config.request_timeout_s, config.batch_request_timeout_s),
                host=args.host,
                port=port,
                tls=tls,
                ready=lambda url: say(f"ready: {url}  (docs: {url}/docs; Ctrl-C stops)"),
            )
        except KeyboardInterrupt:
            # The way to end a server; there is nothing to continue.
            say("stopped")
    return {}


def _new_key(name: str) -> dict[str, Any]:
    from serve.auth import new_key

    key, line = new_key(name)
    say(f"key (shown once): {key}\nline for api_keys_file: {line}")
    return {"name": name, "line": line}


if __name__ == "__main__":
    sys.exit(main())
