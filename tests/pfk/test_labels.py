import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from raypfk.pfk import Kernel, neighbour, predicted, reference
from raypfk.pfk.labels import RIDGE, mc_information, mc_trace, vote

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


@quick
@given(kernels, st.integers(0, 9), st.integers(1, 20), st.integers(1, 25), seeds)
@example(Kernel("pcc", (3,)), 2, 3, 1000, 0)
def test_votes_are_those_of_the_loops(kernel, n, m, k, seed):
    """Classes by votes, of equals by their nearest voter; each once, padded; k may exceed M, and images may tie."""
    z, ref = vectors(n, kernel.lengths, seed), vectors(m, kernel.lengths, seed + 1)
    classes = torch.randint(4, (m,), generator=torch.Generator().manual_seed(seed))
    rows = reference.scores("pcc", kernel.lengths, kernel.weight, (z.tolist(),) * 2, (ref.tolist(),) * 2)
    voted, width = vote(z, ref, classes, kernel, k), min(k, m)
    assert voted.labels.dtype == voted.classes.dtype == torch.int64 and voted.shares.dtype == torch.float32
    assert voted.classes.shape == voted.shares.shape == (n, width)
    for row, label, found, shares, soft in zip(rows, *voted, voted.soft(5), strict=True):
        expected = reference.vote(row, classes.tolist(), k)
        padding = [(-1, 0.0)] * (width - len(expected))
        assert label == expected[0][0] and found.tolist() == [c for c, _ in expected + padding]
        torch.testing.assert_close(shares, torch.tensor([share for _, share in expected + padding]))
        places = torch.tensor([dict(expected).get(c, 0.0) for c in range(5)], dtype=torch.float64)
        torch.testing.assert_close(soft, places, rtol=0, atol=1e-7)


@quick
@given(kernels, st.integers(1, 9), st.integers(1, 20), st.integers(1, 9), seeds)
def test_one_vote_is_the_neighbour_and_no_vote_depends_on_batch_mates(kernel, n, m, k, seed):
    """k = 1 gives the neighbour's label, alone and whole; an image by itself gets the votes it gets among others."""
    z, ref = vectors(n, kernel.lengths, seed), vectors(m, kernel.lengths, seed + 1)
    classes = torch.randint(4, (m,), generator=torch.Generator().manual_seed(seed))
    one, voted = vote(z, ref, classes, kernel, 1), vote(z, ref, classes, kernel, k)
    assert torch.equal(one.labels, neighbour(z, ref, classes, kernel)[0]) and (one.shares == 1).all()
    for together, alone in zip(voted, vote(z[-1:], ref, classes, kernel, k), strict=True):
        assert torch.equal(together[-1:], alone)


def test_of_equal_votes_the_nearest_voter_decides():
    """Class 7 is nearest, 2 and 7 have two votes each of five, and 5, farther than either's first, has one."""
    angles = torch.tensor([0.5, 0.1, 0.4, 0.2, 0.3, 0.6])
    ref = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([2, 7, 7, 2, 5, 5])
    voted = vote(torch.tensor([[1.0, 0.0]]), ref, labels, Kernel("pcc", (2,)), 5)
    assert voted.labels.tolist() == [7] and voted.classes.tolist() == [[7, 2, 5, -1, -1]]
    torch.testing.assert_close(voted.shares, torch.tensor([[0.4, 0.4, 0.2, 0.0, 0.0]]))


def test_a_validation_image_with_a_nan_has_no_vote():
    """Those that are left share the votes, and the shares still sum to 1."""
    ref = torch.nn.functional.normalize(torch.randn(3, 3), dim=1)
    ref[2] = torch.nan
    voted = vote(ref[:2], ref, torch.tensor([6, 6, 4]), Kernel("pcc", (3,)), 9)
    assert voted.classes.tolist() == [[6, -1, -1]] * 2 and voted.shares.tolist() == [[1, 0, 0]] * 2


def test_votes_that_cannot_be_cast_are_refused():
    """As for neighbours; and no voter, labels that are no classes, a class beyond the soft label."""
    kernel, z = Kernel("pcc", (3,)), vectors(2, (3,), 0)
    two = torch.tensor([0, 3])
    for ref, labels in [(z[:0], two[:0]), (z, two[:1])]:
        with pytest.raises(ValueError, match="expected one or more"):
            vote(z, ref, labels, kernel, 2)
    with pytest.raises(ValueError, match="1 of 2 feature rows"):
        vote(torch.stack([z[0], z[0] * torch.nan]), z, two, kernel, 2)
    with pytest.raises(ValueError, match="k >= 1"):
        vote(z, z, two, kernel, 0)
    for labels in [two - 1, two.float()]:
        with pytest.raises(ValueError, match="int64 >= 0"):
            vote(z, z, labels, kernel, 1)
    with pytest.raises(ValueError, match=r"expected classes 0\.\.2, got 3"):
        vote(z, z, two, kernel, 2).soft(3)


