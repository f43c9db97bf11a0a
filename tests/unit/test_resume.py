"""A run goes on by its folder or name alone, from the newest whole checkpoint, and ends as if nothing had happened."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from heliostat import cli, state
from heliostat.errors import ConfigError
from heliostat.models.files import sha256
from heliostat.training import resume as resuming
from heliostat.training.worker import LocalSession
from tests import tiny
from tests.slow import command


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any], str]:
    """Exit code, result and what was told."""
    code = cli.main([*arguments, "--json"])
    output = capsys.readouterr()
    return code, json.loads(output.out.splitlines()[-1]), output.err


def flip_a_bit(folder: Path) -> None:
    """Damage a checkpoint's optimizer state."""
    (shard,) = (folder / "deepspeed").glob("zero_pp_rank_0*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


@pytest.fixture
def config(tmp_path: Path, tiny_bundle: Path) -> str:
    """Six steps, with a checkpoint every two."""
    data = tmp_path / "train.jsonl"
    rows = [{"prompt": text, "completion": text[::-1][:9]} for text in tiny.TEXTS[:24]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "name": "cron",
        "model": {"model_name_or_path": str(tiny_bundle)},
        "data": {"format": "prompt_completion", "train": str(data), "max_length": 64, "packing": False},
        "training": {"num_workers": 0, "max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4,
                     "save_total_limit": 3},
        "registry": {"register_model": False},
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(values))
    return str(path)


def test_a_damaged_folder_is_mended_and_the_run_ends_the_same(
    config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, result, _ = run(["train", config], capsys)
    assert code == 0
    folder = Path(result["run_folder"])
    expected = sha256(Path(result["bundle"]) / "model.safetensors")
    code, result, _ = run(["resume", "cron"], capsys)
    assert (code, result["error"]) == (2, f"{folder} is finished; there is nothing to go on with")

    checkpoints = folder / "checkpoints" / "attempt-01"
    (checkpoints / "step_000006-w1" / "manifest_0.json").unlink()
    flip_a_bit(checkpoints / "step_000004-w1")
    (folder / "run.json").write_text("{")
    code, result, _ = run(["resume", "cron-0001"], capsys)
    assert (code, result["error"]) == (2, f"{folder} has no readable run.json; try --repair")

    code, result, told = run(["resume", str(folder), "--repair"], capsys)
    assert code == 0
    assert "run.json could not be read and was written anew" in told
    assert "the checkpoint of step 6 is not whole and was removed: half-written" in told
    assert f"step 4 is not whole and was set aside as {checkpoints}/damaged_step_000004-w1: deepspeed/zero" in told
    assert "goes on from step 2 (whole checkpoints: 2)" in told
    assert (result["run_folder"], sha256(Path(result["bundle"]) / "model.safetensors")) == (str(folder), expected)
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_a_quota_that_is_used_up_is_told_and_the_run_goes_on_from_the_checkpoint_before(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def lower_the_limit(*_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))

    with monkeypatch.context() as patch:
        patch.setattr(LocalSession, "report", lower_the_limit)
        try:
            code, result, _ = run(["train", config, "name=full"], capsys)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    folder = state.runs() / "full-0001"
    assert code == 2, result
    assert (
        f"no room to write {folder}/checkpoints/attempt-01/step_000004-w1 (worker 0: [Errno 27] File too large"
        in result["error"]
    )
    assert "go on with `heliostat resume`" in result["error"]
    assert [path.name for path in (folder / "checkpoints" / "attempt-01").iterdir()] == ["step_000002-w1"]

    flip_a_bit(folder / "checkpoints" / "attempt-01" / "step_000002-w1")
    code, result, told = run(["resume", "full"], capsys)
    assert (code, result["run_folder"]) == (0, str(folder))
    assert "the checkpoint of step 2 is not whole and was set aside as" in " ".join(told.split()), "by the workers"
    assert list(command.journal(folder, "progress.start")) == [0]


def test_the_last_run_of_a_name_is_meant(tmp_path: Path) -> None:
    for name in ("cron-0001", "cron-0003", "cron-0002"):
        (state.runs() / name).mkdir(parents=True)
        (state.runs() / name / "config.yaml").touch()
    assert resuming.find("cron") == state.runs() / "cron-0003"
    assert resuming.find("cron-0001") == state.runs() / "cron-0001"
    assert resuming.find(str(state.runs() / "cron-0002")) == state.runs() / "cron-0002"
    for unknown in ("ham", str(tmp_path)):
        with pytest.raises(ConfigError, match=f"`{unknown}` is no run folder"):
            resuming.find(unknown)
