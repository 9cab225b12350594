"""Which rows an ensemble is calibrated on, and by which of its members each of them is judged.

A row is best judged by all members, as patches will be. That is honest only for a row that no member was trained on: the validation rows that all
members have in common. Members trained on different folds have none in common; then each row is judged by those members that were not trained on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sentinode.bundle import Bundle
from sentinode.calibration import require_both_classes
from sentinode.dataset import PreparedDataset
from sentinode.errors import UsageError
from sentinode.manifests import CalibrationRowsKind, ShardRecord
from sentinode.metrics import FloatArray
from sentinode.probability import calibrated_logit

BoolArray = npt.NDArray[np.bool_]

_WEIGHTS_OF_NO_PATCHES = ("none", "imagenet")


@dataclass(frozen=True)
class CalibrationPlan:
    """Who judges what.

    Attributes
    ----------
    shards : list of ShardRecord
        Of the splits train and val.
    judges : ndarray of bool, shape (members, n)
        Whether a member judges a row; n = all rows of `shards`, in order.
    kind : str
        Key of `sentinode.manifests.CALIBRATION_MEANING`.
    notes : list of str
        For people.
    """

    shards: list[ShardRecord]
    judges: BoolArray
    kind: CalibrationRowsKind
    notes: list[str]

    @property
    def rows(self) -> BoolArray:
        """Rows that anybody judges, bool (n,)."""
        judged: BoolArray = np.logical_or.reduce(self.judges, axis=0)
        return judged


def check_members(members: Sequence[Bundle]) -> None:
    """Raise UsageError where bundles cannot be one ensemble."""
    if len(members) < 2:
        raise UsageError("an ensemble needs two bundles or more")
    first, seen = members[0], dict[str, Bundle]()
    for member in members:
        if member.manifest.members:
            raise UsageError(f"{member.where}: is an ensemble itself; name its members")
        if member.manifest.digest in seen:
            raise UsageError(f"{member.where}: is the same model as {seen[member.manifest.digest].where}")
        seen[member.manifest.digest] = member
        for name, unit in (("patch_size_px", " px"), ("spacing_um_px", " um/px")):
            ours, theirs = getattr(first.manifest, name), getattr(member.manifest, name)
            if ours != theirs:
                raise UsageError(f"{member.where}: accepts patches of {theirs}{unit}, {first.where} of {ours}{unit}")


def calibration_plan(members: Sequence[Bundle], dataset: PreparedDataset) -> CalibrationPlan:
    """Choose the rows to calibrate on.

    Raises
    ------
    UsageError
        The data set has no validation rows, or a class is absent from them.
    ManifestError
        The index of the data set is damaged.
    """
    known = [member for member in members if member.manifest.data.fingerprint == dataset.manifest.fingerprint]
    # The shards are the same whatever the fold.
    shards, rows_of_first = dataset.train_and_val_rows(known[0].manifest.data.fold if known else None)
    # A member of another data set judges whatever the others do, or the validation split.
    held_out = [dataset.train_and_val_rows(member.manifest.data.fold)[1] if member in known else None for member in members]
    ours = [rows for rows in held_out if rows is not None] or [rows_of_first]
    labels = dataset.labels_in(shards)
    shared: BoolArray = np.logical_and.reduce(ours)
    kind: CalibrationRowsKind = "held_out"
    if set(labels[shared].tolist()) == {0, 1}:
        judges = np.tile(shared, (len(members), 1))
    else:
        kind = "out_of_fold"
        anyones: BoolArray = np.logical_or.reduce(ours)
        judges = np.stack([anyones if rows is None else rows for rows in held_out])
    notes = _unknown_rows(members, dataset)
    plan = CalibrationPlan(shards, judges, "unknown" if notes else kind, notes)
    require_both_classes(labels[plan.rows])
    return plan


def _unknown_rows(members: Sequence[Bundle], dataset: PreparedDataset) -> list[str]:
    """Tell which members may have seen rows that nobody knows of."""
    notes = []
    for number, member in enumerate(members):
        weights = member.manifest.training_config.get("weights")
        if member.manifest.data.fingerprint != dataset.manifest.fingerprint:
            notes.append(f"Member {number:02d} was trained on another data set than the ensemble was calibrated on.")
        elif weights not in _WEIGHTS_OF_NO_PATCHES:
            notes.append(f"Member {number:02d} began from weights of its own ({weights}); what they were trained on is not known here.")
    return notes


def mean_logits(members: Sequence[Bundle], rows: Sequence[npt.NDArray[np.int64]], logits: Sequence[FloatArray], count: int) -> FloatArray:
    """Return the mean of the judges' calibrated logits, float64 (count,); NaN where nobody judged.

    Parameters
    ----------
    members : sequence of Bundle
    rows : sequence of ndarray of int64, shape (k,)
        Per member, which rows it judged.
    logits : sequence of ndarray of float64, shape (k,)
        Per member, z1 - z0 of these.
    count : int
        How many rows there are.
    """
    total, judges = np.zeros(count), np.zeros(count)
    for member, places, values in zip(members, rows, logits, strict=True):
        total[places] += calibrated_logit(values, member.manifest.temperature, member.manifest.bias)
        judges[places] += 1
    mean: FloatArray = np.divide(total, judges, out=np.full(count, np.nan), where=judges > 0)
    return mean
