"""Private APIs of Lightning."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import lightning.pytorch.strategies.fsdp as fsdp_strategy
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch.utils.data import BatchSampler, DataLoader

from cola_lightning.private_apis.expected import Expected, replaced

# -- the fit loop -----------------------------------------------------------------------------------------------------


FETCH = "[_TrainingEpochLoop].train_dataloader_next"
"""Name under which Lightning's profiler measures how long the next batch of the loader takes."""


def is_accumulating(trainer: L.Trainer) -> bool:
    """Whether the batch just trained on ends no optimizer step."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def is_last_batch(trainer: L.Trainer) -> bool:
    """Whether the batch just trained on is the last of its epoch."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def is_validation_due(trainer: L.Trainer) -> bool:
    """Whether Lightning validates after the batch just trained on."""
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher  # only its type matters, so that None will do
    return loop.epoch_loop._should_check_val_fx(fetcher)  # type: ignore[arg-type]


@contextmanager
def validate_also(trainer: L.Trainer, condition: Callable[[], bool]) -> Iterator[None]:
    """Validate also where ``condition()`` is true, while the context lasts."""
    epoch_loop = trainer.fit_loop.epoch_loop
    decide = epoch_loop._should_check_val_fx
    # An attribute of the object hides the method of its class; it is deleted afterwards.
    vars(epoch_loop)["_should_check_val_fx"] = lambda fetcher: decide(fetcher) or condition()
    try:
        yield
    finally:
        del vars(epoch_loop)["_should_check_val_fx"]


def validates_by_time(trainer: L.Trainer) -> bool:
    """Whether ``val_check_interval`` is a duration."""
    return trainer._val_check_time_interval is not None  # type: ignore[attr-defined]  # a connector sets it


def logged_step(trainer: L.Trainer) -> int:
    """Return the step that loggers get for what is logged now."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def set_logged_step(trainer: L.Trainer, step: int) -> None:
    """Set the step that loggers get next."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


@contextmanager
def keep_logging_position(trainer: L.Trainer) -> Iterator[None]:
    """Restore the logger connector's place in the loop at the end, as Lightning does around a validation."""
    connector = trainer._logger_connector
    first = connector._first_loop_iter
    yield
    connector._first_loop_iter = first


def count_validation_on_resume(trainer: L.Trainer, count: bool) -> None:
    """Choose whether Lightning adds the batches of the validation that is due at a resumed step to its progress.

    Lightning assumes that this validation was made before the checkpoint, and adds its batches before the first
    training batch. If it is made after resuming, its batches are counted one by one and must not be added again.
    """
    loop, name = trainer.fit_loop.epoch_loop.val_loop, "increment_progress_to_evaluation_end"
    vars(loop).pop(name, None)
    if not count:
        vars(loop)[name] = lambda: None  # An attribute of the object hides the method of its class.


def log_step_now(trainer: L.Trainer) -> None:
    """Send what this step has logged to the loggers now, and not again when the batch ends."""
    connector, name = trainer._logger_connector, "update_train_step_metrics"
    connector.update_train_step_metrics()
    vars(connector)[name] = functools.partial(vars(connector).pop, name)  # in place of the next call, and gone with it


def skip_sigterm_broadcast(trainer: L.Trainer) -> None:
    """Leave out the broadcast on the device by which Lightning's ranks tell each other of SIGTERM at each batch."""
    vars(trainer.fit_loop.epoch_loop)["_broadcast_sigterm_tensor"] = lambda: None


def ignore_signals(trainer: L.Trainer) -> None:
    """Keep Lightning from handling signals, and from resuming ``hpc_ckpt_….ckpt`` in the working directory."""
    vars(trainer._signal_connector)["register_signal_handlers"] = lambda: None
    connector: Any = trainer._checkpoint_connector
    connector.__class__ = type("NoHPCCheckpoints", (type(connector),), {"_hpc_resume_path": None})


def restore_within(trainer: L.Trainer, context: Callable[[], AbstractContextManager[None]]) -> None:
    """Enter ``context()`` around each part of a checkpoint that this trainer restores."""
    connector = trainer._checkpoint_connector
    for name in ("_restore_modules_and_callbacks", "restore_training_state"):
        vars(connector)[name] = _within(getattr(type(connector), name).__get__(connector), context)


def _within(function: Callable[..., None], context: Callable[[], AbstractContextManager[None]]) -> Callable[..., None]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        with context():
            function(*args, **kwargs)

    return call


def unwrap_data_loaders() -> None:
    """Give data loaders and samplers of torch, and subclasses of them, their own methods again.

    Lightning wraps these methods while it asks for a loader, and leaves them wrapped if that raises. In the same
    process, as in a notebook, all later loaders would then record their arguments, and Lightning could fail where it
    makes one anew.
    """
    classes: list[type] = [DataLoader, BatchSampler]
    for cls in classes:  # grows on the way
        classes += cls.__subclasses__()
        for name in ("__setattr__", "__delattr__", "__init__"):
            if (own := vars(cls).get(f"__old{name}")) is not None:
                setattr(cls, name, own)
                delattr(cls, f"__old{name}")


# -- callbacks and strategies ------------------------------------------------------------------------------------------


class LatestCheckpoint(ModelCheckpoint):
    """ModelCheckpoint; a subclass decides which checkpoint ``Trainer.fit(ckpt_path="last")`` means."""

    def latest(self, trainer: L.Trainer) -> Path | None:
        """Return the checkpoint to resume from, or None."""
        raise NotImplementedError

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        found = self.latest(trainer)
        return {str(found)} if found else set()

    @property
    def last_saved_step(self) -> int:
        """Number of optimizer steps at the newest checkpoint."""
        return self._last_global_step_saved

    @last_saved_step.setter
    def last_saved_step(self, step: int) -> None:
        set_last_saved_step(self, step)


