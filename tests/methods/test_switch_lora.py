from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cola_lightning.errors import InputError
from cola_lightning.methods import SwitchLoRA, SwitchLoRACallback
from cola_lightning.methods.switch_lora_schedule import Exchange, ExchangeSchedule
from cola_lightning.optim import RowAdamW
from tests.conftest import loader, tiny_llama, tiny_trainer
from tests.methods.runs import train


def switching(modules, total_steps=100, **settings):
    """Return a callback at the start of a run over these projections."""
    callback = SwitchLoRACallback(**settings, seed=0)
    network = nn.ModuleList(modules)
    trainer = SimpleNamespace(
        optimizers=[RowAdamW(network.parameters())],
        max_steps=total_steps,
    )
    callback.on_fit_start(trainer, SimpleNamespace(network=network))
    callback.after_step = torch.no_grad()(partial(callback.after_step, trainer))
    return callback


@torch.no_grad()
def exchange(callback, side, step, count):
    """Exchange the next rows of a factor of the first projection."""
    due = Exchange(0, side, callback.schedule.first(0, side), count)
    callback._switch(due, step, *callback._read([due])[0])


def test_switches_leave_the_logits_as_they_were():
    network = tiny_llama(partial(SwitchLoRA, rank=8, alpha=8)).double().eval()
    ids = torch.randint(300, (2, 20))
    before = network(ids)
    modules = [module for module in network.modules() if isinstance(module, SwitchLoRA)]
    starts = [[getattr(module, name).clone() for name in ("A", "B", "weight")] for module in modules]
    callback = switching(modules, interval=8, hold_steps=2, descent=10.0)
    for step in range(1, 30):
        callback.after_step(step)
    torch.testing.assert_close(network(ids), before, atol=1e-6, rtol=0)
    for module, start in zip(modules, starts, strict=True):
        for name, old in zip(("A", "B", "weight"), start, strict=True):
            assert (getattr(module, name) - old).norm() > 0.1 * old.norm(), name


def test_vectors_are_taken_in_turn_and_come_back_from_the_pool():
    """Each vector that is switched out waits in the pool until its turn comes again, N = 6 exchanges later."""
    module = SwitchLoRA(6, 9, rank=2)
    callback = switching([module], interval=2, hold_steps=0)
    first = module.A.detach().clone()
    seen = []
    for _ in range(6):
        exchange(callback, "A", 1, 1)
        seen.append(module.A.detach().clone())
    pool = callback._candidates(0, module)["A"]
    for turn, (before, after) in enumerate(zip([first, *seen], seen, strict=False)):
        row = turn % 2
        assert torch.equal(after[1 - row], before[1 - row])
        assert torch.equal(after[row], pool[turn] if turn < 4 else first[turn - 4])
    assert torch.equal(seen[-1], first)


def test_a_vector_may_be_its_own_candidate():
    """With R = N = 4 a vector goes to the place from which its candidate is taken, so nothing changes."""
    module = SwitchLoRA(4, 4, rank=4)
    callback = switching([module], interval=1, hold_steps=0)
    before = module.A.detach().clone(), module.weight.detach().clone()
    exchange(callback, "A", 1, 3)
    assert torch.equal(module.A, before[0])
    assert torch.equal(module.weight, before[1])


