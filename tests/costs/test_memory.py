"""Compare predicted bytes with those that PyTorch's allocator gave on the CPU."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from cola_lightning.costs import Run, gpu_named, gpu_reported, memory_layout
from cola_lightning.costs.counters import count_flops
from cola_lightning.costs.gpus import GPUS
from cola_lightning.costs.memory_layout import PRECISIONS
from cola_lightning.costs.parameters import Parameters, Part
from cola_lightning.errors import InputError
from cola_lightning.methods import CoLA
from cola_lightning.models import FullRank
from tests.costs.published import SIZES, network
from tests.costs.test_flops import CASES, real_step, run_of

GIB = 2**30


def highest(run) -> int:
    """Return the most bytes that were allocated at once in ``run()``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def bytes_of(tensors) -> int:
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    storages = (tensor.untyped_storage() for tensor in local)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def working(run: Run) -> float:
    memory = run.memory
    return memory.activations + memory.logits + memory.backward


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "setting", "projection"), CASES)
def test_a_step_takes_the_predicted_memory_and_flops(shape, setting, projection):
    run = run_of(shape, setting, projection)
    _, step = real_step(run)
    assert run.traced.step_flops == count_flops(step)
    assert working(run) == pytest.approx(highest(step), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["none", "residual_and_latents"])
@pytest.mark.parametrize(
    "fast", [{"fused_projections": True}, {"loss_chunk_size": 64}], ids=lambda fast: next(iter(fast))
)
def test_a_step_with_a_fast_path_takes_the_predicted_memory_and_flops(fast, setting):
    plain = run_of("small", setting, CoLA)
    run = replace(plain, build=partial(plain.build, **fast))
    _, step = real_step(run)
    assert run.traced.step_flops == count_flops(step)
    assert working(run) == pytest.approx(highest(step), rel=0.05)
    if "loss_chunk_size" in fast:
        assert run.memory.logits < plain.memory.logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "setting"),
    [
        ("bf16-true", "none"),
        ("bf16-true", "latents, float8"),
        ("bf16-mixed", "none"),
        ("bf16-mixed", "residual_and_latents"),
        ("bf16-mixed", "latents"),
    ],
)
def test_a_step_takes_the_predicted_memory_in_bf16(precision, setting):
    dtype, autocast = PRECISIONS[precision]
    run = run_of("small", setting, CoLA, precision=precision)
    _, step = real_step(run, dtype)
    step(autocast)
    assert working(run) == pytest.approx(highest(lambda: step(autocast)), rel=0.05)


def test_activations_are_what_autograd_saves():
    run = run_of("wide", "none", CoLA)
    network, _ = real_step(run)
    ids, saved = torch.ones(run.batch_size, run.sequence_length, dtype=torch.long), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        network.model(ids)
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    assert run.memory.activations == pytest.approx(
        bytes_of(tensor for tensor in saved if tensor.untyped_storage()._cdata not in own), rel=0.05
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "precision"),
    [
        (torch.optim.AdamW, "32-true"),
        (torch.optim.AdamW, "bf16-true"),
        (partial(torch.optim.AdamW, fused=True), "bf16-true"),
        (partial(torch.optim.SGD, momentum=0.9), "bf16-true"),
    ],
)
def test_weights_gradients_and_states_are_those_of_real_tensors(make, precision):
    run = replace(run_of("small", "none", CoLA, precision=precision), make_optimizer=make)
    network, step = real_step(run, torch.bfloat16 if precision == "bf16-true" else torch.float32)
    optimizer = make(network.parameters())
    step()
    optimizer.step()
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    assert run.memory.weights == bytes_of(network.parameters())
    assert run.memory.gradients == bytes_of(parameter.grad for parameter in network.parameters())
    assert run.memory.optimizer == bytes_of(states)


