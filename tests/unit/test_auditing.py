"""`heliostat audit`, and the same before a training: shown, saved with the run, and the end of it where it fails."""

import dataclasses
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from heliostat import cli, state
from heliostat.data import splits
from heliostat.experiment import ExperimentConfig
from heliostat.registry import store
from heliostat.training import auditing, runs, trainer
from tests import tiny
from tests.unit.test_event_files import events, journaled

pytestmark = pytest.mark.usefixtures("module_store")
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def experiment(tmp_path: Path, tiny_bundle: Path) -> dict[str, Any]:
    rows = [{"prompt": text, "completion": " house"} for text in tiny.TEXTS]
    for name, some in (("train", rows[:20]), ("validation", rows[20:26]), ("test", rows[26:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "validation", "test")}
    return {
        "name": f"audit-{tmp_path.name}"[:60],
        "model": {"model_name_or_path": str(tiny_bundle)},
        "data": {"format": "prompt_completion", "max_length": 64, **files},
        "training": {"num_workers": 0, "max_steps": 4, "eval_steps": 2, "per_device_train_batch_size": 2,
                     "report_to": "all"},
        "registry": {"register_model": False},
    }  # fmt: skip


@pytest.fixture
def leaking(experiment: dict[str, Any]) -> dict[str, Any]:
    experiment["data"]["test"] = experiment["data"]["train"]
    return experiment


def written(folder: Path, experiment: dict[str, Any]) -> str:
    (folder / "config.yaml").write_text(yaml.safe_dump(experiment))
    return str(folder / "config.yaml")


def test_the_command_shows_and_saves_what_it_finds(experiment: Any, tmp_path: Path, capsys: Capture) -> None:
    config = written(tmp_path, experiment)
    assert cli.main(["audit", config]) == 0
    output = capsys.readouterr().out
    folder = state.audits() / experiment["name"]
    assert output.startswith("train: 20 rows, 20 documents, ")
    assert "⟦ house<|endoftext|>⟧" in output
    assert output.endswith(f"saved in {folder}\nfit to be trained on\n")
    assert sorted(path.name for path in folder.iterdir()) == sorted(auditing.FILES)
    assert (folder / "data.txt").read_text() in output
    assert cli.main(["audit", config, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    result = json.loads(lines[0])
    assert result.pop("folder") == str(folder)
    assert result == json.loads((folder / "audit.json").read_text())
    assert result["splits"].keys() == {"train", "validation", "test"}
    assert not state.runs().exists()


def test_an_audit_that_fails_is_code_2_and_still_shown(leaking: Any, tmp_path: Path, capsys: Capture) -> None:
    config = written(tmp_path, leaking)
    assert cli.main(["audit", config]) == 2
    output = capsys.readouterr()
    assert "error  test_leakage: test: 20 of 20 (100.0%) rows are in train too" in output.out
    assert "error: the data failed its audit: test: 20 of 20 (100.0%) rows are in train too" in output.err
    assert cli.main(["audit", config, "--json"]) == 2
    result = json.loads(capsys.readouterr().out)
    assert result["exit_code"] == 2
    assert result["findings"][0]["check"] == "test_leakage"
    assert result["splits"]["test"]["rows"] == 20
    assert cli.main(["audit", config, "data.audit.severity.test_leakage=ignore"]) == 0


def test_a_terminal_gets_colours(experiment: Any, tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "heliostat.cli", "audit", written(tmp_path, experiment)]
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": ""}
    with subprocess.Popen(command, stdout=end, stderr=subprocess.PIPE, env=environment) as process:
        os.close(end)
        shown = b""
        while b"fit to be trained on" not in shown:
            shown += os.read(terminal, 65536)
    os.close(terminal)
    assert process.returncode == 0
    assert b"\x1b[32m house<|endoftext|>\x1b[0m" in shown


def test_a_training_is_refused_and_leaves_nothing(leaking: Any, tmp_path: Path, capsys: Capture) -> None:
    assert cli.main(["train", written(tmp_path, leaking), "--json"]) == 2
    output = capsys.readouterr()
    assert json.loads(output.out)["findings"][0]["severity"] == "error"
    assert "test_leakage" in output.err
    assert tiny.TEXTS[0] not in output.err, "what the data says is not for logs"
    assert list(state.runs().glob(f"{leaking['name']}*")) == []


def test_a_run_keeps_its_audit_and_its_events(experiment: Any, tmp_path: Path, capsys: Capture) -> None:
    config = ExperimentConfig.model_validate(experiment)
    result = trainer.train(config, Console(stderr=True))
    run = Path(result.run_folder)
    assert "train: 20 rows" in capsys.readouterr().err
    client = store.client()
    stored = {artifact.path for artifact in client.list_artifacts(result.run_id)}
    assert {"loss_curves.png", *auditing.FILES} <= stored
    report = json.loads((run / "audit.json").read_text())
    downloaded = Path(client.download_artifacts(result.run_id, "audit.json"))
    assert json.loads(downloaded.read_text()) == report
    assert cli.main(["audit", written(tmp_path, experiment), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert {name: alone[name] for name in report} == report, "the command says what the training said"
    assert events(run) == journaled(run)
    logged = client.get_metric_history(str(result.run_id), "eval_loss")
    assert [point.step for point in logged] == [step for step, _, _ in events(run)["eval/loss"]]


def test_samples_are_for_terminals(experiment: Any) -> None:
    config = ExperimentConfig.model_validate(experiment)
    report = auditing.audit_of(config).report
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, no_color=True)
        auditing.tell(report, console)
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("⟦ house<|endoftext|>⟧" in shown) == terminal
        assert "train: 20 rows" in shown


@pytest.mark.parametrize(
    ("source", "settings"),
    [
        (
            "sms_spam/train.tsv",
            {"column_names": ["label", "text"], "columns": {"completion": "label", "prompt": "text"}},
        ),
        ("dialogsum/train.jsonl", {"columns": {"prompt": "dialogue", "completion": "summary"}}),
        ("alpaca/alpaca_train.json", {"format": "alpaca"}),
        ("chat/glaive_toolcall_en_demo.json", {"format": "chat"}),
        ("text/tinyshakespeare.txt", {"format": "text", "text_separator": "\n\n"}),
    ],
)
def test_real_data_passes(source: str, settings: Any, shared_data: Path, tiny_bundle: Path) -> None:
    data = {"format": "prompt_completion", "train": str(shared_data / source), "test_size": 40, "validation_size": 40,
            "max_train_samples": 200, "max_length": 4096, "excess_length_strategy": "truncate", **settings}  # fmt: skip
    config = ExperimentConfig.model_validate(
        {"name": "x", "model": {"model_name_or_path": str(tiny_bundle)}, "data": data}
    )
    rows = splits.load_splits(config.data, 0)
    report = auditing.look(rows, config.data, tiny.tokenizer(), 0).report
    report.check()
    assert [counts.rows for counts in report.splits.values()] == [200, 40, 40]
    for counts in report.splits.values():
        assert counts.eos_learned == counts.documents - counts.truncated
    labels = report.splits["train"].labels
    assert (labels is not None and labels.keys() == {"ham", "spam"}) == source.startswith("sms")
    for sample in report.samples:
        assert sample.spans[-1].learned
        assert not sample.spans[0].learned


def test_settings_of_audit_and_reports_do_not_make_another_run(experiment: Any) -> None:
    def hash_of(**sections: Any) -> str:
        return trainer.config_hash(
            ExperimentConfig.model_validate({name: experiment[name] | sections.get(name, {}) if name != "name"
                                             else experiment[name] for name in experiment})
        )  # fmt: skip

    plain = hash_of()
    assert hash_of(data={"audit": {"samples": 7}}) == plain
    assert hash_of(training={"report_to": "mlflow"}) == plain
    assert hash_of(training={"max_steps": 5}) != plain


def test_a_resumed_run_is_not_lectured_again(experiment: Any, capsys: Capture) -> None:
    config = ExperimentConfig.model_validate(experiment)
    storage = state.runs()
    runs.open_run(storage, config.name, trainer.config_hash(config), "never").close()
    run = runs.open_run(storage, config.name, trainer.config_hash(config), "must")
    job = trainer._prepare(config, run, Console(stderr=True))
    run.close()
    assert "rows" not in capsys.readouterr().err
    assert (run.folder / "audit.json").exists()
    assert dataclasses.asdict(job)["manifest"]["splits"].keys() == {"train", "validation"}, "lineage knows no test rows"
