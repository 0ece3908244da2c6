"""Two optimizers as one: what goes where, schedules, checkpoints, ranks, and strategies that cut matrices up."""

import json
from functools import partial

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from torch.optim import SGD, AdamW

from cola_lightning.cli.app import main
from cola_lightning.distributed.strategies import FSDP2Strategy, check_optimizer
from cola_lightning.errors import InputError
from cola_lightning.models import FullRank
from cola_lightning.optim import APOLLO, Fira, GaLore, HybridOptimizer, Muon, Parameters, WarmupCosine
from tests.conftest import REPOSITORY, tiny_llama
from tests.optim.ranks_run import MATRICES, train_all
from tests.optim.ranks_run import train as train_ranks
from tests.processes import Run

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def names(network, parameters) -> set[str]:
    wanted = {id(p) for p in parameters}
    return {name for name, p in network.named_parameters() if id(p) in wanted}


@pytest.mark.parametrize(("projection", "leaves"), [(FullRank, ("weight",)), (None, ("A.weight", "B.weight"))])
def test_only_the_seven_projections_count_as_matrices(projection, leaves):
    network = tiny_llama(projection, num_hidden_layers=1)
    parameters = Parameters(network)
    ours = {
        f"model.layers.0.{'self_attn' if part[0] in 'qkvo' else 'mlp'}.{part}.{leaf}"
        for part in PARTS
        for leaf in leaves
    }
    assert names(network, parameters.matrices) == ours
    assert names(network, parameters.other) == {name for name, _ in network.named_parameters()} - ours
    assert list(parameters) == list(network.parameters())


def test_frozen_parameters_are_not_optimized():
    network = tiny_llama(num_hidden_layers=1)
    network.model.layers[0].mlp.up_proj.A.weight.requires_grad_(False)
    parameters = Parameters(network)
    assert len(parameters.matrices) == 13
    assert len(parameters.other) == 5


def both(network) -> HybridOptimizer:
    return HybridOptimizer(Parameters(network), partial(Muon, lr=0.02), partial(AdamW, lr=0.01))


def train(network, optimizers, schedules, steps) -> None:
    ids = torch.arange(12).view(2, 6)
    for _ in range(steps):
        network(ids).float().square().mean().backward()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def test_one_object_does_what_two_do_and_one_schedule_scales_both():
    one, two = tiny_llama(num_hidden_layers=1), tiny_llama(num_hidden_layers=1)
    single = [both(one)]
    parameters = Parameters(two)
    pair = [Muon(parameters.matrices, lr=0.02), AdamW(parameters.other, lr=0.01)]
    schedules = [[WarmupCosine(o, 8, warmup_steps=2) for o in optimizers] for optimizers in (single, pair)]
    train(one, single, schedules[0], 6)
    train(two, pair, schedules[1], 6)
    assert [group["lr"] for group in single[0].param_groups] == [group["lr"] for o in pair for group in o.param_groups]
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert set(single[0].state) == set(one.parameters())


def test_a_closure_is_called_once():
    network, calls = tiny_llama(num_hidden_layers=1), []

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = network(torch.arange(6).view(1, 6)).square().mean()
        loss.backward()
        return loss

    with torch.no_grad():
        assert both(network).step(closure) > 0
    assert calls == [True]


