"""The command line: what goes to which stream, which exit code, and that a user never sees a traceback unasked."""

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from heliostat import __version__, cli
from heliostat.command import Command
from heliostat.errors import JobFailed
from heliostat.models import base
from heliostat.registry import store, versions
from tests import tiny
from tests.bundles import write_bundle

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle and a config beside it, in a folder with one MLflow store for the module."""
    folder = tmp_path_factory.mktemp("cli")
    write_bundle(folder / "bundle", prompt_template="{prompt} ->")
    rows = [{"prompt": text, "completion": " house"} for text in tiny.TEXTS[:4]]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        f"name: tiny\nmodel: {{model_name_or_path: {folder}/bundle}}\n"
        "data: {test: nowhere.jsonl, format: prompt_completion, max_length: 64}\ngeneration: {max_new_tokens: 2}\n"
    )
    return folder


@pytest.fixture
def shared_store(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOSTAT_HOME", str(home / "state"))


def heliostat(*arguments: str, stdin: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "heliostat.cli", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, **options)


def last_json(text: str) -> Any:
    return json.loads(text.splitlines()[-1])


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a command `try` with the given body into the table."""

    def put(run: Any) -> None:
        monkeypatch.setitem(cli.COMMANDS, "try", Command("help", lambda parser: None, run, lambda result: "shown"))

    return put


def test_help_names_every_command(capsys: Capture) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert cli.main(arguments) == 0
        output = capsys.readouterr()
        for name, found in cli.COMMANDS.items():
            assert f"  {name:<14} {found.help}" in output.out
        assert output.err == ""


