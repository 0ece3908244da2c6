from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch import nn

from cola_lightning.costs import Flops, Run
from cola_lightning.costs.counters import Recorder, count_flops
from cola_lightning.methods import SST, CoLA, CoLAM, CRNet, LaX, LoRA, LowRank, ReLoRA, SLTrain, SwitchLoRA
from cola_lightning.models import FullRank, LlamaConfig
from cola_lightning.models.llama import build_llama
from cola_lightning.training.losses import next_token_losses
from tests.costs.published import RANKS, SIZES, network

SETTINGS = {
    "none": None,
    "residual_and_latents": {},
    "residual_and_latents, attention": {"keep_attention": True},
    "latents": {"keep": "latents"},
    "latents, attention": {"keep": "latents", "keep_attention": True},
    "latents, float8": {"keep": "latents", "latents_dtype": "float8"},
    "block_input": {"keep": "block_input"},
}
SHAPES = {
    "small": (300, 64, 96, 5, 4, 3, 32),
    "wide": (500, 128, 160, 4, 2, 2, 48),
    "one layer": (200, 32, 48, 1, 2, 2, 16),
}
"""V, D, F, layers, heads, B, T."""
CASES = [
    *(("small", setting, CoLA) for setting in SETTINGS),
    ("small", "block_input", FullRank),
    ("one layer", "none", LowRank),
    ("one layer", "latents", CoLA),
    ("wide", "none", FullRank),
    ("wide", "residual_and_latents", LowRank),
    ("wide", "latents, attention", CoLA),
]


