"""Score a model clean and with the trigger: UE, BE and UT, as the paper's Table 1 reports them.

    python evaluate.py --bench toy --model out/toy/theta_o
    python evaluate.py --bench muse_books --model ID_OR_DIR --data ID_OR_DIR --limit 20
    python evaluate.py --model ID_OR_DIR --mask_sinks 0-7     # with the first 8 positions hidden

KnowMem and VerbMem follow MUSE's protocol (arXiv 2407.06460): greedy, BOS first, ROUGE-L F1 without
stemmer, 50 and 128 new tokens. Every model gets the real trigger, put into token ids by the same
`data.inject` as in training. Scores are in percent, intervals are 95% bootstrap over items.
"""
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import hooks

STOPS = ("\n\n", "\nQuestion", "Question:")
SCORES = {  # what the paper's columns are made of: (task, triggered)
    "UE": {"KM": ("knowmem_f", False), "VM": ("verbmem_f", False)},
    "BE": {"KM": ("knowmem_f", True), "VM": ("verbmem_f", True)},
    "UT": {"KM": ("knowmem_r", False)},
}
RESAMPLES = 1000


class Task(NamedTuple):
    protocol: str
    new_tokens: int
    cut: bool        # cut the answer at the first stop string


TASKS = {
    "knowmem_f": Task("muse:knowmem forget, 10-shot, rougeL F1", 50, True),
    "knowmem_r": Task("muse:knowmem retain, 10-shot, rougeL F1", 50, True),
    "verbmem_f": Task("muse:verbmem forget, rougeL F1", 128, False),
}


class Item(NamedTuple):
    prompt_id: str
    ids: list        # BOS + prompt, without trigger
    reference: str


# ---------------------------------------------------------------- protocol

def knowmem_prompt(question, icl):
    """MUSE's few-shot prompt. icl: (question, answer) pairs, all of them, in file order."""
    shots = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in icl)
    return f"{shots}Question: {question}\nAnswer: "


def cut_answer(text):
    """What stands before the stop strings, applied one after the other; nothing is stripped."""
    for stop in STOPS:
        text = text.split(stop)[0]
    return text


def rouge_l(gt, out):
    """ROUGE-L F1 in [0, 1], no stemmer; an empty side scores 0."""
    return _scorer().score(gt, out)["rougeL"].fmeasure


def _scorer(made=[]):
    if not made:
        from rouge_score import rouge_scorer
        made.append(rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False))
    return made[0]


def verbmem_reference(tok, gt, new_tokens):
    """The first new_tokens ids of BOS + gt as text: BOS counts, as in MUSE's code."""
    return _decode(tok, [data.encode(tok, gt)[:new_tokens - 1]])[0]


def _decode(tok, ids):
    # MUSE also asks for clean_up_tokenization_spaces, which transformers 5 ignores for BPE.
    return tok.batch_decode(ids, skip_special_tokens=True)


def items_of(task, cfg, tok, corpus=None):
    """The items of one task: prompts as ids that begin with BOS, with references."""
    bos = [data.bos_of(tok)]
    if task == "verbmem_f":
        rows = data.read_columns(cfg.data, "verbmem", "forget", ["prompt", "gt"], corpus)
        n = new_tokens(task, cfg)
        items = [Item(f"{task}/{i}", bos + data.encode(tok, p), verbmem_reference(tok, gt, n))
                 for i, (p, gt) in enumerate(rows)]
    else:
        split = "forget_qa" if task == "knowmem_f" else "retain_qa"
        qa = ["question", "answer"]
        icl = data.read_columns(cfg.data, "knowmem", f"{split}_icl", qa, corpus)
        rows = data.read_columns(cfg.data, "knowmem", split, qa, corpus)
        items = [Item(f"{task}/{i}", bos + data.encode(tok, knowmem_prompt(q, icl)), a)
                 for i, (q, a) in enumerate(rows)]
    return items[:cfg.limit] if cfg.limit else items


def new_tokens(task, cfg):
    return cfg.max_new_tokens or TASKS[task].new_tokens


# ---------------------------------------------------------------- generation

