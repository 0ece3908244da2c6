"""Check every config, and every combination of configs that the README or a recipe names."""

import re
import shlex

import pytest
import torch
import yaml

from cola_lightning.cli.app import main
from cola_lightning.cli.commands.benchmark import parse
from cola_lightning.cli.lightning_cli import CLI, resolve
from cola_lightning.compare.plan import Method, Plan
from cola_lightning.compare.rates import Rates
from cola_lightning.models.activation_checkpointing import RecomputedBlock
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

OVER_ALL = [REPOSITORY / "configs" / name for name in ("embedding_lr.yaml", "fast.yaml", "monitor.yaml")]
RUN_FILES = sorted({*(REPOSITORY / "configs").glob("*.yaml")} - {*OVER_ALL})
OVERLAYS = [
    *OVER_ALL,
    *sorted(
        file
        for folder in ("data", "method", "optimizer", "strategy")
        for file in (REPOSITORY / "configs" / folder).iterdir()
    ),
]
PREPARATIONS = sorted((REPOSITORY / "configs" / "prepare").iterdir())
USES = ("export", "generate", "evaluate", "factorize")  # need a model: tests/test_use.py runs them
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "recipes").rglob("*.md"))]

# Parameters in millions: embeddings, head and norms at full size, seven projections in each layer
PARAMETERS = {
    "llama": {"60m": 58.1, "130m": 134.1, "350m": 368.0, "1b": 1339.1, "7b": 6738.4},
    "cola": {"60m": 42.8, "130m": 94.0, "350m": 185.2, "1b": 609.3, "7b": 2820.9},
}


def named_commands() -> list[tuple[str, list[str]]]:
    """List the command lines in the pages' code blocks, each as its command and flags."""
    commands = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                found = re.search(r"python -m cola_lightning (\w+) ?(.*)", line)
                if found and found[1] not in ("schema", "completion", *USES) and "models/" not in line:
                    commands.append((found[1], shlex.split(found[2].split(" > ")[0], comments=True)))
    return commands


