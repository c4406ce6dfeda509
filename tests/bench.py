"""Time and peak memory of our step against three live models on the same rows. Run by hand:

    python tests/bench.py --size 15m                       # CPU or GPU, random weights
    python tests/bench.py --size 7b --depth 8 --T 256 --precision bf16_pure
    python tests/bench.py --size 7b --T 2048 --only ours   # a whole 7B on one H200
    python tests/bench.py --size 7b --T 256 --steps 1 --method rmu --share
    python tests/bench.py --size 7b --fake                 # peak memory alone, on fake tensors
    python tests/bench.py --memory                         # 4 x 48 GB, estimated on the CPU
    python tests/bench.py --update assets/precision.png    # what pure bf16 does to an update

ours      train.py's own step: one sharded model, cached references, logits in chunks.
fair      theta, theta_o and theta_u resident; the frozen ones without grad, only the forwards the
          objective needs; full logits; same checkpointing, same trainable set.
released  as fair, but six frozen forwards (both frozen models on D_f, D_r, D_p) and gradients for
          all parameters.

--share (time only, for what three models do not fit): what theta does not train is one copy in all
three models and, but for the trained ones, in all layers: far larger than any cache, a layer is
read from memory each time as its own copy would be. released drops these gradients as they come.

Each variant is a process of its own, so that peak memory is its own. `predicted` is the ratio of
FLOPs counted below. MFU: 9 F per triple for NPO over the peak given by --peak TFLOP/s; HFU counts
recomputation as well.
"""
import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import hooks
import losses
import train

SIZES = {  # width, MLP, layers, heads, vocabulary, T, triples
    "toy": (128, 384, 5, 4, 1536, 104, 4),
    "15m": (288, 768, 6, 6, 32000, 256, 2),
    "135m": (576, 1536, 30, 9, 49152, 256, 1),
    "7b/4": (1024, 2752, 32, 8, 32000, 512, 1),  # a 7B's depth at a quarter of its width
    "7b": (4096, 11008, 32, 32, 32000, 2048, 1),
}


def model_of(args, seed):
    from transformers import LlamaConfig, LlamaForCausalLM
    width, mlp, layers, heads, vocab, T, _ = SIZES[args.size]
    torch.manual_seed(seed)
    before, depth = torch.get_default_dtype(), args.depth or layers
    torch.set_default_dtype(train.dtype_of(args.cfg))
    with torch.device(train.device_of(args.cfg)):
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab, hidden_size=width, intermediate_size=mlp,
            num_hidden_layers=1 if args.share else depth, num_attention_heads=heads,
            max_position_embeddings=4096, bos_token_id=0, eos_token_id=1))
        if args.share:
            deepen(model, depth, args.cfg.trainable)
    torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def deepen(model, depth, trainable):
    """A model of one layer becomes one of `depth` layers, which share all weights but those that
    train."""
    blocks = model.model.layers
    shared = {id(p): p for p in blocks[0].parameters()}
    for i in range(1, depth):
        blocks.append(copy.deepcopy(blocks[0], dict(shared)))
        blocks[i].self_attn.layer_idx = i
    model.config.num_hidden_layers = depth
    layers, _, name = trainable.partition(" ")
    for i in hooks.parse_layers(layers, depth):
        part = blocks[i].get_submodule(name)
        part.weight = torch.nn.Parameter(part.weight.detach().clone())


