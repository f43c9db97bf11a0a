"""What becomes of a command when it is made a job. For real clusters, see slow/test_jobs.py."""

import json
from pathlib import Path

import pytest

from heliostat import cli
from heliostat.cli import COMMANDS
from heliostat.config import Notice
from heliostat.errors import ConfigError
from heliostat.jobs import submit
from heliostat.jobs.submit import Job, Request, variables

CONFIG = "name: tiny\nmodel: {model_name_or_path: gpt2}\ndata: {train: ../data/*.jsonl, format: prompt_completion}\n"
SILENT: Notice = lambda text: None  # noqa: E731


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose data lies beside it."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def prepare(*command: str, environment: tuple[str, ...] = (), notices: list[str] | None = None) -> Job:
    return submit.prepare(Request(command, environment), COMMANDS, SILENT if notices is None else notices.append)


def test_the_command_is_passed_on_with_paths_as_they_are_in_the_job(here: Path) -> None:
    job = prepare("train", f"{here}/config.yaml", "training.learning_rate=1e-3", "seed=7")
    place = f"files{here.parent}/data/*.jsonl"
    assert job.entrypoint == (
        "exec python -m heliostat.cli train config.yaml training.learning_rate=1e-3 seed=7 "
        f"'data.train=\"{place}\"' --json"
    )
    assert (job.verb, job.name) == ("train", "tiny")
    names = {place for place in job.upload.files if not place.startswith("heliostat/")}
    assert names == {"config.yaml", f"files{here.parent}/data/rows.jsonl"}


def test_the_checkout_goes_along_and_all_of_it_is_told(here: Path) -> None:
    notices: list[str] = []
    job = prepare("train", "config.yaml", notices=notices)
    assert {"heliostat/cli.py", "heliostat/serving/playground/index.html"} <= job.upload.files.keys()
    assert not any("__pycache__" in place for place in job.upload.files)
    assert [text.split(" (")[0] for text in notices] == [
        f"sending {here}/config.yaml",
        f"sending {here.parent}/data/rows.jsonl",
        "sending the library of this checkout",
    ]


@pytest.mark.parametrize("flag", [["--model", "../bundle"], ["--model=../bundle"]])
def test_models_of_flags_go_along(flag: list[str], here: Path) -> None:
    (here.parent / "bundle").mkdir()
    (here.parent / "bundle" / "config.json").write_text("{}")
    job = prepare("evaluate", "config.yaml", *flag)
    assert f"files{here.parent}/bundle/config.json" in job.upload.files
    assert f"files{here.parent}/bundle" in job.entrypoint


def test_promote_takes_a_name_or_a_configuration(here: Path) -> None:
    assert prepare("promote", "cron", "--metric", "exact_match").entrypoint.endswith(
        "promote cron --metric exact_match --json"
    )
    with pytest.raises(ConfigError, match=r"data\.train names a path outside"):
        prepare("promote", "config.yaml")
    (here / "config.yaml").write_text(CONFIG.replace("../data", "data"))
    (here / "data").mkdir()
    (here / "data" / "rows.jsonl").touch()
    job = prepare("promote", "config.yaml")
    assert job.name == "tiny"
    assert "data/rows.jsonl" in job.upload.files


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "needs a command: train, .*; got none"),
        (["serve", "config.yaml"], "needs a command: .*; got serve"),
        (["evaluate", "config.yaml", "--predictions", "out.jsonl"], "--predictions writes to the job's folder"),
        (["train", "config.yaml", "training.nun_workers=2"], "did you mean `training.num_workers`"),
        (["train", "config.yaml", "data.train=https://me:pw@host/rows.jsonl"], "holds a password"),
    ],
)
def test_what_cannot_work_is_refused_here(command: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(*command)


def test_variables_are_named_and_secrets_stay_out_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    given = ["HF_TOKEN", "HELIOSTAT_HOME=/mnt/a=b", "TOKENIZERS_PARALLELISM=false"]
    assert variables(given) == {
        "HF_TOKEN": "hf_secret",
        "HELIOSTAT_HOME": "/mnt/a=b",
        "TOKENIZERS_PARALLELISM": "false",
    }
    job = prepare("train", "config.yaml", environment=("HF_TOKEN",))
    assert job.environment["HF_TOKEN"] == "hf_secret"
    assert "hf_secret" not in job.entrypoint
    for text in ("HF_TOKEN=x", "MLFLOW_TRACKING_PASSWORD=x", "MLFLOW_TRACKING_URI=http://me:pw@host"):
        with pytest.raises(ConfigError, match="looks like a secret") as refused:
            variables([text])
        assert "pw" not in str(refused.value)
    with pytest.raises(ConfigError, match="NIX: is not set here"):
        variables(["NIX"])
    with pytest.raises(ConfigError, match="no name of an environment variable"):
        variables(["a b"])


@pytest.mark.parametrize("verb", ["status", "logs", "stop", "submit"])
def test_no_cluster_is_code_2_and_names_the_address(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    rest = {"status": [], "submit": ["train", "config.yaml"]}.get(verb, ["a-job"])
    assert cli.main([verb, *rest, "--address", "http://127.0.0.1:1", "--json"]) == 2
    assert "no Ray cluster answers at http://127.0.0.1:1" in json.loads(capsys.readouterr().out)["error"]


def test_flags_of_submit_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["promote", "--env", "NIX", "cron", "--metric", "exact_match", "--json"]
    assert cli.main(["submit", "--no-wait", *command]) == 2
    assert json.loads(capsys.readouterr().out)["error"].startswith("--env NIX: is not set here")
