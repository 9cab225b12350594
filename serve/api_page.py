"""/docs: Swagger UI on the API's description, from files that come with a package, not from a content network.

Whatever runs on this page could read the key that a person types there.
"""

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import Response

from serve.static_files import PAGE_HEADERS, sender

_RESOURCES = {
    "/docs/swagger-ui-bundle.js": ("swagger-ui-bundle.js", "text/javascript"),
    "/docs/swagger-ui.css": ("swagger-ui.css", "text/css"),
    "/docs/favicon.png": ("favicon-32x32.png", "image/png"),
}

API_PAGE_PATHS = frozenset({"/docs", *_RESOURCES})


def api_page_router(title: str) -> APIRouter:
    """Return the routes of the page."""
    router = APIRouter()
    for path, (name, kind) in _RESOURCES.items():
        content = (files("fastapi_swagger") / "resources" / name).read_bytes()
        router.add_api_route(path, sender(content, kind, PAGE_HEADERS), methods=["GET"])
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=title,
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="docs/favicon.png",
    ).body
    html = bytes(page)
    scripts = re.findall(rb"<script>(.*?)</script>", html, re.DOTALL)
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'" for script in scripts)
    # Swagger UI sets styles itself and has pictures in its style sheet.
    policy = f"default-src 'none'; script-src 'self' {hashes}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; connect-src 'self'"
    headers = PAGE_HEADERS | {"Content-Security-Policy": f"{policy}; base-uri 'none'; frame-ancestors 'none'"}

    async def docs() -> Response:
        return Response(html, media_type="text/html", headers=headers)

    router.add_api_route("/docs", docs, methods=["GET"])
    return router
