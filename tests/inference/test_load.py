import re
import shutil

import pytest
import torch

from cola_lightning.checkpoints import read
from cola_lightning.cli.app import main
from cola_lightning.errors import InputError
from cola_lightning.inference.load import build, load_model_for_inference, pick_device
from tests.conftest import loader, tiny_trainer


def test_a_run_its_checkpoint_and_a_checkpoint_elsewhere_are_the_same_model(trained_run, tmp_path):
    checkpoint = trained_run / "checkpoints" / "last.ckpt"
    copy = tmp_path / "model.ckpt"
    shutil.copy(checkpoint.resolve(), copy)
    ids = torch.randint(300, (1, 9))
    logits = [load_model_for_inference(path).network(ids) for path in (trained_run, checkpoint, copy)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert (
        load_model_for_inference(trained_run).tokenizer().vocab_size
        == load_model_for_inference(checkpoint).tokenizer().vocab_size
        == 300
    )
    with pytest.raises(InputError, match="does not say which tokenizer it was trained with; name it by --tokenizer"):
        load_model_for_inference(copy).tokenizer()
    assert load_model_for_inference(copy).tokenizer(str(trained_run / "tokenizer")).vocab_size == 300


def test_a_run_without_its_tokenizer_loads_the_one_it_names(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run", symlinks=True)
    shutil.move(tmp_path / "run" / "tokenizer", tmp_path / "elsewhere")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("tokenizer: null", f"tokenizer: {tmp_path / 'elsewhere'}"))
    assert load_model_for_inference(tmp_path / "run").tokenizer().vocab_size == 300


def test_what_a_checkpoint_describes_badly_is_named(trained_run, tmp_path):
    path = trained_run / "checkpoints" / "last.ckpt"
    checkpoint = read(path)
    checkpoint.hyper_parameters["hidden_size"] = 64
    with pytest.raises(InputError, match="holds other weights than its hyper-parameters describe: hidden_size is 64"):
        build(checkpoint, path)
    checkpoint.hyper_parameters.update(hidden_size=32, num_attention_heads=5)
    with pytest.raises(InputError, match=r"describes a model that cannot be built|hidden_size 32"):
        build(checkpoint, path)


def test_a_run_from_python_lacks_its_projection(tmp_path):
    trainer, model, batches = tiny_trainer(steps=1)
    trainer.fit(model, loader(batches))
    trainer.save_checkpoint(tmp_path / "python.ckpt")
    with pytest.raises(InputError, match=r"does not name its projections, as a run from Python leaves them out: model"):
        load_model_for_inference(tmp_path / "python.ckpt")


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="--device abacus cannot be used"):
        pick_device("abacus")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "export", "evaluate", "factorize"])
def test_a_flipped_bit_is_found_by_every_command(command, trained_run, corpus, tmp_path, capsys):
    content = bytearray((trained_run / "checkpoints" / "last.ckpt").read_bytes())
    name = content.find(b"/data/0")  # of the first tensor's file in the archive; its bytes follow
    content[name + 1000] ^= 0x40
    (tmp_path / "flipped.ckpt").write_bytes(content)
    rest = {
        "generate": ["--prompt=a"],
        "export": [str(tmp_path / "out")],
        "evaluate": ["--text", str(corpus)],
        "factorize": [str(tmp_path / "out"), "--projection=CoLA", "--projection.rank=4"],
    }
    with pytest.raises(SystemExit, match="2"):
        main([command, str(tmp_path / "flipped.ckpt"), *rest[command]])
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: \S+flipped.ckpt is damaged: checksum of \S+ differs; name another checkpoint\n", error)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "export", "evaluate"])
def test_weights_that_are_no_numbers_end_every_command_with_1(command, trained_run, corpus, tmp_path, capsys):
    state = torch.load(trained_run / "checkpoints" / "last.ckpt", weights_only=True)
    state["state_dict"]["network.model.norm.weight"][2] = float("nan")
    torch.save(state, tmp_path / "nan.ckpt")
    rest = {"generate": ["--prompt=a"], "export": [str(tmp_path / "out")], "evaluate": ["--text", str(corpus)]}
    with pytest.raises(SystemExit, match="1"):
        main([command, str(tmp_path / "nan.ckpt"), *rest[command]])
    error = capsys.readouterr().err
    assert error.endswith("nan.ckpt: model.norm.weight holds NaN or infinity; take an earlier checkpoint\n")
    assert error.count("\n") == 1


FOREIGN = {
    "weights alone, as litgpt's": {"lm_head.weight": torch.ones(2, 2), "transformer.wte.weight": torch.ones(2, 2)},
    "weights under a key, as litgpt's": {"model": {"lm_head.weight": torch.ones(2, 2)}, "step_count": 3},
    "a tensor": torch.ones(3),
    "a list": [1, 2],
    "another module's": {"state_dict": {"layer.weight": torch.ones(2)}, "global_step": 1},
    "hyper-parameters of another kind": {"state_dict": {}, "global_step": 1, "hyper_parameters": [1]},
    "no tensors": {"state_dict": {"network.a": 1}, "global_step": 1},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", FOREIGN)
def test_torch_files_of_others_get_one_line(kind, legacy, tmp_path, capsys):
    file = tmp_path / "lit_model.pth"
    torch.save(FOREIGN[kind], file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(SystemExit, match="2"):
        main(["generate", str(file), "--prompt=a"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.match(r"error: \S+lit_model.pth (holds no|is damaged|is not a whole)", error)
