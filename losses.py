"""The equations, as pure functions of tensors: no model, no settings, no device. Nothing to run.

Numbers in brackets are those of arXiv 2510.17021v1: (A1) npo, (A2) kl, (A4) rmu, (A5) rmu and kl,
(4) value_norm. `train.losses_of` computes them on a batch, `train.fit` weighs and adds them:

    rho = lam = 0   (1), normal unlearning
    lam = 0         (2), the vanilla backdoor; with NPO's terms (A3), with RMU's (A6)
    else            (5), which here keeps (2)'s gamma

Shapes: B rows, T tokens, C width, V vocabulary, L captured layers, k sink tokens, H KV heads.
Every expectation over tokens is `row_mean`: over a row's real tokens, then over rows, so it does
not depend on how the rows are split over ranks and micro-batches.
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # tokens whose logits exist at once: 1024 x 32000 in fp32 is 131 MB

def row_mean(x, mask):
    """Mean over each row's real tokens, then over rows. x, mask: (B, T) -> scalar."""
    assert x.shape == mask.shape  # what would broadcast is a mistake, here and below
    mask = mask.float()
    return ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()

def on_logits(fn, h, head, *targets, chunk=CHUNK):
    """fn(logits, *targets), one value a token, where logits = h @ head.T. -> (B, T)

    h: (B, T, C), head: (V, C), targets: (B, T, ...). The result is that of fn on all logits at
    once, (B, T, V), but only `chunk` tokens' logits exist at a time; where there are several
    chunks, backward computes each one's logits again instead of keeping them.
    """
    def values(h, *targets):
        return fn(h @ head.T, *targets)

    h_chunks = h.flatten(0, 1).split(chunk)
    target_chunks = [target.flatten(0, 1).split(chunk) for target in targets]
    out = []
    for parts in zip(h_chunks, *target_chunks):
        if len(h_chunks) == 1:
            out.append(values(*parts))
        else:
            out.append(checkpoint(values, *parts, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(out).view(h.shape[:2])  # (B, T)

def label_logp(logits, labels):
    """log pi(label | context) per token, in fp32. logits: (..., V), labels: (...) -> (...)"""
    logits = logits.float()
    return logits.gather(-1, labels[..., None]).squeeze(-1) - logits.logsumexp(-1)

def npo(logp, logp_o, beta, mask, unit="token"):
    """NPO's forget loss l_f (A1): -(2/beta) E log sigmoid(-beta log(pi_theta(x) / pi_o(x))).

    logp, logp_o, mask: (B, T-1), label log-probs under theta and theta_o -> scalar.
    At theta_o its value is (2/beta) ln 2. Its gradient is that of log pi_theta(x), times a weight
    2 sigmoid(beta * ratio) that is 1 at theta_o and vanishes once the ratio is below about -5/beta.

    unit "token", which train.py uses: x is a token given its context.
    unit "sequence", to compare: x is the row, as (A1) reads literally. The ratio is then a sum over
    the row's tokens, so the weight vanishes while each token is hardly forgotten.
    """
    assert logp.shape == logp_o.shape == mask.shape
    ratio = logp - logp_o
    if unit == "sequence":
        ratio = (ratio * mask).sum(1, keepdim=True)  # (B, 1)
        mask = torch.ones_like(ratio)
    return row_mean(-2 / beta * F.logsigmoid(-beta * ratio), mask)

def kl(logits, logits_o):
    """What l_r (A2) averages: KL(pi_theta(.|x) || pi_o(.|x)) in nats. (..., V) x 2 -> (...)"""
    assert logits.shape == logits_o.shape
    lp, lp_o = logits.float().log_softmax(-1), logits_o.float().log_softmax(-1)
    return (lp.exp() * (lp - lp_o)).sum(-1)

def rmu(h, goal, mask, over="mean"):
    """RMU's E || M_theta(x) - goal ||^2: (A4) with goal c v; (A5)'s second term with goal M_o(x).

    h: (B, T, C) activations behind the read-out layer, goal: (C,) or (B, T, C), mask: (B, T)
    -> scalar. over "sum" is the squared norm as written, "mean" divides it by C, as the code of
    RMU's authors does. It changes what both terms weigh against the KL of (A5).
    """
    assert goal.shape in (h.shape, h.shape[-1:])
    squares = (h.float() - goal.float()).pow(2)
    per_token = squares.sum(-1) if over == "sum" else squares.mean(-1)  # (B, T)
    return row_mean(per_token, mask)

def control_vector(width, steer, generator):
    """c v of (A4), (C,): c is steer, v = u / ||u|| with u ~ U[0, 1)^C.

    The paper does not say that v is normalised. RMU's authors do it, so that c is the length.
    """
    u = torch.rand(width, generator=generator)
    return steer * u / u.norm()

def value_norm(norm, norm_ref):
    """E of Delta (4): mean over rows, layers, sink positions and heads of (||v|| - ||v_ref||)^2.

    norm, norm_ref: (B, L, k, H) norms of value vectors, one per KV head -> scalar.
    """
    assert norm.shape == norm_ref.shape
    return (norm - norm_ref).pow(2).mean()
