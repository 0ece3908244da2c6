"""A picture of a run: its loss, its validations, and how a sample of the model changed."""

import math
import textwrap
import warnings
from importlib.util import find_spec
from typing import Any

import lightning as L
from typing_extensions import TypedDict

from cola_lightning.callbacks.hyper_parameters import PERPLEXITY
from cola_lightning.callbacks.log_lines import write_lines
from cola_lightning.callbacks.samples import Samples
from cola_lightning.provenance import run_folder
from cola_lightning.stored_data import ALTERED, Count, check_stored
from cola_lightning.training.log_steps import at_log_step
from cola_lightning.training.trainer_attributes import callbacks_of, is_fast_dev_run

FILE = "training.png"


class _State(TypedDict):
    losses: list[tuple[Count, float]]
    validations: list[tuple[Count, float, str]]


class TrainingPicture(L.Callback):
    """Draw ``training.png`` in the run's directory when training ends.

    It shows the training loss, the loss and perplexity of each validation, and below them what :class:`Samples` wrote
    for its first prompt. A resumed run draws the whole run. Without matplotlib there is no picture. Rank 0 alone draws.
    """

    def __init__(self) -> None:
        self.losses: list[tuple[int, float]] = []
        self.validations: list[tuple[int, float, str]] = []  # step, perplexity, sample

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_stored(state_dict, _State, "in the state of TrainingPicture", ALTERED)
        self.losses, self.validations = list(state_dict["losses"]), list(state_dict["validations"])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_log_step(trainer) and "train/loss" in trainer.callback_metrics:
            self.losses.append((trainer.global_step, float(trainer.callback_metrics["train/loss"])))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        perplexity = trainer.callback_metrics.get(PERPLEXITY)
        if trainer.sanity_checking or trainer.state.fn != "fit" or perplexity is None:
            return
        samples = next((callback for callback in callbacks_of(trainer) if isinstance(callback, Samples)), None)
        text = samples.texts[0] if samples and samples.texts else ""
        self.validations.append((trainer.global_step, float(perplexity), text))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer)  # on all ranks
        if not trainer.is_global_zero or not self.losses or is_fast_dev_run(trainer):
            return
        if find_spec("matplotlib") is None:
            write_lines(trainer, ["no picture of this run: pip install 'cola-lightning[plots]'"])
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph .* missing from font")  # it draws a box
                draw(self.losses, self.validations).savefig(folder / FILE)
        except OSError as error:  # a full disk does not spoil a run that is done
            write_lines(trainer, [f"{folder / FILE} cannot be written: {error}"])
            return
        write_lines(trainer, ["", f"picture of the run: {folder / FILE}"])


def draw(losses: list[tuple[int, float]], validations: list[tuple[int, float, str]]) -> Any:
    """Draw losses, validations and samples.

    Args:
        losses: Step and training loss in nats per token.
        validations: Step, perplexity and sample of each validation. The samples of the first and of the last three are
            drawn.

    Returns:
        A matplotlib figure without a window.
    """
    from matplotlib.figure import Figure

    samples = [each for each in validations if each[2]]
    samples = samples if len(samples) <= 4 else [samples[0], *samples[-3:]]
    lines = ["\n".join(_wrapped(step, text)) for step, _, text in samples]
    height = 0.17 * sum(text.count("\n") + 2 for text in lines)
    figure = Figure(figsize=(7.5, 3.6 + height), dpi=100, layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3.6, max(height, 0.01)])
    above.plot(*zip(*losses, strict=True), linewidth=1.2, label="training")
    held_out = [(step, math.log(perplexity)) for step, perplexity, _ in validations if 0 < perplexity < math.inf]
    if held_out:
        above.plot(*zip(*held_out, strict=True), "o", markersize=5, label="held-out text, with its perplexity")
    for step, loss in held_out:
        above.annotate(f"{math.exp(loss):.1f}", (step, loss), (0, 7), textcoords="offset points", ha="center", size=9)
    above.set(xlabel="optimizer step", ylabel="loss, nats per token")
    above.grid(alpha=0.3)
    above.legend(frameon=False)
    below.axis("off")
    below.text(0, 1, "\n\n".join(lines), va="top", family="monospace", size=7.5, parse_math=False)
    return figure


def _wrapped(step: int, text: str) -> list[str]:
    """Break a sample into lines of 100 columns, the first of which begins with the step."""
    head = f"step {step:,}: "
    return textwrap.wrap(head + " ".join(text.split()), 100, subsequent_indent=" " * len(head), max_lines=4)
