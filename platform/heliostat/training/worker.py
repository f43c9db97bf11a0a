"""Everything that runs on one training worker: build the engine, step, evaluate, checkpoint, export the weights.

It knows its rank and its peers only through a `Session`, so the same loop runs under Ray Train, or in one process
without Ray.
"""

import contextlib
import math
import os
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from heliostat import journal
from heliostat.data.packing import PackedDataset, unlearned
from heliostat.models import adapters, base, freezing, quantised
from heliostat.training import agreement, engine, objectives, order, shards, zero
from heliostat.training.saving import Saver
from heliostat.training.spec import WorkerSpec


class Session(Protocol):
    """A worker's view of its group."""

    rank: int
    world_size: int
    device: torch.device

    def report(self, folder: Path, metrics: dict[str, float]) -> None:
        """Called by all workers once the checkpoint in `folder` is written."""

    def asks_for_notices(self) -> bool:
        """Whether it is time to call `leaving`; worker 0's answer counts for all."""

    def leaving(self) -> frozenset[str]:
        """Machines of the group that will soon be taken away. All workers must call it together."""

    def move(self) -> None:
        """Called by all workers once they have saved because machines leave: they may be ended here, and go on anew."""


class LocalSession:
    """A group of one: this process, without Ray."""

    rank = 0
    world_size = 1
    # DeepSpeed insists on a launcher's variables.
    _ENVIRONMENT: ClassVar = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def __enter__(self) -> Self:
        os.environ.update(self._ENVIRONMENT)
        # Made once in a process: DeepSpeed holds on to it.
        if not dist.is_initialized():
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._ENVIRONMENT:
            os.environ.pop(name, None)

    def report(self, folder: Path, metrics: dict[str, float]) -> None:
        """Nobody waits for it."""

    def asks_for_notices(self) -> bool:
        """Nobody gives notice."""
        return False

    def leaving(self) -> frozenset[str]:
        """Nothing leaves."""
        return frozenset()

    def move(self) -> None:
        """There is nowhere to go."""


@dataclass
class Progress:
    """What must survive a restart beside weights, optimizer and random state."""

    step: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    owes_evaluation: bool = False
    """Whether the step was saved before its evaluation."""


