"""The playground: a static page at `/` that talks to the API beside it. Knows files and HTTP, not models.

The page asks nothing of any other host. It has no inline scripts or styles: the security policy that every answer gets
(see edge.py) forbids them, so that text of a model could not become code even if the page had a mistake.
"""

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

PAGE = "index.html"
CONTENT_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


@dataclass(frozen=True)
class StaticFile:
    """A file of the page, in memory, with the headers it is sent with."""

    content: bytes
    headers: dict[str, str]


def playground_files() -> dict[str, StaticFile]:
    """The files of the page by their names, read from the package."""
    folder = files("heliostat.serving") / "playground"
    return {
        entry.name: _static_file(entry.name, entry.read_bytes())
        for entry in folder.iterdir()
        if entry.name.rpartition(".")[2] in CONTENT_TYPES
    }


def add_playground(app: FastAPI) -> None:
    """Serve the page at `/` and its files at `/playground/{file}`. Neither needs an API key: they hold no data."""
    known = playground_files()

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        return _answer(request, known[PAGE])

    @app.api_route("/playground/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(request: Request, name: str) -> Response:
        # A look-up among the names that exist: no path is ever built from a request.
        if name not in known:
            raise HTTPException(404, "Not Found")
        return _answer(request, known[name])


def _static_file(name: str, content: bytes) -> StaticFile:
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    # "no-cache" means: keep it, but ask whether it is still the same. A new release is seen at once.
    headers = {"ETag": etag, "Cache-Control": "no-cache", "Content-Type": CONTENT_TYPES[name.rpartition(".")[2]]}
    return StaticFile(content, headers)


def _answer(request: Request, file: StaticFile) -> Response:
    wanted = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if file.headers["ETag"] in wanted or "*" in wanted:
        return Response(status_code=304, headers=file.headers)
    return Response(file.content, headers=file.headers)
