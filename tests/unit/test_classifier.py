"""A classifier behind the API: vLLM's form, the probabilities of the model itself, the same guards as generation."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from heliostat.data.tokens import text_ids
from heliostat.errors import GateRefused
from heliostat.evaluation.classification import probabilities
from heliostat.models import base
from heliostat.models.base import InferenceModel
from heliostat.serving import classifier, parity
from heliostat.serving.admission import Overloaded
from heliostat.serving.api import Front, create_app, guarded
from heliostat.serving.calls import Message, Resumed
from heliostat.serving.classifier import ServedClassifier
from heliostat.serving.config import EndpointArgs
from heliostat.serving.hosting import Hosted
from heliostat.serving.metrics import GatewayMetrics
from heliostat.serving.protocol import ClassificationRequest
from heliostat.serving.routing import ReplicaLost, Request, Router, Table, Version
from tests import tiny
from tests.service import SIZES, Running, connected, router_of, running
from tests.unit.test_serving_metrics import Memory

TEXTS = ["the red cat goes to the house", "a dog", "the old man goes to the river at 2 o'clock", "cat"]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_classifier(tmp_path_factory.mktemp("classifier") / "model", request.param)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> InferenceModel:
    return base.load_for_inference(str(folder))


@pytest.fixture(scope="module")
def memory() -> Memory:
    return Memory()


@pytest.fixture(scope="module")
def service(loaded: InferenceModel, memory: Memory) -> Iterator[Running]:
    args = EndpointArgs(**SIZES, max_prompt_tokens=40)
    front = Front(**{**vars(Front.of(args)), "metrics": GatewayMetrics(memory)})
    with running(loaded, args, front) as found:
        yield found


def classify(service: Running, **body: Any) -> Any:
    return service.run(service.http.post("http://endpoint/classify", json={"model": "tiny", **body}))


def alone(folder: Path, tokenizer: Any, text: str) -> list[float]:
    """By transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0]
    found: list[float] = logits.softmax(-1).tolist()
    return found


def test_probabilities_are_those_of_transformers_in_vllms_form(
    service: Running, folder: Path, loaded: InferenceModel
) -> None:
    answer = classify(service, input=TEXTS).json()
    assert answer.keys() == {"id", "object", "created", "model", "data", "usage"}
    assert (answer["object"], answer["model"]) == ("list", "tiny")
    assert answer["id"].startswith("classify-")
    tokens = sum(map(len, text_ids(loaded.tokenizer, TEXTS)))
    assert answer["usage"] == {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}
    for index, (text, found) in enumerate(zip(TEXTS, answer["data"], strict=True)):
        expected = alone(folder, loaded.tokenizer, text)
        assert found["probs"] == pytest.approx(expected, abs=1e-5)
        assert (found["index"], found["num_classes"]) == (index, 3)
        assert found["label"] == tiny.LABELS[max(range(3), key=expected.__getitem__)]


def test_one_text_and_token_ids(service: Running, loaded: InferenceModel) -> None:
    (one,) = classify(service, input=TEXTS[0]).json()["data"]
    ids = text_ids(loaded.tokenizer, TEXTS[:1])[0]
    (same,) = classify(service, input=ids).json()["data"]
    assert one["probs"] == pytest.approx(same["probs"], abs=1e-6)


def test_names_of_special_tokens_are_text(loaded: InferenceModel) -> None:
    pad = loaded.tokenizer.pad_token_id
    assert pad not in text_ids(loaded.tokenizer, [f"cat{loaded.tokenizer.pad_token}"])[0]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"input": ""}, "input", "empty"),
        ({"input": []}, "input", "1 to 128"),
        ({"input": {"a": 1}}, "input", "must be a string"),
        ({"input": "cat " * 60}, "input", "limit of 40"),
        ({"input": [5000]}, "input", "not tokens"),
        ({"input": "cat", "temperature": 1}, "temperature", "unknown parameter"),
        ({}, "input", "missing"),
    ],
)
def test_bad_requests_are_refused_by_name(service: Running, body: dict[str, Any], param: str, words: str) -> None:
    response = classify(service, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert words in error["message"]


def test_each_kind_of_model_names_the_others_routes(service: Running, tmp_path: Path) -> None:
    for path, body in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": [_user("a")]})):
        response = service.post(path, **body)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "wrong_task")
        assert "use /classify" in response.json()["error"]["message"]
    with running(base.load_for_inference(str(tiny.write_model(tmp_path / "m", "gpt2")))) as language_model:
        response = classify(language_model, input="a")
        assert (response.status_code, response.json()["error"]["code"]) == (400, "wrong_task")
        assert "/v1/completions" in response.json()["error"]["message"]


