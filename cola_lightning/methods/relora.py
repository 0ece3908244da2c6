"""ReLoRA (arXiv 2307.05695): LoRA that merges its branch into the frozen weight at intervals and restarts it.

``y = W x + s B A x``, s = α / R. Every ``merge_every`` steps, in :class:`ReLoRACallback`:

    W <- W + s B A,    A <- U(±1/√in),    B <- 0,    and most of the optimizer's moments of A and B are set to zero.

The learning rate must restart at each merge, from zero up to the underlying cosine
(:class:`~cola_lightning.optim.WarmupCosineRestarts`). Without that, resetting the moments diverges in the paper's
ablation. As in the reference implementation (Guitaricet/relora 176f376), a merge follows the first step of a cycle,
whose learning rate is zero. Differences from the reference:

- The reference chooses for each moment separately which entries stay. Here both moments of an entry stay or go
  together, because an entry that keeps its first moment and loses its second moves by ``lr m / eps``. See ``mask``.
- If the reference keeps the original weights, A starts at zero like B, and neither gets a gradient before the first
  merge. Here A starts at random.
- The reference can train the scale s. Here s is fixed.
- The reference starts from a network that was trained in full for some thousand steps. The tables of the GaLore paper,
  and this repository, start from scratch.

Under FSDP2 a rank adds its rows of B times A to its rows of W. So a merge sends A (R, in), and a reset by magnitude
also the moments of A and B. No matrix W is gathered.

A merge rounds once, to the dtype of W. With ``precision: bf16-true``, the part of ``s B A`` below 2⁻⁹ of an entry of W
is lost.
"""

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cola_lightning.errors import InputError, check_at_least
from cola_lightning.methods.arguments import check_choice
from cola_lightning.methods.lora import LoRA
from cola_lightning.methods.post_step import PostStepCallback, schedule_cycle
from cola_lightning.optim.rows import local, own_rows, whole


