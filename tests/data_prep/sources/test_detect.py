import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sentinode.errors import ConfigError, UsageError
from tests.data_prep.sources.helpers import opened, write_kaggle, write_noise


def class_folders(folder: Path) -> None:
    write_noise(folder / "normal" / "a.tif")
    write_noise(folder / "metastatic" / "b.tif")


def kaggle(folder: Path) -> None:
    write_kaggle(folder, ["a", "b"])


def pcam(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "camelyonpatch_level_2_split_test_x.h5.gz").write_bytes(b"")


def test_a_folder_of_images_alone_needs_to_be_called_unlabelled(tmp_path: Path) -> None:
    write_noise(tmp_path / "a.tif")
    with pytest.raises(UsageError) as caught:
        opened(tmp_path)
    for text in ("train_labels.csv", "normal and metastatic", "camelyonpatch_level_2_split_*_x.h5", "--labels", "--set source=unlabelled"):
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert opened(tmp_path, source="unlabelled").kind == "unlabelled"


def test_one_class_folder_of_two_is_pointed_out(tmp_path: Path) -> None:
    write_noise(tmp_path / "normal" / "a.tif")
    with pytest.raises(UsageError, match="of the two only normal is there"):
        opened(tmp_path)


@pytest.mark.parametrize("layouts", [(kaggle, class_folders), (kaggle, pcam), (class_folders, pcam)])
def test_two_layouts_in_one_folder_need_a_choice(tmp_path: Path, layouts: tuple[Callable[[Path], None], ...]) -> None:
    for write in layouts:
        write(tmp_path)
    with pytest.raises(UsageError, match="several layouts") as caught:
        opened(tmp_path)
    for write in layouts:
        assert write.__name__ in str(caught.value)
    assert opened(tmp_path, source=kaggle.__name__ if kaggle in layouts else class_folders.__name__).entries.num_rows == 2


def test_a_labels_file_that_is_given_decides(tmp_path: Path) -> None:
    class_folders(tmp_path)
    (tmp_path / "normal" / "a.tif").rename(tmp_path / "a.tif")
    labels = tmp_path / "l.csv"
    labels.write_text("id,label\na,1\n")
    assert opened(tmp_path, labels=labels).kind == "kaggle"


def test_a_prepared_data_set_is_pointed_to_the_option_for_it(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({}))
    with pytest.raises(UsageError, match="--from"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("a.tif", "auto", "expected a folder, or a table ending in .csv, .tsv, .parquet"),
        ("t.csv", "kaggle", "is a file; the layout kaggle needs the folder"),
        ("t.csv", "pcam", "is a file; the layout pcam needs the folder"),
        ("nothing", "auto", "no such folder or file"),
        (".", "table", "is a folder; the layout table needs the table itself"),
    ],
)
def test_a_file_for_a_folder_and_the_other_way_round_is_named(tmp_path: Path, name: str, source: str, message: str) -> None:
    write_noise(tmp_path / "a.tif")
    (tmp_path / "t.csv").write_text("path,label\na.tif,1\n")
    with pytest.raises(UsageError, match=message):
        opened(tmp_path / name, source=source)


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (class_folders, {"labels": Path("l.csv"), "source": "class_folders"}, "--labels: the layout class_folders has no labels file"),
        (class_folders, {"labels": Path("l.csv")}, "--labels: .* has the layout class_folders .*, which says the labels itself; leave --labels out"),
        (pcam, {"labels": Path("l.csv")}, "--labels: .* has the layout pcam .*, which says the labels itself; leave --labels out"),
        (pcam, {"slides": Path("s.csv")}, "--slides: the layout pcam takes the slides from its _meta.csv"),
        (class_folders, {"columns": {"path": "p"}}, "columns.path: the layout class_folders reads no such column"),
        (kaggle, {"columns": {"split": "p"}}, "columns.split: the layout kaggle reads no such column"),
    ],
)
def test_an_option_that_a_layout_does_not_read_is_an_error(
    tmp_path: Path, write: Callable[[Path], None], options: dict[str, object], message: str
) -> None:
    write(tmp_path)
    with pytest.raises(UsageError, match=message):
        opened(tmp_path, **options)  # type: ignore[arg-type]


def test_places_that_are_not_supported_are_named() -> None:
    with pytest.raises(ConfigError, match="http:// is not supported"):
        opened("http://example.org/patches")
