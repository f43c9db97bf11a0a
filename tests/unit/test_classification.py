"""A classifier's way from rows to scores: labels, documents, loss, training, bundle, evaluation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from pydantic import ValidationError
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from heliostat.data import audit, audit_view, formats
from heliostat.data.audit import Span
from heliostat.data.config import DataConfig
from heliostat.data.contents import contents
from heliostat.data.packing import PackedDataset
from heliostat.data.records import Row
from heliostat.data.tokens import TokenDataset, encode
from heliostat.errors import ConfigError, DataError, ModelError
from heliostat.evaluation import evaluator
from heliostat.evaluation.classification import Confusion
from heliostat.evaluation.config import EvaluationConfig
from heliostat.evaluation.evaluator import Local
from heliostat.experiment import ExperimentConfig
from heliostat.models import base, bundle
from heliostat.models.config import AdapterConfig
from heliostat.registry import figures
from heliostat.training import bundling, objectives, setup
from heliostat.training.config import TrainingConfig
from heliostat.training.spec import WorkerSpec
from heliostat.training.worker import LocalSession, Worker
from heliostat.tuning import decoding_plan
from tests import tiny

LABELS = tiny.LABELS
DATA = DataConfig(format="classification", labels=list(LABELS), max_length=64)
ROWS = [Row({"text": text, "label": text.split()[2]}, f"file:{line}") for line, text in enumerate(tiny.TEXTS, 1)]
STEPS = 3


def dataset(rows: list[Row] = ROWS, data: DataConfig = DATA) -> TokenDataset:
    made = encode(rows, tiny.tokenizer(), data)
    return TokenDataset(made.input_ids, made.loss_mask, made.offsets, {})


# ---- rows and documents


def test_labels_are_read_from_the_rows_or_given() -> None:
    free = DataConfig(format="classification")
    assert formats.label_names(ROWS[::-1], free) == LABELS
    assert formats.label_names(ROWS, DATA.model_copy(update={"labels": ["man", "cat", "dog"]})) == ("man", "cat", "dog")
    assert formats.label_names(ROWS, DataConfig(format="text")) == ()
    with pytest.raises(DataError, match=r"all rows have the label `cat`"):
        formats.label_names(ROWS[:1], free)
    with pytest.raises(DataError, match=r"file:1: the label `cat` is none of `dog`, `man`.*data\.labels"):
        encode(ROWS, tiny.tokenizer(), DataConfig(format="classification", labels=["dog", "man"]))
    with pytest.raises(DataError, match="f:7: the text is empty"):
        encode([Row({"text": " ", "label": "cat"}, "f:7")], tiny.tokenizer(), DATA)


def test_the_only_learned_token_is_the_number_of_the_label() -> None:
    tokens, tokenizer = dataset(), tiny.tokenizer()
    for index, row in enumerate(ROWS):
        ids, mask = tokens.document(index)
        assert ids[:-1].tolist() == tokenizer(row.fields["text"])["input_ids"]
        assert LABELS[ids[-1]] == row.fields["label"]
        assert mask.tolist() == [False] * (len(ids) - 1) + [True]


def test_a_text_that_is_cut_keeps_its_label() -> None:
    cut = DATA.model_copy(update={"max_length": 5, "excess_length_strategy": "truncate"})
    whole, short = dataset(), dataset(data=cut)
    for index in range(len(whole)):
        long_ids, ids = whole.document(index)[0], short.document(index)[0]
        assert ids.tolist() == [*long_ids[:4], long_ids[-1]]
        assert short.document(index)[1].sum() == 1
    with pytest.raises(DataError, match=r"file:1: its \d+ tokens exceed data.max_length: 5"):
        dataset(data=DATA.model_copy(update={"max_length": 5}))


def test_a_template_builds_the_text() -> None:
    data = DataConfig(format="classification", prompt_template="{label}? {text}", labels=list(LABELS))
    assert formats.prompt_of(ROWS[0], data, None) == (f"cat? {ROWS[0].fields['text']}", "cat")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"format": "classification", "packing": True}, "`packing` does not go with"),
        ({"format": "classification", "train_on_inputs": True}, "whose inputs are only read"),
        ({"format": "classification", "labels": ["a", "a"]}, "a label twice"),
        ({"format": "classification", "completion_template": "{x}"}, "completion_template belongs"),
        ({"format": "text", "labels": ["a", "b"]}, "`labels` belongs to"),
    ],
)
def test_settings_that_do_not_fit_the_task_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DataConfig.model_validate(keys)


def test_packing_is_off_and_stays_so_when_the_configuration_is_read_again() -> None:
    made = DataConfig(format="classification")
    assert not made.packing
    assert DataConfig.model_validate(made.model_dump()) == made
    assert DataConfig().packing


def test_the_audit_shows_texts_and_labels() -> None:
    made = encode(ROWS, tiny.tokenizer(), DATA)
    meta = {"split": "train", "rows": len(ROWS), "documents": len(ROWS), "tokens": 1, "supervised_tokens": len(ROWS)}
    tokens = TokenDataset(made.input_ids, made.loss_mask, made.offsets, {**meta, "truncated": 0, "dropped": 0})
    packed = PackedDataset(tokens, DATA.max_length, packing=False)
    report = audit.audit({"train": contents(ROWS, DATA)}, {"train": packed}, tiny.tokenizer(), DATA)
    assert report.splits["train"].labels == {"cat": 36, "dog": 36, "man": 36}
    assert report.splits["train"].eos_learned is None
    assert report.samples[0].spans == [Span(ROWS[0].fields["text"], False), Span("cat", True)]
    assert not report.failures
    assert "EOS" not in audit_view.text(report)


# ---- loss


def test_the_loss_does_not_depend_on_how_the_batch_is_cut(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny.write_classifier(tmp_path / "m", "llama")).eval()
    packed = PackedDataset(dataset(ROWS[:6]), 64, packing=False)
    rows = [packed.row(index) for index in range(6)]
    weights = (0.5, 2.0, 1.0)
    objective = objectives.build("classification", pad_token_id=1, class_weights=weights)

    def loss(*parts: list[Any]) -> float:
        return sum(float(objective.loss(model, objective.batch(part, flatten=False), 6)) for part in parts)

    logits = [model(torch.from_numpy(row.input_ids[None, :-1])).logits[0] for row in rows]
    each = [functional.cross_entropy(one, torch.tensor(row.labels[-1])) for one, row in zip(logits, rows, strict=True)]
    expected = sum(weights[row.labels[-1]] * float(one) for one, row in zip(each, rows, strict=True)) / 6
    assert loss(rows) == pytest.approx(expected, rel=1e-5)
    assert loss(rows[:1], rows[1:3], rows[3:]) == pytest.approx(expected, rel=1e-5)


def test_class_weights() -> None:
    tokens = dataset([*ROWS[:4], ROWS[12], *ROWS[24:27]])  # 4 cats, 1 dog, 3 men
    found = setup.class_weights("balanced", LABELS, tokens)
    assert found == pytest.approx((8 / 12, 8 / 3, 8 / 9))
    assert setup.class_weights({"dog": 3.0}, LABELS, tokens) == (1.0, 3.0, 1.0)
    assert setup.class_weights(None, LABELS, tokens) is None
    with pytest.raises(ConfigError, match="there is no label `cow`"):
        setup.class_weights({"cow": 3.0}, LABELS, tokens)
    with pytest.raises(ConfigError, match="no training row has the label `dog`"):
        setup.class_weights("balanced", LABELS, dataset(ROWS[:4]))


# ---- training and bundle


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model without dropout, and tokens to train and validate with."""
    root = tmp_path_factory.mktemp(request.param)
    tiny.write_model(root / "model", request.param, **tiny.NO_DROPOUT[request.param])
    for name, rows in (("train", ROWS[:60]), ("validation", ROWS[60:71])):
        encode(rows, tiny.tokenizer(), DATA).save(root / name, name)
    return root


