"""Hold the roofline against closed forms and counts."""

import json
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from cola_lightning.cli.commands.estimate import numbers_of_gpus
from cola_lightning.costs import Run, gpu_named
from cola_lightning.costs.collectives import communication, gather_seconds, reduce_seconds
from cola_lightning.costs.devices import NETWORKS, device_of, network_named
from cola_lightning.costs.kernels import Kernel, compiled, eager
from cola_lightning.costs.operations import Tile
from cola_lightning.costs.roofline import alignment_share, kernel_seconds, product_seconds
from cola_lightning.costs.scaling import misalignment, plot_scaling, scale, scaling_table
from cola_lightning.costs.speed import predict
from cola_lightning.errors import InputError
from cola_lightning.methods import CoLA, CoLAM
from cola_lightning.models import FullRank, LlamaConfig
from cola_lightning.models.llama import build_llama

H100 = device_of(gpu_named("h100"))


def run_of(projection: object = FullRank, layers: int = 4, intermediate: int = 512, **settings) -> Run:
    config = LlamaConfig(1024, 256, intermediate, layers, 4)
    build = partial(build_llama, config=config, projection=projection)
    arguments = {"precision": "bf16-true"} | settings
    return Run(build, layers, partial(torch.optim.AdamW, fused=True), 4, 128, **arguments)


def products(run: Run) -> list:
    return [(s, o) for s in run.traced.sections for o in s.operations if o.product is not None]


def test_sections_have_all_flops_of_the_network():
    for layers in (1, 2, 5):
        run = run_of(partial(CoLA, rank=64), layers)
        total = sum(
            section.times * operation.flops for section in run.traced.sections for operation in section.operations
        )
        assert total == run.traced.step_flops


def test_a_products_flops_follow_from_its_sizes():
    for _, operation in products(run_of()):
        tile = operation.product
        assert operation.flops == 2 * tile.batch * tile.m * tile.n * tile.k


def test_odd_rows_are_seen_in_the_products_that_touch_them():
    odd = {
        (o.product.m, o.product.k, o.product.n)
        for _, o in products(run_of(intermediate=511))
        if o.product.alignment < 16
    }
    assert odd == {size for size in odd if 511 in size}
    assert len(odd) >= 3
    assert all(operation.product.alignment >= 16 for _, operation in products(run_of()))
    assert alignment_share(Tile(1, 64, 511, 64, 2), H100) < alignment_share(Tile(1, 64, 512, 64, 16), H100) == 1


def test_one_tile_more_than_multiprocessors_takes_another_round():
    full, more = (product_seconds(Tile(1, 256 * 132, columns, 4096, 16), 2, H100) for columns in (128, 129))
    assert more > 1.3 * full


def test_a_large_product_takes_its_flops_at_the_sustained_peak():
    size = 132 * 256
    seconds = product_seconds(Tile(1, size, size, size, 16), 2, H100)
    assert seconds == pytest.approx(2 * size**3 / (989.5e12 * H100.sustained), rel=0.02)


MEASURED = json.loads(
    (Path(__file__).parents[2] / "recipes" / "benchmark" / "results" / "products_h100.json").read_text()
)
"""Seconds, in thousandths, of single uncompiled products on an H100, by tokens and intermediate size."""


def measured_products(tokens: int, intermediate: int) -> list[tuple[str, Kernel, float]]:
    """List the products that were measured: name, kernel as it would be traced, seconds."""
    t, f, odd = tokens, intermediate, intermediate % 8 != 0
    aligned = 2 if odd else 16
    sizes = {  # M, K, N; whether the result alone has rows of f numbers
        "up": (t, 2048, f, True), "up_dx": (t, f, 2048, False), "up_dw": (f, t, 2048, False),
        "down": (t, f, 2048, False), "B": (t, 512, f, True), "B_dx": (t, f, 512, False), "B_dw": (f, t, 512, False),
        "A": (t, f, 512, False), "A_dx": (t, 512, f, False), "A_dw": (512, t, f, False),
    }  # fmt: skip
    found = []
    for name, milliseconds in MEASURED[f"{tokens}/{intermediate}"].items():
        m, k, n, only_result = sizes[name]
        tile = Tile(1, m, n, k, aligned, odd and only_result)
        kernel = Kernel("mm", 2 * m * n * k, 2 * (m * k + k * n + m * n), 1, 2, tile)
        found.append((name, kernel, milliseconds / 1e3))
    return found


