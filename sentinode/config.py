"""Configuration: one frozen, documented model per verb. A key that is not listed here is an error.

Configurations say *how*; paths (data, out, bundle) are arguments of the verb and say *what*.
Read with `load_config`: defaults, then a YAML file or preset, then `key=value` settings, the last one winning.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from sentinode.config_errors import describe_validation_error as describe_validation_error
from sentinode.errors import ConfigError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Rgb = tuple[float, float, float]
Fraction = Annotated[float, Field(ge=0, le=1)]
# What every generator that is seeded with it accepts.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Arch = Literal["resnet18", "resnet34"]
Engine = Literal["auto", "torch"]
Precision = Literal["auto", "fp32", "bf16"]


class Config(BaseModel):
    """Base of every configuration: immutable, and no key is ever ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, fields: Any) -> Any:
        # Pydantic takes `epochs: true` for 1, and YAML makes true of `yes` and `on`.
        for name, value in fields.items() if isinstance(fields, dict) else ():
            kinds = _kinds_of(cls.model_fields[name].annotation) if name in cls.model_fields else set()
            values = value if isinstance(value, list | tuple) else [value]
            if kinds & {int, float} and not kinds & {bool, Any} and any(isinstance(item, bool) for item in values):
                complaint = PydanticCustomError("number_type", "Input should be a number, not true or false")
                raise ValidationError.from_exception_data(cls.__name__, [{"type": complaint, "loc": (name,), "input": value}])
        return fields


def _kinds_of(annotation: Any) -> set[Any]:
    """Every type that an annotation is made of."""
    return {annotation}.union(*map(_kinds_of, get_args(annotation)))


class PrepareConfig(Config):
    """How patches become a prepared data set."""

    source: Literal["auto", "kaggle", "class_folders", "table", "pcam", "unlabelled"] = "auto"
    """Layout of the source (docs/data.md). `auto` tells the labelled ones apart; `unlabelled` must be asked for, so that lost labels are noticed."""
    class_folders: tuple[str, str] = ("normal", "metastatic")
    """Names of the two folders of the layout `class_folders`: class 0, class 1."""
    columns: dict[Literal["id", "label", "path", "slide", "centre", "x_px", "y_px", "split", "wsi"], str] = {}
    """Our name of a column -> its name in your labels, slides or table file, where the two differ."""
    split: Literal["overlap", "slide", "random", "predefined", "all"] = "overlap"
    """What may not straddle a split: patches that share pixels, patches of one slide, or nothing (random: leaky). `predefined` keeps the source's own
    splits; `all` makes one split of that name, as unlabelled sources always do."""
    ratios: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Shares of train, val and test."""
    seed: Seed = 42
    """Decides the dealing of groups to splits and the order of rows."""
    folds: Annotated[int, Field(ge=2, le=20)] | None = None
    """Grouped, stratified folds over the train and val rows; null for none."""
    patch_size_px: Annotated[int, Field(ge=32, le=512)] = 96
    """Side of every accepted patch."""
    spacing_um_px: Annotated[float, Field(gt=0)] | None = 0.972
    """Physical size of a pixel, micrometres. 0.972 is the Kaggle set's and PCam's (10x); null when unknown."""
    check_ids: Literal["auto", "always", "never"] = "auto"
    """Compare each id with the SHA-1 of its pixels. `auto`: only where most ids of the source match, as Kaggle's do."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Identical pixels and label under several ids: keep the smallest id, or all of them (flagged, in one group), as the official PCam test set does.
    With different labels all are refused either way."""
    max_rejected_fraction: Fraction = 0.01
    """Share of refused inputs above which the run fails. Dropped duplicates do not count: their pixels are in the data set."""
    rows_per_shard: Annotated[int, Field(ge=1)] = 4096
    """Patches per Parquet file (27,648 bytes each before compression at 96 px)."""
    row_group_rows: Annotated[int, Field(ge=1)] = 256
    """Patches per Parquet row group, the unit of streaming."""
    compression: Literal["none", "zstd", "lz4", "snappy"] = "none"
    """Parquet compression of the pixels. Stained tissue hardly compresses (docs/results.md): zstd saves a tenth and costs several times the time."""
    decode_block_rows: Annotated[int, Field(ge=1)] = 2048
    """Patches that one decode task reads, and the unit that a restart does not repeat. Changes nothing in the output."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Tasks that run at a time, one CPU each; null for as many as the cluster has CPUs. Changes nothing in the output."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if abs(sum(self.ratios) - 1) > 1e-6 or min(self.ratios) < 0 or self.ratios[0] == 0:
            raise ValueError(f"ratios {list(self.ratios)} must be train, val, test shares that sum to 1, train above 0")
        if len(set(self.class_folders)) < 2 or not all(self.class_folders):
            raise ValueError(f"class_folders {list(self.class_folders)} must be two different names")
        return self