def train(folder: Path, run: Path, method: str = "full", **settings: Any) -> list[float]:
    """Train in this process; the losses of the steps and of the validation."""
    run.mkdir()
    values = {"num_workers": 0, "per_device_train_batch_size": 4, "learning_rate": 3e-3, **settings}
    spec = WorkerSpec(
        run_folder=str(run),
        attempt="attempt-01",
        model=str(folder / "model"),
        revision=None,
        from_scratch=False,
        attention=None,
        adapter=AdapterConfig.model_validate({"method": method, "lora_r": 4}),
        training=TrainingConfig.model_validate(values),
        train_tokens=str(folder / "train"),
        validation_tokens=str(folder / "validation"),
        max_length=64,
        packing=False,
        pad_token_id=1,
        total_steps=STEPS,
        eval_steps=STEPS,
        save_steps=STEPS,
        export_all=False,
        seed=3,
        task="classification",
        labels=LABELS,
        class_weights=(1.0, 2.0, 1.0),
    )
    with LocalSession() as session:
        Worker(spec, session).run()
    rows = [json.loads(line)["metrics"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for name in ("loss", "eval_loss") for row in rows if name in row]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_neither_micro_batches_nor_zero_change_the_losses(folder: Path, tmp_path: Path, method: str) -> None:
    plain = train(folder, tmp_path / "plain", method)
    assert len(plain) == STEPS + 2
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "per_device_eval_batch_size": 3}
    assert train(folder, tmp_path / "cut", method, **cut) == pytest.approx(plain, rel=1e-4)
    assert train(folder, tmp_path / "zero3", method, deepspeed="zero3") == pytest.approx(plain, rel=1e-4)


def experiment(folder: Path, adapter: dict[str, Any]) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "name": "x",
            "model": {"model_name_or_path": str(folder / "model")},
            "data": {"format": "classification", "train": "x.tsv"},
            "adapter": adapter,
        }
    )


def test_class_weights_need_labels(folder: Path) -> None:
    config = experiment(folder, {})
    weighed = config.training.model_copy(update={"class_weights": "balanced"})
    setup.check(config.model_copy(update={"training": weighed}))
    text = config.model_copy(update={"training": weighed, "data": DataConfig(format="text", train="x")})
    with pytest.raises(ConfigError, match=r"class_weights needs data\.format=classification, not text"):
        setup.check(text)


