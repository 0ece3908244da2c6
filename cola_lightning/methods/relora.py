"""ReLoRA (arXiv 2307.05695): LoRA whose branch is merged into the frozen weight again and again, and started afresh.

``y = W x + s B A x``, s = α / R. Every ``merge_every`` steps, in :class:`ReLoRACallback`:

    W <- W + s B A,    A <- U(±1/√in),    B <- 0,    and most of the optimizer's moments of A and B are set to zero.

The learning rate has to restart with it, from zero up to the underlying cosine
(:class:`~cola_lightning.optim.WarmupCosineRestarts`): without that, resetting the moments diverges in the paper's
ablation. As in the reference implementation (Guitaricet/relora 176f376), a merge comes after the first step of a cycle,
whose rate is zero. Different here:

- The reference draws or chooses for each moment apart which entries stay. Here both moments of an entry stay or go
  together, because an entry that keeps its first moment and loses its second moves by ``lr m / eps``. See ``mask``.

- In the reference, where the original weights are kept, A starts at zero like B. Neither then gets a gradient before
  the first merge. Here A starts at random; ``initial_a: zero`` is the reference's way.
- The reference's trained scale is set to zero at a merge, where B is zero too. Neither then gets a gradient ever again.
  Here it goes back to its first value.
- The reference starts from a network that was trained in full for some thousand steps. The tables that GaLore's paper
  began, and this repository, start from scratch.

A merge rounds once, to the dtype of W. With ``precision: bf16-true`` that loses what of ``s B A`` is below 2⁻⁹ of an
entry of W.
"""

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cola_lightning.errors import InputError
from cola_lightning.methods.lora import LoRA
from cola_lightning.methods.post_step import PostStepCallback, generator, schedule_cycle


