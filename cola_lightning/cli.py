"""What can be typed: Lightning's ``fit``, ``validate``, ``test``, ``predict``, and the verbs that need no Trainer."""

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import ActionConfigFile
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

# Imported so that their classes can be named without a path.
import cola_lightning.data
import cola_lightning.methods  # noqa: F401
from cola_lightning import completion
from cola_lightning.callbacks import Throughput
from cola_lightning.data import prepare
from cola_lightning.errors import InputError
from cola_lightning.module import LanguageModel

USAGE = "cola_lightning {fit,validate,test,predict} [--config FILE] [--NAME VALUE ...]"
MORE_VERBS = (
    "'prepare' tokenises a data set; 'schema' prints a JSON schema of the run files, 'completion SHELL' a completion "
    "script."
)


class ConfigFile(ActionConfigFile):
    """``--config FILE``, where a file may name the one that it builds on under ``config:``, relative to itself.

    jsonargparse by itself accepts such a key too, but replaces whole groups instead of merging them. Here the chain is
    laid out as if each file had been given by a ``--config`` of its own, the foundation first.
    """

    def __call__(self, parser: Any, cfg: Any, values: str, option_string: str | None = None) -> None:
        for file, text in _chain(values):
            try:
                self.apply_config(parser, cfg, self.dest, text)
            except TypeError as error:
                raise TypeError(f"{file}: {error}") from error


def _chain(value: str, seen: tuple[Path, ...] = ()) -> list[tuple[str, str]]:
    """The files that ``value`` builds on and itself, each as its name and its text without the key ``config``."""
    path = Path(value)
    if "\n" in value or not path.is_file():
        return [("settings", value)]  # given as text, or a wrong name, which jsonargparse reports
    if path.resolve() in seen:
        raise TypeError(f"{value} builds on itself, through {' and '.join(map(str, seen))}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TypeError(f"{value} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise TypeError(f"{value} holds no settings; a run file is a mapping such as 'trainer: {{max_steps: 100}}'")
    base = settings.pop("config", None)
    below = _chain(str(path.parent / base), (*seen, path.resolve())) if base else []
    if base and not (path.parent / base).is_file():
        raise TypeError(f"{value} builds on {base}, which is not in {path.parent.resolve()}")
    return [*below, (value, yaml.safe_dump(settings, sort_keys=False))]


class SaveRunConfig(SaveConfigCallback):
    """Writes the whole configuration into the directory of a training run, also of one that is resumed there."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class CLI(LightningCLI):
    """LightningCLI around :class:`LanguageModel`, with what every run has."""

    def __init__(self, args: ArgsType = None) -> None:
        super().__init__(
            LanguageModel,
            L.LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [Throughput()]},
            seed_everything_default=42,
            auto_configure_optimizers=False,
            args=args,
        )

    # -- what can be typed --------------------------------------------------------------------------------------------

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        # A usage line of its own, for the one made from all options buries the error that follows it.
        parser = LightningArgumentParser(usage=USAGE, **kwargs)
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
        self.typed = sys.argv[1:] if args is None else args
        for subparser in self._subcommand_parsers.values():
            subparser.set_defaults({"weights_only": True})  # nothing but tensors and plain data is loaded from a file
        match self.typed:
            case ["schema"]:
                print(json.dumps(completion.json_schema(self._subcommand_parsers["fit"]), indent=1))
                sys.exit()
            case ["completion", shell]:
                print(completion.shell_script(parser, shell))
                sys.exit()
        super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Take from a checkpoint file what the command line and its files are silent about.

        Lightning's own way is the reverse: there, what the checkpoint holds replaces what was typed.
        """
        settings = self.config[self.config.subcommand]
        path = settings.get("ckpt_path")
        if not path or not Path(path).is_file() or not isinstance(self.typed, list):
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
        settings = self.config_init[self.subcommand]
        trainer, run_dir, checkpoint = settings["trainer"], settings["run_dir"], settings["checkpoint"]
        if self.subcommand == "fit" and run_dir and not settings["ckpt_path"] and _checkpoints(run_dir):
            raise InputError(
                f"{run_dir} holds a run already; go on with it by --ckpt_path last, or choose another --run_dir"
            )
        if trainer["logger"] in (None, True):
            kwargs["logger"] = TensorBoardLogger(
                run_dir or "runs", name="", version="" if run_dir else None, default_hp_metric=False
            )
        if run_dir and checkpoint.dirpath is None:
            checkpoint.dirpath = str(Path(run_dir).absolute() / "checkpoints")
        return super().instantiate_trainer(**kwargs)


def _checkpoints(run_dir: str) -> list[Path]:
    return list((Path(run_dir) / "checkpoints").glob("*.ckpt"))


def main(args: ArgsType = None) -> None:
    """Run the command line; ``args`` in place of ``sys.argv`` for use from Python."""
    typed = sys.argv[1:] if args is None else args
    try:
        if isinstance(typed, list) and typed[:1] == ["prepare"]:
            prepare.main(typed[1:])
        else:
            CLI(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