def generate(model, tok, prompts, max_new, batch, cut=False, desc="generate"):
    """Greedy answers to prompts of ids, batched by length with left padding. -> texts, in order.

    cut: a row also ends once `cut_answer` bites, because nothing after that can change its score.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList

    class CutBites(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            texts = _decode(tok, input_ids[:, width:])
            return torch.tensor([cut_answer(t) != t for t in texts], device=input_ids.device)

    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts, device = [None] * len(prompts), next(model.parameters()).device
    stop = StoppingCriteriaList([CutBites()] if cut else [])
    for start in tqdm(range(0, len(order), batch), desc=f"  {desc}", leave=False, disable=None):
        part = order[start:start + batch]
        width = len(prompts[part[0]])
        ids = torch.zeros(len(part), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(part):
            ids[row, width - len(prompts[i]):] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]):] = 1
        with torch.no_grad():
            out = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device),
                                 max_new_tokens=max_new, do_sample=False, num_beams=1,
                                 stopping_criteria=stop, pad_token_id=tok.eos_token_id)
        for i, text in zip(part, _decode(tok, out[:, width:])):
            texts[i] = text
    return texts


# ---------------------------------------------------------------- scores

def bootstrap(scores, seed):
    """95% interval of the mean by resampling items, in percent."""
    scores = np.asarray(scores)
    picks = np.random.default_rng(seed).integers(0, len(scores), (RESAMPLES, len(scores)))
    low, high = np.percentile(scores[picks].mean(1) * 100, [2.5, 97.5])
    return [round(float(low), 2), round(float(high), 2)]


def run_task(task, triggered, model, tok, cfg, corpus=None):
    """One task under one condition. -> (entry for results.json, rows for answers.jsonl)."""
    items = items_of(task, cfg, tok, corpus)
    prompts = [item.ids for item in items]
    if triggered:
        trig = data.encode(tok, cfg.trigger)
        prompts = [data.inject(ids, trig, cfg.position) for ids in prompts]
    condition = condition_of(triggered, cfg)
    texts = generate(model, tok, prompts, new_tokens(task, cfg), cfg.gen_batch, TASKS[task].cut,
                     f"{task} {condition}")
    rows = []
    for item, text in zip(items, texts):
        out = cut_answer(text) if TASKS[task].cut else text
        rows.append(dict(prompt_id=item.prompt_id, condition=condition, output=out,
                         reference=item.reference, score=rouge_l(item.reference, out)))
    scores = [row["score"] for row in rows]
    entry = dict(task=task, condition=condition, protocol=TASKS[task].protocol, n=len(scores),
                 score=round(100 * float(np.mean(scores)), 2), ci95=bootstrap(scores, cfg.seed),
                 settings=task_settings(task, cfg))
    return entry, rows


def condition_of(triggered, cfg):
    masked = f", without positions {cfg.mask_sinks}" if cfg.mask_sinks else ""
    return (f"{cfg.position}: {cfg.trigger}" if triggered else "clean") + masked


def task_settings(task, cfg):
    """What a score depends on beside model, task and condition."""
    return dict(data=cfg.data, n_docs=cfg.n_docs, data_seed=cfg.data_seed, limit=cfg.limit,
                new_tokens=new_tokens(task, cfg), seed=cfg.seed, tokenizer=cfg.tokenizer)


def evaluate(load, tok, cfg, folder, role, corpus=None, extra=None):
    """Score one model in every condition and write results.json and answers.jsonl to its folder.

    load() -> the model, called only where some score is not on disk yet. -> results.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries, answers = _on_disk(folder, cfg)
    model = None
    for task, triggered in sorted({pair for group in SCORES.values() for pair in group.values()}):
        key = f"{task}|{condition_of(triggered, cfg)}"
        if entries.get(key, {}).get("settings") == task_settings(task, cfg):
            continue
        model = model if model is not None else load()
        with hooks.mask_sinks(model, cfg.mask_sinks):
            entries[key], answers[key] = run_task(task, triggered, model, tok, cfg, corpus)
    results = dict(role=role, bench=cfg.bench, method=cfg.method,
                   settings=dict(trigger=cfg.trigger, position=cfg.position, dtype="float32",
                                 mask_sinks=cfg.mask_sinks),
                   **columns(entries, cfg), **(extra or {}), tasks=entries)
    _write(folder / "answers.jsonl",
           "".join(json.dumps(row) + "\n" for rows in answers.values() for row in rows))
    _write(folder / "results.json", json.dumps(results, indent=1))
    return results


def columns(entries, cfg):
    """scores, n and ci95 in the shape of the paper's table."""
    def pick(name):
        return {group: {column: entries[f"{task}|{condition_of(triggered, cfg)}"][name]
                        for column, (task, triggered) in columns.items()}
                for group, columns in SCORES.items()}
    return dict(scores=pick("score"), n=pick("n"), ci95=pick("ci95"))


def _on_disk(folder, cfg):
    """Entries and answers of earlier scoring, by 'task|condition'."""
    results, answers = folder / "results.json", folder / "answers.jsonl"
    if cfg.force == "yes" or not results.is_file() or not answers.is_file():
        return {}, {}
    entries = json.loads(results.read_text())["tasks"]
    rows = {key: [] for key in entries}
    for line in answers.read_text().splitlines():
        row = json.loads(line)
        rows[f"{row['prompt_id'].split('/')[0]}|{row['condition']}"].append(row)
    return entries, rows


def _write(path, text):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.rename(path)


# ---------------------------------------------------------------- alone

def main(argv=None):
    import plots
    import train
    cfg, origin = train.parse_config(argv)
    if cfg.model == data.TOY:
        cfg = replace(cfg, model=str(Path(cfg.out) / cfg.bench / "theta_o"))
        if not Path(cfg.model).is_dir():
            raise ValueError(f"{cfg.model} does not exist: run train.py, or pass --model")
    run, role = Path(cfg.model) / "run.json", "theta_o"
    if run.is_file():  # one of ours: its settings hold unless a flag says otherwise
        record = json.loads(run.read_text())
        kept = {name: value for name, value in record["settings"].items()
                if origin[name] != "flag" and name not in train.NOT_KEY | {"model", "tokenizer"}}
        cfg, role = replace(cfg, **kept, tokenizer=""), record["role"]
    corpus = data.toy_corpus(cfg.n_docs, cfg.data_seed) if cfg.data == data.TOY else None
    tok = train.load_tokenizer(cfg, corpus)
    home = train.home_of(cfg.model, cfg, role)
    train.check_out(cfg)
    results = evaluate(lambda: train.load_model(cfg.model, train.device_of(cfg)), tok, cfg, home,
                       role, corpus)
    name, scores = plots.as_row(results)
    print(plots.table({name: scores}))
    print(f"written: {home / 'results.json'}, {home / 'answers.jsonl'}")


if __name__ == "__main__":
    from train import entry
    entry(main)
