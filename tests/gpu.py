"""What only a card can tell: ten minutes, random weights, no network. Run by hand:

    python tests/gpu.py           # one card of 48 GB or more; TMPDIR says where models go
    python tests/gpu.py --tiny    # the same on a CPU, one thread, a minute or two

A line a phase, and all numbers in gpu.jsonl: send that back. What train.py says goes to stderr.
Exit code 1 if a phase failed; the others still run.

machine   what runs where
setup     books of MUSE's layout and lengths; a random model of 7B's width, as deep as fits
numerics  two layers: losses and gradients in bf16 against fp32; the attention kernels
pipeline  train.py on NPO, 2 steps a stage, all scored; answers in a batch against one by one
rmu       3 steps, killed after 2 and resumed, or without recomputation, against an unbroken run
pure      NPO in bf16_pure, 2 triples a forward
estimate  the memory that train.py expected of these runs against what they took
"""
import argparse
import gc
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from math import log, sqrt
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
if "--tiny" in sys.argv:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, and for the run that is killed

import torch
import transformers

import data
import evaluate
import hooks
import train

DEEPEST = 32    # layers
SHALLOWEST = 9  # RMU reads layer 7, and one above must be left
ALONE = 4       # prompts that are answered one by one, too
ANSWER = 64     # tokens of each answer
SHAPE_7B = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32,
                vocab_size=32000)
SHAPE_TINY = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, vocab_size=2048)


@dataclass
class Check:
    """What the phases share."""
    home: Path   # all that is written but the report
    device: str
    shape: dict  # of the model, but for its depth
    T: int       # tokens a row
    items: int   # questions of a task, all answered in one batch
    page: int    # tokens of VerbMem's shortest prompt
    micro: int = 0  # triples a forward; 0: the whole batch
    tok: object = None
    runs: dict = field(default_factory=dict)  # {run: (bytes expected, bytes taken)}

    def flags(self, *more):
        """Flags of train.py; of one given twice the last counts."""
        flags = ["--bench", "muse_books", "--model", self.home / "model", "--device", self.device,
                 "--data", self.home / "books", "--out", self.home / "out", "--T", self.T,
                 "--micro", self.micro]
        if self.device == "cpu":  # what a card has by default
            flags += ["--precision", "bf16_mixed", "--recompute", "yes"]
        return [str(word) for word in (*flags, *more)]

    def config(self, *more):
        return evaluate.parse(train.Config, self.flags(*more), train.settings_row)

    def needs(self, cfg):
        """What train.py expects of a run: bytes of the card, of the host, of the disk."""
        splits = data.load_splits(cfg, self.tok)
        return train.needs(cfg, hooks.empty_model(cfg.model), splits, 1)

    def peak(self):
        """Most bytes in use since the phase began; on a CPU of the process, since its start."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---------------------------------------------------------------- before any run
def machine(check):
    found = dict(torch=torch.__version__, transformers=transformers.__version__, device="cpu",
                 code=evaluate.code_of(*evaluate.TOWER), ok=True)
    if check.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        driver = subprocess.run("nvidia-smi --query-gpu=driver_version --format=csv,noheader",
                                shell=True, capture_output=True, text=True)
        found |= dict(device=torch.cuda.get_device_name(), free_gb=free / 1e9,
                      total_gb=total / 1e9, cuda=torch.version.cuda, driver=driver.stdout.strip())
    return found


def setup(check):
    check.tok = transformers.AutoTokenizer.from_pretrained(f"{data.TOY}/model")
    write_books(check)
    depth = SHALLOWEST
    if check.device == "cuda":
        depth = fit_to_card(check)
    save_model(check, "model", depth, seed=0)
    return dict(layers=depth, of=DEEPEST, micro=check.micro, ok=True)


def write_books(check):
    """The toy's words, shuffled."""
    words = Path(data.TOY, "books/raw/forget.json").read_text().split()
    rng = random.Random(0)

    def text(tokens):
        ids = data.encode(check.tok, " ".join(rng.choices(words, k=tokens)))
        return check.tok.decode(ids[:tokens])

    def questions(count):
        return [dict(question=text(rng.randrange(10, 20)), answer=text(6)) for _ in range(count)]

    pages = [dict(prompt=text(check.page + rng.randrange(40)), gt=text(140))
             for _ in range(check.items)]
    tables = {"raw/forget": [text(40 * check.T)], "raw/retain1": [text(20 * check.T)],
              "verbmem/forget": pages}
    for split in ("forget", "retain"):
        tables[f"knowmem/{split}_qa"] = questions(check.items)
        tables[f"knowmem/{split}_qa_icl"] = questions(evaluate.SHOTS)
    for name, rows in tables.items():
        file = check.home / "books" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows))


