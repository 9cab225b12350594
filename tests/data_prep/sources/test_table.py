import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.rejects import RejectReason
from data_prep.sources.base import Unread
from data_prep.sources.detect import reader_of
from sentinode.errors import ConfigError, UsageError
from tests.data_prep.sources.helpers import column, opened, pixels, refused, rows, write_noise


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("a.tif", "in/b.png", "in/c.tif")):
        write_noise(tmp_path / "images" / name, seed)
    return tmp_path / "images"


def table(folder: Path, text: str, name: str = "table.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_paths_and_labels_are_enough(folder: Path) -> None:
    read = opened(table(folder, "path,label\na.tif,0\nin/b.png,1\nin/c.tif,0\n"))
    assert read.kind == "table"
    assert rows(read, "id", "label", "path", "split") == [
        ("a", 0, "a.tif", None),
        ("b", 1, "in/b.png", None),
        ("c", 0, "in/c.tif", None),
    ]
    assert np.array_equal(pixels(read)["a"], write_noise(folder / "other.tif", 0))


FULL = [
    ("id", "path", "label", "slide", "centre", "x_px", "y_px", "split"),
    ("p1", "a.tif", 1, "s", "Utrecht", 12, -3, "train"),
    ("p2", "in/b.png", 0, None, None, None, None, "val"),
]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "categories", "pandas", "string_view", "large_string"])
def test_every_column_is_read_from_every_kind_of_table(folder: Path, kind: str) -> None:
    header, *lines = FULL
    if kind in ("csv", "tsv"):
        separator = "," if kind == "csv" else "\t"
        cells = [separator.join("" if value is None else str(value) for value in line) for line in FULL]
        where = table(folder, "\n".join(cells), f"table.{kind}")
    else:
        columns = pa.table(dict(zip(header, map(list, zip(*lines, strict=True)), strict=True)))
        if kind == "categories":
            for name in ("split", "slide"):
                columns = columns.set_column(columns.schema.get_field_index(name), name, columns[name].dictionary_encode())
        elif kind in ("string_view", "large_string"):
            text = pa.type_for_alias(kind)
            columns = columns.cast(pa.schema([(field.name, text if pa.types.is_string(field.type) else field.type) for field in columns.schema]))
        elif kind == "pandas":
            columns = pa.Table.from_pandas(columns.to_pandas())
        where = folder / "table.parquet"
        pq.write_table(columns, where)
    assert rows(opened(where), *header) == lines


@pytest.mark.parametrize(
    ("given", "known"), [("train", "train"), ("VAL", "val"), ("valid", "val"), ("validation", "val"), ("test", "test"), ("", None)]
)
def test_the_usual_names_of_splits_are_known(folder: Path, given: str, known: str | None) -> None:
    assert column(opened(table(folder, f"path,label,split\na.tif,0,{given}\n")), "split") == [known]


def test_paths_may_be_relative_absolute_or_uris(folder: Path, tmp_path: Path) -> None:
    away = tmp_path / "elsewhere" / "d.tif"
    expected = write_noise(away, 7)
    read = opened(table(folder, f"id,path,label\n1,{away},0\n2,file://{away},1\n3,a.tif,0\n4,../elsewhere/d.tif,0\n"))
    found = pixels(read)
    assert all(np.array_equal(found[id_], expected) for id_ in "124")
    assert not np.array_equal(found["3"], expected)


def test_equal_stems_make_the_whole_path_the_id(folder: Path) -> None:
    write_noise(folder / "in" / "a.tif")
    read = opened(table(folder, "path,label\na.tif,0\nin/a.tif,1\nin/c.tif,0\n"))
    assert column(read, "id") == ["a", "in/a", "in/c"]


def test_what_is_named_twice_is_refused(folder: Path) -> None:
    read = opened(table(folder, "path,label\na.tif,0\na.tif,1\nin/b.png,1\n"))
    assert refused(read) == [("duplicate_id", "a"), ("duplicate_id", "a")]
    assert column(read, "id") == ["in/b"]


