"""A real model behind the real application on a port of this machine, and a real browser in front of it.

The model is served as two versions: 1 is tuned to sample, 2 is a greedy canary that gets no traffic by itself.
"""

import asyncio
import shutil
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from anyio.from_thread import start_blocking_portal
from transformers import GenerationConfig

from heliostat.models import base
from heliostat.serving import keys
from heliostat.serving.api import Front, create_app, guarded
from heliostat.serving.calls import Message, Resumed
from heliostat.serving.config import EndpointArgs
from heliostat.serving.generation import answer
from heliostat.serving.hosting import about
from heliostat.serving.routing import Request, Route, Router, Table, Version
from heliostat.serving.sampling import DecodingDefaults
from heliostat.serving.served import ServedModel
from tests.conftest import REPOSITORY

SCREENSHOTS = REPOSITORY / ".artifacts" / "screenshots"
CHROMIUM = "/usr/bin/chromium"
# No sandbox: tests in a container run as root. The others keep the browser from calling home.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZES = {"max_batch_tokens": 128, "cache_tokens": 8192, "max_ongoing_requests": 8}
TUNED = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1}
METRICS = {"eval_loss": 1.8342, "rouge_l": 0.41237}
TAGS = {"method": "lora", "data": "dialogsum"}


@dataclass(frozen=True)
class Urls:
    """The same models twice: open to all, and with API keys."""

    open: str
    keyed: str
    key: str


def _version(served: ServedModel, number: str) -> Version:
    return Version(number, number, 0, metrics=METRICS, tags=TAGS, **about(served))


def _router(versions: Mapping[str, ServedModel], args: EndpointArgs) -> Router:
    """Answers in this process, where Ray Serve would call a replica of the version."""

    async def call(
        version: Version, request: Request, resumed: Resumed, trace: Mapping[str, str]
    ) -> AsyncGenerator[Message]:
        async for message in answer(versions[version.app], request, resumed, args.max_prompt_tokens):
            yield message

    router = Router(call, timeout_s=args.request_timeout_s)
    first, second = (_version(served, number) for number, served in versions.items())
    rejected = (("3", "check prompt 2 of 4: token 5 differs"),)
    route = Route("smollm2", "models:/smollm2@champion", first, canary=second, rejected=rejected)
    router.table = Table(0, {"smollm2": route})
    return router


@asynccontextmanager
async def _listening(router: Router, args: EndpointArgs) -> AsyncIterator[str]:
    """The URL of the endpoint's application, as Ray Serve's proxy runs it."""
    front = Front.of(args)
    app = guarded(create_app(router, front), front)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve([listening]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        await running


@asynccontextmanager
async def _endpoint(loaded: base.InferenceModel, key_file: Path) -> AsyncIterator[Urls]:
    end = loaded.model.generation_config.eos_token_id
    loaded.model.generation_config = GenerationConfig(**TUNED, max_new_tokens=96, eos_token_id=end, pad_token_id=end)
    args = EndpointArgs(**SIZES)
    keyed = EndpointArgs(**SIZES, api_keys=str(key_file))
    secret = keys.add(key_file, "browser", requests_per_minute=1)
    async with AsyncExitStack() as stack:
        served = await ServedModel.start(loaded, "smollm2", args)
        stack.callback(served.close)
        greedy = replace(served, defaults=DecodingDefaults.of(GenerationConfig(max_new_tokens=96)))
        router = _router({"1": served, "2": greedy}, args)
        yield Urls(
            open=await stack.enter_async_context(_listening(router, args)),
            keyed=await stack.enter_async_context(_listening(router, keyed)),
            key=secret,
        )


@pytest.fixture(scope="package")
def endpoint_urls(browser: Any, smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Urls]:
    """Where the application listens."""
    loaded = base.load_for_inference(smollm2)
    key_file = tmp_path_factory.mktemp("keys") / "keys.json"
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(_endpoint(loaded, key_file)) as urls:
        yield urls


@pytest.fixture
def endpoint_url(endpoint_urls: Urls) -> str:
    """Where the application listens, open to all."""
    return endpoint_urls.open


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    """Debian's Chromium; tests skip where it is not installed, or Playwright is not."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    if shutil.which(CHROMIUM) is None:
        pytest.skip(f"{CHROMIUM} is not there (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@dataclass
class Visit:
    """A page in a browser of its own, what it complained of, and whom it asked."""

    page: Any
    problems: list[str] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)

    def watch(self) -> None:
        """Note what the page does from now on."""
        self.page.on("console", self._logged)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request))  # not a bare built-in

    def _logged(self, message: Any) -> None:
        if message.type == "error":
            self.problems.append(message.text)

    def ready(self) -> None:
        """Wait until a model and its settings are there."""
        self.page.locator("#settings:not([hidden])").wait_for(state="attached")

    def bodies(self) -> list[dict[str, Any]]:
        """The generation requests so far."""
        return [request.post_data_json for request in self.requests if request.method == "POST"]

    def screenshot(self, name: str) -> None:
        """Keep a picture for people to look at."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")


class Visitor:
    """Opens pages; says at the end what was wrong with any of them."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self._visits: list[tuple[str, Visit]] = []

    def open(self, url: str, **context: Any) -> Visit:
        """The playground at `url`; `context` are Playwright's options, such as a viewport."""
        page = self._browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **context}).new_page()
        visit = Visit(page)
        visit.watch()
        self._visits.append((url, visit))
        page.goto(url)
        return visit

    def close(self) -> None:
        """Close all pages; none may have asked another host, or have had an error that its test did not clear."""
        for url, visit in self._visits:
            foreign = [request.url for request in visit.requests if not request.url.startswith(url)]
            visit.page.context.close()
            assert foreign == []
            assert visit.problems == []


@pytest.fixture
def visitor(browser: Any) -> Iterator[Visitor]:
    """Opens pages in the browser."""
    opened = Visitor(browser)
    yield opened
    opened.close()


@pytest.fixture
def visit(visitor: Visitor, endpoint_url: str) -> Visit:
    """The playground on a desktop, ready to be used."""
    opened = visitor.open(endpoint_url)
    opened.ready()
    return opened
