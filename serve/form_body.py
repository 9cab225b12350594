"""Bodies that are forms: one file for the routes about one patch, many for `/predict/batch`."""

import re
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile

from serve.middleware import tail_of_body
from serve.problems import ProblemError

ONE_FILE, MANY_FILES = "file", "files"

# RFC 2046, section 5.1.1: the characters of a boundary.
_BOUNDARY = re.compile(r"""multipart/form-data; ?boundary=("?)([0-9A-Za-z'()+_,./:=?-]{1,70})\1""", re.IGNORECASE)
_LONE_FILE = re.compile(
    rb"""Content-Disposition: form-data; name="file"; filename="[^"\\\r\n]*"(?:\r\nContent-Type: [^\r\n]*)?""",
    re.IGNORECASE,
)
_LONGEST_HEADERS = 1024


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
    lone = _lone_file(content_type, await request.body())
    if lone is not None:
        return lone
    form = await request.form(max_files=16, max_fields=16)
    files = [value for value in form.getlist(ONE_FILE) if isinstance(value, UploadFile)]
    if len(form.getlist(ONE_FILE)) > 1:
        raise ProblemError("several_files", "send one field `file` per request")
    if not files:
        raise _no_file(ONE_FILE)
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
    form = await request.form(max_files=max_files + 1, max_fields=16)
    boundary = request.headers["content-type"].partition("boundary=")[2].partition(";")[0].strip().strip('"')
    if not tail_of_body(request.scope).rstrip().endswith(f"--{boundary}--".encode("latin-1")):
        raise ProblemError("malformed_body", "the form does not end with its boundary: a part of it is missing")
    files = [value for key, value in form.multi_items() if key == MANY_FILES and isinstance(value, UploadFile)]
    if not files:
        raise _no_file(MANY_FILES)
    if len(files) < len(form.multi_items()):
        raise ProblemError("invalid_request", "the form holds something that is not a file of the field `files`")
    if len(files) > max_files:
        raise ProblemError("too_many_patches", f"a request may hold {max_files} patches at most")
    return files


def _no_file(field: str) -> ProblemError:
    return ProblemError("missing_file", f"expected multipart/form-data with the image as a file in the field `{field}`")