@pytest.fixture
def four_ranks():
    """Make this process rank 0 of four. The others do not exist, and collectives send nothing."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("projection", "rows"), [(CoLA, 4), (CoLA, 16), (FullRank, 4)])
def test_fsdp2_takes_the_predicted_memory(projection, rows, four_ranks):
    run = replace(run_of("wide", "none", projection), strategy="fsdp2", gpus=4, batch_size=rows)
    network, step = real_step(run)
    network.zero_grad()
    for layer in network.model.layers:
        fully_shard(layer, mesh=four_ranks)
    fully_shard(network, mesh=four_ranks)
    optimizer = torch.optim.AdamW(network.parameters(), foreach=False)
    step()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = [bytes_of(network.parameters()), bytes_of(p.grad for p in network.parameters()), bytes_of(states)]
    memory = run.memory
    assert [memory.weights, memory.gradients, memory.optimizer] == pytest.approx(held, rel=0.05)
    assert memory.total - memory.step == pytest.approx(sum(held) + highest(step), rel=0.05)


# arXiv 2502.10940, memory in its table of perplexities: weights, gradients and two moments in bf16
PAPER = {
    "full": {"60m": 0.43, "130m": 1.00, "350m": 2.74, "1b": 9.98},
    "cola": {"60m": 0.32, "130m": 0.70, "350m": 1.38, "1b": 4.54},
}


@pytest.mark.slow
@pytest.mark.parametrize("size", ["60m", "130m", "350m", "1b"])
@pytest.mark.parametrize("kind", ["full", "cola"])
def test_memory_of_the_published_models_is_the_papers(kind, size):
    held = Run(network(kind, size), SIZES[size][2], torch.optim.AdamW, 1, 256, precision="bf16-true").static_memory
    assert round((held.weights + held.gradients + held.optimizer) / GIB, 2) == PAPER[kind][size]


@pytest.mark.parametrize(
    ("strategy", "gigabytes"),
    [("ddp", 120), ("deepspeed_stage_1", 31.4), ("deepspeed_stage_2", 16.6), ("deepspeed_stage_3", 1.9)],
)
def test_shares_are_those_of_the_zero_paper(strategy, gigabytes):
    """arXiv 1910.02054, figure 1: 7.5B parameters on 64 GPUs, 16-bit weights and gradients, 12 bytes for Adam."""
    layout = memory_layout(strategy, "16-mixed", 64)
    weight = layout.dtype.itemsize if layout.master else 2  # its baseline keeps 16-bit weights under plain DDP too
    total = 7.5 * (weight * (layout.weights + layout.gradients) + 12 * layout.optimizer)
    assert round(total, 1) == gigabytes


def parameters(total: int, layer: int, head: int) -> Parameters:
    counted = Parameters(layer=Part(layer))
    counted.parts["head"] = counted.parts["embedding"] = Part(head)
    counted.parts["MLP projections"] = Part(total - 2 * head)
    return counted


def test_buffers_of_each_strategy():
    sizes = parameters(total=1000, layer=100, head=50)
    assert memory_layout("auto", "bf16-true", 1).buffers(sizes) == (0, 0)
    assert memory_layout("auto", "bf16-true", 2).buffers(sizes) == (2000, 2000)
    assert memory_layout(DDPStrategy(gradient_as_bucket_view=True), "32-true", 2).buffers(sizes) == (0, 0)
    assert memory_layout("fsdp", "bf16-mixed", 4).buffers(sizes) == (2 * 100, 2 * (100 + 200 + 50 + 100))
    assert memory_layout("fsdp2", "bf16-mixed", 4).buffers(sizes)[0] == 4 * 100  # gathers float32, which autocast casts
    assert memory_layout("deepspeed_stage_2", "bf16-true", 4).buffers(sizes) == (8e8, 8e8)
    kept = memory_layout(FSDPStrategy(sharding_strategy="SHARD_GRAD_OP"), "bf16-true", 4).buffers(sizes)
    assert kept[0] == 2 * 1000


def test_offloaded_parts_take_no_gpu_memory():
    for strategy in ("deepspeed_stage_3_offload", "fsdp_cpu_offload"):
        layout = memory_layout(strategy, "bf16-true", 4)
        assert layout.weights == layout.gradients == layout.optimizer == 0
    layout = memory_layout("deepspeed_stage_2_offload", "bf16-true", 4)
    assert (layout.weights, layout.gradients, layout.optimizer) == (1, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ddp", "fp8", 1), "precision fp8 is not estimated; choose one of 64-true"),
        (("tpu", "32-true", 1), "strategy tpu is not known"),
        ((FSDPStrategy(sharding_strategy="NO_SHARD"), "32-true", 8), "NO_SHARD is not estimated"),
    ],
)
def test_unknown_strategies_and_precisions_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        memory_layout(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 16])
def test_the_largest_micro_batch_is_the_last_that_fits(rows):
    """Also if the search begins at a batch so small that the peak is in the optimizer's step."""
    run = replace(run_of("wide", "residual_and_latents", CoLA), make_optimizer=torch.optim.AdamW, batch_size=rows)
    gpu = replace(gpu_named("h100"), memory=0.05)
    assert (run.memory.step > 0) == (rows == 1)
    most = run.rows_that_fit(gpu)
    assert most > 16
    assert replace(run, batch_size=most).memory.total <= gpu.usable
    assert replace(run, batch_size=most + 1).memory.total > gpu.usable
    assert run.rows_that_fit(replace(gpu, memory=0.001)) == 0
    whole = replace(run, global_batch_size=96, gpus=4)
    assert [whole.micro_batch_for(each) for each in (0, 1, 7, 100)] == [0, 1, 6, 24]


def test_tracing_draws_no_random_number():
    before = torch.get_rng_state()
    assert run_of("one layer", "none", CoLA).memory.total > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA A100 80GB PCIe", "a100-80"), ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 NVL", "h100-nvl"), ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"), ("NVIDIA L40S", "l40s"), ("NVIDIA L4", "l4"), ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)  # fmt: skip
def test_gpus_are_found_by_the_name_that_pytorch_reports(reported, name):
    assert gpu_reported(reported) == gpu_named(name)


def test_unknown_gpus_are_refused():
    assert gpu_reported("NVIDIA GeForce GT 710") is None
    with pytest.raises(InputError, match="--gpu h9000 is not known; choose one of a100-40"):
        gpu_named("h9000")
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)


@pytest.mark.gpu
def test_a_gpu_takes_the_predicted_memory():
    run = replace(
        run_of("wide", "none", CoLA, precision="bf16-true", fused_norm=True), batch_size=64, sequence_length=256
    )
    with torch.device("cuda"):
        _, step = real_step(run, torch.bfloat16)
        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
    assert working(run) == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.05)
