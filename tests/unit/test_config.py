"""A wrong key or value is told with its place and what to do; what is read can be written and read again."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from heliostat import config
from heliostat.config import StrictModel
from heliostat.errors import ConfigError


class Optimizer(StrictModel):
    learning_rate: float = Field(1e-3, gt=0)
    betas: list[float] = Field(default_factory=lambda: [0.9, 0.999])
    epochs: int = 1


class Data(StrictModel):
    files: str | list[str] | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    shuffle: bool = True


class Whole(StrictModel):
    name: str
    mode: Literal["fast", "exact"] = "fast"
    optimizer: Optimizer = Optimizer()
    data: Data | None = None


SYNONYMS = {"lr": "optimizer.learning_rate", "dataset": "data.files"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.yaml"


def load(file: Path, text: str, *overrides: str, notices: list[str] | None = None) -> Whole:
    file.write_text(text, encoding="utf-8")
    said = [] if notices is None else notices
    return config.load(Whole, file, overrides, SYNONYMS, said.append)


def problem(file: Path, text: str, *overrides: str) -> str:
    """The error's text, with the file's path shortened to its name."""
    with pytest.raises(ConfigError) as caught:
        load(file, text, *overrides)
    return str(caught.value).replace(str(file), file.name)


GOOD = """\
name: x
optimizer:
  learning_rate: 1e-4
data:
  files: [a.jsonl, b.jsonl]
