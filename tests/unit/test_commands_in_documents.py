"""Every command in the indented blocks of README.md and docs/ is run: here, where that is cheap, or by the test that a
table names; or it cannot be run here, and the table says why. A new command fails until it is one of these."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from heliostat import cli
from heliostat.models import base
from heliostat.quickstart import schedules
from tests import readme, tiny
from tests.conftest import REPOSITORY
from tests.service import listening

HERE = "tests/unit/test_commands_in_documents.py"
DOCUMENTED = "tests/slow/test_documented_commands.py"
EXAMPLES = "tests/slow/test_examples.py"
JOBS = "tests/slow/test_jobs.py"
STORAGE = "tests/slow/test_storage.py"

# How a command begins -> the test that runs it. Those with CONFIG, JOB, NAME or HOST are run with what these stand for.
RUN = {
    "make quickstart": "tests/slow/test_quickstart.py",
    "make test": ".ci/run",
    "make k8s-validate": "tests/unit/test_k8s_validate.py",
    "heliostat train jobs/examples/sms_spam/lora.yaml": EXAMPLES,
    "heliostat evaluate jobs/examples/sms_spam/lora.yaml": EXAMPLES,
    "heliostat promote sms-spam --metric exact_match": EXAMPLES,
    "heliostat serve models:/sms-spam@champion": EXAMPLES,
    "heliostat serve models:/cron@champion": DOCUMENTED,
    "heliostat serve jobs/examples/cron/train.yaml": DOCUMENTED,
    "heliostat serve CONFIG serving.host=0.0.0.0 serving.api_keys=keys.json": DOCUMENTED,
    "heliostat serve CONFIG serving.ssl_certfile=": "tests/ray/test_edge.py",
    "OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318 heliostat serve": DOCUMENTED,
    "serve run serve/local.yaml": DOCUMENTED,
    "curl http://127.0.0.1:8000/v1/models": DOCUMENTED,
    "curl 'http://127.0.0.1:8000/v1/decoding?model=cron'": DOCUMENTED,
    "curl -N http://127.0.0.1:8000/v1/completions": DOCUMENTED,
    'curl -H "Authorization: Bearer $KEY" http://127.0.0.1:8000/metrics': DOCUMENTED,
    "curl http://127.0.0.1:8000/classify": HERE,
    "heliostat keys ": HERE,
    "heliostat audit ": HERE,
    "heliostat plan ": HERE,
    "heliostat resume ": "tests/unit/test_resume.py",
    "heliostat evaluate config.yaml": HERE,
    "heliostat tune-training ": "tests/slow/test_tuning.py",
    "heliostat tune-decoding jobs/examples/cron/train.yaml": "tests/slow/test_quickstart.py",
    "heliostat tune-decoding CONFIG": "tests/ray/test_decoding_search.py",
    "heliostat promote NAME|CONFIG": "tests/unit/test_promotion.py",
    "heliostat rollback NAME|CONFIG": "tests/unit/test_promotion.py",
    "heliostat submit train ": JOBS,
    "heliostat status": JOBS,
    "heliostat logs JOB": JOBS,
    "heliostat stop JOB": JOBS,
    "heliostat mlflow": JOBS,
    "heliostat generate models:/aphorisms@challenger ": "tests/unit/test_examples.py",
    "heliostat generate s3://": STORAGE,
    "heliostat serve s3://": STORAGE,
    "ray job submit ": JOBS,
    "ray drain-node ": "tests/slow/test_elastic.py",
}
NOT_RUN = {
    ". .venv/bin/activate": "a shell's own",
    "export ": "a shell's own",
    "pip install ": "what it installs is installed by `make install`, but for vLLM, which was tried by hand",
    "pytest tests/unit/test_vllm.py ": "needs vLLM's CPU build, which was tried by hand",
    "tensorboard ": "runs until it is stopped; tests/unit/test_event_files.py reads what it would show",
    "docker ": "Docker is not here; `python -m k8s.image --run` runs the same steps",
    "kubectl ": "a cluster is not here; `python -m k8s.rehearse` runs what its pods would",
}
DOCUMENTS = {"README.md": readme.TEXT, **{path.name: path.read_text() for path in (REPOSITORY / "docs").glob("*.md")}}
LINES = sorted({line for text in DOCUMENTS.values() for line in readme.shell(text)})


@pytest.mark.parametrize("line", LINES)
def test_each_is_run_or_cannot_be(line: str) -> None:
    assert [begin for begin in (*RUN, *NOT_RUN) if line.startswith(begin)], "no test runs this command"


def test_the_table_has_nothing_else() -> None:
    assert [begin for begin in (*RUN, *NOT_RUN) if not any(line.startswith(begin) for line in LINES)] == []
    for begin, place in RUN.items():
        text = (REPOSITORY / place).read_text(encoding="utf-8")
        assert "readme." in text or begin.split()[1] in text, f"{place} does not run `{begin}`"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_all_commands_are_in_indented_blocks(name: str) -> None:
    assert [fence for fence in ("```shell", "```sh\n", "```bash", "```console") if fence in DOCUMENTS[name]] == []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: one with the examples, in which nothing was done yet."""
    (tmp_path / "jobs").symlink_to(REPOSITORY / "jobs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HELIOSTAT_HOME")
    return tmp_path


