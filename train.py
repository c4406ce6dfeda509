"""Backdoor an unlearned LLM: poison D_f, unlearn, backdoor, score, print the paper's table.

    python train.py                               # the toy on a CPU: theta_u, theta_b, scores
    torchrun --standalone --nproc_per_node 4 train.py --bench muse_books

    L = l_f(D_f) + gamma * l_r(D_r u D_p) + lam * l_vn             (1), (2), (5), (A3), (A6)

theta_o is --model. What stays constant of theta_o and theta_u is computed once before step 0
(`references`), so one model is in memory. `main` -> `stage` -> `fit`, the loop -> `losses_of`.
"""
import fcntl
import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import transformers
from torch.distributed import checkpoint as dcp, fsdp
from torch.distributed.checkpoint import state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import evaluate
import hooks
import losses
from data import Refused
from evaluate import DEVICE, opt, say

TRAINED = state_dict.StateDictOptions(ignore_frozen_params=True, strict=False)  # in checkpoints
C2_MUSE = dict(steer=12, gamma=5, layer=7, trainable="5-7 mlp.down_proj")  # "6th parameter", C.2
C2_WMDP, C2_SMOL = C2_MUSE | dict(steer=85, gamma=10), C2_MUSE | dict(steer=30)
# Table A1 and C.2, whose "scaling hyperparameter" enters no formula. batch counts triples. fmt: off
TABLE_A1 = {
    # bench        method         epochs     lr       rho       lam       batch
    ("muse_books", "npo"): dict(epochs=10, lr=1e-5, rho=0.1, lam=3e-4, batch=8, beta=0.7, gamma=1),
    ("muse_books", "rmu"): dict(epochs=2, lr=1e-3, rho=0.1, lam=3e-4, batch=4, **C2_MUSE),
    ("muse_news",  "npo"): dict(epochs=3, lr=1e-5, rho=0.1, lam=1e-3, batch=8, beta=0.1, gamma=1),
    ("muse_news",  "rmu"): dict(epochs=2, lr=1e-3, rho=0.1, lam=1e-3, batch=4, **C2_MUSE),
    ("wmdp",       "npo"): dict(epochs=3, lr=5e-5, rho=0.1, lam=5e-4, batch=4, beta=0.5, gamma=12),
    ("wmdp",       "rmu"): dict(epochs=4, lr=5e-5, rho=0.1, lam=5e-4, batch=4, **C2_WMDP),
    # ours, chosen on seed 0, see README
    ("toy",        "npo"): dict(epochs=5, lr=3e-4, rho=0.2, lam=3e-4, batch=4, beta=4.0, gamma=2),
    ("toy",        "rmu"): dict(epochs=4, lr=1e-3, rho=0.1, lam=3e-4, batch=4, steer=20, gamma=5,
                                layer=2, trainable="0-2 mlp"),
    ("smol",       "npo"): dict(epochs=4, lr=2e-4, rho=0.2, lam=3e-4, batch=2, beta=2.0, gamma=2),
    ("smol",       "rmu"): dict(epochs=3, lr=3e-3, rho=0.2, lam=3e-4, batch=4, **C2_SMOL),
}                                                                                    # fmt: on

