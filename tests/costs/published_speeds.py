"""Compare predicted with published and measured speeds: python -m tests.costs.published_speeds prints the tables.

No constant of the package was fitted to these figures. ``--fit`` shows what a fit would bring: two factors, one on the
speed of products and attention and one on that of memory, are fitted to half of the figures and tried on the others.
The halves were fixed before the first fit: the figures in the order of their names, by turns.
What a publication does not say is assumed as the comments say.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

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

    def predicted(self, products: float = 1, memory: float = 1) -> float:
        """Predict it, with the speed of products and attention, and that of memory, times a factor each."""
        device = faster(self.device, products, memory)
        speed = predict(self.run, device, network_named(self.network))
        return speed.tokens_per_second / speed.gpus


def faster(device: Device, products: float, memory: float) -> Device:
    forward, backward = device.attention
    return replace(
        device,
        sustained=products * device.sustained,
        attention=(products * forward, products * backward),
        bandwidth=memory * device.bandwidth,
    )


def keep_every_second_product(network: Any) -> None:
    """Recompute layers as torchtitan's "selective op" does: attention and every second product are kept."""
    for layer in network.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=_kept)


def _kept() -> Any:
    seen = {True: 0, False: 0}

    def choose(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = "attention" in str(operation)
        if operation == torch.ops.aten.mm.default:
            seen[context.is_recompute] += 1
            keep = seen[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(choose)


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


POWER = ((500 - 150) / (700 - 150)) ** (1 / 3)
"""Speed of products on an H100 that is limited to 500 W, as a share of one of 700 W. Power beyond about 150 W, which
memory and idle parts take, grows with the cube of the clock. Derived; not measured, and not fitted."""


def figures() -> list[Figure]:
    """List the figures. Making them is quick; each prediction takes some seconds."""
    a100, a100_40, h100 = (device_of(gpu_named(name)) for name in ("a100-80", "a100-40", "h100"))
    # torchtitan, benchmarks/llama3_h100_202412_torchtitan.md: H100 with HBM2e of 2.4 TB/s, limited to 500 W; micro-
    # batches of 2 x 8,192 tokens; layers recomputed by "selective op"; RMSNorm of several operations.
    meta = faster(h100, POWER, 2.4 / 3.35)
    llama_8b = LlamaConfig(128256, 4096, 14336, 32, 32, num_key_value_heads=8, max_position_embeddings=8192)
    selective = {"transforms": (keep_every_second_product,), "fused_norm": False, "clips": True}
    titan = partial(run_of, strategy="fsdp2", precision="bf16-mixed", **selective)
    titan_8b = partial(titan, llama_8b, 2, 8192)
    # torchtitan, docs/performance.md of 2024: 64 A100 (80 GB); 8B with micro-batches of 1 x 8,192 tokens, and Llama 2
    # of 13B with 2 x 4,096, without recompute and with "selective op". Not compiled. The network is not said; HDR here.
    llama_13b = LlamaConfig(32000, 5120, 13824, 40, 40, max_position_embeddings=4096)
    # nanotron, Hugging Face's "Smol Training Playbook": 42k tokens/s of an H100, 8 in a node, shapes of Llama 3.2 1B,
    # rows of 4,096 tokens. Not compiled (its README lists that among what is to come); fused RMSNorm. Micro-batches of
    # 3 rows in 16 parts are from memory. The tied embedding is not modelled; the head's FLOPs are the same.
    llama_1b = LlamaConfig(128256, 2048, 8192, 16, 32, num_key_value_heads=8, max_position_embeddings=4096)
    tiny = LlamaConfig(32000, 2048, 5632, 22, 32, num_key_value_heads=4)
    fast = {"loss_chunk_size": 4096, "fused_projections": True}
    return [
        # BOOST (arXiv 2512.12131): .85 and .56 s for 4 x 4,096 tokens. Assumed: not compiled.
        Figure("BOOST 1B, full rank, A100", run_of(one_b(5472), 4, 4096), a100, 16384 / 0.85),
        Figure("BOOST 1B, CoLA, A100", run_of(one_b(5472, True), 4, 4096, 512), a100, 16384 / 0.56),
        Figure("torchtitan 8B, eager, 8 H100", titan_8b(gpus=8), meta, 5762),
        Figure("torchtitan 8B, compiled, 8 H100", titan_8b(gpus=8, compiled=True), meta, 6667),
        Figure("torchtitan 8B, eager, 128 H100", titan_8b(gpus=128), meta, 5605),
        Figure("torchtitan 8B, compiled, 128 H100", titan_8b(gpus=128, compiled=True), meta, 6514),
        Figure("torchtitan 8B, 64 A100", titan(llama_8b, 1, 8192, gpus=64), a100, 2973, "infiniband-hdr"),
        Figure("torchtitan 13B, selective, 64 A100", titan(llama_13b, 2, 4096, gpus=64), a100, 1904, "infiniband-hdr"),
        Figure(
            "torchtitan 13B, 64 A100",
            titan(llama_13b, 2, 4096, gpus=64, transforms=()),
            a100,
            2162,
            "infiniband-hdr",
        ),
        Figure(
            "nanotron 1B, 8 H100",
            run_of(llama_1b, 3, 4096, gpus=8, strategy="ddp", precision="bf16-true", accumulate=16),
            h100,
            42000,
        ),
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


def ratios_only() -> list[Figure]:
    """List the figures of CoLA's paper, 64 x 256 tokens. The GPU is not said, so that only ratios are compared.

    The authors' networks are not compiled, and their RMSNorm is of several operations.
    """
    a100 = device_of(gpu_named("a100-80"))
    own = partial(run_of, rows=64, tokens=256, fused_norm=False)
    return [
        Figure("CoLA paper 1B, full rank", own(one_b(5461)), a100, 12365),
        Figure("CoLA paper 1B, CoLA", own(one_b(5461, True), rank=512), a100, 22979),
        Figure("CoLA paper 1B, CoLA-M", own(one_b(5461, True), rank=512, cola_m=True), a100, 16617),
    ]


RATIOS = (
    ("BOOST: CoLA ÷ full rank", "BOOST 1B, CoLA, A100", "BOOST 1B, full rank, A100"),
    ("CoLA paper: CoLA ÷ full rank", "CoLA paper 1B, CoLA", "CoLA paper 1B, full rank"),
    ("CoLA paper: CoLA-M ÷ CoLA", "CoLA paper 1B, CoLA-M", "CoLA paper 1B, CoLA"),
    ("torchtitan, 13B: selective ÷ no recompute", "torchtitan 13B, selective, 64 A100", "torchtitan 13B, 64 A100"),
    ("torchtitan, 8B: 128 ÷ 8 H100", "torchtitan 8B, compiled, 128 H100", "torchtitan 8B, compiled, 8 H100"),
    ("torchtitan, 8B: compiled ÷ eager", "torchtitan 8B, compiled, 8 H100", "torchtitan 8B, eager, 8 H100"),
    ("H100: CoLA ÷ full rank", "measured 1B, CoLA, H100", "measured 1B, full rank, H100"),
    ("H100: CoLA-M ÷ CoLA", "measured 1B, CoLA-M, H100", "measured 1B, CoLA, H100"),
)


def halves() -> tuple[list[Figure], list[Figure]]:
    """Divide the figures: the first, third … in the order of their names are fitted, the others held out."""
    ordered = sorted(figures(), key=lambda figure: figure.name)
    return ordered[::2], ordered[1::2]


def error(group: list[Figure], products: float, memory: float) -> float:
    """Return the root of the mean square of the logarithms of predicted by published speeds."""
    logs = [math.log(figure.predicted(products, memory) / figure.tokens_per_second) for figure in group]
    return math.sqrt(sum(each**2 for each in logs) / len(logs))


STEPS = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2)
"""Values of a factor that a fit tries."""


def fit() -> None:
    """Fit both factors to one half, one after the other until neither changes, and print the errors of both halves."""
    fitted, held_out = halves()
    best = (1.0, 1.0)
    while True:
        before = best
        best = min(((step, best[1]) for step in STEPS), key=lambda pair: error(fitted, *pair))
        best = min(((best[0], step) for step in STEPS), key=lambda pair: error(fitted, *pair))
        if best == before:
            break
    print("| factors: products, memory | error of the fitted half | of the other half |\n|---|---|---|")
    for factors in ((1.0, 1.0), best):
        errors = [f"{math.exp(error(group, *factors)) - 1:.1%}" for group in (fitted, held_out)]
        print(f"| {factors[0]:.2f}, {factors[1]:.2f} | {errors[0]} | {errors[1]} |")
    print("\nfitted:", "; ".join(figure.name for figure in fitted))


def main() -> None:
    """Print both tables in Markdown."""
    predicted, seen = {}, {}
    print("| tokens/s of a GPU | published or measured | predicted | error |\n|---|---|---|---|")
    for figure in figures() + ratios_only():
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
    fit() if "--fit" in sys.argv else main()
