import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypfk.pfk import reference, uncertainty

from .strategies import quick, seeds

NAMES = ("variation_ratio", "max_entropy", "bald", "margin", "least_confidence")
names = pytest.mark.parametrize("name", NAMES)
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


def score(name: str, logits: torch.Tensor) -> torch.Tensor:
    return getattr(uncertainty, name)(logits)


def logits(t: int, n: int, d: int, seed: int) -> torch.Tensor:
    """(t, n, d) of eight kinds of image: random, agreeing, tied, confident, huge, and with a NaN or an infinity."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(t, n, d, generator=generator)
    kind = (torch.arange(n) + seed) % 8
    x[:, kind == 1] = x[:1, kind == 1]
    x[:, kind == 2] = x[:, kind == 2].round()
    x[:, kind == 3] *= 20
    x[:, kind == 4] = x[:, kind == 4].sign() * 1e4
    for k, bad in [(5, math.nan), (6, math.inf), (7, -math.inf)]:
        x[seed % t, kind == k, seed % d] = bad
    return x


@names
@quick
@given(st.integers(1, 9), st.integers(0, 12), st.integers(1, 7), dtypes, seeds)
def test_scores_are_those_of_the_loops(name, t, n, d, dtype, seed):
    """Of any shape and dtype, ties, confident, huge and broken logits among them; float32, and NaN for none."""
    x = logits(t, n, d, seed).to(dtype)
    result = score(name, x)
    expected = torch.tensor(reference.uncertainty(name, x.double().tolist()), dtype=torch.float64)
    assert result.shape == (n,) and result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-7, atol=1e-13)
    assert not (result.isfinite() & (result < 0)).any()


@names
@pytest.mark.parametrize(("t", "d"), [(1, 1), (1, 1003), (7, 10), (12, 2), (33, 37)])
def test_a_score_does_not_depend_on_batch_mates(name, t, d):
    """To the last bit, alone, in any part and order, and in any layout.

    The passes of every other image agree but for rounding. Their `bald` is of rounding errors squared, so that a last
    bit of a float64 probability shows in float32.
    """
    torch.manual_seed(d)
    x = torch.randn(t, 201, d, dtype=torch.float64)
    x[:, ::2] = x[:1, ::2] * (1 + 1e-15 * torch.randn(t, 101, d, dtype=torch.float64))
    whole, order = score(name, x), torch.randperm(201)
    for part in [order, *order.split(23), *torch.arange(10)[:, None]]:
        assert torch.equal(score(name, x[:, part]), whole[part])
    for start in (1, 2, 3, 190):
        assert torch.equal(score(name, x[:, start:]), whole[start:])
    for axes, back in [((1, 0, 2), (1, 0, 2)), ((0, 2, 1), (0, 2, 1)), ((2, 0, 1), (1, 2, 0))]:
        assert torch.equal(score(name, x.permute(axes).contiguous().permute(back)), whole)


@names
@pytest.mark.parametrize("size", [1e4, 1e308])
def test_huge_logits_are_no_nan(name, size):
    """Probabilities of exactly 0 and 1: sure of one class, torn between two or three, and passes that contradict."""
    sure, torn, all_equal = [size, -size, -size], [size, -size, size], [size] * 3
    x = torch.tensor([[sure, torn, all_equal, sure], [sure, torn, all_equal, sure[::-1]]], dtype=torch.float64)
    expected = reference.uncertainty(name, x.tolist())
    assert score(name, x).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)


@names
def test_what_is_not_finite_comes_last(name):
    """One NaN or infinity in one pass gives -inf, whatever the dtype; the other images keep their scores."""
    x = torch.randn(3, 5, 4)
    for bad in (math.nan, math.inf, -math.inf):
        for dtype in (torch.bfloat16, torch.float64):
            broken = x.to(dtype)
            broken[2, 3, 1] = bad
            expected = score(name, x.to(dtype))
            expected[3] = -math.inf
            assert torch.equal(score(name, broken), expected)


@pytest.mark.parametrize("gap", [5.0, 30.0, 60.0, 80.0])
def test_a_confident_model_is_still_ranked(gap):
    """Two classes `gap` apart: the scores have closed forms, held also where the larger probability rounds to 1."""
    x = torch.tensor([[[gap, 0.0]]])
    other = 1 / (1 + math.exp(gap))
    expected = {
        "least_confidence": other,
        "margin": 2 * other,
        "max_entropy": other * gap + math.log1p(math.exp(-gap)),
    }
    for name, value in expected.items():
        assert score(name, x).item() == pytest.approx(value, rel=1e-6, abs=0)


@pytest.mark.parametrize("gap", [1.0, 1e-3, 1e-6, 1e-9])
def test_bald_of_passes_that_nearly_agree_is_no_rounding(gap):
    """Two passes that lean as far to either of two classes: about gap^2 / 8, far below the spacing of the entropies."""
    x = torch.tensor([[[gap, 0.0]], [[0.0, gap]]], dtype=torch.float64)
    tilt = math.tanh(gap / 2)
    expected = ((1 + tilt) * math.log1p(tilt) + (1 - tilt) * math.log1p(-tilt)) / 2 if gap > 1e-5 else tilt**2 / 2
    assert score("bald", x).item() == pytest.approx(expected, rel=1e-5, abs=0)


def test_bounds_are_reached():
    """Passes that are each sure of another class disagree by ln T; uniform ones agree on knowing nothing."""
    disagree, uniform = 1e4 * torch.eye(4)[:, None], torch.zeros(4, 1, 4)
    expected = {
        "variation_ratio": (0.75, 0.0),
        "max_entropy": (math.log(4), math.log(4)),
        "bald": (math.log(4), 0.0),
        "margin": (1.0, 1.0),
        "least_confidence": (0.75, 0.75),
    }
    for name, values in expected.items():
        assert score(name, torch.cat([disagree, uniform], dim=1)).tolist() == pytest.approx(values)


def test_one_pass_has_nothing_to_disagree_with():
    """T = 1: `variation_ratio` and `bald` are exactly 0, the others rank."""
    x = torch.randn(1, 50, 10)
    for name in NAMES:
        assert (score(name, x) == 0).all() == (name in ("variation_ratio", "bald"))


def test_a_tied_vote_goes_to_the_first_class():
    """Two passes, one of them torn between classes 0 and 1: it votes 0."""
    torn = [1.0, 1.0, 0.0]
    x = torch.tensor([[torn, torn], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    assert score("variation_ratio", x).tolist() == [0.0, 0.5]


@names
@pytest.mark.parametrize(
    "x",
    [torch.zeros(2, 3), torch.zeros(0, 2, 3), torch.zeros(2, 3, 0), torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 3).int()],
    ids=["no-passes-axis", "no-pass", "no-class", "four-axes", "integers"],
)
def test_what_are_no_logits_is_refused(name, x):
    """The error says what was expected and what came."""
    with pytest.raises(ValueError, match=r"expected floating-point logits \(T, N, D\).* got \("):
        score(name, x)
