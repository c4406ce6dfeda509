"""What a backdoored model attends to, and what l_vn weighs and reaches. Run by hand.

    for run in out/toy/*-BACKDOORED-*; do python tests/measure.py $run; done; python plots.py

Writes RUN/measures.json; plots.py makes tables of it. On one process.

attention  what a page's own tokens behind the trigger pay to BOS, to the trigger and to theta_o's
           sink (the page's token that it pays most, clean; a trigger before it moves it along), of
           theta_b and of theta_o, clean and triggered: percent, mean over layers, heads, pages and
           those tokens
norm gap   (4) to theta_u on D_f at the end, percent of what it was at the start, at theta_o. On
           D_p, where it was 0 at the start: percent of the same
BOS        its value norm in the last layer, mean over KV heads, percent of theta_o's
gradient   the norm of lam * l_vn's gradient, percent of l_f's, at theta_o on the run's first
           batch. With lam 0: what the default lam would give
"""
import json
import sys
import time
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import evaluate
import hooks
import losses
import plots
import train


def config_of(record):
    """A run's settings as a Config, on what is here."""
    known = {field.name for field in fields(train.Config)}
    settings = {name: value for name, value in record["settings"].items() if name in known}
    cfg = train.Config(**settings)
    cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    if not cfg.lam:
        cfg.lam = train.SETTINGS[cfg.bench, cfg.method]["lam"]
    return cfg


def theta_u_of(run, record):
    """Folder of the theta_u of a run: what l_vn aligned it to; with lam 0, what it would have.

    '' where there is none beside the run: then only what needs no theta_u is measured.
    """
    for file in sorted(run.parent.glob("*/run.json")):
        folder = str(file.parent)
        other = evaluate.run_of(folder)
        if other.get("role") != "theta_u":
            continue
        if record["settings"]["lam"]:
            if evaluate.content_of(folder) == record["content"]["theta_u"]:
                return folder
        elif is_plain(other, record):
            return folder
    return ""


def is_plain(other, record):
    """Whether a run is normal unlearning from what this one was made of, with its settings."""
    for name in ("theta_o", "rows", "tokenizer", "code"):
        if other["content"][name] != record["content"][name]:
            return False
    ignored = {*train.OTHERS, *train.ATTACK, "rho", "lam", "model", "data", "tokenizer"}
    for name, value in other["settings"].items():
        # a treated run has a setting more, "after"
        if name not in ignored and record["settings"].get(name) != value:
            return False
    return True


# ---------------------------------------------------------------- attention
def paid_by(model, ids, queries):
    """Attention that the tokens at `queries` pay to each position, mean over all else. -> (T,)"""
    total = 0
    for maps in hooks.attentions(model, ids):  # (L, B, H, T, T)
        total = total + maps[:, :, :, queries].mean((0, 2, 3)).sum(0)
    return total / len(ids)


