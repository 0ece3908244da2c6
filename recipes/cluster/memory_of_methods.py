"""Print the table of memory under FSDP2 of this folder's page: python recipes/cluster/memory_of_methods.py

It predicts, as ``estimate`` does, weights, gradients and optimizer states on each of 8 and of 64 GPUs in bf16-true.
"""

from pathlib import Path

from cola_lightning.cli.lightning_cli import Settings
from cola_lightning.costs.plan import plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OF_OPTIMIZER, OF_PROJECTION = "optimizer.matrix.rank", "projection.rank"
METHODS = {  # the argument that is the rank, and its values at 1B and 7B
    "AdamW": None,
    "galore": (OF_OPTIMIZER, 512, 1024),
    "fira": (OF_OPTIMIZER, 512, 64),
    "apollo": (OF_OPTIMIZER, 256, 256),
    "apollo_mini": (OF_OPTIMIZER, 1, 1),
    "muon": None,
    "relora": (OF_PROJECTION, 512, 1024),
    "switch_lora": (OF_PROJECTION, 512, 1024),
    "sst": (OF_PROJECTION, 128, 128),
}
SIZES, GPUS = ("1b", "7b"), (8, 64)


def memory(method: str, size: str, gpus: int) -> tuple[float, float]:
    """Predict GiB on each GPU: weights, gradients and states together; and states alone."""
    flags = [f"--config={CONFIGS}/llama_{size}.yaml", "--trainer.strategy=fsdp2", "--data.batch_size=8"]
    if method != "AdamW":
        flags.append(f"--config={CONFIGS}/method/{method}.yaml")
    if setting := METHODS[method]:
        argument, *ranks = setting
        flags.append(f"--model.{argument}={ranks[SIZES.index(size)]}")
    run = Settings(flags, run=False)
    found = plan(run.model, run.datamodule, run.trainer, gpus).run.static_memory
    return (found.weights + found.gradients + found.optimizer) / 2**30, found.optimizer / 2**30


def main() -> None:
    """Print the rows."""
    columns = [(size, gpus) for size in SIZES for gpus in GPUS]
    print("| |" + "".join(f" {size.upper()}, {gpus} GPUs |" for size, gpus in columns))
    print("|---|" + "---|" * len(columns))
    for method in METHODS:
        cells = ["{:.2f} ({:.2f})".format(*memory(method, *column)) for column in columns]
        print(f"| `{method}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