class AugmentConfig(Config):
    """Training augmentation, batched on the device. The label depends on the centre 32x32 only, so nothing here may move the centre."""

    dihedral: bool = True
    """One of the eight rotations and mirrorings of the square, which are exact for the label."""
    flip: bool = False
    """Horizontal and vertical flip, each with probability one half (the seed's; part of `dihedral` already)."""
    rotation_deg: Annotated[float, Field(ge=0, le=45)] = 0.0
    """Rotation by up to this angle either way, corners mirrored; disturbs the centre square slightly."""
    colour_jitter: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Brightness, contrast and saturation are each scaled by a factor in 1 +- this."""
    hue_jitter: Annotated[float, Field(ge=0, le=0.5)] = 0.02
    """Hue is turned by up to this part of a full circle either way."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dihedral and self.flip:
            raise ValueError("flip is already part of dihedral: set one of the two")
        return self


class ReviewRule(Config):
    """When a prediction is flagged for a human."""

    below: Annotated[float, Field(ge=0.5, le=1)] = 0.85
    """Flag when max(p, 1-p) is below this."""
    band: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Flag when p lies within this distance of the threshold."""


class TrainConfig(Config):
    """How a model is fine-tuned on a prepared data set. The defaults are the published protocol's, corrected (docs/training.md)."""

    arch: Arch = "resnet34"
    """Network."""
    weights: str = "imagenet"
    """Initial weights: `imagenet` (torchvision's enum), `none` (random), or a .safetensors/.pth file or a bundle folder."""
    unfreeze_depth: Annotated[int, Field(ge=0, le=5)] = 1
    """Stages that train, counted from the head: 0 = fc, 1 = + layer4, 2 = + layer3, 3 = + layer2, 4 = + layer1, 5 = everything."""
    input_size_px: Annotated[int, Field(ge=32, le=512)] = 224
    """Side of what the network sees; patches are resized to it on the device."""
    mean: Rgb = IMAGENET_MEAN
    """Channel means subtracted after scaling to 0..1, RGB. ImageNet's."""
    std: Rgb = IMAGENET_STD
    """Channel standard deviations divided by, RGB. ImageNet's."""
    epochs: Annotated[int, Field(ge=0)] = 15
    """Passes over the training split; 0 makes a bundle of the initial weights."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Patches per worker and step."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Adam's initial learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Adam's L2 penalty."""
    class_weight: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """Weight of class 1 in the loss; `auto` = N_negative / N_positive of the rows trained on."""
    lr_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """ReduceLROnPlateau on validation loss: what the learning rate is multiplied by."""
    lr_patience_epochs: Annotated[int, Field(ge=0)] = 2
    """ReduceLROnPlateau: epochs without improvement that are waited for."""
    lr_floor: Annotated[float, Field(ge=0)] = 1e-6
    """ReduceLROnPlateau: smallest learning rate."""
    selection_metric: Literal["val_loss", "val_roc_auc"] = "val_loss"
    """What decides the best checkpoint and early stopping."""
    early_stopping_patience_epochs: Annotated[int, Field(ge=1)] | None = 6
    """Stop after this many epochs without a better `selection_metric`; null never stops early."""
    augment: AugmentConfig = AugmentConfig()
    """Training augmentation."""
    workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 1
    """DDP workers, or [min, max] for an elastic group."""
    use_gpu: Literal["auto"] | bool = "auto"
    """One GPU per worker; `auto` = where the cluster has enough of them."""
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """CPUs reserved for, and torch threads used by, each worker."""
    precision: Precision = "auto"
    """Arithmetic of the forward pass; `auto` = bf16 autocast on GPUs, fp32 on CPUs."""
    eval_batch_size: Annotated[int, Field(ge=1)] = 256
    """Patches per worker and step in validation."""
    seed: Seed = 42
    """Decides initial head, order of rows and augmentation."""
    fold: Annotated[int, Field(ge=0)] | None = None
    """Validate on this fold of the data set and train on the others; null uses the train and val splits."""
    calibration_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the validation groups kept out of epoch selection and used alone for calibration and threshold; 0 uses all rows for both."""
    target_recall: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Recall whose lower 95 % bound on validation the threshold must reach."""
    review: ReviewRule = ReviewRule()
    """When a prediction is flagged for a human; stored in the bundle."""
    bootstrap_samples: Annotated[int, Field(ge=100)] = 1000
    """Group-bootstrap resamples behind each interval."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures that are repaired from the last checkpoint before the run fails."""

    @field_validator("std")
    @classmethod
    def _positive_std(cls, std: Rgb) -> Rgb:
        if min(std) <= 0:
            raise ValueError("every value must be above 0")
        return std

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            raise ValueError(f"workers {list(self.workers)} must be [min, max] with min <= max")
        if self.use_gpu is False and self.precision == "bf16":
            raise ValueError("precision bf16 needs GPUs: set use_gpu or precision fp32")
        return self

    @property
    def max_workers(self) -> int:
        """Largest number of workers this run may use."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers

    @property
    def min_workers(self) -> int:
        """Smallest number of workers this run can start with."""
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers


class LogUniform(Config):
    """A value drawn uniformly in its logarithm from [low, high]."""

    loguniform: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]


class Uniform(Config):
    """A value drawn uniformly from [low, high]."""

    uniform: tuple[float, float]


class RandInt(Config):
    """A whole number drawn uniformly from low..high, both included."""

    randint: tuple[int, int]


class Choice(Config):
    """One of the listed values, drawn at random."""

    choice: Annotated[list[Any], Field(min_length=1)]


class Grid(Config):
    """Every listed value is tried."""

    grid: Annotated[list[Any], Field(min_length=1)]


Domain = LogUniform | Uniform | RandInt | Choice | Grid
DOMAIN_KINDS: dict[str, type[Config]] = {
    "loguniform": LogUniform,
    "uniform": Uniform,
    "randint": RandInt,
    "choice": Choice,
    "grid": Grid,
}


class AshaConfig(Config):
    """Asynchronous successive halving: weak trials end early."""

    kind: Literal["asha"]
    grace_period_epochs: Annotated[int, Field(ge=1)] = 1
    """Epochs that every trial gets."""
    reduction_factor: Annotated[int, Field(ge=2)] = 4
    """At each rung the best 1/this go on."""


class NoScheduler(Config):
    """Every trial runs all its epochs."""

    kind: Literal["none"] = "none"


class SweepConfig(Config):
    """A search over fields of TrainConfig."""

    space: Annotated[dict[str, Domain], Field(min_length=1)]
    """Field of TrainConfig (dots for nested ones) -> how its values are drawn."""
    base: dict[str, Any] = {}
    """Fields of TrainConfig that all trials share."""
    searcher: Literal["random", "grid"] = "random"
    """`random` draws `trials` points; `grid` tries every combination of a space made of `grid` entries only."""
    trials: Annotated[int, Field(ge=1)] = 16
    """Points drawn by `random`; each combination of `grid` entries is drawn this many times."""
    scheduler: Annotated[AshaConfig | NoScheduler, Field(discriminator="kind")] = NoScheduler()
    """What ends weak trials early."""
    metric: Literal["val_roc_auc", "val_loss"] = "val_roc_auc"
    """Validation metric that ranks epochs and trials. The test split is never read by a sweep."""
    workers_per_trial: Annotated[int, Field(ge=1)] = 1
    """DDP workers of each trial."""
    max_concurrent_trials: Annotated[int, Field(ge=1)] | None = None
    """Trials at a time; null = as many as the cluster has room for."""
    seed: Seed = 42
    """Decides the points drawn."""

    @field_validator("space", mode="before")
    @classmethod
    def _known_kinds(cls, space: Any) -> Any:
        # Without this the union would answer a typo with one complaint per kind of domain.
        if not isinstance(space, dict):
            return space
        parsed = {}
        for key, domain in space.items():
            if isinstance(domain, Config):
                parsed[key] = domain
                continue
            if not (isinstance(domain, dict) and len(domain) == 1 and next(iter(domain)) in DOMAIN_KINDS):
                raise ValueError(f"{key}: {domain!r} must be one of {', '.join(DOMAIN_KINDS)}, e.g. {{choice: [0, 1]}}")
            kind = DOMAIN_KINDS[next(iter(domain))]
            try:
                parsed[key] = kind(**domain)
            except ValidationError as error:
                raise ValueError(f"{key}: {describe_validation_error(error, kind)}") from error
        return parsed

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, instead in (("workers", "workers_per_trial"), ("selection_metric", "metric")):
            if key in self.base or key in self.space:
                raise ValueError(f"{key} cannot be set per trial: use {instead}")
        for key in ("use_gpu", "cpus_per_worker", "max_failures"):
            if key in self.space:
                raise ValueError(f"space.{key}: the same for all trials; set it in base")
        self._check_point({}, "base")
        for key, domain in self.space.items():
            if _is_set(self.base, key):
                raise ValueError(f"base.{key}: also in space; keep one of the two")
            for other in self.space:
                if other.startswith(f"{key}."):
                    raise ValueError(f"space.{other}: a part of {key}, which is in space too; keep one of the two")
            for value in _values_to_check(domain, f"space.{key}"):
                self._check_point({key: value}, f"space.{key}")
        if self.searcher == "grid" and not all(isinstance(domain, Grid) for domain in self.space.values()):
            raise ValueError("searcher grid needs a space of grid entries only")
        return self

    def _check_point(self, point: Mapping[str, Any], where: str) -> None:
        try:
            self.train_config(point)
        except ValidationError as error:
            raise ValueError(f"{where}: {describe_validation_error(error, TrainConfig)}") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def train_config(self, point: Mapping[str, Any]) -> TrainConfig:
        """Return the TrainConfig of one trial: `base`, overlaid with one point of the space.

        Raises
        ------
        pydantic.ValidationError
            A field is unknown or its value is out of bounds.
        ValueError
            A key of `point` leads through something that is not a mapping.
        """
        fields: dict[str, Any] = dict(self.base) | {"selection_metric": self.metric, "workers": self.workers_per_trial}
        for key, value in point.items():
            set_by_path(fields, key, value)
        return TrainConfig(**fields)


def _values_to_check(domain: Domain, where: str) -> list[Any]:
    """Values of a domain that must be valid, or some trial would end at its start."""
    if isinstance(domain, Choice | Grid):
        return next(iter(domain.model_dump().values()))
    low, high = next(iter(domain.model_dump().values()))
    if not low < high:
        raise ValueError(f"{where}: range {[low, high]} must run from low to high")
    # Between whole ends lie fractions, which a field of whole numbers does not take.
    return [low, high] if isinstance(domain, RandInt) else [low, high, low + (high - low) / math.pi]


def _is_set(fields: Mapping[str, Any], path: str) -> bool:
    head, _, rest = path.partition(".")
    inner = fields.get(head)
    return head in fields and (not rest or (isinstance(inner, Mapping) and _is_set(inner, rest)))


class EvaluateConfig(Config):
    """How a bundle is evaluated on a prepared data set."""

    split: Literal["train", "val", "test"] = "test"
    """Which rows. Validation chose epochs, calibration and threshold, so figures on it are optimistic."""
    engine: Engine = "auto"
    """What runs the network."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Patches per step."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Inference actors."""
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """CPUs reserved for, and torch threads used by, each actor."""
    use_gpu: Literal["auto"] | bool = "auto"
    """One GPU per actor; `auto` = where the cluster has enough of them."""
    bootstrap_samples: Annotated[int, Field(ge=100)] = 1000
    """Resamples behind each interval."""
    seed: Seed = 42
    """Of the bootstrap."""


class PredictConfig(Config):
    """How a bundle is run over a folder of images or a prepared data set."""

    engine: Engine = "auto"
    """What runs the network."""
    batch_size: Annotated[int, Field(ge=1)] = 256
    """Patches per step."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Inference actors."""
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """CPUs reserved for, and torch threads used by, each actor."""
    use_gpu: Literal["auto"] | bool = "auto"
    """One GPU per actor; `auto` = where the cluster has enough of them."""


