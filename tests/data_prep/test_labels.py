from pathlib import Path

import numpy as np
import pytest

from data_prep.labels import read_source
from sentinode.errors import UsageError
from tests.data_prep.helpers import noise, write_source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    return write_source(tmp_path / "source", {id_: noise(rng) for id_ in ("a", "b", "c")})


def set_labels(source: Path, text: str | bytes) -> None:
    (source / "train_labels.csv").write_bytes(text.encode() if isinstance(text, str) else text)


def reasons(source: Path, **options: object) -> list[tuple[str, str | None]]:
    return sorted((str(reject.reason), reject.id) for reject in read_source(source, **options).rejects)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "id,label\na,0\nb,1\nc,0\n",
        "\ufeffid,label\r\na,0\r\nb,1\r\nc,0\r\n",
        "id;label\na;0\nb;1\nc;0",
        "label\tid\n0\ta\n1\tb\n0\tc\n",
        'label,note,id\n0,"x, y",a\n1,,b\n\n0,,c\n',
        " ID , Label \n a , 0 \n b , 1 \n c , 0 \n",
    ],
    ids=["plain", "bom-crlf", "semicolon", "tab-reordered", "quoted-extra-column", "spaces-and-case"],
)
def test_common_dialects_read_alike(source: Path, text: str) -> None:
    set_labels(source, text)
    read = read_source(source)
    assert [(entry.id, entry.label, entry.path) for entry in read.entries] == [
        ("a", 0, "train/a.tif"),
        ("b", 1, "train/b.tif"),
        ("c", 0, "train/c.tif"),
    ]
    assert not read.rejects


def test_every_disagreement_becomes_a_reject(source: Path) -> None:
    set_labels(source, "id,label\na,2\nb,1\nb,1\nd,0\nc\n")
    assert reasons(source) == [("bad_label", "a"), ("bad_label", "c"), ("duplicate_id", "b"), ("duplicate_id", "b"), ("missing", "d")]
    set_labels(source, "id,label\na,1\n")
    assert reasons(source) == [("no_label", "b"), ("no_label", "c")]
    assert read_source(source).inputs == 3


def test_two_files_of_one_id_are_both_refused(source: Path) -> None:
    (source / "train" / "a.png").write_bytes(b"")
    assert reasons(source) == [("duplicate_id", "a"), ("duplicate_id", "a")]


def test_an_id_cannot_leave_the_folder(source: Path) -> None:
    (source / "outside.tif").write_bytes(b"")
    set_labels(source, "id,label\n../outside,1\na,0\nb,0\nc,0\n")
    assert reasons(source) == [("missing", "../outside")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,target\na,1\n", "columns 'image', 'target' found; expected id and label, each once"),
        ("id,label,id\na,1,a\n", "expected id and label, each once"),
        ("id,label\n", "no rows"),
        ("", "empty"),
        (b"id,label\n\xff\xfe,1\n", "not UTF-8"),
    ],
)
def test_an_unusable_labels_file_is_named(source: Path, text: str | bytes, message: str) -> None:
    set_labels(source, text)
    with pytest.raises(UsageError, match=message) as caught:
        read_source(source)
    assert "train_labels.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        read_source(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"slides file .*no\.csv"):
        read_source(source, slides=tmp_path / "no.csv")
    with pytest.raises(UsageError, match="needs --slides"):
        read_source(source, need_slides=True)
    (source / "train_labels.csv").rename(tmp_path / "labels.csv")
    with pytest.raises(UsageError, match=r"train_labels.csv.*--labels"):
        read_source(source)
    assert len(read_source(source, labels=tmp_path / "labels.csv").entries) == 3
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="no images"):
        read_source(empty, labels=tmp_path / "labels.csv")


def test_images_may_lie_directly_in_the_source(source: Path) -> None:
    read = read_source(source / "train", labels=source / "train_labels.csv")
    assert [entry.path for entry in read.entries] == ["a.tif", "b.tif", "c.tif"]


def test_slides_are_joined_and_must_be_known_where_they_decide(source: Path, tmp_path: Path) -> None:
    slides = tmp_path / "slides.csv"
    slides.write_text("id,wsi\na,s1\nb,s2\nother,s3\n")
    read = read_source(source, slides=slides)
    assert [entry.slide for entry in read.entries] == ["s1", "s2", None]
    assert reasons(source, slides=slides, need_slides=True) == [("no_slide", "c")]
    slides.write_text("id,wsi\na,s1\na,s2\n")
    with pytest.raises(UsageError, match="another slide"):
        read_source(source, slides=slides)


def test_the_digest_follows_labels_slides_and_images(source: Path, tmp_path: Path) -> None:
    slides = tmp_path / "slides.csv"
    slides.write_text("id,wsi\n")
    digests = {read_source(source).inputs_sha256, read_source(source).inputs_sha256}
    assert len(digests) == 1
    digests.add(read_source(source, slides=slides).inputs_sha256)
    (source / "train" / "a.tif").write_bytes(b"other")
    digests.add(read_source(source).inputs_sha256)
    set_labels(source, "id,label\na,1\nb,1\nc,0\n")
    digests.add(read_source(source).inputs_sha256)
    assert len(digests) == 4
