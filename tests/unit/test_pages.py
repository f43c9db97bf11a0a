"""The playground's files over HTTP: types, security headers, revalidation, and nothing but the files themselves."""

import re
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from heliostat.serving import pages
from heliostat.serving.edge import SecurityHeaders

FOLDER = Path(pages.__file__).parent / "playground"
# https://www.w3.org/TR/CSP3/: an attribute that is a handler or a style, a script or style with content.
INLINE = re.compile(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)|javascript:", re.IGNORECASE)
ELSEWHERE = re.compile(r"""(?:src|href|action)=["'](?:[a-z]+:|//)|\burl\(|@import|from ["'](?!\./)|\bimport\(""")


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    pages.add_playground(app)
    return TestClient(SecurityHeaders(app))


def test_the_page_and_every_file_it_names_are_served(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = set(re.findall(r'(?:src|href)="(playground/[^"]+)"', page.text))
    assert {"playground/app.js", "playground/style.css", "playground/favicon.svg"} <= named
    for script in FOLDER.glob("*.js"):
        named |= {f"playground/{name}" for name in re.findall(r'from "\./([^"]+)"', script.read_text())}
    assert {name.removeprefix("playground/") for name in named} == {f.name for f in FOLDER.iterdir()} - {"index.html"}
    types = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8", "svg": "image/svg+xml"}
    for name in named:
        answer = client.get(f"/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == types[name.rpartition(".")[2]]
        assert answer.content == (FOLDER / name.removeprefix("playground/")).read_bytes()


@pytest.mark.parametrize("path", ["/", "/playground/app.js"])
def test_browsers_are_told_to_run_nothing_else(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/", "/playground/app.js"])
def test_unchanged_files_are_not_sent_again(client: TestClient, path: str) -> None:
    first = client.get(path)
    assert first.headers["cache-control"] == "no-cache"
    for known in (first.headers["etag"], f'"other", W/{first.headers["etag"]}', "*"):
        again = client.get(path, headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == first.headers["etag"]
    assert client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
    head = client.head(path)
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/playground/",
        "/playground/nothing.js",
        "/playground/../pages.py",
        "/playground/%2e%2e/pages.py",
        "/playground/..%2fpages.py",
        "/playground/%2fetc%2fpasswd",
        "/playground/..\\pages.py",
        "/playground/app.js%00.css",
        "/playground/app.js/",
    ],
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    # httpx would tidy the path up before it is sent.
    request = httpx2.Request("GET", httpx2.URL("http://testserver", raw_path=path.encode()))
    answer = client.send(request, follow_redirects=False)
    assert answer.status_code in (307, 404)
    assert b"import" not in answer.content


def test_the_page_has_nothing_inline_and_asks_no_other_host() -> None:
    found = {file.name: file.read_text() for file in FOLDER.iterdir()}
    assert INLINE.findall(found["index.html"]) == []
    for name, text in found.items():
        assert ELSEWHERE.findall(text) == [], name
        if name.endswith(".js"):
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text), name


def test_modules_of_the_page_say_what_they_are_and_stay_short() -> None:
    for script in FOLDER.glob("*.js"):
        text = script.read_text()
        assert text.startswith("// "), script.name
        assert len(text.splitlines()) <= 350, script.name


def test_the_pages_need_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys, heliostat.serving.pages as pages; pages.playground_files()\n"
        "print(sorted({'torch', 'ray', 'transformers', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
