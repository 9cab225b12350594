"""What may be written where is answered without Ray."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.output import is_complete, request_of
from data_prep.prepare import prepare
from sentinode.config import PrepareConfig
from sentinode.errors import SentinodeError, UsageError
from tests.data_prep.helpers import noise, write_source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", {"a": noise(np.random.default_rng(0))})


def test_folders_that_hold_anything_else_are_never_replaced(source: Path, tmp_path: Path) -> None:
    assert not is_complete(request_of(PrepareConfig(), source, tmp_path / "new"))
    (tmp_path / "empty").mkdir()
    assert not is_complete(request_of(PrepareConfig(), source, tmp_path / "empty"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    (tmp_path / "file").write_text("")
    for out, message in [("mine", "no prepared data set"), ("file", "not a folder"), ("source", "holds the source"), (".", "holds the source")]:
        with pytest.raises(UsageError, match=message):
            is_complete(request_of(PrepareConfig(), source, tmp_path / out, overwrite=True))


def test_a_manifest_that_cannot_be_read_names_overwrite(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dataset.json").write_text("{")
    with pytest.raises(UsageError, match="--overwrite"):
        is_complete(request_of(PrepareConfig(), source, tmp_path / "out"))
    assert not is_complete(request_of(PrepareConfig(), source, tmp_path / "out", overwrite=True))


def test_without_ray_prepare_says_so_and_writes_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(SentinodeError, match="Ray does not run"):
        prepare(request_of(PrepareConfig(), source, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "unlabelled", "split": "slide"}, "split slide: patches without labels all go into one split; leave split out"),
        ({"source": "unlabelled", "folds": 3}, "folds 3: patches without labels all go into one split; leave folds out"),
        ({"split": "all", "folds": 3}, "folds 3: split all deals nothing; leave folds out"),
    ],
)
def test_a_split_that_would_not_be_heeded_is_refused(source: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    where = source / "train" if "source" in settings else source
    with pytest.raises(UsageError, match=message):
        request_of(PrepareConfig(**settings), where, tmp_path / "out")
    request_of(PrepareConfig(**{key: value for key, value in settings.items() if key == "source"} | {"split": "all"}), where, tmp_path / "out")


def test_a_bucket_that_does_not_exist_is_said_before_the_work(source: Path, tmp_path: Path, s3_folder: str) -> None:
    assert not is_complete(request_of(PrepareConfig(), source, s3_folder, work=tmp_path / "work"))
    with pytest.raises(UsageError, match=r"^s3://no-such-bucket-here/a/b: there is no such bucket; make it first$"):
        is_complete(request_of(PrepareConfig(), source, "s3://no-such-bucket-here/a/b", work=tmp_path / "work"))


@pytest.mark.parametrize("out", ["/", "s3://bucket"])
def test_an_output_without_a_name_of_its_own_is_refused(source: Path, out: str) -> None:
    with pytest.raises(UsageError, match="name a folder to make"):
        request_of(PrepareConfig(), source, out)