def setting_of(args):
    """Config with RMU's layers at a quarter of the depth, as 5-7 of 32."""
    depth = args.depth or SIZES[args.size][2]
    last = max(1, depth // 4) - 1
    first = max(0, last - max(1, round(3 * depth / 32)) + 1)
    cfg, _ = train.parse_config(
        ["--method", args.method, "--lam", str(args.lam), "--T", str(args.T or SIZES[args.size][5]),
         "--batch", str(args.batch or SIZES[args.size][6]), "--precision", args.precision,
         "--recompute", args.recompute, "--layer", str(last), "--device", args.device,
         "--trainable", "all" if args.method == "npo" else f"{first}-{last} mlp.down_proj"])
    return cfg


def rows_of(args):
    n, T = args.cfg.batch, args.cfg.T
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(2, SIZES[args.size][4], (3 * n, T), generator=gen)
    part = [data.Rows(ids[i * n:(i + 1) * n], torch.ones(n, T, dtype=torch.bool)) for i in range(3)]
    return data.Splits(*part, list(range(n)))


# ---------------------------------------------------------------- the three steps

def ours(args):
    cfg, splits, w = args.cfg, rows_of(args), args.w
    norms_u = train.norms_over("f", model_of(args, 1), cfg, splits, w) if cfg.lam else None
    model = model_of(args, 0)
    cache = train.build_cache(cfg, splits, norms_u, model, w)
    hooks.set_trainable(model, cfg.trainable)
    params = train.shard(model.train(), cfg, w.mesh)
    c_u = losses.control_vector(model.config.hidden_size, cfg.steer, 0)
    everything = torch.arange(cfg.batch)
    batch = data.Batch(everything, everything, everything)

    def loss():
        value, terms = model.inside(lambda: train.objective(
            train.losses_of(batch, model, splits, cache, cfg, c_u, norms), cfg))
        return value, terms["r"]

    with train.norms_in_training(cfg, model) as norms:
        return timed(loss, params, args)


def three_models(args):
    """theta, ready to train, theta_o and theta_u.
    -> (theta, theta_o, theta_u, trained, {name: other})"""
    theta = model_of(args, 0)
    hooks.set_trainable(theta.train(), args.cfg.trainable)
    trained = [p for p in theta.parameters() if p.requires_grad]
    others = {name: p for name, p in theta.named_parameters(remove_duplicate=False)
              if not p.requires_grad}
    if not args.share:
        return theta, model_of(args, 0), model_of(args, 1), trained, others
    theta_o, theta_u = (copy.deepcopy(theta, {id(p): p for p in others.values()}).eval()
                        for _ in "ou")
    for p in theta_u.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.02)
    return theta, theta_o, theta_u, trained, others


def droppable(weights):
    """The same weights as leaves of one forward's graph, whose gradients go as they come. The
    model's own would each wait for the backward of all three forwards. {name: tensor}"""
    leaves = {name: p.detach().requires_grad_() for name, p in weights.items()}
    for leaf in leaves.values():
        leaf.register_post_accumulate_grad_hook(lambda leaf: setattr(leaf, "grad", None))
    return leaves


def naive(args, released):
    """Three live models; see the top of this file."""
    cfg, splits = args.cfg, rows_of(args)
    device = train.device_of(cfg)
    theta, theta_o, theta_u, params, others = three_models(args)
    for p in others.values() if released else ():
        p.requires_grad_(True)
    if cfg.recompute == "yes":
        theta.gradient_checkpointing_enable()
    f, r, p = (splits[i].ids.to(device) for i in range(3))
    c_u = losses.control_vector(theta.config.hidden_size, cfg.steer, 0).to(device)
    mask = torch.ones_like(f, dtype=torch.bool)

    def called(model, inputs):
        fresh = droppable(others) if args.share and released and model is theta else {}
        return torch.func.functional_call(model, fresh, (), inputs, tie_weights=False) if fresh \
            else model(**inputs)

    def run(model, ids, logits=True):
        with hooks.capture_hidden(model, cfg.layer) as acts:
            out = called(model, dict(input_ids=ids, use_cache=False)).logits if logits else \
                hooks.final_hidden(model, ids)
        return out, acts[cfg.layer], hooks.stack_norms(captured[model])

    def loss():
        npo = cfg.method == "npo"
        with torch.no_grad():
            o = {"f": run(theta_o, f) if npo or released else None, "r": run(theta_o, r),
                 "p": run(theta_o, p)}
            u = run(theta_u, f, logits=False) if cfg.lam else None
            if released:
                run(theta_u, r, logits=False), run(theta_u, p, logits=False)
        mine = {"f": run(theta, f), "r": run(theta, r), "p": run(theta, p)}
        if npo:
            l_f = losses.npo(*(losses.label_logp(of["f"][0][:, :-1], f[:, 1:]) for of in (mine, o)),
                             cfg.beta, mask[:, 1:])
        else:
            l_f = losses.rmu_forget(mine["f"][1], c_u, mask)
        l_r = sum(losses.kl(mine[k][0], o[k][0], mask) for k in "rp") / 2
        if not npo:
            l_r = l_r + sum(losses.rmu_retain(mine[k][1], o[k][1], losses.row_weights(mask))
                            for k in "rp") / 2
        value = l_f + cfg.gamma * l_r
        if cfg.lam:
            value = value + cfg.lam * (losses.value_norm(mine["f"][2], u[2]) +
                                       losses.value_norm(mine["p"][2], o["p"][2]))
        return value, l_r

    with ExitStack() as stack:  # hooks on theta must outlive the backward
        captured = {m: stack.enter_context(hooks.capture_norms(m, **train.vn_hook(cfg, m)))
                    for m in (theta, theta_o, theta_u)}
        return timed(loss, params, args)


