"""Mean and covariance from batches and from parts, against NumPy on all samples at once."""

import numpy as np
import pytest
import torch

from vistok.eval.inception.moments import Gaussian, Moments

DIM = 12


def features(number, seed=0):
    return torch.randn(number, DIM, generator=torch.Generator().manual_seed(seed)) * 3 + 5


def gathered(parts):
    moments = Moments(DIM)
    for part in parts:
        moments.update(part)
    return moments


@pytest.mark.parametrize("number", [5, DIM - 1, DIM, 40])
def test_mean_and_covariance_equal_numpy_whatever_the_batches(number):
    data = features(number)
    found = gathered(data.split(3)).gaussian()
    np.testing.assert_allclose(found.mean, data.double().mean(0), rtol=1e-12)
    covariance = np.cov(data.double().numpy(), rowvar=False)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-9, atol=1e-11)
    assert float(found.variance) == pytest.approx(np.trace(covariance), rel=1e-11)
    np.testing.assert_allclose(found.root @ found.root, covariance, atol=1e-7)


def test_samples_are_kept_only_while_there_are_fewer_than_dimensions():
    few, many = gathered([features(DIM - 1)]), gathered([features(DIM - 1), features(1)])
    assert few.gaussian().samples.shape == (DIM - 1, DIM)
    assert many.gaussian().samples is None
    assert set(many.state_dict()) == {"count", "sum", "outer"}
    assert many.state_dict()["outer"].shape == (DIM, DIM)


@pytest.mark.parametrize("sizes", [(3, 5), (4, 9), (40, 3), (3, 40), (30, 50), (2, 2, 2), (6, 40, 6), (0, 5)])
def test_merging_unequal_parts_equals_one_pass(sizes, tmp_path):
    data = features(sum(sizes))
    merged = Moments(DIM)
    for number, part in enumerate(data.split(list(sizes))):
        torch.save(gathered([part]).state_dict(), tmp_path / f"{number}.pt")
        merged.merge(torch.load(tmp_path / f"{number}.pt", weights_only=True))
    whole = gathered([data])
    assert merged.count == whole.count == len(data)
    assert (merged.gaussian().samples is None) == (whole.gaussian().samples is None)
    torch.testing.assert_close(merged.gaussian().mean, whole.gaussian().mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(merged.gaussian().covariance, whole.gaussian().covariance, rtol=1e-10, atol=1e-12)


def test_a_saved_state_does_not_change_with_later_batches():
    moments = gathered([features(40)])
    state = {name: value.clone() if torch.is_tensor(value) else value for name, value in moments.state_dict().items()}
    other = Moments(DIM)
    other.merge(moments.state_dict())
    other.merge(features_state(30))
    for name, value in moments.state_dict().items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[name]))


def features_state(number):
    return gathered([features(number, seed=1)]).state_dict()


def test_sums_are_taken_in_float64():
    offset = torch.full((5000, DIM), 1000.0) + features(5000)
    found = gathered(offset.split(100)).gaussian()
    np.testing.assert_allclose(found.covariance, np.cov(offset.double().numpy(), rowvar=False), rtol=1e-6, atol=1e-6)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"features must have shape \(B, 12\); got \(3, 11\)"):
        Moments(DIM).update(torch.zeros(3, 11))
    with pytest.raises(ValueError, match="at least 2 samples; got 1"):
        gathered([features(1)]).gaussian()
    with pytest.raises(ValueError, match="either"):
        Gaussian(torch.zeros(2))
