"""Record losses and gradient norms of twenty steps: each method, each CoLA-M setting, each strategy.

A change that is not meant to change results must give the same numbers afterwards:

    python -m tests.record_curves --exact before.json        # before the change, on this machine
    python -m tests.record_curves --exact before.json --check    # after it, on the same machine: equal bit for bit
    python -m tests.record_curves --check                    # on any machine: float64, to 1e-9

``tests/assets/curves.json`` holds the float64 curves; without options the command writes it anew. Processors round
differently, so float32 and bfloat16 curves, DeepSpeed's (it has no float64) and Muon's (its orthogonalization computes
in bfloat16) are only in the file of ``--exact``. Numbers are hexadecimal, so that no digit is lost.
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from cola_lightning.cli.lightning_cli import CLI
from tests.distributed.parity_run import KEEPS, OTHERS, STEPS, Data, train_each
from tests.processes import Run
from tests.recorder import Curve

REPOSITORY = Path(__file__).parent.parent
ASSET = REPOSITORY / "tests" / "assets" / "curves.json"
TOLERANCE = 1e-9
"""Largest relative difference of float64 curves. Rounding differs by about 1e-15; twenty steps amplify that."""

TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_steps": STEPS, "warmup_steps": 3, "cycle_steps": 4, "restart_warmup_steps": 1, "update_proj_gap": 5,
    "anchor_every": 2, "interval": 4, "hold_steps": 2,
}  # fmt: skip
"""Values of settings, by name and at any depth of a config: a tiny network, with every schedule in use."""
RANK = 8
"""Largest rank of the tiny network."""

OVER_COLA = ("cola_m", "lax")
"""Methods that are overlays of a CoLA config. The others are overlays of one of full rank."""
METHODS = sorted(file.stem for file in (REPOSITORY / "configs" / "method").glob("*.yaml"))
COLA_M = {
    "none": [],
    "residual_and_latents": ["--trainer.callbacks.keep=residual_and_latents"],
    "keep_attention": ["--trainer.callbacks.keep_attention=true"],
    "latents": ["--trainer.callbacks.keep=latents"],
    "latents_keep_attention": ["--trainer.callbacks.keep=latents", "--trainer.callbacks.keep_attention=true"],
    "float8": ["--trainer.callbacks.keep=latents", "--trainer.callbacks.latents_dtype=float8"],
    "block_input": ["--trainer.callbacks.keep=block_input"],
}
STRATEGIES = ("auto", "ddp", "fsdp2", "deepspeed_1", "deepspeed_2", "deepspeed_3")
INEXACT = ("method/muon", "strategy/deepspeed")
"""Curves that are not comparable between machines in any precision."""
COMPARABLE = {"method/sst@64-true": 16}
"""Number of steps that are comparable between machines, if not all. After step 16 SST decomposes matrices with singular
values of 0, which have no definite singular vectors."""


class TinyCLI(CLI):
    """Command line that keeps a config's callbacks, projection, optimizer and schedule, with :data:`TINY` sizes."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        super().parse_arguments(parser, args)
        shrink(self.config)


def shrink(settings: Any) -> None:
    """Replace the values of :data:`TINY`, and ranks, at any depth."""
    if isinstance(settings, list):
        for each in settings:
            shrink(each)
    if isinstance(settings, Namespace):
        for name, value in vars(settings).items():
            if type(value) is int and name in TINY:
                setattr(settings, name, TINY[name])
            elif type(value) is int and name == "rank":
                settings.rank = min(value, RANK)
            else:
                shrink(value)


def flags_of(name: str) -> list[str]:
    """Return the flags of a curve that one process makes."""
    kind, _, what = name.partition("/")
    if kind == "base":
        configs, options = ["llama_60m.yaml"], []
    elif kind == "fast":
        configs, options = ["cola_60m.yaml", "fast.yaml"], ["--model.compile=false", "--model.loss_chunk_size=30"]
    elif kind == "method":
        configs, options = [f"{'cola' if what in OVER_COLA else 'llama'}_60m.yaml", f"method/{what}.yaml"], []
    else:
        configs, options = ["cola_60m.yaml", *["method/cola_m.yaml"] * (what != "none")], COLA_M[what]
    return [*(f"--config={REPOSITORY / 'configs' / config}" for config in configs), *options]


ALONE = ["base/llama", "fast/cola", *(f"method/{name}" for name in METHODS), *(f"cola_m/{name}" for name in COLA_M)]
"""Curves that one process makes."""