@pytest.mark.parametrize("verb", list(cli.COMMANDS))
def test_each_command_explains_itself(verb: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: heliostat {verb}")
    assert "--json" in output
    assert "--debug" in output


def test_an_unknown_command_is_code_2_and_names_the_known_ones(capsys: Capture) -> None:
    assert cli.main(["trian"]) == 2
    output = capsys.readouterr()
    assert output.err.endswith("error: there is no command `trian`\n")
    assert "train" in output.out


@pytest.mark.parametrize("arguments", [["train"], ["train", "a.yaml", "--no-such-flag"], ["promote", "a", "b"]])
def test_wrong_arguments_are_code_2(arguments: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert f"heliostat {arguments[0]}: error: " in capsys.readouterr().err


def test_version(capsys: Capture) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"heliostat {__version__}\n"


def test_results_go_to_stdout_and_everything_else_to_stderr(command: Any, capsys: Capture) -> None:
    def run(options: Any) -> dict[str, Any]:
        print("a library talks")
        return {"value": 1}

    command(run)
    assert cli.main(["try"]) == 0
    assert capsys.readouterr() == ("shown\n", "a library talks\n")
    assert cli.main(["try", "--json"]) == 0
    assert capsys.readouterr() == ('{"value": 1}\n', "a library talks\n")
    assert cli.main(["--json", "try"]) == 0, "flags may stand before the command"
    assert capsys.readouterr().out == '{"value": 1}\n'


def test_a_command_may_show_its_result_before_it_ends(command: Any, capsys: Capture) -> None:
    def run(options: Any) -> None:
        options.emit({"url": "http://127.0.0.1:1"})
        print("serving")

    command(run)
    assert cli.main(["try", "--json"]) == 0
    assert capsys.readouterr() == ('{"url": "http://127.0.0.1:1"}\n', "serving\n")


def test_an_unexpected_error_is_code_1_with_its_traceback_on_demand(command: Any, capsys: Capture) -> None:
    def run(options: Any) -> None:
        raise ZeroDivisionError("by zero")

    command(run)
    assert cli.main(["try", "--json"]) == 1
    output = capsys.readouterr()
    assert output.err == "error: ZeroDivisionError: by zero (--debug shows the traceback)\n"
    assert last_json(output.out) == {
        "error": "ZeroDivisionError: by zero (--debug shows the traceback)",
        "exit_code": 1,
    }
    assert cli.main(["try", "--debug"]) == 1
    output = capsys.readouterr()
    assert output.err.startswith("Traceback (most recent call last)")
    assert output.err.endswith("error: ZeroDivisionError: by zero\n")


def test_a_job_that_failed_tells_its_facts_and_the_exit_code_of_its_command(command: Any, capsys: Capture) -> None:
    def run(options: Any) -> None:
        raise JobFailed("the job x failed", 3, {"job_id": "x", "exit_code": None})

    command(run)
    assert cli.main(["try", "--json"]) == 3
    assert last_json(capsys.readouterr().out) == {"error": "the job x failed", "exit_code": 3, "job_id": "x"}


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(0)], ids=["ours", "Ray Train's"])
def test_an_interrupt_is_code_130_without_a_traceback(command: Any, capsys: Capture, interrupt: BaseException) -> None:
    def run(options: Any) -> None:
        raise interrupt

    command(run)
    assert cli.main(["try"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_a_users_error_is_code_2_on_both_streams(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: x\nmodle: {}\n")
    message = f"{path}: `model` is missing\n{path}: `data` is missing\n{path}:2: unknown key `modle`; did you mean"
    assert cli.main(["train", str(path), "--json"]) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {message}")
    assert "Traceback" not in output.err
    assert len(output.out.splitlines()) == 1
    assert last_json(output.out)["error"].startswith(message)
    assert last_json(output.out)["exit_code"] == 2
    assert cli.main(["train", str(path), "--debug"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_schema(capsys: Capture) -> None:
    assert cli.main(["schema"]) == 0
    pretty = capsys.readouterr().out
    assert cli.main(["schema", "--json"]) == 0
    assert json.loads(pretty) == last_json(capsys.readouterr().out)
    Draft202012Validator.check_schema(json.loads(pretty))


def test_doctor(shared_store: None, capsys: Capture) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    report = last_json(capsys.readouterr().out)
    assert report["ok"] == all(check["status"] != "problem" for check in report["checks"])
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [check["name"] for check in report["checks"]]


def greedy(home: Path, prompt: str, max_new_tokens: int) -> str:
    """The answer by transformers alone."""
    loaded = base.load_for_inference(str(home / "bundle"))
    inputs = loaded.tokenizer(f"{prompt} ->", return_tensors="pt", return_token_type_ids=False)
    loaded.model.generation_config.max_new_tokens = max_new_tokens
    output = loaded.model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    return str(loaded.tokenizer.decode(output, skip_special_tokens=True))


def test_generate_answers_prompts_in_order_with_the_bundles_settings(home: Path, capsys: Capture) -> None:
    prompts = ["the red cat goes", "old", "a dog"]
    options = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    assert cli.main(["generate", str(home / "bundle"), *options, "--json"]) == 0
    result = last_json(capsys.readouterr().out)
    assert result == {"model": str(home / "bundle"), "outputs": [greedy(home, prompt, 8) for prompt in prompts]}
    assert len(set(result["outputs"])) == 3


def test_generate_mixes_flags_and_settings_and_reads_stdin(
    home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the red cat goes\n\n  \nold\n"))
    arguments = ["generate", "--json", str(home / "bundle"), "max_new_tokens=3"]
    assert cli.main(arguments) == 0
    expected = [greedy(home, prompt, 3) for prompt in ("the red cat goes", "old")]
    assert last_json(capsys.readouterr().out)["outputs"] == expected
    assert cli.main([*arguments[:3], "--prompt", "old", "generation.max_new_tokens=3", "do_sample=false"]) == 0
    assert last_json(capsys.readouterr().out)["outputs"] == expected[1:]
    assert cli.main(["generate", str(home / "bundle"), "--prompt", "old", "max_new_tokens=3"]) == 0
    assert capsys.readouterr().out == expected[1] + "\n"


def test_generate_without_a_prompt_or_with_a_wrong_setting_is_code_2(
    home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert cli.main(["generate", str(home / "bundle")]) == 2
    assert "no prompt is given; use --prompt or --file, or write one prompt a line to stdin" in capsys.readouterr().err
    assert cli.main(["generate", str(home / "bundle"), "--prompt", "a", "max_tokens=3"]) == 2
    assert "override max_tokens: unknown key `max_tokens`; did you mean `max_new_tokens`?" in capsys.readouterr().err
    assert cli.main(["generate", str(home / "bundle"), "--prompt", "a " * 500]) == 2
    assert "leaves none of the model's 128 positions" in capsys.readouterr().err


def test_generate_compares_ways_to_decode_side_by_side(home: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "prompts.txt").write_text("the red cat goes\n\nold\n")
    ways = ["greedy", "num_beams=3", "temperature=1.5 top_k=20"]
    compared = [argument for way in ways for argument in ("--compare", way)]
    arguments = ["generate", str(home / "bundle"), "--file", str(tmp_path / "prompts.txt"), *compared]
    assert cli.main([*arguments, "max_new_tokens=5", "--json"]) == 0
    result = last_json(capsys.readouterr().out)
    assert result["prompts"] == ["the red cat goes", "old"]
    assert [each["settings"] for each in result["compared"]] == ways
    assert result["compared"][0]["outputs"] == [greedy(home, prompt, 5) for prompt in result["prompts"]]
    assert result["compared"][2]["outputs"] != result["compared"][0]["outputs"]
    assert cli.main([*arguments, "max_new_tokens=5"]) == 0
    shown = capsys.readouterr().out
    assert all(shown.count(way) == 2 for way in ways), "a table for each prompt"
    assert cli.main([*arguments, "--stream"]) == 2
    assert "without --stream" in capsys.readouterr().err
    assert cli.main([*arguments, "--compare", "heat=1"]) == 2
    assert "unknown key `heat`" in capsys.readouterr().err


def test_generate_streams(home: Path, capsys: Capture) -> None:
    prompts = ["the red cat goes", "old"]
    arguments = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    assert cli.main(["generate", str(home / "bundle"), *arguments, "--stream"]) == 0
    assert capsys.readouterr().out == "".join(f"{greedy(home, prompt, 8)}\n" for prompt in prompts)
    assert cli.main(["generate", str(home / "bundle"), *arguments, "--stream", "num_beams=2"]) == 2
    assert "num_beams=2 cannot be streamed" in capsys.readouterr().err


def test_generate_answers_what_is_typed_until_the_end_of_input(home: Path) -> None:
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "heliostat.cli", "generate", str(home / "bundle")]
    with subprocess.Popen(command, stdin=end, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        os.write(terminal, b"the red cat goes\n\nold\n\x04")
        output, errors = process.communicate()
    for opened in (terminal, end):
        os.close(opened)
    assert process.returncode == 0, errors
    assert output.decode() == "".join(f"{greedy(home, prompt, 8)}\n" for prompt in ("the red cat goes", "old"))
    assert errors.decode().count("> ") == 4


def test_evaluate_mixes_flags_and_overrides(home: Path, shared_store: None, tmp_path: Path, capsys: Capture) -> None:
    predictions = tmp_path / "predictions.jsonl"
    code = cli.main(
        ["evaluate", str(home / "config.yaml"), "--model", str(home / "bundle"), f"data.test={home}/test.jsonl",
         "--json", "evaluation.batch_size=3", "--predictions", str(predictions)]
    )  # fmt: skip
    assert code == 0
    result = last_json(capsys.readouterr().out)
    assert (result["n"], result["model"]) == (4, str(home / "bundle"))
    assert len(predictions.read_text().splitlines()) == 4


@pytest.fixture
def registered(home: Path, shared_store: None) -> str:
    run = store.client().create_run(store.experiment_id("cli"))
    return versions.register(run.info.run_id, home / "bundle", "tiny", {}).version


def test_a_refused_gate_is_code_3_and_a_passed_one_0(registered: str, capsys: Capture) -> None:
    assert cli.main(["promote", "tiny", "--metric", "exact_match", "--json"]) == 3
    output = capsys.readouterr()
    assert last_json(output.out)["exit_code"] == 3
    assert "has no score `exact_match`" in output.err
    assert versions.aliases("tiny") == {"challenger": registered}
    versions.log_evaluation("tiny", registered, {"exact_match": 0.5})
    assert cli.main(["promote", "tiny", "--metric", "exact_match", "--reason", "why not", "--json"]) == 0
    assert last_json(capsys.readouterr().out)["version"] == registered
    assert versions.aliases("tiny")["champion"] == registered
    assert cli.main(["promote", "tiny", "--version", "77"]) == 2
    assert "`tiny` has no version 77" in capsys.readouterr().err


def test_a_registered_model_answers_by_its_alias(registered: str, home: Path, capsys: Capture) -> None:
    assert cli.main(["generate", "models:/tiny@challenger", "--prompt", "old", "max_new_tokens=3"]) == 0
    assert capsys.readouterr().out == greedy(home, "old", 3) + "\n"


def test_the_installed_command_keeps_stdout_to_one_json_line(home: Path, tmp_path: Path) -> None:
    done = heliostat("generate", str(home / "bundle"), "max_new_tokens=3", "--json", stdin="old\n", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert last_json(done.stdout)["outputs"] == [greedy(home, "old", 3)]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "state"] or list(tmp_path.iterdir()) == []


def test_exit_codes_reach_the_shell(tmp_path: Path) -> None:
    done = heliostat("train", str(tmp_path / "gone.yaml"), "--json")
    assert done.returncode == 2
    assert last_json(done.stdout)["exit_code"] == 2
    assert "Traceback" not in done.stderr
    assert heliostat("no-such-command").returncode == 2
    assert heliostat("--version").stdout == f"heliostat {__version__}\n"


@pytest.mark.parametrize("arguments", [["schema"], ["schema", "--json"], ["--help"], ["train", "--help"], ["--version"],
                                       ["train", "gone.yaml", "--json"], ["nonsense"]])  # fmt: skip
def test_a_reader_that_is_gone_is_no_traceback(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "heliostat.cli", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    assert "BrokenPipe" not in errors