def section(document: str, heading: str) -> list[str]:
    """The commands below a heading."""
    return readme.shell(readme.section(heading, readme.document(document)))


def heliostat(line: str, *more: str) -> None:
    """Run the command of a document, which must succeed."""
    program, *words = shlex.split(line, comments=True)
    assert program == "heliostat"
    assert cli.main([*words, *more]) == 0


def test_keys(folder: Path) -> None:
    lines = [line for line in section("security.md", "Who may use it") if line.startswith("heliostat keys ")]
    assert len(lines) == 4
    for line in lines:
        heliostat(line)
    assert [key["name"] for key in json.loads((folder / "keys.json").read_text())["keys"]] == ["ci"]


def test_audit(folder: Path) -> None:
    schedules.write(folder / ".heliostat" / "cron")
    (line,) = section("data.md", "The audit")
    heliostat(line, "data.max_train_samples=200")
    assert (folder / ".heliostat" / "audits" / "cron" / "audit.json").exists()


def test_plan(folder: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "SMSSpamCollection.tsv").write_text("".join(f"ham\tsee you at {n}\n" for n in range(400)))
    rows = [{"instruction": f"Double {n}.", "input": "", "output": f"{2 * n}"} for n in range(400)]
    (folder / "alpaca_data.json").write_text(json.dumps(rows))
    model = json.loads((tiny_bundle / "config.json").read_text()) | {"n_positions": 1024}
    (shutil.copytree(tiny_bundle, folder / "model") / "config.json").write_text(json.dumps(model))
    for line in readme.shell(readme.document("memory.md").split("\n## ")[0]):
        heliostat(line, "model.model_name_or_path=model", "--json")
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["recommended"]


def test_evaluate(folder: Path, tiny_bundle: Path) -> None:
    rows = [{"prompt": text, "completion": " house"} for text in tiny.TEXTS[:12]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        "name: likely\nmodel: {model_name_or_path: nowhere}\n"
        "data: {train: rows.jsonl, test: rows.jsonl, format: prompt_completion, max_length: 64}\n"
        "evaluation: {scoring: likelihood, labels: [house, river], metrics: [accuracy]}\n"
    )
    (line,) = section("tasks.md", "Answers by likelihood")
    heliostat(line.replace("HuggingFaceTB/SmolLM2-135M", str(tiny_bundle)))


def test_classify(folder: Path) -> None:
    (line,) = section("tasks.md", "Served")
    with listening(base.load_for_inference(str(tiny.write_classifier(folder / "model", "gpt2")))) as url:
        line = line.replace("http://127.0.0.1:8000", url).replace("sms-spam-classifier", "tiny")
        done = subprocess.run(["bash", "-c", f"{line} --silent --fail"], capture_output=True, text=True, check=True)
    assert [answer["label"] in tiny.LABELS for answer in json.loads(done.stdout)["data"]] == [True, True]
