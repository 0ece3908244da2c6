"""Try Lightning's Trainer arguments, callbacks, loggers, profilers and plugins, and torch's optimizers and schedules.

``python -m tests.flag_matrix`` runs ``fit`` for 4 steps once per case, each in a process of its own. It prints whether
the case works, is refused in one line, ends in a traceback, or hangs. ``python -m tests.flag_matrix WORD`` runs the
cases with the word in their name. ``tests/test_flag_matrix.py`` runs a sample.
"""

import inspect
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch import callbacks, loggers, plugins, profilers
from torch.optim import lr_scheduler

from cola_lightning.cli.app import main
from tests.processes import Run

SECONDS = 120.0

# An ordinary and an odd value of each argument of the Trainer
TRAINER = {
    "accelerator": ["cpu", "auto", "tpu"],
    "strategy": ["auto", "ddp", "fsdp", "deepspeed_stage_2", "banana"],
    "devices": ["1", "auto", "[0]", "0", "-1"],
    "num_nodes": ["1", "0"],
    "precision": ["32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true", "transformer-engine", "8"],
    "logger": ["false", "true", "banana"],
    "callbacks": ["[]", "null", "LearningRateMonitor", "[LearningRateMonitor, ModelSummary]"],
    "fast_dev_run": ["true", "2", "-1"],
    "max_epochs": ["1", "0", "-5"],
    "min_epochs": ["1", "3"],
    "max_steps": ["1", "50", "0", "-1", "1.5"],
    "min_steps": ["2", "100"],
    "max_time": ["00:00:00:02", "00:01:00:00", "{seconds: 2}", "soon"],
    "limit_train_batches": ["2", "0.5", "0", "-1"],
    "limit_val_batches": ["1", "0.5", "0", "2.5"],
    "limit_test_batches": ["1", "0"],
    "limit_predict_batches": ["1", "0"],
    "overfit_batches": ["1", "0.5", "-1"],
    "val_check_interval": ["2", "0.5", "100", "0", "00:00:00:02"],
    "check_val_every_n_epoch": ["1", "null", "2", "0"],
    "num_sanity_val_steps": ["1", "-1", "-2"],
    "log_every_n_steps": ["1", "0", "1000", "-1"],
    "enable_checkpointing": ["true", "false"],
    "enable_progress_bar": ["true", "false"],
    "enable_model_summary": ["true", "false"],
    "accumulate_grad_batches": ["1", "3", "0"],
    "gradient_clip_val": ["1.0", "0", "-1", "null"],
    "gradient_clip_algorithm": ["norm", "value", "banana"],
    "deterministic": ["true", "warn", "2"],
    "benchmark": ["true", "false"],
    "inference_mode": ["true", "false"],
    "use_distributed_sampler": ["true", "false"],
    "profiler": ["simple", "advanced", "pytorch", "banana"],
    "detect_anomaly": ["true"],
    "barebones": ["true"],
    "plugins": ["null", "banana"],
    "sync_batchnorm": ["true"],
    "reload_dataloaders_every_n_epochs": ["1", "-1"],
    "default_root_dir": ["{folder}/root"],
    "enable_autolog_hparams": ["false"],
    "model_registry": ["null", "name"],
}
# Arguments that a class has no default for
REQUIRED = {
    "EarlyStopping": {"monitor": "val/perplexity"},
    "GradientAccumulationScheduler": {"scheduling": "{0: 2}"},
    "ModelPruning": {"pruning_fn": "l1_unstructured"},
    "StochasticWeightAveraging": {"swa_lrs": "0.01"},
    "OnExceptionCheckpoint": {"dirpath": "{folder}/exception"},
    "ThroughputMonitor": {"batch_size_fn": "len"},
    "CSVLogger": {"save_dir": "{folder}/csv"},
    "TensorBoardLogger": {"save_dir": "{folder}/tensorboard"},
    "SGD": {"lr": "0.1"},
    "LambdaLR": {"lr_lambda": "len"},
    "MultiplicativeLR": {"lr_lambda": "len"},
    "MultiStepLR": {"milestones": "[2, 3]"},
    "StepLR": {"step_size": "2"},
    "ExponentialLR": {"gamma": "0.9"},
    "OneCycleLR": {"max_lr": "0.01"},
    "CyclicLR": {"base_lr": "0.001", "max_lr": "0.01"},
    "CosineAnnealingWarmRestarts": {"T_0": "2"},
}


