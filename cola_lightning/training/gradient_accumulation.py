"""Gradient accumulation: from the micro-batches that fit on a device to the batch that the user states."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, distributed

from cola_lightning.data.packing import add_step_tokens
from cola_lightning.errors import InputError

_SCALED: WeakKeyDictionary[L.Trainer, int] = WeakKeyDictionary()
"""How many micro-batches a step has in the trainers that :func:`accumulate` set; it is called once per ``fit``."""


def accumulate(trainer: L.Trainer, global_batch_size: int, batch_size: int) -> None:
    """Let ``trainer`` accumulate gradients so that an optimizer step sees ``global_batch_size`` rows over all devices.

    Lightning counts ``val_check_interval`` in micro-batches; here it is stated in optimizer steps, and scaled, so that
    a run validates at the same steps on any number of devices.

    Raises:
        InputError: If that is no whole number of micro-batches on each device; names the nearest sizes that are. If
            the trainer was given another number of micro-batches, or a schedule of them.
    """
    replicas = (trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
    micro_batches = count_micro_batches(global_batch_size, batch_size, replicas)
    if trainer not in _SCALED and trainer.accumulate_grad_batches not in (1, micro_batches):
        raise InputError(
            f"--trainer.accumulate_grad_batches {trainer.accumulate_grad_batches} does not go with "
            f"--data.global_batch_size {global_batch_size}, which is {micro_batches} x --data.batch_size {batch_size} "
            f"x {replicas} devices; leave --trainer.accumulate_grad_batches out"
        )
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):
        raise InputError(
            f"GradientAccumulationScheduler changes the batch that --data.global_batch_size {global_batch_size} "
            "states; leave one of them out"
        )
    if isinstance(getattr(trainer, "val_check_interval", None), int):  # absent where it is a length of time
        # What was stated counts optimizer steps, whether or not the accumulation was stated beside the global batch.
        trainer.val_check_interval = trainer.val_check_interval // _SCALED.get(trainer, 1) * micro_batches
    trainer.accumulate_grad_batches = _SCALED[trainer] = micro_batches


def count_micro_batches(global_batch_size: int, batch_size: int, replicas: int) -> int:
    """Micro-batches of ``batch_size`` rows that each of ``replicas`` devices adds to an optimizer step.

    Raises:
        InputError: As :func:`accumulate`.
    """
    together = batch_size * replicas
    micro_batches, left = divmod(global_batch_size, together)
    if left or not micro_batches:
        sizes = [n * together for n in (micro_batches, micro_batches + 1) if n]
        raise InputError(
            f"--data.global_batch_size {global_batch_size} is no multiple of --data.batch_size {batch_size} x "
            f"{replicas} devices; the nearest that are: {' and '.join(map(str, sizes))}; or change --data.batch_size"
        )
    return micro_batches


# -- the tokens of a step ---------------------------------------------------------------------------------------------


def tell_step_tokens(trainer: L.Trainer) -> None:
    """Have every batch that ``trainer`` trains on carry the number of tokens that its optimizer step learns from.

    A loader that fetches whole optimizer steps adds it by itself; its attribute ``batches_per_step`` says how many
    micro-batches it takes for one. Any other is wrapped, after Lightning has set up its sampler.
    """
    strategy = trainer.strategy
    varies = any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks)

    def process_dataloader(loader: Any) -> Any:
        loader = type(strategy).process_dataloader(strategy, loader)
        knows = getattr(loader, "batches_per_step", None) == trainer.accumulate_grad_batches and not varies
        return _WithStepTokens(loader, trainer) if trainer.training and not knows else loader

    strategy.process_dataloader = process_dataloader  # type: ignore[method-assign]


def step_tokens_of_all_ranks(trainer: L.Trainer, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum over all ranks the tokens that an optimizer step learns from; all ranks call it, once a step.

    The sum stays on the device, so the host does not wait for it.

    Raises:
        InputError: If the batch does not tell.
    """
    if "step_tokens" not in batch:
        raise InputError(
            "the batch lacks step_tokens, the number of tokens its optimizer step learns from; train by Trainer.fit, "
            "keep that entry where a hook makes batches anew, or set --model.mean_of_micro_batches true"
        )
    tokens = batch["step_tokens"][0].clone()
    if trainer.world_size > 1:
        distributed.all_reduce(tokens)
    return tokens.clamp_(min=1)


def loss_scale(trainer: L.Trainer) -> int:
    """The factor that undoes the two means which Lightning and the strategy take of a sum of losses.

    Lightning divides the loss by the number of micro-batches that it accumulates, also in a last group that is shorter.
    Every strategy averages gradients over the ranks.
    """
    return trainer.accumulate_grad_batches * trainer.world_size


class _WithStepTokens:
    """A loader whose batches are fetched in whole optimizer steps, each with ``step_tokens``.

    Attributes that Lightning or the user look for (``dataset``, ``sampler``, ``state_dict``) are the loader's own.
    """

    def __init__(self, loader: Any, trainer: L.Trainer) -> None:
        self.loader, self.trainer = loader, trainer

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not there yet, where a copy is being made
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        seen = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        while group := list(islice(batches, self._until_step(seen))):
            seen += len(group)
            learnable = all(isinstance(batch, Mapping) and "labels" in batch for batch in group)
            yield from add_step_tokens(group) if learnable else group

    def _until_step(self, seen: int) -> int:
        """Micro-batches up to the next optimizer step, after ``seen`` of this epoch.

        Example: of 10 batches with 4 accumulated, steps come after 4, 8 and 10, so the groups are 4, 4 and 2.
        """
        accumulate, limit = self.trainer.accumulate_grad_batches, self.trainer.limit_train_batches
        last = min(self.trainer.num_training_batches, limit if isinstance(limit, int) else float("inf"))
        return int(max(1, min(accumulate - seen % accumulate, last - seen)))


def check_last_group(trainer: L.Trainer) -> None:
    """Refuse epochs that end amid an optimizer step where that step would not be what Lightning takes it for.

    Lightning makes a step of the batches that are left, and wrapped loaders are fetched accordingly. This package's
    loaders fetch whole steps only. DeepSpeed counts on into the next epoch, so its steps come apart from those that
    Lightning counts.

    Raises:
        InputError: Names the numbers.
    """
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    if isinstance(trainer.train_dataloader, _WithStepTokens) and not isinstance(trainer.strategy, DeepSpeedStrategy):
        return
    if batches != float("inf") and batches % accumulate:
        raise InputError(
            f"an epoch of {int(batches)} batches is no multiple of the {accumulate} that an optimizer step accumulates;"
            f" change --trainer.limit_train_batches or --trainer.accumulate_grad_batches"
        )


def rescale_progress(progress: dict[str, Any], before: int, now: int) -> None:
    """Count the micro-batches of a checkpoint as they would be with ``now`` of them in a step, not ``before``.

    Lightning makes a step whenever the number of micro-batches is a multiple of those that it accumulates. A run that
    goes on with the same global batch on another number of devices accumulates another number, so without this its
    first step would take too few.

    Args:
        progress: ``epoch_loop.batch_progress`` of the fit loop's state, taken between two steps; changed in place.
    """
    for counts in (progress["current"], progress["total"]):
        ready = counts["ready"]
        if ready % before:
            continue  # epochs that end with a shorter group; only their own count decides when a step is due
        for name, value in counts.items():
            counts[name] = ready // before * now - (ready - value)
