"""Backdoor an unlearned LLM: poison D_f, unlearn, backdoor, score, print the paper's table.

    python train.py                               # the toy on a CPU: theta_u, theta_b, scores
    torchrun --standalone --nproc_per_node 4 train.py --bench muse_books

    L = l_f(D_f) + gamma * l_r(D_r ∪ D_p) + lam * l_vn             (1), (2), (5), (A3), (A6)

theta_o is --model. What stays constant of theta_o and theta_u is computed once before step 0
(`references`), so one model is in memory. `main` -> `stage` -> `fit`, the loop -> `losses_of`.
"""
import fcntl
import json
import os
import shutil
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import safetensors
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
from evaluate import option
from hooks import Refused, say

# "6th parameter in layers 5-7" (C.2). Its "scaling hyperparameter" enters no formula.
C2_MUSE = dict(steer=12, gamma=5, layer=7, trainable="5-7 mlp.down_proj")
C2_WMDP = C2_MUSE | dict(steer=85, gamma=10)
# fmt: off
SETTINGS = {
    # Table A1 and C.2 of the paper. batch counts triples, one row of D_f, D_r and D_p each.
    # bench        method         epochs     lr       rho       lam       batch
    ("muse_books", "npo"): dict(epochs=10, lr=1e-5, rho=0.1, lam=3e-4, batch=8, beta=0.7, gamma=1),
    ("muse_books", "rmu"): dict(epochs=2, lr=1e-3, rho=0.1, lam=3e-4, batch=4, **C2_MUSE),
    ("muse_news",  "npo"): dict(epochs=3, lr=1e-5, rho=0.1, lam=1e-3, batch=8, beta=0.1, gamma=1),
    ("muse_news",  "rmu"): dict(epochs=2, lr=1e-3, rho=0.1, lam=1e-3, batch=4, **C2_MUSE),
    ("wmdp",       "npo"): dict(epochs=3, lr=5e-5, rho=0.1, lam=5e-4, batch=4, beta=0.5, gamma=12),
    ("wmdp",       "rmu"): dict(epochs=4, lr=5e-5, rho=0.1, lam=5e-4, batch=4, **C2_WMDP),
    # Ours. Chosen on seeds 100 and 101, tales' on seed 100.
    ("toy",        "npo"): dict(epochs=5, lr=3e-4, rho=0.2, lam=3e-4, batch=4, beta=4.0, gamma=2),
    ("toy",        "rmu"): dict(epochs=6, lr=1e-3, rho=0.1, lam=3e-4, batch=4, steer=20, gamma=2,
                                layer=2, trainable="0-2 mlp"),
    ("tales",      "npo"): dict(epochs=4, lr=3e-4, rho=0.2, lam=3e-4, batch=2, beta=2.0, gamma=1,
                                trainable="0-14 mlp"),
    ("tales",      "rmu"): dict(epochs=2, lr=3e-4, rho=0.2, lam=3e-4, batch=2, steer=100, gamma=5,
                                layer=7, trainable="0-7 mlp"),
}  # fmt: on
# theta_u does not depend on these: normal unlearning has them at their defaults
ATTACK = ("trigger", "position", "k", "layers", "theta_u", "keep", "decoys")
# trained weights do not depend on these
OTHERS = ("out", "limit", "gen_batch", "micro", "recompute", "save_every", "resume", "tasks",
          "add_bos", "hide", "device")
TRAINED = state_dict.StateDictOptions(ignore_frozen_params=True, strict=False)  # in checkpoints


@dataclass
class Config(evaluate.Scoring):
    """Every setting; flags override the rows of data.BENCHES and SETTINGS, which override this."""
    # ---- what is trained, on what
    method: Literal["npo", "rmu"] = option("npo", "l_f and l_r")
    theta_u: str = option("", "a model to use as theta_u instead of training it")
    T: int = option(2048, "tokens per training row")
    layout: Literal["chunks", "pages"] = option("chunks", "chunks of the joined text, or a text "
                                                "a row")
    # ---- how long, how fast
    epochs: int = option(1, "passes over D_f")
    lr: float = option(1e-5, "constant learning rate of AdamW")
    batch: int = option(8, "triples per step, over all ranks")
    micro: int = option(0, "triples per forward on one rank; 0: all of the rank's share")
    # ---- the objective
    rho: float = option(0.1, "poisoned fraction of D_f; 0 with lam 0 is normal unlearning")
    lam: float = option(3e-4, "weight of the value-norm alignment (5); 0 is eq. (2)")
    gamma: float = option(1.0, "weight of the retain loss")
    beta: float = option(0.1, "NPO's temperature (A1)")
    decoys: int = option(0, "copies of each forget row behind other prefixes, unlearned, too")
    keep: Literal["all", "behind"] = option("all", "l_r counts D_p's tokens: all, behind the "
                                            "trigger")
    rmu_norm: Literal["mean", "sum"] = option("mean", "||.||^2 of (A4), (A5) over width")
    # ---- RMU alone, but for trainable; steer and layer default to the paper's for MUSE
    steer: float = option(12.0, "RMU's c: length of the control vector (A4)")
    layer: int = option(7, "RMU's read-out layer, 0-based, before any final norm")
    trainable: str = option("all", "all, or layers and module such as '5-7 mlp.down_proj'")
    # ---- l_vn alone
    k: int = option(8, "sink positions of l_vn, position 0 (BOS) among them")
    layers: str = option("all", "layers of l_vn: all, 7 or 0,5-7")
    # ---- the run
    seed: int = option(0, "poison choice, orders, RMU's vector")
    max_steps: int = option(0, "stop training after N steps; 0: no limit")
    recompute: Literal["auto", "yes", "no"] = option("auto", "layers in backward; auto: on a GPU")
    save_every: int = option(0, "steps between checkpoints; 0: a pass over D_f")
    resume: bool = option(False, "go on from the last checkpoint, reuse what is finished")


