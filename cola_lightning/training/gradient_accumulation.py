"""Gradient accumulation: from the micro-batches that fit on a device to the batch that the user states."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, distributed

from cola_lightning.data.packing import add_step_tokens
from cola_lightning.errors import InputError
from cola_lightning.private_apis.lightning import is_accumulating
from cola_lightning.training.trainer_attributes import callbacks_of
from cola_lightning.training.validation_schedule import count_interval_in_micro_batches

_MICRO_BATCHES: WeakKeyDictionary[L.Trainer, int] = WeakKeyDictionary()
"""Micro-batches of a step in each trainer that :func:`accumulate` has set, because every ``fit`` calls it again."""


def accumulate(trainer: L.Trainer, global_batch_size: int, batch_size: int) -> None:
    """Set ``accumulate_grad_batches`` so that an optimizer step learns from ``global_batch_size`` rows on all devices.

    Args:
        trainer: The trainer; its ``val_check_interval`` is converted from optimizer steps to micro-batches too.
        global_batch_size: Rows of an optimizer step, on all devices.
        batch_size: Rows of a micro-batch, on one device.

    Raises:
        InputError: If the global batch is not a whole number of micro-batches on each device; names the nearest sizes
            that are. If the trainer was given another number of micro-batches, or a schedule of them.
    """
    replicas = (trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
    micro_batches = count_micro_batches(global_batch_size, batch_size, replicas)
    if trainer not in _MICRO_BATCHES and trainer.accumulate_grad_batches not in (1, micro_batches):
        raise InputError(
            f"--trainer.accumulate_grad_batches {trainer.accumulate_grad_batches} does not go with "
            f"--data.global_batch_size {global_batch_size}, which is {micro_batches} x --data.batch_size {batch_size} "
            f"x {replicas} devices; leave --trainer.accumulate_grad_batches out"
        )
    if _has_accumulation_schedule(trainer):
        raise InputError(
            f"GradientAccumulationScheduler changes the batch that --data.global_batch_size {global_batch_size} "
            "states; leave one of them out"
        )
    # The user states the interval in optimizer steps, also if --trainer.accumulate_grad_batches is stated as well. So
    # the interval is in micro-batches only if an earlier ``fit`` of this trainer has converted it.
    count_interval_in_micro_batches(trainer, micro_batches, counted_before=_MICRO_BATCHES.get(trainer, 1))
    trainer.accumulate_grad_batches = _MICRO_BATCHES[trainer] = micro_batches


def count_micro_batches(global_batch_size: int, batch_size: int, replicas: int) -> int:
    """Return the micro-batches of ``batch_size`` rows that each of ``replicas`` devices adds to an optimizer step.

    Example: 512 rows in micro-batches of 16 on 8 devices are 512 / (16 x 8) = 4 micro-batches.

    Raises:
        InputError: If that is not a whole number; names the nearest global batch sizes that are.
    """
    rows = batch_size * replicas
    micro_batches, left = divmod(global_batch_size, rows)
    if left or not micro_batches:
        sizes = [n * rows for n in (micro_batches, micro_batches + 1) if n]
        raise InputError(
            f"--data.global_batch_size {global_batch_size} is no multiple of --data.batch_size {batch_size} x "
            f"{replicas} devices; the nearest that are: {' and '.join(map(str, sizes))}; or change --data.batch_size"
        )
    return micro_batches


# -- the tokens of a step ---------------------------------------------------------------------------------------------


def attach_step_tokens(trainer: L.Trainer) -> None:
    """Add to every training batch the number of tokens that its optimizer step learns from, as ``step_tokens``.

    A loader of this package fetches whole optimizer steps and adds the entry itself; its attribute
    ``batches_per_step`` is the number of micro-batches of a step. Any other loader is wrapped, after Lightning has set
    its sampler up.
    """
    strategy = trainer.strategy
    varies = _has_accumulation_schedule(trainer)

    def process_dataloader(loader: Any) -> Any:
        loader = type(strategy).process_dataloader(strategy, loader)
        adds_them = getattr(loader, "batches_per_step", None) == trainer.accumulate_grad_batches and not varies
        return _WithStepTokens(loader, trainer) if trainer.training and not adds_them else loader

    # Lightning asks the strategy for the loader after it has set the sampler up, and has no hook there. An attribute of
    # the object hides the method of its class.
    vars(strategy)["process_dataloader"] = process_dataloader


def sum_step_tokens(trainer: L.Trainer, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum over all ranks the tokens that an optimizer step learns from; all ranks call this, once a step.

    Args:
        trainer: The trainer.
        batch: The first micro-batch of the step; ``step_tokens`` (B,) holds the same number in each row.

    Returns:
        The sum, at least 1. It stays on the device, so the host does not wait for it.

    Raises:
        InputError: If the batch has no ``step_tokens``.
    """
    if "step_tokens" not in batch:
        raise InputError(
            "the batch lacks step_tokens, the number of tokens its optimizer step learns from; train by Trainer.fit, "
            "keep that entry where a hook makes batches anew, or set --model.mean_of_micro_batches true"
        )
    # A copy, because all_reduce writes into it, and the batch belongs to whoever made it.
    tokens = batch["step_tokens"][0].clone()
    if trainer.world_size > 1:
        distributed.all_reduce(tokens)
    return tokens.clamp_(min=1)


