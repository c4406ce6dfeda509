"""How fast and how large is it? Run by hand, on a quiet machine; random weights, fp32 on a CPU.

    python tests/bench.py step --size 135m                   # NPO + l_vn; --method rmu, --lam 0
    python tests/bench.py step --size 7b --depth 2 --T 256   # 7B's width, two layers
    python tests/bench.py memory                             # a 7B on 4 ranks, estimated
    python tests/bench.py scoring --limit 20                 # batch 64 against batch 1
    python tests/bench.py lm_eval --model DIR --rows FILE    # needs pip install lm_eval

step     One training step of ours against *fair*: three models in memory, nothing cached, full
         logits, one forward per model and kind of rows, only those that the objective needs. Each
         runs --rounds times in a process of its own, in turns; the fastest step counts. Prints
         both, the ratio of seconds and of FLOPs; both losses must agree to 1e-4.
memory   Peak bytes of two steps on one of 4 ranks, Table A1's Books, on fake tensors.
scoring  evaluate.py's loop on invented books as many and long as MUSE's, with a random Llama that
         has the toy's tokenizer or DIR's (SmolLM2's makes it 16M).
lm_eval  FILE: JSON lines with task, context, choices. Predictions and log-likelihoods of both.

Seconds are the processor's where there is no GPU: others who compute change them least.
"""
import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import ExitStack
from pathlib import Path

if "lm_eval" in sys.argv:  # it needs another package that is called evaluate, so it goes first
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    sys.modules.pop("evaluate", None)
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import data
import evaluate
import hooks
import losses
import train

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
clock = time.time if DEVICE == "cuda" else time.process_time
SIZES = {  # width, MLP, layers, heads, KV heads, vocabulary, tied, T, triples
    "15m": (288, 768, 6, 6, 6, 32000, True, 256, 2),
    "135m": (576, 1536, 30, 9, 3, 49152, True, 256, 1),     # SmolLM2-135M's shape
    "7b/4": (1024, 2752, 32, 8, 8, 32000, False, 512, 1),   # a 7B's depth at a quarter of its width
    "7b": (4096, 11008, 32, 32, 32, 32000, False, 2048, 1)}

def setting_of(args):
    """The Config of a step; RMU's layers lie at a quarter of the depth, as 5-7 of 32."""
    *_, T, batch = SIZES[args.size]
    args.depth = args.depth or SIZES[args.size][2]
    last = max(1, args.depth // 4) - 1
    first = max(0, last - max(1, round(3 * args.depth / 32)) + 1)
    flags = dict(method=args.method, lam=args.lam, T=args.T or T, batch=args.batch or batch,
                 layer=last, precision="fp32", recompute="no",
                 trainable="all" if args.method == "npo" else f"{first}-{last} mlp.down_proj")
    return evaluate.parse(train.Config, [str(word) for name, value in flags.items()
                                         for word in (f"--{name}", value)], train.settings_row)

def random_model(args, seed):
    width, mlp, _, heads, kv_heads, vocab, tied, *_ = SIZES[args.size]
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab, hidden_size=width, intermediate_size=mlp, num_attention_heads=heads,
            num_hidden_layers=args.depth, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
            max_position_embeddings=4096)).eval().requires_grad_(False)

def move(model):
    """Theta some way from theta_o, so that no term is 0."""
    torch.manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.005 * torch.randn_like(p)

def rows_of(args, cfg):
    gen = torch.Generator().manual_seed(0)
    rows = torch.randint(2, SIZES[args.size][5], (3, cfg.batch, cfg.T), generator=gen).tolist()
    return data.Splits(*rows, [], [])

# ---------------------------------------------------------------- the two steps
def ours(args, cfg):
    evaluate.dist_init(cfg)
    splits, batch = rows_of(args, cfg), data.Batch(*[range(cfg.batch)] * 3)
    hooks.load_model = lambda name, cfg: random_model(args, 1)  # theta_u
    constants = train.norms_of_theta_u("theta_u", splits, [batch], cfg) if cfg.lam else {}
    model = random_model(args, 0)
    hooks.set_trainable(model, cfg.trainable)
    refs = train.references(splits, [batch], constants, model, cfg)
    move(model)
    train.shard(model, refs, cfg)
    layers = hooks.layers_of(model, cfg.layers) if cfg.lam else []
    with hooks.capture_norms(model, layers, cfg.k) as norms:
        asked = norms if cfg.lam else None
        return timed(lambda: model.losses_of(batch, asked), model, cfg, args.steps)

