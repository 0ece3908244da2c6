"""Memory and traffic of each rank of FSDP2, counted on two ranks and on four, for four matrices and for eight."""

import json

import pytest

from tests.optim.sharded_count import RANK, TALL, WIDE, M, N, count
from tests.processes import Run

pytestmark = pytest.mark.distributed

EXCHANGED = 2  # rows of an exchange of SwitchLoRA


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Return what each rank counted, by the number of ranks."""
    found = {}
    for ranks in (2, 4):
        out = tmp_path_factory.mktemp(f"ranks{ranks}")
        Run(count, str(out), ranks=ranks, folder=out).done()
        found[ranks] = [json.loads((out / f"count{rank}.json").read_text()) for rank in range(ranks)]
    return found


def gathered(numbers: int, ranks: int) -> float:
    """Numbers that a rank sends so that all have all, or so that each has its part of a sum: as in a ring."""
    return numbers * (ranks - 1) / ranks


def summed(numbers: int, ranks: int) -> float:
    """Numbers that a rank sends so that all have a sum."""
    return 2 * gathered(numbers, ranks)


def to_one(numbers: int, ranks: int) -> float:
    """Numbers that a rank sends, on average over owners, so that one rank has a matrix, or gives each its rows."""
    return numbers * (ranks - 1) / ranks**2


STEP = {  # numbers that are gathered or scattered at a step, and numbers that are summed
    "galore wide": (2 * RANK * N, 0),
    "galore tall": (M * RANK, 0),
    "fira wide": (3 * RANK * N + N, 1),
    "fira tall": (M * RANK, 1),
    "apollo wide": (RANK * N + N, 1),
    "apollo tall": (0, 1),
    "apollo_mini wide": (N, 3),
    "apollo_mini tall": (0, 3),
    "muon wide": (0, 0),
    "muon tall": (0, 0),
}


@pytest.mark.parametrize("ranks", [2, 4])
def test_optimizers_send_what_their_formulas_say(counted, ranks):
    """See cola_lightning/optim/projected.py. For twice as many matrices a rank sends twice as much."""
    for found in counted[ranks]:
        for matrices, rows in found["optimizers"].items():
            assert rows.keys() == STEP.keys()
            for name, row in rows.items():
                method = name.split()[0]
                spread, norms = STEP[name]
                step = gathered(spread, ranks) + summed(norms, ranks)
                step += to_one(2 * M * N, ranks) if method == "muon" else 0
                renewal = to_one(M * N + M * RANK, ranks) if method in ("galore", "fira") else 0
                assert row["sent at step"] == int(matrices) * step, name
                assert row["sent at renewal"] == int(matrices) * (step + renewal), name


@pytest.mark.parametrize("ranks", [2, 4])
def test_merges_exchanges_and_refreshes_send_what_their_formulas_say(counted, ranks):
    for found in counted[ranks]:
        for matrices, rows in found["methods"].items():
            for kind, (out, within) in (("wide", WIDE), ("tall", TALL)):
                times, both = int(matrices), out + within
                assert rows[f"relora {kind}"]["sent at merge"] == times * gathered(RANK * within, ranks)
                row = rows[f"switch_lora {kind}"]
                # The vectors, their counterparts and the candidates
                assert row["sent at A"] == times * summed(EXCHANGED * (2 * within + out), ranks)
                assert row["sent at B"] == times * summed(EXCHANGED * (2 * out + within), ranks)
                # u and v of the old pairs, σ to sample by, and u and v of the new pairs
                iteration = gathered(RANK * both + M, ranks) + summed(RANK * both, ranks)
                row = rows[f"sst {kind}"]
                assert row["sent at iteration"] == times * iteration
                # U (on CPUs torch gathers it; on GPUs a rank sends 1/k of it), V and σ make the rows of the matrix. One
                # rank gets the matrix, and gives the others their rows of U, σ and V.
                decomposition = gathered(M * both + M, ranks) + to_one(out * within + M * (both + 1), ranks)
                assert row["sent at round"] == times * (iteration + decomposition)


@pytest.mark.parametrize("ranks", [2, 4])
def test_fsdp2_itself_sends_three_times_the_weights_of_a_layer(counted, ranks):
    """Weights for the forward and the backward pass, and gradients. Embedding and head stay gathered in between."""
    for found in counted[ranks]:
        for row in found["fsdp2"].values():
            assert row["gather"] == gathered(2 * row["in layers"] + row["outside"], ranks)
            assert row["reduce"] == gathered(row["in layers"] + row["outside"], ranks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_has_its_share_of_weights_gradients_and_states(counted, ranks):
    for found in counted[ranks]:
        for rows in (*found["optimizers"].values(), *found["methods"].values()):
            for name, row in rows.items():
                assert row["share"] == pytest.approx(1 / ranks, rel=0.05), name
        for rows in found["methods"].values():  # N = M candidates for each factor
            assert rows["switch_lora wide"]["pools"] == (M * M + M * N) / ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_at_any_moment_a_rank_has_at_most_one_whole_matrix_more(counted, ranks):
    """Beside what the same computation takes for one matrix on one device. It does not grow with the number of
    matrices."""
    for found in counted[ranks]:
        for rows in (*found["optimizers"].values(), *found["methods"].values()):
            for name, row in rows.items():
                peaks = {moment: peak for moment, peak in row.items() if moment.startswith("peak")}
                assert peaks
                for moment, peak in peaks.items():
                    inside = moment in ("peak at step", "peak at renewal", "peak at round")
                    assert peak <= (row["limit"] if inside else M * N), (name, moment)
