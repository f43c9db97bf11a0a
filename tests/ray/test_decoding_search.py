"""A decoding search on real actors: all settings see the same, and only what is proven replaces greedy decoding."""

import copy
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import GenerationConfig

from heliostat import cli
from heliostat.data.config import DataConfig
from heliostat.data.records import Row
from heliostat.data.tokens import DocumentEncoder
from heliostat.errors import ConfigError, DataError, HeliostatError, RegistryError
from heliostat.evaluation import evaluator
from heliostat.evaluation.config import GenerationSettings
from heliostat.evaluation.prefix import PromptPrefix
from heliostat.experiment import ExperimentConfig
from heliostat.models import base, bundle
from heliostat.registry import store, tracking, versions
from heliostat.tuning import decoding_plan, decoding_search
from heliostat.tuning.decoding_plan import Plan
from heliostat.tuning.search import Outcome
from tests import tiny

DATA = DataConfig(format="prompt_completion", prompt_template="{prompt} ->", max_length=64)
ANSWERS = ("house", "cat", "river", "market")
PROMPTS = [f"{number} {tiny.TEXTS[number % 36]}" for number in range(48)]
PAIRS = [{"prompt": prompt, "completion": f" {ANSWERS[n % 4]}"} for n, prompt in enumerate(PROMPTS)]
MAGIC = "big red dog"
"""The system prompt without which the second model knows nothing."""
TOO_LONG = "the red cat " * 100
SAMPLING = {"max_new_tokens": 6, "do_sample": True, "temperature": 3.0}
SPACE: dict[str, Any] = {
    "do_sample": [True],
    "temperature": [2.0, 4.0, 8.0, 16.0],
    "top_k": [1, 0],
    "system_prompt": {"choice": [None, TOO_LONG]},
}


@dataclass(frozen=True)
class Trained:
    """A bundle, and a config that searches for it."""

    bundle: Path
    config: ExperimentConfig


def train(folder: Path, prefix: PromptPrefix) -> Trained:
    """A bundle that knows the answers to all prompts behind the prefix, and samples wildly by default."""
    loaded = base.load_for_inference(str(tiny.write_model(folder / "model", "llama")))
    data = DATA.model_copy(update={"prompt_template": f"{prefix.text()}{{prompt}} ->"})
    rows = [Row(pair, f"rows.jsonl:{number}") for number, pair in enumerate(PAIRS, 1)]
    model = overfitted(
        loaded.model, DocumentEncoder(loaded.tokenizer, data).documents(rows), loaded.tokenizer.pad_token_id
    )
    model.save_pretrained(folder / "weights")
    made = bundle.write(
        folder / "bundle", weights=folder / "weights", tokenizer=loaded.tokenizer,
        generation_config=GenerationConfig(**SAMPLING, eos_token_id=[0], pad_token_id=1, bos_token_id=0),
        manifest={"task": "causal_lm", "format": "prompt_completion", "prompt_template": "{prompt} ->",
                  "lineage": {"run": "r"}},
    )  # fmt: skip
    file = folder / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(pair)}\n" for pair in PAIRS))
    return Trained(made, configure(folder, file))