def test_the_card_says_the_task_and_the_labels(service: Running) -> None:
    card = service.get("models/tiny").json()["heliostat"]
    assert (card["task"], card["labels"], card["chat"]) == ("classification", list(tiny.LABELS), False)
    assert service.get("decoding?model=tiny").json()["defaults"] == {}
    assert classify(service, model="other", input="a").status_code == 404


def test_requests_are_counted(service: Running, memory: Memory) -> None:
    before = dict(memory.counters)
    used = classify(service, input="the red cat").json()["usage"]["prompt_tokens"]
    added = {key: value - before.get(key, 0) for key, value in memory.counters.items()}
    assert added["requests_total", ("tiny", "classify")] == 1
    assert added["prompt_tokens_total", ("tiny", "")] == used


def test_a_request_whose_replica_died_is_answered_by_another(loaded: InferenceModel) -> None:
    args = EndpointArgs(**SIZES)

    async def test() -> None:
        served = ServedClassifier(loaded, "tiny", args)
        router = router_of(served, args)
        calls: list[int] = []

        async def call(
            version: Version, request: Request, resumed: Resumed, trace: Mapping[str, str]
        ) -> AsyncGenerator[Message]:
            calls.append(1)
            async for message in classifier.answer(served, request, resumed):
                yield message
                if len(calls) == 1:
                    raise ReplicaLost("killed after it was accepted")

        restarted = Router(call, timeout_s=60)
        restarted.table = Table(0, router.table.routes)
        try:
            front = Front.of(args)
            async with connected(guarded(create_app(restarted, front), front)) as http:
                response = await http.post("http://endpoint/classify", json={"model": "tiny", "input": TEXTS})
            assert (response.status_code, len(calls)) == (200, 2)
            assert [found["index"] for found in response.json()["data"]] == [0, 1, 2, 3]
        finally:
            served.close()

    asyncio.run(test())


def test_what_waits_is_bounded(loaded: InferenceModel) -> None:
    args = EndpointArgs(max_batch_tokens=8, max_ongoing_requests=1, max_queued_tokens=8)

    async def test() -> None:
        served = ServedClassifier(loaded, "tiny", args)
        try:
            found = await asyncio.gather(*(served.classify([5] * 6) for _ in range(4)), return_exceptions=True)
            assert any(isinstance(one, Overloaded) for one in found)
            assert any(isinstance(one, list) for one in found)
            assert served.in_flight == 0
            assert len(await served.classify([5])) == 3, "there is room again"
        finally:
            served.close()

    asyncio.run(test())


def test_a_failing_batch_fails_its_own_texts_only(loaded: InferenceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = probabilities

    def fails_on_seven(model: InferenceModel, texts: Any) -> Any:
        if any(7 in text for text in texts):
            raise RuntimeError("no")
        return whole(model, texts)

    monkeypatch.setattr(classifier, "probabilities", fails_on_seven)

    async def test() -> None:
        served = ServedClassifier(loaded, "tiny", EndpointArgs(max_batch_tokens=1))
        try:
            request = ClassificationRequest.model_validate({"model": "tiny", "input": [[7], [8]]})
            (only,) = [message async for message in classifier.answer(served, request, Resumed())]
            assert only.reason == "the model failed (RuntimeError)"  # type: ignore[union-attr]
            assert len(await served.classify([8])) == 3
            assert served.healthy
        finally:
            served.close()

    asyncio.run(test())


def test_a_version_proves_itself_before_it_is_let_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> str | None:
        hosted = await Hosted.load(str(folder), "tiny", "1", EndpointArgs())
        try:
            return await hosted.check()
        finally:
            hosted.close()

    assert asyncio.run(test()) is None
    whole = probabilities

    def wrong_in_batches(model: InferenceModel, texts: Any) -> Any:
        found = whole(model, texts)
        return found if len(texts) == 1 else found.flip(-1)

    monkeypatch.setattr(classifier, "probabilities", wrong_in_batches)
    assert "other probabilities in a batch than alone" in (asyncio.run(test()) or "")
    with pytest.raises(GateRefused, match="other probabilities"):
        parity.check(folder, parity.prompts_for(folder, 4))


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
