"""The batch that the user states, from the micro-batches that fit on a device."""

import lightning as L

from cola_lightning.errors import InputError


def accumulate(trainer: L.Trainer, global_batch_size: int, batch_size: int) -> None:
    """Let ``trainer`` accumulate gradients so that an optimizer step sees ``global_batch_size`` rows over all devices.

    Lightning counts ``val_check_interval`` in micro-batches; here it is stated in optimizer steps, and scaled, so that
    a run validates at the same steps on any number of devices.

    Raises:
        InputError: If that is no whole number of micro-batches on each device; names the nearest sizes that are.
    """
    replicas = (trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"]
    micro_batches = count_micro_batches(global_batch_size, batch_size, replicas)
    if isinstance(trainer.val_check_interval, int):
        trainer.val_check_interval = trainer.val_check_interval // trainer.accumulate_grad_batches * micro_batches
    trainer.accumulate_grad_batches = micro_batches


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
