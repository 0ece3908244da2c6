"""Hyper-parameters and results of a run, for TensorBoard's HParams tab."""

from typing import Any, cast

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams
from typing_extensions import TypedDict

from cola_lightning.private_apis.lightning import logged_step
from cola_lightning.private_apis.torch import event_writer
from cola_lightning.stored_data import ALTERED, check_stored
from cola_lightning.training.module import LanguageModel

PERPLEXITY, BEST = "val/perplexity", "val/perplexity_best"
METRICS = (PERPLEXITY, BEST, "val/perplexity_as_published", "train/loss")
TRAINER = ("max_steps", "gradient_clip_val", "accumulate_grad_batches", "precision", "world_size")
DATA = ("batch_size", "global_batch_size", "sequence_length")
# TensorBoard lists only hyper-parameters that the first run has. A full-rank run has no rank, and would hide it.
LISTED = {"projection.rank": 0.0, "callbacks": ""}


class _State(TypedDict):
    best: float


class HyperParameters(L.Callback):
    """Write the run's hyper-parameters and validation perplexities, latest and best, to TensorBoard's HParams tab.

    After each validation ``val/perplexity_best`` is logged.
    """

    def __init__(self) -> None:
        self.best = float("inf")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_stored(state_dict, _State, "in the state of HyperParameters", ALTERED)
        self.best = state_dict["best"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = hyper_parameters(trainer, cast(LanguageModel, pl_module))
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, TensorBoardLogger):
                # The tab takes names from here, and for each metric the latest value that is logged under its name.
                experiment, _, _ = hparams(LISTED | values, dict.fromkeys(METRICS, 0.0))
                _, start, _ = hparams(values, {})
                writer = event_writer(logger.experiment)
                writer.add_summary(experiment)
                writer.add_summary(start)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        value = trainer.callback_metrics.get(PERPLEXITY)
        if value is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.best = min(self.best, float(value))
        for logger in trainer.loggers:
            logger.log_metrics({BEST: self.best}, step=logged_step(trainer))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if isinstance(logger, TensorBoardLogger):
                event_writer(logger.experiment).add_summary(hparams({}, {})[2])  # the run is complete


def hyper_parameters(trainer: L.Trainer, module: LanguageModel) -> dict[str, int | float | str]:
    """Return settings that decide the result, by flat names (``projection``: CoLA, ``projection.rank``: 128).

    They are the arguments of the model, and some settings of trainer and data. Factories that Python code passed to the
    model have no names, and are left out.
    """
    data = getattr(trainer, "datamodule", None)
    values = _flat(dict(module.hparams))
    values["parameters"] = module.parameter_count
    values |= {name: getattr(trainer, name) for name in TRAINER}
    transforms = (getattr(transform, "__self__", transform) for transform in module.transforms)
    values["callbacks"] = " ".join(type(owner).__name__ for owner in transforms) or None
    values["strategy"] = type(trainer.strategy).__name__.removesuffix("Strategy")
    if data is not None:
        values["data"] = type(data).__name__.removesuffix("DataModule")
        values |= {name: getattr(data, name, None) for name in DATA}
    return {name: _plain(value) for name, value in values.items() if value is not None}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings, without the names ``class_path`` and ``init_args``, which tell a reader nothing."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if key.startswith("_"):
            continue
        if hasattr(value, "items"):
            value = dict(value)
            if "class_path" in value:
                flat[name] = value["class_path"].rpartition(".")[2]
                value = dict(value.get("init_args") or {})
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _plain(value: Any) -> int | float | str:
    if isinstance(value, bool):
        return str(value).lower()  # TensorBoard shows a bool as a number
    return value if isinstance(value, int | float | str) else str(value)