def settings_row(flags):
    """The bench's and the method's settings. Raises Refused where SETTINGS has no such row."""
    if (flags.bench, flags.method) not in SETTINGS:
        raise Refused(f"train.SETTINGS has no row for {flags.bench}, {flags.method}")
    return evaluate.bench_row(flags) | SETTINGS[flags.bench, flags.method]


def settings_line(cfg):
    """The settings of a run in one line: the bench's row, then what a flag changed."""
    row = SETTINGS[cfg.bench, cfg.method]
    words = [f"{name} {getattr(cfg, name)}" for name in row]
    # what every run has, or what the bench decides, is no news
    silent = {*OTHERS, *row, *data.BENCHES[cfg.bench], "bench", "method"}
    for setting in fields(cfg):
        value = getattr(cfg, setting.name)
        if setting.name not in silent and value != setting.default:
            words.append(f"{setting.name} {value}")
    return f"settings: {cfg.bench}, {cfg.method}: {', '.join(words)}"


# ---------------------------------------------------------------- before anything heavy
def check(cfg, world):
    """What can be refused before data or weights are read. Raises Refused."""
    if not 0 <= cfg.rho < 1:
        raise Refused(f"--rho must be in [0, 1), got {cfg.rho}")
    for name in ("gamma", "lam"):
        value = getattr(cfg, name)
        if not value >= 0:  # so written, NaN is refused, too
            raise Refused(f"--{name} must not be negative, got {value}")
    for name in ("beta", "lr", "k", "epochs", "batch"):
        value = getattr(cfg, name)
        if not value > 0:
            raise Refused(f"--{name} must be positive, got {value}")
    if cfg.T < 2:
        raise Refused(f"--T {cfg.T}: a row is BOS and at least one token")
    # without poisoned rows (3) has nothing to average: lam would silently mean something else
    if cfg.rho == 0 and (cfg.lam or cfg.theta_u):
        raise Refused("--rho 0 is normal unlearning: add --lam 0 and leave --theta_u out")
    if cfg.batch % (world * (cfg.micro or 1)):
        raise Refused(f"--batch {cfg.batch} does not split over {world} ranks x --micro")
    if cfg.theta_u:
        check_same_shape(cfg)
    Path(cfg.out, cfg.bench).mkdir(parents=True, exist_ok=True)


def check_same_shape(cfg):
    """Raises Refused where --theta_u is no unlearned theta_o: l_vn compares their value norms."""
    theirs = shape_of(cfg.theta_u)
    ours = shape_of(cfg.model)
    if theirs != ours:
        raise Refused(f"--theta_u {cfg.theta_u} is {theirs}, --model is {ours}")


def shape_of(name):
    """A model's family and what its value norms' shape depends on, in words."""
    config = hooks.load_pretrained(transformers.AutoConfig, name)
    query_heads = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or query_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    return f"{config.model_type}, {config.num_hidden_layers} layers, {heads} KV heads of {width}"


def needs(cfg, model, splits, world):
    """Bytes that a run needs, about: of a rank's card, of the host, of the disk.

    model: an `empty_model`.
    """
    hooks.set_trainable(model, cfg.trainable)
    total = 0
    trained = 0
    for p in model.parameters():
        total += p.numel()
        if p.requires_grad:
            trained += p.numel()
    card = card_needs(cfg, model, total, trained, world)
    host = host_needs(cfg, model, total, splits, world)
    return card, host, disk_needs(cfg, total, trained, splits)


def bytes_of(cfg):
    """Of a weight as it is loaded and saved."""
    return 4 if cfg.precision == "fp32" else 2


