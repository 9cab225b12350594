"""How patches become a prepared data set."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sentinode.config.base import Config, Fraction, Seed


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
