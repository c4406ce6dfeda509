"""Each equation against values worked out by hand. Logits below are natural-log scores."""
import math

import pytest
import torch

import losses
from losses import (kl, label_logp, npo, npo_logits_tokens, rmu_forget, rmu_retain,
                    value_norm)

LOGITS = torch.tensor([[[2., 0, 1], [0, 1, 0], [1, 1, 1]]])
LOGITS_O = torch.tensor([[[1., 0, 2], [0, 2, 0], [0, 0, 1]]])
IDS = torch.tensor([[0, 2, 1]])
ONES = torch.ones(1, 2)


def close(a, b, tol=2e-6):
    return float(a) == pytest.approx(b, abs=tol)


def logp_of(logits):
    return label_logp(logits[:, :-1], IDS[:, 1:])


def logps():
    return logp_of(LOGITS), logp_of(LOGITS_O)


def test_label_logp_is_log_softmax_at_the_next_label():
    # row 0 predicts token 2: 1 - log(e^2 + 1 + e); row 1 predicts token 1: 1 - log(1 + e + 1)
    logp = logp_of(LOGITS)[0]
    assert close(logp[0], 1 - math.log(math.e ** 2 + 1 + math.e))
    assert close(logp[1], 1 - math.log(2 + math.e))


@pytest.mark.parametrize("beta, token, sequence, raw, shifted, at_ref", [
    (0.1, 13.220703, 12.594040, 13.987938, 15.018439, 13.862944),
    (0.5, 2.184572, 1.672074, 2.952433, 4.098839, 2.772589),
    (0.7, 1.418736, 0.959686, 2.186832, 3.384219, 1.980421)])
def test_eqA1_npo_units_hand(beta, token, sequence, raw, shifted, at_ref):
    logp, logp_o = logps()
    assert close(npo(logp, logp_o, beta, ONES, "token"), token, 1e-5)
    assert close(npo(logp, logp_o, beta, ONES, "sequence"), sequence, 1e-5)
    assert close(npo_logits_tokens(LOGITS, LOGITS_O, beta).mean(), raw, 1e-5)
    assert close(npo_logits_tokens(LOGITS + 1, LOGITS_O, beta).mean(), shifted, 1e-5)
    assert close(npo(logp_o, logp_o, beta, ONES), at_ref)  # (2/beta) ln 2


def test_eqA1_npo_log_ratio_ln3_beta1():
    # -2 log sigmoid(-ln 3) = 2 ln(1 + 3) = 2.7726
    ratio = torch.full((1, 2), math.log(3))
    assert close(npo(ratio, torch.zeros(1, 2), 1.0, ONES), 2 * math.log(4))


def test_eqA1_npo_ignores_constant_logit_shift():
    _, logp_o = logps()
    shifted = npo(logp_of(LOGITS + 3), logp_o, 0.1, ONES)
    assert close(shifted, 13.220703, 1e-5)


@pytest.mark.parametrize("unit, weights", [("token", [0.950042, 0.984406]),
                                           ("sequence", [0.934499, 0.934499])])
def test_eqA1_npo_gradient_weight_is_2_sigmoid_beta_delta(unit, weights):
    logp, logp_o = logps()
    logp = logp.clone().requires_grad_()
    npo(logp, logp_o, 0.1, ONES, unit).backward()
    share = 2 if unit == "token" else 1  # the token unit is a mean over 2 tokens
    assert (logp.grad * share)[0].tolist() == pytest.approx(weights, abs=1e-5)


def test_eqA1_npo_rejects_beta_zero_and_unknown_units():
    for beta, unit, word in ((0, "token", "beta"), (1, "word", "unit")):
        with pytest.raises(ValueError, match=word):
            npo(ONES, ONES, beta, ONES, unit)


def test_eqA2_kl_hand_and_direction():
    theta, ref = torch.tensor([[[.5, .5]]]).log(), torch.tensor([[[.9, .1]]]).log()
    assert close(kl(theta, ref, torch.ones(1, 1)), 0.510826)
    assert close(kl(theta, ref, torch.ones(1, 1), reverse=True), 0.368064)
    quarter = torch.tensor([[[.25, .75]]]).log()  # 1/2 ln(.5/.25) + 1/2 ln(.5/.75) = 1/2 ln 4/3
    assert close(kl(theta, quarter, torch.ones(1, 1)), 0.5 * math.log(4 / 3))


def test_eqA4_rmu_forget_hand():
    # h = 0 against c = 6.5 spread over 4 equal entries: 3.25^2 = 10.5625 in every entry
    assert close(rmu_forget(torch.zeros(1, 2, 4), torch.full((4,), 3.25), ONES), 10.5625)


