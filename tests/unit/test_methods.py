"""Every method, on GPT-2 and Llama, under ZeRO-2 and ZeRO-3: trained, bundled, loaded again and served as what it was.

The steps are those of `heliostat train` without MLflow and without Ray.
"""

import asyncio
import shutil
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from heliostat import journal
from heliostat.cli import main
from heliostat.data import prepare, splits
from heliostat.data.tokens import TokenDataset
from heliostat.evaluation import evaluator
from heliostat.experiment import ExperimentConfig
from heliostat.models import base, quantised
from heliostat.serving.calls import Resumed
from heliostat.serving.config import EndpointArgs
from heliostat.serving.hosting import Hosted
from heliostat.serving.protocol import CompletionRequest
from heliostat.training import bundling, checkpoint, runs, setup
from heliostat.training.worker import LocalSession, Worker
from tests import tiny

IDS = torch.tensor([[261, 297, 293, 275, 268, 270]])
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "freeze": {"method": "freeze", "freeze": ["embeddings"]},
    "lora": {"method": "lora", "lora_r": 4},
    "dora": {"method": "lora", "lora_r": 4, "use_dora": True},
    "pissa": {"method": "lora", "lora_r": 4, "init_lora_weights": "pissa"},
    "ia3": {"method": "ia3"},
    "prefix": {"method": "prefix", "num_virtual_tokens": 4},
    "projection": {"method": "prefix", "num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 8},
    "prompt": {"method": "prompt", "num_virtual_tokens": 4, "prompt_tuning_init": "SAMPLE_VOCAB"},
    "nf4": {"method": "qlora", "lora_r": 4},
    "int8": {"method": "qlora", "lora_r": 4, "quantization_bit": 8},
}
QUANTISED = ("nf4", "int8")
WHOLE_WEIGHTS = ("dora", *QUANTISED)
# One of each kind: variants of LoRA are served as merged weights too, and whole models by other tests.
SERVED = ("lora", "ia3", "prefix", "prompt", "nf4")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("methods") / request.param, request.param)


def experiment(
    model: Path,
    folder: Path,
    adapter: dict[str, Any],
    tokens: Mapping[str, list[str]] = types.MappingProxyType({}),
    **training: Any,
) -> ExperimentConfig:
    rows = folder / "rows.jsonl"
    if not rows.exists():
        folder.mkdir(exist_ok=True)
        rows.write_text("".join(f'{{"prompt": "{text[:12]}", "completion": "{text[12:]}"}}\n' for text in tiny.TEXTS))
    return ExperimentConfig.model_validate(
        {
            "name": "x",
            "model": {"model_name_or_path": str(model), **tokens},
            "adapter": adapter,
            "data": {
                "format": "prompt_completion", "train": [str(rows)], "validation_size": 4, "max_length": 64,
                "packing": False,
            },
            "training": {
                "num_workers": 0, "per_device_train_batch_size": 4, "learning_rate": 0.02, "max_steps": 2,
                "load_best_model_at_end": False, **training,
            },
            "generation": {"max_new_tokens": 8},
        }
    )  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What came of a training."""

    logits: torch.Tensor
    """Of the model while it was in training, for IDS: [1, tokens, vocabulary]."""
    bundle: Path
    losses: dict[str, list[float]]


def train(config: ExperimentConfig, folder: Path, *, broken: bool = False) -> Trained:
    """What a training gives. `broken`: the last checkpoint is lost, and another worker goes on from the one before."""
    setup.check(config)
    rows = splits.load_splits(config.data, config.seed, ("train", "validation"))
    source = setup.load_source(config, rows["train"], folder / "init")
    prepared = prepare.prepare(rows, config.data, source.tokenizer, config.seed, folder / "tokens")
    run = runs.open_run(folder / "runs", config.name, "hash", "auto")
    plan = setup.plan(config, run, source, prepared.splits)
    with LocalSession() as session:
        worker = Worker(plan.spec, session)
        worker.run()
        if broken:
            shutil.rmtree(checkpoint.newest_first(plan.spec.checkpoints)[0].folder)
            worker = Worker(plan.spec, session)
            worker.run()
        found = logits(worker.engine.module)
    run.close()
    losses: dict[str, list[float]] = {}
    for row in journal.read(run.folder / journal.NAME)[0]:
        for name, value in row["metrics"].items():
            losses.setdefault(name, []).append(value)
    return Trained(found, bundling.write(config, run.folder, source, prepared.splits["train"], {}), losses)


def logits(model: Any) -> torch.Tensor:
    """Those for IDS, without virtual tokens."""
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found[:, -IDS.shape[1] :]


def served(bundle: Path, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The tokens that a replica answers each prompt with, all at once, after its own check."""
    requests = [CompletionRequest.model_validate({"model": "m", "prompt": prompt}) for prompt in prompts]

    async def answer(hosted: Hosted, request: CompletionRequest) -> list[int]:
        messages = [message async for message in hosted.answer(request, Resumed(), {})]
        return [t for part in messages if isinstance(part, list) for _, delta in part for t in delta.token_ids]

    async def ask() -> list[list[int]]:
        hosted = await Hosted.load(str(bundle), "m", "1", EndpointArgs(cache_tokens=1024))
        try:
            assert await hosted.check() is None
            return list(await asyncio.gather(*(answer(hosted, request) for request in requests)))
        finally:
            hosted.close()

    return asyncio.run(ask())