def samples(k: int, n: int, d: int, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """z (k, n, length) and g (k, n, d, length) of unlike units: some channels constant, some blocks constant or odd."""
    generator = torch.Generator().manual_seed(seed)
    z, g = torch.randn(k, n, 1, length, generator=generator), torch.randn(k, n, d, length, generator=generator)
    for x, unit in ((z, 2.0**7), (g, 2.0**-60)):
        x *= unit
        still = torch.rand(x.shape[1:], generator=generator) < 0.2
        still |= torch.rand(x.shape[1:3], generator=generator)[..., None] < 0.1
        x[:, still] = x[0, still] * (1 + 2.0**-23 * torch.randint(2, x[:, still].shape, generator=generator))
        odd = (torch.rand(x.shape[1:3], generator=generator) < 0.1)[..., None]
        x[-1] = torch.where(odd, [torch.nan, torch.inf, -torch.inf][seed % 3], x[-1])
    return z.squeeze(2), g


shapes = st.tuples(st.integers(2, 6), st.integers(0, 3), st.integers(1, 3), st.integers(1, 7))


@quick
@given(shapes, seeds)
def test_monte_carlo_estimates_are_those_of_whole_covariances(shape, seed):
    """As of L x L, also for K < L: the loops' traces and determinants, whatever is constant or not finite."""
    z, g = samples(*shape, seed)
    trace, information = mc_trace(z, g), mc_information(z, g)
    assert trace.shape == information.shape == shape[1:3] and trace.dtype == information.dtype == torch.float64
    for n in range(shape[1]):
        for d in range(shape[2]):
            z_n, g_nd = z[:, n].tolist(), g[:, n, d].tolist()
            assert trace[n, d].item() == pytest.approx(reference.mc_trace(z_n, g_nd), rel=1e-9, abs=1e-9 * 2.0**-53)
            assert information[n, d].item() == pytest.approx(reference.mc_information(z_n, g_nd, RIDGE), abs=1e-9)


@quick
@given(shapes, seeds)
def test_monte_carlo_estimates_do_not_depend_on_batch_mates_or_units(shape, seed):
    """An image alone has its estimates among others, to rounding; the information is the same in any unit."""
    z, g = samples(*shape, seed)
    for estimate, atol in ((mc_trace, 2.0**-53), (mc_information, 1.0)):
        together, alone = estimate(z, g), estimate(z[:, -1:], g[:, -1:])
        torch.testing.assert_close(alone, together[-1:], rtol=1e-12, atol=1e-12 * atol)
    scaled = mc_information(z * 2.0**-40, g * 2.0 ** torch.arange(shape[2])[:, None])
    torch.testing.assert_close(scaled, mc_information(z, g), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("label", [0, 2, 4])
def test_the_class_whose_scores_follow_the_features_is_the_label(label):
    """One class of five has scores linear in z: z itself for the trace; the information finds them mixed, and tiny."""
    torch.manual_seed(label)
    z, g, mix = torch.randn(60, 4, 6), torch.randn(60, 4, 5, 6), torch.linalg.qr(torch.randn(6, 6))[0]
    g[:, :, label] = z
    assert (mc_trace(z, g).argmax(1) == label).all()
    g[:, :, label] = 1e-20 * (z @ mix) + 1e-19
    assert (mc_information(z, g).argmax(1) == label).all()


def test_what_never_changes_tells_nothing():
    """Features, or a class's scores, that are equal in all samples up to rounding: 0 exactly, and the first class."""
    torch.manual_seed(2)
    z, g = torch.randn(5, 2, 7), torch.randn(5, 2, 3, 7)
    g[:, 0, 1] = g[0, 0, 1]
    z[:, 1] = z[0, 1] * (1 + 2.0**-23 * torch.randint(2, (5, 7)))
    for estimate in (mc_trace, mc_information):
        assert (estimate(z, g) == 0).tolist() == [[False, True, False], [True, True, True]]
        assert estimate(z, g)[1].argmax() == 0


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_never_the_label(odd):
    """One odd number takes its image and class out of the race, and no other; odd features take the whole image."""
    torch.manual_seed(3)
    z, g = torch.randn(5, 2, 7), torch.randn(5, 2, 3, 7)
    for estimate in (mc_trace, mc_information):
        expected = estimate(z, g)
        expected[0, 1], expected[1] = -torch.inf, -torch.inf
        odd_z, odd_g = z.clone(), g.clone()
        odd_g[3, 0, 1, 2] = odd_z[0, 1, 6] = odd
        torch.testing.assert_close(estimate(odd_z, odd_g), expected, rtol=1e-12, atol=1e-12)
        assert estimate(odd_z, odd_g).argmax(1).tolist() == expected.argmax(1).tolist()


def test_samples_that_do_not_fit_are_refused():
    """One sample has no covariance; z and g are of the same samples, images and channels."""
    z, g = torch.randn(3, 2, 4), torch.randn(3, 2, 5, 4)
    for estimate in (mc_trace, mc_information):
        for odd in [(z[:1], g[:1]), (z[:2], g), (z[:, :1], g), (z[..., :3], g), (z, g[:, :, 0]), (z[0], g)]:
            with pytest.raises(ValueError, match="expected features"):
                estimate(*odd)
