"""How fast and how large is it? Run by hand, on a quiet machine; random weights, fp32 on a CPU.

    python tests/bench.py step --size 135m                          # NPO + l_vn
    python tests/bench.py step --size 7b/4 --method rmu --lam 0
    python tests/bench.py step --size 7b --depth 2 --T 256          # 7B's width, two layers
    python tests/bench.py step --size 7b --T 256 --method rmu --share   # all 32 layers in 24 GB
    python tests/bench.py memory                                    # a 7B on 4 ranks, estimated
    python tests/bench.py scoring --limit 20                        # batch 64 against batch 1
    python tests/bench.py lm_eval --model DIR --rows FILE           # needs pip install lm_eval

step     Seconds of one training step, ours against *fair*: three models in memory, nothing cached,
         full logits, one forward per model and kind of rows, only those that the objective needs.
         Processes of their own in turns, the fastest step of all rounds counts. Prints both, their
         ratio, the ratio of FLOPs, and both losses, which must agree to 1e-4.
memory   Peak bytes of two steps on one of 4 ranks, Table A1's Books, on fake tensors.
scoring  Seconds of evaluate.py's loop on invented books as large as MUSE's, with a random Llama of
         17M, for --gen_batch 64 and 1, and how many answers are the same.
lm_eval  Each line of FILE is a JSON object with "task", "context" and "choices": log-likelihoods by
         ours and by lm-eval's HFLM, their seconds, equal predictions and the largest difference.
"""
import argparse
import copy
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import ExitStack
from dataclasses import replace
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
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import data
import evaluate
import hooks
import losses
import train

# processor seconds where there is no GPU: others who compute on the machine change them least
clock = time.time if evaluate.DEVICE == "cuda" else time.process_time
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
                                         for word in (f"--{name}", value)], train.table_row)


def random_model(args, seed, trainable="all"):
    """--share: layers share all weights but those that train, each read from memory as its own."""
    width, mlp, _, heads, kv_heads, vocab, tied, *_ = SIZES[args.size]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=mlp, num_attention_heads=heads,
        num_hidden_layers=1 if args.share else args.depth, num_key_value_heads=kv_heads,
        max_position_embeddings=4096, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1)
    with torch.device(evaluate.DEVICE):
        model = LlamaForCausalLM(config)
    blocks, trained = model.model.layers, trainable.split()[0]
    for i in range(1, args.depth) if args.share else ():
        own = i in hooks.parse_layers(trained, args.depth)
        known = {id(p): p for name, p in blocks[0].named_parameters()
                 if not (own and "down_proj" in name)}
        blocks.append(copy.deepcopy(blocks[0], known))
    return model.eval().requires_grad_(False)


def move(model, trainable):
    """Theta some way from theta_o, so that no term is 0."""
    hooks.set_trainable(model, trainable)
    torch.manual_seed(2)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.005 * torch.randn_like(p)


def rows_of(args, cfg):
    gen = torch.Generator().manual_seed(0)
    rows = torch.randint(2, SIZES[args.size][5], (3 * cfg.batch, cfg.T), generator=gen).tolist()
    f, r, p = (rows[i::3] for i in range(3))
    return data.Splits(f, r, p, [], [])


# ---------------------------------------------------------------- the two steps

def ours(args, cfg):
    evaluate.dist_init()
    splits, batch = rows_of(args, cfg), data.Batch(*[list(range(cfg.batch))] * 3)
    evaluate.load_model = lambda name, cfg: random_model(args, 1, cfg.trainable)  # theta_u
    model = random_model(args, 0, cfg.trainable)
    hooks.set_trainable(model, cfg.trainable)
    refs = train.references(splits, [[batch]], "theta_u", model, cfg)
    move(model, cfg.trainable)
    train.shard(model, cfg)
    layers = hooks.layers_of(model, cfg.layers) if cfg.lam else []
    with hooks.capture_norms(model, layers, cfg.k) as norms:
        return timed(lambda: model.losses_of(batch, refs, norms, cfg), model, cfg, args.steps)


