"""Merge typed settings with a checkpoint's, in cases made by hand: what is typed wins, the rest stays."""

import pytest

from cola_lightning.cli.merge_settings import differences, merge_settings

DEFAULT = "here.DefaultSchedule"  # means that no class was typed


def of(name, **arguments):
    return {"class_path": name, "init_args": arguments}


COSINE = of("Cosine", T_max=None, eta_min=0.1)
PAIR = of("Pair", first=of("SGD", lr=0.1, momentum=0.9), rest=of("Adam", lr=0.2))


@pytest.mark.parametrize(
    ("stored", "typed", "expected"),
    [
        ({"size": 8, "theta": 1.0}, {"size": 16}, {"size": 16, "theta": 1.0}),
        ({"size": 8}, {"size": None, "new": 1}, {"size": None, "new": 1}),
        # The line that started a run goes on with it: its file sets an argument of the default class, its flag a class.
        ({"s": COSINE}, {"s": of("Cosine")}, {"s": COSINE}),
        ({"s": COSINE}, {"s": of("Cosine", eta_min=0.5)}, {"s": of("Cosine", T_max=None, eta_min=0.5)}),
        ({"s": COSINE}, {"s": of("Line", end=0)}, {"s": of("Line", end=0)}),
        ({"s": COSINE}, {"s": of(DEFAULT, eta_min=0.5)}, {"s": of("Cosine", T_max=None, eta_min=0.5)}),
        ({"s": COSINE}, {"s": of(DEFAULT)}, {"s": COSINE}),
        ({}, {"s": of(DEFAULT)}, {}),
        ({"o": PAIR}, {"o": of("Pair", rest=of("Adam", lr=0.3))},
         {"o": of("Pair", first=of("SGD", lr=0.1, momentum=0.9), rest=of("Adam", lr=0.3))}),
        ({"o": PAIR}, {"o": of("Pair", first=of("Muon", lr=1.0))},
         {"o": of("Pair", first=of("Muon", lr=1.0), rest=of("Adam", lr=0.2))}),
        ({"f": COSINE, "size": 8}, {"f": print}, {"size": 8}),
    ],
)  # fmt: skip
def test_what_is_typed_wins_and_the_rest_stays(stored, typed, expected):
    assert merge_settings(stored, typed, [DEFAULT]) == expected


def test_what_the_checkpoints_class_has_not_is_left_out_and_said():
    typed = {"s": of(DEFAULT, warmup_steps=2, eta_min=0.5)}
    with pytest.warns(
        UserWarning, match=r"--model\.s\.warmup_steps is left out, because Cosine, the checkpoint's class"
    ):
        assert merge_settings({"s": COSINE}, typed, [DEFAULT]) == {"s": of("Cosine", T_max=None, eta_min=0.5)}


def test_differences_name_the_setting_and_not_the_whole():
    new = of("Pair", first=of("Muon", lr=1.0), rest=of("Adam", lr=0.3))
    assert list(differences({"o": PAIR, "size": 8}, {"o": new, "size": 8})) == [
        ("o.first", "SGD", "Muon"),
        ("o.rest.lr", 0.2, 0.3),
    ]
