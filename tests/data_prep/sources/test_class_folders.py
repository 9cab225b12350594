import os
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


def test_equal_names_in_both_folders_put_the_folder_into_every_id(source: Path) -> None:
    write_noise(source / "metastatic" / "a.tif")
    read = opened(source)
    assert rows(read, "id", "label") == [
        ("metastatic/a", 1),
        ("metastatic/c", 1),
        ("metastatic/slide 1/d", 1),
        ("normal/a", 0),
        ("normal/slide 1/b", 0),
    ]
    assert read.rejects == ()


def test_two_files_of_one_name_in_one_folder_are_refused(source: Path) -> None:
    write_noise(source / "metastatic" / "c.png")
    read = opened(source)
    assert refused(read) == [("duplicate_id", "c")] * 2
    assert column(read, "id") == ["a", "slide 1/b", "slide 1/d"]
    write_noise(source / "metastatic" / "a.tif")
    read = opened(source)
    assert refused(read) == [("duplicate_id", "metastatic/c")] * 2
    assert column(read, "id") == ["metastatic/a", "metastatic/slide 1/d", "normal/a", "normal/slide 1/b"]
    assert read.inputs == 6


def test_images_of_other_formats_are_refused_one_by_one(source: Path) -> None:
    for name in ("normal/a.bmp", "metastatic/deep/whole.SVS", "e.gif", "normal/.x.gif"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"")
    before = opened(source)
    assert refused(before) == [("format_not_allowed", id_) for id_ in ("e", "metastatic/deep/whole", "normal/a")]
    assert before.rejects[0].detail.startswith("the name ends in .gif; expected .tif")
    (source / "e.gif").unlink()
    assert opened(source).inputs_sha256 != before.inputs_sha256


def test_a_whole_slide_among_the_patches_is_refused_without_reading_it(source: Path) -> None:
    os.truncate(source / "normal" / "a.tif", 70 << 20)
    read = opened(source)
    assert refused(read) == [("unreadable", "a")]
    assert read.rejects[0].detail == "73400320 bytes; a patch has fewer than 67108864"


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
    slides.write_text("id,wsi\na.tif,s1\nslide 1/d.jpg,s2\n")
    with pytest.raises(UsageError, match=r"slides.csv: names none of the 4 ids of the source; its first is 'a.tif', the source's 'a'"):
        opened(source, slides=slides)
    slides.write_text("id,wsi\n")
    with pytest.raises(UsageError, match=r"slides.csv: no rows below the header"):
        opened(source, slides=slides)
    slides.write_text(f"id,wsi\na,{'s' * 300}\n")
    with pytest.raises(UsageError, match=r"line 2 has slide 'sss.*…, 300 characters; expected at most 255"):
        opened(source, slides=slides)
    slides.write_text("id,wsi\na,\na,s1\na,\n")
    assert column(opened(source, slides=slides), "slide") == ["s1", None, None, None]


def test_a_path_too_long_for_an_id_is_named(source: Path) -> None:
    write_noise(source / "normal" / ("x" * 200) / f"{'y' * 100}.tif")
    with pytest.raises(UsageError, match=r"source .*: has id 'xxx.*…, 301 characters; expected at most 255; a table with a column id can name"):
        opened(source)


def test_the_digest_follows_every_image_and_no_order(source: Path) -> None:
    before = opened(source).inputs_sha256
    assert opened(source).inputs_sha256 == before
    (source / "normal" / "a.tif").rename(source / "metastatic" / "a.tif")
    write_noise(source / "normal" / "z.tif")
    assert opened(source).inputs_sha256 != before