class ReLoRA(LoRA):
    """``W x + s B A dropout(x)``; to be used with the callback :class:`ReLoRACallback`.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: Width R of the trained branch.
        alpha: s = alpha / R.
        dropout: Share of the inputs of the trained branch that a training step drops. With the callback ``StepSeed``
            the drawing is the same when a run is resumed.
        trainable_scale: s = tanh(t) with one trained t for each matrix, which starts at 1, in place of alpha / R.
        initial_a: ``kaiming`` starts A as U(±1/√in), as after each merge. ``zero`` is what the reference does: the
            branch then learns nothing before the first merge.

    Raises:
        InputError: If the rank or the dropout is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float = 32.0,
        dropout: float = 0.1,
        trainable_scale: bool = False,
        initial_a: Literal["kaiming", "zero"] = "kaiming",
    ) -> None:
        self.initial_a = initial_a
        super().__init__(in_features, out_features, rank, alpha, dropout, trainable_scale)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.initial_a == "zero":
            nn.init.zeros_(self.A)

    @torch.no_grad()
    def merge(self, draw: torch.Generator) -> None:
        """Add the branch to W and start it afresh, with ``draw`` on the CPU; the function stays what it was."""
        self.weight.addmm_(self.B * self.scale(), self.A)
        self.A.copy_(self.new_a(draw))
        self.B.zero_()
        if self.trained_scale is not None:
            self.trained_scale.fill_(1)

    def new_a(self, draw: torch.Generator) -> Tensor:
        """Draw A anew, (R, in), from U(±1/√in)."""
        bound = self.A.shape[1] ** -0.5
        return torch.empty(self.A.shape).uniform_(-bound, bound, generator=draw)


class ReLoRACallback(PostStepCallback):
    """Merges, and resets the moments of A and B.

    Both happen after the first step of a cycle, the one at learning rate zero: with ``merge_every`` 1000 after the
    steps 1001, 2001, and so on. What that step adds to the moments is then pruned with the rest.

    Args:
        merge_every: Optimizer steps between merges; the schedule's ``cycle_steps`` if not given.
        reset_every: Optimizer steps between resets of the moments; ``merge_every`` if not given.
        reset: Which entries of the moments are set to zero: a ``random`` share; by ``magnitude`` the share that is
            smallest in absolute value in the first moment; or ``none``. All of them at prune_ratio 1.
        prune_ratio: That share, from 0 to 1. The reference: 0.999 where it speaks of a reset; 0.8 to 0.99 else.
        mask: ``shared`` chooses once for both moments of a factor. ``independent`` chooses for each moment apart, as
            the reference does. Entries of A whose first moment alone survives then jump: B is zero after a merge, so
            A has no gradient to refill the second moment, and the step is ``lr m / eps``. The training loss suffers.
        seed: Of what is drawn; that of the run if not given.

    Raises:
        InputError: If an argument is out of range; before training starts, under a strategy that shards weights.
    """

    projection_class = ReLoRA

    def __init__(
        self,
        merge_every: int | None = None,
        reset_every: int | None = None,
        reset: Literal["random", "magnitude", "none"] = "random",
        prune_ratio: float = 0.999,
        mask: Literal["shared", "independent"] = "shared",
        seed: int | None = None,
    ) -> None:
        super().__init__(seed)
        for name, value in (("merge_every", merge_every), ("reset_every", reset_every)):
            if value is not None and value < 1:
                raise InputError(f"ReLoRACallback: {name} is {value}; it must be at least 1")
        if not 0 <= prune_ratio <= 1:
            raise InputError(f"ReLoRACallback: prune_ratio is {prune_ratio}; it must lie between 0 and 1")
        self.merge_every, self.reset_every = merge_every, reset_every
        if reset not in ("random", "magnitude", "none"):
            raise InputError(f"ReLoRACallback: reset is {reset}; it must be random, magnitude or none")
        if mask not in ("shared", "independent"):
            raise InputError(f"ReLoRACallback: mask is {mask}; it must be shared or independent")
        self.reset, self.prune_ratio, self.mask = reset, prune_ratio, mask

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.merge_every is None:
            self.merge_every = schedule_cycle(trainer, "ReLoRACallback: merge_every")

    def after_step(self, trainer: L.Trainer, step: int) -> None:
        full = step - 1  # steps of the cycles that are over; the schedule's rate was zero in the step just made
        every: int = self.merge_every  # type: ignore[assignment]  # known since the start
        for index, projection in enumerate(self.projections):
            draw = generator(self.seed, step, index)
            if full and full % every == 0:
                projection.merge(draw)
            if full and full % (self.reset_every or every) == 0 and self.reset != "none":
                for factor in (projection.A, projection.B):
                    self.prune(moments(self.optimizer, factor), draw)

    def prune(self, found: list[Tensor], draw: torch.Generator) -> None:
        """Set a share of the entries of a factor's moments to zero."""
        kept = None
        for moment in found:
            if kept is None or self.mask == "independent":
                kept = self.kept(moment, draw)
            moment.mul_(kept)

    def kept(self, moment: Tensor, draw: torch.Generator) -> Tensor:
        """Choose the entries that stay, a boolean tensor of the moment's shape."""
        if self.reset == "random":
            return (torch.rand(moment.shape, generator=draw) >= self.prune_ratio).to(moment.device)
        return kept_by_magnitude(moment, self.prune_ratio)


def moments(optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """What the optimizer keeps for a parameter entry by entry, in its order: for Adam the two moments."""
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    return [value for value in state.values() if isinstance(value, Tensor) and value.shape == parameter.shape]


def kept_by_magnitude(moment: Tensor, ratio: float) -> Tensor:
    """Choose the entries whose absolute value is above the ``ratio`` quantile of all, as the reference does.

    The quantile lies at position ``ratio (n - 1)`` of the n sorted values, and those up to it go: at ratio 0.8 and
    n = 512, position 408.8, the 409 smallest. At ratio 0 none goes.
    """
    kept = torch.ones_like(moment, dtype=torch.bool)
    if ratio > 0:
        # The small term makes a product such as 0.7 * 10 = 6.999... count as the whole number that it means.
        count = int(ratio * (moment.numel() - 1) + 1e-6) + 1
        kept.view(-1)[moment.abs().flatten().topk(count, largest=False).indices] = False
    return kept
