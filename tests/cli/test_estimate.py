"""Type the command ``estimate``. Tests in tests/costs compare its figures with real runs."""

import json
import re
import shlex
import subprocess

import pytest

from cola_lightning.cli.app import main
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "recipes" / "estimate" / "README.md").read_text()
COMMANDS = re.findall(r"^python -m cola_lightning (estimate .*)$", PAGE, re.MULTILINE)


@pytest.fixture(autouse=True)
def _at_home(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def tiny(tiny_run):
    """Return the tiny run's flags, with text and devices that do not exist."""
    missing = ("--data.paths", "--trainer.devices", "--trainer.accelerator")
    kept = [flag for flag in tiny_run if not flag.startswith(missing)]
    return [*kept, "--data.paths=[/nowhere]", "--trainer.devices=8", "--trainer.accelerator=gpu"]


@pytest.mark.slow
def test_a_run_needs_neither_data_nor_devices(tiny, tmp_path, capsys):
    main(["estimate", *tiny, "--trainer.callbacks+=CoLAM", "--trainer.callbacks.keep=latents", "--gpu=a100-40",
          "--mfu=0.5", f"--json={tmp_path / 'e.json'}"])  # fmt: skip
    shown = capsys.readouterr().out
    assert "8 x a100-40 (40 GiB, 312 TFLOP/s dense bf16), ddp" in shown
    for title in ("Parameters", "FLOPs", "Memory of a GPU (keep: latents)", "Side by side", "CoLA-M, rank 8"):
        assert title in shown
    this, full, cola, cola_m = json.loads((tmp_path / "e.json").read_text())
    counts = this["parameters"]
    assert counts["total"] == 300 * 32 * 2 + 5 * 32 + 2 * 8 * (11 * 32 + 3 * 48) == cola["parameters"]["total"]
    assert full["parameters"]["total"] == 300 * 32 * 2 + 5 * 32 + 2 * (4 * 32**2 + 3 * 32 * 48)
    flops = this["flops_per_token"]
    assert flops["model"] == cola["flops_per_token"]["model"] == flops["forward"] + flops["backward"]
    assert flops["hardware"] > cola_m["flops_per_token"]["hardware"] > cola["flops_per_token"]["hardware"]
    assert this["tokens"] == 6 * 8 * 4 * 32
    days = flops["model"] * this["tokens"] / (8 * 312e12 * 0.5) / 86400
    assert this["days_at_mfu"] == pytest.approx(days)
    assert this["memory"]["activations"] < cola_m["memory"]["activations"] < cola["memory"]["activations"]
    assert this["memory"]["total"] == pytest.approx(sum(this["memory"].values()) - this["memory"]["total"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu=h9000"], "--gpu h9000 is not known; choose one of a100-40"),
        (["--gpu=cpu", "--gpus=1..4"], "--gpu cpu predicts one process"),
        (["--gpu=cpu"], "--gpu cpu predicts one process, and the run has 8; add --gpus 1"),
        (["--gpus=none"], "--gpus is none; give a number from 1 up, or two as in 1..1024"),
        (
            ["--plot=/nowhere/a.png", "--gpus=1..8"],
            "--plot /nowhere/a.png cannot be written: there is no folder /nowhere",
        ),
        (["--plot=scaling.png"], "--plot draws the speed over numbers of GPUs; give several, as in --gpus 1..1024"),
        (["--network=token-ring"], "--network token-ring is not known; choose one of infiniband"),
        (["--data.global_batch_size=6"], "the nearest that are: 32"),
        (["--trainer.strategy=fsdp3"], "--trainer.strategy fsdp3 is not known"),
        (["--model.projection=FullRank", "--trainer.callbacks+=CoLAM"], "q_proj is FullRank"),
    ],
)
def test_bad_input_gets_one_line(flags, message, tiny, capsys):
    names = tuple(flag.split("=")[0] for flag in flags)
    with pytest.raises(SystemExit, match="2"):
        main(["estimate", *(flag for flag in tiny if not flag.startswith(names)), *flags])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.slow
def test_a_processor_is_measured(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cola_lightning.costs.processor.SECONDS", 0.02)
    main(["estimate", *tiny, "--gpu=cpu", "--gpus=1", "--trainer.precision=bf16-true", f"--json={tmp_path / 'e.json'}"])
    assert "GB/s measured" in capsys.readouterr().out
    for each in json.loads((tmp_path / "e.json").read_text()):
        assert 1e-4 < each["speed"]["step_seconds"] < 10
        assert 0 < each["speed"]["mfu"] < 1


def test_the_page_has_commands():
    assert len(COMMANDS) == 2


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_on_the_page_run(command, capsys, tmp_path):
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True)
    args = words.stdout.splitlines()
    assert args == shlex.split(command) or "{" in command
    names = [arg for arg in args if re.search(r"(llama|cola|cola_m)_\d+\w\.yaml$", arg)]
    if "--models" in args:
        assert len(names) == 15
        for name in names[1:-1]:  # two of them, for time's sake; each line of the table is made alike
            args.remove(name)
    main([*args, f"--json={tmp_path / 'e.json'}"])
    capsys.readouterr()
    results = json.loads((tmp_path / "e.json").read_text())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| ")]
    for result in results if "--models" in args else []:
        row = next(row for row in rows if row[0] == result["name"])
        assert row[1] == f"{result['parameters']['total'] / 1e6:,.1f}M"
        assert float(row[2]) == pytest.approx(result["flops_per_token"]["model"] / 1e9, abs=6e-4)
        assert float(row[5]) == pytest.approx(result["memory"]["total"] / 2**30, rel=0.01)
