"""The doctor tells what is wrong in words, and never falls ill itself."""

from pathlib import Path

import pytest

from heliostat import doctor


def found(report: dict[str, object]) -> dict[str, tuple[str, str]]:
    checks = report["checks"]
    assert isinstance(checks, list)
    return {check["name"]: (check["status"], check["text"]) for check in checks}


def test_every_check_finds_something_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    report = doctor.examine()
    checks = found(report)
    assert list(checks) == list(doctor.CHECKS)
    assert {status for status, _ in checks.values()} <= {"ok", "warning", "problem"}
    assert all(text and "\n" not in text for _, text in checks.values())
    assert report["ok"] == all(status != "problem" for status, _ in checks.values())
    assert "deepspeed" in checks["packages"][1]
    assert checks["mlflow"][0] == "ok"
    assert checks["ray"][0] == "ok"


def test_a_check_that_fails_is_a_problem_and_the_others_still_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> doctor.Finding:
        raise ImportError("libcuda.so.1 is not there")

    checks = {"broken": broken, "python": doctor.CHECKS["python"]}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    report = doctor.examine()
    assert report["ok"] is False
    assert found(report)["broken"] == ("problem", "ImportError: libcuda.so.1 is not there")
    assert found(report)["python"][0] in ("ok", "warning")


def test_warnings_alone_leave_it_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(doctor, "CHECKS", {"compiler": doctor.CHECKS["compiler"]})
    report = doctor.examine()
    assert found(report)["compiler"][0] == "warning"
    assert report["ok"] is True


def test_an_mlflow_server_that_is_away_is_a_problem_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(doctor, "CHECKS", {"mlflow": doctor.CHECKS["mlflow"]})
    status, text = found(doctor.examine())["mlflow"]
    assert status == "problem"
    assert "127.0.0.1:9 cannot be reached; start it, or correct MLFLOW_TRACKING_URI" in text
    assert "secret" not in text


def test_looking_at_a_state_folder_does_not_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOSTAT_HOME", str(tmp_path / "a" / "b"))
    monkeypatch.setattr(doctor, "CHECKS", {"disk": doctor.CHECKS["disk"]})
    assert str(tmp_path / "a" / "b") in found(doctor.examine())["disk"][1]
    assert not (tmp_path / "a").exists()
