"""SwitchLoRA (arXiv 2406.06564): LoRA that exchanges single vectors of its factors, a few at almost every step.

``y = W x + (α / R) Σ_k b_k (a_kᵀ x)`` with W frozen; a_k and b_k are rows of A (R, in) and B (R, out). Every projection
has a pool of N = min(in, out) candidate vectors for each factor. To exchange a_k for a candidate c, in
:class:`SwitchLoRACallback`,

    W <- W + (α / R) b_k (a_k - c)ᵀ,    a_k goes into the pool,    a_k <- c,

which leaves the output unchanged. Then the counterpart b_k loses its moments and its step counter and is held (gets no
update) for some steps, because they belong to the old a_k. The same is done with a and b exchanged.

Initialization, rate, order and constants are those of the reference implementation (asfsdsf/SwitchLoRA), whose α is 1.
Differences from it:

- Vectors are exchanged after an optimizer step rather than before the next one. The function and the vectors' gradients
  are the same at both places. Only the norm for clipping differs, because it includes the gradient of a held vector
  for its new counterpart. No exchange precedes the first step.
- Weight decay does not move a held vector.
- Candidates are drawn when training starts, from the seed and the projection's index.

An exchange rounds once, to the dtype of W. With ``precision: bf16-true`` these roundings add up over a run.
"""

import math
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from typing_extensions import TypedDict

from cola_lightning.errors import InputError
from cola_lightning.methods.arguments import check_rank
from cola_lightning.methods.post_step import PostStepCallback
from cola_lightning.models.projection import Projection
from cola_lightning.optim.row_adamw import RowAdamW
from cola_lightning.stored_data import ALTERED, Count, check_stored


