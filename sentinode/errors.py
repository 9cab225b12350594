"""Typed errors. Each carries one line: what was found, what was expected, what to do. `exit_code` is what the command line returns."""

from enum import StrEnum


class SentinodeError(Exception):
    """Anything that went wrong while working. Exit code 1."""

    exit_code = 1


class UsageError(SentinodeError):
    """Wrong use: arguments, configuration or input that cannot work. Exit code 2, before any work is done."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration key or value is wrong; the message names the key, the value and what was expected."""


class MissingPackageError(ConfigError):
    """What is asked for needs a package that is not installed here."""


class ManifestNotFoundError(UsageError):
    """A folder has no manifest, so it is not what it was taken for (or was never finished)."""


class ManifestError(UsageError):
    """A manifest exists but cannot be used: malformed, of a newer format, or contradicted by the files it lists."""


class CapacityError(UsageError):
    """More CPUs or GPUs were asked for than the cluster has and can add."""


class RejectedInputsError(SentinodeError):
    """Too many inputs were refused for the output to be trusted."""


class TrainingError(SentinodeError):
    """Training could not go on: workers failed too often or the numbers stopped being finite."""


class StorageError(SentinodeError):
    """The storage does not answer, after retries. It may pass: repeating the command later continues. Exit code 1."""


class StoppedError(SentinodeError):
    """Stopped by SIGTERM or Ctrl-C; repeating the command continues from the last checkpoint. Exit code 3."""

    exit_code = 3


class PatchErrorCode(StrEnum):
    """Why the bytes of one image are refused. Stable: prediction rows, rejected.parquet and HTTP problem types use these values."""

    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    FORMAT_NOT_ALLOWED = "format_not_allowed"
    TRUNCATED = "truncated"
    DECOMPRESSION_BOMB = "decompression_bomb"
    WRONG_SIZE = "wrong_size"
    WRONG_MODE = "wrong_mode"
    SEVERAL_PAGES = "several_pages"


class PatchError(SentinodeError):
    """One image cannot be used as a patch.

    Attributes
    ----------
    code : PatchErrorCode
        The kind of defect.
    """

    def __init__(self, code: PatchErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


# Ray Data appends advice of its own to the message of whatever a task raises.
_RAY_DATA_ADVICE = "\nFailed to apply UDF transform after "


def root_of(error: BaseException) -> BaseException:
    """Return what an error of another library was made from: the first SentinodeError among its causes, else the innermost cause.

    Causes are `__cause__`, and `cause` where an error carries one (Ray's do, since tracebacks do not travel between processes).
    """
    seen: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in seen:
        seen.append(following)
        if isinstance(following, SentinodeError):
            break
        carried = getattr(following, "cause", None)
        following = carried if isinstance(carried, BaseException) else following.__cause__
    root = seen[-1]
    if root.args and isinstance(root.args[0], str):
        root.args = (root.args[0].partition(_RAY_DATA_ADVICE)[0], *root.args[1:])
    return root


def one_line(error: BaseException) -> str:
    """Return the last line of an error's message that is not empty, or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
