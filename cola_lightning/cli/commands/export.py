"""Write a model as a folder that transformers loads."""

from argparse import Namespace

from cola_lightning.cli.options import OptionParser

GROUP = "Use"


def parse(args: list[str]) -> Namespace:
    """Parse the options of :func:`cola_lightning.hub.export.export`."""
    parser = OptionParser(
        "export",
        "runs/quickstart models/quickstart",
        description="Write a model as a folder that transformers loads, with tokenizer and model card. CoLA, low rank, "
        "CR-Net and LaX bring a small modelling file, for which transformers asks for trust_remote_code=True; the "
        "others become a plain LlamaForCausalLM.",
    )
    add = parser.add_argument
    add("model", help="checkpoint, directory of a run, or folder in Hugging Face's layout")
    add("folder", help="where to write; must not exist, or be empty")
    add("--tokenizer", help="folder, tokenizer.json or hub repository; the model's if not given")
    add("--merge", choices=("true", "false"), default="false", help="multiply low-rank factors out; CoLA's cannot be")
    add("--max_shard_size", default="5GB", help="weights above this size are written in several files")
    add("--trust", nargs="+", default=[], help="classes or packages whose code a checkpoint may name")
    options = parser.parse_args(args)
    options.merge = options.merge == "true"
    return options


def run(options: Namespace) -> None:
    """Write the folder."""
    from cola_lightning.hub.export import export

    export(**vars(options))