def classes(module, base: type) -> list[str]:
    """List the public classes of a module that derive from ``base``, and are not it."""
    found = inspect.getmembers(module, lambda each: inspect.isclass(each) and issubclass(each, base))
    return [name for name, each in found if each is not base and not name.startswith("_")]


def of_classes(flag: str, module, base: type) -> dict[str, list[str]]:
    """Make a case of each such class, with the arguments that it must have."""
    cases = {}
    for name in classes(module, base):
        flags = [f"--{flag}={module.__name__}.{name}"]
        flags += [f"--{flag.removesuffix('+')}.{key}={value}" for key, value in REQUIRED.get(name, {}).items()]
        cases[f"{flag.removesuffix('+').removeprefix('trainer.')} {name}"] = flags
    return cases


def all_cases() -> dict[str, list[str]]:
    """Make every case: its name, and the flags to type."""
    arguments = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    assert arguments == set(TRAINER), f"arguments of the Trainer without a case: {arguments ^ set(TRAINER)}"
    cases = {f"{name} {value}": [f"--trainer.{name}={value}"] for name in TRAINER for value in TRAINER[name]}
    cases |= of_classes("trainer.callbacks+", callbacks, L.Callback)
    cases |= of_classes("trainer.logger", loggers, loggers.Logger)
    cases |= of_classes("trainer.profiler", profilers, profilers.Profiler)
    for base in (plugins.Precision, plugins.CheckpointIO, plugins.LayerSync):
        cases |= of_classes("trainer.plugins+", plugins, base)
    cases |= of_classes("model.optimizer", torch.optim, torch.optim.Optimizer)
    return cases | of_classes("model.schedule", lr_scheduler, lr_scheduler.LRScheduler)


def base_flags(folder: Path) -> list[str]:
    """Write a text, and return the flags of a run of 4 steps of a tiny network on it."""
    text = folder / "text.jsonl"
    text.write_text("".join(f'{{"text": "number {n} and the one after it, {n + 1}, and so on"}}\n' for n in range(300)))
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "optimizer.lr": 0.001}
    data = {"paths": f"[{text}]", "vocab_size": 300, "sequence_length": 16, "batch_size": 2}
    data |= {"cache_dir": folder / "cache"}
    trainer = {"accelerator": "cpu", "devices": 1, "max_steps": 4, "val_check_interval": 2, "limit_val_batches": 2}
    named = {"run_dir": folder / "run", "data": "TextDataModule"}
    for group, values in (("model", sizes), ("data", data), ("trainer", trainer)):
        named |= {f"{group}.{name}": value for name, value in values.items()}
    return ["fit", *(f"--{name}={value}" for name, value in named.items())]


def _case(flags: list[str], folder: Path) -> None:
    """Run a case in this process."""
    os.chdir(folder)
    os.setpgid(0, 0)
    main([*base_flags(folder), *(flag.replace("{folder}", str(folder)) for flag in flags)])


def verdict(flags: list[str], folder: Path, seconds: float = SECONDS) -> tuple[str, str]:
    """Run one case.

    Returns:
        ``works``, ``one line``, ``traceback``, ``silent`` (an error without a word) or ``hangs``; and the last lines of
        its output.
    """
    process = Run(_case, flags, folder, ranks=1, folder=folder)
    try:
        [status] = process.wait(seconds)
    except AssertionError:
        return "hangs", ""
    said = process.logs[0].read_text(errors="replace").strip()
    tail = "\n".join(said.splitlines()[-4:])
    if "Traceback (most recent call last)" in said:
        return "traceback", tail
    if status == 0:
        return "works", tail
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    return ("one line", lines[0]) if len(lines) == 1 else ("silent", tail)


def run(cases: dict[str, list[str]]) -> Counter:
    """Run the cases one after another, print a line for each, and count the verdicts."""
    counts: Counter = Counter()
    for name, flags in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            result, said = verdict(flags, Path(folder))
        counts[result] += 1
        print(f"{result:10} {name:50} {said.splitlines()[-1][:200] if said else ''}", flush=True)
    return counts


if __name__ == "__main__":
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    print(dict(run({name: flags for name, flags in all_cases().items() if word in name})))
