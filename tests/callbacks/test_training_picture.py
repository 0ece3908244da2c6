import math
import sys

import pytest
from matplotlib import image

from cola_lightning.callbacks import LogLines, Samples, TrainingPicture
from cola_lightning.callbacks.training_picture import draw
from cola_lightning.data.tokenizer import Tokenizer
from cola_lightning.stored_data import StoredDataError
from tests.callbacks.test_samples import Data
from tests.conftest import tiny_trainer


def run_with_picture(folder, texts, *callbacks):
    """Train four steps with a validation after every second one."""
    picture = TrainingPicture()
    run, model, batches = tiny_trainer(
        LogLines(file=False, terminal=True), *callbacks, picture, steps=4, val_check_interval=2,
        default_root_dir=folder, vocab_size=280,
    )  # fmt: skip
    run.fit(model, datamodule=Data(batches, Tokenizer.train(iter(texts), 280)))
    return picture, run


def test_it_draws_what_was_logged(texts, tmp_path, capsys):
    picture, run = run_with_picture(tmp_path, texts, Samples(["the nation"], max_new_tokens=5))
    assert [step for step, _ in picture.losses] == [1, 2, 3, 4]
    assert [step for step, _, _ in picture.validations] == [2, 4]
    assert picture.validations[-1][1] == float(run.callback_metrics["val/perplexity"])
    assert all(text.startswith("the nation") for _, _, text in picture.validations)
    assert image.imread(tmp_path / "training.png").shape[1] == 750
    assert f"picture of the run: {tmp_path / 'training.png'}" in capsys.readouterr().err


def test_without_samples_it_draws_the_loss_alone(texts, tmp_path):
    picture, _ = run_with_picture(tmp_path, texts)
    assert [text for _, _, text in picture.validations] == ["", ""]
    assert (tmp_path / "training.png").is_file()


def test_without_matplotlib_there_is_no_picture(texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run_with_picture(tmp_path, texts)
    assert not (tmp_path / "training.png").exists()
    assert "no picture of this run: pip install 'cola-lightning[plots]'" in capsys.readouterr().err


def test_a_resumed_run_goes_on_with_the_points_of_before():
    picture, resumed = TrainingPicture(), TrainingPicture()
    picture.losses, picture.validations = [(5, 2.5), (10, math.nan)], [(10, 7.5, "a")]
    resumed.load_state_dict(picture.state_dict())
    assert str(resumed.losses) == str(picture.losses)
    assert resumed.validations == picture.validations
    with pytest.raises(StoredDataError, match="losses"):
        resumed.load_state_dict({"losses": "many", "validations": []})


def test_the_picture_shows_the_points_and_the_samples():
    validations = [(step, math.exp(6 - step / 10), f"sample {step} costs $5 and $6") for step in range(1, 7)]
    above, below = draw([(1, 6.0), (2, 5.5)], validations).axes
    assert above.lines[0].get_xydata().tolist() == [[1, 6.0], [2, 5.5]]
    assert above.lines[1].get_ydata().tolist() == pytest.approx([5.9, 5.8, 5.7, 5.6, 5.5, 5.4])
    assert next(text.get_text() for text in above.texts) == f"{math.exp(5.9):.1f}"
    assert below.texts[0].get_text().split("\n\n") == [f"step {n}: sample {n} costs $5 and $6" for n in (1, 4, 5, 6)]