def fair(args, cfg):
    theta, theta_o, theta_u = models = [random_model(args, seed, cfg.trainable) for seed in
                                        (0, 0, 1)]
    move(theta, cfg.trainable)
    splits, acts, npo = rows_of(args, cfg), [], cfg.method == "npo"
    f, r, p = (torch.tensor(rows, device=evaluate.DEVICE) for rows in splits[:3])
    c_u = losses.control_vector(theta.config.hidden_size, cfg.steer,
                                data.stream(cfg.seed, "control vector")).to(evaluate.DEVICE)
    mask, layers = torch.ones_like(f), hooks.layers_of(theta, cfg.layers) if cfg.lam else []

    def run(model, ids, logits=True):
        captured[model].begin()
        out = model(input_ids=ids, use_cache=False).logits if logits else \
            hooks.final_hidden(model, ids)
        return out, acts.pop(), captured[model].stack() if cfg.lam else None

    def terms():
        with torch.no_grad():
            of_o = {kind: run(theta_o, ids) for kind, ids in zip("frp", (f, r, p))
                    if npo or kind != "f"}
            of_u = run(theta_u, f, logits=False) if cfg.lam else None
        mine = {kind: run(theta, ids) for kind, ids in zip("frp", (f, r, p))}
        if npo:
            logp, logp_o = (losses.label_logp(of["f"][0][:, :-1], f[:, 1:]) for of in (mine, of_o))
            l_f = losses.npo(logp, logp_o, cfg.beta, mask[:, 1:])
        else:
            l_f = losses.rmu_forget(mine["f"][1], c_u, mask)
        l_r = sum(losses.row_mean(losses.kl(mine[kind][0], of_o[kind][0]), mask) for kind in "rp")
        if not npo:
            l_r = l_r + sum(losses.rmu_retain(mine[kind][1], of_o[kind][1], mask) for kind in "rp")
        l_vn = losses.value_norm(mine["f"][2], of_u[2]) + \
            losses.value_norm(mine["p"][2], of_o["p"][2]) if cfg.lam else torch.zeros_like(l_f)
        return l_f, l_r / 2, l_vn

    with ExitStack() as stack:
        captured = {model: stack.enter_context(hooks.capture_norms(model, layers, cfg.k))
                    for model in models}
        for model in models:
            hooks.decoder_layers(model)[cfg.layer].register_forward_hook(
                lambda layer, inputs, out: acts.append(out))
        return timed(terms, theta, cfg, args.steps)


def timed(terms, model, cfg, steps):
    """One step and then the fastest of `steps`; the first one's loss and terms; the peak."""
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
    cuda = evaluate.DEVICE == "cuda"
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return dict(seconds=min(spent[1:]), GB=peak, losses=found[0])


def flops(args, cfg):
    """-> (ours, fair), of a token of each row of a triple; causal attention is half of T x T."""
    width, mlp, _, heads, kv_heads, vocab, *_ = SIZES[args.size]
    weights = 2 * width ** 2 * (1 + kv_heads / heads) + 3 * width * mlp
    layer, head, down = 2 * weights + 2 * cfg.T * width, 2 * width * vocab, 2 * width * mlp
    full, vn = args.depth * layer + head, cfg.lam > 0
    if cfg.method == "npo":  # ours: the head again in backward, theta_o's logits twice
        return 9 * full + 7 * head, 12 * full + vn * (full - head)
    first, upper = int(cfg.trainable.split("-")[0]), (args.depth - cfg.layer - 1) * layer
    inner = 3 * ((cfg.layer - first) * layer + (cfg.layer - first + 1) * down)  # backward
    return (3 * (cfg.layer + 1) * layer + 4 * upper + 10 * head + inner +
            vn * 2 * upper * cfg.k / cfg.T,
            5 * full + 2 * (head + upper) + inner + vn * (upper + full - head))


def step(args):
    if args.share and args.method == "npo":
        sys.exit("--share: NPO trains all weights, so none can be shared")
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
          f"of T {cfg.T}, {evaluate.DEVICE}, {torch.get_num_threads()} threads")
    for variant, row in best.items():
        print(f"  {variant}: {row['seconds']:.3f} s, peak {row['GB']:.2f} GB, loss, l_f, l_r, l_vn "
              + " ".join(f"{value:.6g}" for value in row["losses"]))
    count_ours, count_fair = flops(args, cfg)
    print(f"  fair / ours: {best['fair']['seconds'] / best['ours']['seconds']:.2f}x, by FLOPs "
          f"{count_fair / count_ours:.2f}x")
    assert all(abs(a - b) <= 1e-4 * abs(b) for a, b in
               zip(best["ours"]["losses"], best["fair"]["losses"])), "the losses differ"


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
    for method, recompute in (("npo", "yes"), ("rmu", "yes"), ("rmu", "no")):
        cfg = evaluate.parse(train.Config, [
            "--bench", "muse_books", "--method", method, "--precision", "bf16_mixed",
            "--recompute", recompute], train.table_row)
        with FakeTensorMode(allow_non_fake_inputs=True):
            peak = fake_steps(cfg)
        print(f"4 ranks, 7B, T {cfg.T}, 1 triple a rank, {method}, {cfg.precision}, recompute "
              f"{recompute}: peak {peak / 1e9:.1f} GB a rank", flush=True)


