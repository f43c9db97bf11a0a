"""What a training worker must know. Imports nothing heavy: the driver makes it, and has no use for DeepSpeed."""

from dataclasses import dataclass
from pathlib import Path

from heliostat.models.config import AdapterConfig
from heliostat.tasks import Task
from heliostat.training.config import TrainingConfig

STOP = "stop"
"""Name of the file in a run folder that ends the run."""
PAUSE = "pause"
"""Name of the file that ends the workers once they have saved, for the run to be gone on with."""


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker must know. Plain values and paths that every worker can read."""

    run_folder: str
    attempt: str
    """Name of this start of the driver; its checkpoints go into a folder of that name."""
    model: str
    """Resolved model folder or hub name; for a model from scratch, the folder with its config.json."""
    revision: str | None
    from_scratch: bool
    attention: str | None
    adapter: AdapterConfig
    training: TrainingConfig
    train_tokens: str
    validation_tokens: str | None
    max_length: int
    packing: bool
    pad_token_id: int
    total_steps: int
    eval_steps: int
    save_steps: int
    export_all: bool
    """Keep the weights of every evaluation, for others to choose from."""
    seed: int
    task: Task = "causal_lm"
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of their numbers."""
    class_weights: tuple[float, ...] | None = None
    """How much a text of each class counts."""
    continues: str | None = None
    """Folder of the adapter to go on with."""
    new_tokens: tuple[int, ...] = ()
    """Ids whose embeddings learn beside an adapter."""
    vocabulary: int = 0
    """Embeddings that there must be at the least."""

    @property
    def checkpoints(self) -> Path:
        """Parent of all attempts' checkpoint folders."""
        return Path(self.run_folder) / "checkpoints"

    @property
    def weights(self) -> Path:
        """Where the exported weights of the chosen step go."""
        return Path(self.run_folder) / "weights"

    def export(self, step: int) -> Path:
        """Where the weights of an evaluation go, with `export_all`."""
        return Path(self.run_folder) / "exports" / export_name(step)

    @property
    def stop_file(self) -> Path:
        """The workers end, and write nothing more, when this file is there."""
        return Path(self.run_folder) / STOP

    @property
    def pause_file(self) -> Path:
        """The workers save and end when this file is there."""
        return Path(self.run_folder) / PAUSE


def export_name(step: int) -> str:
    """The folder of the weights after `step` steps."""
    return f"step_{step:06d}"
