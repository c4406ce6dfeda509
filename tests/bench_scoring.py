"""How fast scoring is, and whether it says what lm-eval says. Run by hand; no test.

    python tests/bench_scoring.py batch --model DIR               # generation: batch 32 against 1
    python tests/bench_scoring.py lm_eval --model DIR --rows FILE # needs pip install lm_eval

batch: a random Llama of 15.7M with DIR's tokenizer, prompts as long as MUSE's with invented words.
lm_eval: each JSON line of FILE holds a "context", its "choices" (continuations with their leading
space) and a "task" (rows of one task share what their contexts begin with); both programs score
them in fp32 in one process. CPU seconds are printed.
"""
import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch

if "lm_eval" in sys.argv:  # it needs another package that is called evaluate, so it goes first
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    sys.modules.pop("evaluate", None)
sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import evaluate


def timed(fn):
    start = time.process_time()
    return fn(), time.process_time() - start


def batch(args):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    tok = AutoTokenizer.from_pretrained(args.model)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tok), hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=8, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2)).eval().requires_grad_(False)
    rng, words = random.Random(0), " ".join(data.SEA["lines"] + data.HILL["lines"]).split()
    for name, length, new, cut in (("KnowMem", 350, 50, True), ("VerbMem", 1000, 128, False)):
        prompts = [[data.bos_of(tok)] + data.encode(tok, " ".join(rng.choices(words, k=length)))
                   [:length - rng.randrange(length // 10)] for _ in range(args.n)]
        got = {b: timed(lambda b=b: evaluate.generate(model, tok, prompts, new, b, cut))
               for b in (32, 1)}
        same = sum(a == b for a, b in zip(got[32][0], got[1][0]))
        print(f"{name}: {args.n} prompts, batch 32 {got[32][1]:.1f} s, batch 1 {got[1][1]:.1f} s: "
              f"{got[1][1] / got[32][1]:.1f}x, {same} of {args.n} outputs identical", flush=True)


def lm_eval(args):
    from transformers import AutoModelForCausalLM, AutoTokenizer
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
    p.add_argument("--n", type=int, default=32)
    arguments = p.parse_args()
    torch.set_num_threads(1)
    {"batch": batch, "lm_eval": lm_eval}[arguments.what](arguments)
