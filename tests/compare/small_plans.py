"""Plans of small comparisons, and what they leave."""

import json
from pathlib import Path

import yaml

from tests.conftest import REPOSITORY

GALORE = str(REPOSITORY / "configs" / "method" / "galore.yaml")
STEP = 4 * 32
"""Tokens of an optimizer step."""


def write_plan(folder: Path, config_file: str, **changes) -> list[str]:
    plan = {
        "configs": [config_file],
        "methods": {
            "CoLA": {"flags": {"model.projection.rank": 4}},
            "GaLore, full rank": {"configs": [GALORE], "flags": {"model.projection": "FullRank"}},
        },
        "matrix_rates": [0.02, 0.01],
        "other_rates": [0.02],
        "seeds": [1, 2],
        "budgets": [5 * STEP, 10 * STEP],
        "threads": 1,
        "held_out": {"column": "url", "groups": {"of war": "//wars/", "of law": "//laws/"}},
    }
    plan = {key: value for key, value in (plan | changes).items() if value is not None}
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return ["compare", f"--config={folder / 'plan.yaml'}", f"--folder={folder / 'out'}"]


def results(folder: Path) -> dict[str, dict]:
    return {str(file.parent.relative_to(folder)): json.loads(file.read_text()) for file in folder.rglob("result.json")}
