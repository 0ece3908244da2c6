"""Measure CoLA beside full rank and beside the authors' networks on this machine's processor, and print one table.

python recipes/benchmark/cpu_table.py FOLDER [--rounds 5] [--rows 8] [--busy] [--peer MODULE:COLA --peer MODULE:COLA_M]

All networks of a comparison take turns in every round. Each has configs/fast.yaml and the same clipping. The products
are in bf16 where the processor multiplies it, else in float32. FOLDER gets all figures as JSON, and the table.
Nothing else should run beside it. On a machine that does other work too, ``--busy`` uses one thread and counts its
processor time.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cola_lightning.benchmark import PackageModel, measure_training
from cola_lightning.benchmark.clock import count_processor_time
from cola_lightning.benchmark.report import spread
from cola_lightning.cli.commands import benchmark
from cola_lightning.cli.lightning_cli import CLI
from cola_lightning.distributed.precision import multiplies_bf16
from cola_lightning.models.llama import run_layers

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FAST = CONFIGS / "fast.yaml"
LARGE = ["--model.num_hidden_layers=4", "--model.vocab_size=4096"]
"""350M shapes with few layers and ids, so that the share of the head is as small as in a deep network."""


class LayersAlone(PackageModel):
    """Decoder layers without attention's core: projections, gating, norms and residual additions.

    A step is forward and backward, from hidden states to hidden states. Rotary positions belong to the core.
    """

    def build(self) -> None:
        super().build()
        decoder = self.model.network.model
        for layer in decoder.layers:
            # The sum costs next to nothing, and gives q, k and v a gradient. Layers are compiled at their first call.
            layer.self_attn.mix = lambda q, k, v, rotary: q + k + v
        weight = decoder.norm.weight
        self.hidden = torch.randn(*self.shape, weight.numel()).to(weight.dtype).requires_grad_()
        self.gradient = torch.randn_like(self.hidden)
        self.rotary = decoder.rotary(self.shape[1], like=self.hidden)

    def loss(self, ids: Tensor) -> Tensor:
        out = run_layers(self.model.network.model.layers, self.hidden, self.rotary)
        return (out * self.gradient).sum()

    def update(self) -> None:
        self.optimizer.zero_grad()
        self.hidden.grad = None


def flags_of(precision: str, rows: int) -> list[str]:
    """Return the flags that hold for all networks."""
    return [
        "--trainer.accelerator=cpu",
        f"--trainer.precision={precision}",
        "--trainer.gradient_clip_val=0.5",
        f"--data.batch_size={rows}",
    ]


def measure_steps(names: Sequence[str], flags: list[str], rounds: int, file: Path) -> dict:
    """Measure whole steps by the command ``benchmark``, and return its JSON.

    Args:
        names: Names of configs.
        flags: Further flags.
        rounds: Rounds.
        file: Where the JSON is written.
    """
    first, *others = ([str(CONFIGS / f"{name}.yaml"), str(FAST)] for name in names)
    command = [*(f"--config={config}" for config in first), *(f"--against={','.join(other)}" for other in others)]
    protocol = [f"--rounds={rounds}", "--steps=1", "--warmup=1", f"--json={file}"]
    benchmark.run(benchmark.parse([*command, *flags, *protocol]))
    return json.loads(file.read_text())


def measure_layers(flags: list[str], rounds: int) -> list[dict]:
    """Measure the layers of CoLA and full rank at 60M, without attention's core."""
    targets = []
    for name in ("cola_60m", "llama_60m"):
        settings = [f"--config={CONFIGS / name}.yaml", f"--config={FAST}", *flags, *benchmark.ONE_DEVICE]
        cli = CLI(settings, run=False)
        targets.append(LayersAlone(name, cli.trainer, cli.model, cli.datamodule))
    return measure_training(targets, warmup=2, rounds=rounds, steps=3)


def speeds(result: dict, number: int) -> list[float]:
    return result["subjects"][number]["tokens_per_second"]


