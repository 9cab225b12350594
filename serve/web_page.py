"""The web page at /ui: three static files, which ask the same routes as any caller. Nothing is fetched from elsewhere."""

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

_FILES = {"": ("index.html", "text/html"), "/app.js": ("app.js", "text/javascript"), "/style.css": ("style.css", "text/css")}

_HEADERS = {
    # Scripts, styles and calls from here only; pictures also from memory, where patches and maps lie.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

WEB_PAGE_PATHS = frozenset(f"/ui{suffix}" for suffix in _FILES)


def web_page_router() -> APIRouter:
    """Return the routes of the page."""
    router = APIRouter()
    for suffix, (name, kind) in _FILES.items():
        router.add_api_route(f"/ui{suffix}", _sender((files("serve") / "ui" / name).read_bytes(), kind), methods=["GET"])
    return router


def _sender(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return send
