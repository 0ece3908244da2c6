"""Make the optimizer and the learning-rate schedule of a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
from torch.optim import Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler

from cola_lightning.distributed.strategies import check_optimizer
from cola_lightning.errors import InputError
from cola_lightning.models import Llama
from cola_lightning.optim import MakeOptimizer, MakeSchedule, Parameters
from cola_lightning.optim.schedules import make_schedule


def make_optimizer_and_schedule(
    trainer: L.Trainer, network: Llama, make_optimizer: MakeOptimizer, make: MakeSchedule
) -> tuple[Optimizer, LRScheduler]:
    """Make the optimizer of ``network``, and its schedule over the ``max_steps`` of ``trainer``.

    Raises:
        InputError: If either refuses its arguments, or the optimizer cannot work with the network or the strategy.
    """
    with _one_line("--model.optimizer"):
        optimizer = make_optimizer(Parameters(network))
    if isinstance(optimizer, SparseAdam):
        raise InputError("--model.optimizer SparseAdam takes sparse gradients, of which there are none; take AdamW")
    check_optimizer(trainer.strategy, optimizer)
    with _one_line("--model.schedule"):
        schedule = make_schedule(make, optimizer, trainer.max_steps)
    return optimizer, schedule


@contextmanager
def _one_line(flag: str) -> Iterator[None]:
    """Put what a constructor says into one line that names its flag."""
    try:
        yield
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:  # such as torch's Muon, which accepts only matrices
        text = " ".join(str(error).split())
        matrices = "; name it for the projections' matrices and another for the rest, as configs/method/muon.yaml does"
        raise InputError(f"{flag}: {text}{matrices if '2D' in text else ''}") from error
