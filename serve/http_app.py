"""The HTTP application: routes over a backend that classifies patches. Knows nothing of Ray's deployments, so it runs under any ASGI server."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.routing import Match
from starlette.types import Scope

from sentinode import RESEARCH_USE_NOTICE, __version__
from sentinode.answers import Alive, Health, ModelReference, Ready
from sentinode.config import ServeConfig
from sentinode.errors import PatchError
from sentinode.manifests import BundleManifest
from serve.api_page import API_PAGE_PATHS, api_page_router
from serve.backend import Backend, WatchedBackend
from serve.middleware import ApiKeys, BodyLimit, DrainRefused, Limits, RequestContext, request_id_of
from serve.prediction_routes import documented, prediction_router
from serve.problems import ProblemError, kind_of_status, problem_response
from serve.web_page import WEB_PAGE_PATHS, web_page_router

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/openapi.json"}) | API_PAGE_PATHS | WEB_PAGE_PATHS
"""Paths that need no key. Every other route does, so that a new one is closed until somebody opens it."""

VERSION_PREFIX = "/v1"
BATCH_ROUTE = "/predict/batch"

_DESCRIPTION = f"""Finds metastatic tissue in patches of lymph-node histopathology.

**{RESEARCH_USE_NOTICE}**

Send one patch (TIFF, PNG, JPEG or WebP) to `POST /v1/predict`, thousands to `POST /v1/predict/batch`. Each of these also answers without `/v1`;
what `/v1` answers stays compatible. Errors are `application/problem+json` (RFC 9457); branch on `type`.
408, 429, 500, 502, 503 and 504 may be retried: equal patches get equal answers. People look at `/ui`."""


def create_http_app(
    backend: Backend, manifest: BundleManifest, config: ServeConfig, key_digests: Sequence[str] = (), *, echo_request_id: bool = True
) -> FastAPI:
    """Build the application.

    Parameters
    ----------
    backend : Backend
        Raises `Overloaded` when it takes no more.
    manifest : BundleManifest
        Of the bundle behind `backend`.
    config : ServeConfig
        Its limits, timeouts and `auth`; its `engine` is the one behind `backend`, as `/` says.
    key_digests : sequence of str
        SHA-256 of the keys admitted with `auth: keys`.
    echo_request_id : bool
        See `serve.middleware.RequestContext`.
    """
    app = FastAPI(
        title="Sentinode",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # A generated client's functions are named like ours: predict, predict_batch, explain, model.
        generate_unique_id_function=lambda route: route.name,
    )
    watched = WatchedBackend(backend, manifest.patch_size_px)
    router = prediction_router(watched, manifest, config)
    app.include_router(router, prefix=VERSION_PREFIX)
    app.include_router(router, include_in_schema=False)
    _add_open_routes(app, watched, manifest, config)
    app.include_router(api_page_router("Sentinode"), include_in_schema=False)
    app.include_router(web_page_router(), include_in_schema=False)
    _add_problem_handlers(app)
    # Added last = outermost: unread bodies, then other origins, then id, deadline and log line, then key, then body limit, then the routes.
    app.add_middleware(BodyLimit, limits_of=lambda scope: _limits(scope, config))
    if config.auth == "keys":
        app.add_middleware(ApiKeys, digests=key_digests, is_protected=lambda scope: _is_protected(app, scope))
    routes = OPEN_PATHS | {prefix + route.path for prefix in ("", VERSION_PREFIX) for route in router.routes if isinstance(route, APIRoute)}
    app.add_middleware(
        RequestContext,
        # Also of a request that was refused before it came to a route.
        route_of=lambda scope: path if (path := _path(scope)) in routes else "unmatched",
        timeout_s_of=lambda scope: _limits(scope, config).request_timeout_s,
        echo_request_id=echo_request_id,
    )
    if config.cors_origins:
        exposed = ["X-Request-ID", "Retry-After", "X-Model-Digest"]
        methods, headers = ["GET", "POST"], ["Authorization", "Content-Type", "X-API-Key", "X-Request-ID"]
        app.add_middleware(CORSMiddleware, allow_origins=config.cors_origins, allow_methods=methods, allow_headers=headers, expose_headers=exposed)
    app.add_middleware(DrainRefused)
    return app


def _path(scope: Scope) -> str:
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path


def _limits(scope: Scope, config: ServeConfig) -> Limits:
    if _path(scope).removeprefix(VERSION_PREFIX) == BATCH_ROUTE:
        return Limits(config.max_batch_body_bytes, config.body_timeout_s, None, config.batch_request_timeout_s, needs_length=True)
    return Limits(config.max_body_bytes, config.body_timeout_s, config.body_timeout_s, config.request_timeout_s)


def _is_protected(app: FastAPI, scope: Scope) -> bool:
    # What no route matches falls through to 404: it holds nothing to protect.
    return _path(scope) not in OPEN_PATHS and any(route.matches(scope)[0] is not Match.NONE for route in app.routes)


def _add_open_routes(app: FastAPI, backend: WatchedBackend, manifest: BundleManifest, config: ServeConfig) -> None:
    health = Health(model=ModelReference.of(manifest, config.engine))

    @app.head("/", include_in_schema=False)
    @app.get("/", summary="Is it healthy, and which model is it?", tags=["health"], responses=documented(503, 504))
    async def root() -> Health:
        await backend.require_ready()
        return health

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", summary="Does the process answer?", tags=["health"])
    async def healthz() -> Alive:
        return Alive()

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", summary="Can it predict?", tags=["health"], responses=documented(503, 504))
    async def readyz() -> Ready:
        await backend.require_ready()
        return Ready()


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
        detail = {404: "there is nothing here; /docs tells what there is", 405: "this method is not answered here"}.get(error.status_code)
        allowed = (error.headers or {}).get("Allow")
        detail = f"{detail}; use {allowed}" if detail and allowed else detail
        return answer(request, kind_of_status(error.status_code), detail or str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        problem = error.errors()[0]
        # Names the place, not the value: that is the caller's and stays out of answers that get logged.
        return answer(request, "invalid_request", f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}")