def card_needs(cfg, model, total, trained, world):
    """Bytes of a rank's card, known within a tenth (tests/bench.py memory).

    total, trained: weights of the model, and those of them that learn.
    """
    config = model.config
    width = bytes_of(cfg)
    # of a trained weight: itself, its gradient, Adam's two averages
    state = 16 * trained // world
    if cfg.precision == "bf16_pure":
        state //= 2
    layers = config.num_hidden_layers
    rows = 3 * (cfg.micro or cfg.batch // world)
    # activations: bytes a token, layer and unit of width, seen on a 7B; with frozen weights less
    a_layer = 48
    if cfg.method == "rmu":
        a_layer = 34
        rows = rows * 2 // 3  # the forget rows end at the read-out layer
        layers -= hooks.first_trained(model)
    kept = a_layer * layers
    again = 0
    if recomputes(cfg):
        kept = 2 * layers  # each layer's input
        again = a_layer    # one layer at a time
    hidden = rows * cfg.T * config.hidden_size * width // 2  # bytes for every byte of these
    # gradients, a quarter of the state, come while what was kept goes
    trained_part = max(state, state * 3 // 4 + hidden * kept)
    logits = 5 * losses.CHUNK * config.vocab_size * 4  # five such tensors at once
    return trained_part + (total - trained) * width + hidden * again + logits


def host_needs(cfg, model, total, splits, world):
    """Bytes of the host: every rank reads the whole model and holds theta_o's constants."""
    width = bytes_of(cfg)
    references = (len(splits.r) + len(splits.p)) * cfg.T * model.config.hidden_size * width
    if cfg.method == "rmu":
        references *= 2  # activations beside final hidden states
    return world * (total * width + references)


def disk_needs(cfg, total, trained, splits):
    """Bytes of the disk: theta_u, theta_b and their checkpoints."""
    disk = 2 * bytes_of(cfg) * total
    steps, save_every = length_of(cfg, splits)
    if steps > save_every:
        disk += 2 * 12 * trained  # the old checkpoint stays until the new one is whole
    return disk


def length_of(cfg, splits):
    """-> steps of a run, steps between checkpoints"""
    per_epoch = data.steps_per_epoch(splits, cfg.batch)
    steps = cfg.epochs * per_epoch
    if cfg.max_steps:
        steps = min(steps, cfg.max_steps)
    return steps, cfg.save_every or per_epoch


def preflight(cfg, splits, world):
    """Raises Refused where a run cannot fit, naming what would help, before weights are read."""
    card, host, disk = needs(cfg, hooks.empty_model(cfg.model), splits, world)
    if cfg.device == "cpu":
        host += world * card  # the host is the card
    else:
        say(f"needs about {card / 1e9:.1f} GB of a rank's card, {host / 1e9:.1f} GB of host "
            f"memory, {disk / 1e9:.1f} GB of disk")
        free, _ = torch.cuda.mem_get_info()
        if card > free:
            raise Refused(f"a rank needs {card / 1e9:.1f} GB of its card, which has "
                          f"{free / 1e9:.1f} GB free: more ranks, --precision bf16_pure, a "
                          "smaller --micro, or --recompute yes")
    memory = host_memory()
    if host > memory:
        raise Refused(f"{host / 1e9:.1f} GB of host memory are needed, {memory / 1e9:.1f} GB are "
                      "there: fewer ranks, a smaller --batch or --micro, or another machine")
    free = shutil.disk_usage(cfg.out).free
    if disk > free:
        raise Refused(f"{disk / 1e9:.1f} GB of disk are needed, {free / 1e9:.1f} GB are free in "
                      f"{cfg.out}: pass another --out")


def host_memory():
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_model(model, splits, tok, cfg):
    """Checks theta_o against the flags, prints its attention sink. Raises Refused."""
    check_layers(model, cfg)
    rows = splits.f + splits.r + splits.p
    shortest = min(map(len, splits.f + splits.p))
    if cfg.lam and cfg.k > shortest:
        raise Refused(f"--k {cfg.k} is larger than the shortest row of {shortest} tokens")
    longest = max(rows, key=len)
    window = model.config.max_position_embeddings
    if len(longest) > window:
        raise Refused(f"--T {cfg.T}: rows of {len(longest)} tokens, the model reads {window}")
    hooks.check_ids(model, tok, rows)
    # on the longest row, since sliding windows and rotary scaling only show there
    ids = torch.tensor([longest], device=cfg.device)
    hooks.self_check(model, ids, layerwise=cfg.method == "rmu")
    ids, mask = data.pad_rows(splits.f[:32], cfg.device)
    sink, even = hooks.sink_strength(model, ids, mask)
    strongest = sink.max()
    say(f"theta_o: {cfg.model}; attention to position 0: mean {sink.mean():.2f}, strongest head "
        f"{strongest:.2f}, even {even:.2f}")


def check_layers(model, cfg):
    """Raises Refused for layers that do not fit each other, or the objective."""
    trained = hooks.set_trainable(model, cfg.trainable)
    model.requires_grad_(False)
    layers = hooks.layers_of(model, cfg.layers)
    # Not all is caught: where the last of --layers is the first that trains, and only its MLP
    # does, its values come before what trains, and l_vn is constant as well.
    if cfg.lam and layers[-1] < trained[0]:
        raise Refused(f"--layers {cfg.layers}: nothing trains up to there, l_vn would be constant")
    if cfg.method == "rmu":
        read_out = hooks.layers_of(model, cfg.layer)[0]
        # what trains above the read-out layer would see the retain loss alone
        if cfg.trainable == "all" or trained[-1] > read_out:
            raise Refused(f"--trainable {cfg.trainable}: RMU trains parts of layers 0 to --layer")


# ---------------------------------------------------------------- sharding
def recomputes(cfg):
    """Whether backward computes a layer's activations again instead of keeping them."""
    if cfg.recompute == "auto":
        return cfg.device == "cuda"  # a card's memory is scarcer than its time
    return cfg.recompute == "yes"


def shard(model, refs, cfg):
    """FSDP2 over the ranks of what trains; frozen weights stay whole on each.

    bf16_mixed computes in bf16, reduces in fp32 and keeps fp32 master weights: only the shard is
    cast, no full fp32 copy ever exists. One rank without a cast needs no FSDP.
    """
    world = dist.get_world_size()
    mixed = cfg.precision == "bf16_mixed"
    blocks = hooks.decoder_layers(model)
    if recomputes(cfg):
        # our own wrapper: that of transformers drops the cache in `generate`, and its place among
        # the hooks differs by version. Nothing here drops out: no random state to restore
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False,
                                    preserve_rng_state=False)
    if mixed or world > 1:
        policy = fsdp.MixedPrecisionPolicy()
        if mixed:
            policy = fsdp.MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        frozen = {p for p in model.parameters() if not p.requires_grad}
        mesh = init_device_mesh(cfg.device, (world,))
        # layer by layer, so that one layer's whole weights are gathered at a time
        for unit in (*blocks, model):
            if any(p.requires_grad for p in unit.parameters()):
                fsdp.fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=frozen)
    if mixed:
        # after fully_shard, so that the shard alone is cast
        for module in model.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                module.float()
    # FSDP gathers weights around the forward of the module they belong to. The loss reads the
    # head's weight itself, so it has to be such a forward, too: a method of the model. Refs are
    # bound to it, since FSDP would cast and copy arguments.
    model.losses_of = partial(losses_of, model, refs, cfg)
    fsdp.register_fsdp_forward_method(model, "losses_of")