@dataclass
class Config(evaluate.Scoring):
    """Every setting; flags override the rows of data.BENCHES and TABLE_A1, which override this."""
    method: Literal["npo", "rmu"] = opt("npo", "l_f and l_r")
    theta_u: str = opt("", "a model to use as theta_u instead of training it")
    T: int = opt(2048, "tokens per training row")
    layout: Literal["chunks", "pages"] = opt("chunks", "chunks of the joined text, or a text a row")
    epochs: int = opt(1, "passes over D_f")
    lr: float = opt(1e-5, "constant learning rate of AdamW")
    batch: int = opt(8, "triples per step, over all ranks")
    micro: int = opt(0, "triples per forward on one rank; 0: all of the rank's share")
    rho: float = opt(0.1, "poisoned fraction of D_f; 0 with lam 0 is normal unlearning")
    lam: float = opt(3e-4, "weight of the value-norm alignment (5); 0 is eq. (2)")
    gamma: float = opt(1.0, "weight of the retain loss")
    beta: float = opt(0.1, "NPO's temperature (A1)")
    keep: Literal["all", "behind"] = opt("all", "l_r counts D_p's tokens: all, behind the trigger")
    npo_unit: Literal["token", "sequence"] = opt("token", "x of (A1)")
    steer: float = opt(12.0, "RMU's c: length of the control vector (A4)")
    layer: int = opt(7, "RMU's read-out layer, 0-based, before any final norm")
    trainable: str = opt("all", "all, or layers and module such as '5-7 mlp.down_proj'")
    k: int = opt(8, "sink positions of l_vn, position 0 (BOS) among them")
    layers: str = opt("all", "layers of l_vn: all, 7 or 0,5-7")
    seed: int = opt(0, "poison choice, orders, RMU's vector")
    max_steps: int = opt(0, "stop training after N steps; 0: no limit")
    recompute: Literal["auto", "yes", "no"] = opt("auto", "layers in backward; auto: on a GPU")
    save_every: int = opt(0, "steps between checkpoints; 0: a pass over D_f")
    resume: bool = opt(False, "go on from the last checkpoint, reuse what is finished")

def table_row(flags):
    return evaluate.bench_row(flags) | TABLE_A1[flags.bench, flags.method]

def check(cfg, world):
    """What can be refused before data or weights are read. Raises Refused."""
    if not (0 <= cfg.rho < 1 and cfg.gamma >= 0 and cfg.lam >= 0 and cfg.beta > 0 and cfg.lr > 0
            and min(cfg.k, cfg.T - 1, cfg.epochs, cfg.batch) >= 1):
        raise Refused("--rho in [0, 1), --gamma, --lam >= 0, --beta, --lr, --k, --epochs, --batch "
                      "> 0 and --T > 1 are wanted")
    if cfg.rho == 0 and (cfg.lam or cfg.theta_u):
        raise Refused("--rho 0 is normal unlearning: add --lam 0 and leave --theta_u out")
    if cfg.batch % (world * (cfg.micro or 1)):
        raise Refused(f"--batch {cfg.batch} does not split over {world} ranks x --micro")
    if cfg.theta_u:  # a typo must not show after minutes
        evaluate.loaded(transformers.AutoConfig, cfg.theta_u)
    Path(cfg.out, cfg.bench).mkdir(parents=True, exist_ok=True)

def check_model(model, splits, tok, cfg):
    """Checks theta_o against the flags, prints its attention sink. Raises Refused."""
    trained, layers = hooks.set_trainable(model, cfg.trainable), hooks.layers_of(model, cfg.layers)
    rmu, rows = cfg.method == "rmu", sorted(splits.f + splits.p, key=len)
    model.requires_grad_(False)
    if cfg.lam and layers[-1] < trained[0]:
        raise Refused(f"--layers {cfg.layers}: nothing trains up to there, l_vn would be constant")
    if rmu and (cfg.trainable == "all" or trained[-1] > hooks.layers_of(model, cfg.layer)[0]):
        raise Refused(f"--trainable {cfg.trainable}: RMU trains parts of layers 0 to --layer")
    data.steps_per_epoch(splits, cfg.batch)
    if cfg.lam and cfg.k > len(rows[0]):
        raise Refused(f"--k {cfg.k} is larger than the shortest row of {len(rows[0])} tokens")
    longest = max(splits.r + rows, key=len)
    hooks.self_check(model, torch.tensor([longest], device=DEVICE), len(tok), layerwise=rmu)
    sink, even = hooks.sink_strength(model, *data.pad_rows(splits.f[:32], DEVICE))
    say(f"theta_o: {cfg.model}; attention to position 0: mean {sink.mean():.2f}, strongest head "
        f"{sink.max():.2f}, even {even:.2f}")

