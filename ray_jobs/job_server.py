"""A cluster's job server: submitting a command once, following its log, and what became of it."""

import asyncio
import json
import os
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from ray.util.state import get_node
from ray.util.state.exception import RayStateApiException

from ray_jobs.job_command import MANIFESTS, Command, manifest_exists, upload_folder
from ray_jobs.ray_address import TOKEN_HINT
from ray_jobs.verb import duration_text, say
from sentinode.errors import SentinodeError, StoppedError, UsageError, one_line

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
DEFAULT_ADDRESS = "http://127.0.0.1:8265"

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


class JobError(SentinodeError):
    """A job did not succeed; `exit_code` is the verb's own where it had one."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Jobs(JobSubmissionClient):  # type: ignore[misc]
    """Ray's client, which by itself would wait for ever for a server that does not answer."""

    def time_s(self) -> float:
        """Return what time it is on the server, in seconds since 1970: ages of its jobs are no affair of this machine's clock."""
        date: str | None = self._do_request("GET", "/api/version").headers.get("Date")
        return parsedate_to_datetime(date).timestamp() if date else time.time()

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        response: requests.Response = super()._do_request(method, endpoint, timeout=_ANSWER_TIMEOUT_S, **options)
        return response


def connect(address: str | None) -> Jobs:
    """Return a client of the job server at an address (default: RAY_API_SERVER_ADDRESS, else this machine's).

    Raises
    ------
    UsageError
        There is none, it wants another token, or it runs another Ray.
    SentinodeError
        It answers with an error.
    """
    address = (address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS).rstrip("/")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{address}: expected the address of a job server, like {DEFAULT_ADDRESS}")
    # Ray's client obeys the variable before its argument.
    os.environ[ADDRESS_VARIABLE] = address
    with answering(address, is_known=False):
        client = Jobs(address)
        theirs = client._server_ray_version
        if theirs != ray.__version__:
            raise UsageError(f"{address} runs Ray {theirs}, this is Ray {ray.__version__}; both must be the same")
    with answering(address):
        # What asks for the token.
        client.list_jobs()
    return client


@contextmanager
def answering(address: str, *, is_known: bool = True) -> Iterator[None]:
    """Turn what goes wrong on the way to a job server into one line; `is_known`: that one is there, though it may answer with an error."""
    try:
        yield
    except AuthenticationError as error:
        raise UsageError(f"{address}: refused without its token; {TOKEN_HINT}") from error
    except (ConnectionError, requests.ConnectionError, requests.Timeout) as error:
        raise UsageError(f"{address}: no Ray job server can be reached there ({type(error).__name__})") from error
    except (requests.RequestException, RayStateApiException, RuntimeError, ValueError, KeyError, TypeError) as error:
        if is_known:
            # A head that has just started answers before it takes jobs; an agent may be gone.
            raise SentinodeError(f"{address}: the job server answers with an error ({one_line(error)[:300]}); repeat the command") from error
        raise UsageError(f"{address}: what answers there is no Ray job server") from error


def submit(client: Jobs, command: Command, submission_id: str | None = None) -> tuple[str, bool]:
    """Submit a command, unless it runs already (or, with a `submission_id` of the caller's, has succeeded).

    Returns
    -------
    (submission id, whether it was submitted now)

    Raises
    ------
    UsageError
        The id is that of another command.
    SentinodeError
        The job is not taken.
    """
    base = submission_id or command.submission_id
    while True:
        known = {job.submission_id: job for job in client.list_jobs() if job.submission_id}
        numbers = {name: number for name in known if (number := _attempt(name, base)) is not None}
        if base in known and known[base].entrypoint != command.entrypoint:
            raise UsageError(f"{base}: is the id of another command ({known[base].entrypoint[:200]}); choose another --id")
        for name in numbers:
            if known[name].entrypoint != command.entrypoint:
                continue  # named by somebody else like a later attempt of this one
            if (submission_id and known[name].status.value == "SUCCEEDED") or _goes_on(client, known[name]):
                return name, False
        # Ray knows an id for good: what failed, was lost or was stopped is tried under the next.
        name = f"{base}-{max(numbers.values()) + 1}" if numbers else base
        with upload_folder(command.files) as folder:
            try:
                client.submit_job(entrypoint=command.entrypoint, submission_id=name, runtime_env={"working_dir": str(folder)})
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise SentinodeError(f"the job was not taken: {str(error).strip().splitlines()[0][:300]}") from error
                time.sleep(_POLL_S)
                continue  # somebody was quicker with the same command
        return name, True