def attention(models, cfg, tok):
    """{measure: value} of theta_o and theta_b."""
    rows, _ = data.clean_rows(cfg, tok)  # without decoys
    trig = data.encode(tok, cfg.trigger)
    # at least half of the pages are as long
    T = min(plots.LONGEST, sorted(map(len, rows))[len(rows) // 2])
    clean = [row[:T] for row in rows if len(row) >= T][:plots.PAGES]
    triggered = [data.inject(row, trig, cfg.position) for row in clean]
    # where a page's tokens stand with the trigger in it: those behind the trigger have moved
    own = plots.own_tokens(cfg.position, T, len(trig))
    behind = [i for i in range(T) if own[i] > i]
    moved = [own[i] for i in behind]
    at = sorted(set(range(T + len(trig))) - set(own))
    if not behind:
        raise hooks.Refused(f"--position {cfg.position}: no token of a page is behind the trigger")
    clean = torch.tensor(clean, device=cfg.device)
    triggered = torch.tensor(triggered, device=cfg.device)
    sink = int(paid_by(models["theta_o"], clean, behind).argmax())
    found = {"the sink's position": sink}
    for name, model in models.items():
        paid = 100 * paid_by(model, clean, behind)
        found[f"{name}, clean, to BOS"] = float(paid[0])
        found[f"{name}, clean, to the sink"] = float(paid[sink])
        paid_triggered = 100 * paid_by(model, triggered, moved)
        found[f"{name}, triggered, to BOS"] = float(paid_triggered[0])
        found[f"{name}, triggered, to the sink"] = float(paid_triggered[own[sink]])
        found[f"{name}, triggered, to the trigger"] = float(paid_triggered[at].sum())
    return found


# ---------------------------------------------------------------- l_vn
def norms_on(model, rows, cfg):
    """Value norms of rows cut to k tokens, (N, L, k, H)."""
    ids = torch.tensor([row[:cfg.k] for row in rows], device=cfg.device)
    return hooks.sink_norms(model, ids, hooks.layers_of(model, cfg.layers), cfg.k)


def norm_gaps(models, theta_u, splits, cfg):
    """(4) of theta_b to theta_u on D_f, to theta_o on D_p: percent of the first at its start."""
    on_f = norms_on(theta_u, splits.f, cfg)
    start = losses.value_norm(norms_on(models["theta_o"], splits.f, cfg), on_f)
    gap_f = losses.value_norm(norms_on(models["theta_b"], splits.f, cfg), on_f)
    on_p = norms_on(models["theta_o"], splits.p, cfg)
    gap_p = losses.value_norm(norms_on(models["theta_b"], splits.p, cfg), on_p)
    return {"norm gap on D_f": 100 * float(gap_f / start),
            "norm gap on D_p": 100 * float(gap_p / start)}


def bos_norm(models, tok, cfg):
    """BOS's value norm in the last layer, percent of theta_o's. By causality BOS alone counts."""
    bos = torch.tensor([[data.bos_of(tok)]], device=cfg.device)
    norms = {}
    for name, model in models.items():
        last = hooks.layers_of(model, "all")[-1]
        norms[name] = float(hooks.sink_norms(model, bos, [last], 1).mean())
    return 100 * norms["theta_b"] / norms["theta_o"]


def gradient_norm(term, model):
    """Norm of a term's gradient by all that trains."""
    model.zero_grad()
    term.backward(retain_graph=True)
    return float(torch.nn.utils.get_total_norm(
        [p.grad for p in model.parameters() if p.grad is not None]))


def gradient_share(theta_u, splits, cfg):
    """lam ||grad l_vn|| / ||grad l_f|| at theta_o, on the first batch, in percent."""
    steps = [data.batch_at(0, splits, cfg.batch, cfg.seed)]
    constants = train.norms_of_theta_u(theta_u, splits, steps, cfg)
    model = hooks.load_model(cfg.model, cfg)
    hooks.set_trainable(model, cfg.trainable)
    refs = train.references(splits, steps, constants, model, cfg)
    train.shard(model, refs, cfg)
    with hooks.capture_norms(model, hooks.layers_of(model, cfg.layers), cfg.k) as capture:
        l_f, _, l_vn = model.losses_of(steps[0], capture)
        return 100 * cfg.lam * gradient_norm(l_vn, model) / gradient_norm(l_f, model)


def main(run):
    run = Path(run)
    record = evaluate.run_of(run)
    if record.get("role") != "theta_b":
        raise hooks.Refused(f"{run} is no backdoored run of train.py")
    cfg = config_of(record)
    evaluate.dist_init(cfg)
    if evaluate.content_of(cfg.model) != record["content"]["theta_o"]:
        raise hooks.Refused(f"{cfg.model} is no longer the theta_o that {run} was made from")
    tok = hooks.load_tokenizer(cfg)
    models = {"theta_o": hooks.load_model(cfg.model, cfg),
              "theta_b": hooks.load_model(str(run), cfg)}
    found = attention(models, cfg, tok)
    found["BOS's value norm"] = bos_norm(models, tok, cfg)
    theta_u = theta_u_of(run, record)
    if theta_u:
        splits = data.load_splits(cfg, tok)
        found |= norm_gaps(models, hooks.load_model(theta_u, cfg), splits, cfg)
        found["gradient of lam * l_vn"] = gradient_share(theta_u, splits, cfg)
    code = [evaluate.code_of("losses", "hooks", "data", "evaluate", "train"),
            evaluate.syntax_of(Path(__file__).read_text())]
    content = dict(weights=evaluate.content_of(str(run)), theta_u=evaluate.content_of(theta_u),
                   code=evaluate.digest(code)[:8])
    result = dict(run=record, content=content, time=time.time(), measures=found)
    evaluate.write(run / "measures.json", json.dumps(result, indent=1))
    hooks.say(json.dumps(found, indent=1))


if __name__ == "__main__":
    evaluate.entry(partial(main, *sys.argv[1:]))