class Worker:
    """One worker's training run."""

    def __init__(self, spec: WorkerSpec, session: Session) -> None:
        self.spec = spec
        self.session = session
        self.training = spec.training
        self.trained_only = spec.adapter.keeps_base
        tokens = [spec.train_tokens, *([spec.validation_tokens] if spec.validation_tokens else [])]
        agreement.all_have(Path(folder) for folder in (spec.run_folder, *tokens))
        self.train_rows = self._open(spec.train_tokens)
        self.validation_rows = self._open(spec.validation_tokens) if spec.validation_tokens else None
        self.objective = objectives.build(
            spec.task,
            pad_token_id=spec.pad_token_id,
            class_weights=spec.class_weights,
            before=spec.adapter.num_virtual_tokens if spec.adapter.method == "prompt" else 0,
        )
        self.journal = Path(spec.run_folder) / journal.NAME
        self.found = agreement.newest_whole(spec.checkpoints, self._tell)
        self.began: adapters.Weights | None = None
        self.engine = self._build_engine()
        flash = self.engine.module.config._attn_implementation.startswith("flash_attention")
        self.flatten = flash and not spec.adapter.has_virtual_tokens
        self.progress = self._restore()
        self.log = MetricsLog(self.journal, session)
        self.saved_for: frozenset[str] = frozenset()
        self.saver = Saver(
            spec.checkpoints,
            spec.attempt,
            session,
            keep=self.training.save_total_limit,
            trained_only=self.trained_only,
            background=self.training.async_save,
        )

    def run(self) -> Progress:
        """Train from the newest checkpoint, if there is one, to the end, and export the weights; or until told so."""
        if self.validation_rows is not None and (self.progress.step == 0 or self.progress.owes_evaluation):
            self._evaluate()
        self.log.start(self.progress.step)
        while self.progress.step < self.spec.total_steps and not self.progress.stopped_early:
            self._step()
            stop, pause, leave = self._asked()
            at_end = self.progress.step == self.spec.total_steps
            evaluates = self.validation_rows is not None and (at_end or self.progress.step % self.spec.eval_steps == 0)
            if pause:
                self._pause(owes_evaluation=evaluates)
            if stop or pause:
                self.saver.settle()
                return self.progress
            if evaluates:
                self._evaluate()
            if at_end or leave or self.progress.stopped_early or self.progress.step % self.spec.save_steps == 0:
                self._save(at_once=leave)
            if leave:
                self.session.move()
        self.saver.settle()
        if not self._exported_best():
            self._export(self.spec.weights)
        return self.progress

    def _pause(self, *, owes_evaluation: bool) -> None:
        """Save at once: an evaluation may take longer than there is time, and is made up for by who goes on."""
        self.progress.owes_evaluation = owes_evaluation
        self._tell(f"ends as SIGTERM asks for, after step {self.progress.step}, which is saved", self.progress.step)
        self._save(at_once=True)

    def _asked(self) -> tuple[bool, bool, bool]:
        """Whether to end; to save and end; and to save before a machine leaves: the same for all workers.

        Asked after every step, because whoever sends SIGTERM waits for seconds only; a stop is for logged steps.
        """
        first = self.session.rank == 0
        wishes = [
            first and self.progress.step % self.training.logging_steps == 0 and self.spec.stop_file.exists(),
            first and self.spec.pause_file.exists(),
            first and self.session.asks_for_notices(),
            self.saver.has_failed,
        ]
        asked = torch.tensor(wishes, dtype=torch.int32, device=self.session.device)
        dist.all_reduce(asked)
        stop, pause, look, failed = asked.bool().tolist()
        if failed:
            self.saver.settle()
        return stop, pause, look and self._must_save()

    def _must_save(self) -> bool:
        """Whether more machines are about to leave than the last time."""
        before, self.saved_for = self.saved_for, self.session.leaving()
        new = self.saved_for - before
        if new:
            step = self.progress.step
            self._tell(f"machine {', '.join(sorted(new))} is about to leave; saving after step {step}", step)
        return bool(new)

    def _tell(self, note: str, step: int = 0) -> None:
        """Tell the user, by the driver, which follows the journal."""
        if self.session.rank == 0:
            journal.append(self.journal, step, {}, note)

    def _open(self, tokens: str) -> PackedDataset:
        return PackedDataset.open(Path(tokens), self.spec.max_length, packing=self.spec.packing)

    def _build_engine(self) -> Any:
        spec = self.spec
        with engine.sharded_loading(self.training) if not spec.from_scratch else contextlib.nullcontext():
            model = self._load_model()
            if spec.task == "causal_lm":
                engine.chunk_loss(model)
            if self.trained_only:
                model = self._adapted(model)
        if spec.adapter.freeze:
            freezing.freeze(model, spec.adapter.freeze)
        if self.trained_only and self.session.rank == 0:
            self.began = adapters.beginning(model)
        if self.training.neftune_noise_alpha:
            engine.add_noise(model, self.training.neftune_noise_alpha, spec.max_length)
        ratio = spec.adapter.loraplus_lr_ratio
        return engine.build(
            model,
            self.training,
            total_steps=spec.total_steps,
            loraplus_lr_ratio=ratio,
            accumulation_steps=order.accumulation_steps(
                self.training.global_batch_size,
                self.session.world_size,
                self.training.per_device_train_batch_size,
            ),
            universal=self._must_convert(),
        )

    def _must_convert(self) -> bool:
        """Whether the checkpoint's shards are those of another number of workers; without ZeRO there are none."""
        other = self.found is not None and self.found.workers != self.session.world_size
        return other and zero.stage(self.training) > 0

    def _load_model(self) -> Any:
        spec, dtype = self.spec, engine.compute_dtype(self.training)
        head = base.Head(spec.task, spec.labels, spec.pad_token_id)
        if spec.from_scratch:
            return base.new_model(spec.model, seed=spec.seed, dtype=dtype, attention=spec.attention, head=head)
        options: dict[str, Any] = {}
        if spec.adapter.method == "qlora":
            bits, double = spec.adapter.quantization_bit, spec.adapter.double_quantization
            options = quantised.loading(bits, double=double, dtype=dtype, device=self.session.device)
        # A new head is the same on all workers.
        torch.manual_seed(spec.seed)
        model = base.load_model(
            spec.model, revision=spec.revision, dtype=dtype, attention=spec.attention, head=head, options=options
        )
        if options:
            quantised.keep_weights(model)
        if spec.new_tokens or spec.continues:
            base.grow(model, spec.vocabulary, seed=spec.seed)
        return model

    def _adapted(self, model: Any) -> Any:
        """The model with a new adapter, or with the one that training goes on with."""
        spec = self.spec
        if spec.continues:
            return adapters.go_on(model, Path(spec.continues))
        return adapters.attach(
            model, spec.adapter, base=spec.model, seed=spec.seed, task=spec.task, new_tokens=spec.new_tokens
        )

    def _restore(self) -> Progress:
        """Go on from the checkpoint that was found."""
        if self.found is None:
            return Progress()
        if self._must_convert():
            self._load_converted(self.found.shards)
        else:
            shards.load(self.engine, self.found.shards, trained_only=self.trained_only)
        return Progress(**self.found.state())

    def _load_converted(self, source: Path) -> None:
        target = self.spec.checkpoints / "universal" / source.name
        if self.session.rank == 0:
            shutil.rmtree(target.parent, ignore_errors=True)
            shards.convert(source, target)
        dist.barrier()
        shards.load_converted(self.engine, target, trained_only=self.trained_only)
        dist.barrier()
        if self.session.rank == 0:
            shutil.rmtree(target.parent)

    def _step(self) -> None:
        """One optimizer step on one global batch."""
        rows = order.global_batch(
            self.progress.step, self.training.global_batch_size, len(self.train_rows), self.spec.seed
        )
        # Known to every worker without talking, because the order of the data is.
        num_items = max(1, int(self.train_rows.num_label_tokens(rows).sum()))
        world_size = self.session.world_size
        loss_sum = torch.zeros((), device=self.session.device)
        mine = order.micro_batches(rows, self.session.rank, world_size, self.training.per_device_train_batch_size)
        for number, indices in enumerate(mine):
            torch.manual_seed(
                order.random_seed(self.spec.seed, self.progress.step, number * world_size + self.session.rank)
            )
            batch = self._batch(self.train_rows, indices, flatten=self.flatten)
            loss = self.objective.loss(self.engine, batch, num_items)
            # DeepSpeed averages gradients over workers; the factor makes that a sum.
            self.engine.backward(loss * world_size, scale_wrt_gas=False)
            self.engine.step()
            loss_sum += loss.detach()
        self.progress.step += 1
        self.log.step(loss_sum, int(self.train_rows.num_tokens(rows).sum()))
        if self.progress.step % self.training.logging_steps == 0 or self.progress.step == self.spec.total_steps:
            self.log.write(self.progress.step, self.engine, self._epoch())

    def _epoch(self) -> float:
        return self.progress.step * self.training.global_batch_size / len(self.train_rows)

    def _batch(self, source: PackedDataset, indices: Any, *, flatten: bool) -> dict[str, Tensor]:
        """The rows of `indices` [rows]; in place of -1, some row of which nothing is learned."""
        rows = [source.row(i) if i >= 0 else unlearned(source.row(0)) for i in indices]
        return self._to_device(self.objective.batch(rows, flatten=flatten))

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        device = self.session.device
        return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _evaluate(self) -> None:
        """Validation loss over all rows; keeps the weights if it is the lowest so far."""
        self.progress.owes_evaluation = False
        with self.log.clock_stopped():
            loss = self._validation_loss()
        self.log.evaluation(self.progress.step, loss, perplexity=self.spec.task != "classification")
        if self.progress.step == 0:
            return
        if self.spec.export_all:
            self._export(self.spec.export(self.progress.step))
        if loss < self.progress.best_loss:
            self.progress.best_loss, self.progress.best_step = loss, self.progress.step
            self.progress.evaluations_without_gain = 0
            if self.training.load_best_model_at_end and not self.spec.export_all:
                self._export(self.spec.weights)
        else:
            self.progress.evaluations_without_gain += 1
        patience = self.training.early_stopping_patience
        self.progress.stopped_early = patience is not None and self.progress.evaluations_without_gain >= patience

    def _validation_loss(self) -> float:
        """Mean loss over the learned tokens of the validation rows."""
        self.engine.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.session.device)
        with torch.no_grad():
            for batch in self._validation_batches():
                total += self.objective.loss(self.engine.module, batch, 1).double()
        self.engine.train()
        dist.all_reduce(total)
        assert self.validation_rows is not None
        return total.item() / max(1, int(self.validation_rows.num_label_tokens(slice(None)).sum()))

    def _validation_batches(self) -> Iterator[dict[str, Tensor]]:
        rows = self.validation_rows
        assert rows is not None
        size = self.training.per_device_eval_batch_size
        for indices in order.evaluation_batches(len(rows), self.session.rank, self.session.world_size, size):
            yield self._batch(rows, indices, flatten=False)

    def _save(self, *, at_once: bool) -> None:
        metrics = {"step": self.progress.step, "best_validation_loss": self.progress.best_loss}
        self.saver.save(self.engine, vars(self.progress), metrics, at_once=at_once)

    def _exported_best(self) -> bool:
        return self.training.load_best_model_at_end and self.progress.best_step > 0

    def _export(self, folder: Path) -> None:
        with agreement.failing_alike(folder):
            if self.trained_only:
                save = partial(adapters.save, began=self.began)
                engine.export_adapter(self.engine, folder, save, rank=self.session.rank)
            else:
                engine.export(self.engine, folder, rank=self.session.rank)


