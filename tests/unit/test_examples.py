"""The examples from scratch train and are scored by their own files, a few steps on the first lines of their data."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from heliostat import cli
from tests.conftest import REPOSITORY

EXAMPLES = REPOSITORY / "jobs" / "examples"
FEW = (
    "training.num_workers=0",
    "training.max_steps=2",
    "training.per_device_train_batch_size=2",
    "data.max_test_samples=2",
    "generation.max_new_tokens=4",
)
PAIRS = {
    "dialogsum/scratch": ("dialogsum/train.jsonl", "dialogsum/dev.jsonl"),
    "multi30k/scratch": ("multi30k/train.{en,de}", "multi30k/val.{en,de}"),
    "record/scratch": ("record_sample/train.jsonl", "record_sample/val.jsonl"),
    "rucos/scratch": ("rucos_sample/train.jsonl", "rucos_sample/val.jsonl"),
}
pytestmark = [pytest.mark.shared_data, pytest.mark.usefixtures("module_store")]


@pytest.fixture(scope="module")
def beginnings(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of the data, with the first 60 lines of each file."""
    folder = tmp_path_factory.mktemp("beginnings")
    for pattern in ("text/*.txt", "dialogsum/*.jsonl", "multi30k/*.*", "r*_sample/*.jsonl"):
        for path in shared_data.glob(pattern):
            target = folder / path.relative_to(shared_data)
            target.parent.mkdir(exist_ok=True)
            target.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:60]))
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The result of a command that must succeed."""
    assert cli.main([*arguments, "--json"]) == 0, capsys.readouterr().err
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


@pytest.mark.parametrize("example", PAIRS)
def test_pairs_and_passages(example: str, beginnings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = (beginnings / name for name in PAIRS[example])
    given = [f"{EXAMPLES / example}.yaml", f"data.train={train}", f"data.test={test}", "data.validation_size=1", *FEW]
    trained = run(capsys, "train", *given)
    scores = run(capsys, "evaluate", *given)
    assert scores["n"] == 2
    assert scores["loss"] < scores["baseline"]["loss"]
    assert (Path(trained["bundle"]) / "model.safetensors").exists()


def test_aphorisms_are_documents_and_decoding_is_compared(beginnings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = f"{EXAMPLES}/aphorisms/scratch.yaml"
    trained = run(capsys, "train", config, f"data.train={beginnings}/text/aphorisms_ru.txt", *FEW)
    ways = ["greedy", "num_beams=10", "temperature=0.3", "temperature=0.8", "temperature=1.5", "top_k=20"]
    flags = [flag for way in ways for flag in ("--compare", way)]
    found = run(capsys, "generate", trained["model_uri"], "max_new_tokens=4", "--prompt", "Любовь - это", *flags)
    assert [each["settings"] for each in found["compared"]] == ways


def test_stories_are_gone_on_with_and_embeddings_stay(beginnings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundles = {}
    for name, text in (("scratch", "tinystories"), ("finetune", "tinyshakespeare")):
        given = [f"{EXAMPLES}/tinystories/{name}.yaml", f"data.train={beginnings}/text/{text}.txt", *FEW]
        bundles[name] = Path(run(capsys, "train", *given)["bundle"])
        scores = run(capsys, "evaluate", *given)
        assert scores["perplexity"] < scores["baseline"]["perplexity"]
    before, after = (load_file(bundle / "model.safetensors") for bundle in bundles.values())
    equal = {name for name in before if torch.equal(before[name], after[name])}
    assert equal == {name for name in before if "embed" in name} != set()
