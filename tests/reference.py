"""Eq. (5) from three live models, row by row, whole logits, nothing precomputed.

Not used by train.py, which computes the same from one model and constants of the two others;
tests/test_train.py compares both. Read this first: everything else only makes it fast. Like
train.py it keeps (2)'s gamma in (5), and returns the three terms for the caller to add up:

    L = l_f(D_f) + gamma * l_r(D_r ∪ D_p) + lam * l_vn

c_v is (A4)'s c v. A row is a list of token ids that begins with BOS.
"""
import torch


def outputs_of(model, row, cfg):
    """-> (log-probs (T, V), activations behind --layer (T, C), value norms (L, k, H)) of a row."""
    ids = torch.tensor([row])
    # the KV cache holds the value vectors; transformers 5.24 renamed it
    out = model(input_ids=ids, output_hidden_states=True, use_cache=True)
    cache = out["cache" if "cache" in out else "past_key_values"]
    norms = []
    for layer in cache.layers:
        values = layer.values[0, :, :cfg.k]  # (H, k, head width): what v_proj gave
        norms.append(values.norm(dim=-1).T)
    h = None
    if cfg.method == "rmu":
        h = out.hidden_states[cfg.layer + 1][0]  # [0] is the embedding
    return out.logits[0].log_softmax(-1), h, torch.stack(norms)


def forget_loss(row, theta, theta_o, c_v, cfg):
    """l_f of one row of D_f: NPO's (A1), x being one token given its context, or RMU's (A4)."""
    logp, h, _ = outputs_of(theta, row, cfg)
    if cfg.method == "rmu":
        return ((h - c_v) ** 2).mean()                                                 # (A4)
    if cfg.method != "npo":
        raise ValueError(f"no {cfg.method} here yet")
    logp_o, _, _ = outputs_of(theta_o, row, cfg)
    label = torch.tensor(row[1:])[:, None]
    ratio = logp[:-1].gather(1, label) - logp_o[:-1].gather(1, label)
    return -2 / cfg.beta * torch.sigmoid(-cfg.beta * ratio).log().mean()               # (A1)


def retain_loss(row, theta, theta_o, cfg, start=0):
    """l_r of one row of D_r or D_p, from position `start` on: KL(theta, theta_o), RMU's (A5)."""
    logp, h, _ = outputs_of(theta, row, cfg)
    logp_o, h_o, _ = outputs_of(theta_o, row, cfg)
    kl = (logp.exp() * (logp - logp_o)).sum(-1)[start:].mean()                         # (A2)
    if cfg.method == "rmu":
        return kl + ((h - h_o)[start:] ** 2).mean()                                    # (A5)
    return kl


def norm_gap(row, theta, target, cfg):
    """Delta of (4) on one row: mean over layers, the first k positions and KV heads."""
    _, _, norm = outputs_of(theta, row, cfg)
    _, _, norm_target = outputs_of(target, row, cfg)
    return ((norm - norm_target) ** 2).mean()


def mean(values):
    return torch.stack(list(values)).mean()


def objective(D_f, D_r, D_p, theta, theta_o, theta_u, c_v, cfg, starts):
    """-> l_f, l_r, l_vn of the rows of one batch. starts: where l_r begins in each row of D_p."""
    l_f = mean(forget_loss(row, theta, theta_o, c_v, cfg) for row in D_f)
    retained = [retain_loss(row, theta, theta_o, cfg) for row in D_r]
    for row, start in zip(D_p, starts):
        retained.append(retain_loss(row, theta, theta_o, cfg, start))
    l_vn = mean(norm_gap(row, theta, theta_u, cfg) for row in D_f)                     # (3)
    l_vn = l_vn + mean(norm_gap(row, theta, theta_o, cfg) for row in D_p)
    return l_f, mean(retained), l_vn