def test_lines_that_cannot_be_used_are_refused_with_their_reason(folder: Path) -> None:
    read = opened(table(folder, "id,path,label\n1,a.tif,0\n2,in/b.png,maybe\n3,,1\n4,in/c.tif\n"))
    assert refused(read) == [("bad_label", "2"), ("bad_label", "4"), ("missing", "3")]
    assert sorted(reject.detail for reject in read.rejects) == [
        "line 3 has label 'maybe'; expected 0 or 1",
        "line 4 names no path",
        "line 5 has 2 fields, the header 3",
    ]


def test_a_file_that_is_not_there_is_missing(folder: Path) -> None:
    read = opened(table(folder, "path,label\na.tif,0\ngone.tif,1\n"))
    assert pixels(read)["gone"] == Unread(RejectReason.MISSING, "No such file or directory")


def test_a_table_without_labels_must_be_called_unlabelled(folder: Path) -> None:
    where = table(folder, "path\na.tif\n")
    with pytest.raises(UsageError, match=r"columns 'path' found; expected path and label"):
        opened(where)
    read = opened(where, source="unlabelled")
    assert rows(read, "id", "label") == [("a", None)]
    assert column(opened(table(folder, "path,label\na.tif,1\n"), source="unlabelled"), "label") == [None]


def test_other_column_names_are_mapped(folder: Path) -> None:
    where = table(folder, "File Name;Tumour;wsi\na.tif;1;s1\n")
    assert rows(opened(where, columns={"path": "file name", "label": "tumour", "slide": "wsi"}), "id", "label", "slide") == [("a", 1, "s1")]
    with pytest.raises(UsageError, match=r"expected path, label and 'patient' .columns.slide."):
        opened(table(folder, "path,label\na.tif,1\n"), columns={"slide": "patient"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "path,label\nhttp://169.254.169.254/x.tif,1\n",
            "line 2 has a path that begins with http://; expected a plain path or one of file://, s3://",
        ),
        ("path,label\nfile:///x.tif,1\nfile://host/x.tif,0\n", "line 3 has path 'file://host/x.tif'; expected file:///"),
        ("path,label,split\na.tif,0,train\nin/b.png,1,holdout\n", "line 3 has split 'holdout'; expected one of train, val"),
        ("path,label,x_px\na.tif,0,1.5\n", "line 2 has x_px '1.5'; expected a whole number"),
        ("path,label,x_px\na.tif,0,99999999999999999999\n", "line 2 has x_px '99999999999999999999'; expected a whole number"),
        ("path,label,x_px\na.tif,0,9223372036854775808\n", "line 2 has x_px '9223372036854775808'; expected a whole number"),
        ("path,label,x_px\na.tif,0,1_0\n", "line 2 has x_px '1_0'; expected a whole number"),
        (f"id,path,label\n1,a.tif,0\n{'x' * 256},a.tif,0\n", "line 3 has id 'xxx.*…, 256 characters; expected at most 255; a table with a column id"),
        (f"path,label\nin/{'x' * 300}.tif,0\n", "line 2 has id 'xxx.*…, 300 characters"),
        (f"path,label,slide\na.tif,0,{'x' * 300}\n", "line 2 has slide 'xxx.*…, 300 characters; expected at most 255$"),
        ("id,path,label\n,a.tif,0\n", "line 2 has no id; give every line one, or leave the column out"),
        ("path,label\n", "no lines"),
        ("path,label\na.tif,benign\nin/b.png,malignant\n", "none of its 2 lines has a usable label; line 2 has label 'benign'; expected 0 or 1"),
        ("path,label\nx/a.tif,0\nx/b.png,1\n", "none of the 2 files that it names exists; the first is 'x/a.tif', looked for in"),
        ("file,target\na.tif,0\n", "columns 'file', 'target' found; expected path and label, each once"),
    ],
)
def test_an_unusable_table_is_named_with_line_and_value(folder: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        opened(table(folder, text))
    assert "table.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": ["a.tif"], "label": [1.0]}, "column 'label' is of type double; expected whole numbers"),
        ({"path": ["a.tif"], "label": [True]}, "column 'label' is of type bool; expected whole numbers"),
        ({"path": [b"a.tif"], "label": [1]}, "column 'path' is of type binary; expected text"),
        ({"path": ["a.tif"], "label": [1], "x_px": [0.5]}, "column 'x_px' has values that are no whole numbers"),
        ({"path": ["a.tif", "in/b.png"], "label": [2, None]}, "none of its 2 rows has a usable label; row 1 has label '2'"),
        ({"path": ["a.tif"]}, "columns 'path' found; expected path and label"),
        ({"path": ["a.tif"], "label": [1], "x_px": pa.array([2**64 - 1], pa.uint64())}, "row 1 has x_px '18446744073709551615'; expected a whole"),
        ({"path": ["a.tif"], "label": [1], "x_px": [1e20]}, "column 'x_px' has values that are no whole numbers"),
        ({"path": pa.array([b"\xff"]).view(pa.string()), "label": [1]}, "column 'path' cannot be read as text"),
    ],
)
def test_types_are_not_guessed_at(folder: Path, columns: dict[str, object], message: str) -> None:
    pq.write_table(pa.table(columns), folder / "table.parquet")
    with pytest.raises(UsageError, match=message):
        opened(folder / "table.parquet")