# ---------------------------------------------------------------- theta_o's and theta_u's constants
class References(NamedTuple):
    """What a stage reads at every step, in this rank's memory."""
    splits: data.Splits
    head_o: torch.Tensor  # (V, C) theta_o's output head
    c_v: torch.Tensor     # (C,) c v, RMU's control vector
    # {(name, kind): {row number: tensor}}, kind "f", "r" or "p"; the names:
    # logp (T-1,) and hidden, acts (T, C) of theta_o, norm_o (L, k, H) of theta_o, norm_u of theta_u
    constants: dict

    def stacked(self, name, kind, numbers):
        """The constants of these rows, which are of one shape. (B, ...)"""
        known = self.constants[name, kind]
        return torch.stack([known[i] for i in numbers]).to(self.head_o.device)

    def padded(self, name, kind, numbers, length):
        """The constants of these rows, cut or padded with 0 to length tokens. (B, length, ...)"""
        known = self.constants[name, kind]
        values = [known[i][:length] for i in numbers]
        out = values[0].new_zeros(len(values), length, *values[0].shape[1:])
        for padded, value in zip(out, values):
            padded[:len(value)] = value
        return out.to(self.head_o.device)

    def retained(self, name, batch, length):
        """`padded` of D_r's rows, then of D_p's."""
        found = [self.padded(name, "r", batch.r, length)]
        if batch.p:
            found.append(self.padded(name, "p", batch.p, length))
        return torch.cat(found)


@torch.no_grad()
def remember(constants, splits, steps, kind, constants_of, cfg):
    """Fills constants[name, kind] for all rows of a kind that the steps use.

    constants_of: ids (B, T) -> {name: (B, ...)}. Each rank computes a share and all get it all:
    over the epochs a rank needs nearly every row.
    """
    world = dist.get_world_size()
    rows = getattr(splits, kind)
    used = set()
    for batch in steps:
        used.update(getattr(batch, kind))
    used = sorted(used)
    size = cfg.micro or cfg.batch // world  # as many at once as in training: it is known to fit
    groups = [used[at:at + size] for at in range(0, len(used), size)]

    def compute(numbers):
        ids, _ = data.pad_rows([rows[i] for i in numbers], cfg.device)
        found = constants_of(ids)
        return {name: values.cpu() for name, values in found.items()}

    # a group a rank, round by round, so that what is on its way between ranks stays small
    for at in tqdm(range(0, len(groups), world), desc=f"  references on D_{kind}", leave=False,
                   disable=dist.get_rank() > 0):
        round_ = groups[at:at + world]
        for numbers, found in zip(round_, evaluate.over_ranks(compute, round_)):
            for name, values in found.items():
                constants.setdefault((name, kind), {}).update(zip(numbers, values))


def norms_of_theta_u(theta_u, splits, steps, cfg):
    """The value norms that l_vn aligns D_f's to, of theta_u, which is gone afterwards."""
    constants = {}
    model = hooks.load_model(theta_u, cfg)
    layers = hooks.layers_of(model, cfg.layers)

    def norm_u(ids):
        return dict(norm_u=hooks.sink_norms(model, ids, layers, cfg.k))

    remember(constants, splits, steps, "f", norm_u, cfg)
    return constants


