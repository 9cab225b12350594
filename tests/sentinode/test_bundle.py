"""A bundle is what its digest says, or it is not opened."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open

from sentinode.bundle import Bundle, digest_of, write_bundle
from sentinode.config import ReviewRule, TrainConfig
from sentinode.errors import ManifestError, ManifestNotFoundError, UsageError
from sentinode.manifests import ReferenceStatistics, ThresholdRule
from sentinode.model import build_model, state_for_storage
from sentinode.storage import sha256_file, staging_path, write_json
from tests.factories import dataset_manifest, make_bundle


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("original") / "bundle")


@pytest.fixture
def folder(original: Bundle, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(original.path, tmp_path / "bundle")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return state_for_storage(build_model("resnet18"))


def write(out: Path, weights: dict[str, torch.Tensor], **changes: Any) -> Bundle:
    fields: dict[str, Any] = {
        "config": TrainConfig(arch="resnet18", weights="none", unfreeze_depth=5, input_size_px=32),
        "dataset": dataset_manifest(),
        "temperature": 1.3,
        "bias": -0.1,
        "threshold": 0.4,
        "threshold_rule": ThresholdRule(target_recall=0.95, bound=0.9, reached=False),
        "metrics": {"roc_auc": 0.5, "precision": None},
        "reference": ReferenceStatistics(
            channel_mean=(0.7, 0.5, 0.7), channel_std=(0.2, 0.3, 0.2), positive_rate=0.4, review_rate=0.9, probability_deciles=[0.5] * 9
        ),
    }
    return write_bundle(out, weights, **fields | changes)


def change(folder: Path, edit: Callable[[dict[str, Any]], object], *, sign: bool = False) -> None:
    """Edit bundle.json; with `sign` also make its digest right again."""
    content = json.loads((folder / "bundle.json").read_text())
    edit(content)
    if sign:
        content["digest"] = digest_of(content)
    write_json(folder / "bundle.json", content)


def refusal(folder: Path) -> str:
    with pytest.raises(ManifestError) as caught:
        Bundle.open(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_what_is_opened(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    written = write(tmp_path / "b", weights, name="n", version="7", licence="CC0-1.0")
    opened = Bundle.open(tmp_path / "b")
    assert opened == written
    assert opened.verify() == []
    manifest = opened.manifest
    assert (manifest.name, manifest.version, manifest.licence, manifest.arch) == ("n", "7", "CC0-1.0", "resnet18")
    assert (manifest.temperature, manifest.bias, manifest.threshold) == (1.3, -0.1, 0.4)
    assert (manifest.patch_size_px, manifest.input_size_px, manifest.spacing_um_px) == (96, 32, 0.972)
    assert manifest.metrics == {"roc_auc": 0.5, "precision": None}
    assert sorted(path.name for path in opened.path.iterdir()) == ["bundle.json", "model.safetensors", "model_card.md"]
    read = opened.read_weights()
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name]) for name in weights)


def test_the_weights_have_nothing_but_tensors_in_their_header(original: Bundle) -> None:
    with safe_open(original.path / "model.safetensors", framework="pt") as file:
        assert file.metadata() is None


def test_the_card_is_for_people_and_carries_the_notice(original: Bundle) -> None:
    card = (original.path / "model_card.md").read_text()
    assert "Research use only. Not a medical device; no output is a diagnosis." in card
    assert original.manifest.digest in card
    assert "NOT reached" in card
    assert "share pixels" in card


def test_the_card_of_a_leaky_data_set_says_so(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    bundle = write(tmp_path / "b", weights, dataset=dataset_manifest(leak_level="none"))
    assert "LEAKY" in (bundle.path / "model_card.md").read_text()


def test_the_same_weights_and_fields_give_the_same_digest_and_bytes(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    one, other = write(tmp_path / "one", weights), write(tmp_path / "two" / "other", dict(weights))
    assert one.manifest.digest == other.manifest.digest
    assert (one.path / "model.safetensors").read_bytes() == (other.path / "model.safetensors").read_bytes()


def test_what_does_not_decide_a_prediction_does_not_change_the_digest(
    tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = write(tmp_path / "one", weights)
    monkeypatch.setattr("sentinode.bundle.git_commit", lambda: "0" * 40)
    monkeypatch.setattr("sentinode.bundle.library_versions", dict)
    other = write(
        tmp_path / "two",
        weights,
        name="another",
        version="9",
        licence="none",
        metrics={},
        dataset=dataset_manifest(fingerprint="1" * 64, leak_level="none"),
        config=TrainConfig(arch="resnet18", weights="none", unfreeze_depth=2, input_size_px=32, epochs=3, seed=5),
        threshold_rule=ThresholdRule(target_recall=0.5, bound=0.6, reached=True),
    )
    change(other.path, lambda content: content.update(created_at="1999-01-01T00:00:00+00:00"))
    assert Bundle.open(other.path).manifest.digest == one.manifest.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.31},
        {"bias": 0.0},
        {"threshold": 0.41},
        {"dataset": dataset_manifest(patch_size_px=64)},
        {"config": TrainConfig(arch="resnet18", weights="none", input_size_px=64)},
        {"config": TrainConfig(arch="resnet18", weights="none", input_size_px=32, std=(0.2, 0.2, 0.2))},
        {"config": TrainConfig(arch="resnet18", weights="none", input_size_px=32, review=ReviewRule(below=0.9))},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_decides_a_prediction_changes_the_digest(tmp_path: Path, weights: dict[str, torch.Tensor], original: Bundle, changes: Any) -> None:
    assert write(tmp_path / "b", weights, **changes).manifest.digest != original.manifest.digest


def test_other_weights_change_the_digest(tmp_path: Path, weights: dict[str, torch.Tensor], original: Bundle) -> None:
    nudged = weights | {"fc.bias": weights["fc.bias"] + 1e-6}
    assert write(tmp_path / "b", nudged).manifest.digest != original.manifest.digest


@pytest.mark.parametrize("fields", [{"temperature": 1, "bias": 0, "threshold": 1}, {"temperature": np.float64(1.5), "threshold": np.float64(0.25)}])
def test_whole_and_numpy_numbers_are_written_as_they_will_be_read(tmp_path: Path, weights: dict[str, torch.Tensor], fields: Any) -> None:
    write(tmp_path / "b", weights, **fields)
    manifest = Bundle.open(tmp_path / "b").manifest
    assert (manifest.temperature, manifest.threshold) == (fields["temperature"], fields["threshold"])


def test_a_folder_that_is_no_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestNotFoundError, match="not a model bundle: "):
        Bundle.open(tmp_path)


def test_tampered_weights_are_refused(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert refusal(folder) == f"{folder}: model.safetensors: sha256 differs from bundle.json"


def test_weights_that_were_swapped_after_opening_are_not_read(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    bundle = Bundle.open(folder)
    write(folder, weights | {"fc.bias": weights["fc.bias"] + 1})
    with pytest.raises(ManifestError, match=r"model\.safetensors: sha256 differs"):
        bundle.read_weights()


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content.update(threshold=0.1),
        lambda content: content.update(temperature=2.0),
        lambda content: content.update(bias=1.0),
        lambda content: content.update(arch="resnet34"),
        lambda content: content.update(mean=[0, 0, 0]),
        lambda content: content["review"].update(below=0.5),
        lambda content: content.update(digest="0" * 64),
    ],
)
def test_a_tampered_field_that_decides_predictions_is_refused(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    change(folder, edit)
    assert refusal(folder) == f"{folder}: bundle.json: digest does not match its fields"


def test_swapped_weights_with_their_checksum_are_refused_too(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"other")
    change(folder, lambda content: content["files"].update({"model.safetensors": hashlib.sha256(b"other").hexdigest()}))
    assert refusal(folder) == f"{folder}: bundle.json: digest does not match its fields"


def test_weights_that_are_no_tensors_are_one_line_even_when_signed(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"other")
    change(folder, lambda content: content["files"].update({"model.safetensors": hashlib.sha256(b"other").hexdigest()}), sign=True)
    with pytest.raises(ManifestError, match=r"model\.safetensors: no safetensors file"):
        Bundle.open(folder).read_weights()


@pytest.mark.parametrize("name", ["model.safetensors", "model_card.md"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert refusal(folder) == f"{folder}: {name}: missing"


def test_weights_that_are_not_listed_are_not_used(folder: Path) -> None:
    change(folder, lambda content: content["files"].pop("model.safetensors"))
    assert refusal(folder) == f"{folder}: bundle.json lists no model.safetensors"


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "engines/../../secret", "engines/x"])
def test_files_outside_the_bundle_are_refused_unread(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("s")
    sha256 = sha256_file(folder.parent / "secret")
    change(folder, lambda content: content["files"].update({name: sha256}))
    assert refusal(folder) == f"{folder}: {name}: not a plain file name"


def test_a_newer_format_is_refused(folder: Path) -> None:
    change(folder, lambda content: content.update(format_version=2))
    assert "format version 2 is newer than 1, the newest this program reads; upgrade sentinode" in refusal(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda content: content.update(class_names=["Metastatic", "Normal"]),
            "class_names Metastatic, Normal; this program knows Normal, Metastatic",
        ),
        (lambda content: content.update(members=["0" * 64]), "bundle.json lists both members and model.safetensors"),
        (lambda content: content.update(tta=2), "tta: "),
        (lambda content: content.update(channel_order="BGR"), "channel_order: "),
        (lambda content: content.update(temperature=0), "temperature: "),
        (lambda content: content.update(threshold=1.5), "threshold: "),
        (lambda content: content.update(surprise=1), "surprise: "),
    ],
)
def test_what_this_program_would_ignore_is_refused_even_when_signed(folder: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    change(folder, edit, sign=True)
    assert message in refusal(folder)


def test_every_problem_is_listed(folder: Path) -> None:
    bundle = Bundle.open(folder)
    (folder / "model_card.md").write_text("other")
    (folder / "model.safetensors").unlink()
    assert sorted(bundle.verify()) == ["model.safetensors: missing", "model_card.md: sha256 differs from bundle.json"]


def test_an_older_bundle_is_replaced_and_rests_of_a_crash_are_cleared(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    (staging_path(folder) / "deep").mkdir(parents=True)
    (staging_path(folder) / "deep" / "rest").write_text("x")
    (folder / "extra").write_text("x")
    write(folder, weights, threshold=0.7)
    assert Bundle.open(folder).manifest.threshold == 0.7
    assert not (folder / "extra").exists()
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("photos", "file"):
        with pytest.raises(UsageError, match=f"{name} exists and is not a model bundle"):
            write(tmp_path / name, weights)
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "photos"]


def test_a_failed_write_leaves_the_old_bundle(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    before = Bundle.open(folder)
    with pytest.raises(ValidationError, match="threshold"):
        write(folder, weights, threshold=1.5)
    assert Bundle.open(folder) == before


def test_a_metric_that_is_not_a_number_is_null(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    bundle = write(tmp_path / "b", weights, metrics={"f1": float("nan"), "nested": [float("inf")]})
    assert "NaN" not in (bundle.path / "bundle.json").read_text()
    assert Bundle.open(bundle.path).manifest.metrics == {"f1": None, "nested": [None]}


def test_the_card_tells_how_the_network_was_trained_and_what_a_missed_target_means(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    card = (write(tmp_path / "bundle", weights).path / "model_card.md").read_text()
    assert "weights none" in card
    assert "the largest whose validation recall itself is at least 0.95" in card


def test_the_card_shows_figures_with_intervals_and_what_they_mean_elsewhere(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    value = {"value": 0.0612, "patch_interval": {"low": 0.05, "high": 0.07}, "group_interval": {"low": 0.0414, "high": 0.0815}}
    metrics = {
        "rows": 750,
        "groups": 700,
        "roc_auc": 0.9352,
        "recall": 0.95,
        "specificity": None,
        "group_intervals": {"roc_auc": [0.9119, 0.9542], "recall": [0.9, 1.0], "specificity": [None, None]},
        "at_prevalences": [{"prevalence": 0.01, "ppv": value, "npv": value | {"value": 0.9991}}],
    }
    card = (write(tmp_path / "bundle", weights, metrics=metrics).path / "model_card.md").read_text()
    assert "| ROC-AUC | 0.9352 | 0.9119 to 0.9542 |" in card
    assert "| specificity at the threshold | not defined | not defined |" in card
    assert "| 1 % | 0.0612 (0.0414 to 0.0815) | 0.9991 (0.0414 to 0.0815) |" in card
    for section in ("Intended use", "Prevalence", "Limits", "licence"):
        assert section in card
