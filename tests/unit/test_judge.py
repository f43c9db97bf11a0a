"""The judge against a real HTTP server that answers well, talks nonsense, fails, refuses or is away."""

import contextlib
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heliostat import state
from heliostat.errors import ConfigError
from heliostat.evaluation import judge, metrics
from heliostat.evaluation.config import JudgeConfig
from heliostat.evaluation.judge import Judge
from heliostat.evaluation.metrics import Example

Reply = tuple[int, str]
EXAMPLES = [Example(f"prompt {i}", f"answer {i}", f"reference {i}", 3) for i in range(6)]


class Server:
    """An OpenAI-compatible endpoint: `answer` makes status and text of the request's body."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.answer: Callable[[dict[str, Any]], Reply] = lambda body: (200, '{"score": 50}')
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                status, text = server.handle(body, self.headers["authorization"])
                message = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
                content = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                                      "choices": [message]}).encode()  # fmt: skip
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.send_header("retry-after-ms", "1")
                with contextlib.suppress(ConnectionError):  # the client had enough of waiting
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                """Nothing."""

        return Handler

    def handle(self, body: dict[str, Any], key: str) -> Reply:
        with self._lock:
            self.requests.append(body)
            self.keys.add(key)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return self.answer(body)
        finally:
            with self._lock:
                self.at_once -= 1


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.http.shutdown()
    thread.join()
    made.http.server_close()


def number_in(body: dict[str, Any]) -> int:
    """The number of the example that is asked about."""
    user = body["messages"][1]["content"]
    return next(i for i in range(len(EXAMPLES)) if f"prompt {i}" in user)


class Judged:
    """The marks of EXAMPLES and what the user was told."""

    def __init__(self, url: str, examples: list[Example] = EXAMPLES, **changes: Any) -> None:
        self.told: list[str] = []
        config = JudgeConfig(**({"base_url": url, "model": "m", "max_retries": 1} | changes))
        made = Judge(config, self.told.append)
        self.statistics = made.statistics(examples)
        self.score = metrics.score(made, self.statistics)
        self.marks = self.statistics[:, 0].tolist()


def test_each_answer_is_marked_with_prompt_reference_and_rubric(server: Server) -> None:
    server.answer = lambda body: (200, json.dumps({"score": 10 * number_in(body)}))
    found = Judged(server.url, rubric="Count {the} words.")
    assert found.marks == [0, 10, 20, 30, 40, 50]
    assert found.score == 25
    assert found.told == []
    assert len(server.requests) == 6
    first = next(body for body in server.requests if number_in(body) == 3)
    assert (first["model"], first["temperature"]) == ("m", 0)
    system, user = (message["content"] for message in first["messages"])
    assert "Count {the} words." in system
    assert all(text in user for text in ("prompt 3", "answer 3", "reference 3"))


def test_a_second_run_asks_nothing_and_the_cache_holds_marks_only(server: Server) -> None:
    first = Judged(server.url)
    assert Judged(server.url).marks == first.marks
    assert len(server.requests) == 6
    files = list((state.folder() / "judge").iterdir())
    assert [json.loads(file.read_text()) for file in files] == [{"score": 50}] * 6
    assert all(len(file.stem) == 64 and file.suffix == ".json" for file in files)
    Judged(server.url, model="other")
    Judged(server.url, rubric="other")
    assert len(server.requests) == 18, "another model or rubric is another question"
    files[0].write_text("{")
    assert Judged(server.url).marks == first.marks, "a damaged file is asked anew"
    assert len(server.requests) == 19


def test_equal_answers_are_asked_about_once(server: Server) -> None:
    assert Judged(server.url, [EXAMPLES[0]] * 5).marks == [50] * 5
    assert len(server.requests) == 1


def test_nonsense_is_asked_again_and_then_has_no_score(server: Server) -> None:
    tries: dict[int, int] = {}

    def answer(body: dict[str, Any]) -> Reply:
        number = number_in(body)
        tries[number] = tries.get(number, 0) + 1
        good = number == 0 or (number == 1 and tries[number] == 3)
        return 200, "80" if good else "I would say eighty."

    server.answer = answer
    found = Judged(server.url, EXAMPLES[:4], max_retries=2)
    assert tries == {0: 1, 1: 3, 2: 3, 3: 3}
    assert found.marks[:2] == [80, 80]
    assert np.isnan(found.marks[2:]).all()
    assert found.score == 80
    assert found.told == ['evaluation.judge: 2 of 4 answers have no score: 2 x no {"score": n} in its reply']
    repeated = [body for body in server.requests if "temperature" not in body]
    assert len(repeated) == 6, "asked again, it may answer otherwise"
    assert len(list((state.folder() / "judge").iterdir())) == 2


def test_failures_are_tried_again(server: Server) -> None:
    failed: set[int] = set()

    def answer(body: dict[str, Any]) -> Reply:
        number = number_in(body)
        if number in failed:
            return 200, '{"score": 7}'
        failed.add(number)
        return (500, 429, 503)[number % 3], ""

    server.answer = answer
    assert Judged(server.url).marks == [7] * 6
    assert len(server.requests) == 12


def test_lasting_failures_leave_no_score(server: Server) -> None:
    server.answer = lambda body: (500 if number_in(body) < 2 else 200, "9")
    found = Judged(server.url)
    assert found.marks[2:] == [9] * 4
    assert np.isnan(found.marks[:2]).all()
    assert found.told == ["evaluation.judge: 2 of 6 answers have no score: 2 x the endpoint answers 500"]


def test_a_judge_that_is_away_is_not_waited_for_again_and_again() -> None:
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        found = Judged(f"http://127.0.0.1:{closed.getsockname()[1]}/v1", EXAMPLES * 3, max_retries=0)
    assert np.isnan(found.marks).all()
    assert np.isnan(found.score)
    assert found.told == ["evaluation.judge: 18 of 18 answers have no score: 18 x the endpoint cannot be reached"]


def test_an_answer_that_takes_too_long(server: Server) -> None:
    free = threading.Event()
    server.answer = lambda body: (200, "1" if free.wait(60) else "")
    try:
        found = Judged(server.url, EXAMPLES[:2], max_retries=0, timeout_s=0.3)
    finally:
        free.set()
    assert found.told == ["evaluation.judge: 2 of 2 answers have no score: 2 x no answer in 0.3 s (timeout_s)"]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_unknown_model_ends_it(server: Server, status: int) -> None:
    server.answer = lambda body: (status, "")
    with pytest.raises(
        ConfigError, match=rf"evaluation\.judge: {server.url} answers {status} for the model `m`; check"
    ):
        Judged(server.url)


def test_the_key_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    Judged(server.url)
    monkeypatch.setenv("JUDGE_KEY", "secret")
    Judged(server.url, api_key_env="JUDGE_KEY", model="other")
    assert server.keys == {"Bearer none", "Bearer secret"}


def test_requests_run_side_by_side_up_to_the_limit(server: Server) -> None:
    meet = threading.Barrier(3)

    def answer(body: dict[str, Any]) -> Reply:
        meet.wait(60)  # passes only when three are there at once
        return 200, "1"

    server.answer = answer
    assert Judged(server.url, max_concurrent_requests=3).marks == [1] * 6
    assert server.most_at_once == 3


def test_no_text_is_kept_or_logged(server: Server, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    server.answer = lambda body: (200, "nonsense-canary" if number_in(body) else "5")
    with caplog.at_level(logging.INFO):
        found = Judged(server.url, max_retries=0)
    texts = [caplog.text, *found.told]
    texts += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    for canary in ("prompt 1", "answer 1", "reference 1", "nonsense-canary"):
        assert not any(canary in text for text in texts)


@pytest.mark.parametrize(
    ("reply", "mark"),
    [
        ('{"score": 85}', 85),
        (' {"score": 85, "why": "good"}\n', 85),
        ('```json\n{"score": 0}\n```', 0),
        ("100", 100),
        ("85.0", 85),
        ('{"score": 101}', None),
        ('{"score": -1}', None),
        ('{"score": 85.5}', None),
        ('{"score": "85"}', None),
        ('{"score": true}', None),
        ('{"mark": 85}', None),
        ("{85}", None),
        ("Score: 85", None),
        ("NaN", None),
        ("1e400", None),
        ("", None),
        ("[85]", None),
    ],
)
def test_what_counts_as_a_mark(reply: str, mark: int | None) -> None:
    assert judge.parse(reply) == mark
