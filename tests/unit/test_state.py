"""Where things are written: the state folder of a machine, and of a job whose own folder is deleted after it."""

from pathlib import Path

import pytest

from heliostat import state


def test_the_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HELIOSTAT_HOME", "elsewhere")
    assert state.folder() == tmp_path / "elsewhere"
    monkeypatch.delenv("HELIOSTAT_HOME")
    assert state.folder() == tmp_path / ".heliostat"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert state.folder() == tmp_path / "home" / ".heliostat"