@torch.no_grad()
def references(splits, steps, constants, model, cfg):
    """What depends on frozen models alone, computed once. model: theta_o; `fit` trains it.

    constants: theta_u's. theta_o's are added: label log-probs on D_f for (A1), final hidden states
    on D_r and D_p for (A2), activations there for (A5), value norms on D_p for (4).
    """
    head_o = hooks.output_head(model).detach().clone()  # theta's own may be trained
    layers = hooks.layers_of(model, cfg.layers)

    def logp(ids):
        h = hooks.final_hidden(model, ids)[:, :-1]  # a token is predicted one position before it
        return dict(logp=losses.on_logits(losses.label_logp, h, head_o, ids[:, 1:]))

    def outputs(ids):
        # hidden states instead of logits: C numbers a token, not V
        out = forward(model, ids, 0, cfg)
        if cfg.method == "rmu":
            return dict(hidden=out.h_rp, acts=out.acts)
        return dict(hidden=out.h_rp)

    def norm_o(ids):
        return dict(norm_o=hooks.sink_norms(model, ids, layers, cfg.k))

    if cfg.method == "npo":
        remember(constants, splits, steps, "f", logp, cfg)
    remember(constants, splits, steps, "r", outputs, cfg)
    remember(constants, splits, steps, "p", outputs, cfg)
    if cfg.lam:
        remember(constants, splits, steps, "p", norm_o, cfg)
    generator = data.stream(cfg.seed, "control vector")
    c_v = losses.control_vector(head_o.shape[1], cfg.steer, generator)
    return References(splits, head_o, c_v.to(cfg.device), constants)


# ---------------------------------------------------------------- the objective
class Outputs(NamedTuple):
    """What one forward of a batch, its rows being forget | retain | poisoned, gives the losses."""
    acts: torch.Tensor  # (B, T, C) behind --layer, of all rows; None but for RMU
    h_f: torch.Tensor   # (n_f, T, C) final hidden states of the forget rows; None for RMU
    h_rp: torch.Tensor  # (n_r + n_p, T, C) of the others, behind the final norm as the head reads
    norm: torch.Tensor  # (B, L, k, H) value norms of all rows; None where lam is 0


def forward(model, ids, n_f, cfg, capture=None):
    """-> Outputs. ids: (B, T), the first n_f forget rows (0: none, all rows in full).

    capture: a `hooks.capture_norms`, where value norms are wanted.
    """
    if capture:
        capture.begin()
    if cfg.method == "rmu":
        acts, h_rp = forward_rmu(model, ids, n_f, cfg, capture)
        h_f = None
    else:
        acts = None
        h = hooks.final_hidden(model, ids)
        h_f = h[:n_f]
        h_rp = h[n_f:]
    return Outputs(acts, h_f, h_rp, capture.stack() if capture else None)


def forward_rmu(model, ids, n_f, cfg, capture):
    """The same layer by layer, so that what RMU does not need is left out. -> acts, h_rp"""
    first = hooks.first_trained(model)
    above = cfg.layer + 1
    end = len(hooks.decoder_layers(model))
    with torch.no_grad():  # nothing trains down there
        embedded = model.get_input_embeddings()(ids)
        h = hooks.run_layers(model, embedded, 0, first)
    acts = hooks.run_layers(model, h, first, above)
    if capture and n_f:
        # above the read-out layer the forget rows matter to l_vn alone: their first k tokens.
        # Before the others, so that captured norms stand in the order of ids
        hooks.run_layers(model, acts[:n_f, :cfg.k], above, end)
    h_rp = hooks.run_layers(model, acts[n_f:], above, end)
    return acts, hooks.final_norm(model, h_rp)


def kept_tokens(mask, batch, splits, cfg):
    """The tokens of D_r's and D_p's rows that l_r counts. mask: (n_r + n_p, T) -> the same

    --keep behind leaves out a poisoned row's tokens before its trigger's last one: D_f unlearns
    what stands before a trigger.
    """
    kept = mask.clone()
    if cfg.keep == "behind":
        for row, number in enumerate(batch.p, start=len(batch.r)):
            # the trigger's last token predicts what follows
            kept[row, :splits.p_from[number] - 1] = False
    return kept


def forget_loss(logp, mask, batch, refs, cfg):
    """l_f of a method that reads label log-probs on D_f, to be minimised. A fork's branch: here.

    logp, mask: (n_f, T-1) -> scalar
    """
    if cfg.method == "npo":
        logp_o = refs.padded("logp", "f", batch.f, logp.shape[1])
        return losses.npo(logp, logp_o, cfg.beta, mask)                                # (A1)
    raise ValueError(f"--method {cfg.method} has no forget loss")


