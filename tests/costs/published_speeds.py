"""Compare predicted with published and measured speeds: python -m tests.costs.published_speeds prints the table.

No constant of the package was fitted to these figures. Of torchtitan's two, the eager one gives one factor for its
machines, which are limited to 500 W, and for its selective recompute, which is not modelled; the compiled one is held
out. What a publication does not say is assumed as the comments say.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from cola_lightning.costs import Run, gpu_named
from cola_lightning.costs.devices import Device, device_of, network_named
from cola_lightning.costs.speed import predict
from cola_lightning.methods import CoLA, CoLAM
from cola_lightning.models import FullRank, LlamaConfig
from cola_lightning.models.llama import build_llama


@dataclass(frozen=True)
class Figure:
    """Published or measured speed of a run, in tokens per second of a GPU."""

    name: str
    run: Run
    device: Device
    tokens_per_second: float
    network: str = "infiniband"

    def predicted(self) -> float:
        speed = predict(self.run, self.device, network_named(self.network))
        return speed.tokens_per_second / speed.gpus


def run_of(config: LlamaConfig, rows: int, tokens: int, rank: int | None = None, cola_m: bool = False, **more) -> Run:
    projection = partial(CoLA, rank=rank) if rank else FullRank
    build = partial(build_llama, config=config, projection=projection)
    arguments = {
        "transforms": (CoLAM().apply,) if cola_m else (),
        "precision": "bf16-true",
        "clips": rank is not None,
    } | more
    return Run(build, config.num_hidden_layers, partial(torch.optim.AdamW, fused=True), rows, tokens, **arguments)


def one_b(intermediate: int, rank: bool = False, **more) -> LlamaConfig:
    return LlamaConfig(32000, 2048, intermediate, 24, 32, max_position_embeddings=4096, gate_silu=not rank, **more)


TITAN_SHARE = 0.633
"""Speed of products and attention in torchtitan's runs, as a share of an H100 of 700 W without recompute. Fitted
to the eager figure."""


def slower(device: Device, share: float) -> Device:
    forward, backward = device.attention
    attention = (share * forward, share * backward)
    return replace(device, sustained=share * device.sustained, attention=attention)


def figures() -> list[Figure]:
    """List the figures. Making them is quick; each prediction takes some seconds."""
    a100, a100_40, h100 = (device_of(gpu_named(name)) for name in ("a100-80", "a100-40", "h100"))
    # torchtitan docs/performance.md: H100 with 2.4 TB/s, limited to 500 W, local batch 2 of 8,192 tokens, 8 GPUs.
    meta = slower(replace(h100, bandwidth=h100.bandwidth * 2.4 / 3.35), TITAN_SHARE)
    llama_8b = LlamaConfig(128256, 4096, 14336, 32, 32, num_key_value_heads=8, max_position_embeddings=8192)
    titan = partial(run_of, llama_8b, 2, 8192, strategy="fsdp2", gpus=8, precision="bf16-mixed")
    tiny = LlamaConfig(32000, 2048, 5632, 22, 32, num_key_value_heads=4)
    fast = {"loss_chunk_size": 4096, "fused_projections": True}
    return [
        # BOOST (arXiv 2512.12131): .85 and .56 s for 4 x 4,096 tokens. Assumed: not compiled.
        Figure("BOOST 1B, full rank, A100", run_of(one_b(5472), 4, 4096), a100, 16384 / 0.85),
        Figure("BOOST 1B, CoLA, A100", run_of(one_b(5472, True), 4, 4096, 512), a100, 16384 / 0.56),
        # CoLA's paper, 64 x 256 tokens; GPU and software not said, so that only the ratios are compared.
        Figure("CoLA paper 1B, full rank", run_of(one_b(5461), 64, 256), a100, 12365),
        Figure("CoLA paper 1B, CoLA", run_of(one_b(5461, True), 64, 256, 512), a100, 22979),
        Figure("CoLA paper 1B, CoLA-M", run_of(one_b(5461, True), 64, 256, 512, True), a100, 16617),
        Figure("torchtitan 8B, eager, 8 H100", titan(), meta, 5762),
        Figure("torchtitan 8B, compiled, 8 H100", titan(compiled=True), meta, 6667),
        # TinyLlama README: 24k tokens/s of an A100-40G, 16k tokens each, 16 GPUs, FSDP, kernels fused by hand.
        Figure(
            "TinyLlama 1.1B, 16 A100",
            run_of(tiny, 8, 2048, strategy="fsdp", gpus=16, precision="bf16-mixed", compiled=True),
            a100_40,
            24000,
            "infiniband-hdr",
        ),
        # Measured by the command ``benchmark``: H100 80GB HBM3, fast.yaml, 64 x 256 tokens, 2026-11-26.
        Figure("measured 1B, full rank, H100", run_of(one_b(5461, **fast), 64, 256, compiled=True), h100, 62119),
        Figure("measured 1B, CoLA, H100", run_of(one_b(5461, True, **fast), 64, 256, 512, compiled=True), h100, 95924),
        Figure(
            "measured 1B, CoLA-M, H100",
            run_of(one_b(5461, True, **fast), 64, 256, 512, True, compiled=True),
            h100,
            84319,
        ),
    ]


RATIOS = (
    ("BOOST: CoLA ÷ full rank", "BOOST 1B, CoLA, A100", "BOOST 1B, full rank, A100"),
    ("CoLA paper: CoLA ÷ full rank", "CoLA paper 1B, CoLA", "CoLA paper 1B, full rank"),
    ("CoLA paper: CoLA-M ÷ CoLA", "CoLA paper 1B, CoLA-M", "CoLA paper 1B, CoLA"),
    ("torchtitan: compiled ÷ eager", "torchtitan 8B, compiled, 8 H100", "torchtitan 8B, eager, 8 H100"),
    ("H100: CoLA ÷ full rank", "measured 1B, CoLA, H100", "measured 1B, full rank, H100"),
    ("H100: CoLA-M ÷ CoLA", "measured 1B, CoLA-M, H100", "measured 1B, CoLA, H100"),
)


def main() -> None:
    """Print both tables in Markdown."""
    predicted, seen = {}, {}
    print("| tokens/s of a GPU | published or measured | predicted | error |\n|---|---|---|---|")
    for figure in figures():
        predicted[figure.name], seen[figure.name] = figure.predicted(), figure.tokens_per_second
        error = predicted[figure.name] / seen[figure.name] - 1
        print(
            f"| {figure.name} | {seen[figure.name]:,.0f} | {predicted[figure.name]:,.0f} | {error:+.0%} |", flush=True
        )
    print("\n| ratio | published or measured | predicted | error |\n|---|---|---|---|")
    for name, above, below in RATIOS:
        ratio, expected = predicted[above] / predicted[below], seen[above] / seen[below]
        print(f"| {name} | {expected:.2f} | {ratio:.2f} | {ratio / expected - 1:+.0%} |")


if __name__ == "__main__":
    main()
