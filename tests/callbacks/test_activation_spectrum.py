"""One process; under DDP and FSDP2 see test_loss_guard, whose runs have this callback too."""

from functools import partial

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cola_lightning.callbacks import ActivationSpectrum
from cola_lightning.callbacks.effective_rank import effective_rank
from cola_lightning.errors import InputError
from cola_lightning.methods import CoLA, CoLAM
from cola_lightning.models import FullRank
from cola_lightning.training.module import LanguageModel
from tests.conftest import loader, tiny_trainer


def svd_by_hand(network, batch):
    """σ² of the first layer's activations on the positions that are not padding, in the plainest way."""
    block = network.model.layers[0]
    seen = {}
    with torch.no_grad():
        hidden = network.model.embed_tokens(batch["input_ids"])
        seen["self_attn.q_proj.input"] = x = block.input_layernorm(hidden)
        rotary = network.model.rotary(x.shape[1], like=x)
        attention = block.self_attn
        mixed = attention.mix(attention.q_proj(x), attention.k_proj(x), attention.v_proj(x), rotary)
        seen["self_attn.o_proj.latent"] = mixed @ attention.o_proj.A.weight.T
        seen["self_attn.o_proj.output"] = out = attention.o_proj(mixed)
        hidden = hidden + out
        seen["mlp.gate_proj.input"] = x = block.post_attention_layernorm(hidden)
        inner = block.mlp.combine(block.mlp.gate_proj(x), block.mlp.up_proj(x))
        seen["mlp.down_proj.latent"] = inner @ block.mlp.down_proj.A.weight.T
        seen["mlp.down_proj.output"] = block.mlp.down_proj(inner)
    kept = batch["labels"] != -100
    return {name: torch.linalg.svdvals(x[kept].double()).square() for name, x in seen.items()}


def spectra(callback, model, batch, run):
    return {name: layers[0] for name, layers in callback.measure(run, model.network, batch).items()}


@pytest.mark.parametrize("keep", [None, "residual_and_latents", "latents"])
def test_spectra_are_those_of_the_activations_without_padding(keep):
    callback = ActivationSpectrum(every_n_steps=100)
    run, model, batches = tiny_trainer(callback, *([CoLAM(keep)] if keep else []), steps=2)
    run.fit(model, loader(batches))
    found, expected = spectra(callback, model, batches[0], run), svd_by_hand(model.network, batches[0])
    assert found.keys() == expected.keys()
    for name, squares in expected.items():
        assert found[name].tolist() == pytest.approx(squares.tolist(), rel=1e-3, abs=1e-5 * float(squares[0]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.network.modules())


@pytest.mark.slow
def test_compiled_layers_are_looked_into_too():
    callback = ActivationSpectrum(every_n_steps=2)
    run, model, batches = tiny_trainer(callback, steps=3)
    model.compile_layers = True
    run.fit(model, loader(batches))
    assert model.network.model.layers[0]._compiled_call_impl is not None
    found, expected = spectra(callback, model, batches[0], run), svd_by_hand(model.network, batches[0])
    assert found.keys() == expected.keys()
    for name, squares in expected.items():
        assert found[name].tolist() == pytest.approx(squares.tolist(), rel=1e-3, abs=1e-5 * float(squares[0]))


@pytest.mark.slow
def test_ranks_histograms_and_the_picture_are_logged_every_so_many_steps(tmp_path):
    callback = ActivationSpectrum(every_n_steps=2, share=0.9, activations=["mlp.up_proj.output", "mlp.up_proj.latent"])
    run, model, batches = tiny_trainer(callback, steps=5, logger=TensorBoardLogger(tmp_path, name="", version=""))
    run.fit(model, loader(batches))
    board = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0, "images": 0}).Reload()
    for name, most in (("mlp.up_proj.output", 4), ("mlp.up_proj.latent", 4)):
        events = board.Scalars(f"effective_rank/{name}/00")
        assert [event.step for event in events] == [2, 4]
        assert all(1 <= event.value <= most for event in events)  # neither can have more than the bottleneck
        assert [event.step for event in board.Histograms(f"spectrum/{name}")] == [2, 4]
    assert [event.step for event in board.Images("spectrum")] == [2, 4]
    assert board.Images("spectrum")[0].width > 300


def test_a_bottleneck_shows_and_full_rank_has_no_latent():
    torch.manual_seed(0)
    ids = torch.randint(1, 50, (8, 64))
    batch = {"input_ids": ids, "labels": ids}
    ranks = {}
    for projection in (partial(CoLA, rank=4), FullRank):
        callback = ActivationSpectrum(share=1 - 1e-5)
        run, model, _ = tiny_trainer(callback, steps=1)
        model = LanguageModel(50, 16, 24, 1, 2, projection=projection)
        run.fit(model, loader([batch]))
        found = spectra(callback, model, batch, run)
        assert ("mlp.down_proj.latent" in found) == (projection is not FullRank)
        ranks[projection] = effective_rank(found["mlp.down_proj.output"], callback.share)
    assert list(ranks.values()) == [4, 16]


def test_only_so_many_tokens_are_taken():
    callback = ActivationSpectrum(tokens=5)
    run, model, batches = tiny_trainer(callback, steps=1)
    run.fit(model, loader(batches))
    found = spectra(callback, model, batches[0], run)
    assert len(found["self_attn.q_proj.input"]) == 5


def test_what_cannot_work_is_refused_before_training(monkeypatch):
    for settings, message in (
        ({"every_n_steps": 0}, "every_n_steps is 0; it must be at least 1"),
        ({"share": 1.5}, "share is 1.5"),
        ({"tokens": 0}, "tokens is 0"),
    ):
        with pytest.raises(InputError, match=message):
            ActivationSpectrum(**settings)
    for name in ("mlp.gate.input", "mlp.up_proj.middle"):
        run, model, batches = tiny_trainer(ActivationSpectrum(activations=[name]), steps=1)
        with pytest.raises(
            InputError, match=rf"no activation {name}; take .input, .latent or .output of one of self_a"
        ):
            run.fit(model, loader(batches))
    monkeypatch.setattr("cola_lightning.callbacks.activation_spectrum.find_spec", lambda name: None)
    run, model, batches = tiny_trainer(ActivationSpectrum(), steps=1)
    with pytest.raises(InputError, match=r"pip install 'cola-lightning\[plots\]'"):
        run.fit(model, loader(batches))