def fair(args, cfg):
    theta, theta_o, theta_u = models = [random_model(args, seed) for seed in (0, 0, 1)]
    hooks.set_trainable(theta, cfg.trainable)
    move(theta)
    acts, npo = [], cfg.method == "npo"
    ids = {kind: torch.tensor(rows, device=DEVICE)
           for kind, rows in zip("frp", rows_of(args, cfg))}
    c_u = losses.control_vector(theta.config.hidden_size, cfg.steer,
                                data.stream(cfg.seed, "control vector")).to(DEVICE)
    mask, layers = torch.ones_like(ids["f"]), hooks.layers_of(theta, cfg.layers) if cfg.lam else []

    def run(model, kinds, forward):
        found = {}
        for kind in kinds:
            captured[model].begin()
            out = forward(model, ids[kind])
            found[kind] = out, acts.pop(), captured[model].stack() if cfg.lam else None
        return found

    def logits(model, ids):
        return model(input_ids=ids, use_cache=False).logits

    def terms():
        with torch.no_grad():
            o = run(theta_o, "frp" if npo else "rp", logits)
            u = run(theta_u, "f" if cfg.lam else "", hooks.final_hidden)
        mine = run(theta, "frp", logits)
        if npo:
            logp, logp_o = (losses.label_logp(of["f"][0][:, :-1], ids["f"][:, 1:])
                            for of in (mine, o))
            l_f = losses.npo(logp, logp_o, cfg.beta, mask[:, 1:])
        else:
            l_f = losses.rmu(mine["f"][1], c_u, mask)
        l_r = sum(losses.row_mean(losses.kl(mine[k][0], o[k][0]), mask) for k in "rp") / 2
        if not npo:
            l_r += sum(losses.rmu(mine[k][1], o[k][1], mask) for k in "rp") / 2
        if not cfg.lam:
            return l_f, l_r, torch.zeros_like(l_f)
        return l_f, l_r, sum(losses.value_norm(mine[k][2], of[k][2]) for k, of in
                             (("f", u), ("p", o)))

    with ExitStack() as stack:
        captured = {model: stack.enter_context(hooks.capture_norms(model, layers, cfg.k))
                    for model in models}
        for model in models:
            hooks.decoder_layers(model)[cfg.layer].register_forward_hook(
                lambda layer, inputs, out: acts.append(out))
        return timed(terms, theta, cfg, args.steps)

def timed(terms, model, cfg, steps):
    """Seconds of the fastest of `steps` steps after a first one; the first one's losses."""
    params = [p for p in model.parameters() if p.requires_grad]
    optim = torch.optim.AdamW(params, cfg.lr, eps=1e-8, weight_decay=0.0, fused=True)
    spent, found = [], []
    for _ in range(steps + 1):
        start = clock()
        l_f, l_r, l_vn = terms()
        loss = l_f + cfg.gamma * l_r + cfg.lam * l_vn
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optim.step()
        optim.zero_grad()
        found.append([float(term.detach()) for term in (loss, l_f, l_r, l_vn)])  # waits for a GPU
        spent.append(clock() - start)
    return dict(seconds=min(spent[1:]), losses=found[0])

def flops(args, cfg):
    """-> (ours, fair), of a token of each row of a triple; causal attention is half of T x T."""
    width, mlp, _, heads, kv_heads, vocab, *_ = SIZES[args.size]
    weights = 2 * width ** 2 * (1 + kv_heads / heads) + 3 * width * mlp
    layer, head, down = 2 * weights + 2 * cfg.T * width, 2 * width * vocab, 2 * width * mlp
    full, vn = args.depth * layer + head, cfg.lam > 0
    again = 2 * cfg.batch * cfg.T > losses.CHUNK  # backward computes the head's logits once more
    if cfg.method == "npo":  # ours: theta_o's logits of D_r and D_p
        return 9 * full + (7 if again else 2) * head, 12 * full + vn * (full - head)
    first, upper = int(cfg.trainable.split("-")[0]), (args.depth - cfg.layer - 1) * layer
    inner = 3 * ((cfg.layer - first) * layer + (cfg.layer - first + 1) * down)  # backward
    return (3 * (cfg.layer + 1) * layer + 4 * upper + (10 if again else 6) * head + inner +
            vn * 2 * upper * cfg.k / cfg.T,
            5 * full + 2 * (head + upper) + inner + vn * (upper + full - head))