"""


def test_values_of_all_sections_are_read_and_others_have_defaults(file: Path) -> None:
    read = load(file, GOOD)
    assert read == Whole(name="x", optimizer=Optimizer(learning_rate=0.0001), data=Data(files=["a.jsonl", "b.jsonl"]))
    assert (read.mode, read.optimizer.epochs) == ("fast", 1)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".0001", "1e4", "+1e-4"])
def test_every_way_to_write_a_number_is_a_number(file: Path, text: str) -> None:
    """YAML 1.1 reads `1e-4` as text; no one who writes it means that."""
    for read in (load(file, f"name: x\nlr: {text}"), load(file, "name: x", f"optimizer.learning_rate={text}")):
        assert read.optimizer.learning_rate == float(text)
        assert type(read.optimizer.learning_rate) is float


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x\noptimizer:\n  learning_rat: 1", "a.yaml:3: unknown key `optimizer.learning_rat`; did you mean "
         "`optimizer.learning_rate`?"),
        ("name: x\n\n# far away\ndata:\n  file: a", "a.yaml:5: unknown key `data.file`; did you mean `data.files`?"),
        ("name: x\noptimiser: {}", "a.yaml:2: unknown key `optimiser`; did you mean `optimizer`?"),
        ("name: x\ndata: {learning_rates: 1}", "a.yaml:2: unknown key `data.learning_rates`; did you mean "
         "`optimizer.learning_rate`?"),
        ("name: x\n7: 1", "a.yaml:2: `7`: Keys should be strings (given: 7)"),
        ("name: x\nzzz: 1", "a.yaml:2: unknown key `zzz`; `heliostat schema` lists all keys"),
        ("mode: fast", "a.yaml: `name` is missing"),
        ("name: x\nmode: slow", "a.yaml:2: `mode`: Input should be 'fast' or 'exact' (given: \"slow\")"),
        ("name: x\ndata:\n  shuffle: perhaps", "a.yaml:3: `data.shuffle`: Input should be a valid boolean, unable to "
         "interpret input (given: \"perhaps\")"),
        ("name: x\noptimizer:\n  betas:\n    - 0.9\n    - high", "a.yaml:3: `optimizer.betas.1`: Input should be a "
         "valid number, unable to parse string as a number (given: \"high\")"),
        ("name: x\noptimizer:\n  learning_rate: -1", "a.yaml:3: `optimizer.learning_rate`: Input should be greater "
         "than 0 (given: -1)"),
        ("name: x\noptimizer: 3", "a.yaml:2: `optimizer`: Input should be a valid dictionary or instance of Optimizer "
         "(given: 3)"),
        ("name: x\ndata:\n  columns: {a: 1}", "a.yaml:3: `data.columns.a`: Input should be a valid string (given: 1)"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_told_with_file_and_line(file: Path, text: str, expected: str) -> None:
    assert problem(file, text) == expected


def test_all_mistakes_are_told_at_once(file: Path) -> None:
    assert problem(file, "mode: slow\noptimizer:\n  epoch: 1\n  epochs: 1.5").splitlines() == [
        "a.yaml: `name` is missing",
        "a.yaml:1: `mode`: Input should be 'fast' or 'exact' (given: \"slow\")",
        "a.yaml:4: `optimizer.epochs`: Input should be a valid integer, got a number with a fractional part "
        "(given: 1.5)",
        "a.yaml:3: unknown key `optimizer.epoch`; did you mean `optimizer.epochs`?",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x\noptimizer:\n  epochs: 1\n  betas: [1]\n  epochs: 2",
         "a.yaml:5: `optimizer.epochs` is given twice (first on line 3); keep one"),
        ("name: x\nname: y", "a.yaml:2: `name` is given twice (first on line 1); keep one"),
        ("name: x\n  mode: [", "a.yaml:2: is not valid YAML: mapping values are not allowed here"),
        ("- name", "a.yaml:1: must be a mapping of keys to values, found a list"),
        ("just text", "a.yaml:1: must be a mapping of keys to values, found a str"),
        ("", "a.yaml: is empty; a config needs at least `model:` and `data:`"),
        ("# only a comment\n", "a.yaml: is empty; a config needs at least `model:` and `data:`"),
        ("name: !!python/object/apply:os.getcwd []", "a.yaml:1: is not valid YAML: could not determine a constructor "
         "for the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd'"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_mapping_of_keys_is_refused_with_its_line(file: Path, text: str, expected: str) -> None:
    assert problem(file, text) == expected


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such file\. Give the path of a YAML config"):
        config.load(Whole, tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        config.load(Whole, tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: café".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: is not UTF-8 text \(byte 9\); save it as UTF-8"):
        config.load(Whole, latin)


def test_control_characters_are_placed_and_byte_order_marks_are_no_text(file: Path) -> None:
    file.write_bytes(b"mode: fast\nname: a\x00b")
    with pytest.raises(ConfigError, match=r"a\.yaml:2: is not valid YAML: character #x0000 is not allowed"):
        config.load(Whole, file)
    file.write_bytes(b"\xef\xbb\xbfname: x")
    assert config.load(Whole, file).name == "x"


def test_overrides_win_over_the_file_and_later_ones_over_earlier(file: Path) -> None:
    read = load(
        file, GOOD, "optimizer.learning_rate=1", "optimizer.learning_rate=2", "data.files=c.jsonl", "mode=exact",
        "optimizer.betas=[0.1, 0.2]", "data.columns={prompt: question}", "name=a=b",
    )  # fmt: skip
    assert read.optimizer == Optimizer(learning_rate=2, betas=[0.1, 0.2])
    assert read.data == Data(files="c.jsonl", columns={"prompt": "question"})
    assert (read.name, read.mode) == ("a=b", "exact")


def test_overrides_reach_sections_that_the_file_leaves_out_or_empty(file: Path) -> None:
    assert load(file, "name: x\ndata:", "data.shuffle=false").data == Data(shuffle=False)
    assert load(file, "name: x", "data.columns.prompt=question").data == Data(columns={"prompt": "question"})
    assert load(file, GOOD, "data=null").data is None
    assert config.load(Whole, None, ["name=x"]) == Whole(name="x")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lerning_rate=1", "override optimizer.lerning_rate: unknown key `optimizer.lerning_rate`; did you "
         "mean `optimizer.learning_rate`?"),
        ("optimizer.learning_rate=fast", "override optimizer.learning_rate: `optimizer.learning_rate`: Input should be "
         "a valid number, unable to parse string as a number (given: \"fast\")"),
        ("optimizer.epochs=", "override optimizer.epochs: `optimizer.epochs`: Input should be a valid integer (given: "
         "null)"),
        ("name.first=x", "override `name.first=x`: `name` is a value, not a section; nothing can be set below it"),
        ("learning_rate", "`learning_rate` is not an override; write key.sub=value, such as "
         "training.learning_rate=1e-4"),
        ("=1", "`=1` is not an override; write key.sub=value, such as training.learning_rate=1e-4"),
    ],
)  # fmt: skip
def test_a_wrong_override_is_named(file: Path, override: str, expected: str) -> None:
    assert problem(file, GOOD, override) == expected


def test_anchors_and_merged_keys_work(file: Path) -> None:
    read = load(file, "name: &same x\ndata: {files: *same}")
    assert read.data == Data(files="x")
    merged = load(file, "name: x\noptimizer:\n  <<: {epochs: 4, betas: [0.5]}\n  epochs: 5")
    assert merged.optimizer == Optimizer(epochs=5, betas=[0.5])


def test_an_override_of_a_wrong_value_in_the_file_mends_it(file: Path) -> None:
    assert load(file, "name: x\nmode: slow", "mode=exact").mode == "exact"


@pytest.mark.parametrize("text", ["{", "[1", "a: b: c", "'"])
def test_an_override_that_is_not_yaml_is_text(file: Path, text: str) -> None:
    assert load(file, "name: x", f"name={text}").name == text


@pytest.mark.parametrize(
    ("text", "notice"),
    [
        ("name: x\nlr: 0.5", "a.yaml:2: `lr` is read as `optimizer.learning_rate`"),
        ("name: x\noptimizer: {lr: 0.5}", "a.yaml:2: `optimizer.lr` is read as `optimizer.learning_rate`"),
        ("name: x\ntraining:\n  lr: 0.5", None),
        ("name: x\nlearning_rate: 0.5", "a.yaml:2: `learning_rate` is read as `optimizer.learning_rate`"),
    ],
)
def test_synonyms_and_flat_keys_are_read_with_a_notice(file: Path, text: str, notice: str | None) -> None:
    notices: list[str] = []
    if notice is None:  # the foreign section itself stays, and is told
        with pytest.raises(ConfigError, match="unknown key `training`"):
            load(file, text, notices=notices)
        return
    assert load(file, text, notices=notices).optimizer.learning_rate == 0.5
    assert [said.replace(str(file), file.name) for said in notices] == [notice]


def test_a_synonym_may_be_an_override_and_its_errors_name_it(file: Path) -> None:
    notices: list[str] = []
    assert load(file, "name: x", "lr=0.5", notices=notices).optimizer.learning_rate == 0.5
    assert notices == ["override lr: `lr` is read as `optimizer.learning_rate`"]
    assert problem(file, "name: x", "lr=no").startswith("override lr: `optimizer.learning_rate`: ")


def test_canonical_keys_give_no_notice(file: Path) -> None:
    notices: list[str] = []
    load(file, GOOD, "optimizer.epochs=2", notices=notices)
    assert notices == []


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("name: x\nlr: 1\noptimizer: {learning_rate: 2}", [], "a.yaml:2: `lr` means `optimizer.learning_rate`, which "
         "is also given (a.yaml:3); keep one"),
        ("name: x\nlr: 1\nlearning_rate: 1", [], "a.yaml:3: `learning_rate` means `optimizer.learning_rate`, which "
         "is also given (a.yaml:2); keep one"),
        ("name: x\noptimizer: {learning_rate: 2}", ["lr=1"], "override lr: `lr` means `optimizer.learning_rate`, which "
         "is also given (a.yaml:2); keep one"),
    ],
)  # fmt: skip
def test_a_synonym_beside_its_canonical_key_is_refused(
    file: Path, text: str, overrides: list[str], expected: str
) -> None:
    assert problem(file, text, *overrides) == expected


@pytest.mark.parametrize(
    "given",
    [
        Whole(name="x"),
        Whole(name="Größe 数", mode="exact", optimizer=Optimizer(learning_rate=1e-7, betas=[], epochs=3)),
        Whole(name="yes", data=Data(files=["1", "null", "a: b", "#x"], columns={"on": "off", "1e3": "~"})),
    ],
)
def test_what_is_dumped_reads_back_equal(file: Path, given: Whole) -> None:
    text = config.dump(given)
    assert load(file, text) == given
    assert set(config.dotted_keys(Whole)) >= {"optimizer.learning_rate", "data.files"}
    assert "learning_rate" in text, "defaults are written out"


def test_fingerprints_tell_values_apart_and_nothing_else() -> None:
    same: list[Any] = [{"a": 1, "b": [1.5, None]}, {"b": [1.5, None], "a": 1}]
    assert config.fingerprint(same[0]) == config.fingerprint(same[1])
    assert config.fingerprint(Whole(name="x")) == config.fingerprint(Whole(name="x").model_dump(mode="json"))
    others = [{"a": 1}, {"a": 2}, {"a": "1"}, {"a": [1]}, {"a": None}, ["a", 1]]
    assert len({config.fingerprint(value) for value in others}) == len(others)


def test_a_loaded_configuration_cannot_be_changed(file: Path) -> None:
    read = load(file, GOOD)
    with pytest.raises(ValueError, match="frozen"):
        read.optimizer.learning_rate = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("optimizer.epoch", "optimizer.epochs"),
        ("epocs", "optimizer.epochs"),
        ("date.files", "data.files"),
        ("other.shufle", "data.shuffle"),
        ("quite_different", None),
    ],
)
def test_nearest_key(key: str, expected: str | None) -> None:
    assert config.nearest(key, list(config.dotted_keys(Whole))) == expected


@pytest.mark.parametrize(
    "value", ["https://me:hunter2@host/rows", "s3://KEY:SECRET@bucket/x", "s3://bucket/x?secret_key=hunter2"]
)
def test_a_uri_with_a_password_is_refused_and_not_repeated(file: Path, value: str) -> None:
    for text, overrides in ((f"name: {value}", []), ("name: a", [f"name={value}"])):
        told = problem(file, text, *overrides)
        assert "`name` holds a password or key" in told
        assert "hunter2" not in told
        assert "SECRET" not in told


@pytest.mark.parametrize("value", ["hdfs://me@host/rows", "read http://a:b@c first", "http://host:80/x@y", "a:b@c"])
def test_other_texts_with_these_signs_are_no_passwords(file: Path, value: str) -> None:
    assert load(file, "name: a", f"name={json.dumps(value)}").name == value
