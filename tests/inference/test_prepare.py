"""Generate with a prepared network: merged, in int8, or by a compiled step."""

import json
from copy import deepcopy
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from cola_lightning.cli.app import main
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.errors import InputError
from cola_lightning.hub import write_folder
from cola_lightning.inference.int8 import int8_product, round_rows
from cola_lightning.inference.prepare import check_compiler, merge, prepare_for_generation
from cola_lightning.methods import SST, CoLA, CRNet, LaX, LoRA, LowRank, ReLoRA, SLTrain, SwitchLoRA
from cola_lightning.models import FullRank, LlamaConfig, generate
from cola_lightning.models.generation_step import CompiledStep
from cola_lightning.models.kv_cache import Cache
from tests.conftest import tiny_llama

FACTORS = {
    "full rank": FullRank,
    "CoLA": partial(CoLA, rank=8),
    "low rank": partial(LowRank, rank=8),
    "CR-Net": partial(CRNet, rank=8, start="normal", beta=0.7),
    "LaX": partial(LaX, rank=8),
}
MERGED = {
    "LoRA": partial(LoRA, rank=8),
    "ReLoRA": partial(ReLoRA, rank=8),
    "SLTrain": partial(SLTrain, rank=8),
    "SwitchLoRA": partial(SwitchLoRA, rank=8),
    "SST": partial(SST, rank=8),
}


def random_llama(projection, **sizes):
    """Make a tiny network in which no matrix is zero, as some are at the start."""
    network = tiny_llama(projection, **sizes).eval()
    for name, parameter in network.named_parameters():
        if parameter.ndim == 2 and name.rpartition(".")[2] not in ("U", "V", "u", "v"):  # whose zeros SST needs
            torch.nn.init.normal_(parameter.data, std=0.2)
    return network


