import os
from pathlib import Path

import numpy as np
import pytest

from data_prep.rejects import RejectReason
from data_prep.sources.base import Unread
from sentinode.errors import UsageError
from tests.data_prep.sources.helpers import column, opened, pixels, refused, rows, write_kaggle


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_kaggle(tmp_path / "source", ["a", "b", "c"])
    return tmp_path / "source"


def set_labels(source: Path, text: str | bytes) -> None:
    (source / "train_labels.csv").write_bytes(text.encode() if isinstance(text, str) else text)


@pytest.mark.parametrize(
    "text",
    [
        "id,label\na,0\nb,1\nc,0\n",
        "\ufeffid,label\r\na,0\r\nb,1\r\nc,0\r\n",
        "id;label\na;0\nb;1\nc;0",
        "id|label\na|0\nb|1\nc|0",
        "label\tid\n0\ta\n1\tb\n0\tc\n",
        'label,note,id\n0,"x, y",a\n1,,b\n\n0,,c\n',
        ",id,label\n0,a,0\n1,b,1\n2,c,0\n",
        " ID , Label \n a , 0 \n b , 1 \n c , 0 \n",
        'id;label;"note, long, with commas"\na;0;\nb;1;\nc;0;\n',
        '"id", "label"\n"a", "0"\n"b", "1"\n"c", "0"\n',
        "id,label\ra,0\rb,1\rc,0\r",
        "id,label," + ",".join(f"feature_{number}" for number in range(12_000)) + "".join(f"\n{row}{',' * 12_000}" for row in ("a,0", "b,1", "c,0")),
    ],
    ids=[
        "plain",
        "bom-crlf",
        "semicolon",
        "bar",
        "tab-reordered",
        "quoted-extra-column",
        "pandas-index",
        "spaces-and-case",
        "commas-in-header",
        "spaces-and-quotes",
        "old-mac",
        "wide",
    ],
)
def test_common_dialects_read_alike(source: Path, text: str) -> None:
    set_labels(source, text)
    read = opened(source)
    assert read.kind == "kaggle"
    assert rows(read, "id", "label", "path") == [("a", 0, "train/a.tif"), ("b", 1, "train/b.tif"), ("c", 0, "train/c.tif")]
    assert read.rejects == ()
    assert read.is_labelled


def test_every_disagreement_becomes_a_reject(source: Path) -> None:
    set_labels(source, "id,label\na,2\nb,1\nb,1\nd,0\nc\n")
    read = opened(source)
    assert refused(read) == [("bad_label", "a"), ("bad_label", "c"), ("duplicate_id", "b"), ("duplicate_id", "b"), ("missing", "d")]
    assert {reject.detail for reject in read.rejects} >= {
        "line 2 has label '2'; expected 0 or 1",
        "line 4; the id stands on lines 3, 4",
        "line 6 has 1 fields, the header 2",
    }
    set_labels(source, "id,label\na,1\n")
    read = opened(source)
    assert refused(read) == [("no_label", "b"), ("no_label", "c")]
    assert read.inputs == 3


def test_a_label_is_never_guessed(source: Path) -> None:
    set_labels(source, "id,label\na,0\nb,1.0\nc,true\n")
    assert refused(opened(source)) == [("bad_label", "b"), ("bad_label", "c")]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("a,0\n", [("duplicate_id", "train/a.png"), ("duplicate_id", "train/a.tif")]),
        ("a,7\n", [("bad_label", "train/a.png"), ("bad_label", "train/a.tif")]),
        ("a\n", [("bad_label", "train/a.png"), ("bad_label", "train/a.tif")]),
        ("a,0\na,1\n", [("duplicate_id", "train/a.png"), ("duplicate_id", "train/a.tif"), ("duplicate_id", "train/a.tif")]),
        ("", [("no_label", "train/a.png"), ("no_label", "train/a.tif")]),
    ],
)
def test_every_file_of_an_id_that_has_two_is_refused(source: Path, labels: str, expected: list[tuple[str, str]]) -> None:
    (source / "train" / "a.png").write_bytes(b"")
    set_labels(source, f"id,label\nb,1\nc,0\n{labels}")
    read = opened(source)
    assert column(read, "id") == ["b", "c"]
    assert sorted((str(reject.reason), str(reject.path)) for reject in read.rejects) == expected