class SwitchLoRA(Projection):
    """``W x + (α / R) Bᵀ A x`` with A (R, in), B (R, out) trained and W (out, in) frozen, for use with
    :class:`SwitchLoRACallback`.

    A and B are initialized uniformly with the paper's standard deviations, (√m R / n^1.5)^¼ √g and (R / √(mn))^¼ √g
    with g = 1/√3. W is N(0, 0.02²) minus the branch, so that the whole is N(0, 0.02²).

    Args:
        in_features: Size of the last dimension of the input (n).
        out_features: Size of the last dimension of the output (m).
        rank: Width R.
        alpha: The trained branch is scaled by alpha / R.

    Raises:
        InputError: If the rank is out of range.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float = 1.0) -> None:
        super().__init__()
        check_rank(in_features, out_features, rank)
        self.rank = rank
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(rank, out_features))
        self.scale = alpha / rank
        m, n, gain = out_features, in_features, 3**-0.5
        stds = (math.sqrt(m) * rank / n**1.5) ** 0.25 * gain**0.5, (rank / math.sqrt(m * n)) ** 0.25 * gain**0.5
        self.bounds = tuple(math.sqrt(3) * std for std in stds)  # U(±b) has the standard deviation b / √3
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for factor, bound in zip((self.A, self.B), self.bounds, strict=True):
            nn.init.uniform_(factor, -bound, bound)
        whole = torch.empty(self.weight.shape, device=self.weight.device, dtype=torch.float32).normal_(std=0.02)
        self.weight.copy_(whole.addmm_(self.B.float().T, self.A.float(), alpha=-self.scale))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight) + (linear(x, self.A) * self.scale) @ self.B

    def dense(self) -> Tensor:
        """Return ``W + (α / R) Bᵀ A`` (out, in)."""
        return self.weight + (self.B.T * self.scale) @ self.A

    @torch.no_grad()
    def switch(self, side: Literal["A", "B"], rows: Tensor, candidates: Tensor) -> None:
        """Replace ``rows`` (K,) of A or B by ``candidates`` (K, in or out); the output stays the same."""
        switched, counterpart = (self.A, self.B) if side == "A" else (self.B, self.A)
        # For A: W += (α / R) b_kᵀ (a_k - c). For B the factors change places: W += (α / R) (b_k - c)ᵀ a_k.
        left, right = counterpart[rows].T, switched[rows] - candidates
        if side == "B":
            left, right = right.T, counterpart[rows]
        self.weight.addmm_(left, right, alpha=self.scale)
        switched[rows] = candidates


SIDES: tuple[Literal["A"], Literal["B"]] = ("A", "B")


class _Sides(TypedDict):
    A: Count
    B: Count


class _Recent(TypedDict):
    A: list[list[Count]]
    B: list[list[Count]]


class _State(TypedDict):
    pools: list[dict[str, Any]]
    done: list[_Sides]
    recent: list[_Recent]


class SwitchLoRACallback(PostStepCallback[SwitchLoRA]):
    """Exchange vectors, and restart and hold their counterparts; needs the optimizer ``RowAdamW``.

    Before step t each vector is exchanged with a rate of 1 / interval_t. Here interval_t = interval / 0.3^((t + 1) / T)
    and T = ``descent`` times the run's steps, so exchanges are frequent at first and rare later. The number of
    exchanges for each factor is R / interval_t, rounded up or down at random, in the same way for both. Rows and
    candidates are taken in turn. Exchanges stop for this step at a row that is held.

    Args:
        interval: Steps between two exchanges of a vector when training starts; at least twice ``hold_steps``.
        descent: Share of the run's steps after which exchanges are down to 30 % of the first rate.
        hold_steps: Steps for which a counterpart is held.
        seed: Seed of the random choices; the seed of the run if not given.

    Raises:
        InputError: If an argument is out of range; before training starts, under a strategy that shards weights or with
            another optimizer.
    """

    projection_class = SwitchLoRA
    optimizer: RowAdamW

    def __init__(
        self, interval: float = 40.0, descent: float = 0.1, hold_steps: int = 5, seed: int | None = None
    ) -> None:
        super().__init__(seed)
        if hold_steps < 0:
            raise InputError(f"SwitchLoRACallback: hold_steps is {hold_steps}; it must be 0 or more")
        if interval < max(1, 2 * hold_steps):
            raise InputError(
                f"SwitchLoRACallback: interval is {interval}; it must be at least {max(1, 2 * hold_steps)}, twice "
                f"hold_steps, or all vectors would be held at once"
            )
        if descent <= 0:
            raise InputError(f"SwitchLoRACallback: descent is {descent}; it must be above 0")
        self.interval, self.descent, self.hold_steps = interval, descent, hold_steps
        self.pools: list[dict[str, Tensor]] = []  # candidates of each projection, in the CPU's memory
        # Exchanges of each factor since the start; and [step, number] of those within the last hold_steps.
        self.done: list[dict[str, int]] = []
        self.recent: list[dict[str, list[list[int]]]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if not isinstance(self.optimizer, RowAdamW):
            raise InputError(
                f"SwitchLoRACallback restarts single rows, which {type(self.optimizer).__name__} cannot; "
                f"set --model.optimizer cola_lightning.optim.RowAdamW"
            )
        if not self.pools:
            self.pools = [self._candidates(index, projection) for index, projection in enumerate(self.projections)]
            self.done = [{"A": 0, "B": 0} for _ in self.projections]
            self.recent = [{"A": [], "B": []} for _ in self.projections]

    def _candidates(self, index: int, projection: SwitchLoRA) -> dict[str, Tensor]:
        """Draw the pool of each factor (N, in or out). The last R places are those of the vectors in use at first."""
        draw, size = self.draw(0, index), min(projection.weight.shape)
        return {
            side: torch.empty(size, factor.shape[1]).uniform_(-bound, bound, generator=draw).to(factor.dtype)
            for side, factor, bound in zip("AB", (projection.A, projection.B), projection.bounds, strict=True)
        }

    def rate(self, step: int, total_steps: int) -> float:
        """Compute the share of a factor's vectors to exchange before step ``step``, counted from 0."""
        return max(0.3 ** ((step + 1) / (self.descent * total_steps)), 1e-8) / self.interval

    def after_step(self, trainer: L.Trainer, step: int) -> None:
        rate = self.rate(step, trainer.max_steps)
        for index, (projection, chance) in enumerate(zip(self.projections, self.chances(step), strict=True)):
            wanted = rate * projection.A.shape[0]
            # Round once for both factors, so that B's turn stays half a round of rows from A's.
            count = int(wanted) + (chance < wanted % 1)
            for side in SIDES:
                free = self._free(index, side, step, count)
                if free:
                    self._switch(index, side, step, free)

    def chances(self, step: int) -> list[float]:
        """Draw the number in [0, 1) by which each projection rounds, the same on all ranks."""
        return torch.rand(len(self.projections), generator=self.draw(step)).tolist()

    def _first(self, index: int, side: str) -> int:
        """Compute the row whose turn it is.

        A and B begin half a round apart, so that an exchange in one does not hold the rows that are next in the other.
        Example: R = 8. A begins at row 0 and holds rows of B from 0 on; B begins at row 4 and holds rows of A from 4.
        """
        rank = self.projections[index].A.shape[0]
        return (self.done[index][side] + (rank // 2 if side == "B" else 0)) % rank

    def _free(self, index: int, side: str, step: int, count: int) -> int:
        """Count how many of the next ``count`` rows can be exchanged before one that is held."""
        rank = self.projections[index].A.shape[0]
        other = "B" if side == "A" else "A"
        recent = self.recent[index]
        recent[other] = [[s, n] for s, n in recent[other] if step - s < self.hold_steps]
        # The other factor's last exchanges were of the rows before its next one. They hold these rows of this factor.
        held = sum(n for _, n in recent[other])
        last = self._first(index, other) - 1
        held_rows = {(last - back) % rank for back in range(min(held, rank))}
        first = self._first(index, side)
        for n in range(min(count, rank)):
            if (first + n) % rank in held_rows:
                return n
        return min(count, rank)

    def _switch(self, index: int, side: Literal["A", "B"], step: int, count: int) -> None:
        """Exchange the next ``count`` rows of one factor, and restart their counterparts."""
        projection, pool, done = self.projections[index], self.pools[index][side], self.done[index][side]
        switched, counterpart = (projection.A, projection.B) if side == "A" else (projection.B, projection.A)
        rank, size = switched.shape[0], pool.shape[0]
        rows = _turns(self._first(index, side), count, rank, switched.device)
        # Rows and candidates are both taken in turn, so a row's vector goes R places before its candidate. Example: R =
        # 2, N = 6. The first exchange takes candidate 0 for row 0, whose vector goes to place -2 = 4 of the pool. It
        # is the candidate of the fifth exchange, which is of row 0 again.
        pool[_turns(done - rank, count, size, pool.device)] = switched[rows].to(pool.device)
        candidates = pool[_turns(done, count, size, pool.device)].to(switched.device)
        projection.switch(side, rows, candidates)
        self.optimizer.restart(counterpart, rows, self.hold_steps)
        self.done[index][side] += count
        self.recent[index][side].append([step, count])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"pools": self.pools, "done": self.done, "recent": self.recent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        check_stored(state_dict, _State, "in the state of SwitchLoRACallback", ALTERED)
        self.pools, self.done, self.recent = (state_dict[key] for key in ("pools", "done", "recent"))


def _turns(first: int, count: int, size: int, device: torch.device) -> Tensor:
    """List ``count`` numbers from ``first`` on, modulo ``size``."""
    return torch.arange(first, first + count, device=device) % size
