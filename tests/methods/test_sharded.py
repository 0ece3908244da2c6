"""ReLoRA, SwitchLoRA and SST under FSDP2, in real processes that communicate by gloo."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cola_lightning.checkpoints import read
from cola_lightning.distributed.row_files import put_rows
from tests.distributed.parity_run import STEPS
from tests.methods.sharded_run import METHODS, train_all
from tests.processes import Run

pytestmark = pytest.mark.distributed

NAMES = ["relora", "switch_lora", "sst"]
FORMS = ["fsdp2", "fsdp2_sharded"]  # checkpoints in one file, and in shards


def curve(folder: Path) -> list[list[float]]:
    """Losses, and gradient norms before clipping."""
    return json.loads((folder / "curve.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folder of these runs: ``1``, one process that takes a batch in one piece; ``2``, two ranks, and ``4``,
    four with CoLA-M, both of which accumulate two micro-batches; and ``from_2_on_1`` and so on, which continue the runs
    of two ranks from step 10."""
    out = tmp_path_factory.mktemp("runs")

    def run(folder: str, ranks: int, jobs: list[tuple]) -> None:
        Run(train_all, jobs, ranks, str(out / folder), ranks=ranks, folder=out / folder).done()

    def begun(micro_batch: int) -> list[tuple]:
        file = "step_00000010.ckpt"
        return [
            (name, form, micro_batch, str(out / "2" / form / name / file), False) for form in FORMS for name in NAMES
        ]

    run("1", 1, [(name, form, 8, None, False) for form in ("auto", "auto32") for name in METHODS])
    run("2", 2, [(name, form, 2, None, False) for form in (*FORMS, "fsdp232") for name in NAMES])
    run("4", 4, [(name, form, 1, None, True) for form in ("fsdp2", "fsdp232") for name in METHODS])
    for ranks, micro_batch in ((1, 4), (2, 2), (4, 2)):
        run(f"from_2_on_{ranks}", ranks, begun(micro_batch))
    return out


CASES = [("2", form, name, "auto", 1e-9) for form in FORMS for name in NAMES]
CASES += [("2", "fsdp232", name, "auto32", 1e-5) for name in NAMES]
CASES += [("4", "fsdp232", name, "auto32", 1e-5) for name in METHODS]
CASES += [("4", "fsdp2", name, "auto", 1e-9) for name in METHODS]


@pytest.mark.parametrize(("ranks", "form", "name", "alone", "bound"), CASES)
def test_fsdp2_gives_the_losses_of_one_process(runs, ranks, form, name, alone, bound):
    losses, expected = curve(runs / ranks / form / name)[0], curve(runs / "1" / alone / name)[0]
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, rel=bound)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_run_continues_bit_for_bit_and_on_other_numbers_of_ranks(runs, form, name):
    expected = [values[10:] for values in curve(runs / "2" / form / name)]
    assert curve(runs / "from_2_on_2" / form / name) == expected
    for ranks in ("1", "4"):
        assert curve(runs / f"from_2_on_{ranks}" / form / name)[0] == pytest.approx(expected[0], rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_of_switch_lora_holds_the_pools_of_one_process(runs, form):
    files = [folder / "switch_lora" / "step_00000010.ckpt" for folder in (runs / "1" / "auto", runs / "2" / form)]
    pools = [read(file).state["callbacks"]["SwitchLoRACallback"]["pools"] for file in files]
    if form == "fsdp2_sharded":  # each rank wrote its half
        for rank in range(2):
            half = load_file(files[1] / "rows" / f"{rank:05}.safetensors")
            assert len(half) == 2 * len(pools[0])
            assert all(len(rows) == 8 for rows in half.values())  # of the 16 candidates for each factor
        pools[1] = [{side: rows.part for side, rows in each.items()} for each in put_rows(pools[1], files[1], 1, 0)]
    for own, theirs in zip(*pools, strict=True):
        for side in "AB":
            assert own[side].shape == theirs[side].shape
            assert (own[side] - theirs[side]).abs().max() < 1e-9
