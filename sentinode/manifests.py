"""The manifests as typed models. Their JSON Schemas lie in sentinode/schemas, made from these by `python -m sentinode.manifests`."""

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from sentinode.config import ReviewRule, Rgb
from sentinode.errors import ManifestError, ManifestNotFoundError
from sentinode.locations import Location, locate
from sentinode.storage import read_manifest_json

DATASET_FORMAT_VERSION = 2
"""2 added `root`, overlaps.parquet and the split `all`. Version 1 is still read."""
BUNDLE_FORMAT_VERSION = 1
REPORT_FORMAT_VERSION = 2
"""2 added metrics of scores, calibration, review, subgroups, robustness, curves and the comparison. Version 1 is no longer read."""
PREDICTIONS_FORMAT_VERSION = 1
ENGINE_FORMAT_VERSION = 1

LeakLevel = Literal["slide", "pixels", "none", "unsplit"]
CalibrationRowsKind = Literal["held_out", "out_of_fold", "unknown"]
CALIBRATION_MEANING: dict[CalibrationRowsKind, str] = {
    "held_out": "Calibration and threshold come from rows that no network in it was trained on.",
    "out_of_fold": (
        "No rows were kept from all members. Calibration and threshold come from rows that were judged only by the members not trained on them: by "
        "fewer networks than will judge, so that probabilities are rather too timid."
    ),
    "unknown": (
        "Calibration and threshold come from rows that a network in it may have been trained on: it began from weights, or was trained on a data "
        "set, whose rows are not known here."
    ),
}
LEAK_MEANING: dict[LeakLevel, str] = {
    "slide": "No slide has patches in more than one split.",
    "pixels": (
        "No two patches of different splits share pixels; patches of one slide may stand in several splits, and intervals assume unrelated slides."
    ),
    "none": (
        "LEAKY: nothing kept patches that share pixels, or lie side by side, out of different splits, so neighbours of test patches were trained on. "
        "Figures are too good and comparable only with others made so."
    ),
    "unsplit": "One split, nothing dealt: whether these patches are strangers to those that a model was trained on is not known here.",
}
"""What each leak level of a data set means for a reader of its figures."""
SplitMethod = Literal["overlap", "slide", "random", "predefined", "all"]
"""`all`: one split of that name, nothing dealt."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def is_inside(path: str) -> bool:
    """Tell whether a relative path, with "/", stays in the folder that it is relative to."""
    return not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts and "\0" not in path


def _folder_inside(path: str) -> str:
    if not is_inside(path):
        raise ValueError("must lie inside the folder of the manifest")
    return path


def _file_inside(path: str) -> str:
    if not PurePosixPath(path).parts:
        raise ValueError("must name a file")
    return _folder_inside(path)


def _split_name(name: str) -> str:
    # It stands in paths of shards, in messages and in reports.
    if not re.fullmatch("[A-Za-z0-9_-]+", name):
        raise ValueError("must be a name of letters, digits, _ and -")
    return name


FolderInside = Annotated[str, AfterValidator(_folder_inside)]
FileInside = Annotated[str, AfterValidator(_file_inside)]
SplitName = Annotated[str, AfterValidator(_split_name)]


class Manifest(BaseModel):
    """Base: immutable, no unknown keys, null instead of NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=())


ManifestT = TypeVar("ManifestT", bound=Manifest)


class FileRecord(Manifest):
    """A file inside the folder of the manifest."""

    path: FileInside
    bytes: int
    sha256: Sha256


class ShardRecord(FileRecord):
    """One Parquet shard of a prepared data set."""

    split: SplitName
    rows: int


class SplitCounts(Manifest):
    """What one split holds."""

    rows: int
    normal: int
    metastatic: int
    unlabelled: int = 0
    groups: int
    """Groups (slides, or patches connected by shared pixels; a patch alone is a group of one)."""


class SplitReport(Manifest):
    """How rows were dealt to the splits."""

    method: SplitMethod
    seed: int
    ratios: tuple[float, float, float]
    folds: int | None
    groups: int
    multi_patch_groups: int
    largest_group_rows: int
    overlap_pairs: int | None
    """Pairs of patches that share pixels, listed in overlaps.parquet; null where they were not searched for."""
    notes: list[str]
    """What a reader of any number made from this data set must know, e.g. a skewed split and its reason."""


