"""Packing: nothing lost, nothing too long, and the same losses as one document a row, in real models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithFlattening, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from heliostat.data import packing
from heliostat.data.packing import PackedDataset, PackedRow, collate, pack
from heliostat.data.tokens import Counts, Encoded, TokenDataset
from heliostat.errors import DataError
from heliostat.tasks import IGNORED

VOCABULARY = 97
PAD = 0


def make_tokens(lengths: list[int], folder: Path, *, learned: float = 0.6) -> TokenDataset:
    random = np.random.default_rng(0)
    total = sum(lengths)
    ids = random.integers(1, VOCABULARY, total, dtype=np.int32)
    mask = random.random(total) < learned
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    counts = Counts(len(lengths), len(lengths), total, int(mask.sum()), 0, 0)
    Encoded(ids, mask, offsets, counts).save(folder, "train")
    return TokenDataset.open(folder)


@pytest.mark.parametrize("low", [1, 5, 200])
@pytest.mark.parametrize("max_length", [300, 512])
def test_every_document_is_in_one_row_and_no_row_is_too_long(low: int, max_length: int) -> None:
    lengths = np.random.default_rng(low).integers(low, 301, 5000)
    rows = pack(lengths, max_length)
    assert sorted(index for row in rows for index in row) == list(range(5000))
    assert max(lengths[row].sum() for row in rows) <= max_length
    assert pack(lengths, max_length) == rows


def test_twenty_thousand_short_documents_fill_their_rows() -> None:
    lengths = np.random.default_rng(0).integers(5, 301, 20_000)
    rows = pack(lengths, 512)
    assert lengths.sum() / (len(rows) * 512) >= 0.99


def test_windows_are_packed_by_themselves_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = make_tokens(np.random.default_rng(0).integers(2, 17, 200).tolist(), tmp_path / "t")
    monkeypatch.setattr(packing, "WINDOW", 64)
    data = PackedDataset(tokens, 16)
    rows = [data.documents(index) for index in range(len(data))]
    assert sorted(np.concatenate(rows).tolist()) == list(range(200))
    assert all(row.min() // 64 == row.max() // 64 for row in rows)
    opened = PackedDataset.open(tmp_path / "t", 16, packing=True)
    monkeypatch.setattr(packing, "pack", None)
    for again in (opened, PackedDataset.open(tmp_path / "t", 16, packing=True)):
        assert [again.documents(index).tolist() for index in range(len(again))] == [row.tolist() for row in rows]
        for counts in ("num_tokens", "num_label_tokens"):
            assert np.array_equal(getattr(again, counts)(slice(None)), getattr(data, counts)(slice(None)))
    assert [path.name for path in (tmp_path / "t").glob("packed*")] == ["packed-16"]
    (tmp_path / "t" / "packed-16" / "offsets.npy").unlink()
    with pytest.raises(DataError, match=r"packed-16: cannot be read as packed data"):
        PackedDataset.open(tmp_path / "t", 16, packing=True)


def test_best_fit_takes_the_row_with_the_least_room_that_suffices() -> None:
    # 7 and 6 leave 3 and 4: the 3 would fit both, and goes where nothing is left over.
    assert pack(np.array([6, 7, 3]), 10) == [[1, 2], [0]]
    assert pack(np.array([10, 10]), 10) == [[0], [1]]


@pytest.mark.parametrize("packing", [True, False])
def test_rows_hold_their_documents_unchanged(tmp_path: Path, packing: bool) -> None:
    lengths = [7, 3, 12, 1, 5, 9, 2, 16]
    tokens = make_tokens(lengths, tmp_path / "t")
    data = PackedDataset(tokens, 16, packing=packing)
    assert len(data) == (4 if packing else 8)
    assert data.fill == sum(lengths) / (len(data) * 16)
    labels = []
    for index in range(len(data)):
        row = data.row(index)
        documents = [tokens.document(document) for document in data.documents(index)]
        assert row.input_ids.tolist() == [token for ids, _ in documents for token in ids]
        assert row.position_ids.tolist() == [place for ids, _ in documents for place in range(len(ids))]
        assert row.document_lengths.tolist() == [len(ids) for ids, _ in documents]
        expected = [
            int(token) if learn and place else IGNORED
            for ids, mask in documents
            for place, (token, learn) in enumerate(zip(ids, mask, strict=True))
        ]
        assert row.labels.tolist() == expected
        labels.append(sum(label != IGNORED for label in expected))
        assert data.num_label_tokens(index) == labels[-1]
        assert data.num_tokens(index) == len(row.input_ids)
    assert data.num_label_tokens(np.arange(len(data))).tolist() == labels
    assert data.num_label_tokens(slice(None)).tolist() == labels


def test_the_flat_batch_is_that_of_transformers_collator(tmp_path: Path) -> None:
    tokens = make_tokens([7, 3, 12, 1, 5], tmp_path / "t")
    data = PackedDataset(tokens, 16)
    rows = [data.row(index) for index in range(len(data))]
    ours = collate(rows, PAD, flatten=True)
    order = [document for index in range(len(data)) for document in data.documents(index)]
    documents = [tokens.document(index) for index in order]
    features = [{"input_ids": ids.tolist(), "labels": np.where(mask, ids, IGNORED).tolist()} for ids, mask in documents]
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")(features)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, theirs[name]), name
            assert value.dtype == theirs[name].dtype, name
        else:
            assert value == theirs[name], name


def test_padding_is_a_document_of_its_own_without_labels(tmp_path: Path) -> None:
    data = PackedDataset(make_tokens([9, 4], tmp_path / "t"), 9)
    batch = collate([data.row(0), data.row(1)], PAD, flatten=False)
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert tensors["input_ids"].shape == (2, 9)
    assert tensors["input_ids"][1, 4:].tolist() == [PAD] * 5
    assert tensors["labels"][1, 4:].tolist() == [IGNORED] * 5
    assert tensors["position_ids"][1].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]


def tiny_model(family: str, attention: str) -> Any:
    torch.manual_seed(0)
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=4,
            attn_pdrop=0,
            embd_pdrop=0,
            resid_pdrop=0,
        )
        config._attn_implementation = attention
        return GPT2LMHeadModel(config).train()
    llama = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    llama._attn_implementation = attention
    return LlamaForCausalLM(llama).train()


def loss_of(model: Any, rows: list[PackedRow], num_items: int) -> torch.Tensor:
    batch = collate(rows, PAD, flatten=False)
    loss: torch.Tensor = model(**batch, use_cache=False, num_items_in_batch=num_items).loss
    return loss


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_packed_and_unpacked_losses_and_gradients_agree(tmp_path: Path, family: str, attention: str) -> None:
    tokens = make_tokens([7, 3, 12, 1, 5, 30, 9, 2, 16, 22, 31, 4], tmp_path / "t")
    packed, alone = PackedDataset(tokens, 48), PackedDataset(tokens, 48, packing=False)
    assert len(packed) < len(alone)
    num_items = int(packed.num_label_tokens(slice(None)).sum())
    model = tiny_model(family, attention)

    together = loss_of(model, [packed.row(index) for index in range(len(packed))], num_items)
    together.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    single = [loss_of(model, [alone.row(index)], num_items) for index in range(len(alone))]
    torch.stack(single).sum().backward()  # type: ignore[no-untyped-call]

    torch.testing.assert_close(together, torch.stack(single).sum(), rtol=1e-5, atol=0)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
