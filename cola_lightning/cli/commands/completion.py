"""Print a completion script for a shell."""

from argparse import Namespace

from cola_lightning.cli.options import OptionParser

GROUP = "Look"


def parse(args: list[str]) -> Namespace:
    """Parse the name of the shell."""
    parser = OptionParser(
        "completion",
        "bash > ~/.local/share/bash-completion/completions/cola_lightning",
        description="Print a completion script for a shell, to be sourced there.",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh", "fish", "powershell"))
    return parser.parse_args(args)


def run(options: Namespace) -> None:
    """Print the script."""
    from cola_lightning.cli.completion import shell_script
    from cola_lightning.cli.lightning_cli import training_parser

    print(shell_script(training_parser(), options.shell))
