"""The layout's rules, read from the source: which way imports point, where Ray and MLflow live, how long code is."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "platform" / "heliostat"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60

# What each part may import beside itself. A part is a package, or a module beside them; `data` stands for `data.config`
# too. The sections of the configuration, `*/config.py`, are a part of their own, which `experiment` puts together.
_BASICS = {"heliostat", "errors", "config", "state", "journal", "hosts", "command", "tasks", "machine",
           "storage", "cache"}  # fmt: skip
_LIBRARY = _BASICS | {"data", "models", "evaluation"}
ALLOWED = {
    "heliostat": set[str](),
    "errors": set[str](),
    "command": set[str](),
    "hosts": {"errors"},
    "state": {"errors"},
    "storage": {"errors"},
    "cache": {"errors", "config", "state", "storage"},
    "journal": {"errors"},
    "tasks": set[str](),
    "machine": set[str](),
    "config": {"errors"},
    "*/config": {"errors", "config", "tasks"},
    "experiment": {"config", "*/config"},
    "cluster": {"errors"},
    "data": _BASICS,
    "models": _BASICS,
    "evaluation": _LIBRARY | {"cluster"},
    "registry": _LIBRARY | {"experiment"},
    "training": _LIBRARY | {"experiment", "registry", "cluster"},
    "tuning": _LIBRARY | {"experiment", "registry", "cluster", "training"},
    "serving": _LIBRARY | {"experiment", "registry", "cluster"},
    "jobs": _LIBRARY | {"experiment", "cluster", "training"},
    "doctor": _BASICS | {"cluster", "registry"},
    "quickstart": _LIBRARY | {"experiment", "registry", "cluster", "training", "tuning", "serving"},
}
# The only modules of the library that may know Ray; MLflow is known to registry/ alone.
RAY = {"cluster.py", "doctor.py", "evaluation/actors.py", "training/checkpoint_scores.py", "training/group.py",
       "training/ray_worker.py"}  # fmt: skip
RAY_PACKAGES = ("jobs", "serving", "tuning")


@dataclass(frozen=True)
class Import:
    """One imported module, dotted, and its place."""

    module: str
    file: Path
    line: int

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    def __str__(self) -> str:
        return f"{self.file.relative_to(REPOSITORY)}:{self.line} imports {self.module}"


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def imports(file: Path) -> list[Import]:
    """All imports of a file, those inside functions too; `from a import b` is a.b where that is a module."""
    return [Import(module, file, line) for module, line in _imports(file)]


def _imports(file: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if _is_module(whole) else str(node.module)), node.lineno


def _is_module(name: str) -> bool:
    path = REPOSITORY / "platform" / Path(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def part(module: str) -> str:
    """The part that a module of the library belongs to."""
    _, *path = module.split(".")
    if not path:
        return "heliostat"
    return "*/config" if path[1:] == ["config"] else path[0]


def may_import(own: str, module: str) -> bool:
    """Whether the part `own` may import the module of the library."""
    wanted = part(module)
    if wanted == "*/config" and own not in ("experiment", "*/config"):
        wanted = module.split(".")[1]
    return wanted == own or wanted in ALLOWED[own]


def name_of(file: Path) -> str:
    dotted = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


def ids(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def test_the_folder_named_like_a_standard_module_is_no_package() -> None:
    """With platform/__init__.py, `import platform` (and so uuid, pytest, ...) would find this folder."""
    assert not (REPOSITORY / "platform" / "__init__.py").exists()
    assert (PACKAGE / "__init__.py").exists()


def test_the_rules_cover_every_part_of_the_library() -> None:
    parts = {part(name_of(file)) for file in FILES}
    assert parts - {"cli"} <= ALLOWED.keys()
    assert len(FILES) > 40, "the files were found"


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_imports_point_one_way(file: Path) -> None:
    own = part(name_of(file))
    if own == "cli":
        return
    wrong = [str(found) for found in imports(file) if found.top == "heliostat" and not may_import(own, found.module)]
    assert wrong == []


@pytest.mark.parametrize(("package", "other"), [("serving", "training"), ("training", "serving")])
def test_serving_and_training_meet_in_the_bundle_only(package: str, other: str) -> None:
    """Not even in the configuration."""
    files = sorted((PACKAGE / package).rglob("*.py"))
    assert len(files) > 5
    found = [imported for file in files for imported in imports(file)]
    assert [str(imported) for imported in found if imported.module.startswith(f"heliostat.{other}")] == []


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_ray_and_mlflow_stay_in_their_places(file: Path) -> None:
    inside = file.relative_to(PACKAGE)
    foreign = {found.top for found in imports(file)}
    assert "mlflow" not in foreign or inside.parts[0] == "registry"
    assert "ray" not in foreign or str(inside) in RAY or inside.parts[0] in RAY_PACKAGES


def test_doors_hold_no_logic() -> None:
    """What jobs/ and serve/ import of the library is all they are."""
    for file in [*REPOSITORY.glob("jobs/**/*.py"), *REPOSITORY.glob("serve/**/*.py")]:
        assert len(file.read_text().splitlines()) <= 20, file
        assert {found.top for found in imports(file)} <= {"heliostat", "sys"}, file


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_modules_say_what_they_are_and_stay_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    if file.name != "__init__.py" or text.strip():
        assert ast.get_docstring(tree(file)), "has no docstring"
    assert len(text.splitlines()) <= MAX_FILE_LINES
    functions = [node for node in ast.walk(tree(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: (f.end_lineno or 0) - f.lineno + 1 for f in functions}
    assert {name: lines for name, lines in long.items() if lines > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_public_functions_and_classes_are_documented(file: Path) -> None:
    public = [
        node
        for node in tree(file).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    code = (
        "import sys, heliostat.cli, heliostat.experiment, heliostat.state, heliostat.cluster, heliostat.doctor\n"
        "heavy = {'torch', 'ray', 'mlflow', 'transformers', 'deepspeed', 'peft', 'datasets', 'numpy', 'pyarrow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_module_changes_where_python_looks() -> None:
    """`sys.path` edits in a driver do not reach workers on other machines, so nothing may rely on them."""
    edits = [
        f"{file.name}:{node.lineno}"
        for file in FILES
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"
    ]
    assert edits == []
