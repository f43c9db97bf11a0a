"""What the training benchmark measures, one job a process: `python -m benchmarks.contenders JOB FOLDER`.

The folder holds `settings.json` and, once `prepare` has run, tokens and the config of a new model. A job prints one
JSON object as its last line. Imports are inside the jobs: a process must hold only what its own job needs.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heliostat.data.config import DataConfig
    from heliostat.experiment import ExperimentConfig
    from heliostat.models.config import ScratchConfig
    from heliostat.training.config import TrainingConfig
    from heliostat.training.spec import WorkerSpec

SEED = 0
MAX_LENGTH = 512
PADDED_LENGTH = 384
QUICKSTART_STEPS = 5


@dataclass(frozen=True)
class Settings:
    """The size of the benchmark; the same for all contenders."""

    data: str
    """Alpaca JSON file."""
    n_layer: int
    n_embd: int
    vocab_size: int
    batch: int
    """Packed sequences a step; the padded contender gets as many positions."""
    steps: int
    """Measured steps of the packed contenders; the padded one goes on until it has seen as many real tokens."""
    warmup: int
    """Steps before those, not measured."""
    threads: int

    def save(self, folder: Path) -> None:
        """Write what `load` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> "Settings":
        """Read the settings that `save` wrote."""
        return cls(**json.loads((folder / "settings.json").read_text()))


@dataclass(frozen=True)
class Measurement:
    """One run of one contender, without its warm-up."""

    tokens: int
    """Real tokens, padding not counted."""
    seconds: float
    cpu_seconds: float
    """User and system time of the process: disturbed less than `seconds` by other load on the machine."""
    loss: float
    """Training loss of the last step, a mean over its learned tokens."""
    peak_rss_mib: float


class Clock:
    """Notes the time at the end of every optimizer step."""

    def __init__(self, warmup: int) -> None:
        self._warmup = warmup
        self._ticks: list[tuple[float, float]] = []

    def tick(self) -> None:
        """A step has ended."""
        self._ticks.append((time.perf_counter(), time.process_time()))

    def measurement(self, tokens_per_step: list[int], loss: float) -> Measurement:
        """From the end of the warm-up to the last tick."""
        (start, cpu_start), (end, cpu_end) = self._ticks[self._warmup - 1], self._ticks[-1]
        tokens = sum(tokens_per_step[self._warmup : len(self._ticks)])
        return Measurement(tokens, end - start, cpu_end - cpu_start, loss, peak_rss_mib())


def peak_rss_mib() -> float:
    """The most memory that this process held at once. Linux counts in KiB (getrusage(2))."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alpaca_data(settings: Settings) -> "DataConfig":
    """How the benchmark reads its file."""
    from heliostat.data.config import DataConfig

    return DataConfig(train=settings.data, format="alpaca", max_length=MAX_LENGTH, excess_length_strategy="truncate")


def quickstart_config(folder: Path) -> "ExperimentConfig":
    """The quickstart's own configuration, on the data in `folder`, with one worker."""
    from heliostat import experiment, quickstart

    yaml = Path(quickstart.__file__).parent / "train.yaml"
    return experiment.load(yaml, [f"data.train={folder / 'train.jsonl'}", "training.num_workers=0"])


