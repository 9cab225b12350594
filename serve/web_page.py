"""The web page at /ui: three static files, which ask the same routes as any caller. Nothing is fetched from elsewhere."""

from importlib.resources import files

from fastapi import APIRouter

from serve.static_files import PAGE_HEADERS, sender

_FILES = {"": ("index.html", "text/html"), "/app.js": ("app.js", "text/javascript"), "/style.css": ("style.css", "text/css")}

WEB_PAGE_PATHS = frozenset(f"/ui{suffix}" for suffix in _FILES)


def web_page_router() -> APIRouter:
    """Return the routes of the page."""
    router = APIRouter()
    for suffix, (name, kind) in _FILES.items():
        content = (files("serve") / "ui" / name).read_bytes()
        router.add_api_route(f"/ui{suffix}", sender(content, kind, PAGE_HEADERS), methods=["GET"])
    return router
