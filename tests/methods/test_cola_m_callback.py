from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from cola_lightning.errors import InputError
from cola_lightning.methods import CoLA, CoLAM, CRNet, CRNetRecompute
from cola_lightning.models import FullRank
from cola_lightning.optim import WarmupCosine
from cola_lightning.training.module import LanguageModel
from tests.conftest import tiny_llama
from tests.recorder import Recorder, loss

KEEPS = ["residual_and_latents", "attention_and_mlp_latents", "latents", "block_input"]


def train(tmp_path, *callbacks, skip=0, ckpt_path=None, **trainer):
    torch.manual_seed(0)
    model = LanguageModel(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection=partial(CoLA, rank=8),
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        schedule=partial(WarmupCosine, warmup_steps=5),
    )
    starts = torch.randint(63, (100, 4, 1), generator=torch.Generator().manual_seed(1))
    ids = 1 + (starts + torch.arange(24)) % 63
    batches = [{"input_ids": rows, "labels": rows} for rows in ids[skip:]]
    losses = Recorder(loss=loss)
    run = L.Trainer(
        accelerator="cpu", max_steps=50, logger=False, enable_checkpointing=False, gradient_clip_val=0.5,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[losses, *callbacks], **({"max_epochs": 1} | trainer),
    )  # fmt: skip
    run.fit(model, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path, weights_only=True)
    return losses.values["loss"], model, run


@pytest.mark.slow
def test_fifty_steps_give_the_same_curve(tmp_path):
    plain, model, _ = train(tmp_path, precision="64-true")
    for keep in KEEPS:
        curve, other, _ = train(tmp_path, CoLAM(keep), precision="64-true")
        assert other.state_dict().keys() == model.state_dict().keys()
        if keep == "latents":
            assert curve == pytest.approx(plain, rel=1e-10)
        else:
            assert curve == plain
    assert plain[-1] < 0.5 * plain[0]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_curves_under_bf16_with_accumulation(precision, tmp_path):
    exact, plain = (
        torch.tensor(train(tmp_path, precision=each, accumulate_grad_batches=2)[0]) for each in ("32-true", precision)
    )
    for keep in KEEPS:
        curve = torch.tensor(train(tmp_path, CoLAM(keep), precision=precision, accumulate_grad_batches=2)[0])
        if keep == "latents":  # its float32 stream rounds otherwise; no further from float32 than bf16 itself
            assert (curve - exact).abs().mean() <= 1.5 * (plain - exact).abs().mean()
        else:
            assert torch.equal(curve, plain)


@pytest.mark.slow
@pytest.mark.parametrize("keep", KEEPS)
def test_a_run_resumes_with_it_and_without(keep, tmp_path):
    whole, *_ = train(tmp_path, precision="64-true")
    for first, second in (([], [CoLAM(keep)]), ([CoLAM(keep)], [])):
        half, _, run = train(tmp_path, *first, limit_train_batches=20, precision="64-true")
        run.save_checkpoint(tmp_path / "half.ckpt")
        half_way = tmp_path / "half.ckpt"
        rest, *_ = train(tmp_path, *second, ckpt_path=half_way, skip=20, max_epochs=2, precision="64-true")
        assert half + rest == pytest.approx(whole, rel=1e-10)


def test_choosing_again_replaces_the_first_choice():
    network = tiny_llama(partial(CoLA, rank=4))
    attention = [*network.model.layers[0].self_attn.children()]
    for keep, kept in (("attention_and_mlp_latents", False), ("residual_and_latents", True)):
        CoLAM(keep).apply(network)
        assert [projection.keeps_latent for projection in attention] == [kept] * 4


def fake_trainer(*callbacks, strategy=None):
    return SimpleNamespace(callbacks=list(callbacks), strategy=strategy)


def test_full_rank_is_refused_but_for_block_input(tmp_path):
    for keep in ("residual_and_latents", "attention_and_mlp_latents", "latents"):
        with pytest.raises(InputError, match=r"q_proj is FullRank; set keep: block_input, or --model.projection CoLA"):
            CoLAM(keep).apply(tiny_llama(FullRank))
    CoLAM("block_input").apply(tiny_llama(FullRank))


def test_what_cannot_work_is_refused_with_the_reason():
    with pytest.raises(InputError, match="CoLAM: keep is everything; it must be residual_and_latents, "):
        CoLAM("everything")
    with pytest.raises(InputError, match="latents_dtype float8 goes with keep: latents"):
        CoLAM(latents_dtype="float8")
    callback = CoLAM()
    with pytest.raises(InputError, match="CoLAM and CoLAM are both among the callbacks; remove one"):
        callback.setup(fake_trainer(callback, CoLAM()), None, "fit")
    strategy = FSDPStrategy(activation_checkpointing_policy={nn.Linear})
    with pytest.raises(InputError, match="activation_checkpointing_policy of its own"):
        callback.setup(fake_trainer(callback, strategy=strategy), None, "fit")


def quiet_trainer(*callbacks, **settings):
    return L.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), **settings,
    )  # fmt: skip


def small(projection, **settings):
    return LanguageModel(64, 32, 48, 2, 4, projection=projection, **settings)


def batches(first=0):
    ids = 1 + (torch.arange(first, first + 24).view(2, 1, 12) % 63)
    return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "projection"),
    [(CoLAM(keep), partial(CoLA, rank=8)) for keep in KEEPS] + [(CRNetRecompute(), partial(CRNet, rank=8))],
)
@pytest.mark.parametrize("before", ["validated before", "built by a callback before it in the list", "twice"])
def test_a_policy_is_applied_whatever_was_called_before_fit(policy, projection, before):
    """Seen by what an evaluation of the blocks in training does: it calls the policy."""
    model, others = small(projection), []
    if before == "validated before":
        quiet_trainer().validate(model, batches(), verbose=False)
    elif before == "twice":
        quiet_trainer(policy).fit(model, batches())
    else:
        others = [WeightAveraging()]  # Lightning's; it has the network built as it is set up
    quiet_trainer(*others, policy).fit(model, batches(), batches())
    called = []
    for block in model.network.model.layers:
        assert block.recompute is not None
        own = block.recompute
        block.recompute = lambda *arguments, own=own: called.append(own) or own(*arguments)
    model.network(torch.ones(1, 4, dtype=torch.long))
    assert len(called) == 2
    assert len(model.transforms) == 1


@pytest.mark.slow
def test_a_policy_that_comes_too_late_is_refused():
    model = small(partial(CoLA, rank=8), compile=True)
    model.configure_model()
    with pytest.raises(InputError, match="CoLAM has to change the network before it is compiled and sharded"):
        quiet_trainer(CoLAM()).fit(model, batches())