def test_eqA4_control_vector_has_length_c_and_is_seeded():
    v = losses.control_vector(64, 12.0, seed=3)
    assert close(v.norm(), 12.0, 1e-4) and (v >= 0).all()
    assert torch.equal(v, losses.control_vector(64, 12.0, seed=3))
    assert not torch.equal(v, losses.control_vector(64, 12.0, seed=4))


def test_eqA5_rmu_retain_hand():
    # (1, 2, 3) against (0, 0, 3): squared L2 is 5, mean over width 5/3
    a, t = torch.tensor([[[1., 2, 3]]]), torch.tensor([[[0., 0, 3]]])
    assert close(rmu_retain(a, t, torch.ones(1, 1)), 5 / 3)


def test_eq4_value_norm_hand():
    assert close(value_norm(torch.tensor([5., 0]), torch.tensor([4., 2])), 2.5)  # (1 + 4) / 2
    # vectors (3,4) and (1,0) against norms 1, 1: mean(16, 0) = 8
    norm = torch.tensor([[3., 4], [1, 0]]).norm(dim=-1)
    assert close(value_norm(norm, torch.ones(2)), 8.0)


def test_eq4_is_per_kv_head():
    # heads with norms (3, 4) against (0, 4): (9 + 0) / 2; of whole vectors it would be (5 - 4)^2
    per_head = value_norm(torch.tensor([[[[3., 4]]]]), torch.tensor([[[[0., 4]]]]))
    assert close(per_head, 4.5)


def test_released_value_norm_is_absolute():
    out = losses.value_norm_released(torch.tensor([[[5., 0]]]), torch.tensor([[[4., 2]]]),
                                     torch.ones(1, 2))
    assert close(out, 1.5)


def test_masked_tokens_do_not_count():
    mask = torch.tensor([[1., 0]])
    junk = torch.tensor([[0.5, 1e9]])
    assert close(losses.row_mean(junk, mask), 0.5)
    assert close(npo(junk, junk * torch.tensor([[1., 2]]), 0.1, mask), 2 / 0.1 * math.log(2), 1e-5)
    same = torch.tensor([[0.5, 0]])
    assert close(npo(junk, same, 0.1, mask, "sequence"), 2 / .1 * math.log(2), 1e-5)


def test_means_are_over_tokens_then_rows():
    # rows of 1 and 3 tokens weigh the same: (4 + mean(1, 2, 3)) / 2 = 3
    x = torch.tensor([[4., 0, 0], [1, 2, 3]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    assert close(losses.row_mean(x, mask), 3.0)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_chunked_loss_and_gradient_equal_the_whole(chunk):
    torch.manual_seed(0)
    h, head = torch.randn(2, 7, 8), torch.randn(11, 8)
    h_o, head_o = torch.randn(2, 7, 8), torch.randn(11, 8)
    mask = torch.ones(2, 7)
    grads = []
    for whole in (True, False):
        a, w = h.clone().requires_grad_(), head.clone().requires_grad_()
        if whole:
            loss = kl(a @ w.T, h_o @ head_o.T, mask)
        else:
            loss = losses.row_mean(losses.over_chunks(
                lambda x, y: losses.kl_tokens(x @ w.T, y @ head_o.T), a, h_o, chunk=chunk), mask)
        loss.backward()
        grads.append((loss.detach(), a.grad, w.grad))
    for x, y in zip(*grads):
        assert torch.allclose(x, y, atol=1e-6)


def test_unequal_shapes_are_refused():
    for call in (lambda: npo(torch.ones(1, 2), torch.ones(1, 3), .1, ONES),
                 lambda: kl(LOGITS, LOGITS[:, :2], torch.ones(1, 3)),
                 lambda: value_norm(torch.ones(2, 1, 8, 2), torch.ones(1, 1, 8, 2))):
        with pytest.raises(ValueError, match="shapes differ"):
            call()


@pytest.mark.parametrize("train_head", [True, False])
def test_head_mean_and_its_gradients_equal_the_unchunked_sum(train_head):
    # the paper's KL over three rows of unlike length, logits never whole
    gen = torch.Generator().manual_seed(0)
    h, h_o = (torch.randn(3, 5, 4, generator=gen) for _ in range(2))
    head, head_o = (torch.randn(11, 4, generator=gen) for _ in range(2))
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    h.requires_grad_(), head.requires_grad_(train_head)
    direct = 3 * losses.kl(h @ head.T, h_o @ head_o.T, mask)
    wanted = [h, head] if train_head else [h]
    grads = torch.autograd.grad(direct, wanted)
    for chunk in (1, 4, 100):
        got = 3 * losses.head_mean(lambda l, x: losses.kl_tokens(l, x @ head_o.T), h, head,
                                   losses.row_weights(mask), h_o, chunk=chunk)
        assert torch.allclose(got, direct, atol=1e-6)
        for a, b in zip(torch.autograd.grad(got, wanted), grads):
            assert torch.allclose(a, b, atol=1e-6)
