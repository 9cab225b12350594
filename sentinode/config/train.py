"""How a network is trained."""

import itertools
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from sentinode.config.base import Config, Rgb, Seed
from sentinode.encoder_names import check_arch, check_input_size

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Arch = Annotated[str, AfterValidator(check_arch)]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Depth = Annotated[int, Field(ge=0, le=5)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class AugmentConfig(Config):
    """Training augmentation, batched on the device. The label depends on the centre 32x32 only; by default nothing moves it."""

    dihedral: bool = True
    """One of the eight rotations and mirrorings of the square, which are exact for the label."""
    flip: bool = False
    """Horizontal and vertical flip, each with probability one half (the seed's; part of `dihedral` already)."""
    rotation_deg: Annotated[float, Field(ge=0, le=45)] = 0.0
    """Rotation by up to this angle either way, corners mirrored; disturbs the centre square slightly."""
    scale_jitter: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Magnified or shrunk by a factor in 1 +- this around the centre, the border mirrored; changes what lies at the edge of the centre square."""
    shift_px: Annotated[float, Field(ge=0, le=16)] = 0.0
    """Moved by up to this many pixels up or down and left or right, the border mirrored. A label that hangs on the edge of the centre square may
    become wrong: keep it small."""
    colour_jitter: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Brightness, contrast and saturation are each scaled by a factor in 1 +- this."""
    hue_jitter: Annotated[float, Field(ge=0, le=0.5)] = 0.02
    """Hue is turned by up to this part of a full circle either way."""
    stain_jitter: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Haematoxylin, eosin and residual are each scaled by a factor in 1 +- this and shifted by up to a fifth of it (optical density); glass stays."""
    blur_sigma_px: Annotated[float, Field(ge=0, le=5)] = 0.0
    """Half of the patches are blurred by a Gaussian whose standard deviation is even between 0 and this, in pixels of the patch."""
    jpeg_quality: Annotated[int, Field(ge=10, le=100)] | None = None
    """Half of the patches are what JPEG (4:2:0) leaves of them, at a quality even between this and 100; null for none."""

    views: Count | None = None
    """Looks of each patch: after so many epochs the random numbers repeat themselves; null for new ones in every epoch. What frozen stages make of
    each look is kept then and used again (`feature_cache_gib`): epochs of depth 0 become very much faster, those of depth 1 twice as fast."""

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
    """Network: a classifier of torchvision by its name there, or `timm:NAME` with the extra `timm` (docs/training.md)."""
    weights: str = "imagenet"
    """Initial weights: `imagenet` (torchvision's enum), `none` (random), or a .safetensors/.pth file or a bundle, by path or s3:// URI."""
    unfreeze_depth: Annotated[int, Field(ge=0, le=5)] = 1
    """Stages that train, counted from the head: 0 = the last layer, 1 to 4 = + one stage each (`layer4` to `layer1`), 5 = everything."""
    unfreeze_schedule: dict[Annotated[int, Field(ge=1)], Depth] = {}
    """Progressive unfreezing: number of epochs done -> the depth from then on, e.g. {2: 3, 5: 5}. Depths only grow."""
    input_size_px: Annotated[int, Field(ge=32, le=512)] = 224
    """Side of what the network sees; patches are resized to it on the device."""
    mean: Rgb = IMAGENET_MEAN
    """Channel means subtracted after scaling to 0..1, RGB. ImageNet's."""
    std: Rgb = IMAGENET_STD
    """Channel standard deviations divided by, RGB. ImageNet's."""
    epochs: Annotated[int, Field(ge=0)] = 15
    """Passes over the training split; 0 makes a bundle of the initial weights."""
    batch_size: Count = 32
    """Patches per worker and batch."""
    accumulate_steps: Count = 1
    """Batches whose gradients are summed before the weights change: a step sees workers x batch_size x this many patches."""
    optimiser: Literal["adam", "adamw", "sgd"] = "adam"
    """What changes the weights."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate of the head: initial (plateau, constant) or highest (cosine, one_cycle)."""
    scale_learning_rate: bool = False
    """Multiply the learning rate by workers x accumulate_steps (linear scaling, Goyal et al. 2017)."""
    stage_lr_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each stage further from the head learns at the rate of the one before it times this."""
    momentum: Share = 0.9
    """Of sgd (Nesterov's); one_cycle moves it from 0.95 to 0.85 and back instead."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty (adam, sgd), or decoupled decay (adamw), of all weights, those of normalisation layers and biases too."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Gradients are scaled down to this Euclidean norm where theirs is larger; null never."""
    class_weight: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """Weight of class 1 in the loss; `auto` = N_negative / N_positive of the rows trained on."""
    label_smoothing: Share = 0.0
    """Share of each label that is spread evenly over both classes (training only)."""
    dropout: Share = 0.0
    """Share of the features before the head that are set to zero in training."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Validate and keep an exponential moving average of the weights with this decay per step; null for the weights themselves."""
    schedule: Literal["plateau", "cosine", "one_cycle", "constant"] = "plateau"
    """Of the learning rate. `cosine` and `one_cycle` change it at every step and end at the last one of `epochs`."""
    warmup_fraction: Share | None = None
    """Share of all steps in which the rate rises (cosine, one_cycle); null = 0.05 for cosine, 0.3 for one_cycle."""
    lr_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """ReduceLROnPlateau on validation loss: what the learning rate is multiplied by."""
    lr_patience_epochs: Annotated[int, Field(ge=0)] = 2
    """ReduceLROnPlateau: epochs without improvement that are waited for."""
    lr_floor: Annotated[float, Field(ge=0)] = 1e-6
    """Smallest learning rate of plateau; the last one of cosine. (one_cycle ends at 4e-6 times its highest.)"""
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
    """Arithmetic of the forward pass; `auto` = bf16 autocast on GPUs, fp32 on CPUs. fp16 (with loss scaling) needs GPUs."""
    channels_last: Literal["auto"] | bool = "auto"
    """Memory format of the network; `auto` = true. oneDNN and tensor cores prefer it; false is there for comparison."""
    compile: bool = False
    """Compile the network with torch.compile: minutes at the start, faster steps after it."""
    sync_batch_norm: bool = False
    """BatchNorm statistics over the batches of all workers (GPUs only)."""
    ingest: Literal["auto", "resident", "stream"] = "auto"
    """`resident` holds the training rows once per node in shared memory; `stream` reads them anew each epoch; `auto` streams what does not fit."""
    stream_window_rows: Count = 16384
    """`stream`: rows of each worker among which the order is random; row groups are read in random order."""
    feature_cache_gib: Annotated[float, Field(ge=0)] = 8.0
    """Room for outputs of frozen stages while it trains, GiB; 0 for none. They lie in the run's folder or, of a run in a store, among the temporary
    files of its node. Only with `augment.views`, and one worker."""
    checkpoint_interval_s: Annotated[float, Field(gt=0)] | None = 600.0
    """A checkpoint within an epoch at least this often, beside the one after each epoch; null for none."""
    trackers: tuple[Literal["tensorboard", "mlflow"], ...] = ("tensorboard",)
    """What records the run for people. `mlflow` needs the extra of that name."""
    mlflow_uri: str | None = None
    """Tracking server or file of MLflow; null = MLFLOW_TRACKING_URI, or mlflow.db in the run's folder."""
    mlflow_experiment: str = "sentinode"
    """MLflow's experiment."""
    eval_batch_size: Annotated[int, Field(ge=1)] = 256
    """Patches per worker and step in validation."""
    seed: Seed = 42
    """Decides initial head, order of rows and augmentation."""
    fold: Annotated[int, Field(ge=0)] | None = None
    """Validate on this fold of the data set and train on the others; null uses the train and val splits."""
    calibration_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the validation groups kept out of epoch selection and used alone for calibration and threshold; 0 uses all rows for both."""
    tta: Literal[1, 4, 8] = 1
    """Views of a patch that the bundle averages (quarter turns, and their mirror images): fewer errors for that many times the work. Calibration and
    threshold are fitted to it."""
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
        check_input_size(self.arch, self.input_size_px)
        if isinstance(self.workers, tuple) and self.workers[0] > self.workers[1]:
            raise ValueError(f"workers {list(self.workers)} must be [min, max] with min <= max")
        if self.use_gpu is False and self.precision == "fp16":
            raise ValueError("precision fp16 needs GPUs: set use_gpu, or precision bf16 or fp32")
        if self.use_gpu is False and self.sync_batch_norm:
            raise ValueError("sync_batch_norm needs GPUs: torch has it for CUDA only")
        if self.epochs and any(epoch >= self.epochs for epoch in self.unfreeze_schedule):
            raise ValueError(f"unfreeze_schedule {self.unfreeze_schedule} has a stage after the last of {self.epochs} epochs")
        if self.schedule in ("plateau", "cosine") and self.lr_floor > self.learning_rate:
            raise ValueError(f"lr_floor {self.lr_floor:g} is above learning_rate {self.learning_rate:g}")
        depths = [self.unfreeze_depth, *(self.unfreeze_schedule[epoch] for epoch in sorted(self.unfreeze_schedule))]
        if any(later <= earlier for earlier, later in itertools.pairwise(depths)):
            raise ValueError(f"unfreeze_schedule {self.unfreeze_schedule} must go up from unfreeze_depth {self.unfreeze_depth}")
        return self

    def depth_at(self, epoch: int) -> int:
        """Return how deep the network trains in an epoch, counted from 0."""
        return max([self.unfreeze_depth, *(depth for start, depth in self.unfreeze_schedule.items() if start <= epoch)])

    @property
    def max_depth(self) -> int:
        """Deepest that this run ever trains."""
        return max([self.unfreeze_depth, *self.unfreeze_schedule.values()])

    @property
    def max_workers(self) -> int:
        """Largest number of workers this run may use."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers

    @property
    def min_workers(self) -> int:
        """Smallest number of workers this run can start with."""
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers
