"""`heliostat plan`: which settings fit, what is recommended, and what is refused before anything is computed."""

import json
from pathlib import Path
from typing import Any

import pytest

from heliostat import cli, experiment
from heliostat.training import plan_command, planning
from heliostat.training.tracing import Step
from tests import tiny

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration, its data and its model."""
    folder = tmp_path_factory.mktemp("plan")
    tiny.write_model(folder / "model", "llama")
    rows = [{"prompt": text, "completion": " house"} for text in tiny.TEXTS]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        f"name: tiny\nmodel: {{model_name_or_path: {folder}/model}}\n"
        f"data: {{train: {folder}/train.jsonl, format: prompt_completion, max_length: 64}}\n"
        "training: {deepspeed: zero2, num_train_epochs: 3}\n"
    )
    return folder / "config.yaml"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a model of 7e9 parameters, instead of the small one's."""
    monkeypatch.setattr(planning, "trace", lambda *_, **__: Step(7_000_000_000, 0, 2 * 10**10, 3 * 10**10, 10**15))


def plan(file: Path, capsys: Capture, *arguments: str) -> dict[str, Any]:
    assert cli.main(["plan", str(file), *arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_the_configured_way_comes_first_and_each_other_once(file: Path, capsys: Capture) -> None:
    result = plan(file, capsys, "--gpu", "L4", "training.bf16=true", "--num-workers", "4")
    ways = [tuple(option["settings"].values()) for option in result["options"]]
    assert ways[0] == ("full", False, "zero2")
    assert len(ways) == len(set(ways)) == 18
    assert result["workers"] == 4
    assert result["precision"] == "bfloat16"
    assert result["recommended"] == result["options"][0]["settings"]
    assert all(option["fits"] for option in result["options"])
    assert all((option["hours"] is None) == ("offload" in option["settings"]["training.deepspeed"])
               for option in result["options"])  # fmt: skip
    lora = next(option for option in result["options"] if option["settings"]["adapter.method"] == "lora")
    assert lora["step"]["trained"] < lora["step"]["frozen"]


def test_the_work_is_that_of_training(counted: None, file: Path, capsys: Capture) -> None:
    result = plan(file, capsys, "training.num_workers=2", "training.per_device_train_batch_size=1")
    work = result["work"]
    assert work["steps"] == plan(file, capsys, "training.per_device_train_batch_size=2")["work"]["steps"]
    assert 0 < work["tokens"] <= work["steps"] * 2 * 64
    assert work["batch"]["rows"] == 1
    assert 0 < work["batch"]["learned"] < work["batch"]["tokens"] <= 64
    assert result["device"]["name"] == "cpu"


def test_speed_follows_utilisation_and_workers(counted: None, file: Path, capsys: Capture) -> None:
    flags = (["--mfu", "0.5"], ["--mfu", "1"], ["--mfu", "1", "--num-workers", "4"])
    half, whole, four = (plan(file, capsys, "--gpu", "T4", *more)["options"][0] for more in flags)
    assert whole["tokens_per_second"] == pytest.approx(2 * half["tokens_per_second"])
    assert half["hours"] == pytest.approx(2 * whole["hours"])
    assert four["tokens_per_second"] == pytest.approx(4 * whole["tokens_per_second"])


def test_no_weights_are_read(file: Path, tmp_path: Path, capsys: Capture) -> None:
    for path in (file.parent / "model").iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    result = plan(file, capsys, f"model.model_name_or_path={tmp_path}")
    assert result["options"][0]["step"]["trained"] > 0


def test_a_model_from_scratch_has_no_adapters(file: Path, capsys: Capture) -> None:
    result = plan(
        file, capsys, "model.model_name_or_path=null", f"model.scratch.config={json.dumps(tiny.KEYS['gpt2'])}"
    )
    assert {option["settings"]["adapter.method"] for option in result["options"]} == {"full"}


def test_the_first_that_fits_is_recommended(counted: None, file: Path) -> None:
    config = experiment.load(str(file), ["training.bf16=true", "training.num_workers=8", "training.deepspeed=zero0"])
    result = planning.plan(config, "A100-80GB", 0.4)
    fitting = [option["settings"] for option in result["options"] if option["fits"]]
    assert result["recommended"] == fitting[0] != result["options"][0]["settings"]
    assert result["recommended"]["training.deepspeed"] == "zero1"
    shown = plan_command.show(result)
    assert "\nrecommended: training.deepspeed=zero1" in shown
    small = planning.plan(config, "L4", 0.4)
    assert small["recommended"] is None
    assert "nothing fits: lower training.per_device_train_batch_size" in plan_command.show(small)


def test_the_table_has_a_line_for_each_way(file: Path, capsys: Capture) -> None:
    assert cli.main(["plan", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "recommended: as configured (*)"
    assert sum("fits" in line for line in lines) == 18
    assert sum(" zero2 *" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "H100-80"], "--gpu H100-80: is not known; did you mean H100-80GB?"),
        (["--gpu", "T4", "training.bf16=true"], "training.bf16: T4 does not compute in bf16; use training.bf16=false"),
        (["training.use_gpu=true"], "training.use_gpu is true: say which GPU with --gpu: H200"),
        (["--mfu", "1.5"], "--mfu 1.5: must be above 0 and at most 1"),
        (["--num-workers", "-1"], "training.num_workers"),
        (["data.train=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["model.model_name_or_path=nobody/nothing"], "model `nobody/nothing`: cannot be loaded"),
        (
            ["adapter.method=prompt", "data.packing=false"],
            "adapter.method=prompt: plans are made for full, freeze, lora, ia3 only, so far; train a few steps",
        ),
        (["adapter.method=prefix", "data.packing=false"], "adapter.method=prefix: plans are made for"),
        (["data.format=classification"], "data.format=classification: plans are made for causal language models only"),
        (["data.format=seq2seq"], "data.format=seq2seq: plans are made for causal language models only"),
        (["training.deepspeed=zero5"], "`zero5` is neither a preset"),
    ],
)
def test_what_is_wrong_is_named_with_code_2(file: Path, arguments: list[str], message: str, capsys: Capture) -> None:
    assert cli.main(["plan", str(file), *arguments]) == 2
    assert message in capsys.readouterr().err
