"""Lightning's commands: ``fit``, ``validate``, ``test`` and ``predict``."""

import io
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from cola_lightning.callbacks import Checkpoints, Progress
from cola_lightning.callbacks.defaults import default_callbacks, defaults_beside
from cola_lightning.checkpoints import plain_data_only, read_state
from cola_lightning.checkpoints.lock import lock, release
from cola_lightning.checkpoints.restore import explain_restore, incomplete
from cola_lightning.cli.parser import reason_of
from cola_lightning.cli.run_parser import SaveRunConfig
from cola_lightning.cli.run_settings import RunSettings
from cola_lightning.cli.trainer_flags import (
    check_folder,
    check_settings,
    check_trainer,
    loggers_of_a_measurement,
    next_version,
    place_loggers,
)
from cola_lightning.data.token_data_module import TokenDataModule
from cola_lightning.distributed.precision import check_precision, plugins_beside
from cola_lightning.distributed.strategies import check_strategy, check_world_size
from cola_lightning.errors import InputError
from cola_lightning.loggers import FaultTolerantTensorBoardLogger
from cola_lightning.private_apis.checks import check_private_apis
from cola_lightning.private_apis.lightning import restore_within
from cola_lightning.provenance import TOKENIZER
from cola_lightning.signals import LISTENER
from cola_lightning.training.module import LanguageModel
from cola_lightning.training.preemption import own_signals
from cola_lightning.training.rank_processes import await_ranks, limit_rendezvous

REFUSALS = (InputError, ModuleNotFoundError, MisconfigurationException)
"""Errors that a class raises in its constructor for settings that cannot work."""
USAGE = "[--config FILE] [--NAME VALUE ...]"