@pytest.fixture(autouse=True)
def _at_home(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


def printed(capsys, *flags):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *flags, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("file", RUN_FILES, ids=lambda file: file.name)
def test_every_config_file_parses_and_builds(file):
    cli = CLI([f"--config={file}", "--trainer.accelerator=cpu"], run=False)
    with torch.device("meta"):
        network = cli.model.build()
    for callback in cli.trainer.callbacks:
        if hasattr(callback, "apply"):
            callback.apply(network)
    match = re.fullmatch(r"(llama|cola_m|cola)_(\w+)\.yaml", file.name)
    if match:
        kind, size = match[1].removesuffix("_m"), match[2]
        millions = sum(p.numel() for p in network.parameters()) / 1e6
        assert millions == pytest.approx(PARAMETERS[kind][size], abs=0.05)
        assert isinstance(network.model.layers[0], RecomputedBlock) == (match[1] == "cola_m")


def test_all_fifteen_models_are_there():
    names = {file.stem for file in RUN_FILES}
    assert {f"{kind}_{size}" for kind in ("llama", "cola", "cola_m") for size in PARAMETERS["llama"]} <= names


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_overlay_goes_over_a_config_file(overlay, capsys):
    settings = printed(capsys, "--config=configs/llama_60m.yaml", f"--config={overlay}")
    assert settings != printed(capsys, "--config=configs/llama_60m.yaml")


@pytest.mark.parametrize(
    ("command", "flags"), named_commands(), ids=lambda value: value if isinstance(value, str) else None
)
def test_commands_on_the_pages_parse(command, flags, capsys):
    if command == "estimate":
        pytest.skip("run as it is written, in test_estimate")
    if command == "benchmark":
        for each in parse(flags)[1].values():
            assert printed(capsys, *each)["model"]
        return
    with pytest.raises(SystemExit, match="0"):
        main([command, *flags, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)[{"prepare": "source", "compare": "methods"}.get(command, "model")]


@pytest.mark.parametrize("file", PREPARATIONS, ids=lambda file: file.name)
def test_every_preparation_parses(file, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["prepare", f"--config={file}", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["folder"]


def test_every_config_is_tested():
    assert {*RUN_FILES, *OVERLAYS, *PREPARATIONS} == set((REPOSITORY / "configs").rglob("*.yaml"))


# Values of the reference's scripts, by size: peak lr, steps, warmup, rank, micro-batch, gate SiLU
REFERENCE = {
    "60m": (0.006, 10_000, 2_000, 128, 256, True),
    "130m": (0.003, 20_000, 2_000, 256, 256, True),
    "350m": (0.003, 60_000, 6_000, 256, 64, False),
    "1b": (0.002, 100_000, 10_000, 512, 32, False),
    "7b": (0.001, 150_000, 15_000, 1024, 16, False),
}


@pytest.mark.parametrize("size", REFERENCE)
def test_cola_has_the_references_hyper_parameters(size, capsys):
    settings = printed(capsys, f"--config=configs/cola_m_{size}.yaml")
    model, data = settings["model"], settings["data"]["init_args"]
    optimizer = model["optimizer"]["init_args"]
    seen = (
        optimizer["lr"],
        settings["trainer"]["max_steps"],
        model["schedule"]["init_args"]["warmup_steps"],
        model["projection"]["init_args"]["rank"],
        data["batch_size"],
        model["gate_silu"],
    )
    assert seen == REFERENCE[size]
    assert settings["trainer"]["gradient_clip_val"] == 0.5
    assert settings["trainer"]["precision"] == "bf16-true"
    assert (optimizer["weight_decay"], optimizer["betas"], optimizer["eps"]) == (0.01, [0.9, 0.999], 1e-8)
    assert (data["sequence_length"], data["global_batch_size"], data["rows"]) == (256, 512, "padded")
    assert model["schedule"]["init_args"]["min_ratio"] == 0.1


# Of NamrataRShivagunde/low-rank-geometry, training_bash_scripts/1_full_rank/train_*.sh; at 7B the rate is 1B's.
FULL_RANK = {"60m": (0.001, 1000), "130m": (0.001, 2000), "350m": (0.001, 6000), "1b": (0.0004, 10000)}


@pytest.mark.parametrize("size", [*FULL_RANK, "7b"])
def test_full_rank_has_the_rate_and_warmup_of_its_scripts(size, capsys):
    model = printed(capsys, f"--config=configs/llama_{size}.yaml")["model"]
    found = model["optimizer"]["init_args"]["lr"], model["schedule"]["init_args"]["warmup_steps"]
    assert found == FULL_RANK.get(size, (FULL_RANK["1b"][0], 15000))


@pytest.mark.parametrize(("overlay", "restart"), [("relora", 100), ("sst", 20)])
@pytest.mark.parametrize("size", ["60m", "350m"])
def test_schedules_that_restart_keep_the_config_files_warmup(overlay, restart, size, capsys):
    flags = [f"--config=configs/llama_{size}.yaml", f"--config=configs/method/{overlay}.yaml"]
    schedule = printed(capsys, *flags)["model"]["schedule"]
    assert schedule["class_path"] == "cola_lightning.optim.WarmupCosineRestarts"
    assert schedule["init_args"]["warmup_steps"] == FULL_RANK[size][1]
    assert schedule["init_args"]["restart_warmup_steps"] == restart


@pytest.mark.parametrize(
    ("files", "scale", "trials"),
    [(["plan.yaml"], 1, 4 + 6 + 2 + 4 + 3), (["plan.yaml", "plan_gpu.yaml"], 16, 4 + 4 + 3 + 3)],
    ids=["processor", "GPU"],
)
def test_the_methods_of_the_comparison_differ_in_what_they_are_about_alone(files, scale, trials):
    """Methods may differ in projection and optimizer only, not in clipping, decay, warmup, precision or batch.

    Full rank and Muon are there a second time with a narrower network.
    """
    plan = {}
    for file in files:
        plan |= yaml.safe_load((REPOSITORY / "recipes" / "compare_methods" / file).read_text())
    methods = {name: Method(**method) for name, method in plan["methods"].items()}
    names = (
        "configs", "flags", "matrix_rates", "other_rates", "beta2", "search_trials", "seeds", "budgets", "weight_decay",
        "published", "finalists",
    )  # fmt: skip
    made = Plan(**{name: plan[name] for name in names}, methods=methods, resolve=resolve)
    assert len(made.trials) == 13 * trials
    own = ("model.projection.", "model.optimizer.init_args.matrix.")
    for name in methods:
        narrow = ["model.hidden_size", "model.intermediate_size"] if name.startswith("narrow ") else []
        assert [key for key in made.differences(name) if not key.startswith(own)] == narrow
        parts = made.configuration(name, Rates(0.5, 0.25, 0.75), 1)["model"]["optimizer"]["init_args"]
        assert [parts[part]["init_args"]["lr"] for part in ("matrix", "other")] == [0.5, 0.25]
        betas = [parts[part]["init_args"].get("betas") for part in ("matrix", "other")]
        assert betas == [None if "Muon" in name else [0.9, 0.75], [0.9, 0.75]]
        assert all(
            made.trunk_steps(name, budget * scale) == steps
            for budget, steps in ((250_000, 195), (500_000, 390), (1_000_000, 782))
        )


SIZES = ["60M", "130M", "350M", "1B", "7B"]
BY_SIZE = sorted(file for file in (REPOSITORY / "configs" / "method").glob("*.yaml") if "| 60M" in file.read_text())


def values_of(config, name):
    """Yield the values of all keys of this name, at any depth."""
    if isinstance(config, list):
        return [value for part in config for value in values_of(part, name)]
    if not isinstance(config, dict):
        return []
    own = [config[name]] if name in config else []
    return own + [value for part in config.values() for value in values_of(part, name)]


def test_overlays_whose_values_depend_on_the_size_have_a_table():
    """Exceptions are overlays of a CoLA config, which has its size, and Muon, which no script of the authors covers."""
    assert {file.stem for file in OVERLAYS if file.parent.name == "method"} - {file.stem for file in BY_SIZE} == {
        "cola", "cola_m", "lax", "muon", "cr_net_recompute",
    }  # fmt: skip


@pytest.mark.parametrize("file", BY_SIZE, ids=lambda file: file.stem)
def test_a_table_by_size_begins_with_the_values_of_the_overlay(file):
    """An overlay has the values of 60M. The table in its comment must agree with them."""
    rows = [
        [cell.strip() for cell in line.strip("# \n|").split("|")]
        for line in file.read_text().splitlines()
        if line.startswith("#") and line.count("|") > len(SIZES)
    ]
    (head, *rows), config = rows, yaml.safe_load(file.read_text())
    assert head[-5:] == SIZES
    assert len(rows) >= 2
    for name, *cells in rows:
        assert len(cells) == len(SIZES), name
        found = values_of(config, name)
        if cells[0] == "none":
            assert set(found) <= {None}, name
        else:
            assert found, name
            assert set(found) == {float(cells[0])}, name
