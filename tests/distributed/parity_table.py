"""The largest differences that ``test_strategies`` bounds, as a table: ``python -m tests.distributed.parity_table``.
The table of recipes/cluster comes from it."""

from pathlib import Path
from tempfile import TemporaryDirectory

from tests.distributed.parity_run import CLIP, GLOBAL_BATCH, MICRO_BATCH, train_each
from tests.distributed.test_strategies import EVERY, KEEPS, VARIANTS, curve, distance
from tests.processes import Run

COLUMNS = [*KEEPS, "fast"]


def main(folder: Path) -> None:
    seen = {}
    pieces = [("auto", GLOBAL_BATCH), ("auto", 1), ("auto_32", GLOBAL_BATCH), ("auto_32", 1)]
    for strategy, micro_batch in [*pieces, *((name, MICRO_BATCH) for name in (*EVERY, *VARIANTS))]:
        ranks, out = 1 if strategy.startswith("auto") else 2, folder / f"{strategy}_{micro_batch}"
        Run(train_each, strategy, ranks, str(out), COLUMNS, micro_batch, ranks=ranks, folder=out).done()
        seen[strategy, micro_batch] = [curve(out / keep) for keep in COLUMNS]
    losses, norms = seen["auto", GLOBAL_BATCH][0]
    clipped = min(sum(norm > CLIP for norm in norms) for curves in seen.values() for _, norms in curves)
    print(
        f"loss from {losses[0]:.4f} to {losses[-1]:.4f}; at least {clipped} of {len(norms)} steps clipped in each run"
    )
    print(f"| | precision | {' | '.join(COLUMNS)} |\n|---|---|{'---|' * len(COLUMNS)}")
    for (strategy, micro_batch), curves in seen.items():
        single = strategy.startswith("deepspeed") or strategy == "auto_32"
        whole = seen["auto_32" if single else "auto", GLOBAL_BATCH][0]
        cells = (f"{distance(own[0], whole[0]):.1e}, {distance(own[1], whole[1]):.1e}" for own in curves)
        precision = "float32" if single else "float64"
        print(f"| {strategy}, micro-batches of {micro_batch} | {precision} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        main(Path(folder))