@pytest.mark.slow
@pytest.mark.parametrize(("overlay", "precision"), [("galore", "32-true"), ("fira", "bf16-true"), ("muon", "32-true")])
def test_a_broken_run_goes_on_bit_for_bit(overlay, precision, tiny_run, tmp_path, monkeypatch):
    """Broken after three of six steps, in the middle of a projector's four."""
    monkeypatch.chdir(tmp_path)
    flags = [flag for flag in tiny_run if not flag.startswith(("--checkpoint", "--trainer.val_check"))]
    flags += [f"--config={REPOSITORY}/configs/method/{overlay}.yaml", f"--trainer.precision={precision}",
              "--trainer.limit_val_batches=0", "--trainer.logger=false"]  # fmt: skip
    if overlay != "muon":
        flags.append("--model.optimizer.init_args.matrix.init_args={update_proj_gap: 4, rank: 6}")
    flags.append("--checkpoint.every_n_train_steps=3")
    half = ["--trainer.limit_train_batches=3", "--trainer.max_epochs=1"]
    weights = []
    for folder, runs in (("whole", [[]]), ("broken", [half, ["--ckpt_path=last"]])):
        for more in runs:
            main(["fit", *flags, f"--run_dir={tmp_path / folder}", *more])
        saved = torch.load(tmp_path / folder / "checkpoints" / "last.ckpt", weights_only=True)
        assert saved["global_step"] == 6
        weights.append(saved["state_dict"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.distributed
def test_two_ranks_keep_the_same_weights_as_one(tmp_path):
    """The ranks are bit-equal, and one process within rounding."""
    Run(train_all, str(tmp_path / "losses.json"), ranks=2, folder=tmp_path).done()
    one, two = {name: train_ranks(name, 1) for name in MATRICES}, json.loads((tmp_path / "losses.json").read_text())
    for name in one:
        assert two[name]["ranks_differ"] is False
        assert two[name]["losses"] == pytest.approx(one[name]["losses"], abs=1e-3)
        assert one[name]["losses"][-1] < one[name]["losses"][0] - 0.05


GROUPS = f"--config={REPOSITORY}/configs/optimizer/adamw_groups.yaml"


@pytest.mark.parametrize("projection", [FullRank, None])
def test_groups_keep_decay_from_norms_and_embedding_and_have_rates_of_their_own(projection):
    """In closed form: where all gradients are 1, a step of AdamW takes lr from the decayed weights."""
    network = tiny_llama(projection, num_hidden_layers=1)
    adamw = [
        partial(AdamW, lr=lr, weight_decay=decay) for lr, decay in ((0.1, 0.5), (0.2, 0.0), (0.3, 0.0), (0.4, 0.5))
    ]
    optimizer = HybridOptimizer(Parameters(network), adamw[0], adamw[1], embedding=adamw[2], head=adamw[3])
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in network.named_parameters():
        lr, decay = (
            (0.3, 0.0) if "embed_tokens" in name
            else (0.4, 0.5) if "lm_head" in name
            else (0.2, 0.0) if "norm" in name
            else (0.1, 0.5)
        )  # fmt: skip
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - lr * decay) - lr, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("projection", [["--model.projection=FullRank"], []])
@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_groups_train_and_go_on_bit_for_bit(projection, strategy, tiny_run, tmp_path, monkeypatch, process_group):
    monkeypatch.chdir(tmp_path)
    dropped = ("--checkpoint", "--trainer.val_check", *(["--model.projection"] if projection else []))
    flags = [flag for flag in tiny_run if not flag.startswith(dropped)]
    flags += [*projection, GROUPS, f"--trainer.strategy={strategy}", "--trainer.limit_val_batches=0",
              "--trainer.logger=false", "--checkpoint.every_n_train_steps=3"]  # fmt: skip
    half = ["--trainer.limit_train_batches=3", "--trainer.max_epochs=1"]
    weights = []
    for folder, runs in (("whole", [[]]), ("broken", [half, ["--ckpt_path=last"]])):
        for more in runs:
            main(["fit", *flags, f"--run_dir={tmp_path / folder}", *more])
        weights.append(torch.load(tmp_path / folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


PAIRS = [AdamW, GaLore, Fira, APOLLO, Muon]


@pytest.mark.parametrize("matrix", PAIRS)
def test_strategies_that_flatten_parameters_are_refused_and_fsdp2_is_not(matrix):
    network = tiny_llama(num_hidden_layers=1)
    optimizers = [HybridOptimizer(Parameters(network), matrix, partial(SGD, lr=0.1))]
    if matrix is not AdamW:
        optimizers.append(matrix(Parameters(network).matrices))
    for optimizer in optimizers:
        check_optimizer(FSDP2Strategy(), optimizer)
        check_optimizer(DDPStrategy(), optimizer)
        for strategy in (FSDPStrategy(), DeepSpeedStrategy()):
            with pytest.raises(InputError, match=r"flattens the parameters; set --trainer.strategy fsdp2 or ddp"):
                check_optimizer(strategy, optimizer)
    check_optimizer(FSDPStrategy(), AdamW(network.parameters()))


@pytest.mark.parametrize(
    ("matrix", "advice"),
    [
        (torch.optim.Muon, "take Muon of cola_lightning"),
        (torch.optim.Adafactor, "take GaLore, Fira, APOLLO or Muon"),
    ],
)
def test_fsdp2_refuses_a_part_that_may_need_whole_matrices(matrix, advice):
    optimizer = HybridOptimizer(Parameters(tiny_llama(num_hidden_layers=1)), matrix, partial(AdamW, lr=0.01))
    with pytest.raises(InputError, match=f"{matrix.__name__} of torch may need whole matrices.* ddp, or {advice}"):
        check_optimizer(FSDP2Strategy(), optimizer)
    check_optimizer(DDPStrategy(), optimizer)


def test_the_refusal_is_one_line_before_training(tiny_run, tmp_path, capsys, monkeypatch, process_group):
    monkeypatch.chdir(tmp_path)
    flags = [*tiny_run, f"--config={REPOSITORY}/configs/method/muon.yaml", "--trainer.strategy=fsdp2",
             "--model.optimizer.init_args.matrix=torch.optim.Muon"]  # fmt: skip
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *flags, f"--run_dir={tmp_path / 'run'}"])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "set --trainer.strategy ddp" in errors[0]


def test_other_input_is_refused():
    network = tiny_llama(num_hidden_layers=1)
    with pytest.raises(InputError, match="was given a generator"):
        HybridOptimizer(network.parameters(), partial(GaLore, rank=2), SGD)
    network.model.requires_grad_(False)
    with pytest.raises(InputError, match="finds no trained matrix"):
        both(network)
