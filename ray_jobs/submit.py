"""Run a verb as a job of a Ray cluster, from here: a small upload, its log followed, its exit code ours.

    sentinode submit train --data s3://bucket/data --out /shared/run --set workers=4 --address http://127.0.0.1:8265
    sentinode submit --stop train-3f2a9c01d7e4

The same command submitted again while its job runs follows that job; after the job failed or was stopped it is a new attempt, and the verb continues.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

from ray_jobs.job_command import Command, check_command, look_for_inputs
from ray_jobs.job_server import ADDRESS_VARIABLE, DEFAULT_ADDRESS, Jobs, answering, connect, follow, outcome, stop, submit
from ray_jobs.verb import add_common_arguments, main_of, say
from sentinode.errors import StoppedError, UsageError


def _submit_and_follow(client: Jobs, command: Command, submission_id: str | None, detach: bool) -> dict[str, Any]:
    if command.paths:
        say(f"must be the same on every node of the cluster: {', '.join(command.paths)}")
    with answering(client._address):
        name, is_new = submit(client, command, submission_id)
    say(f"{'submitted' if is_new else 'already there'}: {name}")
    if detach:
        return {"submission_id": name}
    try:
        details = follow(client, name)
    except KeyboardInterrupt as error:
        raise StoppedError(f"detached; {name} goes on. The same command follows it, `sentinode submit --stop {name}` stops it") from error
    return {"submission_id": name, "result": outcome(client, command, name, details)}


_WITH_VALUE, _FLAGS = ("--address", "--id", "--stop"), ("--detach",)


def split_arguments(argv: Sequence[str], verbs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return our own arguments, the verb among them, and the verb's, which may stand in any order; `-v` and `--json` are both's."""
    own: list[str] = []
    of_verb: list[str] = []
    left, has_verb = list(argv), False
    while left:
        one = left.pop(0)
        if one in _WITH_VALUE:
            own += [one, *left[:1]]
            del left[:1]
        elif one in _FLAGS or one.startswith(tuple(f"{option}=" for option in _WITH_VALUE)):
            own.append(one)
        elif not has_verb:
            # The verb itself, or what is wrong before it.
            own.append(one)
            has_verb = one in verbs
        else:
            of_verb.append(one)
            if one in ("-v", "--verbose", "--json"):
                own.append(one)
    return own, of_verb


def main(argv: Sequence[str] | None = None, prog: str = "python -m ray_jobs.submit") -> int:
    """Entry point; returns the exit code: the job's own."""
    from ray_jobs.cli import JOBS

    own, of_verb = split_arguments(sys.argv[1:] if argv is None else argv, list(JOBS))

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("verb", nargs="?", choices=list(JOBS), metavar="VERB", help=f"one of {', '.join(JOBS)}; its own arguments follow")
        parser.add_argument("--address", metavar="URL", help=f"of the job server (default: {ADDRESS_VARIABLE}, else {DEFAULT_ADDRESS})")
        parser.add_argument("--id", metavar="ID", help="name of the job (default: made from the command); one that has succeeded is not run again")
        parser.add_argument("--detach", action="store_true", help="return when the job is submitted")
        parser.add_argument("--stop", metavar="ID", help="only stop a job; submitted again, it continues")
        add_common_arguments(parser, None)

    def run(args: argparse.Namespace) -> dict[str, Any]:
        if not args.verbose:
            for name in ("dashboard_sdk", "job.sdk"):
                # They turn themselves on when they are imported.
                logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
        if args.stop:
            client = connect(args.address)
            with answering(client._address):
                stop(client, args.stop)
            return {"submission_id": args.stop}
        if args.verb is None:
            raise UsageError(f"name a verb: {', '.join(JOBS)}")
        command = check_command(args.verb, of_verb)
        client = connect(args.address)
        look_for_inputs(command)
        return _submit_and_follow(client, command, args.id, args.detach)

    return main_of(prog, __doc__, add_arguments, run, own)


if __name__ == "__main__":
    sys.exit(main())
