"""What can be typed after ``benchmark``."""

from argparse import Namespace
from pathlib import Path

from cola_lightning.cli.parser import OptionParser
from cola_lightning.errors import InputError
from cola_lightning.output_files import check_output_file

ONE_DEVICE = ["--trainer.devices=1", "--trainer.strategy=auto"]


def parse(args: list[str]) -> tuple[Namespace, dict[str, list[str]]]:
    """The command's own options, and of each network that is measured its name and the flags of ``fit`` that make it.

    Raises:
        InputError: If a number is out of range, or options do not go together.
    """
    parser = OptionParser(
        "cola_lightning benchmark",
        allow_abbrev=False,
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
    parser.add_argument("--profile", metavar="FOLDER", help="also write traces there, for TensorBoard and Perfetto")
    parser.add_argument("--json", metavar="FILE", help="write the result there too")
    options, rest = parser.parse_known_args(args)
    for name, least in (("warmup", 0), ("rounds", 1), ("steps", 1), ("generate", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"--{name} is {value}; it must be at least {least}")
    check_output_file(options.json)
    if options.generate and (options.peer or options.profile):
        raise InputError("--generate measures this package's networks, untraced; leave --peer and --profile out")
    several = [options.config, *(files.split(",") for files in options.against)]
    subjects: dict[str, list[str]] = {}
    for files in several:
        name = "+".join(Path(file).stem for file in files) or "fit's defaults"
        while name in subjects:
            name += "'"
        subjects[name] = [*(f"--config={file}" for file in files), *rest, *ONE_DEVICE]
    return options, subjects
