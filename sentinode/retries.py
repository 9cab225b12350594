"""Storage that fails for a moment: what is tried again, for how long, and what every failure means in the end."""

import errno
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import TypeVar

from sentinode.errors import ConfigError, StorageError

log = logging.getLogger(__name__)

PATIENCE_VARIABLE = "SENTINODE_STORAGE_PATIENCE_S"
"""Environment variable: seconds for which a failing object store is tried again (default 60)."""

FIRST_CONTACT_S = 10.0
"""So long a command tries a store that nobody has reached yet, where no connection can be made at all."""

_T = TypeVar("_T")
# What a network file system answers while a server restarts or fails over.
_LOCAL_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR}
_LOCAL_WAITS_S = (0.05, 0.2, 0.8)
# EBUSY, EREMOTEIO: how s3fs names "slow down" and "internal error". EIO: how it names every code that it does not know.
_STORE_PASSING = _LOCAL_PASSING | {
    errno.EBUSY,
    errno.EREMOTEIO,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EPIPE,
}
# Their own errors, which are no OSErrors: connections refused or dropped, answers cut short, answers that are not the protocol's.
_CLIENT_LIBRARIES = {"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "azure", "urllib3"}
# How they name it where no connection could be made: a wrong address, an unknown name, nobody listening.
_UNREACHABLE = {"EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError", "ClientConnectorDNSError", "ServiceRequestError"}
_MEANINGS = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)


_reached_a_store = True


def await_first_contact() -> None:
    """From now on, in this process and until a store has answered once, end attempts to reach one after FIRST_CONTACT_S.

    For commands that begin: an address that was never reached is more often wrong than down for a minute, and nothing is lost yet. Other processes
    of a cluster keep the whole patience, since they may begin while a store is away.
    """
    global _reached_a_store
    _reached_a_store = False


def try_local(where: str, action: Callable[[], _T]) -> _T:
    """Run an action on a local or mounted file, again where the failure may pass.

    Raises
    ------
    StorageError
        It kept failing; the cause is the OSError.
    OSError
        Any other failure, as it came.
    """
    return _try(where, action, _local_meaning, iter(_LOCAL_WAITS_S))


def try_store(where: str, action: Callable[[], _T]) -> _T:
    """Run an action on an object store, again for up to a minute where the failure may pass.

    Raises
    ------
    FileNotFoundError, PermissionError, FileExistsError
        With `where` as the file name.
    OSError
        The store refuses the request for another reason.
    StorageError
        It kept failing.
    """
    began = time.monotonic()

    def act() -> _T:
        result = action()
        _note_contact()
        return result

    def meaning(error: Exception, where: str) -> Exception:
        if type(error).__name__ not in _UNREACHABLE:
            _note_contact()
        return store_meaning(error, where)

    def may_go_on() -> bool:
        return _reached_a_store or time.monotonic() - began < FIRST_CONTACT_S

    return _try(where, act, meaning, takewhile(lambda _: may_go_on(), store_waits()))


def _note_contact() -> None:
    global _reached_a_store
    _reached_a_store = True


def _try(where: str, action: Callable[[], _T], meaning: Callable[[Exception, str], Exception], waits: Iterator[float]) -> _T:
    failures = 0
    while True:
        try:
            return action()
        except Exception as error:
            failure = meaning(error, where)
            wait = next(waits, None) if isinstance(failure, StorageError) else None
            if failure is error:
                raise
            if wait is None:
                raise failure from error
            failures += 1
            if failures == 4:
                log.warning("%s; still trying", failure)
        time.sleep(wait)


def store_waits() -> Iterator[float]:
    """Yield pauses, growing and random, until the patience is used up; it begins with the first pause asked for.

    Raises
    ------
    ConfigError
        The environment variable is not a number.
    """
    text = os.environ.get(PATIENCE_VARIABLE, "60")
    try:
        deadline = time.monotonic() + float(text)
    except ValueError as error:
        raise ConfigError(f"{PATIENCE_VARIABLE}={text}: expected a number of seconds") from error
    pause = 0.1
    while time.monotonic() + pause < deadline:
        # Random, so that the tasks of a cluster do not come back all at once.
        yield pause * random.uniform(0.5, 1)
        pause = min(2 * pause, 8)


def _local_meaning(error: Exception, where: str) -> Exception:
    if isinstance(error, OSError) and error.errno in _LOCAL_PASSING:
        return StorageError(f"{where}: cannot be read or written ({error.strerror}); repeat the command when the storage answers again")
    return error


def store_meaning(error: Exception, where: str) -> Exception:
    """Return what an error of a client library means: an OSError, or StorageError if it may pass. Errors of no client are returned as they are."""
    name, text = type(error).__name__, _described(error)
    if _is_precondition(error):
        return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), where)
    if isinstance(error, _MEANINGS):
        return next(kind for kind in _MEANINGS if isinstance(error, kind))(_errno_of(error), text, where)
    if "Credential" in name:
        return PermissionError(errno.EACCES, "no usable credentials found in the environment, the profile or the role", where)
    if isinstance(error, ValueError) or name == "ParamValidationError":
        # How the clients refuse a name that cannot be a bucket's or an object's.
        return OSError(errno.EINVAL, text, where)
    # Some of the clients' own errors are OSErrors without a number, time-outs for example.
    is_of_client = type(error).__module__.partition(".")[0] in _CLIENT_LIBRARIES
    if is_of_client or isinstance(error, (TimeoutError, ConnectionError)) or (isinstance(error, OSError) and error.errno in _STORE_PASSING):
        return StorageError(f"{where}: the storage does not answer ({text}); repeat the command when it does")
    return OSError(error.errno or errno.EINVAL, text, where) if isinstance(error, OSError) else error


def _is_precondition(error: Exception) -> bool:
    """Tell whether the store has refused a put because the object is there; s3fs names that only where the answer says which condition failed."""
    answer = getattr(error.__cause__ or error, "response", None)
    return isinstance(answer, dict) and answer.get("Error", {}).get("Code") in ("PreconditionFailed", "412")


def _errno_of(error: OSError) -> int:
    defaults = {
        FileNotFoundError: errno.ENOENT,
        PermissionError: errno.EACCES,
        FileExistsError: errno.EEXIST,
        IsADirectoryError: errno.EISDIR,
        NotADirectoryError: errno.ENOTDIR,
    }
    return error.errno or next(number for kind, number in defaults.items() if isinstance(error, kind))


def _described(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return os.strerror(errno.ENOENT)
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().splitlines()[0]
    # An endpoint may have been configured with a user and password in it.
    return re.sub(r"//[^/@\s]*@", "//", text)
