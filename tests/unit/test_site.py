"""The documents as a site: it builds without a broken link, and its made pages have every key and every example."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from heliostat import config
from heliostat.experiment import ExperimentConfig
from tests import readme
from tests.conftest import REPOSITORY

EXAMPLES = sorted((REPOSITORY / "jobs" / "examples").glob("*/*.yaml"))


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The hook that makes pages; docs/ is no package."""
    spec = importlib.util.spec_from_file_location("reference", REPOSITORY / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("index.html"))
    assert len(pages) >= len(list((REPOSITORY / "docs").glob("*.md")))
    loaded = [re.findall(r'(?:src|<link[^>]* href)="(https?://[^"]+)', page.read_text()) for page in pages]
    assert not any(loaded)


def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    shutil.copytree(REPOSITORY / "jobs" / "examples", tmp_path / "jobs" / "examples")
    shutil.copy(REPOSITORY / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write("[gone](serving.md#no-such-heading)\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no-such-heading" in done.stderr


def test_every_key_is_in_the_reference(reference: ModuleType) -> None:
    told = set(re.findall(r"^\| `([\w.]+)` \|", reference.configuration(ExperimentConfig), re.MULTILINE))
    assert set(config.dotted_keys(ExperimentConfig)) <= told


def test_every_example_is_a_recipe_that_says_how_to_run_it(reference: ModuleType) -> None:
    page = reference.recipes(REPOSITORY / "jobs" / "examples")
    recipes = page.split("\n## ")[1:]
    assert len(recipes) == len(EXAMPLES)
    for path, recipe in zip(EXAMPLES, recipes, strict=True):
        assert f"heliostat train {path.relative_to(REPOSITORY)}" in recipe or "tune" in path.name
        assert path.read_text().split("\n\n", 1)[1].strip() in recipe


def test_messages_in_the_troubleshooting_guide_are_those_of_the_code() -> None:
    said = readme.document("troubleshooting.md")
    quoted = re.findall(r"^\| `([^`]+)` \|", said, re.MULTILINE)
    assert len(quoted) > 30
    sources = sorted((REPOSITORY / "platform" / "heliostat").rglob("*.py"))
    texts = [text for path in sources for text in strings(ast.parse(path.read_text(encoding="utf-8")))]
    assert [message for message in quoted if not any(message in text for text in texts)] == []


def strings(tree: ast.AST) -> list[str]:
    """All string constants, the fixed parts of f-strings too."""
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