class DescribedProgressBar(RichProgressBar):
    """Progress bar; a subclass chooses the text before the bar of training."""

    def training_description(self) -> str:
        """Return the text before the bar."""
        raise NotImplementedError

    def _get_train_description(self, current_epoch: int) -> str:
        return self.training_description()


def set_last_saved_step(callback: ModelCheckpoint, step: int) -> None:
    """Set the last step that a callback has saved. It does not save the same step again."""
    callback._last_global_step_saved = step


def global_seed() -> int:
    """Return the seed of ``seed_everything``; 0 if it was not called."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Set the number of ranks among which FSDP2 shards, once it is known."""
    strategy._data_parallel_size = size


def ddp_options(strategy: Strategy) -> dict[str, Any]:
    """Return the options of DistributedDataParallel; empty for other strategies."""
    return strategy._ddp_kwargs if isinstance(strategy, DDPStrategy) else {}


def has_own_checkpointing(strategy: Strategy) -> bool:
    """Whether an FSDP strategy was given an ``activation_checkpointing_policy``."""
    return isinstance(strategy, FSDPStrategy) and bool(strategy._activation_checkpointing_kwargs)


def replace_fsdp_loader(load: Callable[[Path], Any]) -> AbstractContextManager[None]:
    """Let FSDP (1) read a checkpoint in one file by ``load`` in place of its own unpickler."""
    return replaced(fsdp_strategy, "_lazy_load", load)


# -- what is expected -------------------------------------------------------------------------------------------------


_LOOPS, _TRAINER = "lightning.pytorch.loops", "lightning.pytorch.trainer"
_EPOCH_LOOP = f"{_LOOPS}.training_epoch_loop:_TrainingEpochLoop"
_CHECKPOINTS = f"{_TRAINER}.connectors.checkpoint_connector:_CheckpointConnector"
_CALLBACKS, _STRATEGIES = "lightning.pytorch.callbacks", "lightning.pytorch.strategies"
EXPECTED = (
    Expected(f"{_EPOCH_LOOP}._should_accumulate", "self"),
    Expected(f"{_EPOCH_LOOP}._num_ready_batches_reached", "self"),
    Expected(f"{_EPOCH_LOOP}._should_check_val_fx", "self, data_fetcher"),
    Expected(f"{_EPOCH_LOOP}._broadcast_sigterm_tensor", "self"),
    Expected(
        f"{_EPOCH_LOOP}.advance",
        mentions=("_broadcast_sigterm_tensor", "increment_progress_to_evaluation_end", "update_train_step_metrics"),
    ),
    Expected(f"{_EPOCH_LOOP}.on_advance_end", mentions=("_should_check_val_fx", "_batches_that_stepped")),
    Expected(f"{_EPOCH_LOOP}._on_before_fetch", mentions=("].train_dataloader_next",)),
    Expected(f"{_EPOCH_LOOP}._on_after_fetch", mentions=("].train_dataloader_next",)),
    Expected(f"{_LOOPS}.evaluation_loop:_EvaluationLoop.increment_progress_to_evaluation_end", "self"),
    Expected(f"{_LOOPS}.fit_loop:_FitLoop.advance", mentions=("_data_fetcher",)),
    Expected(
        f"{_TRAINER}.trainer:Trainer.__init__",
        mentions=("_signal_connector", "_checkpoint_connector", "_logger_connector"),
    ),
    Expected(
        f"{_TRAINER}.trainer:Trainer._run",
        mentions=("register_signal_handlers", "_restore_modules_and_callbacks", "restore_training_state"),
    ),
    Expected(f"{_TRAINER}.setup:_init_debugging_flags", mentions=("_val_check_time_interval",)),
    Expected(f"{_TRAINER}.connectors.signal_connector:_SignalConnector.register_signal_handlers", "self"),
    Expected(f"{_CHECKPOINTS}._hpc_resume_path"),
    Expected(f"{_CHECKPOINTS}._parse_ckpt_path", mentions=("_hpc_resume_path", "_find_last_checkpoints")),
    Expected(
        f"{_TRAINER}.connectors.logger_connector:_LoggerConnector.update_train_step_metrics",
        "self",
        mentions=("_first_loop_iter",),
    ),
    Expected(f"{_CALLBACKS}.model_checkpoint:ModelCheckpoint.__init__", mentions=("_last_global_step_saved",)),
    Expected(f"{_CALLBACKS}.model_checkpoint:ModelCheckpoint._find_last_checkpoints", "self, trainer"),
    Expected(f"{_CALLBACKS}.progress.rich_progress:RichProgressBar._get_train_description", "self, current_epoch"),
    Expected("lightning.fabric.utilities.seed:seed_everything", mentions=("PL_GLOBAL_SEED",)),
    Expected(f"{_STRATEGIES}.model_parallel:ModelParallelStrategy.__init__", mentions=("_data_parallel_size",)),
    Expected(f"{_STRATEGIES}.ddp:DDPStrategy.__init__", mentions=("_ddp_kwargs",)),
    Expected(f"{_STRATEGIES}.fsdp:FSDPStrategy.__init__", mentions=("_activation_checkpointing_kwargs",)),
    Expected(f"{_STRATEGIES}.fsdp:FSDPStrategy.load_checkpoint", mentions=("_lazy_load",)),
    Expected("lightning.fabric.utilities.data:_replace_dunder_methods", mentions=("__old", "__old__init__")),
)
