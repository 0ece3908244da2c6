import re
from dataclasses import replace
from functools import partial

import lightning as L
import pytest
import torch

from cola_lightning.callbacks import OutOfMemoryAdvice
from cola_lightning.callbacks.out_of_memory import advice
from cola_lightning.cli.app import main
from cola_lightning.costs import Run
from cola_lightning.methods import CoLA, CoLAM
from cola_lightning.models import FullRank, LlamaConfig
from cola_lightning.models.llama import build_llama
from tests.conftest import loader, tiny_trainer

pytestmark = pytest.mark.slow


class Full(L.Callback):
    """Stands for a device that is full at the third step."""

    def on_before_zero_grad(self, trainer, *_):
        if trainer.global_step == 2:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity …"
            )


def test_a_run_that_runs_out_of_memory_ends_with_advice(tiny_run, tmp_path, capsys):
    flags = [f"--trainer.callbacks+={__name__}.Full", f"--run_dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit, match="1"):
        main(["fit", *tiny_run, *flags])
    shown = capsys.readouterr().err
    message = shown[shown.index("error:") :]
    assert "Traceback" not in shown
    assert message.startswith("error: CUDA out of memory\nThe run is predicted to need")
    assert "micro-batches of 4 x 32 tokens: activations" in message
    lines = [line for line in message.splitlines() if line.startswith("  ")]
    assert [line.split(":")[0].strip() for line in lines] == [
        "--model.loss_chunk_size 32",
        "--data.batch_size 2 --trainer.accumulate_grad_batches 2",
        "--config configs/method/cola_m.yaml",
        "CoLAM with keep",
    ]
    assert re.search(r"logits and loss [\d.]+ MiB -> [\d.]+ MiB", lines[0])
    assert re.search(r"activations [\d.]+ MiB -> [\d.]+ MiB", lines[2])
    assert re.search(r"the same result, at 1\.\d\d times the FLOPs$", lines[2])


def run_of(projection, **settings) -> Run:
    build = partial(build_llama, config=LlamaConfig(300, 64, 96, 4, 4), projection=projection)
    return Run(
        build, 4, torch.optim.AdamW, **({"batch_size": 8, "sequence_length": 64, "precision": "bf16-true"} | settings)
    )


def test_the_effect_is_the_one_that_is_predicted():
    run = run_of(partial(CoLA, rank=16), global_batch_size=96, gpus=4)
    lines = advice(run, 2**30).splitlines()
    assert " of 1.0 GiB on a device" in lines[0]
    total = lambda changed: f"in all {run.memory.total / 2**20:.2f} MiB -> {changed.memory.total / 2**20:.2f} MiB"  # noqa: E731
    assert lines[1].startswith("  --model.loss_chunk_size 128: ")
    assert total(replace(run, build=partial(run.build, loss_chunk_size=128))) in lines[1]
    assert lines[2].startswith("  --data.batch_size 4: ")  # 24 rows on each device
    assert total(replace(run, batch_size=4)) in lines[2]
    assert lines[3].startswith("  --trainer.strategy fsdp2: ")
    assert total(replace(run, strategy="fsdp2")) in lines[3]
    assert lines[4].startswith("  --config configs/method/cola_m.yaml: ")
    assert total(replace(run, transforms=(CoLAM().apply,))) in lines[4]


def test_what_is_done_already_is_not_advised():
    checkpointed = run_of(partial(CoLA, rank=16), transforms=(CoLAM().apply,), batch_size=1)
    checkpointed = replace(checkpointed, build=partial(checkpointed.build, loss_chunk_size=16))
    assert [line.split(": ")[0] for line in advice(checkpointed, None).splitlines()[1:]] in ([], ["  CoLAM with keep"])
    full = advice(run_of(FullRank), None)  # on one device, which has nothing to share with
    assert [line.split(": ")[0] for line in full.splitlines()[1:]] == [
        "  --model.loss_chunk_size 128",
        "  --data.batch_size 4 --trainer.accumulate_grad_batches 2",
        "  --trainer.callbacks+=CoLAM --trainer.callbacks.keep=block_input",
    ]


def test_from_python_the_error_itself_comes_out_and_other_errors_are_left_alone():
    run, model, batches = tiny_trainer(OutOfMemoryAdvice(), Full(), steps=4)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as raised:
        run.fit(model, loader(batches))
    assert not hasattr(raised.value, "__notes__")  # no data module says how large a batch is
    error = ValueError("something else")
    OutOfMemoryAdvice().on_exception(run, model, error)
    assert not hasattr(error, "__notes__")
