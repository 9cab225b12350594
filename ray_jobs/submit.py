"""Run a verb as a job of a Ray cluster, from here: a small upload, its log followed, its exit code ours.

    sentinode submit train --data s3://bucket/data --out /shared/run --set workers=4 --address http://127.0.0.1:8265
    sentinode submit --stop train-3f2a9c01d7e4

The same command submitted again while its job runs follows that job; after the job failed or was stopped it is a new attempt, and the verb continues.
"""

import argparse
import asyncio
import hashlib
import importlib
import json
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from ray.util.state import get_node
from ray.util.state.exception import RayStateApiException

from ray_jobs.ray_address import TOKEN_HINT
from ray_jobs.verb import add_common_arguments, config_from, duration_text, main_of, say
from sentinode.errors import SentinodeError, StoppedError, StorageError, UsageError
from sentinode.locations import locate

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
DEFAULT_ADDRESS = "http://127.0.0.1:8265"

PACKAGES = ("sentinode", "data_prep", "ray_jobs", "serve")
"""What a job's driver and workers import of ours."""
LARGEST_UPLOAD_BYTES = 16 * 1024 * 1024
_NAMED = 3
"""So many of the largest files are named when the upload is too big."""

MANIFESTS = {
    "prepare": "dataset.json",
    "train": "bundle/bundle.json",
    "tune": "bundle/bundle.json",
    "evaluate": "report.json",
    "predict": "_manifest.json",
    "ensemble": "bundle.json",
}
"""In the folder that a verb makes, what is written last: where it is, the verb has succeeded."""

_PATHS = ("source", "from_dataset", "data", "bundle", "bundles", "against", "labels", "slides", "work", "out", "submission")
_UPLOADED = "submitted"
_ANSWER_TIMEOUT_S = 20.0
_LOST_TIMEOUT_S = 180.0
"""How long a job server that has answered before may be away while a log is followed: a head that is started again takes a minute or two."""
_SILENT_S = 30.0
"""When a log is silent for so long, the job server is asked: a machine that is gone without a word leaves its connections open."""
_PENDING_TIMEOUT_S = 1200.0
"""No job waits longer for its driver: Ray itself gives up after 900 s (RAY_JOB_START_TIMEOUT_SECONDS), unless the head that counted them was lost."""
_STOP_TIMEOUT_S = 660.0
"""A verb that is told to stop writes a checkpoint first; our cluster files give it ten minutes (RAY_JOB_STOP_WAIT_TIME_S)."""
_POLL_S = 1.0
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_UNREACHABLE = (aiohttp.ClientError, requests.RequestException, OSError, RuntimeError, RayStateApiException)
"""What asking a job server raises when it, or what stands behind it, is away. RuntimeError: Ray's client, for every answer but 200."""


@dataclass(frozen=True)
class Command:
    """One verb with its arguments, checked as far as it can be without the cluster's files.

    Attributes
    ----------
    verb : str
    arguments : list of str
        With `--json`, and with local files of `--config` named as they are in the upload.
    files : dict
        Name in the upload -> local file.
    out : str or None
        What the verb makes.
    paths : list of str
        Arguments that must be the same folder on every node of the cluster.
    """

    verb: str
    arguments: list[str]
    files: dict[str, Path]
    out: str | None
    paths: list[str]

    @property
    def entrypoint(self) -> str:
        """The job's command line."""
        return shlex.join(["python", "-m", f"ray_jobs.{self.verb}", *self.arguments])

    @property
    def submission_id(self) -> str:
        """Of its first attempt: the same for the same command."""
        digest = hashlib.sha256(self.entrypoint.encode())
        for name, file in sorted(self.files.items()):
            digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
        return f"{self.verb}-{digest.hexdigest()[:12]}"