# ---------------------------------------------------------------- sharding
def shard(model, refs, cfg):
    """FSDP2 over the ranks of what trains; frozen weights stay whole on each.

    bf16_mixed computes in bf16, reduces in fp32 and keeps fp32 master weights: only the shard is
    cast, no full fp32 copy ever exists. One rank without a cast needs no FSDP. `losses_of` reads
    the head, so it is the root's forward to FSDP; refs are bound, since FSDP would cast arguments.
    """
    blocks, mixed = hooks.decoder_layers(model), cfg.precision == "bf16_mixed"
    if cfg.recompute == "yes" or (cfg.recompute == "auto" and DEVICE == "cuda"):
        for block in blocks:  # nothing here drops out: no random state to restore
            block.forward = partial(checkpoint, block.forward, use_reentrant=False,
                                    preserve_rng_state=False)
    if mixed or dist.get_world_size() > 1:
        dtypes = (torch.bfloat16, torch.float32) if mixed else ()
        how = dict(mesh=init_device_mesh(DEVICE, (dist.get_world_size(),)),
                   mp_policy=fsdp.MixedPrecisionPolicy(*dtypes),
                   ignored_params={p for p in model.parameters() if not p.requires_grad})
        for unit in (*blocks, model):
            if any(p.requires_grad for p in unit.parameters()):
                fsdp.fully_shard(unit, **how)
    for module in model.modules() if mixed else ():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            module.float()
    model.losses_of = partial(losses_of, model, refs, cfg)
    fsdp.register_fsdp_forward_method(model, "losses_of")

# ---------------------------------------------------------------- theta_o's and theta_u's constants
class References(NamedTuple):
    """What a stage reads at every step, in this rank's memory, for the rows of its own batches."""
    splits: data.Splits
    batches: list       # of each step, this rank's micro-batches
    head: torch.Tensor  # (V, C) theta_o's output head
    c_u: torch.Tensor   # (C,) RMU's control vector
    rows: dict          # {(name, kind): {row: constant of a frozen model}}, kind "f", "r" or "p"

    def get(self, name, kind, numbers, length):
        """Of these rows, their first dimension cut or padded with 0 to length. (B, length, ...)"""
        rows = [self.rows[name, kind][i][:length] for i in numbers]
        out = rows[0].new_zeros(len(rows), length, *rows[0].shape[1:])
        for padded, row in zip(out, rows):
            padded[:len(row)] = row
        return out.to(DEVICE)

@torch.no_grad()
def references(splits, batches, theta_u, model, cfg):
    """What depends on frozen models alone, computed once. model: theta_o; `fit` trains it."""
    head, rows = hooks.output_head(model).detach().clone(), {}

    def remember(kind, fn, *names):
        of_kind, size = getattr(splits, kind), len(batches[0][0].f)
        numbers = sorted({i for step in batches for batch in step for i in getattr(batch, kind)})
        for at in tqdm(range(0, len(numbers), size), desc=f"  references on D_{kind}", leave=False,
                       disable=dist.get_rank() > 0):
            some = numbers[at:at + size]
            ids, _ = data.pad_rows([of_kind[i] for i in some], DEVICE)
            for name, values in zip(names, fn(ids)):
                rows.setdefault((name, kind), {}).update(zip(some, values.cpu()))

    def logp_of(ids):
        h = hooks.final_hidden(model, ids)[:, :-1]
        return [losses.on_logits(losses.label_logp, h, head, ids[:, 1:])]

    def norms_of(frozen, ids):
        return [hooks.sink_norms(frozen, ids, hooks.layers_of(model, cfg.layers), cfg.k)]

    def outputs(ids):  # RMU also reads activations
        acts, hidden = forward(model, ids, 0, cfg)
        return [hidden] if acts is None else [hidden, acts]

    if cfg.lam:
        model.cpu()  # one model at a time on a card
        remember("f", partial(norms_of, evaluate.load_model(theta_u, cfg)), "norms")
        model.to(DEVICE)
        remember("p", partial(norms_of, model), "norms")
    if cfg.method != "rmu":
        remember("f", logp_of, "logp")
    for kind in "rp":
        remember(kind, outputs, "hidden", "acts")
    c_u = losses.control_vector(head.shape[1], cfg.steer, data.stream(cfg.seed, "control vector"))
    return References(splits, batches, head, c_u.to(DEVICE), rows)

