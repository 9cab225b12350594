"""The short way through a form with one file: whatever it reads, Starlette's parser reads too."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartParser

from serve.form_body import _lone_file

HEAD = b'Content-Disposition: form-data; name="file"; filename="a.tif"'


def form(content: bytes, head: bytes = HEAD, boundary: bytes = b"b", after: bytes = b"\r\n") -> bytes:
    return b"--" + boundary + b"\r\n" + head + b"\r\n\r\n" + content + b"\r\n--" + boundary + b"--" + after


def parsed(content_type: str, body: bytes) -> list[tuple[str, bytes | str]]:
    """What Starlette's parser reads."""

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield body
        yield b""

    async def read() -> list[tuple[str, bytes | str]]:
        items = (await MultiPartParser(Headers({"content-type": content_type}), chunks()).parse()).multi_items()
        return [(key, await value.read() if isinstance(value, UploadFile) else value) for key, value in items]

    return asyncio.run(read())


# Bytes of which forms are made, so that what looks like a boundary or the end of the headers turns up often.
pieces = st.sampled_from(
    [b"\r\n", b"--", b"b", b"--b", b"\r\n--b", b"--b--", b"\r\n--b--", b"\r\n\r\n", b"\n", b"x", b"\x00", b'"', b";", b"=", HEAD]
)
garbage = st.lists(pieces, max_size=12).map(b"".join)
words = [
    b"Content-Disposition",
    b"form-data",
    b"name",
    b"file",
    b"filename",
    b"a.tif",
    b"Content-Type",
    b"image/tiff",
    b": ",
    b"; ",
    b'"',
    b"=",
    b"\r\n",
]


@st.composite
def bent_forms(draw: st.DrawFn) -> bytes:
    """A good form, of which a word of the headers may be written otherwise, and what follows may be anything."""
    head = HEAD + draw(st.sampled_from([b"", b"\r\nContent-Type: image/tiff"]))
    for _ in range(draw(st.integers(0, 2))):
        word = draw(st.sampled_from([word for word in words if word in head] or [b""]))
        other = draw(st.sampled_from([word.upper(), word.lower(), word.title(), word + b" ", word + word, b"", b'"']))
        head = head.replace(word, other, draw(st.sampled_from([1, -1])))
    return form(draw(garbage), head, after=draw(st.sampled_from([b"", b"\r\n", b"\n", b"x", b"\r\n--b", b"\r\n--b--", b" "])))


def read_both_ways(body: bytes, content_type: str = "multipart/form-data; boundary=b") -> bytes | None:
    """What the short way reads, if it reads anything; then the parser must read the same."""
    lone = _lone_file(content_type, body)
    if lone is not None:
        assert parsed(content_type, body) == [("file", lone)]
    return lone


@settings(max_examples=2000, deadline=None)
@given(body=bent_forms())
@example(body=form(b""))
@example(body=form(b"x", HEAD.replace(b'"file"', b'"FILE"')))
@example(body=form(b"\r\n--b\r\n" + HEAD + b"\r\n\r\nx"))
def test_what_is_read_the_short_way_is_what_the_parser_reads(body: bytes) -> None:
    read_both_ways(body)


def test_forms_of_any_content_take_the_short_way_or_the_other() -> None:
    ways = set()

    @settings(max_examples=500, deadline=None, database=None, derandomize=True)
    @given(content=garbage)
    def check(content: bytes) -> None:
        ways.add(read_both_ways(form(content)) is None)

    check()
    assert ways == {True, False}


@pytest.mark.parametrize(
    "content_type",
    ["multipart/form-data; boundary=b", "multipart/form-data;boundary=b", 'multipart/form-data; boundary="b"', "Multipart/Form-Data; Boundary=b"],
)
@pytest.mark.parametrize("head", [HEAD, HEAD.lower(), HEAD + b"\r\nContent-Type: image/tiff"])
def test_what_clients_write_takes_the_short_way(content_type: str, head: bytes) -> None:
    content = b"II*\x00 \r\n\r\n -- b \r\n--"
    assert _lone_file(content_type, form(content, head)) == content


@pytest.mark.parametrize(
    ("content_type", "body"),
    {
        "a field in capitals": ("multipart/form-data; boundary=b", form(b"x", HEAD.replace(b'"file"', b'"FILE"'))),
        "another field": ("multipart/form-data; boundary=b", form(b"x", HEAD.replace(b'"file"', b'"image"'))),
        "no file": ("multipart/form-data; boundary=b", form(b"x", b'Content-Disposition: form-data; name="file"')),
        "a name with a quote": ("multipart/form-data; boundary=b", form(b"x", HEAD.replace(b"a.tif", b'a\\"b.tif'))),
        "an encoding": ("multipart/form-data; boundary=b", form(b"x", HEAD + b"\r\nContent-Transfer-Encoding: base64")),
        "two names": ("multipart/form-data; boundary=b", form(b"x", HEAD + b"; filename*=UTF-8''b")),
        "two files": ("multipart/form-data; boundary=b", form(b"x\r\n--b\r\n" + HEAD + b"\r\n\r\ny")),
        "cut": ("multipart/form-data; boundary=b", form(b"x")[:-8]),
        "something before": ("multipart/form-data; boundary=b", b"\r\n" + form(b"x")),
        "something after": ("multipart/form-data; boundary=b", form(b"x", after=b"\r\nx")),
        "another boundary": ("multipart/form-data; boundary=c", form(b"x")),
        "no boundary": ("multipart/form-data", form(b"x")),
        "two boundaries": ("multipart/form-data; boundary=b; boundary=c", form(b"x")),
        "a charset": ("multipart/form-data; boundary=b; charset=utf-16", form(b"x")),
        "nothing": ("multipart/form-data; boundary=b", b""),
    }.values(),
)
def test_whatever_is_unusual_is_left_to_the_parser(content_type: str, body: bytes) -> None:
    assert _lone_file(content_type, body) is None