def run_of(shape: str, setting: str, projection: type, **settings) -> Run:
    v, d, f, layers, heads, rows, tokens = SHAPES[shape]
    make = FullRank if projection is FullRank else partial(projection, rank=d // 4)
    build = partial(build_llama, config=LlamaConfig(v, d, f, layers, heads), projection=make)
    transforms = () if SETTINGS[setting] is None else (CoLAM(**SETTINGS[setting]).apply,)
    arguments = {"transforms": transforms, "fused_norm": False} | settings
    return Run(build, layers, partial(torch.optim.AdamW, foreach=False), rows, tokens, **arguments)


def real_step(run: Run, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, callable]:
    """Return a network of real numbers with gradients, and its training step."""
    network = run.build().to(dtype)
    for transform in run.transforms:
        transform(network)
    ids = torch.ones(run.batch_size, run.sequence_length, dtype=torch.long)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step(autocast: torch.dtype | None = None) -> None:
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            total, kept = next_token_losses(network, {"input_ids": ids, "labels": ids}, reduction="sum")
            loss = total / kept.sum()
        del total, kept
        loss.backward()

    return network, step


def test_the_recorder_counts_the_same_flops_as_pytorchs_counter():
    _, step = real_step(run_of("small", "residual_and_latents", CoLA))
    with Recorder() as recorder:
        step()
    assert recorder.flops.total() == count_flops(step)


METHODS = {
    "LaX": partial(LaX, rank=16),
    "CR-Net": partial(CRNet, rank=16),
    "SLTrain": partial(SLTrain, rank=16),
    "LoRA": partial(LoRA, rank=16),
    "ReLoRA": partial(ReLoRA, rank=16),
    "SwitchLoRA": partial(SwitchLoRA, rank=16),
    "SST": partial(SST, rank=16),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_traced_as_it_runs(method):
    """Also those whose initialization reads a number that it drew (LaX), which fake tensors do not have."""
    plain = run_of("small", "none", FullRank)
    run = replace(plain, build=partial(plain.build, projection=METHODS[method]))
    state = torch.random.get_rng_state()
    assert run.memory.optimizer > 0
    traced = run.traced.step_flops
    assert torch.equal(torch.random.get_rng_state(), state)
    assert traced == count_flops(real_step(run)[1])


@pytest.mark.slow
def test_fused_projections_and_chunked_loss_have_the_same_flops():
    plain = run_of("small", "residual_and_latents", CoLA)
    fast = replace(plain, build=partial(plain.build, fused_projections=True, loss_chunk_size=20))
    assert fast.flops == plain.flops


@cache
def published(kind: str, size: str) -> Flops:
    """Count the FLOPs of a published model for one row of 256 tokens."""
    return Run(network(kind, size), SIZES[size][2], torch.optim.AdamW, 1, 256).flops


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["full", "cola"])
def test_flops_of_the_published_models_match_the_papers_formulas(kind, size):
    d, f, layers, _ = SIZES[size]
    r, n, vocabulary = RANKS[size], 256, 32000
    flops = published(kind, size)
    # Table of compute of arXiv 2502.10940: forward and backward of a layer over one row
    layer = {
        "full": 24 * n * d**2 + 12 * n**2 * d + 18 * n * d * f,
        "cola": 48 * n * d * r + 12 * n**2 * d + 18 * n * r * (d + f),
    }
    assert flops.model == layers * layer[kind] + 6 * n * d * vocabulary
    assert flops.forward * 3 == flops.model
    assert flops.recomputed == layers * 2 * n**2 * d  # the kernel recomputes attention's scores


RATIOS = {
    "60m": (0.395, 0.441, 0.650),
    "130m": (0.528, 0.553, 0.649),
    "350m": (0.396, 0.420, 0.474),
    "1b": (0.396, 0.408, 0.438),
    "7b": (0.395, 0.401, 0.413),
}


@pytest.mark.parametrize("size", ["60m", *(pytest.param(size, marks=pytest.mark.slow) for size in list(SIZES)[1:])])
def test_ratio_of_low_rank_to_full_rank_flops(size):
    """Count projections alone, with attention's scores, and with the head; rows of 256 tokens."""
    d, _, layers, _ = SIZES[size]
    forward = {kind: published(kind, size).forward / 256 for kind in ("full", "cola")}
    attention, head = 4 * 256 * d * layers, 2 * d * 32000
    ratios = ((forward["cola"] - less) / (forward["full"] - less) for less in (attention + head, head, 0))
    assert tuple(round(ratio, 3) for ratio in ratios) == RATIOS[size]


@pytest.mark.slow
def test_recomputed_flops_match_the_formulas():
    """At F = 2.5 D.

    The paper says that checkpointing blocks of full rank recomputes 23 n D² + 4 n² D, and CoLA-M 18.5 n D R + 4 n² D.
    This package does not recompute the last product of a block (5 n D² at full rank; for CoLA-M the up-projection of
    down, which leaves 18 n D R). Attention's kernel recomputes its scores in any case.
    """
    n, d, r, layers = 64, 256, 64, 3
    build = partial(build_llama, config=LlamaConfig(100, d, 640, layers, num_attention_heads=4))
    scores = 2 * n**2 * d
    for projection, keep, expected in (
        (FullRank, "block_input", 18 * n * d**2 + 4 * n**2 * d),
        (partial(CoLA, rank=r), "residual_and_latents", 18 * n * d * r + 4 * n**2 * d),
    ):
        transforms = (CoLAM(keep).apply,)
        run = Run(partial(build, projection=projection), layers, torch.optim.AdamW, 1, n, transforms)
        assert run.flops.recomputed == layers * (expected + scores)


class Frozen(FullRank):
    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.weight.requires_grad_(False)


def test_frozen_weights_need_no_gradient_flops():
    run, trained = (run_of("small", "none", FullRank), run_of("small", "none", FullRank))
    frozen = Run(
        partial(run.build, projection=Frozen), run.layers, torch.optim.AdamW, run.batch_size, run.sequence_length
    )
    d, f, layers, tokens = 64, 96, 5, run.micro_batch_tokens
    assert trained.flops.model - frozen.flops.model == 2 * tokens * layers * (4 * d * d + 3 * d * f)
    assert frozen.parameters.total.frozen == layers * (4 * d * d + 3 * d * f)
