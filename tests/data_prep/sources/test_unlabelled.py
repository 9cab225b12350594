import os
from pathlib import Path

import numpy as np
import pytest

from sentinode.errors import UsageError
from tests.data_prep.sources.helpers import column, opened, pixels, refused, write_noise


def test_every_image_of_a_folder_is_listed_without_label(tmp_path: Path) -> None:
    expected = write_noise(tmp_path / "a.tif")
    write_noise(tmp_path / "deep" / "er" / "b.PNG", 1)
    write_noise(tmp_path / "deep" / "c.jpeg", 2)
    write_noise(tmp_path / ".d.tif")
    write_noise(tmp_path / ".hidden" / "e.tif")
    (tmp_path / "notes.csv").write_text("a,b\n")
    read = opened(tmp_path, source="unlabelled")
    assert read.kind == "unlabelled"
    assert column(read, "id") == ["a", "deep/c", "deep/er/b"]
    assert column(read, "label") == [None, None, None]
    assert not read.is_labelled
    assert np.array_equal(pixels(read)["a"], expected)


def test_ids_keep_their_suffix_where_they_would_be_equal(tmp_path: Path) -> None:
    for name in ("a.tif", "a.png", "b.tif"):
        write_noise(tmp_path / name)
    assert column(opened(tmp_path, source="unlabelled"), "id") == ["a.png", "a.tif", "b.tif"]


def test_images_of_other_formats_are_refused_and_other_files_are_no_inputs(tmp_path: Path) -> None:
    for name in ("a.tif", "in/b.BMP", "in/c.ndpi", "notes.txt", "Thumbs.db", "README", ".hidden.bmp", ".svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    read = opened(tmp_path, source="unlabelled")
    assert refused(read) == [("format_not_allowed", "in/b"), ("format_not_allowed", "in/c")]
    assert read.inputs == 3
    (tmp_path / "a.tif").unlink()
    with pytest.raises(UsageError, match=r"no images \(.tif, .*\) there; 2 files there are refused: the name ends in .bmp"):
        opened(tmp_path, source="unlabelled")


def test_labels_that_are_there_are_not_read(tmp_path: Path) -> None:
    write_noise(tmp_path / "train" / "a.tif")
    (tmp_path / "train_labels.csv").write_text("id,label\na,1\n")
    assert column(opened(tmp_path, source="unlabelled"), "label") == [None]


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    write_noise(tmp_path / "in" / "a.tif")
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    assert column(opened(tmp_path, source="unlabelled"), "id") == ["in/a"]


def test_a_linked_folder_is_entered(tmp_path: Path) -> None:
    write_noise(tmp_path / "elsewhere" / "a.tif")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "linked").symlink_to(tmp_path / "elsewhere")
    assert column(opened(tmp_path / "source", source="unlabelled"), "id") == ["linked/a"]


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no images \(.tif, .*\) there"):
        opened(tmp_path, source="unlabelled")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    write_noise(tmp_path / "closed" / "a.tif")
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(UsageError, match=r"closed: cannot be listed \(Permission denied\)"):
            opened(tmp_path, source="unlabelled")
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_slides_are_joined_by_id(tmp_path: Path) -> None:
    write_noise(tmp_path / "in" / "s" / "a.tif")
    (tmp_path / "slides.csv").write_text("id,wsi\ns/a,S\n")
    read = opened(tmp_path / "in", source="unlabelled", slides=tmp_path / "slides.csv")
    assert column(read, "slide") == ["S"]
    assert refused(read) == []