def test_counterparts_lose_their_state_and_get_no_update_for_five_steps():
    module = SwitchLoRA(20, 30, rank=4)
    callback = switching([module], interval=10)
    optimizer = callback.optimizer

    def step():
        module(torch.randn(8, 20)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    exchange(callback, "A", 3, 2)
    assert not optimizer.state[module.B]["exp_avg"][:2].any()
    assert not optimizer.state[module.B]["exp_avg_sq"][:2].any()
    assert optimizer.state[module.B]["step"].flatten().tolist() == [0, 0, 3, 3]
    assert optimizer.state[module.A]["step"].flatten().tolist() == [3, 3, 3, 3]
    before = module.B.detach().clone(), module.A.detach().clone()
    for _ in range(5):
        step()
        assert torch.equal(module.B[:2], before[0][:2])
        assert (module.B - before[0])[2:].norm(dim=1).min() > 1e-4
        assert not torch.equal(module.A[:2], before[1][:2])
    step()
    assert (module.B - before[0])[:2].norm(dim=1).min() > 1e-4


def test_rows_that_are_held_are_left():
    """Half a turn of five rows is two or three, which is at times too near; no row is switched while it is held."""
    module = SwitchLoRA(20, 30, rank=5)
    callback = switching([module], interval=4, hold_steps=2, descent=1e6)
    held_until = {"A": [0] * 5, "B": [0] * 5}
    switches, original = {"A": 0, "B": 0}, callback._switch

    def watched(due, step, *vectors):
        for n in range(due.rows):
            row = (due.first + n) % 5
            assert held_until[due.side][row] <= step
            held_until["B" if due.side == "A" else "A"][row] = step + 2
        switches[due.side] += due.rows
        original(due, step, *vectors)

    callback._switch = watched
    refused = 0
    free = callback.schedule.free

    def counted(index, side, step, count):
        nonlocal refused
        found = free(index, side, step, count)
        refused += count - found
        return found

    callback.schedule.free = counted
    for step in range(1, 200):
        callback.after_step(step)
    assert refused > 0
    assert min(switches.values()) > 100


@pytest.mark.parametrize(("step", "free"), [(14, 1), (15, 3), (16, 3), (17, 4)])
def test_an_exchange_holds_the_same_rows_of_the_other_factor_for_five_steps(step, free):
    """A exchanged rows 0 and 1 at step 10, and row 2 at step 12. Four rows of B are asked for: 7, 0, 1 and 2."""
    schedule = ExchangeSchedule(interval=40, descent=0.1, hold_steps=5)
    schedule.ranks = [8]
    schedule.reset()
    for exchange, made in ((Exchange(0, "A", 0, 2), 10), (Exchange(0, "A", 2, 1), 12), (Exchange(0, "B", 4, 3), 1)):
        schedule.record(exchange, made)
    assert schedule.first(0, "B") == 7
    assert schedule.free(0, "B", step, 4) == free


def test_rate_and_number_follow_the_formula():
    """Of R = 16 vectors, 16 / 40 * 0.3^((t + 1) / T) at step t, T = a tenth of the run."""
    modules = [SwitchLoRA(16, 16, rank=16) for _ in range(8)]
    callback = switching(modules, total_steps=2000, hold_steps=0)
    expected = [16 / 40 * 0.3 ** ((step + 1) / 200) for step in range(1, 401)]
    assert [16 * callback.schedule.rate(step, 2000) for step in range(1, 401)] == pytest.approx(expected)
    for step in range(1, 401):
        callback.after_step(step)
    assert all(each["A"] == each["B"] for each in callback.schedule.done)  # rounding is drawn once for both factors
    done = [each["A"] for each in callback.schedule.done]
    assert sum(done) / len(done) == pytest.approx(sum(expected), abs=4 * (sum(expected) / len(done)) ** 0.5)
    assert len(set(done)) > 1  # and for each projection apart


def test_the_turn_of_b_stays_half_a_round_from_that_of_a():
    """Over a run in which every vector is exchanged several times, and none is left because it is held."""
    module = SwitchLoRA(64, 64, rank=16)
    callback = switching([module], interval=10, hold_steps=2, descent=1e6)
    for step in range(1, 300):
        callback.after_step(step)
        assert (callback.schedule.first(0, "B") - callback.schedule.first(0, "A")) % 16 == 8
    assert callback.schedule.done[0]["A"] > 3 * 16


def test_initial_weights_as_a_whole_are_distributed_as_usual():
    torch.manual_seed(0)
    module = SwitchLoRA(400, 600, rank=100)
    assert module.dense().std().item() == pytest.approx(0.02, rel=0.02)
    a, b = (600**0.5 * 100 / 400**1.5) ** 0.25 * 3**-0.25, (100 / (400 * 600) ** 0.5) ** 0.25 * 3**-0.25
    assert module.A.std().item() == pytest.approx(a, rel=0.02)
    assert module.B.std().item() == pytest.approx(b, rel=0.02)
    branch = module.scale * module.B.T @ module.A
    assert branch.std().item() == pytest.approx((3 * 400) ** -0.5, rel=0.1)


def test_candidates_are_spread_like_the_start():
    module = SwitchLoRA(400, 600, rank=100)
    pools = switching([module]).pools[0]
    assert {side: tuple(pool.shape) for side, pool in pools.items()} == {"A": (400, 400), "B": (400, 600)}
    for side, factor in (("A", module.A), ("B", module.B)):
        assert pools[side].std().item() == pytest.approx(factor.std().item(), rel=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": 9.0}, "interval is 9.0; it must be at least 10, twice hold_steps"),
        ({"hold_steps": -1}, "hold_steps is -1"),
        ({"descent": 0.0}, "descent is 0.0; it must be above 0"),
    ],
)
def test_arguments_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        SwitchLoRACallback(**settings)


def test_another_optimizer_and_other_projections_are_refused():
    trainer, model, batches = tiny_trainer(SwitchLoRACallback(), steps=1)
    with pytest.raises(InputError, match="acts on SwitchLoRA projections, of which the network has none; set --model"):
        trainer.fit(model, loader(batches))
    with pytest.raises(InputError, match=r"which AdamW cannot; set --model.optimizer cola_lightning.optim.RowAdamW"):
        train("switch_lora", optimizer=torch.optim.AdamW)
