import pytest
import torch

from cola_lightning.callbacks.effective_rank import effective_rank, squared_singular_values


def with_singular_values(values, rows, columns):
    torch.manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64)).Q
    return (left * torch.tensor(values, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (12, 12)])
def test_squares_of_a_matrix_with_known_singular_values(shape):
    values = [5.0, 3.0, 2.0, 1.0]
    found = squared_singular_values(with_singular_values(values, *shape))
    assert found.shape == (12,)
    assert found[:4].tolist() == pytest.approx([25, 9, 4, 1], rel=1e-4)
    assert found[4:].max() < 1e-4


def test_they_are_those_of_a_singular_value_decomposition():
    x = torch.randn(200, 30, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -2, 30)
    expected = torch.linalg.svdvals(x.double()).square()
    assert squared_singular_values(x).tolist() == pytest.approx(expected.tolist(), rel=1e-3)


@pytest.mark.parametrize(
    ("squares", "share", "rank"),
    [
        ([25, 9, 4, 1], 0.64, 1),
        ([25, 9, 4, 1], 0.65, 2),
        ([25, 9, 4, 1], 0.95, 3),
        ([25, 9, 4, 1], 1.0, 4),
        ([1.0] * 100, 0.95, 95),  # white: all directions count alike
        ([0.5**i for i in range(30)], 0.95, 5),  # 1 - 2^-k >= 0.95 first at k = 5
        ([7.0, 0.0, 0.0], 1.0, 1),
    ],
)
def test_effective_rank_is_the_first_that_holds_the_share(squares, share, rank):
    assert effective_rank(torch.tensor(squares), share) == rank
