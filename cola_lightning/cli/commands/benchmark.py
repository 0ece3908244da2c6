"""Measure training steps, or generation, of one or several configs on one device."""

from argparse import Namespace
from pathlib import Path

from cola_lightning.cli.options import OptionParser, check_at_least
from cola_lightning.errors import InputError
from cola_lightning.output_files import check_output_file

GROUP = "Compare"
ONE_DEVICE = ["--trainer.devices=1", "--trainer.strategy=auto"]


def parse(args: list[str]) -> tuple[Namespace, dict[str, list[str]]]:
    """Parse the command's own options, and make the flags of ``fit`` for each network that is measured, by its name.

    Raises:
        InputError: If a number is out of range, or options do not go together.
    """
    parser = OptionParser(
        "benchmark",
        "--config configs/cola_60m.yaml --against configs/llama_60m.yaml",
        description="Measure training steps on one device: tokens per second, the parts of a step, MFU and HFU, peak "
        "memory, counted FLOPs and bytes. Besides these options it takes those of fit; flags other than --config hold "
        "for every network that is measured.",
    )
    parser.add_argument("-c", "--config", action="append", default=[], metavar="FILE", help="as for fit")
    parser.add_argument(
        "--against", action="append", default=[], metavar="FILE[,FILE ...]",
        help="another network to measure in the same run, by its config and overlays; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--peer", action="append", default=[], metavar="MODULE:CALLABLE",
        help="any other network: what the callable returns, a torch module that maps ids (B, T) to logits (B, T, V) or "
        "to something that has them as .logits; may be given several times",
    )  # fmt: skip
    parser.add_argument("--warmup", type=int, default=2, help="steps of each network that are not timed")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, in each of which every network has its turn")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a turn")
    parser.add_argument(
        "--generate", type=int, metavar="N",
        help="measure generation of N tokens after a prompt of a micro-batch's size instead",
    )  # fmt: skip
    parser.add_argument(
        "--int8", action="store_true", help="with --generate: hold the matrices in int8, as generate does"
    )
    parser.add_argument(
        "--compile", action="store_true",
        help="with --generate: compile the step of a token, as generate does (one row, on a CPU); the compiler's time "
        "is not measured",
    )  # fmt: skip
    parser.add_argument("--profile", metavar="FOLDER", help="also write traces there, for TensorBoard and Perfetto")
    parser.add_argument("--json", metavar="FILE", help="write the result there too")
    options, rest = parser.parse_known_args(args)
    check_at_least(0, options, "warmup")
    check_at_least(1, options, "rounds", "steps", "generate")
    check_output_file(options.json)
    if options.generate and (options.peer or options.profile):
        raise InputError("--generate measures this package's networks, untraced; leave --peer and --profile out")
    if (options.int8 or options.compile) and not options.generate:
        raise InputError(
            "--int8 and --compile prepare a network for generation; add --generate N (--model.compile true compiles "
            "training steps)"
        )
    several = [options.config, *(files.split(",") for files in options.against)]
    subjects: dict[str, list[str]] = {}
    for files in several:
        name = "+".join(Path(file).stem for file in files) or "fit's defaults"
        while name in subjects:
            name += "'"
        subjects[name] = [*(f"--config={file}" for file in files), *rest, *ONE_DEVICE]
    return options, subjects


def run(parsed: tuple[Namespace, dict[str, list[str]]]) -> None:
    """Measure the networks, and print the tables."""
    from cola_lightning import benchmark
    from cola_lightning.cli.lightning_cli import CLI

    options, flags = parsed
    runs = {name: CLI(each, run=False) for name, each in flags.items()}
    parts = [(name, cli.trainer, cli.model, cli.datamodule) for name, cli in runs.items()]
    if options.generate:
        generating = [benchmark.GeneratingModel(*each, options.int8, options.compile) for each in parts]
        results = benchmark.measure_generation(generating, options.warmup, options.rounds, options.generate)
        benchmark.report(results, generating[0], options.json)
        return
    own = [benchmark.PackageModel(*each) for each in parts]
    targets = [*own, *(benchmark.ExternalModel(path, own[0]) for path in options.peer)]
    results = benchmark.measure_training(targets, options.warmup, options.rounds, options.steps, options.profile)
    benchmark.report(results, own[0], options.json)
