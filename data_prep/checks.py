"""The checks that need all decoded patches at once: ids against pixels, equal pixels under several ids."""

from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.rejects import Reject, RejectReason


def check_ids(patches: pa.Table, mode: Literal["auto", "always", "never"]) -> tuple[pa.Table, list[Reject]]:
    """Refuse patches whose id is not the SHA-1 of their pixels, where ids are that.

    Parameters
    ----------
    patches : pyarrow.Table
        With columns id, path, pixel_sha1.
    mode : {"auto", "always", "never"}
        `auto` compares where more than half of the ids match, as in the Kaggle set; elsewhere ids are only names.

    Returns
    -------
    The patches that are left, in order, and the refused ones
    """
    same = pc.equal(patches["id"], patches["pixel_sha1"])
    matching = pc.sum(same).as_py() or 0
    if mode == "never" or (mode == "auto" and matching * 2 <= len(patches)):
        return patches, []
    wrong = patches.filter(pc.invert(same)).select(["id", "path", "pixel_sha1"]).to_pylist()
    rejects = [Reject(RejectReason.ID_MISMATCH, row["id"], row["path"], f"SHA-1 of the pixels is {row['pixel_sha1']}") for row in wrong]
    return patches.filter(same), rejects


def check_duplicates(patches: pa.Table, mode: Literal["drop", "keep"]) -> tuple[pa.Table, list[Reject]]:
    """Handle identical pixels under several ids: with different labels all are refused, with one label (or none) the smallest id is kept, or all are.

    Parameters
    ----------
    patches : pyarrow.Table
        Sorted by id, with columns id, label, path, pixel_sha1.
    mode : {"drop", "keep"}

    Returns
    -------
    The patches that are left, in order, with a column `duplicate` (bool: kept although another patch has the same pixels), and the refused ones
    """
    keep = np.ones(len(patches), np.bool_)
    duplicate = np.zeros(len(patches), np.bool_)
    rejects = []
    for rows in equal_runs(patches["pixel_sha1"]):
        twins = patches.select(["id", "label", "path"]).take(pa.array(rows)).to_pylist()
        if len({twin["label"] for twin in twins}) > 1:
            keep[rows] = False
            for twin in twins:
                other = next(o for o in twins if o["label"] != twin["label"])
                detail = f"label {twin['label']}, but {other['id']} has the same pixels and label {other['label']}"
                rejects.append(Reject(RejectReason.LABEL_CONFLICT, twin["id"], twin["path"], detail))
        elif mode == "keep":
            duplicate[rows] = True
        else:
            keep[rows[1:]] = False
            rejects += [
                Reject(RejectReason.DUPLICATE_PIXELS, twin["id"], twin["path"], f"same pixels as {twins[0]['id']}, which is kept")
                for twin in twins[1:]
            ]
    return patches.append_column("duplicate", pa.array(duplicate)).filter(pa.array(keep)), rejects


def equal_runs(column: pa.ChunkedArray) -> list[npt.NDArray[np.int64]]:
    """Return the rows of every value that occurs more than once, int64 arrays in ascending order."""
    values = column.combine_chunks().dictionary_encode()
    codes = values.indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable").astype(np.int64)
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    ends = np.append(starts[1:], len(order))
    several = ends - starts > 1
    return [order[start:end] for start, end in zip(starts[several].tolist(), ends[several].tolist(), strict=True)]
