"""Which engine runs a bundle: one rule, and nothing that is damaged or foreign is used, or skipped without a word."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sentinode.bundle import Bundle
from sentinode.engines import ENGINES, choose_engine
from sentinode.errors import ManifestError, UsageError
from sentinode.manifests import EngineManifest
from sentinode.storage import write_json
from sentinode.verify import verify_folder
from tests.factories import make_bundle


def add_engine(bundle: Bundle, name: str, times_as_fast: float = 2.0, torch_rate: float = 100.0) -> Path:
    """An engine whose manifest is right and whose files are no network: enough for choosing."""
    folder = bundle.path / "engines" / name
    folder.mkdir(parents=True)
    for file in ENGINES[name].files:
        (folder / file).write_bytes(file.encode())
    manifest = EngineManifest(
        format_version=1,
        created_at="2026-01-01T00:00:00+00:00",
        engine=name,
        bundle_digest=bundle.manifest.digest,
        files={file: hashlib.sha256(file.encode()).hexdigest() for file in ENGINES[name].files},
        data_fingerprint="0" * 64,
        validation_rows=10,
        largest_deviation=1e-6,
        roc_auc=0.9,
        torch_roc_auc=0.9,
        calibration_rows=0,
        device="cpu",
        device_name="a processor",
        threads=1,
        batch_size=16,
        images_per_second=times_as_fast * torch_rate,
        torch_images_per_second=torch_rate,
        library_versions={},
        git_commit=None,
    )
    write_json(folder / "engine.json", manifest.model_dump(mode="json"))
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("speeds", "device", "expected"),
    [
        ({}, "cpu", "torch"),
        ({"onnxruntime": 2.0}, "cpu", "onnxruntime"),
        ({"onnxruntime": 2.0, "openvino": 3.0}, "cpu", "openvino"),
        ({"onnxruntime": 3.0, "openvino": 2.0}, "cpu", "onnxruntime"),
        ({"onnxruntime": 0.9, "openvino": 0.5}, "cpu", "torch"),
        ({"onnxruntime": 1.0}, "cpu", "torch"),
        ({"onnxruntime-int8": 9.0}, "cpu", "torch"),
        ({"onnxruntime-int8": 9.0, "onnxruntime": 1.1}, "cpu", "onnxruntime"),
        ({"onnxruntime": 2.0, "openvino": 3.0}, "cuda", "torch"),
    ],
)
def test_auto_is_the_fastest_exact_engine_for_the_device(bundle: Bundle, speeds: dict[str, float], device: str, expected: str) -> None:
    for name, times_as_fast in speeds.items():
        add_engine(bundle, name, times_as_fast)
    assert choose_engine(bundle, "auto", device) == expected
    assert choose_engine(bundle, "torch", device) == "torch"


def test_exports_of_different_machines_are_compared_by_what_torch_did_there(bundle: Bundle) -> None:
    add_engine(bundle, "onnxruntime", times_as_fast=2.0, torch_rate=10)
    add_engine(bundle, "openvino", times_as_fast=1.5, torch_rate=1000)
    assert choose_engine(bundle, "auto", "cpu") == "onnxruntime"


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_asked_for_by_name_is_taken_or_refused(bundle: Bundle, name: str) -> None:
    with pytest.raises(UsageError, match=f"no engine {name} in it; `sentinode export --engine {name}` adds it"):
        choose_engine(bundle, name, "cpu")
    add_engine(bundle, name, times_as_fast=0.1)
    assert choose_engine(bundle, name, "cpu") == name
    with pytest.raises(UsageError, match=f"engine {name} runs on cpu, not on cuda"):
        choose_engine(bundle, name, "cuda")


def test_without_its_library_an_engine_is_refused_by_name_and_passed_over_by_auto(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    add_engine(bundle, "openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match=r"openvino is not installed; pip install 'sentinode\[openvino\]'"):
        choose_engine(bundle, "openvino", "cpu")
    assert choose_engine(bundle, "auto", "cpu") == "torch"


def _edit(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "engine.json").read_text())
        write_json(folder / "engine.json", content | changes)

    return edit


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "model.bin").write_bytes(b"other"), "engines/openvino/model.bin: sha256 differs from engine.json"),
        (lambda folder: (folder / "model.xml").unlink(), "engines/openvino/model.xml: missing"),
        (lambda folder: (folder / "engine.json").unlink(), "not a whole engine"),
        (lambda folder: (folder / "engine.json").write_text("{"), "cannot be read as JSON"),
        (_edit(bundle_digest="1" * 64), "made for another bundle (digest 111111111111"),
        (_edit(engine="onnxruntime"), "engine.json is of an engine onnxruntime"),
        (_edit(largest_deviation=2e-3), "deviate by up to 0.002, more than 0.001"),
        (_edit(files={"../../bundle.json": "0" * 64}), "engine.json lists ../../bundle.json; expected model.xml, model.bin"),
        (_edit(format_version=2), "format version 2 is newer than 1"),
        (_edit(surprise=1), "surprise: "),
    ],
)
def test_a_damaged_or_foreign_engine_is_refused_by_name_and_by_auto(bundle: Bundle, damage: Callable[[Path], object], expected: str) -> None:
    folder = add_engine(bundle, "openvino")
    assert verify_folder(bundle.path) == ("model bundle", [])
    damage(folder)
    for engine in ("openvino", "auto"):
        with pytest.raises(ManifestError) as caught:
            choose_engine(bundle, engine, "cpu")
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
    (problem,) = verify_folder(bundle.path)[1]
    assert expected in problem
    assert choose_engine(bundle, "torch", "cpu") == "torch"


def test_nothing_is_written_home_or_sent_by_the_libraries_of_engines_and_explanations(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from sentinode.engines import ENGINES, library_of\n"
        "from sentinode.explain import overlay\n"
        "import numpy as np\n"
        "libraries = [library_of(engine) for engine in ENGINES]\n"
        "import onnxruntime.quantization\n"
        "libraries[1].Core()\n"
        "overlay(np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), np.float32))\n"
        "assert sys.modules['openvino_telemetry'] is None\n"
        "assert 'matplotlib' in sys.modules\n"
    )
    keep = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment = keep | {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert list(tmp_path.rglob("*")) == []
