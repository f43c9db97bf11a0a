"""k8s/Dockerfile, read by k8s.image: what an image is made of, and that Docker would find it."""

import re
from pathlib import Path

import pytest

from heliostat.errors import ConfigError
from k8s import image
from k8s.image import Build, Step
from k8s.validate.images import tag
from tests.conftest import REPOSITORY


def lines(device: str, instruction: str) -> list[str]:
    return [step.text for step in image.steps(device) if step.instruction == instruction]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_packages_are_the_tested_ones(device: str) -> None:
    installs = [text for text in lines(device, "RUN") if "pip install" in text]
    assert len(installs) == 3
    for text in installs:
        assert "--constraint constraints.txt" in text or "--no-deps" in text
    assert '".[otel,server]"' in " ".join(installs)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_kuberays_probes_call_is_there_and_nobody_is_root(device: str) -> None:
    assert {"bash", "wget"} <= set(" ".join(lines(device, "RUN")).split())
    assert lines(device, "USER") == ["1000:1000"]
    assert "org.opencontainers.image.revision" in " ".join(lines(device, "LABEL"))


def test_devices_differ_in_torch_alone() -> None:
    cpu, cuda = (lines(device, "RUN") for device in ("cpu", "cuda"))
    assert [text for text in cpu if text not in cuda and "torch" not in text] == []
    assert any("gcc" in text for text in cuda)
    assert not any("gcc" in text for text in cpu)


def test_the_commands_in_the_file_make_the_tags_of_the_manifests() -> None:
    text = image.FILE.read_text(encoding="utf-8")
    built = re.findall(r"--build-arg DEVICE=(\w+)\s+-t heliostat:(\S+)", text)
    assert built == [("cpu", tag("cpu")), ("cuda", tag("cuda"))]


def test_what_is_copied_is_there_and_reaches_the_builder() -> None:
    rules = image.ignore_rules()
    for text in lines("cpu", "COPY"):
        for source in text.split()[:-1]:
            assert (REPOSITORY / source).exists()
            assert not image.ignored(source, rules), source


@pytest.mark.parametrize("path", [".venv/bin/python", ".heliostat/mlflow.db", ".git/config", "jobs/__pycache__/a.pyc"])
def test_the_rest_stays_here(path: str) -> None:
    assert image.ignored(path, image.ignore_rules())


def test_steps_are_done_below_a_folder(tmp_path: Path) -> None:
    build = Build(tmp_path)
    for step in (
        Step("WORKDIR", "/opt/heliostat", 1),
        Step("COPY", "pyproject.toml constraints.txt ./", 2),
        Step("COPY", "serve serve", 3),
        Step("ENV", "PYTHONPATH=/opt/heliostat A=b", 4),
        Step("RUN", 'echo "$A" > written', 5),
    ):
        assert build.do(step)
    assert not build.do(Step("RUN", "apt-get update", 6))
    inside = tmp_path / "root" / "opt" / "heliostat"
    assert {path.name for path in inside.iterdir()} == {"pyproject.toml", "constraints.txt", "serve", "written"}
    assert (inside / "serve" / "app.py").read_text() == (REPOSITORY / "serve" / "app.py").read_text()
    assert (inside / "written").read_text() == "b\n"
    assert build.environment["PYTHONPATH"] == str(inside)
    with pytest.raises(ConfigError, match="exit code 3"):
        build.do(Step("RUN", "exit 3", 7))


def test_a_stage_that_does_not_exist_is_told() -> None:
    with pytest.raises(ConfigError, match="torch-tpu"):
        image.steps("tpu")


def test_lines_that_go_on_are_one_step() -> None:
    text = "FROM python:3.11 AS one\n# a comment\nRUN a \\\n    # inside\n    && b\n"
    assert image.steps("cpu", text)[1:] == [Step("RUN", "a && b", 3)]