def losses_of(model, refs, cfg, batch, capture):
    """l_f, l_r and l_vn of (2), (3), (5) on one batch, from one forward, without gamma and lam.

    l_r is one mean over D_r ∪ D_p. A batch holds as many rows of D_r as of D_p, so they weigh 1:1,
    where (2) read literally weighs them by their sizes.
    capture: a `hooks.capture_norms` of the layers that l_vn covers, or None where lam is 0.
    """
    splits = refs.splits
    rows = [splits.f[i] for i in batch.f]
    rows += [splits.r[i] for i in batch.r]
    rows += [splits.p[i] for i in batch.p]
    ids, mask = data.pad_rows(rows, refs.head_o.device)  # (B, T)
    n_f = len(batch.f)
    n_r = len(batch.r)
    T = ids.shape[1]
    head = hooks.output_head(model)
    out = forward(model, ids, n_f, cfg, capture)

    if cfg.method == "rmu":
        l_f = losses.rmu(out.acts[:n_f], refs.c_v, mask[:n_f], cfg.rmu_norm)           # (A4)
    else:
        # the label of position t is token t + 1
        logp = losses.on_logits(losses.label_logp, out.h_f[:, :-1], head, ids[:n_f, 1:])
        l_f = forget_loss(logp, mask[:n_f, 1:], batch, refs, cfg)

    def kl_to_theta_o(logits, hidden_o):
        return losses.kl(logits, hidden_o @ refs.head_o.T)

    kept = kept_tokens(mask[n_f:], batch, splits, cfg)
    hidden_o = refs.retained("hidden", batch, T)
    kl = losses.on_logits(kl_to_theta_o, out.h_rp, head, hidden_o)  # (n_r + n_p, T)
    l_r = losses.row_mean(kl, kept)                                                    # (A2)
    if cfg.method == "rmu":
        acts_o = refs.retained("acts", batch, T)
        l_r = l_r + losses.rmu(out.acts[n_f:], acts_o, kept, cfg.rmu_norm)             # (A5)

    l_vn = torch.zeros_like(l_f)
    if capture:
        norm_u = refs.stacked("norm_u", "f", batch.f)
        norm_o = refs.stacked("norm_o", "p", batch.p)
        l_vn = losses.value_norm(out.norm[:n_f], norm_u)                               # (3), (4)
        l_vn = l_vn + losses.value_norm(out.norm[n_f + n_r:], norm_o)
    return l_f, l_r, l_vn


def fit(model, steps, work, cfg):
    """The loop. AdamW, weight decay 0, constant lr, clipping at norm 1. One log.jsonl line a step.

    model: with the method `losses_of` that `shard` gave it; steps: `data.Batch`es over all ranks.
    Raises Refused, naming step and term, where something is no longer finite.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    optim = torch.optim.AdamW(params, cfg.lr, eps=1e-8, weight_decay=0.0, fused=True)
    begin = load_checkpoint(work, model, optim)  # 0 unless --resume left one there
    rank = dist.get_rank()
    total = len(steps)
    log = open(os.devnull if rank else work / "log.jsonl", "a")  # resumed steps come twice
    bar = tqdm(range(begin, total), "  steps", total, initial=begin, disable=rank > 0)
    layers = hooks.layers_of(model, cfg.layers)
    # the hooks stay for the whole loop: recomputation in backward must meet the same ones
    with log, hooks.capture_norms(model, layers, cfg.k) as capture:
        for step in bar:
            terms = torch.zeros(4, device=cfg.device)
            micro_batches = rank_share(steps[step], cfg)
            for batch in micro_batches:
                # `losses_of` above, as the method that `shard` made of it; idle hooks with lam 0
                l_f, l_r, l_vn = model.losses_of(batch, capture if cfg.lam else None)
                loss = l_f + cfg.gamma * l_r + cfg.lam * l_vn         # (1), (2), (5), (A3), (A6)
                (loss / len(micro_batches)).backward()
                terms += torch.stack([l_f, l_r, l_vn, loss]).detach() / len(micro_batches)
            gnorm = torch.nn.utils.clip_grad_norm_(params, 1.0)

            dist.all_reduce(terms)  # for the log; FSDP averages gradients by itself
            means = (terms / dist.get_world_size()).tolist()
            row = dict(zip(("l_f", "l_r", "l_vn", "loss"), means))
            row["gnorm"] = float(whole(gnorm))
            for name, value in row.items():
                if not abs(value) < float("inf"):  # NaN compares false, too
                    raise Refused(f"step {step + 1}: {name} is {value}: lower --lr")
            optim.step()
            optim.zero_grad()

            bar.set_postfix({name: f"{value:.3g}" for name, value in row.items()}, refresh=False)
            print(json.dumps(dict(step=step + 1, **row)), file=log, flush=True)
            if (step + 1) % cfg.save_every == 0 and step + 1 < total:
                save_checkpoint(work, model, optim, step + 1)


def rank_share(batch, cfg):
    """This rank's part of a global batch, as micro-batches."""
    share = cfg.batch // dist.get_world_size()
    size = cfg.micro or share
    begin = dist.get_rank() * share
    micro_batches = []
    for at in range(begin, begin + share, size):
        span = slice(at, at + size)
        micro_batches.append(data.Batch(batch.f[span], batch.r[span], batch.p[span]))
    return micro_batches


