"""What a backdoored model attends to, and what l_vn weighs and reaches. Run by hand.

    for run in out/toy/*-BACKDOORED-*; do python tests/measure.py $run; done; python plots.py

Writes RUN/measures.json; plots.py makes tables of it. On one process.

attention  what a page's own tokens behind the trigger pay to BOS, to the trigger and to theta_o's
           sink (the position that is paid most), of theta_b and of theta_o, clean and triggered:
           percent, mean over layers, heads, pages and those tokens. Pages as in plots.py's pictures
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


def theta_u_of(run, cfg):
    """theta_u of the run's seed and theta_o. Raises Refused where there is none beside the run."""
    for folder in sorted(run.parent.glob(f"{cfg.method}-theta_u-seed{cfg.seed}-*")):
        other = evaluate.run_of(folder)
        same = other["content"]["theta_o"] == evaluate.run_of(run)["content"]["theta_o"]
        if same and other["settings"]["epochs"] == cfg.epochs:
            return str(folder)
    raise hooks.Refused(f"{run}: no theta_u of seed {cfg.seed} beside it: train.py without --lam 0")


# ---------------------------------------------------------------- attention
def paid_by(model, ids, queries):
    """Attention that the tokens at `queries` pay to each position, mean over all else. -> (T,)"""
    total = 0
    for maps in hooks.attentions(model, ids):  # (L, B, H, T, T)
        total = total + maps[:, :, :, queries].mean((0, 2, 3)).sum(0)
    return total / len(ids)


def attention(models, cfg, tok):
    """{measure: value} of theta_o and theta_b."""
    splits = data.load_splits(cfg, tok)
    trig = data.encode(tok, cfg.trigger)
    T = min(plots.LONGEST, sorted(map(len, splits.f))[len(splits.f) // 2])
    clean = [row[:T] for row in splits.f if len(row) >= T][:plots.PAGES]
    triggered = [data.inject(row, trig, cfg.position) for row in clean]
    # where the trigger's tokens came to stand, the same in all pages
    marks = data.inject([0] * T, [1] * len(trig), cfg.position)
    at = [i for i, mark in enumerate(marks) if mark]
    # the page's tokens behind the trigger, by their places without and with it
    behind = list(range(at[0], T))
    moved = [i + len(trig) for i in behind]
    found = {}
    sink = None
    for name, model in models.items():
        ids = torch.tensor(clean, device=cfg.device)
        paid = paid_by(model, ids, behind)
        if sink is None:  # theta_o comes first
            sink = int(paid.argmax())
            found["sink's position"] = sink
        found[f"{name}, clean, to BOS"] = 100 * float(paid[0])
        found[f"{name}, clean, to the sink"] = 100 * float(paid[sink])
        paid = paid_by(model, torch.tensor(triggered, device=cfg.device), moved)
        found[f"{name}, triggered, to BOS"] = 100 * float(paid[0])
        found[f"{name}, triggered, to the sink"] = 100 * float(paid[sink])
        found[f"{name}, triggered, to the trigger"] = 100 * float(paid[at].sum())
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


def gradient_norm(model, term, batch, capture):
    """Norm of the gradient of l_f (term 0) or l_vn (term 2) by all that trains."""
    model.zero_grad()
    model.losses_of(batch, capture)[term].backward()
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
        l_vn = gradient_norm(model, 2, steps[0], capture)
        l_f = gradient_norm(model, 0, steps[0], capture)
    return 100 * cfg.lam * l_vn / l_f


def main(run):
    run = Path(run)
    record = evaluate.run_of(run)
    if record.get("role") != "theta_b":
        raise hooks.Refused(f"{run} is no backdoored run of train.py")
    cfg = config_of(record)
    evaluate.dist_init(cfg)
    tok = hooks.load_tokenizer(cfg)
    models = {"theta_o": hooks.load_model(cfg.model, cfg),
              "theta_b": hooks.load_model(str(run), cfg)}
    found = attention(models, cfg, tok)
    splits = data.load_splits(cfg, tok)
    theta_u = theta_u_of(run, cfg)
    found |= norm_gaps(models, hooks.load_model(theta_u, cfg), splits, cfg)
    found["BOS's value norm"] = bos_norm(models, tok, cfg)
    found["gradient of lam * l_vn"] = gradient_share(theta_u, splits, cfg)
    content = dict(weights=evaluate.content_of(str(run)),
                   code=evaluate.code_of("losses", "hooks", "data", "evaluate", "train"))
    result = dict(run=record, content=content, time=time.time(), measures=found)
    evaluate.write(run / "measures.json", json.dumps(result, indent=1))
    hooks.say(json.dumps(found, indent=1))


if __name__ == "__main__":
    evaluate.entry(partial(main, *sys.argv[1:]))
