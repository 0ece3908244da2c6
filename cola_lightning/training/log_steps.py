"""When a run logs: after every ``--trainer.log_every_n_steps`` optimizer steps."""

import lightning as L

from cola_lightning.private_apis.lightning import is_accumulating


def at_log_step(trainer: L.Trainer, uncounted: int = 0) -> bool:
    """Return whether the trainer logs the optimizer step that was just made.

    Args:
        trainer: The trainer.
        uncounted: 1 inside the step itself, because the trainer counts it only when it returns.
    """
    step = trainer.global_step + uncounted
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # 0 for never, as under --trainer.barebones
    return every > 0 and step % every == 0 and not is_accumulating(trainer)