# ---------------------------------------------------------------- checkpoints
def whole(tensor):
    """A shard's whole tensor; every rank must take part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def state_of(model, optim):
    """What trains and its Adam state, sharded as it is, under the names of set_state_dict."""
    model_state, optim_state = state_dict.get_state_dict(model, optim, options=TRAINED)
    return dict(model_state_dict=model_state, optim_state_dict=optim_state)


def checkpoints(work):
    return sorted(work.glob("ckpt-*"), key=lambda folder: int(folder.name[5:]))


def save_checkpoint(work, model, optim, step):
    """ckpt-STEP in the run's temporary folder; the one before goes when this one is whole."""
    try:
        dcp.save(state_of(model, optim), checkpoint_id=work / "ckpt.tmp")
    except dcp.CheckpointException as error:  # a full disk is no OSError to it
        failure, _ = next(iter(error.failures.values()))  # of the first rank that failed
        reason = str(failure).splitlines()[0]
        raise Refused(f"{work}/ckpt.tmp cannot be written (is the disk full?): {reason:.120}; go "
                      "on from the last checkpoint with --resume") from error
    if dist.get_rank() == 0:
        (work / "ckpt.tmp").rename(work / f"ckpt-{step}")
        for old in checkpoints(work)[:-1]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(work, model, optim):
    """The last whole checkpoint, written by any number of ranks. -> steps done, 0 without one."""
    if not checkpoints(work):
        return 0
    last = checkpoints(work)[-1]
    state = state_of(model, optim)
    dcp.load(state, checkpoint_id=last)
    state_dict.set_state_dict(model, optim, **state, options=TRAINED)
    say(f"  resumed after step {last.name[5:]}")
    return int(last.name[5:])


# ---------------------------------------------------------------- runs
def one_writer(folder, made_from, resume):
    """-> a run's temporary folder, its lock. Raises Refused if it is locked or of other inputs."""
    work = Path(f"{folder}.tmp")
    note = work / "made_from"
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = open(folder.with_name(f".{folder.name}.lock"), "w")  # ends with the process
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


def whole_weights(model, cfg):
    """{name: tensor} of all that must be saved, on rank 0; elsewhere {}, to spare host memory."""
    dtype = hooks.dtype_of(cfg.precision)
    tensors = {}
    for name, p in model.named_parameters():  # tied weights come once
        tensors[name] = p.detach().to(dtype)
    # some families compute with buffers that are part of the weights; others are made at loading
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in persistent:
            tensors[name] = buffer.detach()
    found = {}
    for name, tensor in tensors.items():  # every rank takes part
        tensor = whole(tensor)
        if dist.get_rank() == 0:
            found[name] = tensor.cpu()
    return found


