"""Engines made from a real network, compared with torch, and used by evaluate and predict."""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from ray_jobs import export as verb
from ray_jobs.cli import main
from ray_jobs.evaluate import evaluate
from ray_jobs.export import DeviationError, export
from ray_jobs.predict import predict
from sentinode import engine_export
from sentinode.bundle import Bundle
from sentinode.config import EvaluateConfig, ExportConfig, PredictConfig
from sentinode.dataset import PreparedDataset
from sentinode.engines import ENGINES, EngineKind, Run
from sentinode.errors import UsageError
from sentinode.manifests import read_engine_manifest
from sentinode.predictor import Predictor
from sentinode.probability import calibrated_probability
from sentinode.storage import write_json
from sentinode.verify import verify_folder
from tests.factories import make_bundle, random_patches

QUICK = ExportConfig(timing_rounds=1, timing_batch_size=2, calibration_rows=16)
EXACT = [name for name, kind in ENGINES.items() if kind.is_exact]


def bundle_of(out: Path, dataset: PreparedDataset, fold: int | None = None) -> Bundle:
    """A bundle that says that it was trained on the data set."""
    made = make_bundle(out)
    data = made.manifest.data.model_copy(update={"fingerprint": dataset.manifest.fingerprint, "fold": fold})
    write_json(out / "bundle.json", made.manifest.model_copy(update={"data": data}).model_dump(mode="json"))
    return Bundle.open(out)


@pytest.fixture(scope="module", autouse=True)
def one_trace() -> "pytest.MonkeyPatch":  # type: ignore[misc]
    """All bundles here hold the same network, and tracing it takes seconds."""
    real, traced = engine_export.onnx_bytes, []

    def once(model: torch.nn.Module, input_size_px: int) -> bytes:
        if not traced:
            traced.append(real(model, input_size_px))
        return traced[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_export, "onnx_bytes", once)
        # Random weights quantise worse than trained ones; what is tested is that there is a limit.
        patch.setitem(ENGINES, "onnxruntime-int8", dataclasses.replace(ENGINES["onnxruntime-int8"], limit=0.1))
        yield patch