class MetricsLog:
    """Rank 0's journal of metrics: one JSON line per log point. The driver follows it; other ranks join in the sums.

    Lines are {"step", "time" (unix seconds), "metrics"}; losses are means per learned token, speeds are real tokens (no
    padding) per second of all workers, memory is the peak of worker 0.
    """

    def __init__(self, path: Path, session: Session) -> None:
        self.path = path
        self.session = session
        self.losses: list[Tensor] = []
        self.tokens = 0
        self.since = time.perf_counter()

    def start(self, step: int) -> None:
        """Training starts (or goes on) after `step` steps."""
        self._append(step, {"progress.start": step})
        self.since = time.perf_counter()

    def step(self, loss: Tensor, tokens: int) -> None:
        """Note one optimizer step: this worker's part of the loss, the global batch's real tokens."""
        self.losses.append(loss)
        self.tokens += tokens

    def write(self, step: int, trained: Any, epoch: float) -> None:
        """Write the mean over the steps since the last time."""
        loss = torch.stack(self.losses).mean()
        dist.all_reduce(loss)
        seconds = time.perf_counter() - self.since
        self._append(
            step,
            {
                "loss": loss.item(),
                "learning_rate": engine.last_learning_rate(trained),
                "grad_norm": float(trained.get_global_grad_norm() or 0.0),
                "tokens_per_second": self.tokens / seconds,
                "memory_gib": _peak_memory_gib(self.session.device),
                "epoch": epoch,
            },
        )
        self.losses, self.tokens, self.since = [], 0, time.perf_counter()

    def evaluation(self, step: int, loss: float, *, perplexity: bool) -> None:
        """Write a validation loss, and its perplexity where it is one of tokens."""
        self._append(step, {"eval_loss": loss, **({"eval_perplexity": math.exp(min(loss, 700))} if perplexity else {})})

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Time spent inside does not count as training time."""
        started = time.perf_counter()
        yield
        self.since += time.perf_counter() - started

    def _append(self, step: int, metrics: dict[str, float]) -> None:
        if self.session.rank == 0:
            journal.append(self.path, step, metrics)


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