def check_command(verb: str, arguments: Sequence[str]) -> Command:
    """Check a verb's arguments and configuration as the verb itself would, but for what only the cluster knows.

    Raises
    ------
    ConfigError
        A key or value is wrong.
    SystemExit
        An argument is wrong; argparse has told which.
    """
    module = importlib.import_module(f"ray_jobs.{verb}")
    # Without abbreviations, so that `--config` is found wherever it stands.
    parser = argparse.ArgumentParser(prog=f"sentinode submit {verb}", allow_abbrev=False)
    module.add_arguments(parser)
    parsed = parser.parse_args(arguments)
    files: dict[str, Path] = {}
    given = list(arguments)
    if parsed.config_model is not None:
        config_from(parsed, parsed.config_model)
        if parsed.config and "://" not in parsed.config:
            # The file is here, the job is not.
            name = f"{_UPLOADED}/{Path(parsed.config).name}"
            files[name] = Path(parsed.config)
            given = ["--config=" + name if one == f"--config={parsed.config}" else one for one in given]
            given = [name if before == "--config" else one for before, one in zip(["", *given], given, strict=False)]
    paths: list[str] = []
    for field in _PATHS:
        value = getattr(parsed, field, None)
        paths += value if isinstance(value, list) else [value] if value else []
    return Command(
        verb, given if parsed.json else [*given, "--json"], files, getattr(parsed, "out", None), [one for one in paths if "://" not in one]
    )


@contextmanager
def upload_folder(files: dict[str, Path]) -> Iterator[Path]:
    """A temporary folder with our code and these files: what a job needs, and nothing else of this machine.

    Raises
    ------
    UsageError
        It is larger than LARGEST_UPLOAD_BYTES; the largest files are named.
    """
    with tempfile.TemporaryDirectory(prefix="sentinode-upload-") as name:
        folder = Path(name)
        for package in PACKAGES:
            source = Path(str(importlib.import_module(package).__file__)).parent
            shutil.copytree(source, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        for inside, file in files.items():
            (folder / inside).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / inside)
        sizes = sorted(((path.stat().st_size, str(path.relative_to(folder))) for path in folder.rglob("*") if path.is_file()), reverse=True)
        total = sum(size for size, _ in sizes)
        if total > LARGEST_UPLOAD_BYTES:
            largest = ", ".join(f"{path} ({size / 2**20:.1f} MiB)" for size, path in sizes[:_NAMED])
            raise UsageError(f"the upload has {total / 2**20:.1f} MiB, allowed are {LARGEST_UPLOAD_BYTES / 2**20:.0f}; the largest: {largest}")
        yield folder