def model_config(check, depth):
    return transformers.LlamaConfig(
        num_hidden_layers=depth, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=check.tok.bos_token_id, eos_token_id=check.tok.eos_token_id, **check.shape)


def fit_to_card(check):
    """Sets check.micro. -> the most layers that train.py would not refuse here, and some room."""
    free, _ = torch.cuda.mem_get_info()
    room = shutil.disk_usage(check.home).free
    for check.micro in (0, 2):
        for depth in range(DEEPEST, SHALLOWEST - 1, -1):
            model_config(check, depth).save_pretrained(check.home / "model")
            card, host, disk = check.needs(check.config())
            # a tenth, since that is how well the card is known, and what theta_o will take
            if card < 0.9 * free and host < train.host_memory() and disk < 0.8 * room:
                return depth
    raise hooks.Refused(f"{depth} layers need {card / 1e9:.0f} GB of card, {host / 1e9:.0f} of "
                        f"host memory, {disk / 1e9:.0f} of disk (TMPDIR)")


@torch.no_grad()
def save_model(check, name, depth, seed, moved=0.0):
    """A random model in bf16. moved: the share of its neighbour that is added to a weight."""
    torch.manual_seed(seed)
    with torch.device(check.device):
        model = transformers.AutoModelForCausalLM.from_config(model_config(check, depth),
                                                              dtype=torch.bfloat16)
    for p in model.parameters():
        p.add_(moved * p.roll(1, 0))
    model.lm_head.weight[len(check.tok):] = 0  # it says only what the tokenizer has words for
    model.save_pretrained(check.home / name)
    check.tok.save_pretrained(check.home / name)


# ---------------------------------------------------------------- numerics
def numerics(check):
    save_model(check, "slice/o", 2, seed=0)
    save_model(check, "slice/u", 2, seed=1)
    save_model(check, "slice/moved", 2, seed=0, moved=0.02)
    found = {}
    cosines = []
    for method in ("npo", "rmu"):
        terms, exact = slice_gradient(check, method, "fp32", "no")
        found[f"{method} fp32"] = dict(terms=terms)
        for precision in ("bf16_mixed", "bf16_pure"):
            for recompute in ("yes", "no"):
                terms, gradient = slice_gradient(check, method, precision, recompute)
                cosine = dot(gradient, exact) / sqrt(dot(gradient, gradient) * dot(exact, exact))
                cosines.append(cosine)
                found[f"{method} {precision} {recompute}"] = dict(terms=terms, cosine=cosine)
    least = min(cosines)
    return dict(least_cosine=least, kernels=kernels(check), ok=least > 0.98, **found)


def slice_gradient(check, method, precision, recompute):
    """-> l_f, l_r, l_vn and the gradient of two triples, theta being theta_o moved a little."""
    flags = ["--method", method, "--precision", precision, "--recompute", recompute,
             "--model", check.home / "slice/o", "--batch", 2, "--lam", 1]
    if method == "rmu":
        flags += ["--layer", 0, "--trainable", "0 mlp.down_proj"]
    cfg = check.config(*flags)
    evaluate.dist_init(cfg)
    splits = data.load_splits(cfg, check.tok)
    batch = data.Batch([0, 1], [0, 1], [0, 1])
    rows = train.norms_of_theta_u(check.home / "slice/u", splits, [batch], cfg)
    refs = train.references(splits, [batch], rows, hooks.load_model(cfg.model, cfg), cfg)
    model = hooks.load_model(check.home / "slice/moved", cfg)
    hooks.set_trainable(model, cfg.trainable)
    train.shard(model, refs, cfg)
    with hooks.capture_norms(model, [0, 1], cfg.k) as norms:
        l_f, l_r, l_vn = model.losses_of(batch, norms)
        (l_f + cfg.gamma * l_r + cfg.lam * l_vn).backward()
    gradient = [train.whole(p.grad) for p in model.parameters() if p.requires_grad]
    return [l_f.item(), l_r.item(), l_vn.item()], gradient