class ServeConfig(Config):
    """How a bundle is served over HTTP. The `args` of serve/config.yaml."""

    bundle: str = ""
    """Folder of the bundle; empty = the one that the environment variable SENTINODE_BUNDLE names."""
    auth: Literal["keys", "none"] = "keys"
    """`keys`: requests need an API key (from SENTINODE_API_KEYS or `api_keys_file`); `none`: anyone who reaches the port may call."""
    api_keys_file: str | None = None
    """File with one `name:sha256-of-key` per line; see docs/serving.md."""
    topology: Literal["fused", "split"] = "fused"
    """`fused`: one deployment decodes and classifies; `split`: HTTP ingress and classifier scale apart, at the price of one hop."""
    engine: Engine = "auto"
    """What runs the network."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 1_048_576
    """Larger request bodies are refused with 413 before they are read in full. A 96x96 TIF is 27,935 bytes."""
    allow_resize: bool = False
    """Accept patches of another size than the bundle's and resize them; off because a resized patch has another magnification."""
    max_batch_size: Annotated[int, Field(ge=1)] = 16
    """Most patches in one forward pass."""
    batch_wait_timeout_s: Annotated[float, Field(ge=0)] = 0.005
    """How long a forward pass waits for company."""
    min_replicas: Annotated[int, Field(ge=1)] = 1
    """Replicas that are always up."""
    max_replicas: Annotated[int, Field(ge=1)] = 4
    """Replicas that load can bring up."""
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 8
    """Requests in flight per replica that autoscaling aims at."""
    max_ongoing_requests: Annotated[int, Field(ge=1)] = 64
    """Requests that one replica accepts at a time; at least `max_batch_size`, or batches never fill."""
    max_queued_requests: Annotated[int, Field(ge=1)] = 256
    """Requests that wait for a replica; more are answered 429 with Retry-After."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 3
    """Load must last this long before replicas are added."""
    downscale_delay_s: Annotated[float, Field(ge=0)] = 120
    """Quiet must last this long before replicas are removed."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = 1
    """CPUs reserved for each classifier; whole CPUs are also its torch threads."""
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0
    """GPUs, or a part of one, reserved for each classifier; above 0 the network runs on CUDA."""
    cpus_per_ingress: Annotated[float, Field(gt=0)] = 0.5
    """CPUs reserved for each HTTP ingress. Only with topology `split`; a fused replica has `cpus_per_replica` for both."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 30
    """A request that takes longer is answered 504."""
    drain_timeout_s: Annotated[float, Field(gt=0)] = 30
    """How long a leaving replica may finish what it has accepted."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_ongoing_requests < self.max_batch_size:
            raise ValueError(
                f"max_ongoing_requests {self.max_ongoing_requests} must be at least max_batch_size {self.max_batch_size}, or batches never fill"
            )
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} must be at least min_replicas {self.min_replicas}")
        return self


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(model: type[ConfigT], yaml_files: Sequence[str | Path] = (), settings: Sequence[str] = (), **overrides: Any) -> ConfigT:
    """Build a configuration: defaults, then each YAML file, then `a.b=value` settings (values are YAML), then overrides.

    Raises
    ------
    ConfigError
        A file is missing or not a mapping, a key is unknown, or a value is wrong; one line names it.
    """
    fields: dict[str, Any] = {}
    for path in yaml_files:
        for key, value in read_yaml_mapping(path).items():
            fields[key] = merge(fields.get(key), value)
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {setting!r}: expected key=value, e.g. --set epochs=3")
        try:
            value = _parse_yaml(text)
        except ValueError as error:
            raise ConfigError(f"--set {setting!r}: the value is not YAML") from error
        try:
            set_by_path(fields, key, value)
        except ValueError as error:
            raise ConfigError(f"--set {setting!r}: {error}") from error
    fields.update(overrides)
    return parse_config(model, fields)