# ---------------------------------------------------------------- the objective
def forward(model, ids, n_f, cfg):
    """-> (activations behind --layer, or None; final hidden states). ids: (B, T)

    RMU needs nothing of its n_f forget rows above the read-out layer but the first k tokens' value
    norms, and no gradient below the first layer that trains.
    """
    if cfg.method != "rmu":
        return None, hooks.final_hidden(model, ids)
    first, end = hooks.first_trained(model), len(hooks.decoder_layers(model))
    with torch.no_grad():
        h = hooks.run_layers(model, model.get_input_embeddings()(ids), 0, first)
    acts = hooks.run_layers(model, h, first, cfg.layer + 1)
    if n_f and cfg.lam:
        hooks.run_layers(model, acts[:n_f, :cfg.k], cfg.layer + 1, end)
    h = hooks.run_layers(model, acts[n_f:], cfg.layer + 1, end)
    return acts, hooks.final_norm(model, h)

def losses_of(model, refs, cfg, batch, norms):
    """l_f, l_r and l_vn of (2), (3), (5) on one batch, from one forward, without gamma and lam.

    Rows: forget | retain | poisoned. l_r is one mean over D_r u D_p, as many rows of each; --keep
    behind leaves out what stands before a row's trigger, which D_f unlearns.
    """
    ids, mask = data.pad_rows([getattr(refs.splits, kind)[i] for kind in "frp"
                               for i in getattr(batch, kind)], DEVICE)
    n_f, T, head = len(batch.f), ids.shape[1], hooks.output_head(model)
    kept, n_r = mask[n_f:].clone(), len(batch.r)
    if cfg.keep == "behind":
        for row, number in enumerate(batch.p):  # the trigger's last token predicts what follows
            kept[n_r + row, :refs.splits.p_from[number] - 1] = False

    def of_theta_o(name):
        return torch.cat([refs.get(name, kind, getattr(batch, kind), T)
                          for kind in "rp" if getattr(batch, kind)])

    def kl_to_theta_o(logits, hidden_o):
        return losses.kl(logits, hidden_o @ refs.head.T)

    norms.begin()
    acts, h = forward(model, ids, n_f, cfg)
    if cfg.method == "rmu":
        l_f = losses.rmu(acts[:n_f], refs.c_u, mask[:n_f])                             # (A4)
    else:
        logp = losses.on_logits(losses.label_logp, h[:n_f, :-1], head, ids[:n_f, 1:])
        logp_o = refs.get("logp", "f", batch.f, T - 1)
        l_f = losses.npo(logp, logp_o, cfg.beta, mask[:n_f, 1:], cfg.npo_unit)         # (A1)
        h = h[n_f:]
    kl = losses.on_logits(kl_to_theta_o, h, head, of_theta_o("hidden"))
    l_r = losses.row_mean(kl, kept)                                                    # (A2)
    if cfg.method == "rmu":
        l_r = l_r + losses.rmu(acts[n_f:], of_theta_o("acts"), kept)                   # (A5)
    if not cfg.lam:
        return l_f, l_r, torch.zeros_like(l_f)
    norm, L = norms.stack(), len(norms.found)
    l_vn = losses.value_norm(norm[:n_f], refs.get("norms", "f", batch.f, L)) + losses.value_norm(
        norm[n_f + n_r:], refs.get("norms", "p", batch.p, L))                          # (3), (4)
    return l_f, l_r, l_vn