def _attempt(name: str, base: str) -> int | None:
    """Return which attempt a job's name stands for, None where it is another's: `base` is the first, `base-2` the second."""
    if name == base:
        return 1
    number = name.removeprefix(f"{base}-")
    return int(number) if number != name and number.isdecimal() else None


def _goes_on(client: Jobs, job: Any) -> bool:
    try:
        return job.status.value not in _ENDED and not _is_lost(client, job)
    except RayStateApiException:
        # Of nodes nothing can be learnt now: whoever follows the job asks again.
        return True


def _is_lost(client: Jobs, job: Any) -> bool:
    """Return whether a job that Ray calls pending or running has no driver any more.

    With its state in Redis, a head that was lost and started again goes on calling jobs of the lost one running until somebody submits another
    (Ray 2.60 begins to watch jobs with the first one that is submitted to a head).
    """
    if job.driver_node_id is None:
        return bool(job.status.value == "PENDING" and client.time_s() - job.start_time / 1000 > _PENDING_TIMEOUT_S)
    node = get_node(job.driver_node_id, address=client._address, timeout=int(_ANSWER_TIMEOUT_S))
    return node is None or bool(node.state != "ALIVE")


def follow(client: Jobs, submission_id: str) -> Any:
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
        told, held = asyncio.run(_tell_log(client, submission_id, told))
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
                if details.status.value != "SUCCEEDED":
                    say(held, end="")
                return details
            if away_since is not None:
                say("the job server answers again")
                away_since = None
        time.sleep(_POLL_S)


def _details_of_ended(client: Jobs, submission_id: str) -> Any | None:
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


async def _tell_log(client: Jobs, submission_id: str, told: int) -> tuple[int, str]:
    """Print the log from its character `told` on, until the job ends, the log is silent or cannot be had; return how many are told, and what is held.

    Held is a last line that begins with "{": it may be the verb's result, which is for programs (`outcome`).
    That the log cannot be had is no reason to give up: the node that has it may be lost, and the job server is asked next.
    """
    position, held = 0, ""
    async with aclosing(client.tail_job_logs(submission_id)) as chunks:
        while True:
            try:
                chunk = await asyncio.wait_for(anext(chunks), _SILENT_S)
            except (StopAsyncIteration, *_UNREACHABLE):  # a TimeoutError is an OSError
                return told, held
            position += len(chunk)
            fresh = position - told - len(held)
            if fresh > 0:
                held += chunk[-fresh:]
                last_line = held.rstrip("\n").rfind("\n") + 1
                end = last_line if held.startswith("{", last_line) else len(held)
                say(held[:end], end="")
                told, held = told + end, held[end:]


def outcome(client: Jobs, command: Command, submission_id: str, details: Any) -> dict[str, Any] | None:
    """Return what a verb that succeeded told in its last line; None where its log is gone, and what it made is there.

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
    is_there = manifest_exists(command)
    if is_there is False:
        raise JobError(f"Ray calls {submission_id} a success, but {command.out} has no {MANIFESTS[command.verb]}")
    try:
        log = client.get_job_logs(submission_id).strip()
    except _UNREACHABLE:
        log = ""
    if not log:
        # It went with the head that had it, while the list of jobs, in Redis, did not; Ray answers "" then.
        if is_there:
            say(f"the log of {submission_id}, and with it what it told of its result, is gone; what it made is there")
            return None
        raise JobError(f"{submission_id} has succeeded, but its log, and with it its result, cannot be had any more")
    try:
        result: dict[str, Any] = json.loads(log.splitlines()[-1])
    except ValueError as error:
        raise JobError(f"Ray calls {submission_id} a success, but it did not end with its result") from error
    return result


def stop(client: Jobs, submission_id: str) -> None:
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
