"""The routes that answer about patches, which need a key: /predict, /predict/batch, /explain and /model."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from io import BytesIO
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, File, Query, Request, UploadFile
from fastapi.security import APIKeyHeader, HTTPBearer
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile as ReceivedFile
from starlette.responses import Response

from sentinode import RESEARCH_USE_NOTICE
from sentinode.answers import BATCH, ModelCard, Prediction, Problem, Speaker
from sentinode.config import ServeConfig
from sentinode.errors import PatchError
from sentinode.images import UInt8Array
from sentinode.manifests import BundleManifest
from sentinode.probability import Decision
from serve.backend import WatchedBackend
from serve.batch_body import ARRAY_TYPES, pieces_of_array
from serve.measures import measures
from serve.middleware import request_id_of, tail_of_body
from serve.patches import patch_from_bytes
from serve.problems import PROBLEM_MEDIA_TYPE, ProblemError, problem_of

PIECES_IN_FLIGHT = 2
"""Of one request: while one piece is with the engine the next is read and decoded. More would only take memory and keep other callers waiting."""

_WHAT = {
    400: "Unreadable request",
    401: "No key, or an unknown one",
    404: "There is no such thing",
    408: "The body did not come in time",
    411: "The body has no length",
    413: "Body too large",
    415: "Image format or content type not accepted",
    422: "Not one usable patch",
    429: "Too many requests waiting; see Retry-After",
    500: "Unexpected error",
    503: "Model unavailable; see Retry-After",
    504: "Took too long",
}

OnePatch = Annotated[UploadFile, File(description="One patch: TIFF, PNG, JPEG or WebP of the model's `patch_size_px`, 8-bit RGB")]

Spacing = Annotated[
    float | None,
    Query(
        gt=0,
        le=1000,
        allow_inf_nan=False,
        description="Physical size of a pixel of the patch, micrometres. Where it differs from the model's the answer says `wrong_spacing`.",
        examples=[0.972],
    ),
]


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return FastAPI's `responses` for problems of these statuses."""
    content = {PROBLEM_MEDIA_TYPE: {"schema": Problem.model_json_schema()}}
    return {status: {"description": _WHAT[status], "content": content} for status in statuses}