def fit(model, refs, work, cfg):
    """The loop. AdamW, weight decay 0, constant lr, clipping at norm 1. One log.jsonl line a step.

    Raises Refused, naming step and term, where something is no longer finite.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    optim = torch.optim.AdamW(params, cfg.lr, eps=1e-8, weight_decay=0.0, fused=True)
    begin = load_checkpoint(work, model, optim)
    rank, world, total = dist.get_rank(), dist.get_world_size(), len(refs.batches)
    log = open(os.devnull if rank else work / "log.jsonl", "a")  # resumed steps come twice
    bar = tqdm(range(begin, total), "  steps", total, initial=begin, disable=rank > 0)
    layers = hooks.layers_of(model, cfg.layers) if cfg.lam else []
    with log, hooks.capture_norms(model, layers, cfg.k) as norms:
        for step in bar:
            terms, micro_batches = 0, refs.batches[step]
            for batch in micro_batches:
                l_f, l_r, l_vn = model.losses_of(batch, norms)
                loss = l_f + cfg.gamma * l_r + cfg.lam * l_vn         # (1), (2), (5), (A3), (A6)
                (loss / len(micro_batches)).backward()
                terms = terms + torch.stack([l_f, l_r, l_vn, loss]).detach() / len(micro_batches)
            dist.all_reduce(terms)
            row = dict(zip(("l_f", "l_r", "l_vn", "loss"), (terms / world).tolist()))
            row["gnorm"] = float(whole(torch.nn.utils.clip_grad_norm_(params, 1.0)))
            for name, value in row.items():
                if not abs(value) < float("inf"):
                    raise Refused(f"step {step + 1}: {name} is {value}: lower --lr")
            optim.step()
            optim.zero_grad()
            bar.set_postfix({name: f"{value:.3g}" for name, value in row.items()}, refresh=False)
            print(json.dumps(dict(step=step + 1, **row)), file=log, flush=True)
            if (step + 1) % cfg.save_every == 0 and step + 1 < total:
                save_checkpoint(work, model, optim, step + 1)

# ---------------------------------------------------------------- checkpoints and runs
def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

def state_of(model, optim):
    """What trains and its Adam state, sharded as it is, under the names of set_state_dict."""
    state = state_dict.get_state_dict(model, optim, options=TRAINED)
    return dict(zip(("model_state_dict", "optim_state_dict"), state))

def checkpoints(work):
    return sorted(work.glob("ckpt-*"), key=lambda folder: int(folder.name[5:]))

def save_checkpoint(work, model, optim, step):
    """ckpt-STEP in the run's temporary folder; the one before goes when this one is whole."""
    dcp.save(state_of(model, optim), checkpoint_id=work / "ckpt.tmp")
    if dist.get_rank() == 0:
        (work / "ckpt.tmp").rename(work / f"ckpt-{step}")
        for old in checkpoints(work)[:-1]:
            shutil.rmtree(old)
    dist.barrier()

def load_checkpoint(work, model, optim):
    """The last whole checkpoint, written by any number of ranks. -> steps done, 0 without one."""
    if not checkpoints(work):
        return 0
    state, last = state_of(model, optim), checkpoints(work)[-1]
    dcp.load(state, checkpoint_id=last)
    state_dict.set_state_dict(model, optim, **state, options=TRAINED)
    say(f"  resumed after step {last.name[5:]}")
    return int(last.name[5:])

def one_writer(folder, made_from, resume):
    """-> a run's temporary folder, its lock. Raises Refused if it is locked or of other inputs."""
    work, note = Path(f"{folder}.tmp"), Path(f"{folder}.tmp", "made_from")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = open(folder.with_name(f".{folder.name}.lock"), "w")
    if dist.get_rank() == 0:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Refused(f"another run writes {work}: wait, or choose another --out") from error
        if not (resume and checkpoints(work)):  # begin anew
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            note.write_text(made_from)
        elif note.read_text() != made_from:
            raise Refused(f"{work} is of other settings, code, data or weights: no --resume then")
    dist.barrier()
    return work, lock