def prepare(folder: Path) -> dict[str, float]:
    """Make tokens and a new model's config, for the contenders and for the quickstart's worker."""
    from heliostat.models.config import ScratchConfig
    from heliostat.quickstart import schedules

    settings = Settings.load(folder)
    keys = {
        "n_layer": settings.n_layer,
        "n_embd": settings.n_embd,
        "n_head": max(1, settings.n_embd // 64),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }
    facts = _prepare(folder, alpaca_data(settings), ScratchConfig(vocab_size=settings.vocab_size, config=keys))
    schedules.write(folder / "quickstart")
    config = quickstart_config(folder / "quickstart")
    assert config.model.scratch is not None
    _prepare(folder / "quickstart", config.data, config.model.scratch)
    return facts


def _prepare(folder: Path, data: "DataConfig", new: "ScratchConfig") -> dict[str, float]:
    from heliostat.data import formats, packing, records, tokens
    from heliostat.models import scratch

    assert isinstance(data.train, str)
    rows = records.read(data.train)
    texts = [segment.text for row in rows for segment in formats.to_segments(row, data, None)]
    tokenizer = scratch.train_tokenizer(texts, new.vocab_size, data.max_length, chat=False)
    scratch.write(folder / "model", tokenizer, new.model_type, new.config, data.max_length)
    tokens.encode(rows, tokenizer, data).save(folder / "tokens", "train")
    dataset = tokens.TokenDataset.open(folder / "tokens")
    return {
        "documents": len(dataset),
        "learned": dataset.meta["supervised_tokens"] / dataset.meta["tokens"],
        "packed_fill": packing.PackedDataset(dataset, data.max_length).fill,
        "padded_fill": float(dataset.lengths.clip(max=PADDED_LENGTH).mean()) / PADDED_LENGTH,
    }


def imports(folder: Path) -> dict[str, float]:
    """Memory of a process that has only imported what a training worker needs."""
    import heliostat.training.worker  # noqa: F401

    return {"peak_rss_mib": peak_rss_mib()}


def quickstart(folder: Path) -> dict[str, float]:
    """Peak memory of a training worker on the quickstart's model and data, its export included."""
    from heliostat.training.worker import LocalSession, Worker

    root = folder / "quickstart"
    config = quickstart_config(root)
    spec = _spec(root, config.training, config.data.max_length, QUICKSTART_STEPS)
    with LocalSession() as session:
        Worker(spec, session).run()
    return {"peak_rss_mib": peak_rss_mib()}


def ours(folder: Path) -> Measurement:
    """Heliostat's worker: DeepSpeed, packed rows, checkpoint and metrics journal."""
    from heliostat.training import order
    from heliostat.training.worker import LocalSession, Worker

    settings = Settings.load(folder)
    clock = Clock(settings.warmup)

    class TimedWorker(Worker):
        def _step(self) -> None:
            super()._step()
            clock.tick()

    training, steps = _training(settings), settings.warmup + settings.steps
    spec = _spec(folder, training, MAX_LENGTH, steps)
    with LocalSession() as session:
        worker = TimedWorker(spec, session)
        worker.run()
    rows = worker.train_rows
    tokens = [
        int(rows.num_tokens(order.global_batch(step, settings.batch, len(rows), SEED)).sum()) for step in range(steps)
    ]
    journal = (Path(spec.run_folder) / "metrics.jsonl").read_text().splitlines()
    return clock.measurement(tokens, json.loads(journal[-1])["metrics"]["loss"])


def _training(settings: Settings) -> "TrainingConfig":
    from heliostat.training.config import TrainingConfig

    return TrainingConfig(num_workers=0, per_device_train_batch_size=settings.batch, load_best_model_at_end=False)


def _spec(folder: Path, training: "TrainingConfig", max_length: int, steps: int) -> "WorkerSpec":
    from heliostat.models.base import load_tokenizer
    from heliostat.models.config import AdapterConfig
    from heliostat.training.spec import WorkerSpec

    run = folder / f"run-{time.time_ns()}"
    run.mkdir()
    return WorkerSpec(
        run_folder=str(run),
        attempt="attempt-01",
        model=str(folder / "model"),
        revision=None,
        from_scratch=True,
        attention="sdpa",
        adapter=AdapterConfig(),
        training=training,
        train_tokens=str(folder / "tokens"),
        validation_tokens=None,
        max_length=max_length,
        packing=True,
        pad_token_id=load_tokenizer(str(folder / "model")).pad_token_id,
        total_steps=steps,
        eval_steps=steps,
        save_steps=steps,
        export_all=False,
        seed=SEED,
    )


def plain(folder: Path) -> Measurement:
    """A short PyTorch loop over the same packed batches: the model's own loss, AdamW, clipping, the same schedule."""
    import torch
    from transformers import get_scheduler

    from heliostat.data.packing import PackedDataset, collate
    from heliostat.data.tokens import TokenDataset
    from heliostat.models import base
    from heliostat.training import order

    settings = Settings.load(folder)
    training, steps = _training(settings), settings.warmup + settings.steps
    model = base.new_model(str(folder / "model"), seed=SEED, dtype=torch.float32, attention="sdpa")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
    )
    scheduler = get_scheduler(
        training.lr_scheduler_type, optimizer, round(training.warmup_ratio * steps), num_training_steps=steps
    )
    rows = PackedDataset(TokenDataset.open(folder / "tokens"), MAX_LENGTH)
    clock, tokens, losses = Clock(settings.warmup), [], []
    for step in range(steps):
        indices = order.global_batch(step, settings.batch, len(rows), SEED)
        batch = collate([rows.row(i) for i in indices], model.config.pad_token_id, flatten=False)
        learned = torch.tensor(int(rows.num_label_tokens(indices).sum()))
        loss = model(**batch, use_cache=False, num_items_in_batch=learned).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        tokens.append(int(rows.num_tokens(indices).sum()))
        losses.append(loss.item())
        clock.tick()
    return clock.measurement(tokens, losses[-1])


def padded(folder: Path) -> Measurement:
    """The Hugging Face Trainer as tutorials use it: one document a row, every row padded to 384 tokens."""
    import torch
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

    from heliostat.models import base

    settings = Settings.load(folder)
    clock, tokens = Clock(settings.warmup), []
    tokenizer = base.load_tokenizer(str(folder / "model"))
    pad = DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def collate(rows: list[Any]) -> Any:
        batch = pad(rows)
        tokens.append(int(batch["attention_mask"].sum()))
        return batch

    class Ticks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    training = _training(settings)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=settings.batch * MAX_LENGTH // PADDED_LENGTH,
        max_steps=_padded_steps(settings, json.loads((folder / "facts.json").read_text())),
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_ratio,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
    )
    trainer = Trainer(
        base.new_model(str(folder / "model"), seed=SEED, dtype=torch.float32, attention="sdpa"),
        arguments,
        data_collator=collate,
        train_dataset=list(_padded_rows(settings, tokenizer)),
        callbacks=[Ticks()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return clock.measurement(tokens, losses[-1])


def _padded_steps(settings: Settings, facts: dict[str, float]) -> int:
    """Steps by which the padded contender has seen as many real tokens as the packed ones."""
    return settings.warmup + round(settings.steps * facts["packed_fill"] / facts["padded_fill"])


def _padded_rows(settings: Settings, tokenizer: Any) -> Iterator[dict[str, Any]]:
    from heliostat.data import formats, records

    data = alpaca_data(settings)
    for row in records.read(settings.data):
        text = "".join(segment.text for segment in formats.to_segments(row, data, None)) + tokenizer.eos_token
        yield dict(tokenizer(text, padding="max_length", truncation=True, max_length=PADDED_LENGTH))


JOBS: dict[str, Callable[[Path], Any]] = {
    job.__name__: job for job in (prepare, imports, quickstart, ours, plain, padded)
}


def main() -> None:
    """Run the job of this process."""
    name, folder = sys.argv[1:]
    result = JOBS[name](Path(folder))
    print(json.dumps(asdict(result) if isinstance(result, Measurement) else result))


if __name__ == "__main__":
    main()
