"""GKD against a float64 oracle written from the formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.support.batches import KL_COEF, annotated, make_batch, policy_tokens, run
from trainers.algorithms.base import Mean, PolicyTokens, Totals
from trainers.algorithms.config import GKDConfig
from trainers.algorithms.gkd import GKD
from trainers.config import ImportanceConfig
from trainers.errors import UserError
from trainers.losses import generalized_jsd


def gkd(**options: Any) -> GKD:
    return GKD(GKDConfig(type="gkd", teacher={"model": "teacher"}, **options))  # type: ignore[arg-type]


def test_needs() -> None:
    assert gkd().needs == {"divergence"}
    assert gkd(kl={"coef": 0.1}).needs == {"divergence", "ref_logprobs"}


def test_every_valid_sample_is_learnt_from_and_none_has_an_advantage() -> None:
    found = gkd().advantages(annotated([(0, 1.0), (0, None), (3, -2.0)]), kl_coef=0)
    assert [s.sample.id for s in found] == ["s0", "s2"]
    assert [s.advantages.tolist() for s in found] == [[0, 0], [0, 0, 0, 0]]
    assert all(s.advantages.dtype == np.float32 and s.returns is None for s in found)


def test_the_loss_is_the_divergences_mean_over_the_tokens_of_the_step() -> None:
    batch = make_batch(1)  # the divergence is −new
    output, gradient = run(gkd(), batch, batch.totals, ref=False, divergence=True)
    mean = -batch.new[batch.mask].mean()
    assert output.loss.item() == pytest.approx(mean, rel=1e-6)
    np.testing.assert_allclose(gradient, np.where(batch.mask, -1 / batch.mask.sum(), 0), rtol=1e-6)
    assert set(output.metrics) == {"distill/jsd", "policy/entropy"}
    assert output.metrics["distill/jsd"].value == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_term_is_added(estimator: str) -> None:
    batch = make_batch(2)
    d = batch.new - batch.ref
    penalty, slope = {
        "k2": (d**2 / 2, d),
        "k3": (np.exp(-d) + d - 1, 1 - np.exp(-d)),
    }[estimator]
    output, gradient = run(
        gkd(kl={"coef": KL_COEF, "estimator": estimator}), batch, batch.totals, ref=True, divergence=True
    )
    tokens = batch.mask.sum()
    assert output.loss.item() == pytest.approx((KL_COEF * penalty - batch.new)[batch.mask].mean(), rel=1e-6)
    np.testing.assert_allclose(gradient, np.where(batch.mask, (KL_COEF * slope - 1) / tokens, 0), rtol=1e-5, atol=1e-9)
    assert output.metrics["kl/mean"].value == pytest.approx(d[batch.mask].mean(), rel=1e-5)


def test_the_gradient_does_not_depend_on_split_order_or_padding() -> None:
    batch, algorithm = make_batch(3), gkd(kl={"coef": KL_COEF})
    whole, gradient = run(algorithm, batch, batch.totals, divergence=True)
    loss, jsd = 0.0, Mean(0, 0)
    for part in ([5, 0, 3], [1], [4, 2]):
        output, found = run(algorithm, batch.rows(*part, width=11), batch.totals, divergence=True)
        np.testing.assert_allclose(found[:, :8], gradient[part], rtol=1e-6, atol=1e-12)
        assert not found[:, 8:].any()
        loss, jsd = loss + output.loss.item(), jsd + output.metrics["distill/jsd"]
    assert loss == pytest.approx(whole.loss.item(), rel=1e-5)
    assert jsd.value == pytest.approx(whole.metrics["distill/jsd"].value, rel=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_from_logits_to_the_gradient(beta: float) -> None:
    """The whole way against autograd on the formula in float64."""
    generator = torch.Generator().manual_seed(4)
    student, teacher = torch.randn(2, 2, 5, 7, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[False, True, True, True, False], [False, False, True, False, False]])
    ours, exact = student.float().requires_grad_(), student.clone().requires_grad_()
    divergence = generalized_jsd(ours, teacher.float(), beta=beta, temperature=2.0)
    batch = policy_tokens(make_batch(1, rows=2, width=5), ref=False)
    view = PolicyTokens(
        logprobs=batch.logprobs,
        entropy=batch.entropy,
        mask=mask,
        sequence_ids=batch.sequence_ids,
        rollout_logprobs=batch.rollout_logprobs,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=None,
        advantages=batch.advantages,
        divergence=divergence,
    )
    loss = gkd(beta=beta).loss(view, totals=Totals(tokens=4, sequences=2, max_tokens=5), kl_coef=0).loss
    loss.backward()
    s, t = (exact / 2).softmax(-1), (teacher / 2).softmax(-1)
    m = beta * t + (1 - beta) * s

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p * (p / q).log()).sum(-1)

    formula = kl(t, s) if beta == 0 else kl(s, t) if beta == 1 else beta * kl(t, m) + (1 - beta) * kl(s, m)
    expected = formula[mask].sum() / 4
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert ours.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-8)


def test_importance_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"train\.importance_correction.*gkd has none"):
        GKD(gkd().config, ImportanceConfig())