@pytest.mark.parametrize("intermediate", [5472, 5461])
def test_single_products_are_predicted_as_an_h100_computed_them(intermediate):
    """Each within a third, half of them within 15 %, aligned or not."""
    errors = []
    for tokens in (1024, 4096, 16384):
        for _, kernel, seconds in measured_products(tokens, intermediate):
            predicted, _ = kernel_seconds(kernel, H100, False, pads=False)
            errors.append(predicted / seconds)
    assert min(errors) > 0.75
    assert max(errors) < 1.37
    assert 0.85 < statistics.median(errors) < 1.15


def test_the_result_alone_is_seen_to_be_misaligned():
    """x (N, D) times W (F, D) with an odd F: only the result has odd rows. Its input's gradient reads such rows."""
    tiles = [o.product for _, o in products(run_of(intermediate=511)) if o.product.alignment < 16]
    up = [tile for tile in tiles if tile.only_result]
    assert {(tile.k, tile.n) for tile in up} == {(256, 511)}
    assert any(not tile.only_result for tile in tiles)


def test_padding_costs_copies_and_is_taken_where_it_is_faster():
    _, kernel, _ = next(each for each in measured_products(16384, 5461) if each[0] == "up")
    alone, padded = (kernel_seconds(kernel, H100, False, pads)[0] for pads in (False, True))
    aligned = kernel_seconds(replace(kernel, product=replace(kernel.product, alignment=16)), H100, False, False)[0]
    assert aligned < padded < alone
    assert padded - aligned == pytest.approx(2 * kernel.bytes / H100.bandwidth)


def test_compiling_moves_fewer_bytes_in_fewer_kernels():
    sections = run_of().traced.sections
    apart, joined = eager(sections), compiled(sections)
    for before, after in zip(apart, joined, strict=True):
        assert len(after) <= len(before)
        assert sum(k.bytes for k in after) <= sum(k.bytes for k in before)
        assert sum(k.flops for k in after) == sum(k.flops for k in before)
    assert sum(map(len, joined)) < sum(map(len, apart))


def test_a_compiled_gated_mlp_reads_gate_and_up_and_writes_their_product():
    """In the forward pass of a layer, one kernel does silu and product: 3 tensors of N x F in bf16."""
    run = run_of()
    section = next(s for s in run.traced.sections if s.part == "layer" and not s.backward)
    (kernels,) = compiled([section])
    wide = 4 * 128 * 512 * 2
    assert any(k.operations == 2 and k.slow and k.bytes in (2 * wide, 3 * wide) for k in kernels)


def test_fused_adamw_moves_seven_numbers_of_each_parameter():
    """It reads weight, gradient and two moments, and writes all but the gradient."""
    run = run_of()
    moved = sum(o.bytes for o in run.optimizer_step.operations if "fused_adamw" in o.name) * run.optimizer_step.share
    assert moved == pytest.approx(2 * 7 * run.parameters.total.trained, rel=0.15)


def test_collectives_move_the_bytes_of_a_ring():
    network = NETWORKS[0]
    size = 1e9
    assert gather_seconds(size, 1, H100, network) == 0
    assert gather_seconds(size, 8, H100, network) == pytest.approx(size * 7 / 8 / (450e9 * 0.8), rel=0.02)
    assert gather_seconds(size, 16, H100, network) > gather_seconds(size, 8, H100, network)
    assert gather_seconds(size, 16, H100, network_named("ethernet")) > 10 * gather_seconds(size, 16, H100, network)


def test_latencies_are_those_of_nccls_model():
    """A ring's grows with the GPUs, a tree's with the logarithm of the nodes (src/graph/tuning.cc of NCCL)."""
    network = NETWORKS[0]
    assert gather_seconds(0, 8, H100, network) == pytest.approx(10e-6 + 7 * 1.9e-6)
    assert gather_seconds(0, 1024, H100, network) == pytest.approx(10e-6 + 896 * 1.9e-6 + 127 * 4e-6)
    assert reduce_seconds(0, 1024, H100, network) == pytest.approx(4.4e-6 + 2 * (7 * 1.2e-6 + 7 * 8.5e-6))