@pytest.fixture(scope="module")
def bundle(dataset: PreparedDataset, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With every engine in it."""
    made = bundle_of(tmp_path_factory.mktemp("engines") / "bundle", dataset)
    before = (made.path / "bundle.json").read_bytes()
    for name in ENGINES:
        export(QUICK, made.path, dataset.path, name)
    assert (made.path / "bundle.json").read_bytes() == before
    return made


@pytest.mark.parametrize("name", ENGINES)
def test_an_export_says_what_was_measured(bundle: Bundle, dataset: PreparedDataset, name: str) -> None:
    manifest = read_engine_manifest(bundle.path / "engines" / name)
    assert manifest.bundle_digest == bundle.manifest.digest
    assert manifest.data_fingerprint == dataset.manifest.fingerprint
    assert manifest.validation_rows == 41
    assert manifest.calibration_rows == (0 if ENGINES[name].is_exact else 16)
    assert 0 < manifest.largest_deviation <= (1e-5 if ENGINES[name].is_exact else 0.1)
    assert manifest.torch_roc_auc is not None
    assert manifest.roc_auc == pytest.approx(manifest.torch_roc_auc, abs=0.01 if ENGINES[name].is_exact else 0.2)
    assert min(manifest.images_per_second, manifest.torch_images_per_second) > 0
    assert ENGINES[name].library in manifest.library_versions
    assert {path.name for path in (bundle.path / "engines" / name).iterdir()} == {"engine.json", *ENGINES[name].files}


def test_exports_leave_a_whole_bundle_and_nothing_else(bundle: Bundle) -> None:
    assert verify_folder(bundle.path) == ("model bundle", [])
    assert {path.name for path in (bundle.path / "engines").iterdir()} == set(ENGINES)


@pytest.mark.parametrize("name", EXACT)
def test_an_engine_says_what_torch_says_in_any_batch_and_view(bundle: Bundle, name: str) -> None:
    patches = random_patches(7)

    def probabilities(bundle: Bundle, engine: str, batch_size: int) -> np.ndarray:
        predictor = Predictor(bundle, engine=engine)
        assert predictor.engine == engine
        return calibrated_probability(predictor.logits(patches, batch_size), bundle.manifest.temperature, bundle.manifest.bias)

    expected = probabilities(bundle, "torch", 7)
    assert expected.std() > 1e-3
    for batch_size in (1, 3, 7):
        np.testing.assert_allclose(probabilities(bundle, name, batch_size), expected, rtol=0, atol=1e-5)
    views = Bundle(bundle.path, bundle.manifest.model_copy(update={"tta": 8}), bundle.where)
    np.testing.assert_allclose(probabilities(views, name, 3), probabilities(views, "torch", 7), rtol=0, atol=1e-5)
    assert Predictor(bundle, engine=name).logits(patches[:0]).shape == (0,)


def test_int8_is_used_when_asked_for_and_not_by_auto(bundle: Bundle) -> None:
    patches = random_patches(4)
    asked = Predictor(bundle, engine="onnxruntime-int8")
    assert asked.engine == "onnxruntime-int8"
    assert 0 < np.abs(asked.logits(patches) - Predictor(bundle, engine="torch").logits(patches)).max() < 1
    assert Predictor(bundle).engine != "onnxruntime-int8"


def test_an_engine_explains_with_the_torch_network(bundle: Bundle) -> None:
    patches = random_patches(1)
    maps = [Predictor(bundle, engine=name).explainer().maps(patches) for name in ("torch", "onnxruntime")]
    np.testing.assert_array_equal(*maps)


def _shifted(real: Callable[..., Run], by: float) -> Callable[..., Run]:
    def engine_run(*args: object) -> Run:
        run = real(*args)
        return lambda inputs: run(inputs) * torch.tensor([1.0, 1.0 + by])

    return engine_run


@pytest.mark.parametrize("by", [0.5, float("nan")], ids=["wrong", "not a number"])
def test_an_engine_that_deviates_is_refused_and_the_older_one_stays(
    bundle: Bundle, dataset: PreparedDataset, by: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (bundle.path / "engines" / "onnxruntime" / "engine.json").read_bytes()
    monkeypatch.setattr(verb, "engine_run", _shifted(verb.engine_run, by))
    with pytest.raises(DeviationError, match=r"on 41 validation rows, more than 0\.001; nothing was published"):
        export(QUICK, bundle.path, dataset.path, "onnxruntime")
    assert main(["export", "--bundle", str(bundle.path), "--data", str(dataset.path), "--engine", "onnxruntime"]) == 1
    assert "nothing was published" in capsys.readouterr().err
    assert (bundle.path / "engines" / "onnxruntime" / "engine.json").read_bytes() == before
    assert {path.name for path in (bundle.path / "engines").iterdir()} == set(ENGINES)


def test_the_limit_of_int8_is_its_own(bundle: Bundle, dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "onnxruntime-int8", EngineKind("onnxruntime", "onnx", ("model.onnx",), limit=1e-9, is_exact=False))
    with pytest.raises(DeviationError, match="more than 1e-09"):
        export(QUICK, bundle.path, dataset.path, "onnxruntime-int8")


def test_the_rows_are_those_that_the_bundle_was_validated_on(dataset: PreparedDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    of_fold = bundle_of(tmp_path / "bundle", dataset, fold=1)
    rows = len(dataset.read_val(1))
    assert rows != 41
    assert export(QUICK, of_fold.path, dataset.path, "onnxruntime").manifest.validation_rows == rows
    assert "another data set" not in capsys.readouterr().out
    few = QUICK.model_copy(update={"validation_rows": 5})
    assert export(few, of_fold.path, dataset.path, "onnxruntime").manifest.validation_rows == 5
    stranger = make_bundle(tmp_path / "stranger")
    assert export(QUICK, stranger.path, dataset.path, "onnxruntime").manifest.validation_rows == 41
    assert "another data set" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_the_command_ends_with_a_line_for_people_and_one_for_programs(
    bundle: Bundle, dataset: PreparedDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["timing_rounds=1", "timing_batch_size=2", "calibration_rows=16"]
    where = ["--bundle", str(bundle.path), "--data", str(dataset.path), "--engine", "onnxruntime-int8"]
    assert main(["export", *where, "--set", *quick, "--json"]) == 0
    *_, told, last = capsys.readouterr().out.splitlines()
    assert "largest deviation" in told
    assert "before" in told
    answer = json.loads(last)
    assert answer["path"] == str(bundle.path / "engines" / "onnxruntime-int8")
    assert answer["engine"] == "onnxruntime-int8"


def test_what_cannot_be_exported_is_one_line(bundle: Bundle, dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="engine onnx: expected one of onnxruntime, openvino"):
        export(QUICK, bundle.path, dataset.path, "onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"onnxruntime is not installed; pip install 'sentinode\[onnx\]'"):
        export(QUICK, bundle.path, dataset.path, "onnxruntime")


@pytest.mark.slow
@pytest.mark.ray
def test_evaluate_and_predict_say_which_engine_worked(ray_session: None, bundle: Bundle, dataset: PreparedDataset, tmp_path: Path) -> None:
    for name in EXACT:
        file = bundle.path / "engines" / name / "engine.json"
        content = json.loads(file.read_text())
        write_json(file, content | {"images_per_second": 3.0 if name == "openvino" else 2.0, "torch_images_per_second": 1.0})
    run = functools.partial(predict, bundle=bundle.path, source=dataset.path)
    made = {engine: run(PredictConfig(engine=engine), out=tmp_path / engine) for engine in ("auto", "torch")}
    assert {asked: result.manifest.model["engine"] for asked, result in made.items()} == {"auto": "openvino", "torch": "torch"}
    tables = [pq.read_table(result.path).sort_by("id") for result in made.values()]
    np.testing.assert_allclose(tables[0]["probability"].to_numpy(), tables[1]["probability"].to_numpy(), rtol=0, atol=1e-5)
    config = EvaluateConfig(robustness_rows=0, bootstrap_samples=100, error_examples=0)
    assert evaluate(config, bundle.path, dataset.path, tmp_path / "report").report.bundle["engine"] == "openvino"
    other = config.model_copy(update={"engine": "onnxruntime-int8"})
    assert evaluate(other, bundle.path, dataset.path, tmp_path / "report").report.bundle["engine"] == "onnxruntime-int8"
