"""What starts fast and stays small: what answers HTTP imports no library of models, and no command PEFT for nothing."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["gateway", "endpoint", "rollout", "replica", "sampling", "api"])
def test_no_library_of_models_is_imported(module: str) -> None:
    assert imported(f"heliostat.serving.{module}", "torch", "transformers", "peft") == "[]"


@pytest.mark.parametrize("module", ["training.trainer", "evaluation.evaluator", "serving.served"])
def test_what_may_have_no_adapter_does_not_import_peft(module: str) -> None:
    assert imported(f"heliostat.{module}", "peft") == "[]"


def imported(module: str, *libraries: str) -> str:
    """Those of the libraries that come with the module."""
    code = f"import sys, {module}; print(sorted({set(libraries)} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()
