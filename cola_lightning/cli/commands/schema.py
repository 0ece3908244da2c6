"""Print a JSON schema of the configs, by which editors complete and check them."""

from argparse import Namespace

from cola_lightning.cli.options import OptionParser

GROUP = "Look"


def parse(args: list[str]) -> Namespace:
    """Parse nothing but ``--help``."""
    return OptionParser(
        "schema", "> cola_lightning/config.schema.json", description=f"{__doc__} It goes to standard output."
    ).parse_args(args)


def run(options: Namespace) -> None:
    """Print the schema of what ``fit`` takes."""
    import json

    from cola_lightning.cli.completion import json_schema
    from cola_lightning.cli.lightning_cli import training_parser
    from cola_lightning.private_apis.jsonargparse import commands_of

    print(json.dumps(json_schema(commands_of(training_parser())["fit"]), indent=1))