class ReLoRA(LoRA):
    """``W x + s B A dropout(x)``, for use with the callback :class:`ReLoRACallback`.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        rank: Width R of the trained branch.
        alpha: s = alpha / R.
        dropout: Share of the inputs of the trained branch that a training step drops. With the callback ``StepSeed``
            a resumed run drops the same inputs.

    Raises:
        InputError: If the rank or the dropout is out of range.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, alpha: float = 32.0, dropout: float = 0.1
    ) -> None:
        super().__init__(in_features, out_features, rank, alpha, dropout)

    @torch.no_grad()
    def merge(self, draw: torch.Generator) -> None:
        """Add the branch to W and restart it, drawing A by ``draw``; the output stays the same."""
        # Under FSDP2 a rank has the same rows of W and B, so that of each merge only A is sent.
        local(self.weight).addmm_(local(self.B) * self.scale, whole(self.A))
        local(self.A).copy_(self.new_a(draw)[own_rows(self.A)])
        local(self.B).zero_()

    def new_a(self, draw: torch.Generator) -> Tensor:
        """Draw a new A (R, in) from U(±1/√in)."""
        bound = self.A.shape[1] ** -0.5
        drawn = torch.empty(self.A.shape, dtype=torch.promote_types(self.A.dtype, torch.float32))
        return drawn.uniform_(-bound, bound, generator=draw)


class ReLoRACallback(PostStepCallback[ReLoRA]):
    """Merge the branches and reset the moments of A and B, once a cycle.

    Both happen after the first step of a cycle, whose learning rate is zero: with ``merge_every`` 1000, after the steps
    1001, 2001, and so on. What that step adds to the moments is pruned with the rest.

    Args:
        merge_every: Optimizer steps between merges; the schedule's ``cycle_steps`` if not given.
        reset: Which entries of the moments are set to zero: a ``random`` share; by ``magnitude`` the share that is
            smallest in absolute value in the first moment; or ``none``.
        prune_ratio: That share, from 0 to 1. The reference has 0.999 for a reset, and 0.8 to 0.99 for pruning.
        mask: ``shared`` chooses once for both moments of a factor. ``independent`` chooses for each moment separately,
            as the reference does. Entries of A that keep only their first moment then jump: B is zero after a merge,
            so A has no gradient to refill the second moment, and the step is ``lr m / eps``. The training loss rises.
        seed: Seed of the random choices; the seed of the run if not given.

    Raises:
        InputError: If an argument is out of range; before training starts, under a strategy that flattens weights.
    """

    projection_class = ReLoRA

    def __init__(
        self,
        merge_every: int | None = None,
        reset: Literal["random", "magnitude", "none"] = "random",
        prune_ratio: float = 0.999,
        mask: Literal["shared", "independent"] = "shared",
        seed: int | None = None,
    ) -> None:
        super().__init__(seed)
        check_at_least(1, "ReLoRACallback: ", merge_every=merge_every)
        if not 0 <= prune_ratio <= 1:
            raise InputError(f"ReLoRACallback: prune_ratio is {prune_ratio}; it must lie between 0 and 1")
        check_choice("ReLoRACallback", "reset", reset, "random", "magnitude", "none")
        check_choice("ReLoRACallback", "mask", mask, "shared", "independent")
        self.merge_every = merge_every
        self.reset, self.prune_ratio, self.mask = reset, prune_ratio, mask

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.merge_every is None:
            self.merge_every = schedule_cycle(trainer, "ReLoRACallback: merge_every")

    def after_step(self, trainer: L.Trainer, step: int) -> None:
        assert self.merge_every is not None  # on_fit_start took it from the schedule
        # Step 1001 with merge_every 1000: 1000 steps are full cycles, and the step just made was the first of the next.
        full = step - 1
        if not full or full % self.merge_every:
            return
        for index, projection in enumerate(self.projections):
            draw = self.draw(step, index)
            projection.merge(draw)
            if self.reset != "none":
                for factor in (projection.A, projection.B):
                    self.prune(moments(self.optimizer, factor), draw)

    def prune(self, found: list[Tensor], draw: torch.Generator) -> None:
        """Set a share of the entries of one factor's moments ``found`` to zero."""
        kept = None
        for moment in found:
            if kept is None or self.mask == "independent":
                kept = self.kept(moment, draw)
            local(moment).mul_(kept)

    def kept(self, moment: Tensor, draw: torch.Generator) -> Tensor:
        """Choose the entries that stay: a boolean tensor of the shape of this rank's part of the moment.

        All ranks draw, or compare, the entries of the whole moment.
        """
        if self.reset == "random":
            kept = torch.rand(moment.shape, generator=draw) >= self.prune_ratio
        else:
            kept = kept_by_magnitude(whole(moment), self.prune_ratio)
        return kept[own_rows(moment)].to(moment.device)


def moments(optimizer: Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """List the optimizer's state tensors of a parameter's shape: for Adam the first and the second moment."""
    state: dict[str, Any] = optimizer.state.get(parameter, {})
    return [value for value in state.values() if isinstance(value, Tensor) and value.shape == parameter.shape]


def kept_by_magnitude(moment: Tensor, ratio: float) -> Tensor:
    """Choose the entries whose absolute value is above the ``ratio`` quantile, as the reference does.

    The quantile is at position ``ratio (n - 1)`` of the n sorted values, and the values up to it are dropped. Example:
    ratio 0.8 and n = 512 give position 408.8, so the 409 smallest are dropped. At ratio 0 none is.
    """
    kept = torch.ones_like(moment, dtype=torch.bool)
    if ratio > 0:
        # The small term corrects rounding: 0.7 * 10 is 6.999... in floating point.
        count = int(ratio * (moment.numel() - 1) + 1e-6) + 1
        kept.view(-1)[moment.abs().flatten().topk(count, largest=False).indices] = False
    return kept
