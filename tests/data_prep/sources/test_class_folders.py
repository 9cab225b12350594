from pathlib import Path

import numpy as np
import pytest

from sentinode.errors import UsageError
from tests.data_prep.sources.helpers import column, opened, pixels, refused, rows, write_noise


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for seed, name in enumerate(("normal/a.tif", "normal/slide 1/b.png", "metastatic/c.TIF", "metastatic/slide 1/d.jpg")):
        write_noise(tmp_path / "source" / name, seed)
    return tmp_path / "source"


def test_the_folder_is_the_label_and_the_path_in_it_the_id(source: Path) -> None:
    read = opened(source)
    assert read.kind == "class_folders"
    assert rows(read, "id", "label", "path") == [
        ("a", 0, "normal/a.tif"),
        ("c", 1, "metastatic/c.TIF"),
        ("slide 1/b", 0, "normal/slide 1/b.png"),
        ("slide 1/d", 1, "metastatic/slide 1/d.jpg"),
    ]
    assert read.rejects == ()


def test_the_reader_gives_the_files_pixels(source: Path) -> None:
    expected = write_noise(source / "normal" / "e.tif", 9)
    found = pixels(opened(source))
    assert np.array_equal(found["e"], expected)
    assert set(found) == {"a", "c", "e", "slide 1/b", "slide 1/d"}


def test_other_names_of_the_folders_are_a_setting(source: Path) -> None:
    (source / "normal").rename(source / "0")
    (source / "metastatic").rename(source / "1")
    assert column(opened(source, class_folders=("0", "1")), "label") == [0, 1, 0, 1]


def test_one_id_in_both_folders_or_twice_in_one_is_refused(source: Path) -> None:
    write_noise(source / "metastatic" / "a.tif")
    write_noise(source / "metastatic" / "c.png")
    read = opened(source)
    assert refused(read) == [("duplicate_id", "a")] * 2 + [("duplicate_id", "c")] * 2
    assert column(read, "id") == ["slide 1/b", "slide 1/d"]
    assert read.inputs == 6


def test_images_of_neither_class_are_refused_and_hidden_files_skipped(source: Path) -> None:
    write_noise(source / "unsorted" / "x.tif")
    write_noise(source / "y.tif")
    write_noise(source / "normal" / ".hidden.tif")
    write_noise(source / "normal" / ".thumbnails" / "a.tif")
    (source / "normal" / "notes.txt").write_text("no image")
    read = opened(source)
    assert refused(read) == [("no_label", "unsorted/x"), ("no_label", "y")]
    assert len(column(read, "id")) == 4


def test_a_name_that_is_not_utf8_is_refused(source: Path) -> None:
    with open(bytes(source) + b"/normal/\xff.tif", "wb"):
        pass
    assert refused(opened(source)) == [("unreadable", None)]


def test_a_class_without_images_is_named(source: Path) -> None:
    for path in (source / "metastatic").rglob("*.*"):
        path.unlink()
    with pytest.raises(UsageError, match="no images in its folder metastatic"):
        opened(source)


@pytest.mark.parametrize(
    ("names", "message"), [(("normal", "normal/slide 1"), "one lies in the other"), (("../x", "normal"), "no name of a folder inside")]
)
def test_folders_that_cannot_be_classes_are_refused(source: Path, names: tuple[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        opened(source, source="class_folders", class_folders=names)


def test_slides_are_joined_by_id(source: Path, tmp_path: Path) -> None:
    slides = tmp_path / "slides.csv"
    slides.write_text("id,wsi\na,s1\nslide 1/d,s2\n")
    assert column(opened(source, slides=slides), "slide") == ["s1", None, None, "s2"]


def test_the_digest_follows_every_image_and_no_order(source: Path) -> None:
    before = opened(source).inputs_sha256
    assert opened(source).inputs_sha256 == before
    (source / "normal" / "a.tif").rename(source / "metastatic" / "a.tif")
    write_noise(source / "normal" / "z.tif")
    assert opened(source).inputs_sha256 != before