def test_images_of_other_formats_are_refused_once(source: Path) -> None:
    for name in ("b.bmp", "d.svs", "e.gif", "notes.txt"):
        (source / "train" / name).write_bytes(b"")
    set_labels(source, "id,label\na,0\nb,1\nc,0\nd,0\nf,1\n")
    read = opened(source)
    assert column(read, "id") == ["a", "b", "c"]
    assert [(str(reject.reason), reject.id, reject.path) for reject in sorted(read.rejects)] == [
        ("format_not_allowed", "b", "train/b.bmp"),
        ("format_not_allowed", "d", "train/d.svs"),
        ("format_not_allowed", "e", "train/e.gif"),
        ("missing", "f", None),
    ]


def test_a_whole_slide_among_the_patches_is_refused_without_reading_it(source: Path) -> None:
    os.truncate(source / "train" / "b.tif", 70 << 20)
    read = opened(source)
    assert refused(read) == [("unreadable", "b")]
    assert column(read, "id") == ["a", "c"]


def test_an_id_too_long_to_be_one_is_named(source: Path) -> None:
    set_labels(source, f"id,label\na,0\n{'x' * 300},1\n")
    with pytest.raises(UsageError, match=r"train_labels.csv: line 3 has id 'xxx.*…, 300 characters; expected at most 255; a table"):
        opened(source)


def test_an_id_cannot_leave_the_folder(source: Path) -> None:
    (source / "outside.tif").write_bytes(b"")
    set_labels(source, "id,label\n../outside,1\na,0\nb,0\nc,0\n")
    assert refused(opened(source)) == [("missing", "../outside")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "image,target\na,1\n",
            r"columns 'image', 'target' found; expected id and label, each once; .*--set columns.id=NAME --set columns.label=NAME",
        ),
        ("id,label,id\na,1,a\n", "expected id and label, each once"),
        ("id,label\n", "no rows"),
        ("", "empty"),
        ("x" * 140_000 + "\n", "line 1 is not CSV .field larger than field limit"),
        (b"id,label\ra,0\r\xff,1\r", "not UTF-8 text .byte 0xff in line 3."),
        ("\n  \n", "empty"),
        (b"id,label\n\xff\xfe,1\n", "not UTF-8 text .byte 0xff in line 2."),
        ("id,label\na,1\n".encode("utf-16"), "UTF-16.*save it as CSV .UTF-8."),
        ("id,label\na,1\n".encode("utf-16-le"), "UTF-16"),
        (b"PK\x03\x04\x14\x00", "Excel workbook"),
        ('id,label\na,"0\nb,1\nc,0\n', "is not CSV"),
        ("id,label\na,0.0\nb,1.0\nc,0.0\n", "none of its 3 lines has a usable label; line 2 has label '0.0'; expected 0 or 1"),
        ("id,label\n1,a,0\n2,b,1\n3,c,0\n", "none of its 3 lines has a usable label; line 2 has 3 fields, the header 2"),
        (
            "id,label\na.tif,0\nb.tif,1\n",
            "none of its 2 ids, the first 'a.tif', names an image in .*; the first image is 'a.tif'; .*without its suffix",
        ),
    ],
)
def test_an_unusable_labels_file_is_named(source: Path, text: str | bytes, message: str) -> None:
    set_labels(source, text)
    with pytest.raises(UsageError, match=message) as caught:
        opened(source)
    assert "train_labels.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_column_names_are_mapped(source: Path, tmp_path: Path) -> None:
    set_labels(source, "Image,Target\na,0\nb,1\nc,0\n")
    columns = {"id": "image", "label": "target"}
    assert column(opened(source, columns=columns), "label") == [0, 1, 0]
    slides = tmp_path / "slides.csv"
    slides.write_text("image,wsi\na,s1\n")
    assert column(opened(source, columns=columns, slides=slides), "slide") == ["s1", None, None]
    slides.write_text("id,wsi\na,s1\n")
    assert column(opened(source, columns=columns, slides=slides), "slide") == ["s1", None, None]
    with pytest.raises(UsageError, match=r"columns 'Image', 'Target' found; expected 'image' .columns.id. and 'tumour' .columns.label., each once"):
        opened(source, columns={"id": "image", "label": "tumour"})