def prediction_router(backend: WatchedBackend, manifest: BundleManifest, config: ServeConfig) -> APIRouter:
    """Return the routes, without a prefix.

    Parameters
    ----------
    backend : WatchedBackend
    manifest : BundleManifest
        Of the bundle behind `backend`.
    config : ServeConfig
    """
    # For /docs only, where they make the "Authorize" button: the middleware has judged the key before the body was read.
    keys = [Depends(APIKeyHeader(name="X-API-Key", auto_error=False)), Depends(HTTPBearer(auto_error=False))] if config.auth == "keys" else []
    router, side = APIRouter(dependencies=keys), manifest.patch_size_px
    what = f"TIFF, PNG, JPEG or WebP, {side}x{side}, 8-bit RGB"
    card = ModelCard.of(manifest)
    reading = 0

    def told(decision: Decision, speaker: Speaker, request: Request, spacing_um_px: float | None) -> Prediction:
        reason = speaker.spacing_reason(spacing_um_px, tolerance=config.spacing_tolerance, expected=config.expect_spacing)
        prediction = Prediction.of(decision, speaker, request_id_of(request.scope), spacing_um_px, reason)
        measures().decided(decision, prediction.needs_review)
        return prediction

    async def one_patch(request: Request, file: UploadFile) -> UInt8Array:
        # FastAPI would take the last of several and answer about that one.
        if len((await request.form()).getlist("file")) > 1:
            raise ProblemError("several_files", "send one field `file` per request")
        # Decoding takes a millisecond or two; on the event loop it would hold up every other request.
        return await run_in_threadpool(patch_from_bytes, await file.read(), side, config.allow_resize)

    @router.post(
        "/predict",
        summary="Classify one patch",
        tags=["prediction"],
        responses=documented(400, 401, 408, 413, 415, 422, 429, 500, 503, 504),
    )
    async def predict(request: Request, file: OnePatch, spacing_um_px: Spacing = None) -> Prediction:
        """Say whether the centre 32x32 pixels of a patch hold tumour tissue, with a calibrated probability and whether a human should look."""
        decision, speaker = await backend.classify(await one_patch(request, file))
        return told(decision, speaker, request, spacing_um_px)

    @router.post(
        "/predict/batch",
        summary="Classify many patches",
        tags=["prediction"],
        response_model=list[Prediction | Problem],
        responses=documented(400, 401, 408, 411, 413, 415, 422, 429, 500, 503, 504),
        openapi_extra={"requestBody": _batch_body(side, what, config.max_batch_patches)},
    )
    async def predict_batch(request: Request, spacing_um_px: Spacing = None) -> Response:
        """Answer a list, in the order of the patches: of each what `/predict` would have answered.

        A file that cannot be used fails alone: its place in the list holds the problem (it has `status`, a prediction has `prediction`).
        Send files in the form field `files`, or pixels as an array: uint8, n x side x side x 3, RGB, raw or as an .npy file.
        """
        nonlocal reading
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if reading >= config.max_batch_requests:
            # Refused, not kept waiting: Ray reads bodies ahead, so those that wait would fill the memory, and places that others need.
            raise ProblemError("overloaded", "other batches are being read; try again", {"Retry-After": "1"})
        reading += 1
        try:
            if kind in ARRAY_TYPES:
                pieces = _array_pieces(request, side, config)
            elif kind == "multipart/form-data":
                pieces = _file_pieces(await _files_of(request, config.max_batch_patches), side, config)
            else:
                raise ProblemError("unsupported_media_type", f"expected multipart/form-data or {' or '.join(ARRAY_TYPES)}")
            answers: list[Prediction | Problem] = []
            async for problems, decided in _classified(pieces, backend):
                of_good = iter(decided)
                for bad in problems:
                    if bad is None:
                        answers.append(told(*next(of_good), request, spacing_um_px))
                    else:
                        answers.append(problem_of(*bad, request_id_of(request.scope)))
        finally:
            reading -= 1
        return Response(await run_in_threadpool(BATCH.dump_json, answers), media_type="application/json")

    @router.post(
        "/explain",
        summary="Show where the model looked",
        tags=["prediction"],
        response_class=Response,
        responses={
            200: {"description": "The patch under its map, PNG", "content": {"image/png": {}}},
            **documented(400, 401, 404, 408, 413, 415, 422, 429, 500, 503, 504),
        },
    )
    async def explain(
        request: Request,
        file: OnePatch,
        opacity: Annotated[float, Query(ge=0, le=1, allow_inf_nan=False, description="Of the map: 0 = the patch alone, 1 = the map alone")] = 0.4,
    ) -> Response:
        """Draw Grad-CAM of the difference between both logits over a patch: red speaks for Metastatic. It says where, not whether."""
        shown, speaker = await backend.explain(await one_patch(request, file), opacity)
        headers = {"X-Model-Digest": speaker.model.digest, "X-Notice": RESEARCH_USE_NOTICE}
        return Response(await run_in_threadpool(_png, shown), media_type="image/png", headers=headers)

    @router.get("/model", summary="The served model's card", tags=["model"], responses=documented(401))
    async def model() -> ModelCard:
        """Return what the model is: operating point, metrics with intervals, and the data it was trained on."""
        return card

    return router


def _batch_body(side: int, what: str, max_patches: int) -> dict[str, Any]:
    files = {"type": "array", "items": {"type": "string", "format": "binary"}, "maxItems": max_patches, "description": f"Patches: {what}"}
    array = {"type": "string", "format": "binary", "description": f"uint8, n x {side} x {side} x 3, RGB, C order: raw or .npy"}
    form = {"schema": {"type": "object", "properties": {"files": files}, "required": ["files"]}}
    return {"required": True, "content": {"multipart/form-data": form} | {kind: {"schema": array} for kind in ARRAY_TYPES}}