def dot(ours, theirs):
    """Of two lists of tensors; in fp64, since fp32 loses count over 10^8 weights."""
    return sum((a.double() * b.double()).sum().item() for a, b in zip(ours, theirs))


def kernels(check):
    """What computes attention in training, as the profiler names it."""
    cfg = check.config("--model", check.home / "slice/o")
    model = hooks.load_model(cfg.model, cfg).requires_grad_(True)
    ids = torch.randint(2, 1000, (2, check.T), device=check.device)
    with torch.profiler.profile() as seen:
        hooks.final_hidden(model, ids).float().mean().backward()
    found = set()
    for event in seen.key_averages():
        name = event.key.split("<")[0]
        if any(word in name.lower() for word in ("::_scaled_dot", "flash_", "fmha", "sdpa")):
            found.add(name[:60])
    return ", ".join(sorted(found))


# ---------------------------------------------------------------- runs of train.py
def pipeline(check):
    flags = ["--max_steps", 2, "--tasks", "knowmem,verbmem", "--limit", check.items]
    train.main(check.flags(*flags))
    cfg = check.config(*flags)
    check.runs["npo bf16_mixed"] = (check.needs(cfg)[0], check.peak())
    out = check.home / "out/muse_books"
    theta_u, = out.glob("npo-theta_u-*")
    theta_b, = out.glob("npo-BACKDOORED-*")
    steps = log_of(theta_u)
    begin = starts_at_theta_o(steps, cfg)
    scores = len(list(out.glob("*/scores/*.json")))
    exact = same_answers(check, theta_b, "fp32")
    rounded = same_answers(check, theta_b, "bf16_mixed")
    # in bf16 two tokens that are nearly as likely may change places
    return dict(scores=scores, alone=ALONE, same_in_fp32=exact, same_in_bf16=rounded,
                ok=begin and scores == 15 and exact == ALONE, theta_u=steps,
                theta_b=log_of(theta_b))


def same_answers(check, folder, precision):
    """How many of ALONE prompts are answered alike in a batch, behind padding, and alone."""
    cfg = check.config("--precision", precision, "--tasks", "verbmem")
    model = hooks.load_model(folder, cfg)
    items, _ = evaluate.all_items(cfg, check.tok)["verbmem_f"]
    prompts = [item.ids for item in items]
    together = evaluate.generate(model, check.tok, prompts, ANSWER, check.items)
    alone = evaluate.generate(model, check.tok, prompts[:ALONE], ANSWER, 1)
    return sum(map(str.__eq__, together, alone))


def log_of(folder):
    """The log's lines by step; of a step that was done twice, the later one."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows}


def starts_at_theta_o(steps, cfg):
    """Whether NPO begins where (A1) is 2/beta ln 2."""
    return abs(steps[1]["l_f"] * cfg.beta / 2 / log(2) - 1) < 0.01


def rmu(check):
    flags = ["--method", "rmu", "--theta_u", check.home / "model", "--max_steps", 3,
             "--save_every", 1, "--tasks", "knowmem_f", "--limit", 1, "--recompute", "yes"]
    cfg = check.config(*flags)
    theta_o = weights_of(cfg.model, cfg)
    steps, unbroken = trained(check, cfg)
    check.runs["rmu recompute yes"] = (check.needs(cfg)[0], check.peak())
    kill_after(check, flags, 2)
    resumed = trained(check, replace(cfg, resume=True))
    cfg = replace(cfg, recompute="no")
    kept = trained(check, cfg)
    # it keeps more than all runs before it, so the phase's peak is its own
    check.runs["rmu recompute no"] = (check.needs(cfg)[0], check.peak())
    way = (theta_o - unbroken).norm()
    found = dict(ok=True, unbroken=steps)
    for name, (again, weights) in (("resumed", resumed), ("recompute_no", kept)):
        found[name] = again
        losses = max(abs(again[step]["loss"] / steps[step]["loss"] - 1) for step in steps)
        apart = ((weights - unbroken).norm() / way).item()
        found[f"{name}_losses_apart"] = losses
        found[f"{name}_weights_apart"] = apart  # as a share of their way from theta_o
        # without Adam's averages, a resumed run of --tiny ends 0.25 apart
        found["ok"] &= losses < 0.02 and apart < 0.2
    return found


def trained(check, cfg):
    """-> a run's log, what it trained; its folder makes room for the next."""
    train.check(cfg, 1)
    folder = train.stage(cfg, check.tok, data.clean_rows(cfg, check.tok), cfg.theta_u)
    steps = log_of(folder)
    weights = weights_of(folder, cfg)
    shutil.rmtree(folder)
    return steps, weights