def test_what_is_missing_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        opened(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"slides file .*no\.csv"):
        opened(source, slides=tmp_path / "no.csv")
    (source / "train_labels.csv").rename(tmp_path / "labels.csv")
    with pytest.raises(UsageError, match=r"train_labels.csv.*--labels"):
        opened(source)
    assert len(column(opened(source, labels=tmp_path / "labels.csv"), "id")) == 3
    with pytest.raises(UsageError, match="Is a directory"):
        opened(source, labels=source)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="no images"):
        opened(empty, labels=tmp_path / "labels.csv")


def test_images_may_lie_directly_in_the_source(source: Path) -> None:
    read = opened(source / "train", labels=source / "train_labels.csv")
    assert column(read, "path") == ["a.tif", "b.tif", "c.tif"]
    assert set(pixels(read)) == {"a", "b", "c"}


def test_slides_are_joined(source: Path, tmp_path: Path) -> None:
    slides = tmp_path / "slides.csv"
    slides.write_text("id,wsi\na,s1\nb,s2\nother,s3\n")
    read = opened(source, slides=slides)
    assert column(read, "slide") == ["s1", "s2", None]
    assert read.files == {"labels": str(source / "train_labels.csv"), "slides": str(slides)}
    slides.write_text("id,wsi\na,s1\na,s2\n")
    with pytest.raises(UsageError, match="line 3 gives an id another slide"):
        opened(source, slides=slides)
    slides.write_text("id,wsi\na,s1,x\n")
    with pytest.raises(UsageError, match="line 2 has 3 fields, the header 2"):
        opened(source, slides=slides)
    slides.write_text("id,slide\na,s1\n")
    with pytest.raises(UsageError, match=r"slides file .*'slide' found; expected id and wsi.*--set columns.wsi=NAME"):
        opened(source, slides=slides)


def test_the_digest_follows_labels_slides_and_images(source: Path, tmp_path: Path) -> None:
    slides = tmp_path / "slides.csv"
    slides.write_text("id,wsi\na,s1\n")
    digests = {opened(source).inputs_sha256, opened(source).inputs_sha256}
    assert len(digests) == 1
    digests.add(opened(source, slides=slides).inputs_sha256)
    (source / "train" / "a.tif").write_bytes(b"other")
    digests.add(opened(source).inputs_sha256)
    set_labels(source, "id,label\na,1\nb,1\nc,0\n")
    digests.add(opened(source).inputs_sha256)
    assert len(digests) == 4


def test_the_reader_gives_the_files_pixels(tmp_path: Path) -> None:
    images = write_kaggle(tmp_path / "source", ["a", "b", "c"])
    for id_, found in pixels(opened(tmp_path / "source")).items():
        assert np.array_equal(found, images[id_])


def test_what_cannot_be_read_is_said_for_each_file(source: Path) -> None:
    read = opened(source)
    (source / "train" / "a.tif").unlink()
    (source / "train" / "b.tif").unlink()
    os.mkfifo(source / "train" / "b.tif")
    os.truncate(source / "train" / "c.tif", 1 << 30)
    found = pixels(read)
    assert found["a"] == Unread(RejectReason.MISSING, "No such file or directory")
    assert found["b"] == Unread(RejectReason.UNREADABLE, "not a file")
    assert isinstance(found["c"], Unread)
    assert "1073741824 bytes" in found["c"].detail
    (source / "train" / "a.tif").symlink_to(source / "nowhere")
    assert pixels(read)["a"] == Unread(RejectReason.UNREADABLE, "a link to nothing")


def test_names_that_are_not_utf8_are_refused_not_fatal(source: Path) -> None:
    with open(os.fsencode(source / "train") + b"/\xff.tif", "wb"):
        pass
    read = opened(source)
    assert refused(read) == [("unreadable", None)]
    assert len(column(read, "id")) == 3
