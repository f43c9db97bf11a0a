"""Whatever is wrong with the input: exit code 2, one message that says what and where, and nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from heliostat import cli, state
from heliostat.models import bundle
from tests import tiny
from tests.bundles import write_bundle

ROWS = [{"prompt": text, "completion": " house"} for text in tiny.TEXTS[:12]]


class Experiment:
    """A config that trains in this process in a second, to be made wrong in one place."""

    def __init__(self, folder: Path, model: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.data = folder / "train.jsonl"
        self.yaml = folder / "config.yaml"
        self.model = model
        self.capture = capture
        self.write_rows(ROWS)
        self.config: dict[str, Any] = {
            "name": "x",
            "model": {"model_name_or_path": str(model)},
            "data": {"train": str(self.data), "format": "prompt_completion", "max_length": 64, "validation_size": 2},
            "training": {"num_workers": 0, "max_steps": 1, "per_device_train_batch_size": 2},
        }

    def write_rows(self, rows: list[dict[str, Any]]) -> None:
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, *overrides: str, verb: str = "train") -> int:
        if not self.yaml.exists():
            self.yaml.write_text(yaml.safe_dump(self.config))
        return cli.main([verb, str(self.yaml), "--json", *overrides])

    def refused(self, *overrides: str, verb: str = "train") -> str:
        """The message, after checking how it came and that nothing is left."""
        before = self.files()
        self.capture.readouterr()
        code = self.run(*overrides, verb=verb)
        output = self.capture.readouterr()
        assert code == 2, output.err
        assert "Traceback" not in output.err
        answer = json.loads(output.out)
        assert answer.keys() == {"error", "exit_code"}
        assert output.err.count("error: ") == 1
        assert output.err.endswith(f"error: {answer['error']}\n")
        assert [path for path in state.runs().rglob("*") if state.runs().exists()] == [], "a run folder was left behind"
        left = self.files() - before - {self.yaml}
        assert not [path for path in left if ".tmp" in path.name], "something half-written was left behind"
        return str(answer["error"])

    def files(self) -> set[Path]:
        return set(self.folder.rglob("*"))


@pytest.fixture
def experiment(tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> Experiment:
    return Experiment(tmp_path, tiny_bundle, capsys)


def test_the_experiment_works_until_it_is_made_wrong(experiment: Experiment) -> None:
    assert experiment.run() == 0
    result = json.loads(experiment.capture.readouterr().out)
    assert result["model_uri"] == "models:/x/1"
    assert bundle.verify(Path(result["bundle"]))["format"] == "prompt_completion"
    assert result["metrics"]["eval_loss"] > 0


def test_a_config_that_is_not_there(experiment: Experiment) -> None:
    experiment.yaml = experiment.folder / "gone.yaml"
    assert cli.main(["train", str(experiment.yaml)]) == 2
    assert f"{experiment.yaml}: no such file" in experiment.capture.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.yaml: is empty"),
        ("name: [", "config.yaml:1: is not valid YAML"),
        ("name: x\nmodel: {model_name_or_path: m}\ndata: {trian: a}\n", "config.yaml:3: unknown key `data.trian`; did "
         "you mean `data.train`?"),
        ("name: x\nmodel: {model_name_or_path: m}\ndata: {train: a}\ntraining:\n  num_workers: two\n",
         "config.yaml:5: `training.num_workers`: must be a number of workers, or [min, max]"),
        ("name: x\nmodel: {model_name_or_path: m}\ndata: {train: a}\nname: y\n", "config.yaml:4: `name` is given "
         "twice (first on line 1)"),
    ],
)  # fmt: skip
def test_a_config_that_is_wrong(text: str, message: str, experiment: Experiment) -> None:
    experiment.yaml.write_text(text)
    assert message in experiment.refused()


def row_lines(experiment: Experiment) -> list[str]:
    return experiment.data.read_text().splitlines(keepends=True)


def malformed(experiment: Experiment) -> None:
    lines = row_lines(experiment)
    experiment.data.write_text("".join([*lines[:4], '{"prompt": "a", "completion": }\n', *lines[4:]]))


def wrong_encoding(experiment: Experiment) -> None:
    lines = row_lines(experiment)
    latin = '{"prompt": "café", "completion": "x"}\n'.encode("latin-1")
    experiment.data.write_bytes("".join(lines[:2]).encode() + latin + "".join(lines[2:]).encode())


def with_row(number: int, row: dict[str, Any]) -> Callable[[Experiment], None]:
    return lambda experiment: experiment.write_rows([*ROWS[: number - 1], row, *ROWS[number:]])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda e: e.data.unlink(), "train.jsonl: no such file (looked in ", id="missing"),
        pytest.param(lambda e: e.data.write_text(""), "train.jsonl: is empty", id="empty"),
        pytest.param(lambda e: e.data.write_text("\n \n"), "train.jsonl: is empty", id="blank"),
        pytest.param(wrong_encoding, "train.jsonl:3: byte 0xe9 is not UTF-8; save the file as UTF-8", id="encoding"),
        pytest.param(malformed, "train.jsonl:5: is not valid JSON: Expecting value at column 31", id="JSON"),
        pytest.param(with_row(7, {"prompt": "a"}), "train.jsonl:7: has no column `completion` (found: prompt)",
                     id="missing column"),
        pytest.param(with_row(3, {"prompt": "a", "completion": " "}), "train.jsonl:3: the completion is empty",
                     id="empty completion"),
        pytest.param(with_row(2, {"prompt": "a", "completion": ["x"]}), "train.jsonl:2: column `completion` holds a "
                     "list; text is needed", id="list"),
        pytest.param(with_row(12, {"prompt": "a", "completion": "b " * 200}), "train.jsonl:12: its ", id="too long"),
    ],
)  # fmt: skip
def test_data_that_is_wrong(spoil: Callable[[Experiment], object], message: str, experiment: Experiment) -> None:
    spoil(experiment)
    assert message in experiment.refused("data.validation_size=0")


def test_a_sample_longer_than_the_block_says_what_to_do(experiment: Experiment) -> None:
    with_row(12, {"prompt": "a", "completion": "b " * 200})(experiment)
    text = experiment.refused("data.validation_size=0")
    assert "tokens exceed data.max_length: 64 (1 of 12 rows do, the longest has " in text
    assert text.endswith("raise it, or set data.excess_length_strategy to truncate or drop")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=nowhere/*.jsonl"], "nowhere/*.jsonl: matches no file"),
        (["data.train=null"], "data.train is missing"),
        (["data.validation=gone.csv"], "gone.csv: no such file"),
        (["data.test=gone.csv"], "gone.csv: no such file"),
        (["training.report_to=tensorboard"], "runs and models are registered in MLflow; write [mlflow, tensorboard]"),
        (["data.validation_size=12"], "leaves none of the 12 rows"),
        (["training.learning_rte=1"], "override training.learning_rte: unknown key `training.learning_rte`; did you "
         "mean `training.learning_rate`?"),
        (["training.bf16=maybe"], "override training.bf16: `training.bf16`: Input should be a valid boolean"),
        (["training.fp16=true"], "training.fp16 needs training.use_gpu=true"),
        (["training.deepspeed=zero9"], "training.deepspeed: `zero9` is neither a preset"),
        (["data.max_length=129"], "data.max_length=129 is more than the model's 128 positions; lower it"),
        (["resume=must"], "resume=must: "),
        (["model.model_name_or_path=no-such/model"], "model `no-such/model`: cannot be loaded: "),
        (["model.model_name_or_path=./gone"], "model `./gone`: no such file or folder"),
        (["model.model_name_or_path=package:no_such_package/x.gguf"], "the Python package `no_such_package` is not"),
        (["model.model_name_or_path=models:/nobody@champion"], "no model `nobody` in the registry"),
        (["model.chat_template=gone.jinja"], "model.chat_template: `gone.jinja` is neither"),
        (["model.model_name_or_path=null", "model.scratch.model_type=gpt0"], "transformers has no architecture `gpt0`"),
        (["model.model_name_or_path=null", "model.scratch.config.n_heads=2"], "model.scratch.config.n_heads: gpt2 has "
         "no such key; it has "),
        (["adapter.method=lora", "adapter.lora_target_modules=[q_projection]"], "adapter.lora_target_modules: "),
        (["model.attn_implementation=fast"], "cannot be loaded: "),
        (["storage_path=/proc/nowhere"], "storage_path: /proc/nowhere/x-0001 cannot be created"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_setting_that_is_wrong(overrides: list[str], message: str, experiment: Experiment) -> None:
    assert message in experiment.refused(*overrides)


def test_a_deepspeed_file_that_contradicts_the_yaml(experiment: Experiment) -> None:
    file = experiment.folder / "ds.json"
    file.write_text(json.dumps({"train_micro_batch_size_per_gpu": 16}))
    text = experiment.refused(f"training.deepspeed={file}")
    assert text == (f"{file}: `train_micro_batch_size_per_gpu` is 16, but the YAML's training section says 2; drop it")


def pickled(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "pytorch_model.bin: pickled weights can run code when loaded and are refused; convert them to safetensors"


def with_code(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "x.Model"}}))
    return "config.json: has an `auto_map`, which loads code shipped with the model, and is refused"


def without_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "the folder has no config.json, so it is not a model folder"


@pytest.mark.parametrize("spoil", [pickled, with_code, without_config])
def test_a_model_folder_that_is_not_to_be_trusted(spoil: Callable[[Path], str], experiment: Experiment) -> None:
    folder = experiment.folder / "model"
    shutil.copytree(experiment.model, folder)
    message = spoil(folder)
    assert message in experiment.refused(f"model.model_name_or_path={folder}")


@pytest.fixture(scope="module")
def whole_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("whole") / "bundle")


def generated(model: Path | str, capture: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.main(["generate", str(model), "--prompt", "a", "--json"])
    output = capture.readouterr()
    assert "Traceback" not in output.err
    return code, json.loads(output.out).get("error", "")


def test_one_flipped_bit_in_any_file_of_a_bundle(
    whole_bundle: Path, tmp_path: Path, experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generated(whole_bundle, capsys) == (0, "")
    names = sorted(path.name for path in whole_bundle.iterdir())
    assert len(names) == 7
    for name in names:
        damaged = Path(shutil.copytree(whole_bundle, tmp_path / f"damaged-{name}"))
        data = bytearray((damaged / name).read_bytes())
        # In the manifest, a digit of the hash of another file, which is then the one that does not fit.
        place = data.index(b'"tokenizer.json": "') + 20 if name == bundle.MANIFEST else len(data) // 2
        data[place] ^= 1
        (damaged / name).write_bytes(data)
        code, message = generated(damaged, capsys)
        assert code == 2
        assert message.startswith(f"{damaged / ('tokenizer.json' if name == bundle.MANIFEST else name)}: is ")
        assert experiment.refused(f"model.model_name_or_path={damaged}") == message


def test_a_bundle_with_a_file_more_or_less(
    whole_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = Path(shutil.copytree(whole_bundle, tmp_path / "more"))
    (more / "modeling_gpt2.py").write_text("raise SystemExit")
    code, message = generated(more, capsys)
    assert code == 2
    assert message.startswith(f"{more / 'modeling_gpt2.py'}: does not belong to the bundle")
    less = Path(shutil.copytree(whole_bundle, tmp_path / "less"))
    (less / "generation_config.json").unlink()
    code, message = generated(less, capsys)
    assert code == 2
    assert message.startswith(f"{less / 'generation_config.json'}: is missing from the bundle")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("models:/nobody@champion", "no model `nobody` in the registry"),
        ("models:/nobody", "is not a model reference; write models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("no-such/model", "model `no-such/model`: cannot be loaded"),
        ("./gone", "model `./gone`: no such file or folder"),
    ],
)
def test_a_model_that_does_not_exist(
    reference: str, message: str, experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = generated(reference, capsys)
    assert code == 2
    assert message in found
    test = experiment.folder / "test.jsonl"
    shutil.copy(experiment.data, test)
    assert message in experiment.refused("--model", reference, f"data.test={test}", verb="evaluate")


def test_a_split_that_is_not_there_to_evaluate_on(experiment: Experiment) -> None:
    text = experiment.refused("--model", str(experiment.model), verb="evaluate")
    assert text == "there is no test split; set data.test to a file, or data.test_size to a part of data.train"


def test_a_column_to_group_by_that_is_not_there(experiment: Experiment) -> None:
    overrides = ["data.test_size=3", "evaluation.group_by=family", "generation.max_new_tokens=1"]
    text = experiment.refused("--model", str(experiment.model), *overrides, verb="evaluate")
    assert "train.jsonl:" in text
    assert "evaluation.group_by: has no column `family`; it has prompt, completion" in text


def test_an_open_run_is_not_shared(experiment: Experiment) -> None:
    """A second driver of the same run is told to wait; the first one's folder stays."""
    from heliostat import experiment as experiments
    from heliostat.training import runs, trainer

    experiment.yaml.write_text(yaml.safe_dump(experiment.config))
    config = experiments.load(experiment.yaml)
    run = runs.open_run(state.runs(), "x", trainer.config_hash(config), "auto")
    assert experiment.run() == 2
    assert "is being worked on by another process" in experiment.capture.readouterr().err
    assert (run.folder / "run.json").exists()
    run.close()
