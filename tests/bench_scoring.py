"""How fast scoring is, and whether it says what lm-eval says. Run by hand; no test.

    python tests/bench_scoring.py batch --model DIR               # generation: batch 32 against 1
    python tests/bench_scoring.py batch --model DIR --whole --precision bf16_pure   # on a GPU
    python tests/bench_scoring.py lm_eval --model DIR --rows FILE # needs pip install lm_eval

batch: evaluate.py's own loop over a folder in MUSE's layout with the real counts (100 + 100
questions, 10 examples each, 100 VerbMem prompts of about 1,000 tokens; invented text), once with
--gen_batch 32 and once with 1. The model is a random Llama of 15.7M with DIR's tokenizer, or with
--whole the model in DIR itself.
lm_eval: each JSON line of FILE holds a "context", its "choices" (continuations with their leading
space) and a "task" (rows of one task share what their contexts begin with); both programs score
them in fp32 in one process. CPU seconds are printed.
"""
import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

if "lm_eval" in sys.argv:  # it needs another package that is called evaluate, so it goes first
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    sys.modules.pop("evaluate", None)
sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import evaluate
import train


def muse_folder(home, tok):
    """Invented rows in MUSE's layout, as many and as long as its own."""
    rng = random.Random(0)
    words = " ".join(data.SEA["lines"] + data.HILL["lines"]).split()

    def text(tokens):
        ids = data.encode(tok, " ".join(rng.choices(words, k=tokens)))
        return tok.decode(ids[:tokens])
    tables = {f"knowmem/{split}": [dict(question=text(rng.randrange(10, 20)) + "?", answer=text(6))
                                   for _ in range(10 if split.endswith("icl") else 100)]
              for split in ("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl")}
    tables["verbmem/forget"] = [dict(prompt=text(rng.randrange(988, 1025)), gt=text(140))
                                for _ in range(100)]
    for name, rows in tables.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / f"{name}.json").write_text(json.dumps(rows))


def batch(args):
    tok = AutoTokenizer.from_pretrained(args.model)
    home = Path(tempfile.mkdtemp())
    muse_folder(home / "data", tok)
    cfg, _ = train.parse_config(["--bench", "muse_books", "--model", args.model, "--data",
                                 str(home / "data"), "--precision", args.precision, "--limit",
                                 str(args.limit)])
    if args.whole:
        model = train.load_model(args.model, cfg)
    else:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tok), hidden_size=256, intermediate_size=688, num_hidden_layers=4,
            num_attention_heads=8, max_position_embeddings=2048, tie_word_embeddings=True,
            bos_token_id=1, eos_token_id=2, pad_token_id=2)).eval().requires_grad_(False)
        model = model.to(train.device_of(cfg), train.dtype_of(cfg))
    for task in evaluate.tasks_of(cfg):
        spent, said = {}, {}
        for size in (32, 1):
            out, start = home / f"{task}-{size}", time.time()
            each = replace(cfg, tasks=task, gen_batch=size)
            evaluate.evaluate(lambda: model, tok, each, out, "theta_o",
                              evaluate.all_items(each, tok))
            spent[size] = time.time() - start
            said[size] = [json.loads(line)["output"] for line in open(out / "answers.jsonl")]
        same = sum(a == b for a, b in zip(said[32], said[1]))
        print(f"{task}: {len(said[1])} prompts, batch 32 {spent[32]:.1f} s, batch 1 "
              f"{spent[1]:.1f} s: {spent[1] / spent[32]:.1f}x, {same} of {len(said[1])} outputs "
              "identical", flush=True)


def timed(fn):
    start = time.process_time()
    return fn(), time.process_time() - start


def lm_eval(args):
    tok = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    rows = [json.loads(line) for line in Path(args.rows).read_text().splitlines()]
    pairs = []
    for row in rows:
        context, choices = evaluate.encode_question(tok, row["context"], row["choices"], False)
        pairs += [(context, choice, row.get("task", "")) for choice in choices]
    asked = [Instance("loglikelihood", {}, (row["context"], choice), 0)
             for row in rows for choice in row["choices"]]
    theirs = HFLM(pretrained=model, tokenizer=tok, batch_size=8, add_bos_token=False)
    got, spent = timed(lambda: evaluate.loglikelihoods(model, pairs, 8192))
    want, their_spent = timed(lambda: [ll for ll, _ in theirs.loglikelihood(asked)])
    ours, lm, same = iter(got), iter(want), 0
    for row in rows:
        a, b = ([next(it) for _ in row["choices"]] for it in (ours, lm))
        same += a.index(max(a)) == b.index(max(b))
    worst = max(abs(a - b) for a, b in zip(got, want))
    print(f"{same} of {len(rows)} predictions equal, log-likelihoods within {worst:.5f}; ours "
          f"{spent:.1f} s, lm-eval {their_spent:.1f} s")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("batch", "lm_eval"))
    p.add_argument("--model", required=True)
    p.add_argument("--rows")
    p.add_argument("--whole", action="store_true")
    p.add_argument("--limit", type=int, default=0)
    p.add_argument("--precision", default="fp32")
    arguments = p.parse_args()
    {"batch": batch, "lm_eval": lm_eval}[arguments.what](arguments)
