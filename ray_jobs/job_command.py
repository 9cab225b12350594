"""What is sent to a cluster: one verb's command, checked here as far as that is possible, and the upload that it needs."""

import hashlib
import importlib
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ray_jobs.verb import Parser, config_from, say
from sentinode.errors import MissingPackageError, StorageError, UsageError
from sentinode.locations import Location, locate
from sentinode.manifests import read_bundle_manifest, read_dataset_manifest

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

_INPUTS = {
    "source": "--source",
    "from_dataset": "--from",
    "data": "--data",
    "bundle": "--bundle",
    "bundles": "--bundles",
    "against": "--against",
    "labels": "--labels",
    "slides": "--slides",
}
"""What a verb reads: the argument's name -> its option."""
_MANIFEST_OF_INPUT = {
    "--data": ("dataset.json", read_dataset_manifest),
    "--from": ("dataset.json", read_dataset_manifest),
    "--bundle": ("bundle.json", read_bundle_manifest),
    "--bundles": ("bundle.json", read_bundle_manifest),
    "--against": ("bundle.json", read_bundle_manifest),
}
_OUTPUTS = ("work", "out", "submission")
_UPLOADED = "submitted"


@dataclass(frozen=True)
class Command:
    """One verb with its arguments, checked as far as it can be without the cluster's files.

    Attributes
    ----------
    verb : str
    arguments : list of str
        With `--json`, and with local files of `--config` named as they are in the upload.
    files : dict
        Name in the upload -> content.
    out : str or None
        What the verb makes.
    paths : list of str
        Arguments that must be the same folder on every node of the cluster.
    inputs : dict
        Option -> what the verb reads in an object store.
    """

    verb: str
    arguments: list[str]
    files: dict[str, bytes]
    out: str | None
    paths: list[str]
    inputs: dict[str, list[str]]

    @property
    def entrypoint(self) -> str:
        """The job's command line. It holds a digest of what is in the files, so that one command line is one piece of work."""
        return shlex.join(["python", "-m", f"ray_jobs.{self.verb}", *self.arguments])

    @property
    def submission_id(self) -> str:
        """Of its first attempt: the same for the same command."""
        return f"{self.verb}-{_digest(self.entrypoint.encode())}"


def check_command(verb: str, arguments: Sequence[str]) -> Command:
    """Check a verb's arguments and configuration as the verb itself would, but for what only the cluster knows.

    Raises
    ------
    ConfigError
        A key or value is wrong.
    UsageError
        A path is not absolute.
    SystemExit
        An argument is wrong; argparse has told which.
    """
    module = importlib.import_module(f"ray_jobs.{verb}")
    # Without abbreviations, so that `--config` is found wherever it stands.
    parser = Parser(prog=f"sentinode submit {verb}", allow_abbrev=False)
    module.add_arguments(parser)
    parsed = parser.parse_args(arguments)
    files: dict[str, bytes] = {}
    given = list(arguments)
    if parsed.config_model is not None:
        config_from(parsed, parsed.config_model)
        if parsed.config and "://" not in parsed.config:
            # The file is here, the job is not.
            content = Path(parsed.config).read_bytes()
            name = f"{_UPLOADED}/{_digest(content)}-{Path(parsed.config).name}"
            files[name] = content
            given = ["--config=" + name if one == f"--config={parsed.config}" else one for one in given]
            given = [name if before == "--config" else one for before, one in zip(["", *given], given, strict=False)]
    named = {field: value if isinstance(value, list) else [value] for field in (*_INPUTS, *_OUTPUTS) if (value := getattr(parsed, field, None))}
    local = [path for paths in named.values() for path in paths if _is_local(path)]
    for path in local:
        # A job runs in a folder that Ray has unpacked our code into, and that goes with it.
        if not Path(path.removeprefix("file://")).is_absolute():
            raise UsageError(f"{path}: a job does not run in this folder; name the path from / on, or a URI of an object store")
    inputs = {option: [path for path in named[field] if not _is_local(path)] for field, option in _INPUTS.items() if field in named}
    return Command(verb, given if parsed.json else [*given, "--json"], files, getattr(parsed, "out", None), local, inputs)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _is_local(path: str) -> bool:
    return "://" not in path or path.startswith("file://")


def look_for_inputs(command: Command) -> None:
    """Warn where what the verb reads in an object store, or the bucket that it writes to, is not there as far as this machine sees.

    Only warn: the cluster may go by another endpoint or other credentials, and reach what this machine does not.

    Raises
    ------
    ConfigError
        A URI is of a kind that no machine understands.
    """
    try:
        for option, uris in command.inputs.items():
            for uri in uris:
                if what := _missing(option, locate(uri)):
                    say(f"warning: {what}, as seen from this machine")
        if command.out is not None and not (out := locate(command.out)).bucket_may_exist():
            say(f"warning: --out {out}: there is no such bucket, as seen from this machine")
    except (MissingPackageError, OSError, StorageError) as error:
        say(f"not looked at from here: {error}")


def _missing(option: str, where: Location) -> str | None:
    manifest, read = _MANIFEST_OF_INPUT.get(option, ("", None))
    if (where / manifest).exists():
        return None
    if read is not None:
        try:
            read(where)
        except UsageError as error:  # as the verb would say it
            return str(error)
    return f"{option} {where}: {where.why_nothing('nothing is there')}"


@contextmanager
def upload_folder(files: dict[str, bytes]) -> Iterator[Path]:
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
        for inside, content in files.items():
            (folder / inside).parent.mkdir(exist_ok=True)
            (folder / inside).write_bytes(content)
        sizes = sorted(((path.stat().st_size, str(path.relative_to(folder))) for path in folder.rglob("*") if path.is_file()), reverse=True)
        total = sum(size for size, _ in sizes)
        if total > LARGEST_UPLOAD_BYTES:
            largest = ", ".join(f"{path} ({size / 2**20:.1f} MiB)" for size, path in sizes[:_NAMED])
            raise UsageError(f"the upload has {total / 2**20:.1f} MiB, allowed are {LARGEST_UPLOAD_BYTES / 2**20:.0f}; the largest: {largest}")
        yield folder


def manifest_exists(command: Command) -> bool | None:
    """Return whether what the verb writes last is there; None where there is no such thing, or it cannot be looked at from here, which is told."""
    name = MANIFESTS.get(command.verb)
    if name is None or command.out is None:
        return None
    try:
        out = locate(command.out)
        if not out.is_local or out.exists():
            return (out / name).exists()
        say(f"{command.out}: not on this machine, so not looked at from here")
    except (OSError, StorageError, UsageError) as error:
        say(f"{command.out}: cannot be looked at from here ({error})")
    return None
