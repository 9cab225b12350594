"""Errors as RFC 9457 problems: one stable `type` per kind, one line of detail, nothing about our insides."""

from collections.abc import Mapping
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from sentinode.answers import Problem
from sentinode.errors import PatchErrorCode

PROBLEM_MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:sentinode:problem:"


@dataclass(frozen=True)
class ProblemKind:
    """A kind of problem: what `status` and `title` say whenever its `type` is used."""

    status: int
    title: str


KINDS: dict[str, ProblemKind] = {
    PatchErrorCode.EMPTY: ProblemKind(422, "The file is empty"),
    PatchErrorCode.NOT_AN_IMAGE: ProblemKind(422, "The file is not an image"),
    PatchErrorCode.FORMAT_NOT_ALLOWED: ProblemKind(415, "The image format is not accepted"),
    PatchErrorCode.TRUNCATED: ProblemKind(422, "The image is truncated or damaged"),
    PatchErrorCode.DECOMPRESSION_BOMB: ProblemKind(422, "The image claims to be far too large"),
    PatchErrorCode.WRONG_SIZE: ProblemKind(422, "The image has the wrong size"),
    PatchErrorCode.WRONG_MODE: ProblemKind(422, "The image has the wrong colour mode"),
    PatchErrorCode.SEVERAL_PAGES: ProblemKind(422, "The file holds several images"),
    "missing_file": ProblemKind(422, "The request holds no file"),
    "several_files": ProblemKind(422, "The request holds several files"),
    "invalid_request": ProblemKind(422, "The request is not valid"),
    "wrong_array": ProblemKind(422, "The array is not one of patches"),
    "wrong_length": ProblemKind(422, "The body has the wrong length"),
    "too_many_patches": ProblemKind(413, "The request holds too many patches"),
    "not_explainable": ProblemKind(404, "There is no map of this model"),
    "length_required": ProblemKind(411, "The request body must announce its length"),
    "body_timeout": ProblemKind(408, "The request body did not come in time"),
    "unsupported_media_type": ProblemKind(415, "The content type is not accepted"),
    "malformed_body": ProblemKind(400, "The request body cannot be read"),
    "invalid_request_id": ProblemKind(400, "The request id is not valid"),
    "unauthorized": ProblemKind(401, "An API key is needed"),
    "not_found": ProblemKind(404, "There is nothing here"),
    "method_not_allowed": ProblemKind(405, "The method is not allowed here"),
    "body_too_large": ProblemKind(413, "The request body is too large"),
    "overloaded": ProblemKind(429, "Too many requests are waiting"),
    "internal": ProblemKind(500, "Something went wrong here"),
    "engine_failed": ProblemKind(503, "The model did not answer"),
    "not_ready": ProblemKind(503, "Not ready"),
    "timeout": ProblemKind(504, "The request took too long"),
}
"""Every problem that this code answers. The keys are stable: clients may branch on them."""

_KIND_OF_STATUS = {
    400: "malformed_body",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    408: "body_timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
}


class ProblemError(HTTPException):
    """Ends a request with a problem.

    A Starlette HTTPException, so that one raised while the body is read passes through FastAPI's form parsing unchanged.
    """

    def __init__(self, kind: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(KINDS[kind].status, detail, dict(headers) if headers else None)
        self.kind = kind


def kind_of_status(status: int) -> str:
    """Return the kind for an error that only has a status (Starlette's own)."""
    return _KIND_OF_STATUS.get(status, "internal" if status >= 500 else "invalid_request")


def problem_of(kind: str, detail: str, request_id: str) -> Problem:
    """Return one problem."""
    of_kind = KINDS[kind]
    return Problem(type=TYPE_PREFIX + kind, title=of_kind.title, status=of_kind.status, detail=detail, request_id=request_id)


def problem_response(kind: str, detail: str, request_id: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return the response of one problem."""
    content = problem_of(kind, detail, request_id).model_dump()
    return JSONResponse(content, KINDS[kind].status, dict(headers) if headers else None, PROBLEM_MEDIA_TYPE)