class JobError(SentinodeError):
    """A job did not succeed; `exit_code` is the verb's own where it had one."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class _Jobs(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client, which by itself would wait for ever for a server that does not answer."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        response: requests.Response = super()._do_request(method, endpoint, timeout=_ANSWER_TIMEOUT_S, **options)
        return response


def connect(address: str | None) -> JobSubmissionClient:
    """Return a client of the job server at an address (default: RAY_API_SERVER_ADDRESS, else this machine's).

    Raises
    ------
    UsageError
        There is none, it wants another token, or it runs another Ray.
    """
    address = (address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS).rstrip("/")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{address}: expected the address of a job server, like {DEFAULT_ADDRESS}")
    # Ray's client obeys the variable before its argument.
    os.environ[ADDRESS_VARIABLE] = address
    with _answering(address):
        client = _Jobs(address)
        theirs = client._server_ray_version
        if theirs != ray.__version__:
            raise UsageError(f"{address} runs Ray {theirs}, this is Ray {ray.__version__}; both must be the same")
        # What asks for the token.
        client.list_jobs()
    return client


@contextmanager
def _answering(address: str) -> Iterator[None]:
    """Turn what goes wrong on the way to a job server into one line."""
    try:
        yield
    except AuthenticationError as error:
        raise UsageError(f"{address}: refused without its token; {TOKEN_HINT}") from error
    except (ConnectionError, requests.ConnectionError, requests.Timeout) as error:
        raise UsageError(f"{address}: no Ray job server can be reached there ({type(error).__name__})") from error
    except (requests.RequestException, RayStateApiException, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{address}: what answers there is no Ray job server") from error


def submit(client: JobSubmissionClient, command: Command, submission_id: str | None = None) -> tuple[str, bool]:
    """Submit a command, unless it runs already (or, with a `submission_id` of the caller's, has succeeded).

    Returns
    -------
    (submission id, whether it was submitted now)
    """
    base = submission_id or command.submission_id
    while True:
        known = {job.submission_id: job for job in client.list_jobs() if job.submission_id}
        attempts = [name for name in known if name == base or (name.startswith(f"{base}-") and name.removeprefix(f"{base}-").isdigit())]
        for name in attempts:
            if (submission_id and known[name].status.value == "SUCCEEDED") or _goes_on(client, known[name]):
                return name, False
        # Ray knows an id for good: what failed, was lost or was stopped is tried under the next.
        name = base if not attempts else f"{base}-{len(attempts) + 1}"
        with upload_folder(command.files) as folder:
            try:
                client.submit_job(entrypoint=command.entrypoint, submission_id=name, runtime_env={"working_dir": str(folder)})
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise SentinodeError(f"the job was not taken: {str(error).strip().splitlines()[0][:300]}") from error
                continue  # somebody was quicker with the same command
        return name, True


def _goes_on(client: JobSubmissionClient, job: Any) -> bool:
    try:
        return job.status.value not in _ENDED and not _is_lost(client, job)
    except RayStateApiException:
        # Of nodes nothing can be learnt now: whoever follows the job asks again.
        return True


def _is_lost(client: JobSubmissionClient, job: Any) -> bool:
    """Return whether a job that Ray calls pending or running has no driver any more.

    With its state in Redis, a head that was lost and started again goes on calling jobs of the lost one running until somebody submits another
    (Ray 2.60 begins to watch jobs with the first one that is submitted to a head).
    """
    if job.driver_node_id is None:
        return bool(job.status.value == "PENDING" and time.time() - job.start_time / 1000 > _PENDING_TIMEOUT_S)
    node = get_node(job.driver_node_id, address=client._address, timeout=int(_ANSWER_TIMEOUT_S))
    return node is None or bool(node.state != "ALIVE")


def follow(client: JobSubmissionClient, submission_id: str) -> Any:
    """Tell a job's log as it comes and return its details once it has ended.

    Raises
    ------
    JobError
        The job was lost: with the node of its driver, or with a head whose jobs nobody knows any more.
    SentinodeError
        The job server has gone away for good.
    """
    told, away_since = 0, None
    while True:
        told = asyncio.run(_tell_log(client, submission_id, told))
        try:
            details = _details_of_ended(client, submission_id)
        except _UNREACHABLE as error:
            if away_since is None:
                away_since = time.monotonic()
                say(f"the job server does not answer; asking again for {duration_text(_LOST_TIMEOUT_S)}")
            if time.monotonic() - away_since > _LOST_TIMEOUT_S:
                raise SentinodeError(
                    f"the job server does not answer any more; {submission_id} may go on, repeat the command to follow it"
                ) from error
        else:
            if details is not None:
                return details
            if away_since is not None:
                say("the job server answers again")
                away_since = None
        time.sleep(_POLL_S)


def _details_of_ended(client: JobSubmissionClient, submission_id: str) -> Any | None:
    """Return what is known of a job that has ended; None where it goes on.

    Raises
    ------
    JobError
        It was lost.
    """
    # Not the job's own page, whose "not found" is one RuntimeError among others.
    details = next((job for job in client.list_jobs() if job.submission_id == submission_id), None)
    if details is None:
        raise JobError(f"{submission_id} was lost: the cluster does not know it any more; submitted again, it continues")
    if details.status.value in _ENDED:
        return details
    if _is_lost(client, details):
        raise JobError(f"{submission_id} was lost with the node of its driver; submitted again, it continues")
    return None


async def _tell_log(client: JobSubmissionClient, submission_id: str, told: int) -> int:
    """Print the log from its character `told` on, until the job ends, the log is silent or cannot be had; return how many it has by now.

    That it cannot be had is no reason to give up: the node that has it may be lost, and the job server is asked next.
    """
    position = 0
    async with aclosing(client.tail_job_logs(submission_id)) as chunks:
        while True:
            try:
                chunk = await asyncio.wait_for(anext(chunks), _SILENT_S)
            except (StopAsyncIteration, *_UNREACHABLE):  # a TimeoutError is an OSError
                return told
            position += len(chunk)
            if position > told:
                sys.stdout.write(chunk[-(position - told) :])
                sys.stdout.flush()
                told = position


def outcome(client: JobSubmissionClient, command: Command, submission_id: str, details: Any) -> dict[str, Any]:
    """Return what a verb that succeeded told in its last line.

    Raises
    ------
    JobError
        It did not succeed: with the verb's own exit code, or 1 where the job was lost.
    """
    status, code = details.status.value, details.driver_exit_code
    if status == "STOPPED":
        raise JobError(f"{submission_id} was stopped; submitted again, it continues", StoppedError.exit_code)
    if status == "FAILED":
        if code is None:
            reason = (details.message or "no reason was given").strip().splitlines()[0][:300]
            raise JobError(f"{submission_id} was lost: {reason}; submitted again, it continues")
        if code < 0 or code > 128:
            # A shell between Ray and the driver tells a signal as 128 and its number.
            raise JobError(f"{submission_id} was killed by signal {-code if code < 0 else code - 128}; submitted again, it continues")
        raise JobError(f"{submission_id} failed with exit code {code}", code if code in (1, 2, 3) else 1)
    try:
        lines = client.get_job_logs(submission_id).strip().splitlines()
    except _UNREACHABLE as error:
        raise JobError(f"{submission_id} has succeeded, but its log, and with it its result, cannot be had any more") from error
    try:
        result: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        raise JobError(f"Ray calls {submission_id} a success, but it did not end with its result") from error
    _require_manifest(command, submission_id)
    return result


def _require_manifest(command: Command, submission_id: str) -> None:
    """Look at what was made, where it can be seen from here."""
    name = MANIFESTS.get(command.verb)
    if name is None or command.out is None:
        return
    try:
        out = locate(command.out)
        if out.is_local and not out.exists():
            say(f"{command.out}: not on this machine, so not looked at from here")
        elif not (out / name).exists():
            raise JobError(f"Ray calls {submission_id} a success, but {command.out} has no {name}")
    except (StorageError, UsageError) as error:
        say(f"{command.out}: cannot be looked at from here ({error})")


def stop(client: JobSubmissionClient, submission_id: str) -> None:
    """Ask a job to stop, as SIGTERM does, and wait until it has."""
    known = {job.submission_id: job.status.value for job in client.list_jobs()}
    if submission_id not in known:
        raise UsageError(f"{submission_id}: there is no such job; `ray job list` shows them")
    if known[submission_id] not in _ENDED:
        client.stop_job(submission_id)
        end = time.monotonic() + _STOP_TIMEOUT_S
        while client.get_job_info(submission_id).status.value not in _ENDED:
            if time.monotonic() > end:
                raise SentinodeError(f"{submission_id} was told to stop, but goes on after {duration_text(_STOP_TIMEOUT_S)}")
            time.sleep(_POLL_S)
    say(f"{submission_id}: {client.get_job_info(submission_id).status.value.lower()}")


def _submit_and_follow(client: JobSubmissionClient, command: Command, submission_id: str | None, detach: bool) -> dict[str, Any]:
    if command.paths:
        say(f"must be the same on every node of the cluster: {', '.join(command.paths)}")
    with _answering(client._address):
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
    left = list(argv)
    while left:
        one = left.pop(0)
        if one in _WITH_VALUE:
            own += [one, *left[:1]]
            del left[:1]
        elif one in _FLAGS or one.startswith(tuple(f"{option}=" for option in _WITH_VALUE)):
            own.append(one)
        elif not any(verb in own for verb in verbs):
            # The verb itself, or what is wrong before it.
            own.append(one)
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
            with _answering(client._address):
                stop(client, args.stop)
            return {"submission_id": args.stop}
        if args.verb is None:
            raise UsageError(f"name a verb: {', '.join(JOBS)}")
        command = check_command(args.verb, of_verb)
        client = connect(args.address)
        return _submit_and_follow(client, command, args.id, args.detach)

    return main_of(prog, __doc__, add_arguments, run, own)


if __name__ == "__main__":
    sys.exit(main())
