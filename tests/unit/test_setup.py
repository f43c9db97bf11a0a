"""What is refused before a run starts, where the model comes from, and how long the run is going to be."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.data.formats import CHATML
from heliostat.data.records import Row
from heliostat.data.tokens import encode
from heliostat.errors import ConfigError, ModelError
from heliostat.experiment import ExperimentConfig
from heliostat.models import adapters, base
from heliostat.models.config import AdapterConfig
from heliostat.training import runs, setup
from tests import tiny
from tests.bundles import write_bundle

ROWS = [Row({"prompt": text, "completion": " house"}, f"train.jsonl:{i}") for i, text in enumerate(tiny.TEXTS[:20])]
CHAT = [{"role": "user", "content": "the red cat"}, {"role": "assistant", "content": "the old dog"}]
SMALL = {"n_layer": 1, "n_embd": 16, "n_head": 2}


def config(model: dict[str, Any], **sections: Any) -> ExperimentConfig:
    data = {"train": "train.jsonl", "format": "prompt_completion", "max_length": 32, **sections.pop("data", {})}
    return ExperimentConfig.model_validate({"name": "x", "model": model, "data": data, **sections})


def scratch(**sections: Any) -> ExperimentConfig:
    return config({"scratch": {"vocab_size": 300, "config": SMALL}}, **sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"train": None}}, r"data\.train is missing: name the files to train on"),
        ({"training": {"fp16": True}}, r"training\.fp16 needs training\.use_gpu=true; CPUs train in fp32 or bf16"),
        ({"adapter": {"method": "lora"}}, r"adapter\.method=lora adapts an existing model, but model\.scratch makes"),
        ({"training": {"deepspeed": "zero5"}}, r"training\.deepspeed: `zero5` is neither a preset"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        setup.check(scratch(**sections))


@pytest.mark.parametrize(
    ("adapter", "training", "message"),
    [
        ({"method": "lora", "use_dora": True}, {"deepspeed": "zero3"}, "training.deepspeed=zero3 splits; use zero2"),
        ({"method": "qlora"}, {"deepspeed": "zero3_offload"}, "packed weights whole.*zero3_offload splits; use zero2"),
        ({"method": "prefix"}, {"gradient_checkpointing": True}, "exclude each other.*or adapter.method=prompt"),
        ({"method": "prefix"}, {}, "virtual tokens before a row.*set data.packing=false"),
        ({"method": "prompt"}, {}, "virtual tokens before a row.*set data.packing=false"),
    ],
    ids=str,
)
def test_methods_that_cannot_work_are_refused(adapter: dict[str, Any], training: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        setup.check(config({"model_name_or_path": "gpt2"}, adapter=adapter, training=training))


@pytest.mark.parametrize(
    ("adapter", "training", "message"),
    [
        ({"method": "ia3"}, {}, "embeddings of new tokens would not learn; use lora or full"),
        ({"method": "freeze", "freeze": ["embeddings"]}, {}, "leave `embeddings` out of adapter.freeze"),
        ({"method": "lora"}, {"deepspeed": "zero3"}, "an adapter needs the embeddings whole"),
    ],
    ids=str,
)
def test_new_tokens_that_could_not_learn_are_refused(
    adapter: dict[str, Any], training: dict[str, Any], message: str
) -> None:
    model = {"model_name_or_path": "gpt2", "add_tokens": ["cron"]}
    with pytest.raises(ConfigError, match=message):
        setup.check(config(model, adapter=adapter, training=training))


def test_quantised_training_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes; install the extra: pip install 'heliostat\[qlora\]'"):
        setup.check(config({"model_name_or_path": "gpt2"}, adapter={"method": "qlora"}))


def test_what_can_work_is_not_refused() -> None:
    setup.check(scratch(training={"bf16": True}))
    setup.check(config({"model_name_or_path": "gpt2"}, adapter={"method": "lora"}, training={"deepspeed": "zero3"}))
    setup.check(scratch(training={"fp16": True, "use_gpu": True}))


def test_a_new_model_is_made_once_and_found_again(tmp_path: Path) -> None:
    source = setup.load_source(scratch(), ROWS, tmp_path / "init")
    assert (source.path, source.from_scratch) == (str(tmp_path / "init"), True)
    assert len(source.tokenizer) <= 300
    assert source.tokenizer.decode(source.tokenizer("the red cat")["input_ids"]) == "the red cat"
    assert base.load_config(source.path).n_positions == 32, "as long as data.max_length"
    again = setup.load_source(scratch(), ROWS[:3], tmp_path / "init")
    assert again.tokenizer.get_vocab() == source.tokenizer.get_vocab(), "a resumed run keeps its tokenizer"


def test_a_new_tokenizer_learns_from_prompts_and_completions_of_the_training_rows(tmp_path: Path) -> None:
    rows = [Row({"prompt": "zyxzyx", "completion": "wvuwvu"}, f"x:{i}") for i in range(5)]
    vocabulary = setup.load_source(scratch(), rows, tmp_path / "init").tokenizer.get_vocab()
    assert {"zyxzyx", "wvuwvu"} <= vocabulary.keys()


def test_a_new_chat_model_gets_chatml_unless_told_otherwise(tmp_path: Path) -> None:
    rows = [Row({"messages": CHAT}, f"x:{i}") for i in range(5)]
    chats = scratch(data={"format": "chat"})
    source = setup.load_source(chats, rows, tmp_path / "init")
    assert source.tokenizer.chat_template == CHATML
    assert len(source.tokenizer("<|im_end|>")["input_ids"]) == 1
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    own = chats.model_copy(
        update={"model": chats.model.model_copy(update={"chat_template": str(tmp_path / "own.jinja")})}
    )
    assert setup.load_source(own, rows, tmp_path / "init").tokenizer.chat_template == "{{ messages }}"
    assert setup.load_source(scratch(), ROWS, tmp_path / "plain").tokenizer.chat_template is None


def test_a_template_file_that_is_not_there_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    gone = config({"model_name_or_path": str(tiny_bundle), "chat_template": "gone.jinja"})
    with pytest.raises(
        ConfigError, match=r"model\.chat_template: `gone\.jinja` is neither `chatml` nor a readable file"
    ):
        setup.load_source(gone, ROWS, tmp_path / "init")


def test_an_existing_model_is_used_as_it_is(tiny_bundle: Path, tmp_path: Path) -> None:
    source = setup.load_source(config({"model_name_or_path": str(tiny_bundle)}), ROWS, tmp_path / "init")
    assert (source.path, source.from_scratch) == (str(tiny_bundle), False)
    assert source.tokenizer.chat_template == CHATML
    assert not (tmp_path / "init").exists()


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_sequences_longer_than_the_model_are_refused(model_type: str, tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", model_type)
    fits = config({"model_name_or_path": str(folder)}, data={"max_length": 128})
    setup.load_source(fits, ROWS, tmp_path / "init")
    too_long = config({"model_name_or_path": str(folder)}, data={"max_length": 129})
    with pytest.raises(ConfigError, match=r"data\.max_length=129 is more than the model's 128 positions; lower it"):
        setup.load_source(too_long, ROWS, tmp_path / "init")


def test_training_goes_on_from_a_bundle_only_if_it_is_whole(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "bundle")
    chosen = config({"model_name_or_path": str(made)})
    assert setup.load_source(chosen, ROWS, tmp_path / "init").path == str(made)
    weights = bytearray((made / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (made / "model.safetensors").write_bytes(weights)
    with pytest.raises(ModelError, match=r"model\.safetensors: is damaged"):
        setup.load_source(chosen, ROWS, tmp_path / "init")


def test_virtual_tokens_take_positions(tiny_bundle: Path, tmp_path: Path) -> None:
    chosen = config({"model_name_or_path": str(tiny_bundle)}, adapter={"method": "prompt"}, data={"max_length": 109})
    with pytest.raises(ConfigError, match=r"128 positions less the 20 of adapter\.num_virtual_tokens; lower it"):
        setup.load_source(chosen, ROWS, tmp_path / "init")


@pytest.fixture
def adapter_folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A LoRA adapter of rank 4 for the tiny model, with its tokenizer."""
    settings = AdapterConfig(method="lora", lora_r=4)
    model = base.load_model(str(tiny_bundle), dtype=torch.float32)
    adapters.save(adapters.attach(model, settings, base=str(tiny_bundle), seed=1), tmp_path / "adapter", None)
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_gone_on_with_as_it_is(adapter_folder: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    chosen = config({"model_name_or_path": str(adapter_folder)}, adapter={"method": "lora"})
    source = setup.load_source(chosen, ROWS, tmp_path / "init")
    assert (source.path, source.continues) == (str(tiny_bundle), str(adapter_folder))
    assert source.adapter is not None
    assert (source.adapter.lora_r, source.adapter.lora_alpha) == (4, 8)
    written = ExperimentConfig.model_validate(chosen.model_dump())
    assert setup.load_source(written, ROWS, tmp_path / "init").adapter == source.adapter, "as a resumed run says it"


@pytest.mark.parametrize(
    ("adapter", "model", "message"),
    [
        ({"method": "full"}, {}, r"holds an adapter and no whole model.*heliostat merge MODEL FOLDER"),
        ({"method": "ia3"}, {}, r"adapter\.method=ia3: .* holds an adapter of the kind .*LORA"),
        ({"method": "lora", "lora_r": 8}, {}, r"adapter\.lora_r=8: .* has 4; drop the key"),
        ({"method": "lora", "lora_target_modules": ["c_proj"]}, {}, r"adapter\.lora_target_modules=\['c_proj'\]: "),
        ({"method": "lora", "init_lora_weights": "pissa"}, {}, r"adapter\.init_lora_weights is for new adapters"),
        ({"method": "lora"}, {"add_tokens": ["cron"]}, r"model\.add_tokens: an adapter .* cannot take new tokens"),
    ],
    ids=str,
)
def test_an_adapter_is_not_made_another(
    adapter: dict[str, Any], model: dict[str, Any], message: str, adapter_folder: Path, tmp_path: Path
) -> None:
    chosen = config({"model_name_or_path": str(adapter_folder), **model}, adapter=adapter)
    with pytest.raises(ConfigError, match=message):
        setup.load_source(chosen, ROWS, tmp_path / "init")


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, Path]:
    """20 training and 5 validation documents."""
    data = config({"model_name_or_path": "x"}).data
    for split, rows in (("train", ROWS), ("validation", ROWS[:5])):
        encode(rows, tiny.tokenizer(), data).save(tmp_path / split, split)
    return {split: tmp_path / split for split in ("train", "validation")}


