"""From dense to low rank: the best approximation, and a run that goes on from it."""

import shutil
from functools import partial

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cola_lightning import load_model
from cola_lightning.checkpoints.initialize import initialize_from_folder
from cola_lightning.cli.app import main
from cola_lightning.errors import InputError
from cola_lightning.methods import CoLA, LowRank
from cola_lightning.methods.factorize import low_rank
from cola_lightning.models import FullRank
from tests.conftest import tiny_llama

CPU = torch.device("cpu")


def projections(network):
    return [module for layer in network.model.layers for part in (layer.self_attn, layer.mlp)
            for module in part.children()]  # fmt: skip


@pytest.mark.parametrize(("rank", "sizes"), [(5, (40, 24)), (5, (24, 40)), (24, (40, 24))])
def test_low_rank_begins_at_the_best_approximation(rank, sizes):
    """Eckart and Young: the error is what the singular values beyond the rank leave."""
    weight = torch.randn(sizes[1], sizes[0], dtype=torch.float64)
    projection = LowRank(*sizes, rank).double()
    projection.approximate(weight)
    a, b = projection.A.weight, projection.B.weight
    tail = torch.cat((torch.linalg.svdvals(weight)[rank:], torch.zeros(1)))
    torch.testing.assert_close((weight - b @ a).norm(), tail.norm(), atol=1e-10, rtol=0)
    torch.testing.assert_close(torch.linalg.matrix_norm(weight - b @ a, 2), tail[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(a @ a.T, b.T @ b, atol=1e-10, rtol=0)  # balanced


def test_cola_begins_with_the_same_factors():
    weight = torch.randn(24, 40)
    linear, cola = LowRank(40, 24, 5), CoLA(40, 24, 5)
    linear.approximate(weight)
    cola.approximate(weight)
    assert torch.equal(cola.A.weight, linear.A.weight)
    assert torch.equal(cola.B.weight, linear.B.weight)
    assert cola.dense() is None


def test_at_full_rank_nothing_is_lost_and_the_dense_network_stays_as_it_was():
    dense = tiny_llama(FullRank, num_key_value_heads=2).eval()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    ids = torch.randint(300, (2, 12))
    full = low_rank(dense, lambda i, o: LowRank(i, o, min(i, o)), CPU)
    torch.testing.assert_close(full(ids), dense(ids), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(dense.state_dict()[name], tensor) for name, tensor in before.items())
    assert {type(module) for module in projections(dense)} == {FullRank}
    assert full.lm_head.weight is dense.lm_head.weight
    errors = [(low_rank(dense, partial(LowRank, rank=r), CPU)(ids) - dense(ids)).norm() for r in (4, 8, 12)]
    assert errors[0] > errors[1] > errors[2] > 0.01


@pytest.fixture(scope="module")
def dense_folder(trained_run, tmp_path_factory):
    """Return a Hugging Face LLaMA as others write it, beside it the tokenizer of the tiny run."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text((trained_run / "tokenizer" / "tokenizer.json").read_text())
    return folder


@pytest.mark.slow
def test_a_run_starts_from_the_factorised_model(dense_folder, tiny_run, corpus, tmp_path, capsys):
    out = tmp_path / "cola"
    main(["factorize", str(dense_folder), str(out), "--projection=CoLA", "--projection.rank=12", f"--text=[{corpus}]"])
    shown = capsys.readouterr().out
    losses = {line.split()[0]: float(line.split()[2]) for line in shown.splitlines() if " loss " in line}
    assert list(losses) == ["dense", "LowRank", "CoLA"]
    assert losses["dense"] == pytest.approx(5.7, abs=0.3)  # of random weights, ln 300
    assert isinstance(projections(load_model(out))[0], CoLA)
    config_file = yaml.safe_load((out / "model.yaml").read_text())
    assert config_file["model"]["projection"]["init_args"] == {"rank": 12}
    flags = [flag for flag in tiny_run if not flag.startswith("--model.") and "vocab_size" not in flag]
    flags += [f"--config={out / 'model.yaml'}", "--model.schedule.warmup_steps=2", "--model.optimizer.lr=0"]
    run = tmp_path / "run"
    main(["fit", *flags, f"--run_dir={run}", "--trainer.max_steps=3"])
    stored = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, tensor in load_model(out).state_dict().items():  # nothing was learnt, at a rate of nought
        torch.testing.assert_close(stored[f"network.{name}"], tensor)
    for file in out.glob("*.safetensors"):  # a run that goes on needs it no more, nor does one that uses the model
        file.unlink()
    main(["fit", *flags, f"--run_dir={run}", "--trainer.max_steps=6", "--ckpt_path=last"])
    main(["generate", str(run), "--prompt=the", "--max_new_tokens=2"])


@pytest.mark.slow
def test_tied_heads_and_stretched_positions_of_the_dense_model_stay(dense_folder, tiny_run, corpus, tmp_path):
    """Low rank at full rank is the dense model itself, in transformers, and after a run that learns nothing."""
    folder, out, run = tmp_path / "llama", tmp_path / "low_rank", tmp_path / "run"
    torch.manual_seed(0)
    scaling = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
    config = LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, tie_word_embeddings=True, initializer_range=0.2,
                         rope_parameters=scaling)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(dense_folder / "tokenizer.json", folder)
    main(["factorize", str(folder), str(out), "--projection=LowRank", "--projection.rank=32"])
    ids = torch.randint(300, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = LlamaForCausalLM.from_pretrained(folder)(ids).logits
        found = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)(ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    flags = [flag for flag in tiny_run if not flag.startswith("--model.") and "vocab_size" not in flag]
    flags += [f"--config={out / 'model.yaml'}", "--model.schedule.warmup_steps=2", "--model.optimizer.lr=0"]
    main(["fit", *flags, f"--run_dir={run}", "--trainer.max_steps=3"])
    main(["export", str(run), str(tmp_path / "again")])
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)(ids).logits
    torch.testing.assert_close(again, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "{tmp}/out", "--projection=CoLA", "--projection.rank=4"], "q_proj is CoLA, which is not dense"),
        (["{dense}", "{tmp}/out", "--projection=FullRank"], "--projection FullRank is not low-rank"),
        (["{dense}", "{tmp}/out", "--projection=CoLA", "--projection.rank=33"], "rank 33 does not fit"),
        (["{dense}", "{dense}", "--projection=CoLA", "--projection.rank=4"], "holds something already"),
        (
            ["{dense}", "{tmp}/out", "--projection=CoLA", "--projection.rank=4", "--sequence_length=0"],
            "--sequence_length is 0; this model takes from 1 to 2048 tokens",
        ),
        (["{dense}", "{tmp}/out", "--projection=CoLA", "--projection.rank=4", "--text=[gone.txt]"], "at 'gone.txt'"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, dense_folder, trained_run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["factorize", *[text.format(run=trained_run, tmp=tmp_path, dense=dense_folder) for text in arguments]])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_weights_of_another_network_are_refused(dense_folder, tiny_run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fit", *tiny_run, f"--run_dir={tmp_path}", f"--model.initial_weights={dense_folder}"])
    error = capsys.readouterr().err
    assert "error: --model.initial_weights" in error
    assert "holds another network ('factorize' makes low rank of full rank): model.layers.0.mlp.down_proj.A" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_attention_heads": 8, "num_key_value_heads": 4},
            "num_attention_heads 4; set --model.num_",
        ),
        ({"rope_theta": 500.0}, "was made with rope_theta 10000.0; set --model.rope_theta to it"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "was made with rope_scaling None"),
        ({"rms_norm_eps": 1e-5}, "was made with rms_norm_eps 1e-06"),
        ({"gate_silu": False}, "was made with gate_silu True"),
    ],
)
def test_weights_of_a_network_with_other_settings_are_refused(change, message, dense_folder):
    """All of these leave the shapes as they are, and give other logits."""
    network = tiny_llama(FullRank, **({"num_hidden_layers": 2, "num_key_value_heads": 2} | change))
    with pytest.raises(InputError) as refused:
        initialize_from_folder(network, str(dense_folder))
    assert message in str(refused.value)


def test_a_network_without_memory_is_filled_when_it_gets_some(dense_folder):
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 2}
    with torch.device("meta"):
        network = tiny_llama(FullRank, **sizes)
    initialize_from_folder(network, str(dense_folder))
    assert network.lm_head.weight.is_meta
    network.bfloat16().to_empty(device="cpu")
    for module in network.modules():
        if list(module.parameters(recurse=False)):
            module.reset_parameters()
    expected = load_model(dense_folder).bfloat16().state_dict()
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in expected.items())
    network.lm_head.reset_parameters()  # from now on drawn again
    assert not torch.equal(network.lm_head.weight, expected["lm_head.weight"])