@pytest.mark.parametrize(
    "strategy", ["ddp", "fsdp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
)
def test_every_strategy_communicates_and_hides_some_of_it(strategy):
    run = run_of(strategy=strategy, gpus=16)
    exchanged = communication(run, H100, NETWORKS[0], 1.0, 2.0, 1)
    # All gradients of this small network fit into one bucket, which nothing hides under DDP.
    assert 0 < exchanged.exposed <= exchanged.seconds
    if run.layout.weights < 1:
        assert exchanged.exposed < 0.5 * exchanged.seconds
    weights = 2 * run.parameters.total.parameters
    passes = 3 if "fsdp" in strategy or strategy.endswith("3") else 2
    least = passes * weights * 15 / 16 / (400e9 * 0.8)
    assert exchanged.seconds >= least


def test_micro_batches_add_up_and_the_optimizer_does_not():
    once, twice = (predict(run_of(accumulate=n), H100) for n in (1, 2))
    assert 1.5 * once.step_seconds < twice.step_seconds < 2.2 * once.step_seconds
    assert twice.tokens == 2 * once.tokens
    assert twice.tokens_per_second > 0.9 * once.tokens_per_second


@pytest.mark.slow
def test_recomputing_takes_longer_and_does_not_count_for_mfu():
    plain = run_of(partial(CoLA, rank=64))
    again = replace(plain, transforms=(CoLAM().apply,))
    assert predict(again, H100).step_seconds > predict(plain, H100).step_seconds
    assert predict(again, H100).model_flops == predict(plain, H100).model_flops


def test_small_kernels_are_bound_by_launches():
    bounds = predict(run_of(), H100).parts[1].bounds
    assert bounds["launch"] + bounds["host"] > 0.8 * sum(bounds.values())


def test_an_unknown_network_is_refused():
    with pytest.raises(InputError, match="--network token-ring is not known; choose one of infiniband"):
        network_named("token-ring")


@pytest.mark.parametrize(
    ("bounds", "numbers"), [("8", [8]), ("1..8", [1, 2, 4, 8]), ("6..24", [6, 8, 16, 24]), ("1..1", [1])]
)
def test_bounds_of_gpus_are_powers_of_two_between(bounds, numbers):
    assert numbers_of_gpus(bounds) == numbers


@pytest.mark.parametrize("bounds", ["0", "8..1", "1..2..4", "many", "-1", "1.."])
def test_bad_bounds_of_gpus_are_refused(bounds):
    with pytest.raises(InputError, match=f"--gpus is {bounds}; "):
        numbers_of_gpus(bounds)


@pytest.mark.slow
def test_scaling_keeps_the_batch_of_a_gpu_or_of_all(tmp_path):
    scaled = scale(run_of(global_batch_size=32), H100, NETWORKS[0], [1, 8, 12, 16])
    for each in scaled:
        assert each.weak.tokens == 32 * 128 * each.gpus
        assert each.strong is None if each.gpus == 12 else each.strong.tokens == 32 * 128
    first, *_, last = scaled
    assert first.weak.tokens_per_second == first.strong.tokens_per_second
    assert first.weak.tokens_per_second < last.weak.tokens_per_second < 16 * first.weak.tokens_per_second
    assert scaling_table(scaled).row_count == 4
    plot_scaling(scaled, str(tmp_path / "scaling.png"))
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_misaligned_size_is_named_with_the_nearest_better_one():
    run = run_of(intermediate=5461)
    seconds = predict(run, H100).step_seconds
    line = misalignment(run, H100, NETWORKS[0], seconds)
    assert line.startswith("! intermediate_size 5461: its rows begin at multiples of 2 bytes")
    assert "--model.intermediate_size 5472" in line
    assert misalignment(run_of(intermediate=5472), H100, NETWORKS[0], seconds) is None
