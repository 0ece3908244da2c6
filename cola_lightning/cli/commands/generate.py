"""Let a model continue prompts."""

from argparse import Namespace

from cola_lightning.cli.options import OptionParser, any_int

GROUP = "Use"


def parse(args: list[str]) -> Namespace:
    """Parse the options of :func:`cola_lightning.inference.generate.print_continuations`."""
    parser = OptionParser(
        "generate",
        "runs/quickstart --prompt 'The people of' --max_new_tokens 60",
        description="Let a model continue prompts. One is written as it comes; several are a batch, written when all "
        "are done.",
    )
    add = parser.add_argument
    add("model", help="checkpoint, directory of a run, or folder in Hugging Face's layout")
    add("--prompt", dest="prompts", action="append", default=[], help="beginning of a text; may be given several times")
    add("--file", help="file with a prompt on each line")
    add("--tokenizer", help="folder, tokenizer.json or hub repository; the model's if not given")
    add("--max_new_tokens", type=int, default=100, help="tokens to add at most")
    add("--temperature", type=float, default=0.8, help="divides the logits; 0 takes the likeliest")
    add("--top_k", type=int, help="sample among the k likeliest tokens only")
    add("--top_p", type=float, help="sample among the likeliest that together have this probability")
    add("--stop", dest="stops", action="append", default=[], help="end before this text; may be given several times")
    add("--seed", type=any_int, default=42, help="of the sampling")
    add("--device", help="cuda, cpu, …; what there is if not given")
    add("--int8", action="store_true", help="hold the matrices in int8, in half the bytes of bfloat16")
    about = (
        "compile the step of a token (one prompt, on a CPU): later tokens are faster, the second waits for the compiler"
    )
    add("--compile", action="store_true", help=about)
    add("--trust", nargs="+", default=[], help="classes or packages whose code a checkpoint may name")
    return parser.parse_args(args)


def run(options: Namespace) -> None:
    """Print what the model adds to the prompts."""
    from cola_lightning.inference.generate import print_continuations

    print_continuations(**vars(options))
