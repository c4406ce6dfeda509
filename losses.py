"""The equations, as pure functions of tensors: no model, no config, no device.

Numbers in brackets are those of arXiv 2510.17021v1. Every loss is a mean over a row's real tokens,
then over rows, so it does not depend on how the rows are split into batches.

Shapes: B rows, T tokens, C width, V vocabulary, L captured layers, k sink tokens, H KV heads.
Logits are large: `head_mean` takes loss and gradient of a few tokens at a time, so that logits
exist for one chunk only.
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # tokens whose logits exist at once: 1024 x 32000 in fp32 is 131 MB


def _same_shape(**tensors):
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes differ: {shapes}")


def row_weights(mask):
    """Weights whose sum with x is the mean over a row's real tokens, then over rows. (B, T)."""
    mask = mask.float()
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)


def row_mean(x, mask):
    """Mean over each row's real tokens, then over rows. x, mask: (B, T) -> scalar."""
    _same_shape(x=x, mask=mask)
    return (x * row_weights(mask)).sum()


class _HeadMean(torch.autograd.Function):
    """The gradients are taken in forward, by autograd on one chunk after the other, and scaled in
    backward: nothing is computed twice, and no logits outlive their chunk."""

    @staticmethod
    def forward(ctx, fn, chunk, h, head, weight, *rest):
        wanted = [i for i, t in ((2, h), (3, head)) if ctx.needs_input_grad[i]]
        dh = torch.empty_like(h) if 2 in wanted else None
        dhead, total = None, 0.0
        for at in range(0, len(h), chunk):
            part = slice(at, at + chunk)
            with torch.enable_grad():
                x, w = h[part].detach().requires_grad_(), head.detach().requires_grad_(3 in wanted)
                loss = (fn(x @ w.T, *(t[part] for t in rest)) * weight[part]).sum()
            total = total + loss.detach()
            if wanted:
                *grads, = torch.autograd.grad(loss, [(x, w)[i - 2] for i in wanted])
                if 3 in wanted:  # (V, C), as large as the head: as few copies of it as can be
                    dw = grads.pop().float()
                    dhead = dw if dhead is None else dhead.add_(dw)
                if 2 in wanted:
                    dh[part] = grads.pop()
        ctx.grads = dh, None if dhead is None else dhead.to(head.dtype)
        return total

    @staticmethod
    def backward(ctx, g):
        dh, dhead = (None if t is None else t.mul_(g.to(t.dtype)) for t in ctx.grads)
        ctx.grads = None  # they are scaled in place, once
        return None, None, dh, dhead, None, *[None] * (len(ctx.needs_input_grad) - 5)


def head_mean(fn, h, head, weight, *rest, chunk=CHUNK):
    """sum_i weight_i * fn(logits_i, *rest_i), logits = h @ head.T, chunk by chunk. -> scalar.

    fn: (n, V), (n, ...) ... -> (n,). h: (B, T, C), head: (V, C), weight: (B, T) such as
    `row_weights`, rest: (B, T, ...) constants. Equals the unchunked sum, and so do its gradients.
    """
    return _HeadMean.apply(fn, chunk, h.flatten(0, 1), head, weight.flatten(),
                           *(t.flatten(0, 1) for t in rest))


def over_chunks(fn, *tensors, chunk=CHUNK):
    """fn(*rows) -> (n,) applied to `chunk` tokens at a time; equals fn on the whole.

    tensors: (B, T, ...) each, flattened to tokens -> (B, T). Under autograd a chunk is recomputed
    in backward, so at most one chunk of logits is alive.
    """
    B, T = tensors[0].shape[:2]
    flat = [t.reshape(B * T, *t.shape[2:]) for t in tensors]  # (B*T, ...)
    out = []
    for part in zip(*(t.split(chunk) for t in flat)):
        out.append(checkpoint(fn, *part, use_reentrant=False) if torch.is_grad_enabled()
                   else fn(*part))
    return torch.cat(out).view(B, T)  # (B, T)


def label_logp(logits, labels):
    """log pi(label | context) per token. logits (..., V), labels (...) -> (...), in fp32."""
    logits = logits.float()
    return logits.gather(-1, labels[..., None]).squeeze(-1) - logits.logsumexp(-1)


