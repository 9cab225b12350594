"""The HTTP application: routes over one function that classifies a patch. Knows nothing of Ray, so it runs under any ASGI server."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any

from fastapi import Depends, FastAPI, File, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match
from starlette.types import Scope

from sentinode import RESEARCH_USE_NOTICE, __version__
from sentinode.config import ServeConfig
from sentinode.errors import PatchError, SentinodeError
from sentinode.images import UInt8Array
from sentinode.manifests import BundleManifest
from sentinode.probability import Decision
from serve.middleware import ApiKeys, BodyLimit, DrainRefused, RequestContext, logger, request_id_of
from serve.patches import patch_from_bytes, probe_patch
from serve.problems import PROBLEM_MEDIA_TYPE, ProblemError, kind_of_status, problem_response
from serve.schemas import Alive, Health, ModelCard, ModelReference, Prediction, Problem, Ready

Classify = Callable[[UInt8Array], Awaitable[Decision]]

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/docs", "/docs/oauth2-redirect", "/openapi.json"})
"""Paths that need no key. Every other route does, so that a new one is closed until somebody opens it."""

READY_FOR_S = 10.0
"""A prediction that succeeded this lately is proof enough: a busy endpoint is never probed."""
PROBE_TIMEOUT_S = 10.0

_DESCRIPTION = f"""Finds metastatic tissue in patches of lymph-node histopathology.

**{RESEARCH_USE_NOTICE}**

Send one patch (TIFF, PNG or JPEG) to `POST /predict`. Errors are `application/problem+json` (RFC 9457); branch on `type`.
429, 503 and 504 may be retried: equal patches get equal answers."""


class Overloaded(SentinodeError):
    """What `classify` raises when it takes no more requests now; trying again after `retry_after_s` seconds is worth it."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("too many requests are waiting")
        self.retry_after_s = retry_after_s


def create_http_app(
    classify: Classify, manifest: BundleManifest, config: ServeConfig, key_digests: Sequence[str] = (), *, echo_request_id: bool = True
) -> FastAPI:
    """Build the application.

    Parameters
    ----------
    classify : callable
        Coroutine function: uint8 patch (patch_size_px, patch_size_px, 3), RGB -> Decision. Raises `Overloaded` when it takes no more.
    manifest : BundleManifest
        Of the bundle behind `classify`.
    config : ServeConfig
        Its limits, timeouts and `auth`; its `engine` is the one behind `classify`, as answers say.
    key_digests : sequence of str
        SHA-256 of the keys admitted with `auth: keys`.
    echo_request_id : bool
        See `serve.middleware.RequestContext`.
    """
    app = FastAPI(title="Sentinode", version=__version__, description=_DESCRIPTION, redoc_url=None, redirect_slashes=False)
    engine = _WatchedEngine(classify, manifest)
    _add_open_routes(app, engine, manifest, config)
    _add_protected_routes(app, engine, manifest, config)
    _add_problem_handlers(app)
    # Added last = outermost: unread bodies, then id, deadline and log line, then key, then body limit, then the routes.
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    if config.auth == "keys":
        app.add_middleware(ApiKeys, digests=key_digests, is_protected=lambda scope: _is_protected(app, scope))
    app.add_middleware(RequestContext, timeout_s=config.request_timeout_s, echo_request_id=echo_request_id)
    app.add_middleware(DrainRefused)
    return app


def _is_protected(app: FastAPI, scope: Scope) -> bool:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    # What no route matches falls through to 404: it holds nothing to protect.
    return path not in OPEN_PATHS and any(route.matches(scope)[0] is not Match.NONE for route in app.routes)


class _WatchedEngine:
    """`classify` with its failures told apart and its last success remembered."""

    def __init__(self, classify: Classify, manifest: BundleManifest) -> None:
        self._classify = classify
        self._probe = probe_patch(manifest.patch_size_px)
        self._last_success = float("-inf")
        self._probing = asyncio.Lock()

    async def classify(self, patch: UInt8Array) -> Decision:
        """Classify, or end the request with a 429 or 503 that says it may be retried."""
        try:
            decision = await self._classify(patch)
        except Overloaded as error:
            raise ProblemError("overloaded", "too many requests are waiting; try again", {"Retry-After": str(error.retry_after_s)}) from error
        except Exception as error:
            # The boundary to the model: whatever broke there, the caller learns that trying again may help, the log learns what it was.
            logger.exception("the engine failed")
            raise ProblemError("engine_failed", "the model could not be reached or failed; try again", {"Retry-After": "1"}) from error
        self._last_success = time.monotonic()
        return decision

    async def require_ready(self) -> None:
        """Return if a prediction succeeded lately or succeeds now; else end the request with a 503."""
        async with self._probing:
            if time.monotonic() - self._last_success < READY_FOR_S:
                return
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    await self.classify(self._probe)
            except (ProblemError, TimeoutError) as error:
                raise ProblemError("not_ready", "a prediction on a built-in patch failed; try again", {"Retry-After": "1"}) from error


