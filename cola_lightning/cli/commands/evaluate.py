"""Measure a model: perplexity and bits per byte on any text, and tasks of lm-eval."""

from argparse import Namespace

from cola_lightning.cli.options import OptionParser, check_at_least
from cola_lightning.errors import InputError

GROUP = "Use"


def parse(args: list[str]) -> Namespace:
    """Parse the options of :func:`cola_lightning.inference.evaluate.evaluate`."""
    parser = OptionParser(
        "evaluate",
        "runs/quickstart --text notes.jsonl",
        description="Measure a model: perplexity and bits per byte on text, and tasks of lm-eval.",
    )
    add = parser.add_argument
    add("model", help="checkpoint, directory of a run, or folder in Hugging Face's layout")
    formats = "files or folders of .txt, .jsonl, .parquet; JSON lines may be compressed (.gz, .zst)"
    add("--text", nargs="+", default=[], help=formats)
    add("--text_column", default="text", help="key or column that holds the text")
    add("--sequence_length", type=int, help="tokens of a window; those of the run if not given")
    add("--stride", type=int, help="tokens from one window to the next; sequence_length if not given")
    add("--tasks", help="names of lm-eval tasks, with commas between them")
    add("--include_path", help="folder with task files of your own")
    add("--limit", type=int, help="examples of each task; all if not given")
    add("--batch_size", type=int, default=8, help="rows at a time")
    add("--tokenizer", help="folder, tokenizer.json or hub repository; the model's if not given")
    add("--device", help="cuda, cpu, …; what there is if not given")
    add(
        "--int8", action="store_true", help="round the matrices to int8 first, as generate --int8 does; for --text only"
    )
    add("--trust", nargs="+", default=[], help="classes or packages whose code a checkpoint may name")
    add("--json", metavar="FILE", help="write the result there too")
    options = parser.parse_args(args)
    options.tasks = [name.strip() for name in (options.tasks or "").split(",") if name.strip()]
    if not options.text and not options.tasks:
        raise InputError("there is nothing to evaluate on; give --text FILE_OR_FOLDER, or --tasks NAME,NAME")
    if options.int8 and options.tasks:
        raise InputError("--int8 is for --text, because lm-eval reads the model from a folder; leave out one of them")
    check_at_least(1, options, "batch_size", "sequence_length", "limit")
    return options


def run(options: Namespace) -> None:
    """Print the measurements as JSON."""
    from cola_lightning.inference.evaluate import evaluate

    evaluate(**vars(options))
