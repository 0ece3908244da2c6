"""The largest differences that ``test_strategies`` bounds, as a table: ``python -m tests.parity_table``. The table of
recipes/cluster comes from it."""

from pathlib import Path
from tempfile import TemporaryDirectory

from tests.parity_run import CLIP, train_each
from tests.processes import Run
from tests.test_strategies import EVERY, KEEPS, VARIANTS, curve

COLUMNS = [*KEEPS, "fast"]


def main(folder: Path) -> None:
    seen = {}
    for strategy in ("auto", *EVERY, *VARIANTS):
        ranks, out = 1 if strategy == "auto" else 2, folder / strategy
        Run(train_each, strategy, ranks, str(out), COLUMNS, ranks=ranks, folder=out).done()
        seen[strategy] = [curve(out / keep) for keep in COLUMNS]
    losses, norms = seen["auto"][0]
    clipped = min(sum(norm > CLIP for norm in norms) for curves in seen.values() for _, norms in curves)
    print(
        f"loss from {losses[0]:.4f} to {losses[-1]:.4f}; at least {clipped} of {len(norms)} steps clipped in each run"
    )
    print(f"| | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for strategy, curves in seen.items():
        cells = []
        for own_losses, own_norms in curves:
            loss = max(abs(own - one) for own, one in zip(own_losses, losses, strict=True))
            norm = max(abs(own / one - 1) for own, one in zip(own_norms, norms, strict=True))
            cells.append(f"{loss:.1e}, {norm:.1e}")
        print(f"| {strategy} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        main(Path(folder))