def npo(logp, logp_o, beta, mask, unit="token"):
    """NPO forget loss l_f (A1): -(2/beta) E log sigmoid(-beta log(pi_theta(x) / pi_o(x))).

    logp, logp_o, mask: (B, T-1), label log-probs under theta and theta_o -> scalar.
    unit "token" (default): x is one token given its context; mean over tokens, then rows.
    unit "sequence": x is the row, as (A1) reads literally: the log-ratio is summed over the row
    first. Its gradient weight 2 sigmoid(beta * ratio) then dies after a few nats per 2048 tokens.
    At theta = theta_o the value is (2/beta) ln 2. Raises ValueError for beta <= 0 or other units.
    """
    _same_shape(logp=logp, logp_o=logp_o, mask=mask)
    if beta <= 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    if unit == "token":
        return row_mean(npo_tokens(logp, logp_o, beta), mask)
    if unit == "sequence":
        return npo_tokens((logp * mask).sum(1), (logp_o * mask).sum(1), beta).mean()
    raise ValueError(f"npo unit must be token or sequence here, got {unit!r}")


def npo_tokens(logp, logp_o, beta):
    """-(2/beta) log sigmoid(-beta (logp - logp_o)), elementwise: (A1) for x of any size."""
    return -F.logsigmoid(-beta * (logp - logp_o)) * 2 / beta


def npo_logits_tokens(logits, logits_o, beta):
    """The released code's NPO on raw logits, per token: mean over V. (..., V) x 2 -> (...).

    Not (A1): it moves when a constant is added to all logits, which no probability does.
    """
    _same_shape(logits=logits, logits_o=logits_o)
    return -F.logsigmoid(beta * (logits_o.float() - logits.float())).mean(-1) * 2 / beta


def kl_tokens(logits, logits_o, reverse=False):
    """KL(pi_theta || pi_o) at each token; reverse gives KL(pi_o || pi_theta). (..., V) -> (...)."""
    _same_shape(logits=logits, logits_o=logits_o)
    lp, lp_o = logits.float().log_softmax(-1), logits_o.float().log_softmax(-1)
    if reverse:
        lp, lp_o = lp_o, lp
    return (lp.exp() * (lp - lp_o)).sum(-1)


def kl(logits, logits_o, mask, reverse=False):
    """Retain loss l_r of NPO (A2): E KL(pi_theta(.|x) || pi_o(.|x)).

    logits, logits_o: (B, T, V), mask: (B, T) -> scalar, nats per token. reverse=True is the
    direction of the released code.
    """
    return row_mean(kl_tokens(logits, logits_o, reverse), mask)


def rmu_forget(h, c_u, mask):
    """RMU forget loss (A4): E || M_theta(x) - c u ||^2, mean over width and real tokens.

    h: (B, T, C) activations at the read-out layer, c_u: (C,) control vector -> scalar.
    """
    if c_u.shape != h.shape[-1:]:
        raise ValueError(f"control vector {tuple(c_u.shape)} does not fit width {h.shape[-1]}")
    return row_mean((h.float() - c_u.float()).pow(2).mean(-1), mask)


def rmu_retain(h, h_o, weight):
    """Activation part of (A5): E || M_theta(x) - M_o(x) ||^2, mean over width.

    h, h_o: (B, T, C), weight: (B, T) such as `row_weights` -> scalar. The KL part of (A5) is `kl`.
    """
    _same_shape(h=h, h_o=h_o)
    return ((h.float() - h_o.float()).pow(2).mean(-1) * weight).sum()


def control_vector(width, steer, seed):
    """c * u / ||u|| with u ~ U[0, 1)^C from a seeded CPU generator (A4). -> (C,) of norm c."""
    u = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return steer * u / u.norm()


def value_norm(norm, norm_ref):
    """Delta of (4): mean over rows, layers, sink positions and heads of (|v| - |v_ref|)^2.

    norm, norm_ref: (B, L, k, H) L2 norms of value vectors, one per KV head -> scalar.
    """
    _same_shape(norm=norm, norm_ref=norm_ref)
    return (norm - norm_ref).pow(2).mean()


def value_norm_released(norm, norm_ref, mask):
    """The released penalty: absolute difference of whole-vector norms at masked positions.

    norm, norm_ref: (B, L, T), mask: (B, T) -> scalar.
    """
    _same_shape(norm=norm, norm_ref=norm_ref)
    return row_mean((norm - norm_ref).abs().mean(1), mask)