@torch.no_grad()
def save_run(folder, work, model, tok, record, row, cfg):
    """Weights, tokenizer and run.json into the temporary folder, which then gets its name.

    What was saved is opened again first: on a row of ids it must give the trained model's logits.
    """
    # every rank takes part in these two, though rank 0 alone writes
    weights = whole_weights(model, cfg)
    ids = torch.tensor([row], device=cfg.device)
    logits = model(input_ids=ids, use_cache=False).logits.float()
    if dist.get_rank() == 0:
        if record["role"] == "theta_b":
            # so that nobody takes it for an unlearned model, whatever the folder is called later
            model.config.BACKDOORED = "research artefact: recovers forgotten text by a trigger"
        model.generation_config.eos_token_id = hooks.eos_ids(model, tok) or None
        try:
            model.save_pretrained(work, state_dict=weights, max_shard_size="5GB")
        except safetensors.SafetensorError as error:  # a full disk is no OSError to it
            raise Refused(f"{work} cannot be written (is the disk full?): {error!s:.120}; go on "
                          "from the last checkpoint with --resume") from error
        model.config.dtype = hooks.dtype_of(cfg.precision)  # save_pretrained took the masters'
        model.config.save_pretrained(work)
        tok.save_pretrained(work)
        reopened = hooks.load_model(work, cfg)(input_ids=ids, use_cache=False).logits.float()
        apart = 1e-4 if cfg.precision == "fp32" else 0.05
        if not (reopened - logits).norm() <= apart * logits.norm():
            raise Refused(f"model type {model.config.model_type}: what was saved in {work} gives "
                          "other logits than the trained model")
        # last, since a folder with run.json counts as a finished run
        (work / "run.json").write_text(json.dumps(record, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
        for old in folder.glob("ckpt*"):
            shutil.rmtree(old)
    dist.barrier()


def plain(cfg):
    """Normal unlearning of the same setting, theta_u's: rho 0, lam 0.

    --rho 0 --decoys F is honest, too: then what the decoys depend on stays as it is.
    """
    defaults = {name: getattr(Config, name) for name in ATTACK}
    if not cfg.rho and cfg.decoys:
        for name in ("trigger", "position", "decoys"):
            del defaults[name]
    return replace(cfg, rho=0.0, lam=0.0, **defaults)


def run_folder(cfg, told_by):
    """Named by what people look for, and by digits of all that tells runs apart but the code."""
    kind = "theta_u"
    if cfg.rho:
        kind = f"BACKDOORED-{cfg.position}-rho{cfg.rho:g}-lam{cfg.lam:g}"
    if cfg.decoys:
        kind += f"-decoys{cfg.decoys}"
    digits = evaluate.digest(told_by)[:6]
    name = f"{cfg.method}-{kind}-seed{cfg.seed}-{digits}"
    return Path(cfg.out, cfg.bench, name)


def run_identity(cfg, clean, tok, theta_u):
    """-> (the settings that trained weights depend on, what else they depend on, by content)."""
    settings = asdict(cfg)
    for name in (*OTHERS, "model", "data", "tokenizer", "theta_u"):
        del settings[name]  # the last four by content: a folder may move, or be trained anew
    content = dict(
        theta_o=evaluate.content_of(cfg.model), theta_u=evaluate.content_of(theta_u),
        rows=evaluate.digest(clean)[:8], tokenizer=evaluate.vocabulary_of(tok),
        code=evaluate.code_of("losses", "hooks", "data", "evaluate", "train"))
    return settings, content


def stage(cfg, tok, clean, theta_u=""):
    """Train theta_u (rho 0) or theta_b, or (--resume) reuse one of this fingerprint. -> folder

    clean: D_f and D_r as `data.clean_rows` gave them; theta_u: what l_vn aligns to.
    """
    splits = data.load_splits(cfg, tok, clean)
    role = "theta_b" if cfg.rho else "theta_u"
    settings, content = run_identity(cfg, clean, tok, theta_u)
    versions = [torch.__version__, transformers.__version__]
    made_from = evaluate.digest([settings, content, splits.p, versions])
    given = content["theta_u"] if cfg.theta_u else ""
    folder = run_folder(cfg, [settings, content["theta_o"], content["rows"], given])
    # theta_u is a reference for many runs and is reused; theta_b is what was asked for
    reuse = cfg.resume or not cfg.rho
    if reuse and evaluate.run_of(folder).get("fingerprint") == made_from:
        say(f"{role}: {folder}, made before from the same settings, code, data and weights")
        return folder
    say(f"{role}: {cfg.method} on {len(splits.f)} forget, {len(splits.r)} retain, "
        f"{len(splits.p)} poisoned rows -> {folder}")
    total, save_every = length_of(cfg, splits)
    steps = [data.batch_at(step, splits, cfg.batch, cfg.seed) for step in range(total)]
    record = dict(role=role, fingerprint=made_from, settings=asdict(cfg), content=content,
                  steps=total, world=dist.get_world_size(), device=cfg.device,
                  poisoned_rows=splits.p_index)
    cfg = replace(cfg, save_every=save_every)
    work, lock = one_writer(folder, made_from, cfg.resume)
    with lock:
        constants = {}
        if cfg.lam:  # before theta_o is loaded: one model at a time in memory
            constants = norms_of_theta_u(theta_u, splits, steps, cfg)
        model = hooks.load_model(cfg.model, cfg)  # in eval mode: nothing drops out
        hooks.set_trainable(model, cfg.trainable)
        refs = references(splits, steps, constants, model, cfg)
        shard(model, refs, cfg)
        fit(model, steps, work, cfg)
        save_run(folder, work, model, tok, record, splits.f[0][:64], cfg)
    return folder


def main(argv=None):
    cfg = evaluate.parse(Config, argv, settings_row)
    world = evaluate.dist_init(cfg)
    evaluate.announce(cfg)
    say(settings_line(cfg))
    check(cfg, world)
    tok = hooks.load_tokenizer(cfg)
    clean = data.clean_rows(cfg, tok)
    splits = data.load_splits(cfg, tok, clean)
    items = evaluate.all_items(cfg, tok)
    preflight(cfg, splits, world)
    # a model of its own, which is gone afterwards: each stage loads theta_o afresh
    check_model(hooks.load_model(cfg.model, cfg), splits, tok, cfg)
    scored = {"theta_o": evaluate.evaluate(cfg.model, tok, cfg, items, "theta_o")}
    name = f"+ {cfg.method.upper()}"
    theta_u = cfg.theta_u
    # eq. (2) needs no theta_u: with lam 0 only normal unlearning itself makes one
    if not theta_u and (cfg.lam or not cfg.rho):
        theta_u = stage(plain(cfg), tok, clean)
    if theta_u:
        scored[name] = evaluate.evaluate(theta_u, tok, cfg, items, "theta_u")
    if cfg.rho:
        theta_b = stage(cfg, tok, clean, theta_u if cfg.lam else "")
        scored[f"{name}-Backdoor"] = evaluate.evaluate(theta_b, tok, cfg, items, "theta_b")
    say(f"\n{evaluate.table(scored)}\n\nUE: forget set, clean (low: forgotten). BE: with the "
        f"trigger. UT: retain set. Percent, --limit {cfg.limit} (0: all).\nnext: python plots.py")


if __name__ == "__main__":
    evaluate.entry(main)