class DatasetManifest(Manifest):
    """`dataset.json`: written last; a folder without it is not a prepared data set."""

    format_version: int
    created_at: str
    root: FolderInside = ""
    """Folder, relative to the manifest, that all paths below are relative to. Object stores, which cannot rename, get one per run."""
    source: dict[str, Any]
    """Kind, paths and `inputs_sha256`, a digest of the labels and of the listing of the images."""
    config: dict[str, Any]
    """The whole PrepareConfig."""
    counts: dict[SplitName, SplitCounts]
    """Split name -> counts."""
    class_weights: dict[str, float] | None
    """`{"normal": 1.0, "metastatic": N_negative / N_positive}` of the training split; null where a class is absent there."""
    channel_mean: Rgb
    """Of the training split, scale 0..1, RGB."""
    channel_std: Rgb
    patch_size_px: int
    dtype: Literal["uint8"]
    channel_order: Literal["RGB"]
    spacing_um_px: float | None
    split: SplitReport
    leak_level: LeakLevel
    rejected: dict[str, int]
    """Reason -> refused inputs."""
    shards: list[ShardRecord]
    files: list[FileRecord]
    """index.parquet, rejected.parquet, report.html, and overlaps.parquet where overlaps were searched for."""
    fingerprint: Sha256
    """SHA-256 over the lines `id,label,split,pixel_sha1` sorted by id; an unknown label is an empty field."""
    library_versions: dict[str, str]
    git_commit: str | None


class ThresholdRule(Manifest):
    """How the threshold was chosen on validation."""

    target_recall: float
    bound: float
    """Lower 95 % bound (one-sided) of validation recall at the threshold: the lower of group bootstrap and Clopper-Pearson."""
    reached: bool
    """Whether `bound` is at least `target_recall`; if not, the threshold is the largest whose point recall reaches it."""


class DataReference(Manifest):
    """The data set a model was trained on."""

    fingerprint: Sha256
    split_method: SplitMethod
    leak_level: LeakLevel
    fold: int | None
    notes: list[str]


class ReferenceStatistics(Manifest):
    """What validation looked like, for spotting inputs that do not."""

    channel_mean: Rgb
    channel_std: Rgb
    positive_rate: float
    """Share of validation patches at or above the threshold."""
    review_rate: float
    """Share of validation patches flagged for review."""
    probability_deciles: list[float]
    """The 9 deciles of calibrated validation probabilities."""
    patch_colour_low: Rgb | None = None
    """Mean colour of a patch per channel, 0..1, below which it is unlike those validated on (`sentinode.colour.colour_range`); null = not known."""
    patch_colour_high: Rgb | None = None
    """The same, above which."""


class BundleManifest(Manifest):
    """`bundle.json`: everything that evaluate, predict, export and serve need to know about a model."""

    format_version: int
    name: str
    version: str
    created_at: str
    licence: str
    arch: str
    class_names: tuple[str, str]
    patch_size_px: int
    """What it accepts."""
    input_size_px: int
    """What the network sees, after resizing."""
    spacing_um_px: float | None
    channel_order: Literal["RGB"]
    mean: Rgb
    std: Rgb
    temperature: Annotated[float, Field(gt=0)]
    """probability = sigmoid(logit / temperature + bias)."""
    bias: float
    threshold: Annotated[float, Field(ge=0, le=1)]
    """Metastatic when probability >= threshold."""
    threshold_rule: ThresholdRule
    review: ReviewRule
    tta: Literal[1, 4, 8]
    """Views averaged per patch; threshold and calibration belong to this setting."""
    training_config: dict[str, Any]
    data: DataReference
    metrics: dict[str, Any]
    """Statistics of predictions on validation; optimistic, since validation served several choices."""
    reference: ReferenceStatistics
    git_commit: str | None
    library_versions: dict[str, str]
    calibration_rows: CalibrationRowsKind = "held_out"
    """Whether a network in the bundle was trained on the rows that temperature, bias and threshold were fitted on (`CALIBRATION_MEANING`)."""
    members: list[Sha256]
    """Of an ensemble: the digests of its members, which lie in members/00, members/01 ... and keep their own temperature and bias. Its logit is the
    mean of theirs; `arch`, `input_size_px`, `mean` and `std` are the first one's, for people."""
    files: dict[str, Sha256]
    """File name -> SHA-256."""
    digest: Sha256
    """SHA-256 over the weights, or the members' digests, and every field that decides a prediction."""


class EngineManifest(Manifest):
    """`engines/<name>/engine.json` of a bundle: another way to run its network, and how far the answers are from torch's."""

    format_version: int
    created_at: str
    engine: str
    bundle_digest: Sha256
    """Of the bundle that it was made from, and is for."""
    files: dict[str, Sha256]
    """File name -> SHA-256."""
    data_fingerprint: Sha256
    """Of the data set whose validation rows it was compared with torch on."""
    validation_rows: int
    largest_deviation: Annotated[float, Field(ge=0, le=1)]
    """Largest |probability - torch's probability| of these rows; calibrated probabilities, with the bundle's `tta`."""
    roc_auc: float | None
    """On these rows; null where they have one class only."""
    torch_roc_auc: float | None
    calibration_rows: int
    """Training rows that the ranges of an int8 engine were taken from; else 0."""
    device: Literal["cpu"]
    """What it runs on."""
    device_name: str
    """Where the two rates were measured, in turns, from pixels to logits."""
    threads: int
    batch_size: int
    """Patches per step."""
    images_per_second: Annotated[float, Field(gt=0)]
    torch_images_per_second: Annotated[float, Field(gt=0)]
    library_versions: dict[str, str]
    git_commit: str | None


