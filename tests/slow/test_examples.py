"""The examples with a real pretrained model, on real data: what the README and the YAML files promise."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import readme
from tests.conftest import REPOSITORY
from tests.slow import command

EXAMPLES = REPOSITORY / "jobs" / "examples"
PORT = 18432
PROMPT = "### Instruction:\nName three primary colours.\n\n### Response:"
pytestmark = pytest.mark.shared_data


@pytest.fixture(scope="module", autouse=True)
def _state(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One state folder for the module: the GGUF file is converted once, models stay registered between tests."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture(autouse=True)
def _use_state(_state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOSTAT_HOME", str(_state))


def test_readme_trains_scores_promotes_and_serves(smollm2: str, shared_data: Path, tmp_path: Path) -> None:
    data = str(shared_data / "sms_spam" / "train.tsv")
    steps = [
        [argument.replace("SMSSpamCollection.tsv", data) for argument in arguments]
        for arguments in readme.commands("Train your own")
    ]
    assert [step[0] for step in steps] == ["train", "evaluate", "promote", "serve"]
    trained = command.run(*steps[0])
    scores = command.run(*steps[1], "--predictions", str(tmp_path / "predictions.jsonl"))
    assert scores["n"] == 200
    assert scores["exact_match"] >= 0.93
    assert scores["baseline"]["exact_match"] < scores["exact_match"]
    assert command.run(*steps[2])["version"] == trained["version"]
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    asked = [next(row for row in rows if row["prediction"] == label) for label in (" spam", " ham")]
    answers = served(steps[3][1], [row["prompt"] for row in asked], max_tokens=4)
    assert answers == [row["prediction"] for row in asked]


def test_alpaca_learned_by_lora_is_served_as_it_was_trained(smollm2: str, shared_data: Path) -> None:
    trained = train_alpaca("lora", shared_data)
    expected = generate_without_heliostat(Path(trained["bundle"]), PROMPT)
    assert served(trained["model_uri"], [PROMPT], max_tokens=24) == [expected]


def test_alpaca_learned_in_zero3s_pieces_is_a_whole_model(smollm2: str, shared_data: Path) -> None:
    trained = train_alpaca("full_zero3", shared_data)
    assert "red" in generate_without_heliostat(Path(trained["bundle"]), PROMPT).lower()


def train_alpaca(example: str, shared_data: Path) -> dict[str, Any]:
    """The result of an example that learns a little."""
    data = [f"data.train={shared_data}/alpaca/alpaca_train.json", "data.max_train_samples=24", "data.validation_size=8"]
    trained = command.run("train", str(EXAMPLES / "alpaca" / f"{example}.yaml"), *data)
    losses = validation_losses(Path(trained["run_folder"]))
    assert losses[-1] < losses[0]
    return trained


def test_text_from_scratch_loses_perplexity(shared_data: Path) -> None:
    config = str(EXAMPLES / "tinyshakespeare" / "scratch.yaml")
    trained = command.run(
        "train", config, f"data.train={shared_data}/text/tinyshakespeare.txt", "training.max_steps=20",
        "training.eval_steps=10",
    )  # fmt: skip
    losses = validation_losses(Path(trained["run_folder"]))
    assert losses[0] > losses[1] > losses[2]


def validation_losses(run_folder: Path) -> list[float]:
    """In the order of the steps; the first is before training."""
    return [*command.journal(run_folder, "eval_loss").values()]


def generate_without_heliostat(bundle: Path, prompt: str) -> str:
    """Greedy text of the bundle by transformers alone: as it is, and for LoRA also merged by peft."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundle)
    model = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
    output = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    if (bundle / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        merged = AutoPeftModelForCausalLM.from_pretrained(bundle, dtype=torch.float32).merge_and_unload().eval()
        assert torch.equal(merged.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :], output)
    return str(tokenizer.decode(output, skip_special_tokens=True))


def served(model: str, prompts: list[str], max_tokens: int) -> list[str]:
    """What the endpoint answers, greedily."""
    with command.endpoint(model, f"serving.port={PORT}", "serving.num_cpus=2") as up:
        body = {"model": up["model"], "prompt": prompts, "max_tokens": max_tokens, "temperature": 0}
        request = urllib.request.Request(
            f"{up['url']}/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            return [choice["text"] for choice in json.load(response)["choices"]]
