"""Tokenizers with names of languages: what is trained, generated and served is what transformers makes of them."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
)

from heliostat.data.packing import PackedDataset
from heliostat.data.prepare import tokenizer_sha256
from heliostat.data.records import Row
from heliostat.data.tokens import TokenDataset, encode
from heliostat.errors import ConfigError, ModelError
from heliostat.evaluation import evaluator
from heliostat.evaluation.config import GenerationSettings
from heliostat.experiment import ExperimentConfig
from heliostat.models import base
from heliostat.models.languages import languages_of
from heliostat.serving import parity
from heliostat.serving.config import EndpointArgs
from heliostat.serving.lane_model import LaneModel
from heliostat.serving.sampling import SamplingParams
from heliostat.training import bundling, objectives, setup
from tests import tiny

WORDS = ("▁the", "▁red", "▁cat", "▁dog", "▁goes", "▁house", "▁old", "▁man")
ROWS = [
    Row({"source": "the red cat goes", "target": "old dog"}, "rows:1"),
    Row({"source": "the house", "target": "man goes house red"}, "rows:2"),
    Row({"source": "old", "target": "the"}, "rows:3"),
]
UNIGRAM = [(word, 0.0) for word in ("<s>", "<pad>", "</s>", "<unk>")] + [(word, -1.0) for word in WORDS]
MAKERS: dict[str, tuple[str, Any, tuple[str, str]]] = {
    "mbart": ("mbart", lambda: MBartTokenizer(vocab=UNIGRAM), ("de_DE", "en_XX")),
    "mbart50": ("mbart", lambda: MBart50Tokenizer(vocab=UNIGRAM), ("de_DE", "en_XX")),
    "nllb": ("m2m_100", lambda: NllbTokenizer(vocab=_characters(), merges=[]), ("deu_Latn", "eng_Latn")),
}


def _characters() -> dict[str, int]:
    letters = sorted(set("".join(WORDS)))
    return {token: number for number, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters])}


@pytest.fixture(scope="module", params=list(MAKERS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, str]]:
    """A folder as the hub has it, and two of its languages."""
    architecture, make, languages = MAKERS[request.param]
    folder = tmp_path_factory.mktemp("languages") / "model"
    made = make()
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    keys = {**tiny.ENCODER_DECODERS["bart"], **ids, "forced_eos_token_id": None, "scale_embedding": True}
    config = AutoConfig.for_model(architecture, vocab_size=len(made), **keys)
    torch.manual_seed(0)
    tiny._save(AutoModelForSeq2SeqLM.from_config(config), made, folder)
    return folder, languages


def experiment(folder: Path, **model: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "name": "translate",
            "model": {"model_name_or_path": str(folder), **model},
            "data": {"format": "seq2seq", "train": "t.jsonl", "max_length": 64},
            "generation": {"max_new_tokens": 8},
        }
    )


def test_from_pairs_to_answers(model: tuple[Path, tuple[str, str]], tmp_path: Path) -> None:
    """The documents, the loss, the answers of the bundle and those of the endpoint."""
    folder, (src, tgt) = model
    config = experiment(folder, src_lang=src, tgt_lang=tgt)
    source = setup.load_source(config, ROWS, tmp_path / "scratch")
    theirs = AutoTokenizer.from_pretrained(folder, src_lang=src, tgt_lang=tgt)
    encoded = encode(ROWS, source.tokenizer, config.data)
    documents = TokenDataset(encoded.input_ids, encoded.loss_mask, encoded.offsets, {})
    pairs = [(theirs(row.fields["source"])["input_ids"], theirs(text_target=row.fields["target"])["input_ids"])
             for row in ROWS]  # fmt: skip
    for index, (asked, wanted) in enumerate(pairs):
        ids, mask = documents.document(index)
        assert (ids[~mask].tolist(), ids[mask].tolist()) == (asked, wanted)
    _check_loss(folder, documents, pairs)

    encoded.save(tmp_path / "tokens", "train")
    bundle = bundling.assemble(config, folder, tmp_path / "bundle", source, tmp_path / "tokens", {})
    loaded = base.load_for_inference(str(bundle))
    assert languages_of(loaded.tokenizer) == (src, tgt)
    expected = [_translated(folder, asked, wanted) for asked, wanted in pairs]
    assert any(expected)
    examples = evaluator.predict(loaded, ROWS, config.data, GenerationSettings(max_new_tokens=8), batch_size=2)
    assert [example.prediction for example in examples] == theirs.batch_decode(expected, skip_special_tokens=True)
    assert asyncio.run(_served(loaded)) == theirs.batch_decode(expected, skip_special_tokens=True)


def _check_loss(folder: Path, documents: TokenDataset, pairs: list[tuple[list[int], list[int]]]) -> None:
    """A batch of all has the loss that transformers gives for each alone."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    rows = PackedDataset(documents, 64, packing=False)
    objective = objectives.build("seq2seq", pad_token_id=1)
    with torch.inference_mode():
        batch = objective.batch([rows.row(index) for index in range(len(pairs))], flatten=False)
        got = objective.loss(model, batch, 1).item()
        alone = [
            model(input_ids=torch.tensor([asked]), labels=torch.tensor([wanted])).loss.item() * len(wanted)
            for asked, wanted in pairs
        ]
    assert got == pytest.approx(sum(alone), rel=1e-4)