def step(args):
    cfg = setting_of(args)
    if args.variant:
        return print(json.dumps(dict(ours=ours, fair=fair)[args.variant](args, cfg)))
    best = {}
    for variant in ["ours", "fair"] * args.rounds:
        # huge pages, or a CPU spends a third of its time on page faults of large tensors
        job = subprocess.run([sys.executable, *sys.argv, "--variant", variant], text=True,
                             stdout=subprocess.PIPE, check=True,
                             env=dict(os.environ, THP_MEM_ALLOC_ENABLE="1"))
        row = json.loads(job.stdout.splitlines()[-1])
        best[variant] = min(row, best.get(variant, row), key=lambda row: row["seconds"])
    print(f"{args.size}: {args.method}, lam {args.lam:g}, depth {args.depth}, {cfg.batch} triples "
          f"of T {cfg.T}, {DEVICE}, {torch.get_num_threads()} threads")
    for variant, row in best.items():
        print(f"  {variant} {row['seconds']:.3f} s, loss l_f l_r l_vn",
              *(f"{value:.6g}" for value in row["losses"]))
    fast, slow = best["ours"], best["fair"]
    count_ours, count_fair = flops(args, cfg)
    print(f"  fair / ours: {slow['seconds'] / fast['seconds']:.2f}x, by FLOPs "
          f"{count_fair / count_ours:.2f}x")
    assert all(abs(a - b) <= 1e-4 * abs(b) for a, b in zip(fast["losses"], slow["losses"]))

# ---------------------------------------------------------------- memory of 4 ranks
class Peak(TorchDispatchMode):
    """The most bytes of local tensors alive after any operation; FSDP frees by resizing."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive[storage._cdata] = weakref.ref(storage)
            weakref.finalize(storage, self.alive.pop, storage._cdata, None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local operations come by themselves
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        now = sum(s.nbytes() for ref in self.alive.values() if (s := ref()) is not None)
        self.peak = max(self.peak, now)
        return out

def memory(args):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    mesh = init_device_mesh("cpu", (4,))
    train.init_device_mesh = lambda *shape: mesh  # it reads a tensor, which fake ones refuse
    for method, recompute, micro in (("npo", "yes", 2), ("npo", "yes", 1), ("rmu", "yes", 1),
                                     ("rmu", "no", 1)):
        cfg = evaluate.parse(train.Config, [
            "--bench", "muse_books", "--method", method, "--precision", "bf16_mixed",
            "--recompute", recompute, "--micro", str(micro), "--device", "cpu"], train.settings_row)
        with FakeTensorMode(allow_non_fake_inputs=True):
            peak = fake_steps(cfg)
        print(f"4 ranks, 7B, T {cfg.T}, {micro} triples a forward, {method}, {cfg.precision}, "
              f"recompute {recompute}: peak {peak / 1e9:.1f} GB a rank", flush=True)

def fake_steps(cfg):
    torch.set_default_dtype(torch.bfloat16)
    model = random_model(argparse.Namespace(size="7b", depth=32), 0)
    torch.set_default_dtype(torch.float32)
    hooks.set_trainable(model, cfg.trainable)
    wide, ids = torch.zeros(cfg.T, 4096, dtype=torch.bfloat16), [[0] * cfg.T]
    norm = torch.zeros(32, cfg.k, 32)
    values = dict(hidden=wide, acts=wide, norm_o=norm, norm_u=norm, logp=torch.zeros(cfg.T - 1))
    constants = {(name, kind): {0: value} for name, value in values.items() for kind in "frp"}
    refs = train.References(data.Splits(ids, ids, ids, [], []),
                            hooks.output_head(model).detach().clone(), torch.zeros(4096), constants)
    train.shard(model, refs, cfg)
    params = [p for p in model.parameters() if p.requires_grad]
    parts = [torch.nn.Parameter(local(p)) for p in params]  # Adam on DTensors counts whole shapes
    optim, batch = torch.optim.AdamW(parts, 1e-5, fused=True), data.Batch(*[[0] * cfg.micro] * 3)
    with hooks.capture_norms(model, range(32), cfg.k) as norms, Peak() as seen:
        for tensor in (*model.parameters(), refs.head_o):
            seen.add(local(tensor))
        for _ in range(2):
            l_f, l_r, l_vn = model.losses_of(batch, norms)
            (l_f + cfg.gamma * l_r + cfg.lam * l_vn).backward()
            for p, part in zip(params, parts):
                part.grad, p.grad = local(p.grad), None
            optim.step()
            optim.zero_grad()
        return seen.peak

def local(tensor):
    return getattr(tensor.detach(), "_local_tensor", tensor.detach())

# ---------------------------------------------------------------- scoring
def muse_books(home, tok):
    """Invented rows in MUSE's layout, as many and as long as its own."""
    words = [text for text, in data.read(f"{data.TOY}/books", "raw", "forget", ["text"])]
    rng, words = random.Random(0), " ".join(words).split()

    def text(low, high):
        tokens = rng.randrange(low, high)
        return tok.decode(data.encode(tok, " ".join(rng.choices(words, k=tokens)))[:tokens])

    tables = {f"knowmem/{split}_qa{end}": [dict(question=text(10, 20), answer=text(5, 8))
                                           for _ in range(rows)]
              for split in ("forget", "retain") for end, rows in (("", 100), ("_icl", 10))}
    tables["verbmem/forget"] = [dict(prompt=text(988, 1025), gt=text(140, 141)) for _ in range(100)]
    for name, rows in tables.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / f"{name}.json").write_text(json.dumps(rows))

