"""The rooms of the project: who may import whom, and that importing does nothing."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("data_prep", "ray_jobs", "tune_configs", "serve", "sentinode", "deploy", "benchmarks", "docs", "tests")

# A room may import itself and these.
ALLOWED = {
    "sentinode": frozenset[str](),
    "data_prep": frozenset({"sentinode"}),
    "ray_jobs": frozenset({"sentinode", "data_prep"}),
    "serve": frozenset({"sentinode"}),
}
# The core can be used and tested without Ray.
WITHOUT_RAY = {"sentinode"}
# May import any room, inside functions.
COMMAND_LINE = "ray_jobs/cli.py"

SOURCES = sorted(path.relative_to(ROOT).as_posix() for room in ALLOWED for path in (ROOT / room).rglob("*.py"))
MODULES = [source.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for source in SOURCES]


@dataclass(frozen=True)
class Imported:
    """One import: the top-level name, its line, and whether it happens only when a function is called."""

    name: str
    line: int
    lazy: bool


def imports_of(source: str, room: str) -> Iterator[Imported]:
    """Yield every import of a module: statements at any depth, and `import_module` with a name that is written out (at least its beginning)."""

    def walk(node: ast.AST, lazy: bool) -> Iterator[Imported]:
        for child in ast.iter_child_nodes(node):
            names: list[str] = []
            match child:
                case ast.Import(names=aliases):
                    names = [alias.name for alias in aliases]
                case ast.ImportFrom(module=module, level=level):
                    names = [room if level else str(module)]
                case ast.Call(func=ast.Name(id=function) | ast.Attribute(attr=function), args=[first, *_]) if function in {
                    "import_module",
                    "__import__",
                }:
                    names = [beginning] if (beginning := _beginning(first)) else []
            yield from (Imported(name.partition(".")[0], child.lineno, lazy) for name in names if isinstance(child, ast.stmt | ast.expr))
            yield from walk(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    return walk(ast.parse(source), False)


def _beginning(expression: ast.expr) -> str | None:
    """The text that a string expression begins with."""
    if isinstance(expression, ast.JoinedStr) and expression.values:
        expression = expression.values[0]
    return expression.value if isinstance(expression, ast.Constant) and isinstance(expression.value, str) else None


def forbidden_imports(path: str, source: str) -> list[str]:
    """Return what a module of a room imports against the rules, one line each. `path`: relative to the project."""
    room = path.partition("/")[0]
    found = []
    for imported in imports_of(source, room):
        is_other_room = imported.name in ALLOWED and imported.name != room and imported.name not in ALLOWED[room]
        if path == COMMAND_LINE and imported.lazy:
            is_other_room = False
        if is_other_room or (room in WITHOUT_RAY and imported.name == "ray"):
            found.append(f"{path}:{imported.line} imports {imported.name}")
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_room_exists(folder: str) -> None:
    assert any((ROOT / folder).iterdir())


@pytest.mark.parametrize("path", SOURCES)
def test_imports_between_rooms_go_one_way(path: str) -> None:
    assert forbidden_imports(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("sentinode/a.py", "import ray.data"),
        ("sentinode/a.py", "def f():\n    from ray import serve"),
        ("sentinode/a.py", "from data_prep.tasks import x"),
        ("data_prep/a.py", "import ray_jobs.train as t"),
        ("data_prep/a.py", "if TYPE_CHECKING:\n    from serve.app import build_app"),
        ("ray_jobs/a.py", "def f():\n    import serve.app"),
        ("ray_jobs/cli.py", "import serve.app"),
        ("ray_jobs/cli.py", "try:\n    from serve import app\nexcept ImportError:\n    pass"),
        ("ray_jobs/a.py", "import_module('serve.app')"),
        ("serve/a.py", "importlib.import_module(f'ray_jobs.{verb}')"),
        ("serve/a.py", "class A:\n    async def f(self):\n        import data_prep"),
    ],
)
def test_a_wrong_import_would_be_found(path: str, source: str) -> None:
    assert len(forbidden_imports(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("sentinode/a.py", "import torch\nfrom sentinode import errors\nfrom . import bundle\nimport rayon"),
        ("data_prep/a.py", "import ray\nfrom sentinode.config import PrepareConfig"),
        ("ray_jobs/a.py", "from data_prep.prepare import prepare\nfrom ray import serve"),
        ("ray_jobs/cli.py", "def f():\n    from serve.app import build_app"),
        ("serve/a.py", "from ray import serve\nfrom serve.app import build_app\nimport sentinode.bundle"),
    ],
)
def test_a_right_import_passes(path: str, source: str) -> None:
    assert forbidden_imports(path, source) == []


_IMPORT_ALL = """
import json, logging, os, socket, sys

attempts = []

def refuse(*args, **kwargs):
    attempts.append(repr(args[-1:]))
    raise OSError("no network while importing")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse

import importlib, threading

handlers, level, folder = list(logging.root.handlers), logging.root.level, os.getcwd()
errors, with_ray = {}, []
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except BaseException as error:
        errors[module] = f"{type(error).__name__}: {error}"
    if "ray" in sys.modules:
        with_ray.append(module)

import ray

print(json.dumps({
    "errors": errors,
    "with_ray": with_ray,
    "ray_started": ray.is_initialized(),
    "network": attempts,
    "handlers_added": [repr(handler) for handler in logging.root.handlers if handler not in handlers],
    "level_changed": logging.root.level != level,
    "folder_changed": os.getcwd() != folder,
    "threads": [thread.name for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()],
}))
"""


@pytest.fixture(scope="module")
def after_import(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh process reports after importing every module of every room, the core first, in an empty folder with an empty home."""
    work, home, temporary = (tmp_path_factory.mktemp(name) for name in ("work", "home", "tmp"))
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    core_first = sorted(MODULES, key=lambda module: (module.partition(".")[0] not in WITHOUT_RAY, module))
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL, *core_first], cwd=work, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    report["printed"] = done.stdout.splitlines()[:-1]
    # torch makes its own folder for compiled kernels when torchvision is imported.
    files = (path for folder in (work, home, temporary) for path in folder.rglob("*"))
    report["files"] = [str(path) for path in files if not path.is_relative_to(temporary) or not path.name.startswith("torchinductor_")]
    return report


def test_every_module_can_be_imported(after_import: dict[str, Any]) -> None:
    assert after_import["errors"] == {}


def test_importing_starts_no_ray(after_import: dict[str, Any]) -> None:
    assert after_import["ray_started"] is False


def test_importing_the_core_does_not_even_load_ray(after_import: dict[str, Any]) -> None:
    assert [module for module in after_import["with_ray"] if module.partition(".")[0] in WITHOUT_RAY] == []


def test_importing_writes_no_files(after_import: dict[str, Any]) -> None:
    assert after_import["files"] == []


def test_importing_uses_no_network(after_import: dict[str, Any]) -> None:
    assert after_import["network"] == []


def test_importing_leaves_the_process_as_it_was(after_import: dict[str, Any]) -> None:
    assert after_import["handlers_added"] == []
    assert after_import["level_changed"] is False
    assert after_import["folder_changed"] is False
    assert after_import["threads"] == []
    assert after_import["printed"] == []
