"""The precision benchmark tells perplexities and agreement as they are."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks import precision
from heliostat.models import base
from tests import tiny


def test_quality_compares_two_models_token_by_token(tmp_path: Path) -> None:
    folder = str(tiny.write_model(tmp_path, "llama"))
    exact, half = (base.load_for_inference(folder, dtype=dtype).model for dtype in ("float32", "bfloat16"))
    ids = torch.arange(2, 130).view(4, 32)
    same = precision.quality(exact, exact, ids)
    losses = [float(exact(input_ids=window[None], labels=window[None]).loss) for window in ids]
    expected = math.exp(sum(losses) / len(losses))
    assert same["perplexity_float32"] == same["perplexity_bfloat16"] == pytest.approx(expected, rel=1e-5)
    assert same["same_likeliest_token"] == 1
    other = precision.quality(exact, half, ids)
    assert other["perplexity_bfloat16"] != other["perplexity_float32"]
    assert 0.8 < other["same_likeliest_token"] <= 1
