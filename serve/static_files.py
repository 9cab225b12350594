"""Files of pages for people, and the headers that go with them."""

from collections.abc import Awaitable, Callable, Mapping

from starlette.responses import Response

PAGE_HEADERS = {
    # Scripts, styles and calls from here only; pictures also from memory, where patches and maps lie.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def sender(content: bytes, kind: str, headers: Mapping[str, str]) -> Callable[[], Awaitable[Response]]:
    """Return a route that answers with a file of a media type."""

    async def send() -> Response:
        return Response(content, media_type=kind, headers=dict(headers))

    return send