class CLI(RunSettings):
    """LightningCLI around :class:`LanguageModel`, with what every run has.

    Args:
        args: The command line; ``sys.argv[1:]`` by default.
        run: Whether the command line begins with a command, which is run.
        guard: Gets :func:`plain_data_only` once the command line is parsed. Not before, because it takes a second to
            import, and ``--print_config`` ends with parsing.
    """

    def __init__(self, args: ArgsType = None, run: bool = True, guard: ExitStack | None = None) -> None:
        self._guard = guard
        self._command = args[0] if isinstance(args, list) and args else ""
        super().__init__(
            LanguageModel,
            L.LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True, "save_to_log_dir": False},  # a logger's is not always the run's
            trainer_defaults={
                "callbacks": default_callbacks(),
                "max_epochs": -1,  # runs are counted in steps; an epoch is what is left of the run
                "enable_model_summary": False,  # the module tells the network's size; the metrics have none
            },
            seed_everything_default=42,
            auto_configure_optimizers=False,
            # A short usage line. The one that argparse makes of all options would hide the error below it.
            parser_kwargs={"prog": "cola_lightning"}
            | {command: {"usage": f"cola_lightning {command} {USAGE}"} for command in self.subcommands()},
            args=args,
            run=run,
        )

    def before_instantiate_classes(self) -> None:
        """Find the directory of the run, because loggers need it when they are made."""
        if self._guard:
            self._guard.enter_context(plain_data_only())
            self._guard = None  # parsers hold this object, and callbacks of Lightning copy them with the module
        if self.subcommand:
            self.config[self.subcommand]["ckpt_path"] = self.checkpoint_path
        config = self.config[self.subcommand] if self.subcommand else self.config
        trainer = config.trainer
        for name, folder in (("run_dir", config.run_dir), ("checkpoint.dirpath", config.checkpoint.dirpath)):
            check_folder(f"--{name}", folder)
        self.run_dir = config.run_dir and Path(config.run_dir).absolute()
        if self.run_dir and trainer.default_root_dir not in (None, config.run_dir, str(self.run_dir)):
            raise InputError(
                f"--run_dir {config.run_dir} and --trainer.default_root_dir {trainer.default_root_dir} both say where "
                "a run's files go; leave the second out"
            )
        if self.run_dir is None and not (self.subcommand == "fit" and trainer.logger in (None, True)):
            # TensorBoard's logger numbers the directories of runs without a name by itself.
            self.run_dir = next_version(Path(trainer.default_root_dir or "runs")).absolute()
        if self.run_dir:
            place_loggers(trainer.logger, self.run_dir)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # the parser's, around what a class said as it was made
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, REFUSALS):
                cause = cause.__cause__
            said = str(cause) if cause else reason_of(str(error))
            if said is None:
                raise
            raise InputError(" ".join(said.split())) from error

    def _setting(self, name: str) -> Any:
        """Return a setting of this command, with its objects made."""
        return (self.config_init[self.subcommand] if self.subcommand else self.config_init).get(name)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer, run_dir = self._setting("trainer"), self.run_dir
        checkpoint = self._setting("checkpoint")
        if run_dir and checkpoint.dirpath is None:
            checkpoint.dirpath = str(run_dir / "checkpoints")
        resumes = self._setting("ckpt_path")
        if self.subcommand == "fit" and run_dir and not resumes and list(Path(checkpoint.dirpath).glob("*.ckpt")):
            raise InputError(
                f"{run_dir} holds a run already; go on with it by --ckpt_path last (if that finds all its checkpoints "
                "damaged, move them away), or choose another --run_dir"
            )
        if self.subcommand not in ("fit", None):
            kwargs["logger"] = loggers_of_a_measurement(trainer["logger"])
        elif trainer["logger"] in (None, True) and not trainer["barebones"]:
            kwargs["logger"] = FaultTolerantTensorBoardLogger(
                run_dir or "runs", name="", version="" if run_dir else None, default_hp_metric=False
            )
        if run_dir:
            kwargs["default_root_dir"] = str(run_dir)
        kwargs["callbacks"] = self._callbacks(trainer)
        if trainer["enable_checkpointing"] is False or trainer["barebones"]:
            # LightningCLI adds the callback in any case, so something else has to stand in its place.
            (self.config_init[self.subcommand] if self.subcommand else self.config_init)["checkpoint"] = L.Callback()
            checkpoint.dirpath = None
        check_precision(trainer["precision"], trainer["accelerator"])
        kwargs["plugins"] = plugins_beside(trainer["precision"], trainer["plugins"])
        check_strategy(trainer["strategy"])
        check_settings(trainer)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError, ModuleNotFoundError, MisconfigurationException) as error:  # do not go together
            raise InputError(" ".join(str(error).split())) from error
        vars(trainer)["run_dir"] = run_dir
        check_trainer(trainer, self.datamodule)
        if self.begin_weights:
            self.model.initial_weights = self.begin_weights
        if resumes:
            self.model.initial_weights = None  # the checkpoint's count, and the folder may be gone by now
            check_world_size(trainer.strategy, Path(resumes), trainer.world_size)
            self._tell_data(Path(resumes), run_dir)
        own_signals(trainer)
        restore_within(trainer, lambda: explain_restore(lambda: trainer.ckpt_path))
        limit_rendezvous(trainer)
        if self.subcommand == "fit" and trainer.is_global_zero:
            for folder in {Path(folder) for folder in (run_dir, checkpoint.dirpath) if folder}:
                lock(folder)  # before anything is written there
        return trainer

    def _tell_data(self, checkpoint: Path, run_dir: Path | None) -> None:
        """Let the data know what the run began with, before it is read."""
        if not isinstance(self.datamodule, TokenDataModule):
            return
        folders = [*checkpoint.absolute().parents[:2], *([run_dir] if run_dir else [])]
        kept = (folder / TOKENIZER for folder in folders if (folder / TOKENIZER / "tokenizer.json").is_file())
        state = read_state(checkpoint)
        self.datamodule.begin_from(state, next(kept, None), training=self.subcommand == "fit", path=checkpoint)
        name = self.datamodule.state_key(state)
        if self.subcommand == "fit" and not isinstance(state.get(name), dict):
            raise incomplete(checkpoint, f"position in the data ({name})")

    def _callbacks(self, trainer: Any) -> list[L.Callback]:
        """Return the callbacks that the user named, and a progress bar. Lightning adds the other defaults."""
        named = trainer["callbacks"] or []
        named = list(named) if isinstance(named, list) else [named]
        if any(isinstance(callback, Checkpoints) for callback in named):
            raise InputError(
                "Checkpoints is among --trainer.callbacks, but every run has it; leave it out there, and set "
                "--checkpoint.every_n_train_steps, keep and dirpath"
            )
        defaults = self.trainer_defaults["callbacks"]
        if trainer["barebones"]:
            defaults = []
        elif trainer["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in named):
            named.append(Progress())
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": defaults_beside(named, defaults)}
        return named


class Settings(CLI):
    """Settings of a run, without a trainer, which would need the devices that they name."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return self._setting("trainer")


class _ParserOnly(CLI):
    """Parsers of the commands, without a run."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.config = Namespace(subcommand=None, seed_everything=False)

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...


def training_parser() -> LightningArgumentParser:
    """Make the parser of Lightning's commands."""
    return _ParserOnly([]).parser


def resolve(flags: list[str]) -> dict[str, Any]:
    """Return the whole configuration that ``fit`` makes of these flags."""
    try:
        with redirect_stdout(io.StringIO()) as printed:
            CLI(["fit", *flags, "--print_config"])
    except SystemExit as stop:
        if stop.code:
            raise
    return yaml.safe_load(printed.getvalue())


def run(args: list[str]) -> None:
    """Run one of Lightning's commands, handling signals and locking the run's directory until it ends."""
    check_private_apis(only_imported=True)
    began = LISTENER.listen()
    try:
        with ExitStack() as guard:
            await_ranks(CLI(args, guard=guard).trainer)
    finally:
        release()
        if began:
            LISTENER.unlisten()