def record_alone(name: str, precision: str) -> dict[str, list[str]]:
    """Train on one device with two micro-batches of four rows per step."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "run_dir": folder, "seed_everything": 0, "trainer.precision": precision, "trainer.accelerator": "cpu",
            "trainer.devices": 1, "trainer.accumulate_grad_batches": 2, "trainer.log_every_n_steps": 1,
            "trainer.limit_val_batches": 0, "trainer.logger": "false", "trainer.enable_checkpointing": "false",
            "trainer.enable_progress_bar": "false",
        }  # fmt: skip
        with redirect_stdout(sys.stderr):
            cli = TinyCLI([*flags_of(name), *(f"--{flag}={value}" for flag, value in flags.items())], run=False)
            curve = Curve()
            cli.trainer.callbacks.append(curve)
            cli.trainer.fit(cli.model, datamodule=Data(batch_size=4))
    return in_hex(curve.losses, curve.norms)


def record_strategies(strategies: Iterable[str]) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """Train on two real processes under each strategy, and on one under ``auto``."""
    for strategy in strategies:
        with tempfile.TemporaryDirectory() as folder:
            ranks, micro_batch = (1, 8) if strategy == "auto" else (2, 2)
            arguments = strategy, ranks, folder, [*KEEPS, *OTHERS], micro_batch
            Run(train_each, *arguments, ranks=ranks, folder=Path(folder)).done()
            for each in (*KEEPS, *OTHERS):
                losses, norms = json.loads((Path(folder) / each / "curve.json").read_text())
                yield f"strategy/{strategy}/{each}", in_hex(losses, norms)


def in_hex(losses: list[float], norms: list[float]) -> dict[str, list[str]]:
    assert len(losses) == len(norms) == STEPS
    return {"loss": [value.hex() for value in losses], "gradient_norm": [value.hex() for value in norms]}


def difference(curve: dict[str, list[str]], expected: dict[str, list[str]]) -> float:
    """Return the largest relative difference in the steps that ``expected`` has; NaN if a number is NaN."""
    distances = [
        abs(float.fromhex(value) - float.fromhex(right)) / abs(float.fromhex(right))
        for part in ("loss", "gradient_norm")
        for value, right in zip(curve[part][: len(expected[part])], expected[part], strict=True)
    ]
    return float("nan") if any(each != each for each in distances) else max(distances)


def is_portable(name: str) -> bool:
    """Whether a curve can be compared between machines."""
    return name.endswith("@64-true") and not name.startswith(INEXACT)


def portable(curves: dict[str, dict[str, list[str]]]) -> dict[str, dict[str, list[str]]]:
    """Select the curves, and their steps, that can be compared between machines."""
    return {
        name: {part: values[: COMPARABLE.get(name, STEPS)] for part, values in curve.items()}
        for name, curve in curves.items()
        if is_portable(name)
    }


def record(precisions: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Record all curves. Their names are ``CASE@PRECISION``."""
    curves = {}
    for precision in precisions:
        for name in ALONE:
            curves[f"{name}@{precision}"] = record_alone(name, precision)
            print(name, precision, file=sys.stderr)
    deepspeed = [name for name in STRATEGIES if name.startswith("deepspeed")]
    strategies = STRATEGIES if len(list(precisions)) > 1 else [name for name in STRATEGIES if name not in deepspeed]
    for name, curve in record_strategies(strategies):
        curves[f"{name}@{'32-true' if name.startswith('strategy/deepspeed') else '64-true'}"] = curve
        print(name, file=sys.stderr)
    return curves


def processor() -> str:
    """Describe what decides how this machine rounds: processor and torch."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    told = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    model = " ".join(told.get(key, "?") for key in ("model name", "cpu family", "model", "stepping"))
    return f"{platform.machine()} {model}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def write(path: Path, curves: dict[str, dict[str, list[str]]]) -> None:
    """Write curves as JSON, each list of numbers on one line."""
    head = f'{{\n"processor": {json.dumps(processor())},\n"curves": {{\n'
    lines = (
        f"{json.dumps(name)}: {{\n" + ",\n".join(f'  "{part}": {json.dumps(values)}' for part, values in curve.items())
        for name, curve in sorted(curves.items())
    )
    path.write_text(head + "},\n".join(lines) + "}\n}}\n")


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.record_curves", description=__doc__)
    parser.add_argument("--check", action="store_true", help="Compare with the file in place of writing it.")
    parser.add_argument("--exact", type=Path, help="A file with every curve, for this machine only.")
    options = parser.parse_args()
    curves = record(["64-true", "32-true", "bf16-mixed"] if options.exact else ["64-true"])
    if not options.exact:
        curves = portable(curves)
    path = options.exact or ASSET
    if not options.check:
        write(path, curves)
        print(f"{len(curves)} curves written to {path}")
        return
    stored = json.loads(path.read_text())
    if options.exact and stored["processor"] != processor():
        sys.exit(f"error: {path} was recorded on {stored['processor']}; this is {processor()}, which rounds otherwise")
    if curves.keys() != stored["curves"].keys():
        sys.exit(f"error: other curves than in {path}: {sorted(curves.keys() ^ stored['curves'].keys())}")
    found = {name: difference(curve, stored["curves"][name]) for name, curve in curves.items()}
    differing = {name: each for name, each in found.items() if not each <= (0.0 if options.exact else TOLERANCE)}
    for name, each in differing.items():
        print(f"{name}: relative difference {each:.1e}")
    print(f"{len(found) - len(differing)} of {len(found)} curves agree; largest difference {max(found.values()):.1e}")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