def _documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {PROBLEM_MEDIA_TYPE: {"schema": Problem.model_json_schema()}}
    what = {401: "No key, or an unknown one", 413: "Body too large", 415: "Image format not accepted", 422: "Not one usable patch"}
    what |= {400: "Unreadable request", 429: "Too many requests waiting", 500: "Unexpected error", 503: "Model unavailable", 504: "Took too long"}
    return {status: {"description": what[status], "content": content} for status in statuses}


def _add_open_routes(app: FastAPI, engine: _WatchedEngine, manifest: BundleManifest, config: ServeConfig) -> None:
    health = Health(model=ModelReference.of(manifest, config.engine))

    @app.get("/", summary="Is it healthy, and which model is it?", tags=["health"], responses=_documented(503, 504))
    async def root() -> Health:
        await engine.require_ready()
        return health

    @app.get("/healthz", summary="Does the process answer?", tags=["health"])
    async def healthz() -> Alive:
        return Alive()

    @app.get("/readyz", summary="Can it predict?", tags=["health"], responses=_documented(503, 504))
    async def readyz() -> Ready:
        await engine.require_ready()
        return Ready()


def _add_protected_routes(app: FastAPI, engine: _WatchedEngine, manifest: BundleManifest, config: ServeConfig) -> None:
    # For /docs only, where they make the "Authorize" button: the middleware has judged the key before the body was read.
    key_schemes = []
    if config.auth == "keys":
        key_schemes = [Depends(APIKeyHeader(name="X-API-Key", auto_error=False)), Depends(HTTPBearer(auto_error=False))]
    card = ModelCard.of(manifest)

    @app.post(
        "/predict",
        summary="Classify one patch",
        tags=["prediction"],
        dependencies=key_schemes,
        responses=_documented(400, 401, 413, 415, 422, 429, 500, 503, 504),
    )
    async def predict(
        request: Request,
        file: Annotated[UploadFile, File(description=f"One patch: TIFF, PNG or JPEG, {manifest.patch_size_px}x{manifest.patch_size_px}, 8-bit RGB")],
    ) -> Prediction:
        # FastAPI would take the last of several and answer about that one.
        if len((await request.form()).getlist("file")) > 1:
            raise ProblemError("several_files", "send one field `file` per request")
        data = await file.read()
        # Decoding takes a millisecond or two; on the event loop it would hold up every other request.
        patch = await run_in_threadpool(patch_from_bytes, data, manifest.patch_size_px, config.allow_resize)
        return Prediction.of(await engine.classify(patch), manifest, config.engine, request_id_of(request.scope))

    @app.get("/model", summary="The served model's card", tags=["model"], dependencies=key_schemes, responses=_documented(401))
    async def model() -> ModelCard:
        return card


def _add_problem_handlers(app: FastAPI) -> None:
    def answer(request: Request, kind: str, detail: str, headers: Any = None) -> JSONResponse:
        return problem_response(kind, detail, request_id_of(request.scope), headers)

    @app.exception_handler(ProblemError)
    async def on_problem(request: Request, error: ProblemError) -> JSONResponse:
        return answer(request, error.kind, error.detail, error.headers)

    @app.exception_handler(PatchError)
    async def on_patch_error(request: Request, error: PatchError) -> JSONResponse:
        return answer(request, error.code, str(error))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        return answer(request, kind_of_status(error.status_code), str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        problem = error.errors()[0]
        if tuple(problem["loc"][:2]) == ("body", "file"):
            return answer(request, "missing_file", "expected multipart/form-data with the image as a file in the field `file`")
        # Names the place, not the value: that is the caller's and stays out of answers that get logged.
        return answer(request, "invalid_request", f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}")
