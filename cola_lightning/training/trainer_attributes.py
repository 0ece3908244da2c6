"""Attributes of Lightning's Trainer that it sets and does not declare, with their types."""

from typing import Any

import lightning as L


def attached_trainer(module: L.LightningModule) -> L.Trainer | None:
    """Return the trainer of a module, or None if the module has no trainer."""
    try:
        return module.trainer
    except RuntimeError:
        return None


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    """Return all callbacks of a trainer."""
    return trainer.callbacks  # type: ignore[attr-defined]


def datamodule_of(trainer: L.Trainer) -> Any:
    """Return the data module of a trainer, or None if it reads plain data loaders."""
    return getattr(trainer, "datamodule", None)


def is_fast_dev_run(trainer: L.Trainer) -> bool:
    """Return whether ``--trainer.fast_dev_run`` is set: the run leaves no files behind."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