def _translated(folder: Path, asked: list[int], wanted: list[int]) -> list[int]:
    """What transformers generates when an answer has to begin as the target that was trained."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    # mBART wraps the last token of a target round to its beginning; the others begin with their end token.
    begin = [wanted[-1]] if wanted[-1] != 2 else [2, wanted[0]]
    limit = {"max_new_tokens": 9 - len(begin), "do_sample": False, "num_beams": 1, "forced_eos_token_id": None}
    with torch.inference_mode():
        output = model.generate(torch.tensor([asked]), decoder_input_ids=torch.tensor([begin]), **limit)
    tokens: list[int] = output[0, len(begin) :].tolist()
    return tokens[: tokens.index(2)] if 2 in tokens else tokens


async def _served(loaded: base.InferenceModel) -> list[str]:
    served, check = await parity.start(loaded, "translate", EndpointArgs(cache_tokens=512))
    assert isinstance(served, LaneModel)
    try:
        await check()
        texts = []
        for row in ROWS:
            ids = await served.prompts.text(row.fields["source"])
            params = SamplingParams(8, extra=dict(served.defaults.extra))
            texts.append("".join([delta.text async for _, delta in served.generate(ids, params)]))
        return texts
    finally:
        served.close()


def test_a_cut_source_keeps_what_ends_it(model: tuple[Path, tuple[str, str]], tmp_path: Path) -> None:
    folder, (src, tgt) = model
    config = experiment(folder, src_lang=src, tgt_lang=tgt)
    tokenizer = setup.load_source(config, ROWS, tmp_path / "scratch").tokenizer
    long = [Row({"source": "the red cat goes old " * 20 + "man", "target": "old"}, "rows:1")]
    data = config.data.model_copy(update={"excess_length_strategy": "truncate"})
    cut = encode(long, tokenizer, data)
    asked = cut.input_ids[~cut.loss_mask].tolist()
    whole = tokenizer(long[0].fields["source"])["input_ids"]
    end = 1 if whole[-1] == 2 else 2
    assert len(cut.input_ids) == 64
    assert asked == whole[: len(asked) - end] + whole[-end:]


def test_languages_decide_the_tokens(model: tuple[Path, tuple[str, str]], tmp_path: Path) -> None:
    folder, (src, tgt) = model
    one, other = (
        setup.load_source(experiment(folder, src_lang=src, tgt_lang=name), ROWS, tmp_path / "scratch").tokenizer
        for name in (src, tgt)
    )
    assert tokenizer_sha256(one) != tokenizer_sha256(other)


def test_missing_and_unknown_languages_are_refused(model: tuple[Path, tuple[str, str]], tmp_path: Path) -> None:
    folder, (src, _) = model
    wrong = {
        r"model\.tgt_lang: the model's tokenizer wants the name of a language": {"src_lang": src},
        r"model\.src_lang: .* no language `german`": {"src_lang": "german", "tgt_lang": src},
        r"model\.tgt_lang: .* no language `</s>`": {"src_lang": src, "tgt_lang": "</s>"},
    }
    for message, given in wrong.items():
        with pytest.raises(ConfigError, match=message):
            setup.load_source(experiment(folder, **given), ROWS, tmp_path / "scratch")
    with pytest.raises(ModelError, match="names no src_lang and tgt_lang"):
        base.load_for_inference(str(folder))


def test_other_models_have_no_languages(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", "bart")
    with pytest.raises(ConfigError, match=r"model\.src_lang: de_DE: the model's tokenizer has no languages"):
        setup.load_source(experiment(folder, src_lang="de_DE"), ROWS, tmp_path / "scratch")
    with pytest.raises(ValueError, match="a new tokenizer has no languages"):
        ExperimentConfig.model_validate(
            {"name": "x", "model": {"scratch": {}, "src_lang": "de_DE"}, "data": {"train": "t.txt"}}
        )
