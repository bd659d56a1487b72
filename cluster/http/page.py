"""The page at `/`: ask a question, watch the merge tree, and see what the answer was made from.

Its files are static, and it asks the door's own routes. Nothing in it comes from another host, nor
may it: the browser is told so.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response

from cluster.http.errors import HttpError

FOLDER = Path(__file__).with_name("page")
FILES = ("style.css", "tree.js", "evidence.js", "ask.js")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Another version of the service has another page.
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Serve the page and its files."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(FOLDER / "index.html", headers=HEADERS)

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in FILES:
            raise HttpError(404, f"the page has no file {name!r}")
        return FileResponse(FOLDER / name, headers=HEADERS)