def test_a_decoding_search_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="a classifier has no decoding"):
        decoding_plan.prepare(experiment(folder, {}), "somewhere")


@pytest.mark.parametrize(
    "adapter",
    [{"method": "full"}, {"method": "lora"}, {"method": "lora", "merge": True}],
    ids=["full", "lora", "merged"],
)
def test_the_bundle_works_with_and_without_heliostat(folder: Path, tmp_path: Path, adapter: dict[str, Any]) -> None:
    run = tmp_path / "run"
    train(folder, run, adapter["method"])
    tokenizer = base.load_tokenizer(str(folder / "model"))
    source = setup.Source(str(folder / "model"), False, tokenizer, LABELS)
    made = bundling.write(experiment(folder, adapter), run, source, folder / "train", {})
    manifest = bundle.verify(made)
    assert (manifest["task"], manifest["labels"]) == ("classification", list(LABELS))
    assert not (made / "generation_config.json").exists()

    ids = torch.tensor([tokenizer(ROWS[0].fields["text"])["input_ids"]])
    loaded = base.load_for_inference(str(made))
    assert (loaded.task, loaded.labels) == ("classification", LABELS)
    if adapter == {"method": "lora"}:
        # The labels are in the manifest: a config.json would make transformers take the folder for a whole model.
        plain = AutoPeftModelForSequenceClassification.from_pretrained(made, num_labels=3).eval()
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(made).eval()
        assert plain.config.id2label == dict(enumerate(LABELS))
    torch.testing.assert_close(loaded.model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_classifier_is_not_trained_or_used_as_a_language_model(tmp_path: Path) -> None:
    made = tiny.write_classifier(tmp_path / "m", "gpt2")
    config = ExperimentConfig.model_validate(
        {"name": "x", "model": {"model_name_or_path": str(made)}, "data": {"format": "text", "train": "x.txt"}}
    )
    with pytest.raises(ConfigError, match=r"is a classifier, which data.format=text does not train"):
        setup.load_source(config, [], tmp_path / "init")
    with pytest.raises(ModelError, match=r"is a classifier .*, and a language model is needed here"):
        evaluator.predict(base.load_for_inference(str(made)), [], DataConfig(), None, batch_size=1)
    language_model = base.load_for_inference(str(tiny.write_model(tmp_path / "lm", "gpt2")))
    with pytest.raises(ModelError, match="is a language model, and a classifier"):
        evaluator.predict(language_model, ROWS[:1], DATA, None, batch_size=1)


# ---- evaluation


@pytest.mark.parametrize("batch_size", [1, 5])
def test_scores_are_those_of_the_models_own_probabilities(tmp_path: Path, batch_size: int) -> None:
    loaded = base.load_for_inference(str(tiny.write_classifier(tmp_path / "m", "llama")))
    rows, free = ROWS[::7], DataConfig(format="classification", max_length=64)
    scores = evaluator.evaluate(Local(loaded), rows, free, None, EvaluationConfig(batch_size=batch_size))
    with torch.inference_mode():
        ids = [torch.tensor([loaded.tokenizer(row.fields["text"])["input_ids"]]) for row in rows]
        expected = torch.cat([loaded.model(one).logits for one in ids]).softmax(-1).numpy()
    truth = np.array([LABELS.index(row.fields["label"]) for row in rows])
    found = np.array([[example.probabilities[label] for label in LABELS] for example in scores.examples])  # type: ignore[index]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert scores.metrics["loss"] == pytest.approx(-np.log(expected[range(len(rows)), truth]).mean(), rel=1e-4)
    assert scores.metrics["accuracy"] == pytest.approx((expected.argmax(-1) == truth).mean())
    assert {"accuracy", "macro_f1"} <= scores.intervals.keys()
    assert scores.confusion is not None
    counts = np.zeros((3, 3), dtype=int)
    np.add.at(counts, (truth, expected.argmax(-1)), 1)
    assert scores.confusion.counts == counts.tolist()
    f1 = [facts["f1"] for facts in scores.confusion.per_label().values() if facts["n"] or facts["f1"]]
    assert scores.metrics["macro_f1"] == pytest.approx(sum(f1) / len(f1))


def test_precision_and_recall_of_each_label() -> None:
    found = Confusion(("a", "b"), [[3, 1], [2, 0]]).per_label()
    assert found["a"] == {"precision": 3 / 5, "recall": 3 / 4, "f1": 6 / 9, "n": 4}
    assert found["b"] == {"precision": 0, "recall": 0, "f1": 0, "n": 2}


def test_the_figure_has_the_numbers_and_labels() -> None:
    (axes, _) = figures.confusion_matrix(("ham", "spam"), [[5, 1], [0, 4]], "t").axes
    assert [text.get_text() for text in axes.texts] == ["5", "1", "0", "4"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["ham", "spam"]
    crowded = figures.confusion_matrix([str(n) for n in range(30)], np.eye(30, dtype=int).tolist())
    assert len(crowded.axes[0].texts) == 0