def test_a_damaged_parquet_file_is_named(folder: Path) -> None:
    (folder / "table.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UsageError, match=r"table.parquet: cannot be read as Parquet"):
        opened(folder / "table.parquet")


def test_slides_come_from_the_table_or_a_slides_file_not_both(folder: Path) -> None:
    slides = table(folder, "id,wsi\na,s1\n", "slides.csv")
    assert column(opened(table(folder, "path,label\na.tif,0\nin/b.png,1\n"), slides=slides), "slide") == ["s1", None]
    with pytest.raises(UsageError, match=r"slides.csv: names none of the 1 ids of the source; its first is 'a', the source's 'b'"):
        opened(table(folder, "path,label\nin/b.png,1\n"), slides=slides)
    with pytest.raises(UsageError, match="has a column slide; leave --slides out"):
        opened(table(folder, "path,label,slide\na.tif,0,s2\n"), slides=slides)


def test_a_store_without_its_package_is_named_before_work_begins(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"gs:// needs gcsfs"):
        opened(table(folder, "path,label\ngs://bucket/a.tif,0\n"))


def test_a_whole_slide_among_the_patches_is_refused_without_reading_it(folder: Path) -> None:
    os.truncate(folder / "a.tif", 70 << 20)
    read = opened(table(folder, "path,label\na.tif,0\nin/b.png,1\n"))
    assert refused(read) == [("unreadable", "a")]
    assert column(read, "id") == ["b"]


def test_the_reader_too_opens_only_places_that_are_allowed(folder: Path) -> None:
    read = opened(table(folder, "path,label\na.tif,0\n"))
    forged = read.entries.set_column(2, read.entries.schema.field("path"), pa.array(["http://169.254.169.254/x.tif"]))
    with pytest.raises(UsageError, match="a path that begins with http://; expected a plain path or one of file://, s3://"):
        list(reader_of(read.reader).read(forged))


def test_the_digest_follows_the_table_and_local_images(folder: Path) -> None:
    where = table(folder, "path,label\na.tif,0\n")
    before = opened(where).inputs_sha256
    assert opened(where).inputs_sha256 == before
    (folder / "a.tif").write_bytes(b"other")
    after = opened(where).inputs_sha256
    table(folder, "path,label\na.tif,1\n")
    assert len({before, after, opened(where).inputs_sha256}) == 3
