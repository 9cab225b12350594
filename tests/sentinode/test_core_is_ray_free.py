"""The core can be imported and tested without Ray, and importing it does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sentinode

MODULES = sorted(Path(sentinode.__file__).parent.glob("*.py"))
OTHER_ROOMS = {"ray", "ray_jobs", "serve", "data_prep", "tests"}


def imported_by(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_module_of_the_core_imports_another_room(path: Path) -> None:
    assert not imported_by(path) & OTHER_ROOMS


def test_importing_the_core_loads_no_ray_writes_nothing_and_leaves_logging_alone(tmp_path: Path) -> None:
    code = (
        "import importlib, logging, sys\n"
        f"for name in {[path.stem for path in MODULES if path.stem != '__init__']!r}:\n"
        "    importlib.import_module('sentinode.' + name)\n"
        "assert 'ray' not in sys.modules\n"
        "assert logging.getLogger().handlers == [] and logging.getLogger().level == logging.WARNING\n"
    )
    home = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(MODULES[0].parent.parent)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=home, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert list(tmp_path.iterdir()) == []