@torch.no_grad()
def logits_by_steps(network, ids, begin):
    """Compute the logits after each token from the ``begin``-th on: the first by the plain path, others by the step."""
    cache = Cache(len(network.model.layers), ids.shape[1])
    logits = [network(ids[:, :begin], cache=cache, last_only=True)]
    return torch.cat(
        [*logits, *(network.generation_step(each, cache) for each in ids[:, begin:].split(1, dim=1))], dim=1
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", FACTORS)
def test_a_step_has_the_logits_of_the_plain_path(kind):
    network = random_llama(FACTORS[kind], num_key_value_heads=2).double()
    ids = torch.randint(1, 300, (1, 14))
    with torch.no_grad():
        plain = network(ids)[:, 4:]
    prepare_for_generation(network, compile=True)
    network.generation_step = CompiledStep(network, backend="eager")
    torch.testing.assert_close(logits_by_steps(network, ids, 5), plain, atol=1e-9, rtol=1e-9)


@pytest.mark.slow
def test_a_step_in_int8_has_the_logits_of_the_plain_path():
    network = random_llama(FACTORS["CoLA"]).double()
    ids = torch.randint(1, 300, (1, 14))
    prepare_for_generation(network, int8=True, compile=True)
    network.generation_step = CompiledStep(network, backend="eager")
    with torch.no_grad():
        plain = network(ids)[:, 4:]
    torch.testing.assert_close(logits_by_steps(network, ids, 5), plain, atol=1e-9, rtol=1e-9)


@pytest.mark.slow
def test_a_layer_is_compiled_once_whatever_the_length_of_the_text():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    network = tiny_llama(max_position_embeddings=24).eval()
    ids = torch.randint(1, 300, (1, 20))
    plain = [generate(network, ids[:, :length], new, temperature=0) for length, new in ((1, 9), (5, 3), (20, 9))]
    prepare_for_generation(network, compile=True)
    network.generation_step = CompiledStep(network, backend=backend)
    torch.compiler.reset()
    for (length, new), expected in zip(((1, 9), (5, 3), (20, 9)), plain, strict=True):
        assert torch.equal(generate(network, ids[:, :length], new, temperature=0), expected)
    assert len(compiled) == 2  # a layer, and the head


@pytest.mark.slow
def test_compiled_by_inductor_it_writes_what_transformers_writes(texts, tmp_path):
    network = tiny_llama(num_key_value_heads=2).eval()
    write_folder(network, tmp_path / "model", Tokenizer.train(iter(texts), 300), lambda config: "")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    ids = torch.randint(2, 300, (1, 7))
    theirs = other.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        plain = network(theirs)[:, 6:]
    prepare_for_generation(network, compile=True)
    assert torch.equal(generate(network, ids, 12, temperature=0), theirs)
    torch.testing.assert_close(logits_by_steps(network, theirs, 7), plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", MERGED)
@torch.no_grad()
def test_linear_methods_become_one_matrix(kind):
    network = random_llama(MERGED[kind])
    ids = torch.randint(300, (2, 9))
    plain = network(ids)
    merge(network)
    assert {type(projection) for block in network.blocks() for _, projection in block.projections()} == {FullRank}
    torch.testing.assert_close(network(ids), plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_factors_are_not_multiplied_out():
    for projection in FACTORS.values():
        network = tiny_llama(projection)
        before = network.state_dict()
        merge(network)
        assert network.state_dict().keys() == before.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_off_by_half_a_factor_at_most(dtype):
    weight = torch.randn(40, 24).to(dtype)
    weight[3] = 0
    rounded, scale = round_rows(weight)
    assert (rounded.dtype, scale.dtype, scale.shape) == (torch.int8, dtype, (40,))
    error = (rounded.double() * scale.double()[:, None] - weight.double()).abs()
    # The largest entry of a row may be 127.5 factors or a little more, because the factor is rounded to its dtype.
    bound = 0.5 if dtype == torch.float32 else 0.5 + 127 * 2**-8
    assert (error <= scale.double()[:, None] * (bound + 1e-6)).all()
    assert (rounded[3] == 0).all()


@pytest.mark.parametrize("rows", [(1, 1), (2, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [24, 61, 96])
def test_int8_products_are_those_of_the_rounded_matrix(dtype, rows, size, monkeypatch):
    monkeypatch.setattr("cola_lightning.inference.int8.CHUNK", 7 * size)  # seven rows at a time
    x = torch.randn(*rows, size).to(dtype)
    rounded, scale = round_rows(torch.randn(40, size).to(dtype))
    exact = x.double() @ (rounded.double() * scale.double()[:, None]).T
    off = (int8_product(x, rounded, scale).double() - exact).abs().max() / exact.abs().max()
    assert off < (1e-6 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("kind", {**FACTORS, **MERGED})
@torch.no_grad()
def test_every_method_generates_in_int8(kind):
    network = random_llama({**FACTORS, **MERGED}[kind]).double()
    ids = torch.randint(300, (2, 9))
    prepare_for_generation(network, int8=True)
    rounded = deepcopy(network)
    for module in rounded.modules():
        if isinstance(getattr(module, "scale", None), torch.Tensor):
            module.weight = torch.nn.Parameter(module.weight * module.scale[:, None], requires_grad=False)
            module.scale = None
            vars(module).pop("product", None)
    assert {weight.dtype for weight in network.parameters() if weight.ndim == 2 and min(weight.shape) > 4} == {
        torch.int8
    }
    torch.testing.assert_close(network(ids), rounded(ids), atol=1e-9, rtol=1e-9)
    assert generate(network, ids, 4).shape == (2, 13)


def test_int8_takes_55_percent_of_bfloat16s_memory_at_most():
    config = LlamaConfig(32000, 512, 1376, 2, 8)
    network = tiny_llama(partial(CoLA, rank=128), **vars(config)).bfloat16()
    before = sum(tensor.nbytes for tensor in network.parameters())
    prepare_for_generation(network, int8=True)
    assert sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers())) <= 0.55 * before


def test_a_copy_with_the_same_weights_leaves_the_network_unchanged():
    network = tiny_llama()
    copy = deepcopy(network, {id(weight): weight for weight in network.parameters()})
    ids = torch.randint(300, (1, 9))
    plain = network(ids)
    prepare_for_generation(copy, int8=True)
    assert torch.equal(network(ids), plain)


def test_where_it_cannot_be_compiled_one_line_says_so(trained_run, monkeypatch, capsys):
    with pytest.raises(InputError, match="--compile is for processors, and the model is on cuda; leave it out, or add"):
        check_compiler(torch.device("cuda"))
    with pytest.raises(SystemExit):
        main(["generate", str(trained_run), "--prompt=the", "--prompt=a", "--compile"])
    assert "error: --compile is for one prompt, and there are 2; leave it out, or give one" in capsys.readouterr().err
    monkeypatch.setenv("CXX", "no-compiler")
    with pytest.raises(SystemExit, match="2"):
        main(["generate", str(trained_run), "--prompt=the", "--compile"])
    assert "error: --compile needs a C++ compiler, and there is no no-compiler" in capsys.readouterr().err


def test_int8_changes_perplexity_by_half_a_percent_at_most(trained_run, texts, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("\n".join(texts[:20]))
    measured = []
    for flags in ([], ["--int8"]):
        main(
            ["evaluate", str(trained_run), f"--text={tmp_path / 'text.txt'}", f"--json={tmp_path / 'out.json'}", *flags]
        )
        measured.append(json.loads((tmp_path / "out.json").read_text())["text"]["perplexity"])
    assert measured[1] != measured[0]
    assert measured[1] == pytest.approx(measured[0], rel=0.005)


def test_int8_of_tasks_is_refused(trained_run, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", str(trained_run), "--tasks=arc_easy", "--int8"])
    assert "--int8 is for --text" in capsys.readouterr().err
