"""GPUs are found by name, and their figures are of the right size."""

import pytest

from heliostat.errors import ConfigError
from heliostat.training import gpus


def test_names_are_found_in_any_case_and_others_are_told() -> None:
    assert gpus.find("h100-80gb") is gpus.find("H100-80GB")
    with pytest.raises(
        ConfigError, match=r"--gpu A100-40G: is not known; did you mean A100-40GB\? There are cpu, H200"
    ):
        gpus.find("A100-40G")
    with pytest.raises(ConfigError, match=r"--gpu abacus: is not known; There are cpu"):
        gpus.find("abacus")


def test_figures_are_bytes_and_operations_a_second() -> None:
    for name, gpu in gpus.GPUS.items():
        assert 16e9 <= gpu.memory <= 141e9, name
        assert 1e12 < gpu.flops_32 < gpu.flops_16 < 1e15, name
        _, _, size = name.partition("-")
        if size.endswith("GB"):
            assert gpu.memory == float(size[:-2]) * 1e9
