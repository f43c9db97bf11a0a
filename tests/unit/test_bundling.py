"""The bundle of a run says what the model is and was made from, stops where its data stopped, and works by itself."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from heliostat.data.records import Row
from heliostat.data.tokens import TokenDataset, encode
from heliostat.errors import ModelError
from heliostat.experiment import ExperimentConfig
from heliostat.models import adapters, base, bundle, files
from heliostat.models.config import AdapterConfig
from heliostat.training import bundling
from heliostat.training.setup import Source
from tests import tiny

IDS = torch.tensor([[261, 297, 293, 275, 268, 270]])
END, PAD, TURN_END = 0, 1, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("bundling") / "model", "llama")


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    rows = [Row({"prompt": text, "completion": " house"}, f"x:{i}") for i, text in enumerate(tiny.TEXTS[:4])]
    encode(rows, tiny.tokenizer(), config("x").data).save(tmp_path / "tokens", "train")
    return tmp_path / "tokens"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def config(model: Path | str, **sections: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "name": "x",
            "model": {"model_name_or_path": str(model), "revision": "main"},
            "data": {
                "train": "x.jsonl",
                "format": "prompt_completion",
                "prompt_template": "{prompt}:",
                "max_length": 64,
            },
            **sections,
        }
    )


def source(model: Path, *, from_scratch: bool = False) -> Source:
    return Source(str(model), from_scratch, base.load_tokenizer(str(model)))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model.eval()(IDS).logits
    return result


def test_the_bundle_of_a_full_model(model: Path, tokens: Path, run_folder: Path) -> None:
    trained = AutoModelForCausalLM.from_pretrained(model)
    trained.save_pretrained(run_folder / "weights")
    settings = {"max_new_tokens": 7, "do_sample": True, "temperature": 0.5}
    made = bundling.write(
        config(model, generation=settings, registry={"check_prompts": ["the red cat"]}),
        run_folder,
        source(model),
        tokens,
        {"run": "x-0001", "data_hash": "d"},
    )
    assert made == run_folder / "bundle"
    manifest = bundle.verify(made)
    assert manifest["check_prompts"] == ["the red cat"]
    assert manifest["base"] == {"reference": str(model), "revision": "main", "sha256": files.weights_sha256(model)}
    assert manifest["lineage"] == {"run": "x-0001", "data_hash": "d"}
    assert (manifest["format"], manifest["prompt_template"]) == ("prompt_completion", "{prompt}:")
    assert manifest["stop_token_ids"] == [END]
    generation = AutoModelForCausalLM.from_pretrained(made).generation_config
    assert (generation.max_new_tokens, generation.do_sample, generation.temperature) == (7, True, 0.5)
    assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == ([END], PAD, END)
    assert generation.top_k is None, "what the config leaves open is left open"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(made)), logits(trained))
    assert AutoTokenizer.from_pretrained(made).get_vocab() == tiny.tokenizer().get_vocab()


def test_a_model_from_scratch_has_no_base(model: Path, tokens: Path, run_folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(run_folder / "weights")
    made = bundling.write(config(model), run_folder, source(model, from_scratch=True), tokens, {})
    assert bundle.verify(made)["base"] is None


@pytest.mark.parametrize("merge", [False, True])
def test_the_bundle_of_an_adapter_is_the_adapter_or_the_merged_model(
    merge: bool, model: Path, tokens: Path, run_folder: Path
) -> None:
    adapter = AdapterConfig(method="lora", lora_r=4, merge=merge)
    trained = adapters.attach(base.load_model(str(model), dtype=torch.float32), adapter, base=str(model), seed=1)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trained.save_pretrained(run_folder / "weights")
    made = bundling.write(config(model, adapter=adapter), run_folder, source(model), tokens, {})
    names = {path.name for path in made.iterdir()}
    assert ("adapter_model.safetensors" in names, "model.safetensors" in names) == (not merge, merge)
    assert ("adapter_config.json" in names) == (not merge)
    loaded = base.load_for_inference(str(made))
    assert torch.allclose(logits(loaded.model), logits(trained), atol=1e-4)
    assert loaded.model.generation_config.max_new_tokens == 64
    assert not (run_folder / "merged").exists()
    if merge:
        assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(made)), logits(trained), atol=1e-4)


def test_writing_the_bundle_again_gives_the_same_files(model: Path, tokens: Path, run_folder: Path) -> None:
    """A driver that is killed while writing it, or before registering it, writes it again."""
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(run_folder / "weights")
    hashes = [
        bundle.verify(bundling.write(config(model), run_folder, source(model), tokens, {}))["files"] for _ in range(2)
    ]
    assert hashes[0] == hashes[1]


def test_a_damaged_run_folder_gives_no_bundle(model: Path, tokens: Path, run_folder: Path) -> None:
    adapter = AdapterConfig(method="lora", lora_r=4, merge=True)
    trained = adapters.attach(base.load_model(str(model), dtype=torch.float32), adapter, base=str(model), seed=1)
    trained.save_pretrained(run_folder / "weights")
    (run_folder / "weights" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="weights`: cannot be loaded"):
        bundling.write(config(model, adapter=adapter), run_folder, source(model), tokens, {})
    assert not (run_folder / "bundle").exists()


def dataset(*documents: list[int]) -> TokenDataset:
    ids = np.array([token for document in documents for token in document], dtype=np.int32)
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    return TokenDataset(ids, np.ones(len(ids), dtype=np.bool_), offsets, {})


@pytest.mark.parametrize(
    ("documents", "stops"),
    [
        ([[5, 6, END], [7, END]], [END]),
        ([[5, TURN_END], [6, TURN_END], [7, END]], [END, TURN_END]),
        ([[5, 6], [7, 6], [8, END]], [END]),
        ([[5, TURN_END, END], [6, TURN_END, END]], [END, TURN_END]),
    ],
)
def test_generation_stops_at_the_end_token_and_at_the_end_of_a_turn(
    documents: list[list[int]], stops: list[int]
) -> None:
    """An ordinary token that many (cut) documents end with is no stop."""
    assert bundling.stop_token_ids(dataset(*documents), tiny.tokenizer()) == stops


def test_lineage_names_everything_the_model_came_from() -> None:
    made = bundling.lineage("config", "data", "x-0001")
    assert (made["config_hash"], made["data_hash"], made["run"]) == ("config", "data", "x-0001")
    assert set(made["packages"]) == {"torch", "transformers", "deepspeed", "peft", "ray"}
    assert (
        made["packages"]["torch"] == torch.__version__.split("+")[0] or made["packages"]["torch"] == torch.__version__
    )
    json.dumps(made)


def test_the_commit_says_whether_something_lies_on_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert bundling.git_commit() is None
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert bundling.git_commit() == head
    (tmp_path / "file").write_text("2")
    assert bundling.git_commit() == f"{head}-dirty"
    monkeypatch.setenv("PATH", "")
    assert bundling.git_commit() is None


def test_the_metrics_of_a_run_are_its_last_and_its_best_evaluation(tmp_path: Path) -> None:
    rows = [
        {"progress.start": 0},
        {"eval_loss": 3.0, "eval_perplexity": 20.0},
        {"loss": 2.5, "grad_norm": 1.0},
        {"eval_loss": 2.0, "eval_perplexity": 7.4},
        {"loss": 1.5, "grad_norm": 0.5},
        {"eval_loss": 2.2, "eval_perplexity": 9.0},
    ]
    journal = tmp_path / "metrics.jsonl"
    journal.write_text("".join(json.dumps({"step": i, "time": 0, "metrics": row}) + "\n" for i, row in enumerate(rows)))
    assert bundling.final_metrics(tmp_path) == {"loss": 1.5, "grad_norm": 0.5, "eval_loss": 2.0, "eval_perplexity": 7.4}