def fake_steps(cfg):
    torch.set_default_dtype(torch.bfloat16)
    model = random_model(argparse.Namespace(size="7b", depth=32, share=False), 0)
    torch.set_default_dtype(torch.float32)
    hooks.set_trainable(model, cfg.trainable)
    splits, batch = data.Splits(*[[[0] * cfg.T]] * 3, [], []), data.Batch([0], [0], [0])
    wide, norms_o = torch.zeros(cfg.T, 4096, dtype=torch.bfloat16), torch.zeros(32, cfg.k, 32)
    rows = {(name, kind): {0: value} for name, value in (
        ("hidden", wide), ("acts", wide), ("norms", norms_o), ("logp", torch.zeros(cfg.T - 1)))
        for kind in "frp"}
    refs = train.References(splits, [[batch]], hooks.output_head(model).detach().clone(),
                            torch.zeros(4096), rows)
    train.shard(model, cfg)
    params = [p for p in model.parameters() if p.requires_grad]
    local = [torch.nn.Parameter(getattr(p.detach(), "_local_tensor", p.detach())) for p in params]
    optim = torch.optim.AdamW(local, 1e-5, fused=True)  # on DTensors it counts global shapes
    with hooks.capture_norms(model, range(32), cfg.k) as norms, Peak() as seen:
        for tensor in (*model.parameters(), refs.head):
            seen.add(getattr(tensor.data, "_local_tensor", tensor.data))
        for _ in range(2):
            l_f, l_r, l_vn = model.losses_of(batch, refs, norms, cfg)
            (l_f + cfg.gamma * l_r + cfg.lam * l_vn).backward()
            for p, part in zip(params, local):
                part.grad, p.grad = getattr(p.grad, "_local_tensor", p.grad), None
            optim.step()
            optim.zero_grad()
        return seen.peak


# ---------------------------------------------------------------- scoring

def muse_books(home, tok):
    """Invented rows in MUSE's layout, as many and as long as its own."""
    rng = random.Random(0)
    words = " ".join(text for text, in data.read(f"{data.TOY}/books", "raw", "forget", ["text"]))

    def text(tokens):
        return tok.decode(data.encode(tok, " ".join(rng.choices(words.split(), k=tokens)))[:tokens])

    tables = {f"knowmem/{split}": [dict(question=text(rng.randrange(10, 20)) + "?", answer=text(6))
                                   for _ in range(10 if split.endswith("icl") else 100)]
              for split in ("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl")}
    tables["verbmem/forget"] = [dict(prompt=text(rng.randrange(988, 1025)), gt=text(140))
                                for _ in range(100)]
    for name, rows in tables.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / f"{name}.json").write_text(json.dumps(rows))


def scoring(args):
    home, tok = Path(tempfile.mkdtemp()), AutoTokenizer.from_pretrained(f"{data.TOY}/model")
    muse_books(home, tok)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tok), hidden_size=512, intermediate_size=1376, num_hidden_layers=5,
        num_attention_heads=8, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=1)).eval().requires_grad_(False)
    model.save_pretrained(home / "model")
    for task in ("knowmem_f", "knowmem_r", "verbmem_f"):
        spent, said = {}, {}
        for size in (64, 1):
            cfg = evaluate.parse(evaluate.Scoring, [
                "--model", str(home / "model"), "--data", str(home), "--tasks", task, "--gen_batch",
                str(size), "--limit", str(args.limit)], evaluate.run_row)
            start, items = clock(), evaluate.all_items(cfg, tok)
            found = evaluate.evaluate(lambda: model, cfg.model, tok, cfg, home / str(size), items)
            spent[size] = clock() - start
            said[size] = [a["output"] for score in found.values() for a in score["answers"]]
        same = sum(a == b for a, b in zip(said[64], said[1]))
        print(f"{task}: {len(said[1])} answers, batch 64 {spent[64]:.1f} s, batch 1 {spent[1]:.1f} "
              f"s, {spent[1] / spent[64]:.1f}x; {same} answers the same", flush=True)


def lm_eval(args):
    cfg = evaluate.parse(evaluate.Scoring, ["--model", args.model, "--tasks", "mmlu", "--precision",
                                            "fp32"], evaluate.run_row)
    tok, rows = evaluate.load_tokenizer(cfg), [json.loads(line) for line in open(args.rows)]
    model = evaluate.load_model(args.model, cfg)
    for row in rows:
        row["texts"] = row["choices"] if row["task"].startswith("truthful") else list("ABCD")
    items = [evaluate.Question(row["context"], row["texts"], 0) for row in rows]
    asked = [Instance("loglikelihood", {}, (row["context"], " " + text), 0)
             for row in rows for text in row["texts"]]
    for bos in ("no", "yes"):
        cfg = replace(cfg, add_bos=bos)
        theirs = HFLM(pretrained=model, tokenizer=tok, batch_size=8, add_bos_token=bos == "yes")
        start = clock()
        got = list(evaluate.choice_rows("mmlu", items, [], model, tok, cfg, "ours"))
        middle = clock()
        want = iter([ll for ll, _ in theirs.loglikelihood(asked)])
        end = clock()
        want = [[next(want) for _ in row["texts"]] for row in rows]
        same = sum(a["pred"] == b.index(max(b)) for a, b in zip(got, want))
        worst = max(abs(x - y) for a, b in zip(got, want) for x, y in zip(a["lls"], b))
        print(f"BOS {bos}: {same} of {len(rows)} predictions equal, log-likelihoods within "
              f"{worst:.1e}; ours {middle - start:.1f} s, lm-eval {end - middle:.1f} s")


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
    parser.add_argument("--share", action="store_true")
    parser.add_argument("--model")
    parser.add_argument("--rows")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    globals()[args.what](args)


if __name__ == "__main__":
    main()