def planned(tokens: dict[str, Path], tmp_path: Path, evaluations: int = 1, **training: Any) -> setup.Plan:
    chosen = scratch(training=training, data={"packing": False}, seed=9)
    run = runs.open_run(tmp_path / "runs", "x", "hash", "auto")
    run.close()
    return setup.plan(chosen, run, setup.Source("somewhere", True, tiny.tokenizer()), tokens, evaluations)


def test_a_trial_is_evaluated_often_enough_to_be_stopped(tokens: dict[str, Path], tmp_path: Path) -> None:
    often = planned(tokens, tmp_path, 5, per_device_train_batch_size=2, max_steps=12).spec
    assert often.eval_steps == 3, "at a fifth of the steps or just behind, not just before"
    assert planned(tokens, tmp_path, 5, per_device_train_batch_size=2, max_steps=12, eval_steps=7).spec.eval_steps == 7


def test_steps_follow_from_rows_batch_and_epochs(tokens: dict[str, Path], tmp_path: Path) -> None:
    plan = planned(tokens, tmp_path, num_workers=2, per_device_train_batch_size=2, num_train_epochs=3)
    assert (plan.train_rows, plan.steps_per_epoch, plan.spec.total_steps) == (20, 5.0, 15)
    assert (plan.spec.eval_steps, plan.spec.save_steps) == (5, 5), "once an epoch"
    assert "20 sequences of up to 32 tokens" in str(plan)
    assert str(plan).endswith("15 steps of 4 (3.0 epochs)")
    plan = planned(tokens, tmp_path, per_device_train_batch_size=64, eval_steps=7)
    assert (plan.spec.total_steps, plan.spec.eval_steps, plan.spec.save_steps) == (1, 7, 7)
    plan = planned(tokens, tmp_path, per_device_train_batch_size=4, max_steps=2, save_steps=3)
    assert (plan.spec.total_steps, plan.spec.eval_steps, plan.spec.save_steps) == (2, 2, 3)