def overfitted(model: Any, documents: Sequence[Any], pad: int, steps: int = 150) -> Any:
    longest = max(len(ids) for ids, _ in documents)
    inputs = torch.full((len(documents), longest), pad)
    labels = torch.full_like(inputs, -100)
    for index, (ids, mask) in enumerate(documents):
        inputs[index, : len(ids)] = torch.tensor(ids)
        labels[index, : len(ids)] = torch.where(torch.tensor(mask), torch.tensor(ids).long(), -100)
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(input_ids=inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def configure(folder: Path, file: Path) -> ExperimentConfig:
    return ExperimentConfig.model_validate({
        "name": "tiny",
        "storage_path": str(folder / "runs"),
        "model": {"model_name_or_path": str(folder / "model")},
        "data": {**DATA.model_dump(), "train": str(file), "validation": str(file), "test": str(folder / "none.jsonl")},
        "generation": {"max_new_tokens": 6},
        "evaluation": {"metrics": ["exact_match"], "batch_size": 8},
        "tune_decoding": {
            "space": SPACE, "searcher": "grid", "prompts": 27, "holdout_prompts": 21, "min_prompts": 3, "num_seeds": 2,
        },
    })  # fmt: skip


def changed(config: ExperimentConfig, **values: Any) -> ExperimentConfig:
    return config.model_copy(update={"tune_decoding": config.tune_decoding.model_copy(update=values)})


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Greedy decoding is right."""
    return train(tmp_path_factory.mktemp("known"), PromptPrefix())


@pytest.fixture(scope="module")
def magic(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Greedy decoding is right behind the system prompt only."""
    return train(tmp_path_factory.mktemp("magic"), PromptPrefix(MAGIC))


@pytest.fixture(scope="module")
def plan(known: Trained) -> Plan:
    return decoding_plan.prepare(known.config, str(known.bundle))


@pytest.fixture(scope="module")
def raced(ray_cluster: Any, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """16 settings of the grid, greedy decoding and the bundle's own settings, two at a time."""
    folder = tmp_path_factory.mktemp("race")
    outcomes = decoding_search.race(plan, folder, 2, console())
    noted = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert [note["point"] for note in noted] == [outcome.point for outcome in outcomes]
    return outcomes


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def of(outcomes: Sequence[Outcome], **point: Any) -> list[Outcome]:
    return [outcome for outcome in outcomes if point.items() <= outcome.point.items()]


def statistics(outcome: Outcome) -> Any:
    return outcome.results[-1]["statistics"]


def test_greedy_decoding_and_the_models_own_settings_run_to_the_end(raced: list[Outcome], plan: Plan) -> None:
    assert len(raced) == 18
    greedy, own = raced[:2]
    assert plan.task.setting(own.point).decoding() == SAMPLING
    for outcome in (greedy, own):
        assert outcome.state == "finished"
        assert [result["prompts"] for result in outcome.results] == [3, 9, 27]
    assert greedy.results[-1]["score"] == 1.0
    assert own.results[-1]["score"] < 0.9


def test_all_settings_see_the_same_prompts_in_the_same_order(raced: list[Outcome], plan: Plan, known: Trained) -> None:
    """Sampling from one candidate is greedy decoding; and what one process generates for those rows is the same."""
    alike = of(raced, top_k=1, system_prompt=None)
    assert len(alike) == 4
    for outcome in alike:
        assert np.array_equal(statistics(outcome), statistics(raced[0])[: outcome.results[-1]["prompts"]])
    loaded = base.load_for_inference(str(known.bundle))
    settings = GenerationSettings(max_new_tokens=6)
    examples = evaluator.predict(loaded, plan.rows, DATA, settings, batch_size=8, prefix=PromptPrefix())
    assert np.array_equal(plan.metric.statistics(examples), statistics(raced[0]))
    assert raced[0].results[-1]["tokens"] == sum(example.tokens for example in examples) / 27


def test_what_cannot_win_is_stopped_early(raced: list[Outcome]) -> None:
    wild = of(raced, top_k=0, system_prompt=None)
    assert {outcome.state for outcome in wild} == {"stopped"}
    assert all(outcome.results[-1]["prompts"] in (3, 9) for outcome in wild)
    assert all(outcome.results[-1]["score"] <= raced[0].results[-1]["score"] for outcome in wild)
    assert any(outcome.results[-1]["score"] < 0.9 for outcome in wild)


def test_a_setting_that_cannot_be_used_is_marked_and_the_others_go_on(raced: list[Outcome]) -> None:
    broken = of(raced, system_prompt=TOO_LONG)
    assert len(broken) == 8
    assert {outcome.state for outcome in broken} == {"failed"}
    assert all("which leaves none of the model's 128 positions" in str(outcome.error) for outcome in broken)


def test_each_actor_loads_the_model_once(raced: list[Outcome]) -> None:
    reports = [result for outcome in raced if outcome.state != "failed" for result in outcome.results]
    actors = {report["process"] for report in reports}
    assert 1 <= len(actors) <= 2
    assert len({(report["process"], report["loading_seconds"]) for report in reports}) == len(actors)


def test_a_gain_that_may_be_chance_is_not_significant(ray_cluster: Any, plan: Plan) -> None:
    alike = plan.task.setting({"do_sample": True, "top_k": 1})
    found = decoding_search.compare(plan, alike, 2)
    assert (found.gain, found.interval.low, found.interval.high) == (0.0, 0.0, 0.0)
    assert (found.score, found.greedy_score, found.prompts) == (1.0, 1.0, 21)
    assert not found.significant


def test_a_loss_is_one(ray_cluster: Any, plan: Plan) -> None:
    """Averaged over the seeds of the winner, against the greedy one of the same prompts."""
    found = decoding_search.compare(plan, plan.task.setting({"do_sample": True, "temperature": 8.0, "top_k": 0}), 2)
    assert found.gain == pytest.approx(found.score - found.greedy_score)
    assert found.interval.low <= found.gain <= found.interval.high < 0


def registered(trained: Trained, name: str) -> str:
    run_id = tracking.start_run("tiny", "made by hand", {}, {})
    return versions.register(run_id, trained.bundle, name, {}).version


@pytest.mark.usefixtures("module_store")
def test_greedy_decoding_replaces_worse_defaults(ray_cluster: Any, known: Trained) -> None:
    """The new version differs in its decoding settings alone, and is the challenger."""
    config = changed(known.config, space={"do_sample": [True], "temperature": [4.0], "top_k": [1, 0]})
    parent = registered(known, "tiny")
    result = decoding_search.tune_decoding(config, None, console())
    assert (result["kept_greedy"], result["settings"]) == (True, {"max_new_tokens": 6, "do_sample": False})
    assert (result["score"], result["greedy_score"]) == (1.0, 1.0)
    assert result["trials"] == 4
    assert result["model_uri"] == f"models:/tiny/{result['version']}" != f"models:/tiny/{parent}"
    source = Path(versions.resolve(f"models:/tiny/{parent}").path)
    check_files(Path(result["bundle"]), source, {"max_new_tokens": 6, "do_sample": False})
    version = versions.version_of_alias("tiny", "challenger")
    assert version.version == result["version"]
    assert json.loads(version.tags["decoding"]) == result["settings"]
    assert (version.tags["decoding_parent"], version.tags["metric"]) == (parent, "exact_match")
    check_run(result)
    again = decoding_search.tune_decoding(changed(config, time_budget_s=0.01), None, console())
    assert (again["version"], again["bundle"], again["settings"]) == (None, None, result["settings"])
    assert "no new version" in decoding_search.show(again)


def check_files(made: Path, parent: Path, settings: dict[str, Any]) -> None:
    """Only the decoding settings differ; the token ids are the parent's; all else is shared."""
    before, after = bundle.read_manifest(parent), bundle.verify(made)
    names = before["files"].keys() - {"generation_config.json"}
    assert all((made / name).samefile(parent / name) for name in names)
    assert after["files"].keys() == before["files"].keys()
    written = json.loads((made / "generation_config.json").read_text())
    ids = {"eos_token_id": [0], "pad_token_id": 1, "bos_token_id": 0}
    assert written == {**settings, **ids, "transformers_version": written["transformers_version"]}
    assert after["lineage"] == before["lineage"]
    assert after["decoding"]["settings"].items() >= settings.items()


def check_run(result: dict[str, Any]) -> None:
    """The MLflow run has the numbers, the table and the figures."""
    client = store.client()
    run = client.get_run(result["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["greedy_score"] == result["greedy_score"]
    names = {file.path for file in client.list_artifacts(result["run_id"])}
    expected = {
        "decoding_search.json",
        "verdict.txt",
        "decoding_scores.png",
        "decoding_tokens.png",
        "decoding_seconds.png",
    }
    assert expected <= names
    saved = json.loads((Path(result["folder"]) / "results.json").read_text())
    assert len(saved["entries"]) == result["trials"]


@pytest.mark.usefixtures("module_store")
def test_a_prompt_that_is_proven_becomes_part_of_the_model(
    ray_cluster: Any, magic: Trained, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By the command line; the new version knows the answers without being told how to ask."""
    parent = registered(magic, "magic")
    file = tmp_path / "magic.yaml"
    # On fewer prompts the prefix is not yet ahead, and equals are stopped.
    config = changed(magic.config, space={"system_prompt": [None, MAGIC], "few_shot": [0, 1]}, min_prompts=14)
    file.write_text(json.dumps({**config.model_dump(mode="json"), "name": "magic"}))
    assert cli.main(["tune-decoding", str(file), "--model", f"models:/magic/{parent}", "--json"]) == 0
    output = capsys.readouterr()
    result = json.loads(output.out.splitlines()[-1])
    assert not result["kept_greedy"]
    assert result["settings"] == {"max_new_tokens": 6, "do_sample": False, "system_prompt": MAGIC}
    assert result["interval"][0] > 0
    assert "is better than greedy decoding" in result["verdict"]
    loaded = base.load_for_inference(versions.resolve(result["model_uri"]).path)
    assert PromptPrefix.of(loaded.manifest) == PromptPrefix(MAGIC)
    rows = [Row(pair, "r") for pair in PAIRS]
    examples = evaluator.predict(loaded, rows, DATA, None, batch_size=8)
    assert np.mean([example.prediction == example.reference for example in examples]) > 0.9
    assert not any(prompt in output.err for prompt in PROMPTS), "no prompt of the data is shown"


@pytest.mark.usefixtures("module_store")
def test_a_search_out_of_time_keeps_greedy_decoding(ray_cluster: Any, known: Trained) -> None:
    """An unregistered bundle: the new one stays in the search's folder."""
    config = changed(known.config, space={"do_sample": [True], "temperature": [4.0]}, time_budget_s=0.01)
    result = decoding_search.tune_decoding(config, str(known.bundle), console())
    assert result["kept_greedy"]
    assert (result["version"], result["model_uri"]) == (None, None)
    assert Path(result["bundle"]).parent == Path(result["folder"])
    assert result["bundle"] in decoding_search.show(result)


@pytest.mark.usefixtures("module_store")
def test_a_search_in_which_all_fails_tells_why_and_its_run_failed(ray_cluster: Any, known: Trained) -> None:
    long = Row({"prompt": TOO_LONG, "completion": " x"}, "rows.jsonl:1")
    plan = decoding_plan.prepare(changed(known.config, space={"top_k": [1]}), str(known.bundle))
    broken = replace(
        plan, rows=tuple(replace(long, fields={**long.fields, "prompt": f"{n} {TOO_LONG}"}) for n in range(27))
    )
    with pytest.raises(HeliostatError, match="all 3 settings failed; the first: DataError: prompt 1 of 3 has"):
        decoding_search.race(broken, known.bundle.parent / "broken", 2, console())


@pytest.mark.usefixtures("module_store")
def test_wrong_input_is_refused_before_anything_starts(known: Trained, tmp_path: Path) -> None:
    def refused(config: ExperimentConfig, reference: str, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            decoding_search.tune_decoding(config, reference, console())

    config, folder = known.config, str(known.bundle)
    refused(config, str(known.bundle.parent / "model"), ConfigError, r"is not a bundle \(no heliostat\.json\)")
    refused(config, "models:/nothing@challenger", RegistryError, "no model `nothing`")
    refused(changed(config, metric="exact_mach"), folder, ConfigError, "did you mean `exact_match`")
    refused(
        changed(config, space={"few_shot": [99]}), folder, ConfigError, "99 examples are more than the 48 training rows"
    )
    refused(changed(config, min_prompts=25), folder, DataError, "25 prompts to search on and as many to compare on")
    text = config.model_copy(update={"data": DataConfig(format="text", validation=config.data.validation)})
    refused(text, folder, ConfigError, "a decoding search needs prompts with right answers")
    data = config.data.model_copy(update={"validation": None, "validation_size": 0})
    refused(config.model_copy(update={"data": data}), folder, DataError, "there is no validation split")
    assert not list(Path(str(config.storage_path)).glob("nothing-*"))
