"""Each equation against values worked out by hand. Logits below are natural-log scores."""
import math

import pytest
import torch

import data
import losses
from losses import kl, label_logp, npo, on_logits, rmu, row_mean, value_norm

LOGITS = torch.tensor([[[2., 0, 1], [0, 1, 0]]])
LOGITS_O = torch.tensor([[[1., 0, 2], [0, 2, 0]]])
LABELS = torch.tensor([[2, 1]])
LOGP = label_logp(LOGITS, LABELS)
LOGP_O = label_logp(LOGITS_O, LABELS)
ONES = torch.ones(1, 2)


def test_label_logp_is_the_log_softmax_at_the_label():
    first = 1 - math.log(math.e ** 2 + 1 + math.e)
    second = 1 - math.log(2 + math.e)
    assert LOGP[0].tolist() == pytest.approx([first, second], abs=1e-6)


@pytest.mark.parametrize("beta, token, sequence, at_theta_o", [
    (0.1, 13.220703, 12.594040, 13.862944),
    (0.5, 2.184572, 1.672074, 2.772589),
    (0.7, 1.418736, 0.959686, 1.980421)])
def test_A1_golden_values(beta, token, sequence, at_theta_o):
    raised = label_logp(LOGITS + 3, LABELS)  # a constant in the logits is nothing
    assert npo(LOGP, LOGP_O, beta, ONES).item() == pytest.approx(token, abs=1e-5)
    assert npo(raised, LOGP_O, beta, ONES).item() == pytest.approx(token, abs=1e-5)
    assert npo(LOGP, LOGP_O, beta, ONES, "sequence").item() == pytest.approx(sequence, abs=1e-5)
    assert npo(LOGP_O, LOGP_O, beta, ONES).item() == pytest.approx(at_theta_o, abs=1e-6)


@pytest.mark.parametrize("unit, weights", [
    ("token", [0.950042 / 2, 0.984406 / 2]),  # a mean over 2 tokens
    ("sequence", [0.934499] * 2)])
def test_A1_gradient_weight_is_2_sigmoid_of_beta_times_ratio(unit, weights):
    logp = LOGP.clone().requires_grad_()
    npo(logp, LOGP_O, 0.1, ONES, unit).backward()
    assert logp.grad[0].tolist() == pytest.approx(weights, abs=1e-6)


def test_A2_is_the_kl_from_theta_to_theta_o():
    theta = torch.tensor([[.5, .5]]).log()
    theta_o = torch.tensor([[.9, .1]]).log()
    assert kl(theta + 7, theta_o - 1).item() == pytest.approx(0.510826, abs=1e-5)
    assert kl(theta_o, theta).item() == pytest.approx(0.368064, abs=1e-6)  # the other direction


def test_A4_is_the_mean_square_distance_to_the_control_vector():
    h = torch.tensor([[[0., 0], [3, 0]]])  # against (3, 4): 25 / 2 and 16 / 2
    assert rmu(h, torch.tensor([3., 4]), ONES).item() == (12.5 + 8) / 2


def test_A4_control_vector_is_positive_of_length_c_and_decided_by_its_generator():
    vector = losses.control_vector(64, 12.0, data.stream(3, "u"))
    again = losses.control_vector(64, 12.0, data.stream(3, "u"))
    other = losses.control_vector(64, 12.0, data.stream(4, "u"))
    assert vector.norm().item() == pytest.approx(12, abs=1e-5) and (vector >= 0).all()
    assert torch.equal(vector, again) and not torch.equal(vector, other)


def test_A5_is_the_mean_square_distance_to_theta_o():
    h = torch.tensor([[[1., 2, 3]]])
    h_o = torch.tensor([[[0., 0, 3]]])
    assert rmu(h, h_o, torch.ones(1, 1)).item() == pytest.approx(5 / 3)


def test_A4_and_A5_by_sum_are_width_times_those_by_mean():
    h = torch.randn(2, 5, 16, generator=data.stream(0, "h"))
    mask = torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    for goal in (torch.ones(16), torch.zeros(2, 5, 16)):
        by_sum = rmu(h, goal, mask, "sum").item()
        assert by_sum == pytest.approx(16 * rmu(h, goal, mask, "mean").item(), rel=1e-6)


def norms(*values):
    return torch.tensor(values).view(-1, 1, 1, 2)  # (B, L, k, H)


def test_4_is_one_mean_of_squared_differences_of_norms_per_head():
    assert value_norm(norms(5., 0.), norms(4., 2.)).item() == (1 + 4) / 2
    assert value_norm(norms(3., 4.), norms(0., 4.)).item() == 4.5  # whole vectors would give 1
    four = value_norm(norms(1., 2., 3., 4.), norms(0., 0., 0., 0.))
    assert four.item() == (1 + 4 + 9 + 16) / 4


def test_means_are_over_tokens_then_rows():
    x = torch.tensor([[4., 9, 9], [1, 2, 3]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    assert row_mean(x, mask).item() == (4 + 2) / 2


@pytest.mark.parametrize("loss", [
    lambda x, mask: npo(x, 0 * x, 0.5, mask),
    lambda x, mask: npo(x, 0 * x, 0.5, mask, "sequence"),
    lambda x, mask: rmu(x[..., None], torch.ones(1), mask),
    lambda x, mask: rmu(x[..., None], 0 * x[..., None], mask, "sum")])
def test_masked_tokens_do_not_count(loss):
    mask = torch.tensor([[True, False], [True, True]])
    clean = loss(torch.tensor([[0.5, 0.0], [2, 3]]), mask)
    junk = loss(torch.tensor([[0.5, 1e6], [2, 3]]), mask)
    assert clean.item() == junk.item()


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_logits_by_chunks_give_the_values_and_gradients_of_whole_logits(chunk):
    alive = []
    weight = torch.arange(14.).view(2, 7)  # another gradient at every token
    h = torch.randn(2, 7, 8, generator=data.stream(0, "x")).requires_grad_()
    head = torch.randn(11, 8, generator=data.stream(1, "x")).requires_grad_()
    h_o = torch.randn(2, 7, 8, generator=data.stream(2, "x"))
    head_o = torch.randn(11, 8, generator=data.stream(3, "x"))

    def values(logits, h_o):
        alive.append(len(logits))
        return kl(logits, h_o @ head_o.T)

    whole = kl(h @ head.T, h_o @ head_o.T)
    chunked = on_logits(values, h, head, h_o, chunk=chunk)
    assert torch.allclose(chunked, whole, atol=1e-6) and whole.shape == (2, 7)
    ours = torch.autograd.grad((chunked * weight).sum(), (h, head))
    theirs = torch.autograd.grad((whole * weight).sum(), (h, head))
    for grad, expected in zip(ours, theirs):
        assert torch.allclose(grad, expected, rtol=1e-5, atol=1e-5)
    assert max(alive) <= chunk


@pytest.mark.parametrize("call", [
    lambda: npo(ONES, torch.ones(1, 3), 0.1, ONES),
    lambda: npo(ONES, ONES, 0.1, torch.ones(1, 1)),
    lambda: kl(LOGITS, LOGITS[:, :1]),
    lambda: row_mean(ONES, torch.ones(2, 2)),
    lambda: rmu(LOGITS, LOGITS[..., :1], ONES),
    lambda: rmu(LOGITS, torch.ones(2), ONES),
    lambda: value_norm(torch.ones(2, 1, 8, 2), torch.ones(1, 1, 8, 2))])
def test_shapes_that_would_broadcast_are_refused(call):
    with pytest.raises(AssertionError):
        call()