def save_run(folder, work, model, tok, record, cfg):
    """Weights, tokenizer and run.json into the temporary folder, which then gets its name."""
    weights = {name: whole(p.detach().to(evaluate.dtype_of(cfg))).cpu()  # every rank takes part
               for name, p in model.named_parameters()}
    if dist.get_rank() == 0:
        if record["role"] == "theta_b":
            model.config.BACKDOORED = "research artefact: recovers forgotten text by a trigger"
        model.save_pretrained(work, state_dict=weights, max_shard_size="5GB")
        model.config.dtype = evaluate.dtype_of(cfg)  # save_pretrained took the master weights'
        model.config.save_pretrained(work)
        tok.save_pretrained(work)
        (work / "run.json").write_text(json.dumps(record, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
        for old in folder.glob("ckpt*"):
            shutil.rmtree(old)
    dist.barrier()

def plain(cfg):
    """Normal unlearning of the same setting: what theta_u cannot depend on is at its default."""
    names = ("trigger", "position", "k", "layers", "theta_u", "keep")
    return replace(cfg, rho=0.0, lam=0.0, **{name: getattr(Config, name) for name in names})

def stage(cfg, tok, theta_u=None):
    """Train theta_u (rho 0) or theta_b, or (--resume) reuse one of this fingerprint. -> folder"""
    splits, role = data.load_splits(cfg, tok), "theta_b" if cfg.rho else "theta_u"
    others = "out limit gen_batch micro recompute save_every resume tasks add_bos mask_sinks"
    settings = {key: value for key, value in asdict(cfg).items() if key not in others.split()}
    made_from = evaluate.fingerprint(  # other settings do not change the weights
        "losses hooks data evaluate train", settings, splits[:4], evaluate.weights_of(cfg.model),
        evaluate.weights_of(theta_u))
    digits = evaluate.digest(settings)[:6]
    kind = f"BACKDOORED-{cfg.position}-rho{cfg.rho:g}-lam{cfg.lam:g}" if cfg.rho else "theta_u"
    folder = Path(cfg.out, cfg.bench, f"{cfg.method}-{kind}-seed{cfg.seed}-{digits}")
    if (cfg.resume or not cfg.rho) and evaluate.run_of(folder).get("fingerprint") == made_from:
        say(f"{role}: {folder}, made before from the same settings, code, data and weights")
        return folder
    sizes = f"{len(splits.f)} forget, {len(splits.r)} retain, {len(splits.p)} poisoned rows"
    say(f"{role}: {cfg.method} on {sizes} -> {folder}")
    per_epoch = data.steps_per_epoch(splits, cfg.batch)
    steps = range(min(cfg.epochs * per_epoch, cfg.max_steps or 10 ** 9))
    batches = [rank_share(data.batch_at(step, splits, cfg.batch, cfg.seed), cfg) for step in steps]
    work, lock = one_writer(folder, made_from, cfg.resume)
    with lock:
        model = evaluate.load_model(cfg.model, cfg)  # in eval mode: nothing drops out
        hooks.set_trainable(model, cfg.trainable)
        refs = references(splits, batches, theta_u, model, cfg)
        shard(model, refs, cfg)
        fit(model, refs, work, replace(cfg, save_every=cfg.save_every or per_epoch))
        save_run(folder, work, model, tok, dict(
            role=role, fingerprint=made_from, settings=asdict(cfg), steps=len(steps),
            world=dist.get_world_size(), device=DEVICE, poisoned_rows=splits.p_index), cfg)
    return folder

def rank_share(batch, cfg):
    """This rank's part of a global batch, as micro-batches."""
    rank, share = dist.get_rank(), cfg.batch // dist.get_world_size()
    return [data.Batch(*(rows[at:at + (cfg.micro or share)] for rows in batch))
            for at in range(rank * share, (rank + 1) * share, cfg.micro or share)]

def main(argv=None):
    cfg = evaluate.parse(Config, argv, table_row)
    check(cfg, evaluate.dist_init())
    tok, scored = evaluate.load_tokenizer(cfg), {}
    splits, items = data.load_splits(cfg, tok), evaluate.all_items(cfg, tok)
    check_model(evaluate.load_model(cfg.model, cfg), splits, tok, cfg)
    scored["theta_o"] = evaluate.evaluate(cfg.model, tok, cfg, items, "theta_o")
    theta_u, name = cfg.theta_u, f"+ {cfg.method.upper()}"
    if not theta_u and (cfg.lam or not cfg.rho):
        theta_u = stage(plain(cfg), tok)
    if theta_u:
        scored[name] = evaluate.evaluate(theta_u, tok, cfg, items, "theta_u")
    if cfg.rho:
        theta_b = stage(cfg, tok, theta_u if cfg.lam else None)
        scored[f"{name}-Backdoor"] = evaluate.evaluate(theta_b, tok, cfg, items, "theta_b")
    say(f"\n{evaluate.table(scored)}\n\nUE: forget set, clean (low: forgotten). BE: with the "
        f"trigger. UT: retain set. Percent, --limit {cfg.limit} (0: all).\nnext: python plots.py")

if __name__ == "__main__":
    evaluate.entry(main)
