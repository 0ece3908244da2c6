"""Load folders that transformers has written: the logits equal those of transformers, in float32 to 1e-5."""

import copy
import json
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cola_lightning import load_model
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from cola_lightning.hub import write_folder
from cola_lightning.models import generate

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
IDS = torch.randint(3, 300, (2, 60), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tokenizer(texts):
    return Tokenizer.train(iter(texts), 300)


def foreign(folder, **settings):
    """Write a folder by transformers, of a model with logits that differ from token to token."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(SIZES | {"initializer_range": 0.2} | settings))).save_pretrained(folder)
    return folder


def edit(folder, remove=(), **changes):
    """Change keys of a folder's config.json."""
    file = folder / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in remove} | changes
    file.write_text(json.dumps(config))
    return folder


@torch.no_grad()
def theirs(folder, ids=IDS):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    return model(ids, use_cache=False).logits


def assert_same_logits(folder, ids=IDS):
    with torch.no_grad():
        torch.testing.assert_close(load_model(folder)(ids), theirs(folder, ids), atol=1e-5, rtol=1e-5)


def exported(folder, out, tokenizer):
    write_folder(load_model(folder), out, tokenizer, lambda config: "")
    return out


# -- tied heads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["embedding", "head", "both", "both, different", "two files"])
def test_tied_heads_are_read_as_transformers_reads_them_and_stay_tied(stored, tokenizer, tmp_path):
    folder = foreign(tmp_path / "llama", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    embedding = weights["model.embed_tokens.weight"]
    if stored != "embedding":
        weights["lm_head.weight"] = embedding.clone() + (0.1 if stored == "both, different" else 0)
    if stored == "head":
        del weights["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if stored == "two files":
        LlamaForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "parts", max_shard_size="30KB")
        folder = tmp_path / "parts"
        assert not (folder / "model.safetensors").exists()
    assert_same_logits(folder)
    out = exported(folder, tmp_path / "out", tokenizer)
    torch.testing.assert_close(theirs(out), theirs(folder), atol=1e-5, rtol=1e-5)
    tied = stored != "both, different"
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) is not tied
    network = load_model(out)
    assert (network.lm_head.weight is network.model.embed_tokens.weight) is tied


# -- rotary positions -------------------------------------------------------------------------------------------------

SCALINGS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn without bounds": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
                            "beta_fast": 8, "beta_slow": 2, "truncate": False, "mscale": 0.7, "mscale_all_dim": 0.5},
    "yarn with attention": {"rope_type": "yarn", "factor": 2, "attention_factor": 1.7},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("theta", [10000.0, 500.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_stretched_rotary_positions_are_those_of_transformers(name, theta, tokenizer, tmp_path):
    scaling = {"rope_type": name} | SCALINGS[name]
    kind = scaling["rope_type"]
    folder = foreign(tmp_path / "new", rope_parameters=scaling | {"rope_theta": theta})
    ids = IDS.repeat(1, 3) if kind == "dynamic" else IDS  # longer than max_position_embeddings, so that it stretches
    plain = theirs(foreign(tmp_path / "plain", rope_theta=theta), ids)
    new = theirs(folder, ids)
    assert (new - plain).abs().max() > 0.01  # otherwise the test would show nothing
    assert_same_logits(folder, ids)

    older = {"type": kind} | {key: value for key, value in scaling.items() if key != "rope_type"}
    for keys in (
        {"rope_scaling": scaling},
        {"rope_scaling": older},
        {"rope_parameters": older | {"rope_theta": theta}},
        {"rope_scaling": older, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        {"rope_scaling": {}, "rope_parameters": scaling},
    ):
        edit(folder, ["rope_parameters", "rope_scaling"], rope_theta=theta, **keys)
        torch.testing.assert_close(theirs(folder, ids), new, atol=1e-5, rtol=1e-5)
        assert_same_logits(folder, ids)

    out = exported(folder, tmp_path / "out", tokenizer)
    torch.testing.assert_close(theirs(out, ids), new, atol=1e-5, rtol=1e-5)
    assert load_model(out).config.rope_scaling == load_model(folder).config.rope_scaling
    prompt = ids[:1, :100] if kind == "dynamic" else ids[:1, :40]
    model = LlamaForCausalLM.from_pretrained(folder)
    made = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(load_model(folder), prompt, 12, temperature=0), made)


def test_the_original_length_outside_of_the_rotary_settings_counts(tmp_path):
    scaling = {"rope_type": "llama3"} | SCALINGS["llama3"]
    folder = foreign(tmp_path / "llama", rope_parameters=scaling | {"rope_theta": 500.0})
    before = theirs(folder)
    edit(folder, original_max_position_embeddings=32)
    assert (theirs(folder) - before).abs().max() > 0.01
    assert_same_logits(folder)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
         "rope_scaling is of type 'longrope', which is not supported; linear, dynamic, yarn, llama3 are"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None; rope_type linear needs a number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor is '4'; rope_type linear needs a number above 0"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
         "high_freq_factor is 1; it must be above low_freq_factor, 4"),
        ({"rope_scaling": "linear"}, "sets rope_scaling to 'linear'; it must be an object"),
        ({"rope_parameters": {"rope_theta": "x"}}, "sets rope_theta to 'x'; it must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": 10**30}}, "factor is 1000000000000000000000000000000; rope"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "rope_theta": 1}}, "rope_theta to 1.0; it must be above 1"),
        ({"partial_rotary_factor": 0.5}, "sets partial_rotary_factor to 0.5, which is not supported"),
    ],
)  # fmt: skip
def test_a_rotary_scaling_that_is_not_supported_is_refused(keys, message, tmp_path):
    folder = edit(foreign(tmp_path / "llama"), ["rope_parameters"], **keys)
    with pytest.raises(InputError) as refused:
        load_model(folder)
    assert message in str(refused.value)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_single_file_is_preferred_to_an_index_of_several(tmp_path):
    folder = foreign(tmp_path / "llama")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "older", max_shard_size="30KB")
    for file in (tmp_path / "older").glob("model*"):
        shutil.copy(file, folder)
    assert (folder / "model.safetensors.index.json").exists()
    assert_same_logits(folder)


