import shutil

import pytest
import torch

from cola_lightning.checkpoints import read
from cola_lightning.errors import InputError
from cola_lightning.trained import build, open_model, pick_device
from tests.conftest import loader, tiny_trainer


def test_a_run_its_checkpoint_and_a_checkpoint_elsewhere_are_the_same_model(trained_run, tmp_path):
    checkpoint = trained_run / "checkpoints" / "last.ckpt"
    copy = tmp_path / "model.ckpt"
    shutil.copy(checkpoint.resolve(), copy)
    ids = torch.randint(300, (1, 9))
    logits = [open_model(path).network(ids) for path in (trained_run, checkpoint, copy)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
    assert open_model(trained_run).tokenizer().vocab_size == open_model(checkpoint).tokenizer().vocab_size == 300
    with pytest.raises(InputError, match="does not say which tokenizer it was trained with; name it by --tokenizer"):
        open_model(copy).tokenizer()
    assert open_model(copy).tokenizer(str(trained_run / "tokenizer")).vocab_size == 300


def test_a_run_without_its_tokenizer_is_asked_for_the_one_it_named(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run", symlinks=True)
    shutil.move(tmp_path / "run" / "tokenizer", tmp_path / "elsewhere")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("tokenizer: null", f"tokenizer: {tmp_path / 'elsewhere'}"))
    assert open_model(tmp_path / "run").tokenizer().vocab_size == 300


def test_what_a_checkpoint_describes_badly_is_named(trained_run, tmp_path):
    path = trained_run / "checkpoints" / "last.ckpt"
    checkpoint = read(path)
    checkpoint.hyper_parameters["hidden_size"] = 64
    with pytest.raises(InputError, match="holds other weights than its hyper-parameters describe: lm_head"):
        build(checkpoint, path)
    checkpoint.hyper_parameters["projection"] = {"class_path": "os.system", "init_args": {}}
    with pytest.raises(InputError, match="describes a model that cannot be built"):
        build(checkpoint, path)


def test_a_run_from_python_lacks_its_projection(tmp_path):
    trainer, model, batches = tiny_trainer(steps=1)
    trainer.fit(model, loader(batches))
    trainer.save_checkpoint(tmp_path / "python.ckpt")
    with pytest.raises(InputError, match=r"does not name its projections, as a run from Python leaves them out: model"):
        open_model(tmp_path / "python.ckpt")


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="--device abacus cannot be used"):
        pick_device("abacus")