def pefts_own(bundle: Path) -> Any:
    """The model as those load it who have PEFT alone."""
    kind = AutoPeftModelForCausalLM if (bundle / "adapter_config.json").exists() else AutoModelForCausalLM
    return kind.from_pretrained(bundle).eval()


def generated(model: Any, prompt: list[int]) -> list[int]:
    """What the model's own `generate` gives for one prompt, up to its end token."""
    ids = torch.tensor([prompt])
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=0, pad_token_id=1)
    row = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0].tolist()
    new: list[int] = row[len(prompt) :]
    return new[: new.index(0) + 1] if 0 in new else new


@pytest.mark.parametrize("method", METHODS)
def test_what_was_trained_is_what_is_loaded_and_served(method: str, model: Path, tmp_path: Path) -> None:
    stages = ["zero2"] if method in WHOLE_WEIGHTS else ["zero3", "zero2"]
    trained = [
        train(experiment(model, tmp_path / stage, METHODS[method], deepspeed=stage), tmp_path / stage)
        for stage in stages
    ]
    untouched = logits(base.load_for_inference(str(model)).model)
    for one in trained:
        loaded = logits(base.load_for_inference(str(one.bundle)).model)
        assert torch.allclose(loaded, logits(pefts_own(one.bundle)), atol=1e-4)
        assert not torch.allclose(one.logits, untouched, atol=0.05)
        assert one.losses["loss"] == pytest.approx(trained[0].losses["loss"], rel=1e-5)
        if method not in QUANTISED:
            assert torch.allclose(loaded, one.logits, atol=1e-4)
    if method in SERVED:
        prompts = [IDS[0].tolist(), IDS[0, :3].tolist(), [5, *IDS[0].tolist()]]
        theirs = pefts_own(trained[-1].bundle)
        assert served(trained[-1].bundle, prompts) == [generated(theirs, prompt) for prompt in prompts]


@pytest.mark.parametrize(
    ("method", "stage"),
    [("lora", "zero3"), ("pissa", "zero2"), ("ia3", "zero2"), ("prefix", "zero2"), ("prompt", "zero3")],
)
def test_training_goes_on_with_an_adapter(method: str, stage: str, model: Path, tmp_path: Path) -> None:
    first = train(experiment(model, tmp_path / "1", METHODS[method], deepspeed=stage), tmp_path / "1")
    named = {"method": METHODS[method]["method"]}
    still = train(experiment(first.bundle, tmp_path / "2", named, deepspeed=stage, learning_rate=0), tmp_path / "2")
    assert torch.allclose(still.logits, first.logits, atol=1e-4)
    on = train(experiment(still.bundle, tmp_path / "3", named, deepspeed=stage), tmp_path / "3")
    assert not torch.allclose(on.logits, first.logits, atol=0.05)
    loaded = base.load_for_inference(str(on.bundle))
    assert torch.allclose(logits(loaded.model), on.logits, atol=1e-4)
    assert loaded.manifest is not None
    assert loaded.manifest["base"]["reference"] == str(model)
    assert loaded.manifest["continues"] == str(still.bundle)


