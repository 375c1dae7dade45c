"""The page at /espo: files as they are, without build tools, that ask for nothing elsewhere."""

from __future__ import annotations

from importlib.resources import files

from aiohttp import web

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # A gateway of another version may answer at the same address tomorrow.
    "Cache-Control": "no-store",
}


def page_routes() -> list[web.RouteDef]:
    """The page and its parts, read once."""
    found = {file.name: file.read_bytes() for file in files(__name__).iterdir() if file.is_file()}

    async def move(request: web.Request) -> web.Response:
        # Relative, as the page's own addresses are: a proxy may have put a path before it.
        return web.Response(status=302, headers={"Location": "espo/"})

    def route(path: str, name: str) -> web.RouteDef:
        async def serve(request: web.Request) -> web.Response:
            kind = _TYPES[name[name.rindex(".") :]]
            return web.Response(
                body=found[name], content_type=kind, charset="utf-8", headers=_HEADERS
            )

        return web.get(path, serve)

    parts = [name for name in found if name.endswith((".css", ".js"))]
    return [
        web.get("/espo", move),
        route("/espo/", "index.html"),
        *(route(f"/espo/{name}", name) for name in parts),
    ]
