"""Parse the options of Lightning's commands, and save them with the run."""

from argparse import HelpFormatter
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning_utilities.core.enums import StrEnum
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from cola_lightning.cli.help_pages import common_help
from cola_lightning.cli.parser import Parser
from cola_lightning.models import Projection
from cola_lightning.optim.schedules import open_lengths
from cola_lightning.provenance import run_folder, write_provenance

# Timer has an enum among its defaults, which YAML could not write; then Timer could not be named.
yaml.SafeDumper.add_multi_representer(StrEnum, lambda dumper, value: dumper.represent_str(value.value))


class SaveRunConfig(SaveConfigCallback):
    """Write the whole configuration into the directory of a training run, also when it is resumed.

    Beside it goes what is needed to use and describe the run's checkpoints.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.folder = run_folder(trainer)
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        write_provenance(trainer, self.folder)  # rank 0 alone is here
        config = self.parser.dump(self.config, skip_none=False)
        (self.folder / self.config_filename).write_text(config, encoding="utf-8")


class RunParser(Parser, LightningArgumentParser):
    """Parser of one of Lightning's commands. Its help, ``--help=all``, begins with the options that are used most."""

    command = ""

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        if not self.command:
            return super().format_help(formatter)
        rest = "All options follow. A class's own: --NAME.help CLASS, as in --model.optimizer.help AdamW."
        return f"{common_help(self.command)}{rest}\n\n{super().format_help(formatter)}"

    bases = (L.Callback, L.LightningDataModule, Logger, Optimizer, LRScheduler, Projection)

    def add_class_arguments(self, class_type: type, nested_key: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Add the arguments of a class. The arguments of a schedule that mean the run's length are optional."""
        lengths = (
            open_lengths(class_type, {}) if isinstance(class_type, type) and issubclass(class_type, LRScheduler) else []
        )
        if not lengths:
            return super().add_class_arguments(class_type, nested_key, *args, **kwargs)
        kwargs["skip"] = {*(kwargs.get("skip") or ()), *lengths}
        added = super().add_class_arguments(class_type, nested_key, *args, **kwargs)
        for name in lengths:
            key = f"{nested_key}.{name}" if nested_key else name
            about = "Optimizer steps until its end; those of the run, --trainer.max_steps, if not given."
            self.add_argument(f"--{key}", type=int | None, default=None, help=about)
            added.append(key)
        return added