def quotient(above: list[float], below: list[float]) -> str:
    """Write the median and the range of the ratios of all rounds."""
    return spread([a / b for a, b in zip(above, below, strict=True)], ".2f")


def main() -> None:
    """Measure all, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--busy", action="store_true", help="one thread, processor time")
    parser.add_argument("--peer", action="append", default=[], help="the authors' CoLA, then their CoLA-M")
    options = parser.parse_args()
    if options.busy:
        count_processor_time()
    options.folder.mkdir(parents=True, exist_ok=True)
    precision = "bf16-true" if multiplies_bf16() else "32-true"
    flags = flags_of(precision, options.rows)
    peers = [f"--peer={peer}" for peer in options.peer]

    small = measure_steps(
        ("cola_60m", "llama_60m", "cola_m_60m"), [*flags, *peers], options.rounds, options.folder / "cpu_60m.json"
    )
    large = measure_steps(
        ("cola_350m", "llama_350m"), [*flags, *LARGE], options.rounds, options.folder / "cpu_350m_layers.json"
    )
    layers = measure_layers(flags, options.rounds)
    (options.folder / "cpu_layers.json").write_text(json.dumps(layers, indent=2))

    cola, full, cola_m, *others = (each["tokens_per_second"] for each in small["subjects"])
    counted = [each["counted_peak_bytes"] for each in small["subjects"]]
    model_flops = [each["flops_model"] for each in (*small["subjects"], *large["subjects"])]
    limit_small, limit_large = model_flops[1] / model_flops[0], model_flops[-1] / model_flops[-2]
    limit_layers = layers[1]["flops_step"] / layers[0]["flops_step"]
    rows = [
        (f"60M: CoLA ÷ full rank (FLOPs allow {limit_small:.2f})", "1.30", quotient(cola, full)),
        ("60M: CoLA-M ÷ CoLA", "0.95", quotient(cola_m, cola)),
        ("60M: MFU of CoLA; full rank", "32 %", f"{mfu(small, 0)}; {mfu(small, 1)}"),
        (
            f"60M: layers without attention's core, CoLA ÷ full rank (FLOPs allow {limit_layers:.2f})",
            "2.0",
            quotient(*(each["tokens_per_second"] for each in layers)),
        ),
        (
            f"350M shapes, 4 layers, vocabulary 4,096: CoLA ÷ full rank (FLOPs allow {limit_large:.2f})",
            "1.83",
            quotient(speeds(large, 0), speeds(large, 1)),
        ),
        ("350M shapes: MFU of CoLA; full rank", "35 %", f"{mfu(large, 0)}; {mfu(large, 1)}"),
    ]
    if len(others) == 2:
        rows += [
            ("60M: CoLA ÷ the reference's", "2.2", quotient(cola, others[0])),
            ("60M: CoLA-M ÷ the reference's", "2.4", quotient(cola_m, others[1])),
            ("60M: counted peak, CoLA-M ÷ the reference's", "at most 0.5", f"{counted[2] / counted[4]:.2f}"),
        ]
    setting = small["setting"]
    lines = [
        f"{setting['device']}, {setting['threads']} threads, torch {setting['libraries']['torch']}, {setting['date']}, "
        f"commit {setting['commit']}, {precision}, {options.rows} x 256 tokens, {options.rounds} rounds; peak of "
        f"{setting['peak_tflops']:.3f} TFLOP/s {setting['peak_is']}"
        + ("; processor time, other work ran beside" if options.busy else ""),
        "",
        "| medians (range of rounds) | goal | measured |",
        "|---|---|---|",
        *(f"| {name} | {goal} | {value} |" for name, goal, value in rows),
    ]
    (options.folder / "cpu_table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def mfu(result: dict, number: int) -> str:
    """Write the MFU of a network: median and range over rounds."""
    subject, peak = result["subjects"][number], result["setting"]["peak_tflops"] * 1e12
    tokens = subject["batch"][0] * subject["batch"][1]
    shares = [subject["flops_model"] / tokens * speed / peak for speed in subject["tokens_per_second"]]
    return f"{statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"


if __name__ == "__main__":
    main()