def loss_scale(trainer: L.Trainer) -> int:
    """Return the factor that undoes two divisions of a loss that is a sum.

    Lightning divides the loss by the number of micro-batches of a step, also in a shorter last group of an epoch. Every
    strategy averages gradients over the ranks.
    """
    return trainer.accumulate_grad_batches * trainer.world_size


class _WithStepTokens:
    """Fetch the batches of a loader in whole optimizer steps, and add ``step_tokens`` to each.

    Attributes that Lightning or the user read (``dataset``, ``sampler``, ``state_dict``) are those of the loader.
    """

    def __init__(self, loader: Any, trainer: L.Trainer) -> None:
        self.loader, self.trainer = loader, trainer

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not set yet while a copy is made; without this line, the next one would call itself
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        # A loss is divided by the tokens of the whole step, so all micro-batches of a step are fetched before the first
        # of them is given out.
        batches = iter(self.loader)
        # A run that resumes in the middle of an epoch has seen some batches of it; the loader skips them by itself.
        seen = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        while group := list(islice(batches, self._until_step(seen))):
            seen += len(group)
            learnable = all(isinstance(batch, Mapping) and "labels" in batch for batch in group)
            yield from add_step_tokens(group) if learnable else group

    def _until_step(self, seen: int) -> int:
        """Return the number of micro-batches up to the next optimizer step, after ``seen`` of this epoch.

        Example: in an epoch of 10 batches with 4 in a step, Lightning steps after 4, 8 and 10. So from 0 it is 4, from
        4 it is 4, from 8 it is 2; a run that resumes after 5 batches gets 3.
        """
        # To the end of the step that ``seen`` is in, or of the epoch if that comes first. At least one batch, because a
        # loader may hold more than Lightning expects.
        in_step, limit = self.trainer.accumulate_grad_batches, self.trainer.limit_train_batches
        last = min(self.trainer.num_training_batches, limit if isinstance(limit, int) else float("inf"))
        return int(max(1, min(in_step - seen % in_step, last - seen)))


def check_last_group(trainer: L.Trainer) -> None:
    """Refuse epochs that end within an optimizer step, if the data or the strategy cannot handle that.

    Lightning makes a step of the batches that are left, and :class:`_WithStepTokens` fetches such a shorter group. The
    loaders of this package fetch whole steps only. DeepSpeed goes on counting in the next epoch, so that it steps at
    other batches than Lightning counts.

    Raises:
        InputError: Names the two numbers.
    """
    batches, in_step = trainer.num_training_batches, trainer.accumulate_grad_batches
    if isinstance(trainer.train_dataloader, _WithStepTokens) and not isinstance(trainer.strategy, DeepSpeedStrategy):
        return
    if batches != float("inf") and batches % in_step:
        raise InputError(
            f"an epoch of {int(batches)} batches is no multiple of the {in_step} that an optimizer step accumulates;"
            f" change --trainer.limit_train_batches or --trainer.accumulate_grad_batches"
        )


def rescale_progress(progress: dict[str, Any], before: int, now: int) -> None:
    """Convert the count of micro-batches in a checkpoint from ``before`` per step to ``now`` per step.

    Lightning makes a step whenever the count is a multiple of ``accumulate_grad_batches``. A run that goes on with the
    same global batch on another number of devices accumulates another number of micro-batches, so without a conversion
    its first step would take too few.

    Example: 12 steps of 4 micro-batches are a count of 48; with 2 micro-batches per step they are 24.

    Args:
        progress: ``epoch_loop.batch_progress`` of the fit loop's state, saved between two steps; changed in place.
        before: Micro-batches of a step in the run that wrote the checkpoint.
        now: Micro-batches of a step in this run.
    """
    for counts in (progress["current"], progress["total"]):
        ready = counts["ready"]
        if ready % before:
            continue  # epochs that end with a shorter group: the count since the beginning decides nothing there
        for name, value in counts.items():
            # Counts such as ``completed`` lie one behind ``ready`` within a batch, and keep that distance. Example from
            # 4 to 2 micro-batches: ready 48 becomes 48 // 4 * 2 = 24, and completed 47 becomes 24 - (48 - 47) = 23.
            counts[name] = ready // before * now - (ready - value)


def _has_accumulation_schedule(trainer: L.Trainer) -> bool:
    return any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks_of(trainer))


# -- stopping between two steps ----------------------------------------------------------------------------------------

_STOPPING: WeakSet[L.Trainer] = WeakSet()
"""Trainers that were asked to stop in the middle of an optimizer step, and have not finished it."""


def postpone_stop(trainer: L.Trainer) -> None:
    """Postpone ``trainer.should_stop`` to the end of the optimizer step, if it was set in the middle of one.

    Lightning looks at it after every micro-batch. The gradient accumulated so far would be lost, and a run that
    resumes would not see those rows again, because the position in the data is already behind them.
    """
    if trainer.should_stop and is_accumulating(trainer):
        trainer.should_stop = False
        _STOPPING.add(trainer)


def resume_stop(trainer: L.Trainer) -> None:
    """Set ``trainer.should_stop`` if it was postponed; called when an optimizer step is finished."""
    if trainer in _STOPPING:
        _STOPPING.discard(trainer)
        trainer.should_stop = True