@pytest.mark.parametrize(("method", "stage"), [("full", "zero3"), ("lora", "zero2"), ("nf4", "zero2")])
def test_new_tokens_learn_and_come_along(method: str, stage: str, model: Path, tmp_path: Path) -> None:
    tokens = {"add_tokens": ["cat goes"], "add_special_tokens": ["<|note|>"]}
    config = experiment(model, tmp_path, METHODS[method], tokens, deepspeed=stage)
    trained = train(config, tmp_path)
    loaded = base.load_for_inference(str(trained.bundle))
    before = base.load_tokenizer(str(model))
    ids = loaded.tokenizer.convert_tokens_to_ids(["cat goes", "<|note|>"])
    assert ids == [len(before), len(before) + 1]
    assert ids[0] in loaded.tokenizer("the red cat goes to")["input_ids"]
    assert loaded.tokenizer.decode(ids, skip_special_tokens=True) == "cat goes"
    assert trained.logits.shape[-1] == len(loaded.tokenizer)
    assert method in QUANTISED or torch.allclose(logits(loaded.model), trained.logits, atol=1e-4)
    assert served(trained.bundle, [[5, ids[0]]]) == [generated(loaded.model, [5, ids[0]])]


def test_an_adapter_bundle_is_merged_into_a_whole_one(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = train(experiment(model, tmp_path, METHODS["lora"]), tmp_path)
    target = tmp_path / "deep" / "merged"
    assert main(["merge", str(trained.bundle), str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(target)), trained.logits, atol=1e-4)
    loaded = base.load_for_inference(str(target))
    assert loaded.manifest is not None
    assert loaded.manifest["merged_from"] == str(trained.bundle)
    assert loaded.model.generation_config.max_new_tokens == 8
    assert [path.name for path in target.parent.iterdir()] == ["merged"], "nothing is left beside it"
    base.load_for_inference(str(trained.bundle))
    for again, message in ((trained.bundle, "is there already; name a new folder"), (target, "holds no adapter")):
        assert main(["merge", str(again), str(target)]) == 2
        assert message in capsys.readouterr().err


def test_virtual_tokens_are_not_merged(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = train(experiment(model, tmp_path, METHODS["prefix"]), tmp_path)
    assert main(["merge", str(trained.bundle), str(tmp_path / "merged")]) == 2
    assert "virtual tokens, which cannot be merged" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_the_loss_of_virtual_tokens_is_pefts(method: str, model: Path, tmp_path: Path) -> None:
    """Our batches have no attention mask, and logits of learned positions only; PEFT's plain call has and does."""
    config = experiment(model, tmp_path, METHODS[method])
    trained = train(config, tmp_path)
    theirs = pefts_own(trained.bundle)
    (tokens,) = (tmp_path / "tokens").glob("*/validation")
    total = count = 0.0
    with torch.no_grad():
        documents = TokenDataset.open(tokens)
        for number in range(len(documents)):
            ids, learned = (torch.tensor(part)[None] for part in documents.document(number))
            labels = torch.where(learned.bool(), ids.long(), -100)
            loss = theirs(input_ids=ids.long(), attention_mask=torch.ones_like(ids), labels=labels).loss
            items = int((labels[:, 1:] != -100).sum())
            total, count = total + loss.item() * items, count + items
    assert trained.losses["eval_loss"][-1] == pytest.approx(total / count, rel=1e-5)
    rows = splits.load_splits(config.data, config.seed, ("validation",))["validation"]
    evaluated = evaluator.likelihood(base.load_for_inference(str(trained.bundle)), rows, config.data)
    assert evaluated["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("method", QUANTISED)
def test_a_quantised_base_is_left_as_it_is_and_the_adapter_fits_it(method: str, model: Path, tmp_path: Path) -> None:
    trained = train(experiment(model, tmp_path, METHODS[method]), tmp_path)
    bits = METHODS[method].get("quantization_bit", 4)
    options = quantised.loading(bits, double=True, dtype=torch.float32, device=torch.device("cpu"))
    again = base.load_model(str(model), dtype=torch.float32, options=options)
    quantised.keep_weights(again)
    assert torch.allclose(logits(PeftModel.from_pretrained(again, trained.bundle)), trained.logits, atol=1e-5)


@pytest.mark.parametrize("method", ["nf4", "prefix", "pissa"])
def test_a_resumed_training_ends_as_an_unbroken_one(method: str, model: Path, tmp_path: Path) -> None:
    config = experiment(model, tmp_path, METHODS[method], max_steps=4, save_steps=2)
    whole = train(config, tmp_path)
    resumed = train(config, tmp_path / "broken", broken=True)
    assert resumed.losses["progress.start"] == [0, 2]
    assert torch.equal(resumed.logits, whole.logits)
