"""Checks of arguments that several methods share."""

from cola_lightning.errors import InputError


def check_rank(in_features: int, out_features: int, rank: int) -> None:
    """Raise InputError unless the rank is between 1 and the smaller side of the matrix."""
    smaller = min(in_features, out_features)
    if not 1 <= rank <= smaller:
        raise InputError(
            f"rank {rank} does not fit a projection of {in_features} to {out_features} features; "
            f"choose one from 1 to {smaller} (the papers use about a quarter of hidden_size)"
        )


def check_choice(owner: str, name: str, value: object, *choices: object) -> None:
    """Raise InputError unless the value is one of the choices. The command line checks this, a Python call does not."""
    if value not in choices:
        *others, last = (str(choice) for choice in choices)
        raise InputError(f"{owner}: {name} is {value}; it must be {', '.join(others)} or {last}")
