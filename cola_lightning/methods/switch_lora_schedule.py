"""The schedule of SwitchLoRA: how many rows are exchanged at a step, whose turn it is, and which rows are held.

It computes with numbers of rows only. :mod:`~cola_lightning.methods.switch_lora` has the vectors and exchanges them.
"""

from typing import Literal, NamedTuple

from typing_extensions import TypedDict

from cola_lightning.stored_data import Count

Side = Literal["A", "B"]
SIDES: tuple[Side, Side] = ("A", "B")


class Exchange(NamedTuple):
    """The exchange of the next rows of one factor.

    Attributes:
        projection: Its number.
        side: The factor.
        first: Its first row.
        rows: Number K of rows.
    """

    projection: int
    side: Side
    first: int
    rows: int


class Done(TypedDict):
    """Exchanges of each factor of a projection since the start."""

    A: Count
    B: Count


class Recent(TypedDict):
    """The last exchanges of each factor of a projection, the oldest first: [step, number of rows]."""

    A: list[list[Count]]
    B: list[list[Count]]


class ExchangeSchedule:
    """Decides which rows of each projection are exchanged before a step.

    Args:
        interval: Steps between two exchanges of a vector when training starts.
        descent: Share of the run's steps after which exchanges are down to 30 % of the first rate.
        hold_steps: Steps for which the counterpart of an exchanged row is held.

    Attributes:
        ranks: Rows R of the factors of each projection; set when training starts.
        done: Exchanges of each projection since the start.
        recent: Exchanges of each projection within the last ``hold_steps``.
    """

    def __init__(self, interval: float, descent: float, hold_steps: int) -> None:
        self.interval, self.descent, self.hold_steps = interval, descent, hold_steps
        self.ranks: list[int] = []
        self.done: list[Done] = []
        self.recent: list[Recent] = []

    def reset(self) -> None:
        """Begin with no exchange made."""
        self.done = [{"A": 0, "B": 0} for _ in self.ranks]
        self.recent = [{"A": [], "B": []} for _ in self.ranks]

    def rate(self, step: int, total_steps: int) -> float:
        """Compute the share of a factor's vectors to exchange before step ``step``, counted from 0."""
        return max(0.3 ** ((step + 1) / (self.descent * total_steps)), 1e-8) / self.interval

    def counts(self, step: int, total_steps: int, chances: list[float]) -> list[int]:
        """Compute how many rows of each factor of a projection are to be exchanged.

        Args:
            step: The step, counted from 0.
            total_steps: Optimizer steps of the run.
            chances: A number in [0, 1) for each projection, which rounds up or down at random.
        """
        rate, counts = self.rate(step, total_steps), []
        for rank, chance in zip(self.ranks, chances, strict=True):
            wanted = rate * rank
            # Round once for both factors, so that B's turn stays half a round of rows from A's.
            counts.append(int(wanted) + (chance < wanted % 1))
        return counts

    def due(self, side: Side, step: int, counts: list[int]) -> list[Exchange]:
        """List the exchanges of one factor of all projections. Those of A must be recorded before B is asked for."""
        free = [self.free(index, side, step, count) for index, count in enumerate(counts)]
        return [Exchange(index, side, self.first(index, side), count) for index, count in enumerate(free) if count]

    def record(self, made: Exchange, step: int) -> None:
        """Note that an exchange was made at a step."""
        self.done[made.projection][made.side] += made.rows
        self.recent[made.projection][made.side].append([step, made.rows])

    def first(self, index: int, side: Side) -> int:
        """Compute the row whose turn it is.

        A and B begin half a round apart, so that an exchange in one does not hold the rows that are next in the other.
        Example: R = 8. A begins at row 0 and holds rows of B from 0 on; B begins at row 4 and holds rows of A from 4.
        """
        rank = self.ranks[index]
        return (self.done[index][side] + (rank // 2 if side == "B" else 0)) % rank

    def free(self, index: int, side: Side, step: int, count: int) -> int:
        """Count how many of the next ``count`` rows can be exchanged before one that is held.

        Example: R = 8, rows are held for 5 steps, and 4 rows of B are asked for at step 15, where B's next row is 7. A
        exchanged rows 0 and 1 at step 10 and row 2 at step 12. The first exchange is 5 steps ago, so row 2 of B alone
        is held. Rows 7, 0 and 1 are free, and the fourth is row 2: the answer is 3.
        """
        rank = self.ranks[index]
        other: Side = "B" if side == "A" else "A"
        # 1. Forget the other factor's exchanges that hold nothing any more.
        recent = self.recent[index]
        recent[other] = [[s, n] for s, n in recent[other] if step - s < self.hold_steps]
        # 2. The rows themselves were not noted, because rows are taken in turn: those that were exchanged last are the
        #    ones before the other factor's next row. An exchange holds the same rows of this factor.
        held = sum(n for _, n in recent[other])
        last = self.first(index, other) - 1
        held_rows = {(last - back) % rank for back in range(min(held, rank))}
        # 3. Stop at the first held row. Going on behind it would lose the order, on which step 2 relies.
        first = self.first(index, side)
        for n in range(min(count, rank)):
            if (first + n) % rank in held_rows:
                return n
        return min(count, rank)
