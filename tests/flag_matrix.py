"""Try all that Lightning's Trainer takes, torch's optimizers and schedules, and this package's callbacks.

A case is a value of an argument of the Trainer, or a class that is found by looking into the packages of Lightning and
torch. ``python -m tests.flag_matrix`` runs ``fit`` for 4 steps once per case, each in a process of its own. It prints
whether the case works, is refused in one line, ends in a traceback, or hangs, and keeps that in ``flag_matrix.json``.
``python -m tests.flag_matrix WORD`` runs the cases with the word in their name, and prints which verdicts changed.
``tests/test_flag_matrix.py`` runs a sample, and fails if there is a case that the file lacks.
"""

import importlib
import inspect
import json
import os
import pkgutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import ModuleType

import lightning as L
import torch
from lightning.fabric.plugins import environments
from lightning.pytorch import accelerators, callbacks, loggers, plugins, profilers, strategies
from torch.optim import lr_scheduler

import cola_lightning.callbacks
from cola_lightning.cli.app import main
from tests.processes import Run

SECONDS = 120.0
VERDICTS = Path(__file__).with_suffix(".json")
"""Verdict of each case when all were run the last time."""

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
    "SWALR": {"swa_lr": "0.001"},
}
# Flag, package, and base class of the classes that can be named there
CLASSES = (
    ("trainer.callbacks+", callbacks, L.Callback),
    ("trainer.callbacks+", cola_lightning.callbacks, L.Callback),
    ("trainer.logger", loggers, loggers.Logger),
    ("trainer.profiler", profilers, profilers.Profiler),
    ("trainer.plugins+", plugins, object),
    ("trainer.plugins+", environments, environments.ClusterEnvironment),
    ("trainer.strategy", strategies, strategies.Strategy),
    ("trainer.accelerator", accelerators, accelerators.Accelerator),
    ("model.optimizer", torch.optim, torch.optim.Optimizer),
    ("model.schedule", torch.optim, lr_scheduler.LRScheduler),
)


def classes(package: ModuleType, base: type) -> dict[str, str]:
    """Find the public classes of a package and of its modules that derive from ``base``, without abstract ones.

    Returns:
        Name and import path of each, as a user would type it.
    """
    found, distribution = {}, package.__name__.partition(".")[0]
    inner = [
        importlib.import_module(each.name) for each in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    ]
    for module in [package, *inner]:
        for name, each in inspect.getmembers(module, inspect.isclass):
            # A module imports classes, too, that it does not offer. A package offers what it imports from its own kind.
            home = distribution if module is package else module.__name__
            usable = issubclass(each, base) and each is not base and not inspect.isabstract(each)
            if usable and not name.startswith("_") and f"{each.__module__}.".startswith(f"{home}."):
                found.setdefault(name, f"{module.__name__}.{name}")
    return found


def of_classes(flag: str, package: ModuleType, base: type) -> dict[str, list[str]]:
    """Make a case of each such class, with the arguments that it must have."""
    cases, key = {}, flag.removesuffix("+")
    for name, path in classes(package, base).items():
        required = [f"--{key}.{argument}={value}" for argument, value in REQUIRED.get(name, {}).items()]
        cases[f"{key.removeprefix('trainer.')} {name}"] = [f"--{flag}={path}", *required]
    return cases


def all_cases() -> dict[str, list[str]]:
    """Make every case: its name, and the flags to type."""
    arguments = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    assert arguments == set(TRAINER), f"arguments of the Trainer without a case: {arguments ^ set(TRAINER)}"
    cases = {f"{name} {value}": [f"--trainer.{name}={value}"] for name in TRAINER for value in TRAINER[name]}
    tests_own = {"fsdp2_sharded"}  # registered by tests/distributed/parity_run.py, if a test before imported it
    for name in sorted({*strategies.StrategyRegistry.available_strategies()} - tests_own):
        cases[f"strategy {name}"] = [f"--trainer.strategy={name}"]
    for name in accelerators.AcceleratorRegistry.available_accelerators():
        cases[f"accelerator {name}"] = [f"--trainer.accelerator={name}"]
    for flag, package, base in CLASSES:
        cases |= of_classes(flag, package, base)
    return cases


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


def run(cases: dict[str, list[str]]) -> dict[str, str]:
    """Run the cases one after another, print a line for each, and return the verdicts."""
    verdicts = {}
    for name, flags in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            result, said = verdict(flags, Path(folder))
        verdicts[name] = result
        print(f"{result:10} {name:50} {said.splitlines()[-1][:200] if said else ''}", flush=True)
    return verdicts


if __name__ == "__main__":
    word, cases = sys.argv[1] if len(sys.argv) > 1 else "", all_cases()
    now = run({name: flags for name, flags in cases.items() if word in name})
    before = json.loads(VERDICTS.read_text()) if VERDICTS.exists() else {}
    verdicts = before | now
    known = {name: verdicts[name] for name in cases if name in verdicts}
    VERDICTS.write_text(json.dumps(known, indent=1) + "\n")
    changed = [f"{name}: {before.get(name)} -> {result}" for name, result in now.items() if before.get(name) != result]
    print(dict(Counter(known.values())), f"{len(cases) - len(known)} not tried", *changed, sep="\n")
