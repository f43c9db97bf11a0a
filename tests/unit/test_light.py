"""What answers HTTP and what directs rollouts start fast and stay small: they import none of the models' libraries."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["gateway", "endpoint", "rollout", "replica", "sampling", "api"])
def test_no_library_of_models_is_imported(module: str) -> None:
    code = (
        f"import sys, heliostat.serving.{module}; print(sorted({{'torch', 'transformers', 'peft'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