def timed(loss, params, args):
    """Seconds of the fastest step after a first one (what else runs on a machine only adds); the
    losses at step 0; peak memory in GB."""
    if args.fake:
        return fake(lambda: loss()[0], params)
    cuda = train.device_of(args.cfg) == "cuda"
    optim = torch.optim.AdamW(params, 1e-5, weight_decay=0.0, fused=True)
    spent, first = [], None
    for step in range(args.steps + 1):
        parts = {}
        for name in ("forward", "backward", "clip", "Adam"):
            start = time.time()
            if name == "forward":
                value, kl = loss()
            elif name == "backward":
                value.backward()
            elif name == "clip":
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            else:
                optim.step()
                optim.zero_grad()
            if cuda:
                torch.cuda.synchronize()
            parts[name] = time.time() - start
        spent.append(parts)
        first = first or (value.item(), kl.item())
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    best = min(spent[1:], key=lambda parts: sum(parts.values()))
    return dict(seconds=sum(best.values()), GB=peak, loss=first[0], l_r=first[1], parts=best)


# ---------------------------------------------------------------- FLOPs

def flops(args, variant):
    """FLOPs of one triple: a matmul of its weights costs 2 per weight and token, forward; the same
    again for the gradient of its input, and for that of its weights where they train."""
    width, mlp, layers, _, vocab, _, _ = SIZES[args.size]
    cfg, L = args.cfg, args.depth or layers
    attention, down = 2 * cfg.T * width, 2 * width * mlp  # causal: half of T^2, scores and values
    layer = 2 * (4 * width ** 2 + 3 * width * mlp) + attention
    head, npo, vn = 2 * width * vocab, cfg.method == "npo", cfg.lam > 0
    full = L * layer + head
    low = 0 if cfg.trainable == "all" else int(cfg.trainable.split("-")[0])
    inner = (cfg.layer - low) * layer + (cfg.layer - low + 1) * down  # backward, RMU: no gradient
    upper = (L - cfg.layer - 1) * layer                   # enters the lowest layer that trains
    if npo or variant == "released":
        own = 9 * full
    else:
        keep = 2 * (full + head + upper + inner)
        own = keep + inner + ((cfg.layer + 1 - 3 * low) * layer + vn * 2 * upper * cfg.k / cfg.T
                              if variant == "ours" else full + vn * upper)  # l_vn of whole rows
    again = cfg.recompute == "yes"
    if variant == "ours":
        own += 2 * head  # theta_o's logits from its cached hidden states
        own += (3 if npo else 2) * L * layer * again
        frozen = 0
    else:
        own += 3 * L * layer * again
        frozen = 6 * full if variant == "released" else \
            (3 if npo else 2) * full + vn * (full - head)
    return (own + frozen) * cfg.T * cfg.batch, own * cfg.T * cfg.batch, 9 * full * cfg.T * cfg.batch


# ---------------------------------------------------------------- memory of 4 ranks, estimated

