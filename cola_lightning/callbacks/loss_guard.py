"""Skip optimizer steps with a bad loss or gradient, and roll back to a checkpoint if that does not help."""

import json
import math
import statistics
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import TypedDict

from cola_lightning.errors import InputError, check_at_least
from cola_lightning.loggers import write_text
from cola_lightning.provenance import run_folder
from cola_lightning.stored_data import ALTERED, Count, check_stored
from cola_lightning.training.log_steps import at_log_step
from cola_lightning.training.module import LanguageModel
from cola_lightning.training.rollback import find_checkpoint, restore_checkpoint


class TrainingDivergedError(InputError):
    """Training diverged, and neither skipped steps nor rollbacks helped."""


_Values = TypedDict("_Values", {"loss": list[float], "gradient norm": list[float]})


class _State(TypedDict):
    skipped: Count
    rollbacks: Count
    in_a_row: Count
    good_step: Count
    values: _Values


class LossGuard(L.Callback):
    """Skip an optimizer step if its loss or gradient norm is not finite, or is a spike.

    A skipped step changes neither weights nor optimizer. It counts as a step, so schedule and data move on. After
    ``patience`` skipped steps in a row the run rolls back, within the process, to the last checkpoint before them:
    network, optimizer, schedule and step count are restored, and the data goes on after the bad batches. After
    ``max_rollbacks`` rollbacks the run ends with an error. The loss is the mean over ranks and micro-batches of a step.
    All ranks decide from the same numbers, so they decide alike.

    Every event is a line of ``events.jsonl`` in the run's directory and a text in TensorBoard; ``guard/skipped_steps``
    and ``guard/rollbacks`` are scalars. In an event, ``step`` counts optimizer steps from 1. ``batch`` counts
    micro-batches of a rank from 0, and a rollback does not reset it.

    The host waits for the backward pass once a step, before the update; see recipes/monitoring for the cost. DeepSpeed
    makes its update itself, so no step can be skipped: a loss that is not finite ends the run before the update.

    Args:
        patience: Skipped steps in a row before a rollback.
        max_rollbacks: Most rollbacks of a run.
        loss_deviations: A loss is a spike if it is more than this number of robust standard deviations above the median
            of the last ``window`` good losses. A robust standard deviation is 1.4826 times the median absolute
            deviation, or 1 % of the median if that is more. Null skips only losses that are not finite.
        gradient_norm_deviations: The same for the gradient norm. Null by default, because clipping bounds the effect of
            such a step, and in a healthy run the norm may double within a window, as in warmup.
        window: Number of good steps for the medians. Before there are as many, no step is a spike.

    Raises:
        InputError: If an argument is out of range, or the precision is 16-mixed, which skips steps by itself.
        TrainingDivergedError: During training, after ``max_rollbacks`` rollbacks.
    """

    def __init__(
        self,
        patience: int = 3,
        max_rollbacks: int = 3,
        loss_deviations: float | None = 10.0,
        gradient_norm_deviations: float | None = None,
        window: int = 100,
    ) -> None:
        check_at_least(1, "LossGuard: ", patience=patience)
        check_at_least(0, "LossGuard: ", max_rollbacks=max_rollbacks)
        check_at_least(2, "LossGuard: ", window=window)
        for name, limit in (("loss", loss_deviations), ("gradient_norm", gradient_norm_deviations)):
            if limit is not None and limit <= 0:
                raise InputError(f"LossGuard: {name}_deviations is {limit}; it must be above 0, or null for no limit")
        self.patience, self.max_rollbacks = patience, max_rollbacks
        self.spikes = {
            "loss": Spikes(window, loss_deviations),
            "gradient norm": Spikes(window, gradient_norm_deviations),
        }
        self.skipped = self.rollbacks = self.in_a_row = self.good_step = 0
        self._loss: Tensor | float = 0.0

    def state_dict(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("skipped", "rollbacks", "in_a_row", "good_step")}
        return counts | {"values": {name: list(spikes.values) for name, spikes in self.spikes.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_stored(state_dict, _State, "in the state of LossGuard", ALTERED)
        for name, spikes in self.spikes.items():
            spikes.values.extend(state_dict["values"][name])
        for name in ("skipped", "rollbacks", "in_a_row", "good_step"):
            setattr(self, name, state_dict[name])

    # -- hooks --------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise InputError(
                "LossGuard does not go with --trainer.precision 16-mixed, whose loss scaling overflows on purpose and "
                "skips those steps by itself; use bf16-mixed, or leave LossGuard out"
            )
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            rank_zero_warn("LossGuard cannot skip steps under DeepSpeed; it ends the run if the loss is not finite")
        hooks = cast(LanguageModel, pl_module).before_update
        if self.judge not in hooks:
            hooks.append(self.judge)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.file = run_folder(trainer) / "events.jsonl"  # all ranks call this
        self.good_step = max(self.good_step, trainer.global_step)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._loss = self._loss + loss.detach().float()  # already divided by the number of micro-batches

    def judge(self, module: LanguageModel, optimizer: Optimizer, norm: Tensor | None) -> None:
        """Remove the gradients if this optimizer step must be skipped: optimizers ignore parameters without one."""
        # 1. Loss and gradient norm of this step, the same numbers on all ranks.
        values = torch.stack([torch.as_tensor(value).float() for value in (self._loss, norm) if value is not None])
        self._loss = 0.0
        trainer = module.trainer
        if trainer.world_size > 1:
            values = trainer.strategy.reduce(values, reduce_op="mean")
        seen = dict(zip(self.spikes, values.tolist(), strict=False))  # the host waits for the device here
        # 2. A good step is noted.
        reason = self._reason(seen, skips=norm is not None)
        if reason is None:
            self.in_a_row, self.good_step = 0, trainer.global_step + 1
            for name, value in seen.items():
                self.spikes[name].values.append(value)
            return
        # 3. A bad step is skipped, and recorded.
        event: dict[str, Any] = {
            name.replace(" ", "_"): str(value) if not math.isfinite(value) else value for name, value in seen.items()
        }
        if norm is None:
            self._stop(trainer, f"{reason}, and under DeepSpeed no step can be skipped")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        self.skipped += 1
        self.in_a_row += 1
        if not math.isfinite(seen["loss"]):
            module.train_loss.reset()  # otherwise the next logged mean would not be finite
        self._record(trainer, "skipped", trainer.global_step + 1, reason=reason, in_a_row=self.in_a_row, **event)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.in_a_row < self.patience:
            return
        if self.rollbacks >= self.max_rollbacks:
            self._stop(trainer, f"{self.in_a_row} steps in a row were bad after {self.rollbacks} rollbacks")
        at = trainer.global_step
        try:
            path = find_checkpoint(trainer, self.good_step)
        except InputError as error:
            self._stop(trainer, f"{self.in_a_row} steps in a row were bad, and {error}")
        restore_checkpoint(trainer, path, exclude=LossGuard)
        self.rollbacks += 1
        self.in_a_row = 0
        self.good_step = trainer.global_step
        self._record(
            trainer, "rolled back", at, to_step=trainer.global_step, checkpoint=str(path), times=self.rollbacks
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_log_step(trainer):
            pl_module.log("guard/skipped_steps", float(self.skipped))
            pl_module.log("guard/rollbacks", float(self.rollbacks))

    # -- decisions and records ----------------------------------------------------------------------------------------

    def _reason(self, seen: dict[str, float], skips: bool) -> str | None:
        for name, value in seen.items():
            if not math.isfinite(value):
                return f"the {name} is {value}"
        for name, value in seen.items():
            limit = self.spikes[name].limit() if skips else None
            if limit is not None and value > limit:
                return f"the {name} is {value:.4g}, above the limit of {limit:.4g}"
        return None

    def _record(self, trainer: L.Trainer, event: str, step: int, **facts: Any) -> None:
        batch = trainer.fit_loop.epoch_loop.total_batch_idx
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"time": now, "event": event, "step": step, "batch": batch} | facts
        if trainer.is_global_zero:
            with suppress(OSError):  # a full disk does not end the run; the warning below tells the event
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        text = ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in facts.items())
        rank_zero_warn(f"Step {step} {event} ({text})")
        write_text(trainer, "events", f"step {step} {event} ({text})")

    def _stop(self, trainer: L.Trainer, reason: str) -> None:
        self._record(trainer, "stopped", trainer.global_step, reason=reason)
        raise TrainingDivergedError(
            f"training stopped at step {trainer.global_step}: {reason}. See {self.file}; a lower "
            f"--model.optimizer.lr or --trainer.gradient_clip_val may help, or other settings of LossGuard"
        )


class Spikes:
    """The last ``window`` good values of a number, and the limit above which the next is a spike."""

    def __init__(self, window: int, deviations: float | None) -> None:
        self.values: deque[float] = deque(maxlen=window)
        self.deviations = deviations

    def limit(self) -> float | None:
        """Return the largest value that is not a spike; None before ``window`` values, or without a limit."""
        if self.deviations is None or len(self.values) < (self.values.maxlen or 0):
            return None
        median = statistics.median(self.values)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in self.values)
        return median + self.deviations * max(deviation, 0.01 * abs(median))
