"""Check Lightning's own flags, and let loggers write into the run's directory."""

import inspect
import math
import os
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn

from cola_lightning.callbacks.checkpoints import Checkpoints
from cola_lightning.data.token_data_module import TokenDataModule
from cola_lightning.errors import InputError
from cola_lightning.methods.post_step import PostStepCallback


def place_loggers(loggers: Any, run_dir: Path) -> None:
    """Let every logger that was given no folder write into the directory of the run.

    WandbLogger and MLFlowLogger would write to the working directory.

    Args:
        loggers: The settings ``trainer.logger``, before the loggers are made; changed in place.
        run_dir: The run's directory.
    """
    for settings in loggers if isinstance(loggers, list) else [loggers]:
        if not isinstance(settings, Namespace) or "class_path" not in settings:
            continue
        module, _, name = settings.class_path.rpartition(".")
        parameter = inspect.signature(getattr(import_module(module), name)).parameters.get("save_dir")
        arguments = settings.get("init_args")
        if parameter is not None and arguments is not None and arguments.get("save_dir") == parameter.default:
            arguments["save_dir"] = str(run_dir)


def check_folder(flag: str, folder: str | None) -> None:
    """Refuse a directory that cannot be made or written to, before anything is read.

    Raises:
        InputError: Names what is in its way.
    """
    if folder is None:
        return
    if not folder.strip():
        raise InputError(f"{flag} is empty; name a directory, or leave the option out")
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        above = "" if place == Path(folder).absolute() else f" cannot be made, because {place}"
        raise InputError(f"{flag} {folder}{above} is a file; name a directory, which need not exist yet")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {folder} cannot be written, because you may not write to {place}; name another")


def loggers_of_a_measurement(named: Any) -> list[Logger] | bool:
    """Return the loggers of ``validate``, ``test`` and ``predict``; False for none.

    A logger that would write into the logs of a training run is left out, with a warning. The results are printed too.

    Args:
        named: Value of ``--trainer.logger``, with the loggers made.
    """
    loggers = named if isinstance(named, list) else [named]
    if named in (None, True, False, []):
        return False
    kept = []
    for logger in loggers:
        folder = Path(logger.log_dir) if isinstance(logger, TensorBoardLogger | CSVLogger) else None
        if folder is not None and folder.is_dir() and any(folder.iterdir()):
            rank_zero_warn(f"{type(logger).__name__} logs nothing, because {folder} holds the logs of another run")
        else:
            kept.append(logger)
    return kept or False


def check_settings(trainer: Any) -> None:
    """Refuse values of ``--trainer.*`` that Lightning accepts, but that fail later: as a divisor, or as a strategy.

    Args:
        trainer: The settings, before the Trainer is made.

    Raises:
        InputError: Names the value and the fix.
    """
    for name, fix in (
        ("val_check_interval", "set --trainer.limit_val_batches 0 for no validation"),
        ("check_val_every_n_epoch", "set --trainer.limit_val_batches 0 for no validation"),
        ("accumulate_grad_batches", "1 makes a step of each micro-batch"),
    ):
        value = trainer[name]
        if type(value) is int and value < 1:
            raise InputError(f"--trainer.{name} is {value}; it must be at least 1; {fix}")
    strategy = trainer["strategy"]
    if isinstance(strategy, str) and re.search(r"_(spawn|fork|notebook)", strategy):
        raise InputError(
            f"--trainer.strategy {strategy} is for notebooks, and cannot start a run of the command line; take ddp"
        )


def check_numbers(settings: Any, place: str = "-") -> None:
    """Refuse NaN, infinity in settings of model and data, and whole numbers of more than 64 bits.

    Checks of ranges do not find NaN, because comparisons with it are false. No library can count with more than 64
    bits.

    Args:
        settings: Settings of a command, nested.
        place: Flag of ``settings``, for the message.

    Raises:
        InputError: Names the first such setting.
    """
    if isinstance(settings, dict | list):
        entries = settings.items() if isinstance(settings, dict) else enumerate(settings)
        for key, value in entries:
            check_numbers(value, f"{place}{'-' if place == '-' else '.'}{key}")
    elif isinstance(settings, float) and not math.isfinite(settings):
        flag = place.replace(".init_args", "")
        if math.isnan(settings) or flag.startswith(("--model.", "--data.")):
            raise InputError(f"{flag} is {settings}; it must be a finite number")
    elif isinstance(settings, int) and abs(settings) >= 2**63:
        raise InputError(f"{place.replace('.init_args', '')} is {settings}; it must be below 2^63")


def next_version(folder: Path) -> Path:
    """Return the next of the folders ``version_0``, ``version_1``, …: one above the highest that exists."""
    taken = [path.name.removeprefix("version_") for path in folder.glob("version_*")]
    return folder / f"version_{max((int(number) for number in taken if number.isdigit()), default=-1) + 1}"


def check_trainer(trainer: L.Trainer, data: L.LightningDataModule | None) -> None:
    """Refuse callbacks, plugins and loggers that would do nothing, or something else, in a run of this package.

    Raises:
        InputError: Names it, and what to use instead.
    """
    for problem in _problems(trainer, data):
        raise InputError(problem)


def _problems(trainer: L.Trainer, data: L.LightningDataModule | None) -> Iterator[str]:
    strategy = trainer.strategy
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # a connector sets them
    if isinstance(strategy.checkpoint_io, AsyncCheckpointIO) and any(
        isinstance(callback, Checkpoints) for callback in trainer.checkpoint_callbacks
    ):
        yield (
            "--trainer.plugins AsyncCheckpointIO returns before a checkpoint is on the disk, but here one is checked "
            "and named when it is; leave the plugin out"
        )
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, StochasticWeightAveraging) and (
            trainer.max_epochs in (None, -1) or isinstance(data, TokenDataModule)
        ):
            yield (
                "StochasticWeightAveraging averages over epochs, but this run is one epoch and is counted in steps; "
                "take WeightAveraging or EMAWeightAveraging, of lightning.pytorch.callbacks"
            )
        elif isinstance(callback, WeightAveraging):
            if isinstance(strategy, FSDPStrategy | ModelParallelStrategy | DeepSpeedStrategy):
                yield (
                    f"{name} keeps a whole copy of the network, which {type(strategy).__name__} shards; set "
                    "--trainer.strategy ddp, or leave the callback out"
                )
            methods = [type(other).__name__ for other in callbacks if isinstance(other, PostStepCallback)]
            if methods:
                yield (
                    f"{name} averages weights over steps, but {methods[0]} gives the factors another meaning between "
                    "two of them; leave one of them out"
                )
        elif isinstance(callback, BatchSizeFinder):
            yield (
                f"{name} tries batches until memory runs out; take 'cola_lightning estimate', which tells the largest "
                "--data.batch_size, and state the batch of a step by --data.global_batch_size"
            )
        elif isinstance(callback, BaseFinetuning | ModelPruning):
            yield (
                f"{name} is made for fine-tuning other networks, and would not do here what it says; leave it out, or "
                "derive a callback of your own from lightning.pytorch.callbacks.Callback"
            )
        elif isinstance(callback, LearningRateFinder):
            yield (
                f"{name} sets an attribute lr, which no optimizer here reads; try several --model.optimizer.lr by "
                "'cola_lightning compare'"
            )
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and Path(logger.log_dir, "metrics.csv").is_file():
            yield (
                f"CSVLogger would delete {Path(logger.log_dir, 'metrics.csv')} of another run; set another "
                "--trainer.logger.version, or none"
            )
