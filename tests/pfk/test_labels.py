import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypfk.pfk import Kernel, neighbour, predicted, reference

from .strategies import kernels, quick, seeds, vectors


@quick
@given(kernels, st.integers(0, 9), st.integers(1, 20), seeds)
def test_neighbour_is_the_first_of_the_largest_pcc(kernel, n, m, seed):
    """Whatever the kernel's name, the label is that of the exact pcc neighbour; ties go to the smallest index."""
    z, ref = vectors(n, kernel.lengths, seed), vectors(m, kernel.lengths, seed + 1)
    classes = torch.randint(10, (m,), generator=torch.Generator().manual_seed(seed))
    queries, references = (z.tolist(), z.tolist()), (ref.tolist(), ref.tolist())
    rows = reference.scores("pcc", kernel.lengths, kernel.weight, queries, references)
    expected = torch.tensor([reference.neighbour(row) for row in rows], dtype=torch.int64)
    labels, index = neighbour(z, ref, classes, kernel)
    assert torch.equal(index, expected) and torch.equal(labels, classes[expected])


def test_an_image_of_the_validation_set_finds_itself():
    """Among distinct images the nearest to a copy is the original."""
    torch.manual_seed(1)
    ref, order = torch.nn.functional.normalize(torch.randn(50, 30), dim=1), torch.randperm(50)
    assert torch.equal(neighbour(ref[order], ref, torch.arange(50), Kernel("pcc", (30,)))[1], order)


def test_no_neighbour_is_an_error():
    """No validation image, labels of another number, or a NaN query cannot be labelled."""
    kernel, z = Kernel("pcc", (3,)), vectors(2, (3,), 0)
    for ref, labels in [(z[:0], torch.zeros(0)), (z, torch.zeros(1))]:
        with pytest.raises(ValueError, match="expected one or more"):
            neighbour(z, ref, labels, kernel)
    with pytest.raises(ValueError, match="1 of 2 feature rows"):
        neighbour(torch.stack([z[0], z[0] * torch.nan]), z, torch.zeros(2), kernel)


def test_predicted_is_the_largest_logit():
    """Of equals the first class."""
    assert predicted(torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, -1.0]])).tolist() == [1, 0]
