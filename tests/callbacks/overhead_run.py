"""What monitoring costs, as a program: ``overhead_run.py [PAIRS]``. The figures of recipes/monitoring come from it.

A training run in one process, in blocks of ten steps of which one is logged. In every other block the hooks of all
monitoring callbacks return at once. Printed are the ratios of each block with them to the one before without them; and
the processor time that is spent within the hooks, and on writing what they log, which is the steadier measure on a
machine that does other things besides. What happens only now and then is timed by itself, and charged to the steps
between two: an activation spectrum, and the samples after a validation.

A step has 8,192 tokens, a sixteenth of the recipes'; two layers have less of it to hide the callbacks in than eight.
"""

import json
import statistics
import sys
import time
from functools import partial
from itertools import pairwise
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from cola_lightning.callbacks import (
    ActivationSpectrum,
    Dashboard,
    GradientNorms,
    HyperParameters,
    LossGuard,
    Memory,
    Samples,
    Throughput,
)
from cola_lightning.methods import CoLA
from cola_lightning.training.module import LanguageModel

BLOCK, EVERY_N_STEPS, ROWS, LENGTH, VOCABULARY, MICRO_BATCHES = 10, 1000, 16, 256, 8192, 2
HOOKS = ("on_before_backward", "on_before_optimizer_step", "on_train_batch_start", "on_train_batch_end", "judge")
# Continues two prompts of four tokens, and writes them as text.
TOKENIZER = SimpleNamespace(encode=lambda texts: [[5, 6, 7, 8, 0]], decode=str, eos_id=None)


class Blocks(L.Callback):
    """Switches the others' hooks off in every other block, and keeps time."""

    def __init__(self, callbacks):
        self.on, self.blocks = False, []
        self.inside = dict.fromkeys((type(callback).__name__ for callback in callbacks), 0.0)
        for callback in callbacks:
            for hook in HOOKS:
                if hasattr(callback, hook):
                    setattr(callback, hook, self.switched(type(callback).__name__, getattr(callback, hook)))

    def switched(self, name, hook):
        def call(*args):
            if self.on:
                began = time.process_time()
                hook(*args)
                self.inside[name] += time.process_time() - began

        return call

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step % BLOCK == 0 and batch_idx % MICRO_BATCHES == 0:
            self.note()
            self.on = bool(trainer.global_step // BLOCK % 2)

    def note(self):
        self.blocks.append((time.perf_counter(), time.process_time()))

    def on_train_end(self, trainer, pl_module):
        self.note()


class TimedLogger(TensorBoardLogger):
    """Keeps the processor time of writing a step's scalars, the callbacks' share of them: what a callback has logged
    once is written again in blocks in which it rests."""

    def __init__(self, folder):
        super().__init__(folder, name="", version="")
        self.plain, self.spent = 0, []

    def log_metrics(self, metrics, step=None):
        began = time.process_time()
        super().log_metrics(metrics, step)
        if step is None:
            return
        self.plain = self.plain or len(metrics)  # of the first block, which is one without callbacks
        self.spent.append((time.process_time() - began) * (1 - self.plain / len(metrics)))


def timed(act, times=3):
    """Processor seconds of each time."""
    spent = []
    for _ in range(times):
        began = time.process_time()
        act()
        spent.append(round(time.process_time() - began, 3))
    return sorted(spent)


def main(pairs):
    torch.manual_seed(0)
    spectrum = ActivationSpectrum(EVERY_N_STEPS, tokens=ROWS * LENGTH)
    samples = Samples(["The people of the", "Once upon a time"])
    others = [Throughput(), Memory(), GradientNorms(), LossGuard(window=20)]
    blocks = Blocks(others)
    model = LanguageModel(VOCABULARY, 512, 1376, 2, 8, projection=partial(CoLA, rank=128))
    steps = 2 * BLOCK * (pairs + 1)
    ids = torch.randint(1, VOCABULARY, (4, ROWS, LENGTH))
    batches = [{"input_ids": rows, "labels": rows} for rows in ids] * (steps * MICRO_BATCHES // len(ids))
    with TemporaryDirectory() as folder:
        logger = TimedLogger(folder)
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=1, log_every_n_steps=BLOCK,
            gradient_clip_val=0.5, accumulate_grad_batches=MICRO_BATCHES,
            logger=logger, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[blocks, *others, HyperParameters(), Dashboard()],
        )  # fmt: skip
        trainer.fit(model, DataLoader(batches, batch_size=None))
        trainer.datamodule = SimpleNamespace(tokenizer=TOKENIZER)
        now_and_then = {
            "spectrum": timed(
                lambda: spectrum._log(trainer, model, spectrum.measure(trainer, model.network, batches[0]))
            ),
            "samples": timed(lambda: samples.on_validation_end(trainer, model)),
        }
    # Of each block, seconds by the clock and of the processor; without them comes first. The first two warm up.
    spans = [(after[0] - at[0], after[1] - at[1]) for at, after in pairwise(blocks.blocks)][2:]
    off, on = spans[::2], spans[1::2]
    step = statistics.median(processor for _, processor in off) / BLOCK
    spent = {name: seconds / (steps / 2) for name, seconds in blocks.inside.items()}
    spent["writing what they log"] = statistics.median(logger.spent[2:]) / BLOCK
    spent |= {name: statistics.median(seconds) / EVERY_N_STEPS for name, seconds in now_and_then.items()}
    report = {
        "tokens_of_a_step": ROWS * LENGTH * MICRO_BATCHES,
        "processor_seconds_of_a_step": round(step, 4),
        "clock_ratios": sorted(round(a[0] / b[0], 4) for a, b in zip(on, off, strict=True)),
        "processor_ratios": sorted(round(a[1] / b[1], 4) for a, b in zip(on, off, strict=True)),
        "seconds_of_one": now_and_then,
        "milliseconds_a_step": {name: round(1000 * seconds, 3) for name, seconds in spent.items()},
        "percent_of_a_step": {name: round(100 * seconds / step, 4) for name, seconds in spent.items()},
        "all_milliseconds": round(1000 * sum(spent.values()), 3),
        "all_percent": round(100 * sum(spent.values()) / step, 4),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