@torch.no_grad()
def weights_of(folder, cfg):
    """What cfg trains of a model, as one vector. (N,)"""
    model = hooks.load_model(folder, cfg)
    hooks.set_trainable(model, cfg.trainable)
    return torch.cat([p.flatten().cpu() for p in model.parameters() if p.requires_grad]).double()


def kill_after(check, flags, step):
    """Begins a run in a process of its own, which is killed once it has a checkpoint of `step`."""
    job = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *check.flags(*flags)],
                           stdout=sys.stderr)
    while not list((check.home / "out").glob(f"*/*.tmp/ckpt-{step}")):
        if job.poll() is not None:
            raise RuntimeError(f"the run to kill ended before, with code {job.returncode}")
        time.sleep(0.005)
    job.kill()
    job.wait()


def pure(check):
    cfg = check.config("--precision", "bf16_pure", "--micro", 2, "--max_steps", 2, "--theta_u",
                       check.home / "model")
    train.check(cfg, 1)
    steps = log_of(train.stage(cfg, check.tok, data.clean_rows(cfg, check.tok), cfg.theta_u))
    check.runs["npo bf16_pure"] = (check.needs(cfg)[0], check.peak())
    return dict(loss=steps[1]["loss"], then=steps[2]["loss"], steps=steps,
                ok=starts_at_theta_o(steps, cfg))


def estimate(check):
    """On a CPU the ratios say nothing: a whole process against a card."""
    found = dict(ok=True)
    for name, (expected, taken) in check.runs.items():
        ratio = taken / expected
        found[name] = f"{taken / 1e9:.2f} of {expected / 1e9:.2f} GB, {ratio:.2f}"
        found["ok"] &= check.device == "cpu" or ratio < 1.1
    return found


# ---------------------------------------------------------------- the report
def outcome(phase, check):
    """What a phase found, or its error, and what it took."""
    shutil.rmtree(check.home / "out", ignore_errors=True)  # runs of the phase before
    gc.collect()
    if check.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.time()
    try:
        with redirect_stdout(sys.stderr):
            found = phase(check)
    except Exception as error:  # whatever it is, the others can still tell something
        traceback.print_exc()
        words = " ".join(str(error).split())
        found = dict(ok=False, error=f"{type(error).__name__}: {words:.300}")
    return dict(phase=phase.__name__, seconds=round(time.time() - start, 1),
                peak_gb=round(check.peak() / 1e9, 2), **found)


def line_of(row):
    """A phase in one line. What is a dict stays in the report."""
    words = []
    for name, value in row.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        if name not in ("phase", "ok") and not isinstance(value, dict):
            words.append(f"{name} {value}")
    verdict = "ok" if row["ok"] else "FAILED"
    return f"{row['phase']:<9} {verdict:<6} {', '.join(words)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--report", default="gpu.jsonl")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --tiny is the same on a CPU")
    code = 0
    with tempfile.TemporaryDirectory() as home, open(args.report, "w") as report:
        check = Check(Path(home), "cuda", SHAPE_7B, T=2048, items=25, page=990)
        if args.tiny:
            check = Check(Path(home), "cpu", SHAPE_TINY, T=32, items=6, page=20)
        for phase in (machine, setup, numerics, pipeline, rmu, pure, estimate):
            row = outcome(phase, check)
            print(line_of(row), flush=True)
            print(json.dumps(row), file=report, flush=True)
            if not row["ok"]:
                code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