def parse_config(model: type[ConfigT], fields: Mapping[str, Any]) -> ConfigT:
    """Validate `fields`; a ConfigError names the first wrong key, its value and what was expected."""
    try:
        return model(**fields)
    except ValidationError as error:
        raise ConfigError(describe_validation_error(error, model)) from error


def read_yaml_mapping(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping with string keys (an empty file is an empty mapping).

    Raises
    ------
    ConfigError
        The file is missing, is not YAML, or holds something else.
    """
    try:
        content = _parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"config file {path}: not YAML ({error})") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"config file {path}: expected a mapping of keys to values")
    return content


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, where YAML's own loader lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} stands there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str) -> Any:
    """Parse YAML with a SafeLoader, which runs nothing in it; ValueError of one line where it is malformed."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def merge(old: Any, new: Any) -> Any:
    """Overlay nested mappings; anything else is replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: merge(old.get(key), value) for key, value in new.items()}
    return new


def set_by_path(fields: dict[str, Any], path: str, value: Any) -> None:
    """Set `fields["a"]["b"] = value` for the path `a.b`, copying the mappings on the way; ValueError where `a` is not a mapping."""
    head, dot, rest = path.partition(".")
    if not head or (dot and not rest):
        raise ValueError("a key has an empty part")
    if not rest:
        fields[head] = value
        return
    inner = fields.get(head, {})
    if not isinstance(inner, Mapping):
        raise ValueError(f"{head} is {inner!r}, not a mapping")
    copied = dict(inner)
    set_by_path(copied, rest, value)
    fields[head] = copied
