"""What can be typed: Lightning's ``fit``, ``validate``, ``test``, ``predict``, and the verbs that need no Trainer."""

import io
import json
import sys
from argparse import ArgumentParser
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

# Imported so that their classes can be named without a path.
import cola_lightning.data
import cola_lightning.methods  # noqa: F401
from cola_lightning import benchmark, compare, completion
from cola_lightning.callbacks import Ledger, Predictions, Progress, Throughput
from cola_lightning.config_files import ConfigFile
from cola_lightning.data import prepare
from cola_lightning.errors import InputError
from cola_lightning.module import LanguageModel

USAGE = "[--config FILE] [--NAME VALUE ...]"
MORE_VERBS = (
    "Besides: 'prepare' tokenises a data set beforehand, 'benchmark --config FILE [--json FILE]' measures a training "
    "step, 'compare --config FILE' trains several methods side by side, 'schema' prints a JSON schema of the run "
    "files, and 'completion SHELL' a completion script."
)


class SaveRunConfig(SaveConfigCallback):
    """Writes the whole configuration into the directory of a training run, also of one that is resumed there."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class CLI(LightningCLI):
    """LightningCLI around :class:`LanguageModel`, with what every run has."""

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        super().__init__(
            LanguageModel,
            L.LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "callbacks": [Throughput(), Ledger(), Predictions()],
                "max_epochs": -1,  # runs are counted in steps; an epoch is what is left of the run
                "enable_model_summary": False,  # the module tells the network's size; the metrics have none
            },
            seed_everything_default=42,
            auto_configure_optimizers=False,
            # A usage line of its own, for the one made from all options buries the error that follows it.
            parser_kwargs={verb: {"usage": f"cola_lightning {verb} {USAGE}"} for verb in self.subcommands()},
            args=args,
            run=run,
        )

    # -- what can be typed --------------------------------------------------------------------------------------------

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = LightningArgumentParser(**kwargs)
        parser.description = f"{parser.description or ''} {MORE_VERBS}".strip()
        parser.add_argument(
            "-c", "--config", action=ConfigFile, help="YAML file; may be given several times, later ones win."
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Directory of the run: its events, checkpoints and configuration. Without it, runs/version_0, 1, …",
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.typed = args
        for subparser in getattr(self, "_subcommand_parsers", {}).values():
            subparser.set_defaults({"weights_only": True})  # nothing but tensors and plain data is loaded from a file
        match args:
            case ["schema"]:
                print(json.dumps(completion.json_schema(self._subcommand_parsers["fit"]), indent=1))
                sys.exit()
            case ["completion", shell]:
                print(completion.shell_script(parser, shell))
                sys.exit()
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Take from a checkpoint file what the command line and its files are silent about.

        Lightning's own way is the reverse: there, what the checkpoint holds replaces what was typed.
        """
        path = self.config.get("subcommand") and self.config[self.config.subcommand].get("ckpt_path")
        if not path or not Path(path).is_file():
            return
        stored = torch.load(path, map_location="cpu", mmap=True, weights_only=True).get("hyper_parameters", {})
        stored = {key: value for key, value in stored.items() if not key.startswith("_")}
        verb = self.typed.index(self.config.subcommand) + 1
        below = ["--config", yaml.safe_dump({"model": stored})]
        self.config = self.parser.parse_args([*self.typed[:verb], *below, *self.typed[verb:]])
        model = yaml.safe_load(self.parser.dump(self.config, skip_none=False))[self.config.subcommand]["model"]
        for key, old in stored.items():
            if model.get(key) != old:
                rank_zero_warn(f"--model.{key} is {model.get(key)} now; in {path} it was {old}")

    # -- what is made of it -------------------------------------------------------------------------------------------

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer, run_dir = self._get(self.config_init, "trainer"), self._get(self.config_init, "run_dir")
        checkpoint = self._get(self.config_init, "checkpoint")
        if run_dir and checkpoint.dirpath is None:
            checkpoint.dirpath = str(Path(run_dir).absolute() / "checkpoints")
        resumes = self._get(self.config_init, "ckpt_path")
        if self.subcommand == "fit" and run_dir and not resumes and list(Path(checkpoint.dirpath).glob("*.ckpt")):
            raise InputError(
                f"{run_dir} holds a run already; go on with it by --ckpt_path last, or choose another --run_dir"
            )
        if trainer["logger"] in (None, True):
            kwargs["logger"] = TensorBoardLogger(
                run_dir or "runs", name="", version="" if run_dir else None, default_hp_metric=False
            )
        callbacks = trainer["callbacks"] or []
        if trainer["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            kwargs["callbacks"] = [*callbacks, Progress()]
        return super().instantiate_trainer(**kwargs)


def measure(args: list[str]) -> None:
    """The verb ``benchmark``: options of its own, then those of ``fit``."""
    parser = ArgumentParser("cola_lightning benchmark", allow_abbrev=False, description=benchmark.__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the result there too")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    options, rest = parser.parse_known_args(args)
    cli = CLI(rest, run=False)
    data = cli.datamodule
    result = benchmark.benchmark(cli.trainer, cli.model, data.batch_size, data.sequence_length, options.steps)
    benchmark.report(result, options.json)


def resolve(flags: list[str]) -> dict[str, Any]:
    """The whole configuration that ``fit`` makes of these flags."""
    try:
        with redirect_stdout(io.StringIO()) as printed:
            CLI(["fit", *flags, "--print_config"])
    except SystemExit as stop:
        if stop.code:
            raise
    return yaml.safe_load(printed.getvalue())


def main(args: list[str] | None = None) -> None:
    """Run the command line; ``args`` in place of ``sys.argv[1:]`` for use from Python."""
    args = sys.argv[1:] if args is None else args
    try:
        match args:
            case ["benchmark", *rest]:
                measure(rest)
            case ["prepare", *rest]:
                prepare.main(rest)
            case ["compare", *rest]:
                compare.main(rest, resolve)
            case _:
                CLI(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
