"""Parse the settings of Lightning's commands, and complete them from a checkpoint."""

import os
import sys
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

# Imported so that their classes can be named without a path.
import cola_lightning.data
import cola_lightning.methods  # noqa: F401
from cola_lightning.callbacks import Checkpoints
from cola_lightning.checkpoints import check_named_code, check_sizes, model_settings
from cola_lightning.checkpoints.restore import check_complete
from cola_lightning.cli.checkpoint_choice import check_weights, class_paths, find_checkpoint
from cola_lightning.cli.config_files import ConfigFile
from cola_lightning.cli.merge_settings import differences, merge_settings, stand_ins
from cola_lightning.cli.run_parser import RunParser
from cola_lightning.cli.trainer_flags import check_numbers
from cola_lightning.errors import InputError
from cola_lightning.private_apis.jsonargparse import commands_of
from cola_lightning.training.module import LanguageModel

PATHS = ("run_dir", "ckpt_path", "checkpoint.dirpath", "trainer.default_root_dir")
"""Settings that are paths."""


class RunSettings(LightningCLI):
    """Parse what is typed: the options, the checks of their values, and what a checkpoint adds to them.

    Attributes:
        typed: The command line.
        checkpoint_path: Checkpoint to load; None for none.
        begin_weights: Checkpoint of which a new run takes nothing but the weights.
    """

    _command = ""  # that is typed, which CLI sets before the parsers are made

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning's is static, and calls it so
        """Return the command that is typed; all, if none is. Each command's parser takes 40 ms to make."""
        every = LightningCLI.subcommands()
        return {self._command: every[self._command]} if self._command in every else every

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = RunParser(**kwargs)
        parser.command = "".join((kwargs.get("usage") or "").split()[1:2])
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
        parser.add_argument(
            "--trust",
            type=list[str],
            default=[],
            help="Classes, or packages, of which a checkpoint may name code, besides this package, torch.optim and "
            "torch.nn. What the command line and its configs name themselves is trusted.",
        )
        parser.add_argument(
            "--weights_only_start",
            type=bool,
            default=False,
            help="Begin a new run with the weights of --ckpt_path, at step 0 and with a fresh optimizer, and take "
            "nothing else from it; for checkpoints that hold no more than weights.",
        )
        parser.add_argument(
            "--allow_nan",
            type=bool,
            default=False,
            help="Take a checkpoint whose weights hold NaN or infinity, which is refused otherwise.",
        )
        parser.add_lightning_class_args(Checkpoints, "checkpoint")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        if not isinstance(args, list | None):
            raise TypeError(f"args must be a list of texts, not {type(args).__name__}")
        self.typed: list[str] = sys.argv[1:] if args is None else args
        for subparser in commands_of(parser).values():
            subparser.set_defaults({"weights_only": True})  # nothing but tensors and plain data is loaded from a file
        self.config = self._parse(self.typed)
        seed = (self.config.get(self.config.get("subcommand") or "") or self.config).get("seed_everything")
        if type(seed) is int and not 0 <= seed < 2**32:
            raise InputError(f"--seed_everything is {seed}; it must lie between 0 and {2**32 - 1}")
        command = self.config.get("subcommand")
        for group in ("trainer", "model", "checkpoint") if command else ():
            if not isinstance(
                self.config[command].get(group), Namespace
            ):  # jsonargparse takes a number, and fails later
                raise InputError(f"--{group} is {self.config[command].get(group)!r}; it must be a mapping of settings")
        check_numbers((self.config[command] if command else self.config).as_dict())
        if command and self.config[command].get("weights_only", True) is not True:
            raise InputError(
                "--weights_only is fixed: a checkpoint holds tensors and plain data, and nothing else is loaded; leave "
                "the option away"
            )
        self._choose_checkpoint()
        self._hide_checkpoint()

    def _parse(self, args: list[str]) -> Namespace:
        """Parse a command line, with ~ in its paths, which a shell leaves in ``--run_dir=~/runs`` and in a config."""
        config = self.parser.parse_args(args)
        settings = config.get(config.get("subcommand") or "") or config
        for name in PATHS:
            if isinstance(path := settings.get(name), str) and path.startswith("~"):
                settings[name] = os.path.expanduser(path)  # which leaves what it cannot expand
        return config

    def _choose_checkpoint(self) -> None:
        """Find the checkpoint that is meant, look whether it can be trusted, and take from it what the command line and
        its files are silent about.

        Lightning does the reverse: there, what the checkpoint holds replaces what was typed. It does so between
        ``parse_arguments`` and ``before_instantiate_classes``, so ``ckpt_path`` is hidden from it in between.
        """
        self.begin_weights: str | None = None
        config = self.config.get("subcommand") and self.config[self.config.subcommand]
        if not config:
            return
        if config.weights_only_start and not (self.config.subcommand == "fit" and config.get("ckpt_path")):
            raise InputError("--weights_only_start begins a run, by fit, with the weights of --ckpt_path; name one")
        if not config.get("ckpt_path"):
            return
        path = find_checkpoint(config, self.config.subcommand)
        config["ckpt_path"] = path and str(path)
        if path is None:
            return
        if self.config.subcommand == "fit" and not config.weights_only_start:
            check_complete(path)
        if not config.allow_nan and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            check_weights(path)
        stored = model_settings(path)
        check_sizes(stored, path)
        trusted = [*config.trust, *class_paths(config.as_dict())]
        stored = check_named_code(stored, LanguageModel, path, trusted)
        merged = merge_settings(stored, self._typed_settings(), stand_ins().values())
        self.config = self._parse([*self.typed, "--config", yaml.safe_dump({"model": merged})])
        self.config[self.config.subcommand]["ckpt_path"] = None if config.weights_only_start else str(path)
        self.begin_weights = str(path) if config.weights_only_start else None
        model = yaml.safe_load(self.parser.dump(self.config, skip_none=False))[self.config.subcommand]["model"]
        for place, old, new in differences(stored, model):
            if place == "optimizer" and self.config.subcommand == "fit" and not config.weights_only_start:
                raise InputError(
                    f"--model.optimizer is {new}, but {path} holds the state of {old}; go on with that one, or begin a "
                    "new run with its weights, by --weights_only_start true"
                )
            rank_zero_warn(f"--model.{place} is {new} now; in {path} it was {old}")

    def _hide_checkpoint(self) -> None:
        """Keep ``ckpt_path`` aside until ``before_instantiate_classes`` puts it back."""
        self.checkpoint_path: str | None = None
        if command := self.config.get("subcommand"):
            self.checkpoint_path, self.config[command]["ckpt_path"] = self.config[command].get("ckpt_path"), None

    def _typed_settings(self) -> dict[str, Any]:
        """Return the settings of the model that the command line and its files state, without defaults."""
        command = self.typed.index(self.config.subcommand) + 1
        classes = {"model": {key: {"class_path": name} for key, name in stand_ins().items()}}
        below = ["--config", yaml.safe_dump(classes)]
        typed = self.parser.parse_args([*self.typed[:command], *below, *self.typed[command:]], defaults=False)
        return typed[self.config.subcommand].as_dict()["model"]