def test_the_workers_are_told_what_they_need(tokens: dict[str, Path], tmp_path: Path) -> None:
    spec = planned(tokens, tmp_path).spec
    assert (spec.model, spec.from_scratch, spec.seed, spec.packing, spec.max_length) == (
        "somewhere",
        True,
        9,
        False,
        32,
    )
    assert (spec.train_tokens, spec.validation_tokens) == (str(tokens["train"]), str(tokens["validation"]))
    assert spec.pad_token_id == tiny.tokenizer().pad_token_id
    assert spec.weights.parent == spec.checkpoints.parent == tmp_path / "runs" / "x-0001"
    without = planned({"train": tokens["train"]}, tmp_path).spec
    assert without.validation_tokens is None
    assert without.attempt == "attempt-02"


def test_packing_makes_fewer_and_fuller_rows(tokens: dict[str, Path], tmp_path: Path) -> None:
    run = runs.open_run(tmp_path / "runs", "x", "hash", "never")
    run.close()
    source = setup.Source("somewhere", True, tiny.tokenizer())
    loose, packed = (setup.plan(scratch(data={"packing": p}), run, source, tokens) for p in (False, True))
    assert packed.train_rows < loose.train_rows == 20
    assert loose.fill < packed.fill <= 1
    assert packed.fill * packed.train_rows == pytest.approx(loose.fill * loose.train_rows)


def test_new_weights_are_not_touched_by_looking_up_the_source(tmp_path: Path) -> None:
    """The driver's random state has no say in what the workers initialise."""
    source = setup.load_source(scratch(), ROWS, tmp_path / "init")
    torch.manual_seed(123)
    first = base.new_model(source.path, seed=42, dtype=torch.float32).state_dict()
    second = base.new_model(source.path, seed=42, dtype=torch.float32).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