class Interval(Manifest):
    """A two-sided 95 % interval; null bounds where it cannot be computed."""

    low: float | None
    high: float | None


class MetricValue(Manifest):
    """One metric with both intervals. The patch-wise one treats patches as independent, which they are not, so it is too narrow."""

    value: float | None
    patch_interval: Interval
    group_interval: Interval


class Confusion(Manifest):
    """Counts; positive = Metastatic."""

    tn: int
    fp: int
    fn: int
    tp: int


class PredictiveValues(Manifest):
    """What recall and specificity would mean elsewhere."""

    prevalence: float
    """Share of metastatic patches, 0..1."""
    ppv: MetricValue
    npv: MetricValue


class OperatingPoint(Manifest):
    """Metrics at one threshold."""

    threshold: float
    confusion: Confusion
    accuracy: MetricValue
    balanced_accuracy: MetricValue
    precision: MetricValue
    recall: MetricValue
    specificity: MetricValue
    npv: MetricValue
    f1: MetricValue
    mcc: MetricValue
    fnr: MetricValue
    fpr: MetricValue
    at_prevalences: list[PredictiveValues]


class ReliabilityBin(Manifest):
    """Rows of neighbouring probability."""

    rows: int
    mean_probability: float
    share_metastatic: float
    interval: Interval
    """Wilson's, of the share."""


class CalibrationState(Manifest):
    """How far probabilities mean what they say."""

    brier: float
    nll: float
    ece: float
    """Expected calibration error over `bins`, 0..1."""
    bins: list[ReliabilityBin]
    """Of equal numbers of rows, by rising probability."""


class Calibration(Manifest):
    """Of the evaluated rows, without and with the bundle's temperature and bias."""

    temperature: float
    bias: float
    before: CalibrationState
    after: CalibrationState


class CoveragePoint(Manifest):
    """The surest part of the rows."""

    coverage: float
    """Share of all rows, 0..1."""
    error: float
    """Share of these that is decided wrongly."""
    recall: float | None


class Review(Manifest):
    """What is left to a person by the bundle's review rule, and the rest."""

    flagged: float
    """Share of rows, 0..1."""
    reasons: dict[str, int]
    """Reason -> rows; a row may have several."""
    rest: OperatingPoint | None
    """Of the rows that are not flagged, at the bundle's threshold; null where all are."""
    risk_coverage: list[CoveragePoint]


class Target(Manifest):
    """One of the figures that the project was asked for."""

    metric: str
    goal: float
    value: float | None
    reached: bool


class CurvePoint(Manifest):
    """One threshold."""

    threshold: float | None
    """Null where every patch is called Normal."""
    recall: float
    specificity: float
    precision: float | None


class Subgroup(Manifest):
    """Some of the rows."""

    by: str
    """slide, centre or tissue fraction."""
    name: str
    rows: int
    metastatic: int
    roc_auc: MetricValue
    recall: MetricValue
    specificity: MetricValue


class Perturbation(Manifest):
    """The same rows, changed."""

    name: str
    roc_auc: float | None
    recall: float | None
    specificity: float | None
    """Both at the bundle's threshold."""
    mean_probability_change: float
    """Mean of |probability - probability of the unchanged patch|."""
    largest_probability_change: float
    changed_decisions: float
    """Share of rows whose decision is another one."""


class Robustness(Manifest):
    """How answers change with what should not change them."""

    rows: int
    unchanged: Perturbation
    perturbations: list[Perturbation]
    views_spread_mean: float
    """Mean over rows of the largest less the smallest probability of the eight symmetries of the square."""
    views_spread_largest: float


class DelongTest(Manifest):
    """DeLong's test of the difference of two ROC-AUCs; rows as independent."""

    difference: float
    interval: Interval
    p_value: float
    """Two-sided."""


class Comparison(Manifest):
    """This bundle less another one, on the same rows."""

    headline: str
    bundle: dict[str, Any]
    """Of the other: path, name, version, digest, engine."""
    threshold: float
    """Of the other."""
    differences: dict[str, MetricValue]
    """Metric -> this bundle's value less the other's; rates at each one's own threshold; the same resamples for both."""
    delong: DelongTest | None


