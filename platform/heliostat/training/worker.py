"""Everything that runs on one training worker: build the engine, step, evaluate, checkpoint, export the weights.

It knows its rank and its peers only through a `Session`, so the same loop runs under Ray Train, or in one process
without Ray.
"""

import contextlib
import math
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from heliostat import journal
from heliostat.data.packing import IGNORED, PackedDataset, collate
from heliostat.data.tokens import TokenDataset
from heliostat.models import adapters, base, freezing
from heliostat.training import checkpoint, engine, order
from heliostat.training.objectives import causal_lm_loss, learned_positions
from heliostat.training.spec import WorkerSpec


class Session(Protocol):
    """A worker's view of its group."""

    rank: int
    world_size: int
    device: torch.device

    def report(self, folder: Path, metrics: dict[str, float]) -> None:
        """Called by all workers once the checkpoint in `folder` is written."""


class LocalSession:
    """A group of one: this process, without Ray."""

    rank = 0
    world_size = 1
    # DeepSpeed insists on a launcher's variables.
    _ENVIRONMENT: ClassVar = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}

    def __init__(self, checkpoints: Path, keep: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._checkpoints = checkpoints
        self._keep = keep

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
        """Delete what is older than the newest checkpoints."""
        checkpoint.prune(self._checkpoints, self._keep)


@dataclass
class Progress:
    """What must survive a restart beside weights, optimizer and random state."""

    step: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    evaluations_without_gain: int = 0
    stopped_early: bool = False


class Worker:
    """One worker's training run."""

    def __init__(self, spec: WorkerSpec, session: Session) -> None:
        self.spec = spec
        self.session = session
        self.training = spec.training
        self.trained_only = spec.adapter.method == "lora"
        self.train_rows = self._open(spec.train_tokens)
        self.validation_rows = self._open(spec.validation_tokens) if spec.validation_tokens else None
        self.engine = self._build_engine()
        self.flatten = self.engine.module.config._attn_implementation.startswith("flash_attention")
        self.progress = self._restore()
        self.log = MetricsLog(Path(spec.run_folder) / journal.NAME, session)

    def run(self) -> Progress:
        """Train to the end, from the newest checkpoint if there is one, and export the weights."""
        if self.progress.step == 0 and self.validation_rows is not None:
            self._evaluate()
        self.log.start(self.progress.step)
        while self.progress.step < self.spec.total_steps and not self.progress.stopped_early:
            self._step()
            if self.progress.step % self.training.logging_steps == 0 and self._told_to_stop():
                return self.progress
            at_end = self.progress.step == self.spec.total_steps
            if self.validation_rows is not None and (at_end or self.progress.step % self.spec.eval_steps == 0):
                self._evaluate()
            if at_end or self.progress.stopped_early or self.progress.step % self.spec.save_steps == 0:
                self._save()
        if not self._exported_best():
            self._export(self.spec.weights)
        return self.progress

    def _told_to_stop(self) -> bool:
        """Whether the driver wants the training to end; all workers learn it at the same step."""
        told = torch.tensor(float(self.session.rank == 0 and self.spec.stop_file.exists()), device=self.session.device)
        dist.all_reduce(told)
        return bool(told.item())

    def _open(self, tokens: str) -> PackedDataset:
        return PackedDataset(TokenDataset.open(Path(tokens)), self.spec.max_length, packing=self.spec.packing)

    def _build_engine(self) -> Any:
        spec = self.spec
        dtype = engine.compute_dtype(self.training)
        if spec.from_scratch:
            model = base.new_model(spec.model, seed=spec.seed, dtype=dtype, attention=spec.attention)
        else:
            with engine.sharded_loading(self.training):
                model = base.load_model(spec.model, revision=spec.revision, dtype=dtype, attention=spec.attention)
        if self.trained_only:
            model = adapters.attach(model, spec.adapter, base=spec.model, seed=spec.seed)
        if spec.adapter.freeze:
            freezing.freeze(model, spec.adapter.freeze)
        if self.training.neftune_noise_alpha:
            engine.add_noise(model, self.training.neftune_noise_alpha, spec.max_length)
        ratio = spec.adapter.loraplus_lr_ratio
        built = engine.build(model, self.training, total_steps=spec.total_steps, loraplus_lr_ratio=ratio)
        torch.manual_seed(spec.seed + self.session.rank)
        return built

    def _restore(self) -> Progress:
        """Go on from the newest whole checkpoint, the same one on every worker."""
        found = [checkpoint.newest(self.spec.checkpoints, self.session.world_size) if self.session.rank == 0 else None]
        dist.broadcast_object_list(found)
        if found[0] is None:
            return Progress()
        state = checkpoint.load(self.engine, found[0], rank=self.session.rank, trained_only=self.trained_only)
        return Progress(**state)

    def _step(self) -> None:
        """One optimizer step on one global batch."""
        rows = order.global_batch(
            self.progress.step, self.training.global_batch_size, len(self.train_rows), self.spec.seed
        )
        # Known to every worker without talking, because the order of the data is.
        num_items = max(1, int(self.train_rows.num_label_tokens(rows).sum()))
        world_size = self.session.world_size
        loss_sum = torch.zeros((), device=self.session.device)
        for indices in order.micro_batches(
            rows, self.session.rank, world_size, self.training.per_device_train_batch_size
        ):
            loss = causal_lm_loss(self.engine, self._batch(indices), num_items)
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

    def _batch(self, indices: Any) -> dict[str, Tensor]:
        rows = [self.train_rows.row(i) for i in indices]
        return self._to_device(learned_positions(collate(rows, self.spec.pad_token_id, flatten=self.flatten)))

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        device = self.session.device
        return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _evaluate(self) -> None:
        """Validation loss over all rows; keeps the weights if it is the lowest so far."""
        with self.log.clock_stopped():
            loss = self._validation_loss()
        self.log.evaluation(self.progress.step, loss)
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
        """Mean next-token loss over the learned tokens of the validation rows."""
        self.engine.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.session.device)
        with torch.no_grad():
            for batch in self._validation_batches():
                total += causal_lm_loss(self.engine.module, batch, 1).double()
        self.engine.train()
        dist.all_reduce(total)
        assert self.validation_rows is not None
        return total.item() / max(1, int(self.validation_rows.num_label_tokens(slice(None)).sum()))

    def _validation_batches(self) -> Iterator[dict[str, Tensor]]:
        rows = self.validation_rows
        assert rows is not None
        size = self.training.per_device_eval_batch_size
        for indices in order.evaluation_batches(len(rows), self.session.rank, self.session.world_size, size):
            padded = [rows.row(max(i, 0)) for i in indices]
            batch: dict[str, Any] = collate(padded, self.spec.pad_token_id, flatten=False)
            batch["labels"][torch.as_tensor(indices < 0)] = IGNORED
            yield self._to_device(learned_positions(batch))

    def _save(self) -> None:
        session, progress = self.session, self.progress
        folder = self.spec.checkpoints / self.spec.attempt / checkpoint.name(progress.step, session.world_size)
        checkpoint.save(self.engine, folder, vars(progress), rank=session.rank, trained_only=self.trained_only)
        session.report(folder, {"step": progress.step, "best_validation_loss": progress.best_loss})

    def _exported_best(self) -> bool:
        return self.training.load_best_model_at_end and self.progress.best_step > 0

    def _export(self, folder: Path) -> None:
        engine.export(self.engine, folder, trained_only=self.trained_only, rank=self.session.rank)


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

    def evaluation(self, step: int, loss: float) -> None:
        """Write a validation loss."""
        self._append(step, {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))})

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
