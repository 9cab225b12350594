"""Bodies that are forms: one file for the routes about one patch, many for `/predict/batch`."""

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from serve.problems import ProblemError

ONE_FILE, MANY_FILES = "file", "files"

# RFC 2046, section 5.1.1: the characters of a boundary.
_BOUNDARY = re.compile(r"""multipart/form-data; ?boundary=("?)([0-9A-Za-z'()+_,./:=?-]{1,70})\1""", re.IGNORECASE)
_LONE_FILE = re.compile(
    rb"""Content-Disposition: form-data; name=(?-i:"file"); filename="[^"\\\r\n]*"(?:\r\nContent-Type: [^\r\n]*)?""",
    re.IGNORECASE,
)
_LONGEST_HEADERS = 1024
_MOST_FIELDS = 16
# A mebibyte of what looks like boundaries takes the parser a tenth of a second.
_PIECE_BYTES = 32 * 1024
# Of a form: its end, and line breaks after it.
_LAST_BYTES = 256


def form_of(field: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Return how OpenAPI describes a form of one field."""
    return {"multipart/form-data": {"schema": {"type": "object", "properties": {field: schema}, "required": [field]}}}


async def one_file(request: Request) -> bytes:
    """Return the file in the field `file`.

    Raises
    ------
    ProblemError
        There is none, there are several, or the form cannot be read.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        raise _no_file(ONE_FILE)
    body = await request.body()
    lone = _lone_file(content_type, body)
    if lone is not None:
        return lone
    form = await _parsed(request, _once(body), max_files=_MOST_FIELDS)
    files = form.getlist(ONE_FILE)
    if len(files) > 1:
        # One of several would be answered about, and nobody knows which.
        raise ProblemError("several_files", "send one field `file` per request")
    if not files or not isinstance(files[0], UploadFile):
        raise _no_file(ONE_FILE)
    if len(form.multi_items()) > 1:
        # A spacing that was passed over would be taken for one that fits.
        raise ProblemError("invalid_request", "the form holds something beside the file; `spacing_um_px` and `opacity` go into the query")
    return await files[0].read()


def _lone_file(content_type: str, body: bytes) -> bytes | None:
    """Return the file of a form as nearly all clients write it, with nothing else in it; None where anything is unusual.

    Starlette's parser, which then reads the form, takes a third of all that a request costs.
    """
    given = _BOUNDARY.fullmatch(content_type)
    if given is None:
        return None
    boundary = b"--" + given[2].encode()
    headers_end = body.find(b"\r\n\r\n", 0, _LONGEST_HEADERS)
    start, end = headers_end + 4, body.rfind(b"\r\n" + boundary + b"--")
    if not body.startswith(boundary + b"\r\n") or headers_end < 0 or end < start or body[end:].strip() != boundary + b"--":
        return None
    if _LONE_FILE.fullmatch(body, len(boundary) + 2, headers_end) is None or body.find(b"\r\n" + boundary, headers_end) != end:
        return None
    return body[start:end]


async def many_files(request: Request, max_files: int) -> list[UploadFile]:
    """Return the files in the field `files`, all of them: one that was passed over would shift the answers of those after it.

    Raises
    ------
    ProblemError
        There are none or too many, there is something else, or the form is not whole.
    """
    # One more, so that it is us who refuse.
    form = await _parsed(request, request.stream(), max_files=max_files + 1)
    files = [value for key, value in form.multi_items() if key == MANY_FILES and isinstance(value, UploadFile)]
    if not files:
        raise _no_file(MANY_FILES)
    if len(files) < len(form.multi_items()):
        raise ProblemError("invalid_request", "the form holds something that is not a file of the field `files`; `spacing_um_px` goes into the query")
    if len(files) > max_files:
        raise ProblemError("too_many_patches", f"a request may hold {max_files} patches at most")
    return files


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


async def _parsed(request: Request, body: AsyncGenerator[bytes, None], max_files: int) -> FormData:
    """Parse a whole form in pieces, between which other requests have their turn."""
    boundary = parse_options_header(request.headers["content-type"])[1].get(b"boundary", b"")
    end = _End(b"--" + boundary + b"--")

    async def pieces() -> AsyncGenerator[bytes, None]:
        async for chunk in body:
            for start in range(0, len(chunk), _PIECE_BYTES):
                piece = chunk[start : start + _PIECE_BYTES]
                end.see(piece)
                yield piece
                await asyncio.sleep(0)

    try:
        form = await MultiPartParser(request.headers, pieces(), max_files=max_files, max_fields=_MOST_FIELDS).parse()
    except (HTTPException, ClientDisconnect):
        raise
    except MultiPartException as error:
        raise ProblemError("malformed_body", error.message) from error
    except Exception as error:
        # The parser trusts what a form says about itself, such as its character set.
        raise ProblemError("malformed_body", "the form cannot be read") from error
    if not end.came_once_and_last:
        raise ProblemError("malformed_body", "the form does not end with its boundary: a part of it is missing, or comes after its end")
    return form


class _End:
    """Whether the end of a form came, once, with nothing after it: the parser minds neither a form that is cut nor what follows its end."""

    def __init__(self, mark: bytes) -> None:
        self._mark, self._count = mark, 0
        # A form without parts begins with its end.
        self._tail = self._last = b"\r\n"

    def see(self, piece: bytes) -> None:
        seen = self._tail + piece
        self._count += seen.count(b"\r\n" + self._mark)
        # One byte short of what is counted, so that nothing is counted twice.
        self._tail = seen[-(len(self._mark) + 1) :]
        self._last = (self._last + piece)[-_LAST_BYTES:]

    @property
    def came_once_and_last(self) -> bool:
        return self._count == 1 and self._last.rstrip().endswith(self._mark)


def _no_file(field: str) -> ProblemError:
    return ProblemError("missing_file", f"expected multipart/form-data with the image as a file, with a file name, in the field `{field}`")
