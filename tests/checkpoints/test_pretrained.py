"""Load folders of the reference's CoLA and CoLA-M and of Hugging Face's LLaMA."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from cola_lightning import load_model
from cola_lightning.checkpoints.pretrained import _translate
from cola_lightning.errors import InputError
from tests.conftest import GOLDEN
from tests.models.test_llama import hugging_face

EXPECTED = load_file(GOLDEN / "expected.safetensors")


def loss_of(network, ids, labels):
    return cross_entropy(network(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def as_cola_m(name, layers=3):
    """Translate the name of a parameter of the reference's CoLA into that of its CoLA-M."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj\.cola_([ab])", name)
    if not match:
        return name
    layer, projection, factor = int(match[1]), match[2], match[3]
    regions = {
        "q": ("pre_attn", "self_attn"), "k": ("pre_attn", "self_attn"), "v": ("pre_attn", "self_attn"),
        "o": ("self_attn", "post_attn"), "gate": ("pre_mlp", "self_mlp"), "up": ("pre_mlp", "self_mlp"),
        "down": ("self_mlp", "post_mlp"),
    }  # fmt: skip
    region = regions[projection][factor == "b"]
    if region == "post_mlp" and layer < layers - 1:
        layer, region = layer + 1, "last_layer_post_mlp"
    return f"model.layers.{layer}.{region}.{'pre' if factor == 'a' else 'post'}_{projection}_proj.cola_{factor}"


def test_logits_and_gradients_equal_the_reference():
    network = load_model(GOLDEN)
    assert not network.training
    logits = network(EXPECTED["input_ids"])
    torch.testing.assert_close(logits, EXPECTED["logits"], atol=1e-5, rtol=0)
    loss = loss_of(network, EXPECTED["input_ids"], EXPECTED["labels"])
    torch.testing.assert_close(loss, EXPECTED["loss"][0])
    loss.backward()
    compared = 0
    parameters = dict(network.named_parameters())
    for name, gradient in EXPECTED.items():
        if name.startswith("grad."):
            ours, gradient = _translate(name.removeprefix("grad."), gradient)
            assert (parameters[ours].grad - gradient).norm() <= 1e-5 * gradient.norm(), name
            compared += 1
    assert compared == len(parameters)


def test_training_reproduces_the_references_losses_and_gradient_norms():
    network = load_model(GOLDEN).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.003, weight_decay=0.01)
    seen = []
    for ids in EXPECTED["train.input_ids"]:
        loss = loss_of(network, ids, ids)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        seen.append([loss.item(), norm.item()])
    torch.testing.assert_close(torch.tensor(seen), EXPECTED["train.loss_and_grad_norm"], atol=1e-4, rtol=0)


def test_the_references_cola_m_gives_the_same_network_as_its_cola(tmp_path):
    weights = load_file(GOLDEN / "model.safetensors")
    renamed = {as_cola_m(name): tensor for name, tensor in weights.items()}
    assert "model.layers.1.last_layer_post_mlp.post_down_proj.cola_b" in renamed
    assert "model.layers.2.post_mlp.post_down_proj.cola_b" in renamed
    assert "model.layers.0.self_attn.pre_o_proj.cola_a" in renamed
    save_file(renamed, tmp_path / "model.safetensors")
    shutil.copy(GOLDEN / "config.json", tmp_path)
    ids = EXPECTED["input_ids"]
    assert torch.equal(load_model(tmp_path)(ids), load_model(GOLDEN)(ids))


@pytest.mark.parametrize("shard_size", ["50GB", "50KB"])
def test_a_llama_of_hugging_face_has_the_same_logits(shard_size, tmp_path):
    theirs = hugging_face(key_value_heads=2)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "50GB")
    ids = torch.randint(300, (2, 20))
    torch.testing.assert_close(load_model(tmp_path)(ids), theirs(ids).logits, atol=1e-6, rtol=1e-5)


def folder(tmp_path, **changes):
    config = json.loads((GOLDEN / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copyfile(GOLDEN / "model.safetensors", tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"describes a 'gpt2' model; llama, cola, cola_llama"),
        ({"attention_bias": True}, r"sets attention_bias to True, which is not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, r"rope_scaling is of type 'longrope'"),
        ({"head_dim": 32}, r"sets head_dim to 32"),
        ({"num_hidden_layers": 4}, r"layers\.3\.input_layernorm\.weight should have shape \(64,\), the file has None"),
        ({"rank": 8}, r"down_proj\.A\.weight should have shape \(8, 176\), the file has \(16, 176\)"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load_model(folder(tmp_path, **changes))


def test_an_incomplete_folder_is_refused_and_nothing_is_unpickled(tmp_path):
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        load_model(tmp_path)
    weights = folder(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        load_model(tmp_path)
    weights.unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is not read, because it can run code"):
        load_model(tmp_path)
