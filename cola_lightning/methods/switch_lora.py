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

Under FSDP2 a rank has some rows of W, A, B and the pools. All ranks read the few vectors of a step's exchanges, and
each updates its own rows. No matrix is gathered, except a pool on the first rank when a checkpoint of one file is
written.

An exchange rounds once, to the dtype of W. With ``precision: bf16-true`` these roundings add up over a run.
"""

import math
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from typing_extensions import TypedDict

from cola_lightning.errors import InputError, check_at_least
from cola_lightning.methods.arguments import check_rank
from cola_lightning.methods.post_step import PostStepCallback
from cola_lightning.methods.switch_lora_schedule import SIDES, Done, Exchange, ExchangeSchedule, Recent, Side
from cola_lightning.models.projection import Projection
from cola_lightning.optim.row_adamw import RowAdamW
from cola_lightning.optim.rows import Rows, gather_rows, local, mesh_of, own_rows, rows_of, set_rows
from cola_lightning.optim.sharded import gather_on_first
from cola_lightning.stored_data import ALTERED, check_stored


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
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        whole = torch.empty(self.weight.shape, device=self.weight.device, dtype=dtype).normal_(std=0.02)
        self.weight.copy_(whole.addmm_(self.B.to(dtype).T, self.A.to(dtype), alpha=-self.scale))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight) + (linear(x, self.A) * self.scale) @ self.B

    def dense(self) -> Tensor:
        """Return ``W + (α / R) Bᵀ A`` (out, in)."""
        return self.weight + (self.B.T * self.scale) @ self.A

    @torch.no_grad()
    def switch(self, side: Side, rows: Tensor, switched: Tensor, counterparts: Tensor, candidates: Tensor) -> None:
        """Replace rows of A or B by candidates; the output stays the same.

        Args:
            side: The factor.
            rows: Indices (K,) of its rows.
            switched: These rows, (K, in) for A and (K, out) for B.
            counterparts: The same rows of the other factor.
            candidates: The new rows, like ``switched``.
        """
        # For A: W += (α / R) b_kᵀ (a_k - c). For B the factors change places: W += (α / R) (b_k - c)ᵀ a_k. This is the
        # product of ``left`` (out, K) and ``right`` (K, in), of which a rank computes its own rows.
        left, right = counterparts.T, switched - candidates
        if side == "B":
            left, right = right.T, counterparts
        local(self.weight).addmm_(left[own_rows(self.weight)], right, alpha=self.scale)
        set_rows(rows_of(self.A if side == "A" else self.B), rows, candidates)


class _State(TypedDict):
    pools: list[dict[str, Any]]
    done: list[Done]
    recent: list[Recent]


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
        InputError: If an argument is out of range; before training starts, under a strategy that flattens weights or
            with another optimizer.
    """

    projection_class = SwitchLoRA
    optimizer: RowAdamW

    def __init__(
        self, interval: float = 40.0, descent: float = 0.1, hold_steps: int = 5, seed: int | None = None
    ) -> None:
        super().__init__(seed)
        check_at_least(0, "SwitchLoRACallback: ", hold_steps=hold_steps)
        if interval < max(1, 2 * hold_steps):
            raise InputError(
                f"SwitchLoRACallback: interval is {interval}; it must be at least {max(1, 2 * hold_steps)}, twice "
                f"hold_steps, or all vectors would be held at once"
            )
        if descent <= 0:
            raise InputError(f"SwitchLoRACallback: descent is {descent}; it must be above 0")
        self.schedule = ExchangeSchedule(interval, descent, hold_steps)
        self.pools: list[dict[str, Tensor]] = []  # this rank's candidates of each projection, in the CPU's memory
        self.writes_rows = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.writes_rows = getattr(trainer.strategy, "writes_rows", False)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if not isinstance(self.optimizer, RowAdamW):
            raise InputError(
                f"SwitchLoRACallback restarts single rows, which {type(self.optimizer).__name__} cannot; "
                f"set --model.optimizer cola_lightning.optim.RowAdamW"
            )
        self.schedule.ranks = [projection.A.shape[0] for projection in self.projections]
        if self.pools:  # of a checkpoint
            self._keep_own()
        else:
            self.pools = [self._candidates(index, projection) for index, projection in enumerate(self.projections)]
            self.schedule.reset()

    def _candidates(self, index: int, projection: SwitchLoRA) -> dict[str, Tensor]:
        """Draw the pool of each factor (N, in or out). The last R places are those of the vectors in use at first.

        Every rank draws the whole of a pool, and keeps its own rows.
        """
        draw, size, pools = self.draw(0, index), min(projection.weight.shape), {}
        for side, factor, bound in zip("AB", (projection.A, projection.B), projection.bounds, strict=True):
            pool = torch.empty(size, factor.shape[1], dtype=torch.promote_types(factor.dtype, torch.float32))
            pool.uniform_(-bound, bound, generator=draw)
            pools[side] = pool[own_rows(factor, size)].to(factor.dtype, copy=True)
        return pools

    def _keep_own(self) -> None:
        """Keep this rank's rows of whole pools, which a checkpoint holds."""
        for pools, projection in zip(self.pools, self.projections, strict=True):
            size = min(projection.weight.shape)
            for side, pool in pools.items():
                if mesh_of(projection.A) and len(pool) == size:
                    pools[side] = pool[own_rows(projection.A, size)].clone()

    def after_step(self, trainer: L.Trainer, step: int) -> None:
        counts = self.schedule.counts(step, trainer.max_steps, self.chances(step))
        for side in SIDES:  # all exchanges of A first, because they hold rows of B
            for batch in self._batches(self.schedule.due(side, step, counts)):
                self._exchange(batch, step)

    def chances(self, step: int) -> list[float]:
        """Draw the number in [0, 1) by which each projection rounds, the same on all ranks."""
        return torch.rand(len(self.projections), generator=self.draw(step)).tolist()

    def _batches(self, due: list[Exchange]) -> Iterator[list[Exchange]]:
        """Divide exchanges so that a batch takes at most as much memory as a matrix W.

        Under FSDP2 all ranks read the vectors of a batch at once, by one exchange between them.
        """
        batch: list[Exchange] = []
        size = 0
        largest = max(projection.weight.numel() for projection in self.projections)
        for exchange in due:
            one = exchange.rows * max(self.projections[exchange.projection].weight.shape)
            numbers = 3 * one  # vectors, counterparts and candidates
            if batch and size + numbers + one > largest:  # + one: the difference that one exchange adds to W
                yield batch
                batch, size = [], 0
            batch.append(exchange)
            size += numbers
        if batch:
            yield batch

    def _exchange(self, batch: list[Exchange], step: int) -> None:
        """Read the vectors of a batch, and switch them. Their memory is free again before the next batch is read."""
        for exchange, vectors in zip(batch, self._read(batch), strict=True):
            self._switch(exchange, step, *vectors)

    def _read(self, due: list[Exchange]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Read for each exchange the vectors to switch, their counterparts, and the candidates: (K, in or out) each."""
        wanted = []  # three of each exchange, so that one exchange between the ranks reads them all
        for index, side, first, count in due:
            projection, pool, done = self.projections[index], self.pools[index][side], self.schedule.done[index][side]
            switched, counterpart = (projection.A, projection.B) if side == "A" else (projection.B, projection.A)
            rank, size = switched.shape[0], min(projection.weight.shape)
            rows = _turns(first, count, rank)
            wanted += [(rows_of(switched), rows), (rows_of(counterpart), rows)]
            wanted.append((Rows(pool, own_rows(switched, size), size), _turns(done, count, size)))
        factor = self.projections[0].A
        found = gather_rows(wanted, mesh_of(factor), factor.device)
        return list(zip(found[::3], found[1::3], found[2::3], strict=True))

    def _switch(self, due: Exchange, step: int, switched: Tensor, counterparts: Tensor, candidates: Tensor) -> None:
        """Exchange the next rows of one factor, and restart their counterparts."""
        index, side, first, count = due
        projection, done = self.projections[index], self.schedule.done[index][side]
        factor, other = (projection.A, projection.B) if side == "A" else (projection.B, projection.A)
        rank, size = factor.shape[0], min(projection.weight.shape)
        # 1. Put the vectors into the pool. Rows and candidates are both taken in turn, so a row's vector goes R places
        #    before its candidate. Example: R = 2, N = 6. The first exchange takes candidate 0 for row 0, whose vector
        #    goes to place -2 = 4 of the pool. It is the candidate of the fifth exchange, which is of row 0 again.
        pool = Rows(self.pools[index][side], own_rows(factor, size), size)
        set_rows(pool, _turns(done - rank, count, size), switched)
        # 2. The candidates were read before step 1. In a pool that is hardly larger than R, a vector that has just gone
        #    in is a candidate at once. Row i takes the candidate at place done + i, and the vector of row j went to
        #    place done + j - R. The place is the same if j = i + R, modulo N. Example: R = 4, N = 5, three rows. j is
        #    4, 0 and 1, so row 1 takes the vector of row 0, row 2 that of row 1, and row 0 the candidate as read.
        if count > size - rank:
            put_by = _turns(rank, count, size)
            at_once = put_by < count
            candidates[at_once] = switched[put_by[at_once]]
        # 3. Replace the rows, and add to W what the branch loses.
        rows = _turns(first, count, rank)
        projection.switch(side, rows, switched, counterparts, candidates)
        # 4. The counterparts' moments belong to the vectors that have left.
        self.optimizer.restart(other, rows, self.schedule.hold_steps)
        self.schedule.record(due, step)

    def state_dict(self) -> dict[str, Any]:
        """Return the state. All ranks must call this.

        Pools are this rank's rows if the strategy writes shards. Otherwise they are whole, and only on the first rank.
        """
        pools: list[dict[str, Tensor | Rows]] = []
        for own, projection in zip(self.pools, self.projections if self.pools else (), strict=True):
            mesh, size = mesh_of(projection.A), min(projection.weight.shape)
            rows = {side: Rows(pool, own_rows(projection.A, size), size) for side, pool in own.items()}
            shards = mesh and self.writes_rows
            pools.append({side: each if shards else gather_on_first(each, mesh) for side, each in rows.items()})
        return super().state_dict() | {"pools": pools, "done": self.schedule.done, "recent": self.schedule.recent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        check_stored(state_dict, _State, "in the state of SwitchLoRACallback", ALTERED)
        self.schedule.done, self.schedule.recent = state_dict["done"], state_dict["recent"]
        self.pools = [
            {side: pool.part if isinstance(pool, Rows) else pool for side, pool in pools.items()}
            for pools in state_dict["pools"]
        ]
        if hasattr(self, "projections"):  # a rollback, while the run goes on
            self._keep_own()


def _turns(first: int, count: int, size: int) -> Tensor:
    """List ``count`` numbers from ``first`` on, modulo ``size``."""
    return torch.arange(first, first + count) % size
