"""Write folders for transformers: the same weights bit for bit, and the same logits and texts."""

import json
from copy import deepcopy
from functools import partial

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from cola_lightning import load_model
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from cola_lightning.hub import write_folder
from cola_lightning.methods import SST, CoLA, CRNet, LaX, LoRA, LowRank, ReLoRA, SLTrain, SwitchLoRA
from cola_lightning.models import FullRank, Projection, generate
from tests.conftest import tiny_llama
from tests.data.test_tokenizer import t5_like

COLA, LOW_RANK = partial(CoLA, rank=8), partial(LowRank, rank=8)


@pytest.fixture(scope="module")
def tokenizer(texts):
    return Tokenizer.train(iter(texts), 300)


def write(network, folder, tokenizer, **options):
    write_folder(network, folder, tokenizer, lambda config: f"# {config['model_type']}", **options)
    return folder


def theirs(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


KINDS = {
    "full rank": (FullRank, {}),
    "full rank without SiLU": (FullRank, {"gate_silu": False, "pad_token_id": None}),
    "CoLA": (COLA, {"rope_theta": 5000.0}),
    "CoLA without SiLU": (COLA, {"gate_silu": False, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
    "low rank": (LOW_RANK, {"max_position_embeddings": 64}),
    "CR-Net": (partial(CRNet, rank=8, start="normal", beta=0.7), {"num_key_value_heads": 2}),
    "LaX": (partial(LaX, rank=8), {"num_key_value_heads": 2}),
    "LaX without gates": (partial(LaX, rank=7, gate="identity"), {"gate_silu": False}),
    "CoLA on longer texts": (COLA, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_back_bit_for_bit_and_transformers_has_the_same_logits(kind, tokenizer, tmp_path):
    projection, sizes = KINDS[kind]
    network = tiny_llama(projection, **sizes).eval()
    folder = write(network, tmp_path / "model", tokenizer)
    again, other = load_model(folder), theirs(folder)
    assert again.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in network.state_dict().items())
    ids = torch.randint(2, 300, (2, 12))  # transformers would treat 0 as padding
    assert torch.equal(again(ids), network(ids))
    torch.testing.assert_close(other(ids).logits, network(ids), atol=1e-5, rtol=1e-5)
    plain = projection is FullRank
    assert (type(other) is LlamaForCausalLM) == plain == (not list(folder.glob("modeling_*.py")))
    made = other.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(made, generate(network, ids, 10, temperature=0))


def test_transformers_generates_the_same_with_and_without_a_kv_cache(tokenizer, tmp_path):
    other = theirs(write(tiny_llama(COLA), tmp_path / "model", tokenizer))
    ids, widths = torch.randint(2, 300, (1, 7)), []
    other.lm_head.register_forward_hook(lambda module, args, out: widths.append(out.shape[1]))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    cached = other.generate(ids, **options)
    assert sum(widths) == 5  # only the logits of the last token, at each step
    hidden = []
    other.model.layers[0].register_forward_hook(lambda module, args, out: hidden.append(args[0].shape[1]))
    assert torch.equal(other.generate(ids, **options), cached)
    assert hidden == [7, 1, 1, 1, 1]
    assert torch.equal(other.generate(ids, use_cache=False, **options), cached)


def test_left_padding_makes_no_difference_in_transformers(tokenizer, tmp_path):
    other = theirs(write(tiny_llama(COLA), tmp_path / "model", tokenizer))
    ids = torch.randint(2, 300, (1, 5))
    padded, mask = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids), 1), torch.tensor([[0] * 3 + [1] * 5])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    alone = other.generate(ids, **options)
    assert torch.equal(other.generate(padded, attention_mask=mask, **options)[:, 3:], alone)


def test_bf16_is_kept_and_large_weights_are_split(tokenizer, tmp_path):
    network = tiny_llama(COLA).bfloat16().eval()
    folder = write(network, tmp_path / "model", tokenizer, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert not (folder / "model.safetensors").exists()
    again = load_model(folder)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in network.state_dict().items())
    assert theirs(folder).dtype == torch.bfloat16
    for file in folder.glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


def test_merged_low_rank_is_a_plain_llama(tokenizer, tmp_path):
    network = tiny_llama(LOW_RANK).eval()
    folder = write(network, tmp_path / "model", tokenizer, merge=True)
    ids = torch.randint(300, (2, 12))
    assert type(theirs(folder)) is LlamaForCausalLM
    torch.testing.assert_close(theirs(folder)(ids).logits, network(ids), atol=1e-5, rtol=1e-4)


class Linear(Projection):
    """A linear method without a modelling file."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.inner = torch.nn.Linear(in_features, out_features, bias=False)

    def forward(self, x):
        return 2 * self.inner(x)

    def dense(self):
        return 2 * self.inner.weight


class Strange(Linear):
    def dense(self):
        return None


def test_other_linear_methods_are_written_as_dense_matrices(tokenizer, tmp_path):
    network = tiny_llama(Linear).eval()
    ids = torch.randint(300, (1, 9))
    other = theirs(write(network, tmp_path / "model", tokenizer))
    torch.testing.assert_close(other(ids).logits, network(ids), atol=1e-5, rtol=1e-5)


def mixed(in_features, out_features):
    return (LOW_RANK if in_features == out_features else FullRank)(in_features, out_features)


@pytest.mark.parametrize(
    ("projection", "merge", "message"),
    [
        (Strange, False, r"q_proj is Strange, which can be written neither as a dense matrix nor by a modelling file"),
        (COLA, True, "CoLA cannot be merged"),
        (mixed, False, r"mlp\.gate_proj is FullRank, and the last layer's q_proj LowRank of rank 8"),
    ],
)
def test_a_projection_that_cannot_be_written_is_named(projection, merge, message, tokenizer, tmp_path):
    with pytest.raises(InputError, match=message):
        write(tiny_llama(projection), tmp_path / "model", tokenizer, merge=merge)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_reads_back_differently_is_not_written(tokenizer, tmp_path, monkeypatch):
    network = tiny_llama(FullRank)
    network.model.layers[1].mlp.gate_silu = False  # config.json cannot describe one layer that differs
    with pytest.raises(InputError, match=r"model was not written: read back, its logits are off by"):
        write(network, tmp_path / "model", tokenizer)
    write_weights = save_torch_state_dict

    def damaged(weights, *args, **options):
        name = "model.norm.weight"
        write_weights(weights | {name: weights[name] + 2**-10}, *args, **options)

    monkeypatch.setattr("cola_lightning.hub.folder.save_torch_state_dict", damaged)
    with pytest.raises(InputError, match=r"model was not written: read back, model\.norm\.weight has other values"):
        write(tiny_llama(FullRank), tmp_path / "model", tokenizer)
    assert not list(tmp_path.iterdir())


def test_weights_with_nan_are_not_written(tokenizer, tmp_path):
    network = tiny_llama()
    with torch.no_grad():
        network.model.norm.weight[3] = float("nan")
    with pytest.raises(InputError, match=r"model: model\.norm\.weight holds NaN or infinity"):
        write(network, tmp_path / "model", tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [LoRA, ReLoRA, SLTrain, SST, SwitchLoRA, LowRank])
def test_a_method_that_is_linear_is_multiplied_out_and_rounded_once(method, dtype, tokenizer, tmp_path):
    network = tiny_llama(partial(method, rank=8)).eval().to(dtype)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith((".B", ".B.weight")):
                parameter.normal_(std=0.05)  # LoRA's starts at zero
    folder = write(network, tmp_path / "model", tokenizer, merge=True)
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    projection = network.model.layers[1].mlp.down_proj
    x = torch.eye(48, dtype=dtype)
    with torch.no_grad():
        exact = deepcopy(projection).double()(x.double()).T
    torch.testing.assert_close(weights["model.layers.1.mlp.down_proj.weight"].double(), exact,
                               atol=1e-7, rtol=2**-8 if dtype == torch.bfloat16 else 1e-4)  # fmt: skip


def test_nothing_is_overwritten_and_a_foreign_tokenizer_is_refused(tokenizer, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something already"):
        write(tiny_llama(), tmp_path / "full", tokenizer)
    with pytest.raises(InputError, match="has 300 ids, but the network only 200"):
        write(tiny_llama(vocab_size=200), tmp_path / "model", tokenizer)


def test_the_tokenizer_makes_the_ids_of_training(tokenizer, tmp_path):
    folder = write(tiny_llama(), tmp_path / "model", tokenizer)
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    for text in ("the nation upon war", " naïve 漢字\n\n  end"):
        assert again(text).input_ids == tokenizer.encode([text])[0][:-1]
        assert again.decode(again(text).input_ids) == text
    assert (again.eos_token_id, again.pad_token_id) == (1, 0)
    assert again.model_max_length == 2048


def test_the_written_tokenizer_adds_no_end_and_has_no_sentinels(tmp_path):
    folder = t5_like(tmp_path / "t5")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing", "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    t5 = Tokenizer.load(str(folder))
    again = AutoTokenizer.from_pretrained(write(tiny_llama(FullRank), tmp_path / "model", t5))
    assert again("a b").input_ids == t5.encode(["a b"])[0][:-1]
    assert max(again("a <extra_id_0> b").input_ids) < t5.vocab_size
