"""The random rotation of sketches that are stored as codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tracin_ann.sketch import make_rotation

CPU = torch.device("cpu")
DIMS = [1, 2, 3, 5, 7, 64, 96, 100, 128, 1000, 4096]


def rotate(row_BD: torch.Tensor, seed: int = 0, checkpoint: int = 0) -> torch.Tensor:
    return make_rotation(seed, checkpoint, row_BD.shape[1], CPU, row_BD.dtype).apply(row_BD)


@pytest.mark.parametrize("dim", DIMS)
def test_it_is_orthogonal(dim: int) -> None:
    identity = torch.eye(min(dim, 1000), dim, dtype=torch.float64)
    rotated = rotate(identity)
    torch.testing.assert_close(rotated @ rotated.T, torch.eye(len(identity), dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dim", DIMS)
def test_it_is_linear_and_leaves_its_argument_unchanged(dim: int) -> None:
    row_BD = torch.randn(3, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = row_BD.clone()
    rotated = rotate(row_BD)
    assert torch.equal(row_BD, before)
    torch.testing.assert_close(rotate(row_BD[:1] - 2 * row_BD[1:2]), rotated[:1] - 2 * rotated[1:2])


@pytest.mark.parametrize("dim", [64, 100, 1000, 4096])
def test_rows_with_one_number_become_flat(dim: int) -> None:
    row_BD = torch.zeros(20, dim, dtype=torch.float64)
    row_BD[torch.arange(20), torch.arange(20) * (dim // 20)] = 1
    assert float(rotate(row_BD).abs().max()) <= 8 / dim**0.5
    assert float(rotate(row_BD).pow(4).mean()) * dim**2 <= 8


@pytest.mark.parametrize("dim", [96, 128])
def test_seeds_and_checkpoints_have_other_rotations(dim: int) -> None:
    row_BD = torch.randn(1, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = [rotate(row_BD, seed, checkpoint)[0] for seed in range(2) for checkpoint in range(2)]
    cosines = np.corrcoef(np.stack(found))
    assert np.abs(cosines - np.eye(4)).max() < 0.4
    assert torch.equal(rotate(row_BD, 1, 1)[0], found[3])


def transform_slowly(row: list[float]) -> list[float]:
    size = len(row)
    return [sum(x * (-1) ** (i & j).bit_count() for j, x in enumerate(row)) / size**0.5 for i in range(size)]


def test_it_is_that_of_the_documented_signs_and_transforms() -> None:
    rotation = make_rotation(0, 0, 8, CPU, torch.float64)
    row = [float(i) for i in range(1, 9)]
    for sign_D in rotation.sign_KD.tolist():
        row = transform_slowly([s * x for s, x in zip(sign_D, row, strict=True)])
    rotated = rotate(torch.arange(1.0, 9.0, dtype=torch.float64)[None])[0]
    torch.testing.assert_close(rotated, torch.tensor(row, dtype=torch.float64))
    assert make_rotation(0, 0, 6, CPU, torch.float64).starts == (0, 2, 0, 2)


def test_its_numbers_do_not_change() -> None:
    """An index is queried with the same rotation as it was built with."""
    assert make_rotation(0, 0, 8, CPU, torch.float64).sign_KD.tolist() == [
        [1, -1, 1, -1, 1, -1, 1, -1],
        [1, -1, -1, 1, 1, 1, 1, -1],
    ]
