"""The training benchmark, whole, in a tiny setting. What it measures is not judged here, only that it measures."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import train
from benchmarks.contenders import JOBS, MAX_LENGTH, PADDED_LENGTH, Clock, Settings

STEPS, WARMUP, BATCH = 2, 1, 3


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A small Alpaca file with answers of different lengths."""
    data = tmp_path_factory.mktemp("alpaca") / "alpaca.json"
    rows = [
        {"instruction": f"Count to {n}.", "input": "" if n % 2 else "Slowly.", "output": " ".join(map(str, range(n)))}
        for n in range(1, 120)
    ]
    data.write_text(json.dumps(rows))
    return Settings(str(data), n_layer=1, n_embd=32, vocab_size=400, batch=BATCH, steps=STEPS, warmup=WARMUP, threads=1)


@pytest.fixture(scope="module")
def result(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One round of everything."""
    return train.compare(settings, 1, tmp_path_factory.mktemp("benchmark"))


@pytest.mark.slow
def test_packed_contenders_do_the_same_work(result: dict[str, Any]) -> None:
    ours, plain = result["contenders"]["ours"], result["contenders"]["plain"]
    assert ours["tokens"] == plain["tokens"] > 0
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)


@pytest.mark.slow
def test_padded_contender_sees_about_as_many_real_tokens(result: dict[str, Any]) -> None:
    padded, data = result["contenders"]["padded"], result["data"]
    steps = round(STEPS * data["packed_fill"] / data["padded_fill"])
    positions = steps * (BATCH * MAX_LENGTH // PADDED_LENGTH) * PADDED_LENGTH
    assert 0 < data["padded_fill"] < data["packed_fill"] <= 1
    assert padded["tokens"] < positions
    assert padded["tokens"] == pytest.approx(result["contenders"]["ours"]["tokens"], rel=0.5)


@pytest.mark.slow
def test_memory_of_all_processes_is_told(result: dict[str, Any]) -> None:
    memory = result["rss_mib"]
    assert 0 < memory["imports"] <= memory["quickstart"]
    assert all(found["peak_rss_mib"] > 0 for found in result["contenders"].values())


@pytest.mark.slow
def test_result_is_json_and_a_table(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result)) == result
    shown = train.table(result)
    for text in (*train.CONTENDERS.values(), "ours/plain", "ours/padded"):
        assert text in shown


def test_ratios_compare_runs_of_the_same_round() -> None:
    def run(seconds: float) -> dict[str, float]:
        return {"tokens": 100, "seconds": seconds, "cpu_seconds": 2 * seconds, "loss": 1.0, "peak_rss_mib": 1.0}

    # Round 2 had a machine half as fast; the ratio does not move.
    summary = train.summary({"ours": [run(1), run(2), run(1)], "plain": [run(3), run(6), run(3)]})
    assert summary["ratios"] == {"ours/plain": {"seconds": 3.0, "cpu_seconds": 3.0}}
    assert summary["contenders"]["ours"]["tokens_per_second"] == 100


def test_warmup_is_not_measured() -> None:
    clock = Clock(warmup=2)
    for _ in range(4):
        clock.tick()
    found = clock.measurement([1000, 1000, 3, 4], loss=0.5)
    assert (found.tokens, found.loss) == (7, 0.5)
    assert found.seconds >= 0


def test_settings_survive_the_way_to_another_process(settings: Settings, tmp_path: Path) -> None:
    settings.save(tmp_path)
    assert Settings.load(tmp_path) == settings


def test_missing_data_is_a_clear_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        train.arguments(["--data", str(tmp_path / "none.json")])
    assert error.value.code == 2
    assert "none.json" in capsys.readouterr().err


def test_failed_job_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'none'"):
        train.run_job("none", tmp_path, threads=1)


def test_every_contender_is_a_job() -> None:
    assert train.CONTENDERS.keys() <= JOBS.keys()