async def _files_of(request: Request, max_patches: int) -> list[ReceivedFile]:
    """Return the files of a form, all of them: one that was passed over would shift the answers of those after it."""
    # One more, so that it is us who refuse.
    form = await request.form(max_files=max_patches + 1, max_fields=16)
    boundary = request.headers["content-type"].partition("boundary=")[2].partition(";")[0].strip().strip('"')
    if not tail_of_body(request.scope).rstrip().endswith(f"--{boundary}--".encode("latin-1")):
        raise ProblemError("malformed_body", "the form does not end with its boundary: a part of it is missing")
    files = [value for key, value in form.multi_items() if key == "files" and isinstance(value, ReceivedFile)]
    if not files:
        raise ProblemError("missing_file", "expected multipart/form-data with the images as files in the field `files`")
    if len(files) < len(form.multi_items()):
        raise ProblemError("invalid_request", "the form holds something that is not a file of the field `files`")
    if len(files) > max_patches:
        raise ProblemError("too_many_patches", f"a request may hold {max_patches} patches at most")
    return files


# What is wrong with a patch: kind and detail of a problem.
_Wrong = tuple[str, str]
# A piece of a batch: the patches that can be used, and in order of all what is wrong with each; None = nothing.
_Piece = tuple[UInt8Array, Sequence[_Wrong | None]]


async def _array_pieces(request: Request, side: int, config: ServeConfig) -> AsyncIterator[_Piece]:
    async for patches in pieces_of_array(request.stream(), side, config.max_batch_size, config.max_batch_patches):
        yield patches, [None] * len(patches)


async def _file_pieces(files: list[ReceivedFile], side: int, config: ServeConfig) -> AsyncIterator[_Piece]:
    for start in range(0, len(files), config.max_batch_size):
        data = [await file.read() for file in files[start : start + config.max_batch_size]]
        yield await run_in_threadpool(_decoded, data, side, config)


def _decoded(files: list[bytes], side: int, config: ServeConfig) -> _Piece:
    patches: list[UInt8Array] = []
    wrong: list[_Wrong | None] = []
    for data in files:
        if len(data) > config.max_body_bytes:
            # As for one patch: decoding a large file takes long, whatever it shows.
            wrong.append(("body_too_large", f"a file may have {config.max_body_bytes} bytes at most"))
            continue
        try:
            patches.append(patch_from_bytes(data, side, config.allow_resize))
            wrong.append(None)
        except PatchError as error:
            wrong.append((error.code, str(error)))
    return (np.stack(patches) if patches else np.empty((0, side, side, 3), np.uint8)), wrong


_Decided = list[tuple[Decision, Speaker]]


async def _classified(pieces: AsyncIterator[_Piece], backend: WatchedBackend) -> AsyncIterator[tuple[Sequence[_Wrong | None], _Decided]]:
    """Classify pieces in order, the next one being read while one is with the engine."""
    waiting: list[tuple[Sequence[_Wrong | None], asyncio.Task[_Decided]]] = []
    try:
        async for patches, problems in pieces:
            if len(waiting) == PIECES_IN_FLIGHT:
                earlier, task = waiting.pop(0)
                yield earlier, await task
            waiting.append((problems, asyncio.create_task(_decided(backend, patches))))
        while waiting:
            earlier, task = waiting.pop(0)
            yield earlier, await task
    finally:
        for _, task in waiting:
            task.cancel()


async def _decided(backend: WatchedBackend, patches: UInt8Array) -> _Decided:
    if not len(patches):
        return []
    decisions, speaker = await backend.classify_many(patches)
    return [(decision, speaker) for decision in decisions]


def _png(image: UInt8Array) -> bytes:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