def scoring(args):
    evaluate.dist_init(argparse.Namespace(device=DEVICE))
    home, tok = Path(tempfile.mkdtemp()), AutoTokenizer.from_pretrained(args.model)
    muse_books(home, tok)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tok), hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=8, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id)).eval().requires_grad_(False)
    model.save_pretrained(home / "model")
    for task in ("knowmem_f", "knowmem_r", "verbmem_f"):
        spent, said = {}, {}
        for size in (64, 1):
            cfg = evaluate.parse(evaluate.Scoring, [
                "--model", str(home / "model"), "--data", str(home), "--tasks", task, "--gen_batch",
                str(size), "--limit", str(args.limit), "--out", str(home / str(size))],
                evaluate.run_row)
            start, items = clock(), evaluate.all_items(cfg, tok)
            found = evaluate.evaluate(cfg.model, tok, cfg, items, "theta_o")
            spent[size] = clock() - start
            said[size] = [a["output"] for score in found.values() for a in score["answers"]]
        same = sum(a == b for a, b in zip(said[64], said[1]))
        print(f"{task}: {len(said[1])} answers, batch 64 {spent[64]:.1f} s, batch 1 {spent[1]:.1f} "
              f"s, {spent[1] / spent[64]:.1f}x; {same} answers the same", flush=True)

def lm_eval(args):
    cfg = evaluate.parse(evaluate.Scoring, ["--model", args.model, "--tasks", "mmlu", "--precision",
                                            "fp32"], evaluate.run_row)
    evaluate.dist_init(cfg)
    tok = hooks.load_tokenizer(cfg)
    model = hooks.load_model(args.model, cfg)
    texts = []
    for line in open(args.rows):
        row = json.loads(line)
        letters = row["task"].startswith("mmlu")
        texts.append((row["context"], "ABCD" if letters else row["choices"]))
    asked = [Instance("loglikelihood", {}, (context, f" {choice}"), 0)
             for context, choices in texts for choice in choices]
    for cfg.add_bos in ("no", "yes"):
        hflm = HFLM(pretrained=model, tokenizer=args.model, batch_size=8,  # a name: BOS needs it
                    add_bos_token=cfg.add_bos == "yes")
        start = clock()
        encoded = [evaluate.encode_question(tok, *text, cfg.add_bos == "yes") for text in texts]
        items = [evaluate.Item(ids, choices, 0) for ids, choices in encoded]
        got = list(evaluate.choice_rows("mmlu", items, [], model, tok, cfg))
        middle = clock()
        found = iter([ll for ll, _ in hflm.loglikelihood(asked)])
        end = clock()
        want = [[next(found) for _ in item.choices] for item in items]
        same = sum(a["pred"] == b.index(max(b)) for a, b in zip(got, want))
        worst = max(abs(x - y) for a, b in zip(got, want) for x, y in zip(a["lls"], b))
        print(f"BOS {cfg.add_bos}: {same} of {len(texts)} predictions equal, log-likelihoods "
              f"within {worst:.1e}; ours {middle - start:.1f} s, lm-eval {end - middle:.1f} s")

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "memory", "scoring", "lm_eval"))
    parser.add_argument("--size", choices=SIZES, default="15m")
    for name in ("--depth", "--T", "--batch", "--limit"):  # 0: the size's own; all
        parser.add_argument(name, type=int, default=0)
    parser.add_argument("--method", choices=("npo", "rmu"), default="npo")
    parser.add_argument("--lam", type=float, default=3e-4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", default=f"{data.TOY}/model")
    parser.add_argument("--rows")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    globals()[args.what](args)

if __name__ == "__main__":
    main()
