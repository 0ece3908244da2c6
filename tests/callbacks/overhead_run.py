"""What monitoring costs, as a program: ``overhead_run.py [PAIRS]``. The figures of recipes/monitoring come from it.

A training run in one process, in blocks of ten steps of which one is logged. In every other block the hooks of all
monitoring callbacks return at once. Printed are the ratios of each block with them to the one before without them; and
the share of the processor time of a step that is spent within the hooks, which is the steadier measure on a machine
that does other things besides. An activation spectrum is timed by itself, and charged to the steps between two.
"""

import json
import statistics
import sys
import time
from functools import partial
from itertools import pairwise
from tempfile import TemporaryDirectory

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
    Throughput,
)
from cola_lightning.methods import CoLA
from cola_lightning.module import LanguageModel

BLOCK, EVERY_N_STEPS, ROWS, LENGTH, VOCABULARY, MICRO_BATCHES = 10, 1000, 4, 256, 8192, 4
HOOKS = ("on_before_backward", "on_before_optimizer_step", "on_train_batch_start", "on_train_batch_end", "judge")


class Blocks(L.Callback):
    """Switches the others' hooks off in every other block, and keeps time."""

    def __init__(self, callbacks):
        self.on, self.inside, self.blocks = False, dict.fromkeys((type(c).__name__ for c in callbacks), 0.0), []
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


def main(pairs):
    torch.manual_seed(0)
    spectrum = ActivationSpectrum(EVERY_N_STEPS, tokens=4 * ROWS * LENGTH)
    others = [Throughput(), Memory(), GradientNorms(), LossGuard(window=20)]
    blocks = Blocks(others)
    model = LanguageModel(VOCABULARY, 512, 1376, 2, 8, projection=partial(CoLA, rank=128))
    ids = torch.randint(1, VOCABULARY, (8, ROWS, LENGTH))  # two steps, over and over
    batches = [{"input_ids": rows, "labels": rows} for rows in ids]
    steps = 2 * BLOCK * (pairs + 1)
    with TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=-1, log_every_n_steps=BLOCK,
            gradient_clip_val=0.5, accumulate_grad_batches=MICRO_BATCHES,
            logger=TensorBoardLogger(folder, name="", version=""), enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
            callbacks=[blocks, *others, HyperParameters(), Dashboard()],
        )  # fmt: skip
        trainer.fit(model, DataLoader(batches, batch_size=None))
        whole = {name: torch.cat([batch[name] for batch in batches[:4]]) for name in batches[0]}
        spectra = []
        for _ in range(3):
            began = time.process_time()
            spectrum._log(trainer, model, spectrum.measure(trainer, model.network, whole))
            spectra.append(time.process_time() - began)
    # Of each block, seconds by the clock and of the processor; without them comes first. The first two warm up.
    marks = blocks.blocks
    spans = [(after[0] - at[0], after[1] - at[1]) for at, after in pairwise(marks)][2:]
    off, on = spans[::2], spans[1::2]
    step = statistics.median(processor for _, processor in off) / BLOCK
    counted = steps / 2
    report = {
        "processor_seconds_of_a_step": step,
        "clock_ratios": sorted(round(a[0] / b[0], 4) for a, b in zip(on, off, strict=True)),
        "processor_ratios": sorted(round(a[1] / b[1], 4) for a, b in zip(on, off, strict=True)),
        "share_within_hooks": {name: round(seconds / counted / step, 6) for name, seconds in blocks.inside.items()},
        "spectrum_seconds": sorted(round(seconds, 3) for seconds in spectra),
        "spectrum_share": round(statistics.median(spectra) / EVERY_N_STEPS / step, 6),
    }
    report["share_of_all"] = round(sum(report["share_within_hooks"].values()) + report["spectrum_share"], 6)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