def test_rotary_frequencies_of_older_files_are_ignored(tmp_path):
    folder = foreign(tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    weights |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert_same_logits(folder)


def test_mixed_dtypes_are_read_as_the_widest(tokenizer, tmp_path):
    folder = foreign(tmp_path / "llama")
    weights = {name: tensor if "norm" in name else tensor.bfloat16()
               for name, tensor in load_file(folder / "model.safetensors").items()}  # fmt: skip
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert_same_logits(folder)
    out = exported(folder, tmp_path / "out", tokenizer)
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.float32}
    torch.testing.assert_close(theirs(out), theirs(folder), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "has an adapter beside its weights"),
        (lambda folder: edit(folder, quantization_config={"bits": 4}), "sets quantization_config to {'bits': 4}"),
        (lambda folder: edit(folder, ["hidden_size"]), "has no hidden_size; it must be a whole number"),
        (lambda folder: edit(folder, hidden_size=None), "sets hidden_size to null; it must be a whole number"),
        (lambda folder: edit(folder, hidden_size="32"), "sets hidden_size to '32'; it must be a whole number"),
        (lambda folder: edit(folder, num_attention_heads=5), "num_attention_heads to 5, which does not divide"),
        (lambda folder: edit(folder, num_attention_heads=0), "num_attention_heads to 0, which does not"),
        (lambda folder: edit(folder, rms_norm_eps=float("nan")), "sets rms_norm_eps to nan; it must be a number"),
        (lambda folder: edit(folder, tie_word_embeddings="yes"), "sets tie_word_embeddings to 'yes'; it must be"),
        (lambda folder: edit(folder, model_type=["llama"]), "describes a ['llama'] model"),
        (lambda folder: edit(folder, vocab_size=10**30), "sets vocab_size to 1000000000000000000000000000000; it must"),
        (lambda folder: edit(folder, rms_norm_eps=-1.0), "sets rms_norm_eps to -1.0; it must be at least 0"),
        (lambda folder: edit(folder, num_hidden_layers=10**9), "num_hidden_layers to 1000000000, but the weights are"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "holds a JSON list, not an object"),
        (lambda folder: (folder / "config.json").write_text('{"a":'), "cannot be read as JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors does not exist"),
        (lambda folder: index(folder, "{}"), "model.safetensors.index.json has no weight_map; it must be an object"),
        (lambda folder: index(folder, '{"weight_map": {"a": 1}}'), "names no files under weight_map"),
        (lambda folder: index(folder, '{"weight_map": {"a": "../x.safetensors"}}'), "names ../x.safetensors, which"),
        (lambda folder: index(folder, '{"weight_map": {"a": "gone.safetensors"}}'), "gone.safetensors does not exist"),
        (lambda folder: save_file({"a": torch.ones(2, dtype=torch.int8)}, folder / "model.safetensors"),
         "holds a as torch.int8, which is not supported"),
        (lambda folder: save_file({}, folder / "model.safetensors"), "holds no tensors"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_read_gets_one_line(change, message, tmp_path):
    folder = foreign(tmp_path / "llama")
    change(folder)
    with pytest.raises(InputError) as refused:
        load_model(folder)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def index(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)


GONE = object()
ODD = [GONE, None, "x", -1, 0, True, 10**30, float("nan")]
ROPE_KEYS = ["type", "rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
             "rope_theta", "attention_factor", "beta_fast", "mscale", "truncate", "partial_rotary_factor"]  # fmt: skip


def odd_configs(config):
    """Yield copies of a config.json, each with one odd value at the top level or in the rotary settings."""
    for value in ODD:
        for path in [*((key,) for key in config), *((top, key) for top in ("rope_scaling", "rope_parameters")
                                                    for key in ROPE_KEYS)]:  # fmt: skip
            changed = copy.deepcopy(config)
            if path[0] == "rope_parameters":
                del changed["rope_scaling"]  # otherwise rope_parameters would not be read
            *above, key = path
            inner = changed[above[0]] if above else changed
            inner[key] = value
            if value is GONE:
                del inner[key]
            yield path, value, changed


@pytest.mark.slow
def test_an_odd_value_is_refused_or_gives_the_logits_of_transformers(tmp_path):
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 1000.0}
    folder = foreign(tmp_path / "llama", num_attention_heads=2, num_key_value_heads=2, rope_parameters=yarn, **sizes)
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"] = {"type": "llama3"} | SCALINGS["llama3"]
    ids = torch.arange(3, 33)[None]
    outcomes = Counter()
    for path, value, changed in odd_configs(config):
        (folder / "config.json").write_text(json.dumps(changed))
        try:
            with torch.no_grad():
                found = load_model(folder)(ids)
        except InputError:
            outcomes["refused"] += 1
            continue
        try:
            wanted = theirs(folder, ids)
        except Exception:  # transformers is stricter
            outcomes["refused by transformers"] += 1
            continue
        torch.testing.assert_close(
            found, wanted, atol=1e-5, rtol=1e-4, msg=lambda text, at=(path, value): f"{at}: {text}"
        )
        outcomes["equal"] += 1
    assert outcomes["refused"] > 100
    assert outcomes["equal"] > 100
