"""Another layout of weights changes how fast a model is, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from heliostat.models import base
from heliostat.serving import linears
from tests import tiny


@pytest.fixture(params=list(tiny.KEYS))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return base.load_for_inference(str(tiny.write_model(tmp_path, request.param))).model


@pytest.mark.parametrize("rows", [1, 2, 16, 64, 65, 200])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_a_packed_layer_gives_what_the_layer_gives(rows: int, dtype: torch.dtype, precision: float) -> None:
    layer = nn.Linear(48, 80, dtype=dtype)
    inputs = torch.randn(1, rows, 48, dtype=dtype)
    # Sums are of terms near 1, so what rounding leaves of one near 0 is as large: which bits, depends on the CPU.
    with torch.no_grad():
        torch.testing.assert_close(linears.PackedLinear(layer)(inputs), layer(inputs), rtol=precision, atol=precision)


def test_logits_stay_the_same(model: Any) -> None:
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        before = model(ids).logits
        linears.arrange(model)
        torch.testing.assert_close(model(ids).logits, before)


def test_weights_keep_their_values_and_stay_tied(model: Any) -> None:
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    linears.arrange(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight is head.weight) == model.config.tie_word_embeddings
    assert embedding.weight.is_contiguous()


def test_arranging_twice_changes_nothing(model: Any) -> None:
    linears.arrange(model)
    head = model.get_output_embeddings()
    assert isinstance(head, linears.PackedLinear)
    linears.arrange(model)
    assert model.get_output_embeddings() is head


def test_other_types_of_numbers_are_left_alone(model: Any) -> None:
    model.to(torch.float16)
    linears.arrange(model)
    assert isinstance(model.get_output_embeddings(), nn.Linear)
