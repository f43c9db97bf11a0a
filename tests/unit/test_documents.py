"""What README.md and docs/ say of the endpoint is what the code does: commands, settings, errors, files."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from heliostat import config, experiment
from heliostat.cli import COMMANDS
from heliostat.data.config import SEVERITIES, AuditConfig, DataConfig
from heliostat.models.config import AdapterConfig
from heliostat.serving import protocol
from heliostat.serving.config import AutoscalingArgs, CanaryArgs, EndpointArgs, ServingConfig
from heliostat.serving.edge import PROXY_ENVIRONMENT
from heliostat.serving.protocol import ApiError
from tests import readme
from tests.conftest import REPOSITORY

DOCUMENTS = {"README.md": readme.TEXT, **{path.name: path.read_text() for path in (REPOSITORY / "docs").glob("*.md")}}
SERVING = readme.document("serving.md")
SOURCES = sorted((REPOSITORY / "platform" / "heliostat" / "serving").glob("*.py"))
# Pages that the site has and the repository has not (`docs/reference.py`).
MADE = {"configuration.md", "recipes.md"}
LINES = [line for text in DOCUMENTS.values() for line in readme.shell(text)]


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the table whose first column has the heading."""
    lines = text.split(f"\n| {heading} |")[1].splitlines()[2:]
    table = lines[: next((number for number, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("heliostat ")])
def test_commands_and_their_settings_exist(line: str) -> None:
    verb, *arguments = shlex.split(line, comments=True)[1:]
    assert verb in COMMANDS
    if verb != "serve":
        return
    target, *overrides = arguments
    if target.endswith(".yaml"):
        experiment.load(str(REPOSITORY / target), overrides)
    else:
        config.load(ServingConfig, None, [override.removeprefix("serving.") for override in overrides])


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(adapter:.*?)```", DOCUMENTS["training.md"], re.DOTALL))
def test_training_methods_are_what_the_guide_says(block: str) -> None:
    AdapterConfig.model_validate(yaml.safe_load(block)["adapter"])


def test_every_setting_of_an_adapter_is_told() -> None:
    assert [name for name in AdapterConfig.model_fields if name not in DOCUMENTS["training.md"]] == []


def test_the_checks_of_an_audit_are_told_with_their_severities_and_limits() -> None:
    text = DOCUMENTS["data.md"]
    assert {check.strip("`"): severity.split("`")[1] for check, _, severity in rows(text, "check")} == SEVERITIES
    corpus, block = re.findall(r"```yaml\n(data:.*?)```", text, re.DOTALL)
    assert DataConfig(**yaml.safe_load(corpus)["data"]).streaming
    told = yaml.safe_load(block)["data"]["audit"]
    assert AuditConfig(**told).model_dump(exclude={"severity"}) == AuditConfig().model_dump(exclude={"severity"})
    assert told.keys() == AuditConfig.model_fields.keys()


def test_the_readmes_table_has_every_command() -> None:
    assert {shlex.split(row[0].strip("`"))[1] for row in rows(readme.TEXT, "command")} == COMMANDS.keys()


@pytest.mark.parametrize(
    ("heading", "number", "model", "without"),
    [
        ("key", 1, EndpointArgs, set[str]()),
        ("key", 2, ServingConfig, set(EndpointArgs.model_fields)),
        ("`canary.` key", 1, CanaryArgs, set[str]()),
        ("`autoscaling.` key", 1, AutoscalingArgs, set[str]()),
    ],
)
def test_settings_are_all_told_with_their_defaults(
    heading: str, number: int, model: type[BaseModel], without: set[str]
) -> None:
    text = f"\n| {heading} |".join(["", *SERVING.split(f"\n| {heading} |")[number:]])
    told = {key.strip("`"): yaml.safe_load(default.strip("`")) for key, default, *_ in rows(text, heading)}
    given = model()
    names = [name for name in model.model_fields if name not in without]
    plain: dict[str, Any] = {name: getattr(given, name) for name in names}
    assert told == {name: {} if isinstance(value, BaseModel) else value for name, value in plain.items()}
    assert list(told) == names, "in the order of the code"


def test_errors_are_told_with_their_status_and_type() -> None:
    table = [[cell.strip("`") for cell in row[:3]] for row in rows(SERVING, "status")]
    assert [kind for _, kind, _ in table] == [ApiError(int(status), "").kind for status, _, _ in table]
    source = "".join(path.read_text() for path in SOURCES)
    used = set(re.findall(r'\bcode(?:: str)? ?= ?"(\w+)"', source))
    used |= set(re.findall(r'"(\w+)" if error\["type"\]', source))
    assert {code for _, _, code in table} - {"null"} == used | {"timeout"}


def test_what_is_refused_by_name_is_told() -> None:
    text = readme.section("What is refused by name", SERVING)
    for name in (*protocol._UNSUPPORTED, *protocol._IGNORED):
        assert f"`{name}`" in text


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_tests_that_are_named_exist(name: str) -> None:
    text = DOCUMENTS[name]
    folder = REPOSITORY if name == "README.md" else REPOSITORY / "docs"
    links = [link.partition("#")[0] for link in re.findall(r"\]\(((?!https?:)[^)]+)\)", text)]
    assert [link for link in links if link and link not in MADE and not (folder / link).exists()] == []
    named = re.findall(r"`((?:tests|k8s|benchmarks|serve|jobs)/[\w./-]+)`", text)
    assert [path for path in named if not (REPOSITORY / path).exists()] == []
    modules = re.findall(r"`((?:data|models|training|evaluation|registry|tuning|serving)/\w+\.py)`", text)
    assert [path for path in modules if not (REPOSITORY / "platform" / "heliostat" / path).exists()] == []


def test_the_serve_config_is_as_ray_serve_and_the_endpoint_want_it() -> None:
    text = (REPOSITORY / "serve" / "local.yaml").read_text(encoding="utf-8")
    settings = yaml.safe_load(text)
    assert settings.keys() <= ServeDeploySchema.model_fields.keys(), "Ray Serve ignores what it does not know"
    deployed = ServeDeploySchema.model_validate(settings)
    assert deployed.controller_options is not None
    assert deployed.controller_options.runtime_env == {"env_vars": PROXY_ENVIRONMENT}
    assert deployed.http_options.host == "127.0.0.1"
    (application,) = deployed.applications
    EndpointArgs(**application.args)
    # What is commented out is there to be uncommented.
    optional = yaml.safe_load(re.sub(r"(?m)^(      )# (?=\S+: |  - )", r"\1", text))["applications"][0]["args"]
    assert {"models", "api_keys", "autoscaling", "canary"} <= optional.keys()
    EndpointArgs(**optional)


def test_files_in_the_readme_exist() -> None:
    block = readme.section("The files")
    path: list[tuple[int, str]] = []
    for line in block.splitlines():
        if match := re.match(r"( {4,})([\w./]+) {2,}\S", line):
            indent, name = len(match[1]), match[2]
            path = [*(each for each in path if each[0] < indent), (indent, name)]
            assert Path(REPOSITORY, *(part for _, part in path)).exists(), name