class EvaluationReport(Manifest):
    """`report.json` of an evaluation. Unrounded."""

    format_version: int
    created_at: str
    headline: str
    warnings: list[str]
    notice: str
    bundle: dict[str, Any]
    """Path, name, version, digest, engine."""
    data: dict[str, Any]
    """Path, fingerprint, split, split method, leak level, rows, groups, prevalence."""
    roc_auc: float | None
    roc_auc_intervals: MetricValue
    average_precision: MetricValue
    """Area under the precision-recall curve in steps (AUPRC)."""
    brier: MetricValue
    nll: MetricValue
    confusion: Confusion
    """At the bundle's threshold."""
    at_threshold: OperatingPoint
    at_half: OperatingPoint
    threshold_rule: ThresholdRule
    targets: list[Target]
    calibration: Calibration
    review: Review
    subgroups: list[Subgroup]
    robustness: Robustness | None
    curve: list[CurvePoint]
    """ROC and precision-recall, by falling threshold; at most 201 points."""
    comparison: Comparison | None
    published: list[str]
    """Published figures of the same test set beside this one's; empty where there are none."""
    config: dict[str, Any]
    library_versions: dict[str, str]
    git_commit: str | None


class PredictionPart(FileRecord):
    """One Parquet file of predictions."""

    rows: int


class PredictionsManifest(Manifest):
    """`_manifest.json` of a folder of predictions."""

    format_version: int
    created_at: str
    source: str
    rows: int
    errors: int
    """Inputs that could not be read as a patch: rows with `error` set and null predictions."""
    model: dict[str, str]
    """Name, version, digest, engine."""
    parts: list[PredictionPart]
    plan_sha256: Sha256 | None = None
    """Digest of inputs, model and settings: a command with the same plan finds its work done here. Null in older folders."""
    notice: str
    config: dict[str, Any]
    library_versions: dict[str, str]
    git_commit: str | None


def read_dataset_manifest(data: str | os.PathLike[str] | Location) -> DatasetManifest:
    """Read `<data>/dataset.json`; `data` is a path or URI.

    Raises
    ------
    ManifestNotFoundError
        `data` is not a prepared data set.
    ManifestError
        The manifest is malformed or of another format version.
    StorageError
        The storage does not answer.
    """
    try:
        return _parse(DatasetManifest, locate(data), "dataset.json", "prepared data set", DATASET_FORMAT_VERSION)
    except ManifestNotFoundError as error:
        raise ManifestNotFoundError(f"{error}; `sentinode prepare` makes one from a folder of patches") from error


def read_bundle_manifest(bundle: str | Path | Location) -> BundleManifest:
    """Read `<bundle>/bundle.json`; raises like `read_dataset_manifest`."""
    return _parse(BundleManifest, locate(bundle), "bundle.json", "model bundle", BUNDLE_FORMAT_VERSION)


def read_engine_manifest(folder: str | Path | Location) -> EngineManifest:
    """Read `<folder>/engine.json`; raises like `read_dataset_manifest`."""
    return _parse(EngineManifest, locate(folder), "engine.json", "whole engine", ENGINE_FORMAT_VERSION)


def read_report(folder: str | Path | Location) -> EvaluationReport:
    """Read `<folder>/report.json`; raises like `read_dataset_manifest`."""
    return _parse(EvaluationReport, locate(folder), "report.json", "evaluation report", REPORT_FORMAT_VERSION)


def read_predictions_manifest(folder: str | Path | Location) -> PredictionsManifest:
    """Read `<folder>/_manifest.json`; raises like `read_dataset_manifest`."""
    return _parse(PredictionsManifest, locate(folder), "_manifest.json", "folder of predictions", PREDICTIONS_FORMAT_VERSION)


def _parse(model: type[ManifestT], folder: Path | Location, name: str, what: str, newest: int) -> ManifestT:
    try:
        content = read_manifest_json(folder, name, what, newest)
    except ManifestNotFoundError as error:
        why = locate(folder).why_nothing(f"no {name} there")
        raise ManifestNotFoundError(f"not a {what}: {folder} ({why})") from error
    try:
        return model(**content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ManifestError(f"{folder / name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


SCHEMAS: dict[str, type[Manifest]] = {
    "dataset": DatasetManifest,
    "bundle": BundleManifest,
    "engine": EngineManifest,
    "report": EvaluationReport,
    "predictions": PredictionsManifest,
}


def schema_text(name: str) -> str:
    """Return the JSON Schema of one manifest as the text of its file in sentinode/schemas."""
    return json.dumps(SCHEMAS[name].model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    for schema in SCHEMAS:
        (Path(__file__).parent / "schemas" / f"{schema}.schema.json").write_text(schema_text(schema), encoding="utf-8")
