"""The routes that answer about patches, which need a key: /predict, /predict/batch, /explain and /model."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from io import BytesIO
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Query, Request
from fastapi.security import APIKeyHeader, HTTPBearer
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.responses import Response

from sentinode import RESEARCH_USE_NOTICE
from sentinode.answers import BATCH, EXAMPLE_REQUEST_ID, ModelCard, Prediction, Problem, Speaker
from sentinode.config import ServeConfig
from sentinode.errors import PatchError
from sentinode.images import UInt8Array, plain_tiff
from sentinode.manifests import BundleManifest
from sentinode.probability import Decision
from serve.backend import WatchedBackend
from serve.batch_body import ARRAY_TYPES, NPY_TYPE, pieces_of_array
from serve.form_body import MANY_FILES, ONE_FILE, form_of, many_files, one_file
from serve.measures import measures
from serve.middleware import request_id_of
from serve.patches import patch_from_bytes
from serve.problems import PROBLEM_MEDIA_TYPE, ProblemError, problem_of

PIECES_IN_FLIGHT = 2
"""Of one request: while one piece is with the engine the next is read and decoded. More would only take memory and keep other callers waiting."""

# Of each status a problem that has it, as the example, and what it means.
_WHAT = {
    400: ("malformed_body", "Unreadable request"),
    401: ("unauthorized", "No key, or an unknown one"),
    404: ("not_explainable", "There is no such thing"),
    408: ("body_timeout", "The body did not come in time"),
    411: ("length_required", "The body has no length"),
    413: ("body_too_large", "Body too large"),
    415: ("format_not_allowed", "Image format or content type not accepted"),
    422: ("wrong_size", "Not one usable patch"),
    429: ("overloaded", "Too many requests waiting; see Retry-After"),
    500: ("internal", "Unexpected error"),
    503: ("engine_failed", "Model unavailable; see Retry-After"),
    504: ("timeout", "Took too long"),
}

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
    # By name: `Problem` is among the models of /predict/batch, so that a generated client has one class for all problems.
    schema = {"$ref": "#/components/schemas/Problem"}
    described: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        kind, what = _WHAT[status]
        example = problem_of(kind, what, EXAMPLE_REQUEST_ID).model_dump()
        described[status] = {"description": what, "content": {PROBLEM_MEDIA_TYPE: {"schema": schema, "example": example}}}
    return described


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
    one_patch_body = {"required": True, "content": form_of(ONE_FILE, {"type": "string", "format": "binary", "description": f"One patch: {what}"})}
    card = ModelCard.of(manifest)
    reading = 0

    def told(decision: Decision, speaker: Speaker, request: Request, spacing_um_px: float | None) -> Prediction:
        reason = speaker.spacing_reason(spacing_um_px, tolerance=config.spacing_tolerance, expected=config.expect_spacing)
        prediction = Prediction.of(decision, speaker, request_id_of(request.scope), spacing_um_px, reason)
        measures().decided(decision, prediction.needs_review)
        return prediction

    def require_known(request: Request, parameter: str) -> None:
        # One that is misspelt would be passed over, and a wrong spacing with it.
        if any(name != parameter for name in request.query_params):
            raise ProblemError("invalid_request", f"unknown parameter in the query; there is: {parameter}")

    async def one_patch(request: Request) -> UInt8Array:
        data = await one_file(request)
        plain = plain_tiff(data, side)
        # Other decoding takes up to some milliseconds; on the event loop it would hold up every other request.
        return await asyncio.to_thread(patch_from_bytes, data, side, config.allow_resize) if plain is None else plain

    @router.post(
        "/predict",
        summary="Classify one patch",
        tags=["prediction"],
        response_model=Prediction,
        responses=documented(400, 401, 408, 413, 415, 422, 429, 500, 503, 504),
        openapi_extra={"requestBody": one_patch_body},
    )
    async def predict(request: Request, spacing_um_px: Spacing = None) -> Response:
        """Say whether the centre 32x32 pixels of a patch hold tumour tissue, with a calibrated probability and whether a human should look."""
        require_known(request, "spacing_um_px")
        decision, speaker = await backend.classify(await one_patch(request))
        return Response(told(decision, speaker, request, spacing_um_px).model_dump_json(), media_type="application/json")

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
        require_known(request, "spacing_um_px")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if reading >= config.max_batch_requests:
            # Refused, not kept waiting: Ray reads bodies ahead, so those that wait would fill the memory, and places that others need.
            raise ProblemError("overloaded", "other batches are being read; try again", {"Retry-After": "1"})
        reading += 1
        try:
            if kind in ARRAY_TYPES:
                pieces = _array_pieces(request, kind == NPY_TYPE, side, config)
            elif kind == "multipart/form-data":
                pieces = _file_pieces(await many_files(request, config.max_batch_patches), side, config)
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
        return Response(await asyncio.to_thread(BATCH.dump_json, answers), media_type="application/json")

    @router.post(
        "/explain",
        summary="Show where the model looked",
        tags=["prediction"],
        response_class=Response,
        responses={
            200: {"description": "The patch under its map, PNG", "content": {"image/png": {}}},
            **documented(400, 401, 404, 408, 413, 415, 422, 429, 500, 503, 504),
        },
        openapi_extra={"requestBody": one_patch_body},
    )
    async def explain(
        request: Request,
        opacity: Annotated[float, Query(ge=0, le=1, allow_inf_nan=False, description="Of the map: 0 = the patch alone, 1 = the map alone")] = 0.4,
    ) -> Response:
        """Draw Grad-CAM of the difference between both logits over a patch: red speaks for Metastatic. It says where, not whether."""
        require_known(request, "opacity")
        shown, speaker = await backend.explain(await one_patch(request), opacity)
        headers = {"X-Model-Digest": speaker.model.digest, "X-Notice": RESEARCH_USE_NOTICE}
        return Response(await asyncio.to_thread(_png, shown), media_type="image/png", headers=headers)

    @router.get("/model", summary="The served model's card", tags=["model"], responses=documented(401))
    async def model() -> ModelCard:
        """Return what the model is: operating point, metrics with intervals, and the data it was trained on."""
        return card

    return router


def _batch_body(side: int, what: str, max_patches: int) -> dict[str, Any]:
    files = {"type": "array", "items": {"type": "string", "format": "binary"}, "maxItems": max_patches, "description": f"Patches: {what}"}
    array = {"type": "string", "format": "binary", "description": f"uint8, n x {side} x {side} x 3, RGB, C order: raw or .npy"}
    return {"required": True, "content": form_of(MANY_FILES, files) | {kind: {"schema": array} for kind in ARRAY_TYPES}}


# What is wrong with a patch: kind and detail of a problem.
_Wrong = tuple[str, str]
# A piece of a batch: the patches that can be used, and in order of all what is wrong with each; None = nothing.
_Piece = tuple[UInt8Array, Sequence[_Wrong | None]]


async def _array_pieces(request: Request, is_npy: bool, side: int, config: ServeConfig) -> AsyncIterator[_Piece]:
    async for patches in pieces_of_array(request.stream(), side, config.max_batch_size, config.max_batch_patches, must_be_npy=is_npy):
        yield patches, [None] * len(patches)


async def _file_pieces(files: list[UploadFile], side: int, config: ServeConfig) -> AsyncIterator[_Piece]:
    for start in range(0, len(files), config.max_batch_size):
        data = [await file.read() for file in files[start : start + config.max_batch_size]]
        yield await asyncio.to_thread(_decoded, data, side, config)


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
