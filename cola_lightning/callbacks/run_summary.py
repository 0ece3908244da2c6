"""The blocks of text at the start and at the end of a run."""

import shlex
import time
from datetime import timedelta
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from cola_lightning.callbacks.hyper_parameters import PERPLEXITY, hyper_parameters
from cola_lightning.callbacks.log_lines import write_lines, write_table
from cola_lightning.columns import Command, as_typed
from cola_lightning.provenance import run_folder
from cola_lightning.training.module import LanguageModel
from cola_lightning.training.trainer_attributes import datamodule_of, is_fast_dev_run

DONE = {"validate": "validated", "test": "tested", "predict": "predicted"}
"""Names of the last line of a measurement."""


class RunSummary(L.Callback):
    """Print what a run trains on what, when it starts; and what it reached, where that is, and what to type next.

    Both blocks are in ``train.log`` too. ``validate``, ``test`` and ``predict`` print theirs: the model, the data and
    the devices, and what was measured in what time. Rank 0 alone prints.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.monotonic()
        if isinstance(pl_module, LanguageModel):
            write_table(trainer, describe_start(trainer, pl_module))

    on_test_start = on_predict_start = on_fit_start

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step and not is_fast_dev_run(trainer):
            write_lines(trainer, [""])
            write_table(trainer, describe_end(trainer, time.monotonic() - self._started))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.on_fit_start(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.on_test_end(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        seconds = time.monotonic() - self._started
        metrics = trainer.callback_metrics  # on all ranks
        found = [f"{name} {float(value):,.4f}" for name, value in metrics.items() if name.endswith("/perplexity")]
        done = ", ".join([*found, f"after {timedelta(seconds=round(seconds))}"])
        name = next(name for command, name in DONE.items() if trainer.state.fn == command)
        write_table(trainer, [(name, done)])

    on_predict_end = on_test_end


def describe_start(trainer: L.Trainer, module: LanguageModel) -> list[tuple[str, str]]:
    """Return the lines of the first block as (name, text). Those about steps are for ``fit`` alone."""
    settings, config, data = hyper_parameters(trainer, module), module.config, datamodule_of(trainer)
    rank = settings.get("projection.rank")
    method = [f"{settings.get('projection', 'projections of your own')}{f' of rank {rank}' if rank else ''}"]
    method += [str(settings["callbacks"])] if "callbacks" in settings else []
    sizes = (
        f"{config.num_hidden_layers} layers, hidden size {config.hidden_size:,}, {config.num_attention_heads} heads, "
        f"vocabulary {config.vocab_size:,}"
    )
    lines = [
        ("model", f"{module.parameter_count:,} parameters: {sizes}"),
        ("method", ", ".join(method)),
        ("data", _describe_data(trainer)),
        ("devices", f"{trainer.world_size} x {trainer.strategy.root_device.type}, {settings['strategy']}"),
        ("precision", str(trainer.precision)),
    ]
    if trainer.state.fn != "fit":
        weights = trainer.ckpt_path or module.initial_weights or "untrained"
        return [*lines, ("weights", str(weights)), ("run", str(run_folder(trainer)))]
    steps = f"{trainer.max_steps:,}" if trainer.max_steps > 0 else "no limit"
    if trainer.global_step:
        steps += f", resumed at step {trainer.global_step:,}"
    length, rows = getattr(data, "sequence_length", None), getattr(data, "batch_size", None)
    if length and rows:
        tokens = rows * length * trainer.accumulate_grad_batches * trainer.world_size
        steps += f", of {tokens:,} tokens each"
        steps += f": {tokens * trainer.max_steps:,} tokens" if trainer.max_steps > 0 else ""
    return [*lines, ("steps", steps), ("run", str(run_folder(trainer)))]


def _describe_data(trainer: L.Trainer) -> str:
    """Describe the data module: its class, and rows and tokens of a micro-batch."""
    data = datamodule_of(trainer)
    if data is None:
        return "data loaders from Python"
    name = type(data).__name__.removesuffix("DataModule")
    length, rows = getattr(data, "sequence_length", None), getattr(data, "batch_size", None)
    if not length or not rows:
        return name
    per_step = f", {trainer.accumulate_grad_batches} per step" if trainer.state.fn == "fit" else ""
    return f"{name}, micro-batches of {rows} rows of {length:,} tokens{per_step}"


def describe_end(trainer: L.Trainer, seconds: float) -> list[tuple[str, str]]:
    """Return the lines of the last block as (name, text)."""
    run, metrics = run_folder(trainer), trainer.callback_metrics  # on all ranks
    of = f" of {trainer.max_steps:,}" if trainer.max_steps > 0 else ""
    reached = [f"step {trainer.global_step:,}{of} after {timedelta(seconds=round(seconds))}"]
    for name, key, form in (
        ("loss", "train/loss", ".4f"),
        ("validation perplexity", PERPLEXITY, ",.2f"),
        ("tokens", "train/tokens", ",.0f"),
    ):
        if key in metrics:
            reached.append(f"{name} {float(metrics[key]):{form}}")
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # a connector sets it
    if "train/loss" not in metrics and every > trainer.global_step:
        reached.append(f"no loss logged, because --trainer.log_every_n_steps is {every}")
    lines = [("reached", ", ".join(reached))]
    checkpoint = getattr(trainer.checkpoint_callback, "last_model_path", "")
    if not checkpoint:
        return [*lines, ("run", str(run))]
    return [
        *lines,
        ("checkpoint", checkpoint),
        *next_commands(run, _events_folder(trainer, run)),
    ]


def next_commands(run: Path, events: Path | None) -> list[tuple[str, Command]]:
    """Return what to type after a run, as (name, command), with quotes where a shell needs them.

    Args:
        run: Directory of the run.
        events: Directory of its TensorBoard events; None if there are none.
    """
    folder, config = shlex.quote(str(run)), shlex.quote(str(run / "config.yaml"))
    commands = [
        ("generate", f"cola_lightning generate {folder} --prompt 'Once upon a time'"),
        ("evaluate", f"cola_lightning evaluate {folder} --text notes.jsonl"),
        ("resume", f"cola_lightning fit --config {config} --run_dir {folder} --ckpt_path last --trainer.max_steps N"),
    ]
    commands += [("curves", f"tensorboard --logdir {shlex.quote(str(events))}")] if events else []
    return [(name, as_typed(command)) for name, command in commands]


def _events_folder(trainer: L.Trainer, run: Path) -> Path | None:
    """Return the directory in which TensorBoard finds the events of a run; None if no logger writes any."""
    loggers = (logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger))
    folders = (Path(logger.log_dir).absolute() for logger in loggers)
    return next((run if folder.is_relative_to(run.absolute()) else folder for folder in folders), None)
