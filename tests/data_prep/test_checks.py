import pyarrow as pa
import pytest

from data_prep.checks import check_duplicates, check_ids
from data_prep.rejects import count_reasons


def table(*patches: tuple[str, int | None, str]) -> pa.Table:
    """(id, label, pixel_sha1) rows, sorted by id."""
    ids, labels, sha1 = zip(*sorted(patches), strict=True)
    paths = [f"train/{id_}.tif" for id_ in ids]
    return pa.table({"id": pa.array(ids), "label": pa.array(labels, pa.int8()), "path": paths, "pixel_sha1": pa.array(sha1)})


@pytest.mark.parametrize(("hashed", "mode", "refused"), [(3, "auto", 2), (2, "auto", 0), (3, "never", 0), (1, "always", 2)])
def test_ids_are_compared_only_where_most_are_the_sha1_of_the_pixels(hashed: int, mode: str, refused: int) -> None:
    patches = table(*[(f"{k:040x}", 0, f"{k:040x}") for k in range(hashed)], *[(f"name{k}", 0, f"{9 + k:040x}") for k in range(2)])
    kept, rejects = check_ids(patches, mode)  # type: ignore[arg-type]
    assert count_reasons(rejects) == ({"id_mismatch": refused} if refused else {})
    assert len(kept) == hashed + 2 - refused
    assert all(reject.id is not None and reject.id.startswith("name") for reject in rejects)


SAME = [(id_, 1, "p") for id_ in ("c", "a", "b")]
CONTRADICTING = [("x", 0, "q"), ("z", 1, "q"), ("y", 0, "q")]


def test_of_equal_patches_the_smallest_id_stays_and_contradictions_all_go() -> None:
    kept, rejects = check_duplicates(table(*SAME, *CONTRADICTING, ("alone", 0, "r")), "drop")
    assert kept["id"].to_pylist() == ["a", "alone"]
    assert kept["duplicate"].to_pylist() == [False, False]
    found = {reject.id: (str(reject.reason), reject.detail) for reject in rejects}
    assert found["b"] == found["c"] == ("duplicate_pixels", "same pixels as a, which is kept")
    assert {id_: reason for id_, (reason, _) in found.items() if id_ and id_ in "xyz"} == dict.fromkeys("xyz", "label_conflict")
    assert "x has the same pixels and label 0" in found["z"][1]
    assert "z has the same pixels and label 1" in found["x"][1]


def test_duplicates_that_are_kept_are_marked_and_contradictions_go_all_the_same() -> None:
    kept, rejects = check_duplicates(table(*SAME, *CONTRADICTING, ("alone", 0, "r")), "keep")
    assert dict(zip(kept["id"].to_pylist(), kept["duplicate"].to_pylist(), strict=True)) == {"a": True, "b": True, "c": True, "alone": False}
    assert count_reasons(rejects) == {"label_conflict": 3}


def test_unlabelled_duplicates_do_not_contradict_each_other() -> None:
    kept, rejects = check_duplicates(table(("a", None, "p"), ("b", None, "p")), "drop")
    assert kept["id"].to_pylist() == ["a"]
    assert count_reasons(rejects) == {"duplicate_pixels": 1}