class Peak(TorchDispatchMode):
    """The most bytes of local tensors alive after any operation; FSDP frees by resizing."""

    def __init__(self, tensors):
        super().__init__()
        self.alive, self.peak = {}, 0
        for t in tensors:
            self.add(train.local(t))

    def add(self, t):
        storage = t.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive[storage._cdata] = weakref.ref(storage)
            weakref.finalize(storage, self.alive.pop, storage._cdata, None)

    def now(self):
        return sum(s.nbytes() for ref in self.alive.values() if (s := ref()) is not None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its local operations come by themselves
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.add(t)
        self.peak = max(self.peak, self.now())
        return out


def memory():
    """Peak bytes on one of 4 ranks: Table A1's Books rows, a 7B of fake tensors, two steps."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    mesh = init_device_mesh("cpu", (4,))
    print("| 4 ranks, T 2048, 1 triple a forward | peak GB |\n|---|---:|")
    for method, precision, recompute in (("npo", "bf16_mixed", "yes"), ("npo", "bf16_pure", "yes"),
                                         ("rmu", "bf16_mixed", "yes"), ("rmu", "bf16_mixed", "no")):
        with FakeTensorMode(allow_non_fake_inputs=True):
            peak = fake_steps(method, precision, recompute, mesh)
        print(f"| {method}, {precision}, recompute {recompute} | {peak / 1e9:.1f} |", flush=True)


def fake_steps(method, precision, recompute, mesh):
    """-> peak bytes of two steps."""
    cfg, _ = train.parse_config(["--bench", "muse_books", "--method", method, "--device", "cpu",
                                 "--precision", precision, "--recompute", recompute])
    model = model_of(argparse.Namespace(size="7b", depth=0, share=False, cfg=cfg), 0)
    head = hooks.output_head(model).detach().clone()
    hooks.set_trainable(model, cfg.trainable)
    params = train.shard(model.train(), cfg, mesh)
    (B, T, C), L, H = (cfg.micro, cfg.T, 4096), model.config.num_hidden_layers, 32
    rows = data.Rows(torch.zeros(B, T, dtype=torch.long), torch.ones(B, T, dtype=torch.bool))
    kept = {key: torch.zeros(B, T, C, dtype=torch.bfloat16) for key in "rp"}
    norms_o = {key: torch.zeros(B, L, cfg.k, H) for key in "fp"}
    below, first = train.vn_layers(cfg, L)[0], hooks.first_trained(cfg.trainable, L)
    cache = train.Cache(head, torch.zeros(B, T - 1), kept, kept, norms_o, first,
                        {**kept, "f": kept["r"]}, norms_o["f"][:, below] if first else None)
    batch = data.Batch(*[torch.arange(B)] * 3)
    c_u = losses.control_vector(C, cfg.steer, 0)
    splits = data.Splits(rows, rows, rows, [0])
    with train.norms_in_training(cfg, model) as norms, \
            Peak([*model.parameters(), head]) as seen:
        def loss():
            return model.inside(lambda: train.objective(
                train.losses_of(batch, model, splits, cache, cfg, c_u, norms), cfg)[0])
        fake(loss, params)
        return seen.peak


def fake(loss, params):
    """Two steps on fake tensors; Adam on plain shards, or DTensor would count global shapes."""
    shards = [torch.nn.Parameter(train.local(p.detach())) for p in params]
    optim = torch.optim.AdamW(shards, 1e-5, weight_decay=0.0, fused=True)
    for _ in range(2):
        loss().backward()
        for p, part in zip(params, shards):
            part.grad, p.grad = train.local(p.grad), None
        optim.step()
        optim.zero_grad()


def fake_variant(args):
    """Peak memory of one variant with its whole model, on fake tensors and one fake rank."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    args.w = train.dist_init(args.cfg)
    with FakeTensorMode(allow_non_fake_inputs=True), Peak([]) as seen:
        ours(args) if args.variant == "ours" else naive(args, args.variant == "released")
    return dict(seconds=float("nan"), GB=seen.peak / 1e9, loss=float("nan"), l_r=float("nan"),
                parts={})


# ---------------------------------------------------------------- precision of the update

def update(picture):
    """300 NPO steps at lr 1e-5 on a toy theta_o, fp32 against pure bf16: which weights moved?"""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from safetensors.torch import load_file
    out = Path(tempfile.mkdtemp())
    home = out / "toy"
    moved = {}
    for precision in ("fp32", "bf16_pure"):
        flags = ["--rho", "0", "--lam", "0", "--lr", "1e-5", "--max_steps", "300", "--limit", "1",
                 "--max_new_tokens", "1", "--precision", precision, "--out", str(out),
                 "--n_docs", "16", "--epochs", "100"]
        if moved:  # from the same theta_o, which the fp32 run has made
            flags += ["--model", str(home / "theta_o")]
        subprocess.run([sys.executable, "train.py", *flags], check=True, capture_output=True,
                       cwd=Path(__file__).parent.parent)
        run = max(home.glob("npo-theta_u-*"), key=lambda f: f.stat().st_mtime)
        start, end = (load_file(f / "model.safetensors") for f in (home / "theta_o", run))
        if precision == "bf16_pure":  # it starts from theta_o rounded to bf16
            start = {name: t.bfloat16().float() for name, t in start.items()}
        moved[precision] = torch.cat([(end[n].float() - start[n]).flatten() for n in start])
    size = torch.cat([start[n].abs().flatten() for n in start])
    full, pure = moved["fp32"], moved["bf16_pure"]
    cos = torch.nn.functional.cosine_similarity(full, pure, dim=0)
    print(f"pure bf16 against fp32 after 300 steps at lr 1e-5, {len(full):,} weights: "
          f"{100 * (pure == 0).float().mean():.1f}% never moved (fp32: "
          f"{100 * (full == 0).float().mean():.1f}%), length of the update "
          f"{pure.norm() / full.norm():.2f}, cosine {cos:.2f}")
    edges = torch.logspace(-5, 0, 41)
    bins = torch.bucketize(size, edges)
    figure, axis = plt.subplots(figsize=(6, 3.4), facecolor="white")
    for name, color in (("fp32", "#0072B2"), ("bf16_pure", "#D55E00")):
        still = [(moved[name][bins == i] == 0).float().mean().item() * 100
                 for i in range(1, len(edges))]
        axis.plot((edges[1:] * edges[:-1]).sqrt(), still, color=color, label=name, linewidth=2)
    axis.axvline(2 ** -8, color="#7F7F7F", linestyle=":", label="2^-8")
    axis.set(xscale="log", xlabel="|weight| before", ylabel="weights that never moved (%)",
             ylim=(-3, 103))
    axis.legend(frameon=False)
    axis.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(picture, dpi=150)
    print(f"written: {picture}")


# ---------------------------------------------------------------- printing

def report(args, got):
    base = got.get("ours")
    print(f"\n{args.size}: {args.cfg.method}, lam {args.cfg.lam:g}, {args.cfg.batch} triples of "
          f"T = {args.cfg.T}, depth {args.depth or SIZES[args.size][2]}, {args.precision}, "
          f"recompute {args.recompute}, {train.device_of(args.cfg)}"
          + args.share * ", frozen weights shared: no memory of three models")
    print("| step | seconds | peak GB | tokens/s | against ours: time | predicted | memory | "
          "loss | where the time goes, s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---|")
    for name, row in got.items():
        tokens = 3 * args.cfg.T * args.cfg.batch / row["seconds"]
        predicted = flops(args, name)[0] / flops(args, "ours")[0]
        ratio = (f"{row['seconds'] / base['seconds']:.2f}x | {predicted:.2f}x | "
                 f"{row['GB'] / base['GB']:.2f}x") if base else " | | "
        print(f"| {name} | {row['seconds']:.3f} | {row['GB']:.2f} | {tokens:.0f} | {ratio} | "
              f"{row['loss']:.5g} (l_r {row['l_r']:.1g}) | "
              + ", ".join(f"{part} {s:.2f}" for part, s in row["parts"].items()) + " |")
    if base and args.peak:
        total, _, model = flops(args, "ours")
        peak = args.peak * 1e12 * base["seconds"]
        print(f"model FLOP utilisation {100 * model / peak:.0f}% (9 F per triple), hardware "
              f"{100 * total / peak:.0f}% of {args.peak:g} TFLOP/s")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=SIZES, default="15m")
    p.add_argument("--depth", type=int, default=0)
    p.add_argument("--T", type=int, default=0)
    p.add_argument("--batch", type=int, default=0)
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--rounds", type=int, default=1,
                   help="times through all variants; a machine's speed drifts between them")
    p.add_argument("--method", default="npo")
    p.add_argument("--lam", type=float, default=3e-4)
    p.add_argument("--precision", default="auto")
    p.add_argument("--recompute", default="no")
    p.add_argument("--device", default="auto")
    p.add_argument("--peak", type=float, default=0, help="the device's TFLOP/s; H200 bf16: 989")
    p.add_argument("--only", default="ours,fair,released")
    p.add_argument("--share", action="store_true")
    p.add_argument("--variant", help=argparse.SUPPRESS)
    p.add_argument("--memory", action="store_true")
    p.add_argument("--fake", action="store_true")
    p.add_argument("--update", metavar="PNG")
    args = p.parse_args()
    if args.memory:
        return memory()
    if args.update:
        return update(args.update)
    if args.share and args.method == "npo":
        p.error("--share: NPO trains everything, so nothing can be shared; add --method rmu")
    args.cfg = setting_of(args)
    if args.variant:
        if args.fake:
            return print(json.dumps(fake_variant(args)))
        args.w = train.dist_init(args.cfg)
        got = ours(args) if args.variant == "ours" else naive(args, args.variant == "released")
        return print(json.dumps(got))
    got = {}
    for variant in args.only.split(",") * args.rounds:
        # huge pages, or a CPU spends a third of its time on page faults of large tensors
        job = subprocess.run([sys.executable, *sys.argv, "--variant", variant], text=True,
                             capture_output=True, env=dict(os.environ, THP_MEM_ALLOC_ENABLE="1"))
        if job.returncode:
            why = job.stderr.strip().splitlines() or ["no word: killed for memory?"]
            print(f"{variant}: exit {job.returncode}, {why[-1]}")
        else:
            row = json.loads(job.stdout.splitlines()[-1])
            got[variant] = min(row, got.get(variant, row), key=lambda row: row["seconds"])
    report(args, got)


if __name__ == "__main__":
    main()
