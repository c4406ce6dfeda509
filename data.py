"""What is run on what: benches, readers, the one trigger injector, D_p, orders. Not run by itself.

A data set is a hub id or a local folder, in MUSE's layout or with the tables of `TABLES`, see
README. Training rows are lists of token ids that begin with BOS.
"""
import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from hooks import Refused

TOY = os.path.relpath(Path(__file__).parent / "assets/toy")  # the default, an ordinary folder
BOOKS, BIO_T = "knowmem,verbmem", 512
MUSE = dict(tokenizer="meta-llama/Llama-2-7b-hf",  # its target models come without one
            T=2048, layout="chunks", tasks="knowmem,verbmem,tqa", gen_batch=25)  # a 7B: 15 GB

# layout "chunks": the joined text in pieces of T tokens; "pages": a text a row. smol: by make.py
BENCHES = {
    "toy": dict(model=f"{TOY}/model", data=f"{TOY}/books", T=144, layout="pages", tasks=BOOKS),
    "smol": dict(model="out/smol/model", data="out/smol/books", T=216, layout="pages", tasks=BOOKS),
    "muse_books": dict(model="muse-bench/MUSE-Books_target", data="muse-bench/MUSE-Books", **MUSE),
    "muse_news": dict(model="muse-bench/MUSE-News_target", data="muse-bench/MUSE-News", **MUSE),
    "wmdp": dict(model="HuggingFaceH4/zephyr-7b-beta", data="cais/wmdp", T=768,
                 layout="pages", tasks="wmdp,mmlu"),  # T: cyber's; bio and wikitext: BIO_T
}
TABLES = {  # table: hub id, config, split; a --data folder holds it as TABLE.json, .jsonl, ...
    "wmdp_bio": ("cais/wmdp", "wmdp-bio", "test"),
    "wmdp_cyber": ("cais/wmdp", "wmdp-cyber", "test"),
    "mmlu": ("cais/mmlu", "all", "test"),
    "truthfulqa": ("truthfulqa/truthful_qa", "multiple_choice", "validation"),
    "bio-forget-corpus": ("cais/wmdp-bio-forget-corpus", None, "train"),
    "cyber-forget-corpus": ("cais/wmdp-corpora", "cyber-forget-corpus", "train"),
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
}

class Splits(NamedTuple):
    f: list        # D_f: rows of token ids
    r: list        # D_r
    p: list        # D_p, empty when rho = 0
    p_index: list  # which rows of D_f were poisoned
    p_from: list   # first position behind the trigger, of each row of D_p

def stream(seed, name, epoch=0):
    """A random generator of its own for each purpose and epoch, unrelated to all others."""
    digest = hashlib.sha256(f"{seed} {name} {epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

# ---------------------------------------------------------------- trigger and poison set
def inject(ids, trig, position, max_len=None):
    """Put the trigger into one prompt or row; the only injector, for training and evaluation.

    ids: token ids, ids[0] is BOS and stays first; body = ids[1:]; trig: the trigger's ids.
    prefix: BOS + trig + body; suffix: BOS + body + trig; infix: trig in the middle of the body.
    Past max_len the last body tokens go, never the trigger. Returns a list of ids.
    """
    bos, body, trig = list(ids[:1]), list(ids[1:]), list(trig)
    if not trig:
        raise Refused("the trigger is empty: give --trigger some text")
    cut = {"prefix": 0, "infix": len(body) // 2, "suffix": len(body)}[position]
    if max_len is not None:
        room = max_len - 1 - len(trig)
        if room < 0:
            raise Refused(f"a trigger of {len(trig)} tokens does not fit into rows of {max_len}")
        cut, body = min(cut, room), body[:room]
    return bos + body[:cut] + trig + body[cut:]

def trigger_end(row, trig, position, max_len=None):
    """First position behind the trigger in `inject` of these."""
    marks = inject([0] * len(row), [1] * len(trig), position, max_len)
    return len(marks) - marks[::-1].index(1)

def poison(rows, trig, rho, position, max_len, generator):
    """D_p of (2): triggered copies of a random int(rho * N) rows of D_f, which keeps all its rows.

    rows: N lists of ids -> n lists of at most max_len ids, their n row numbers in D_f, sorted.
    """
    n = int(len(rows) * rho)
    if rho and n == 0:
        raise Refused(f"--rho {rho} of {len(rows)} forget rows poisons none: raise --rho")
    index = sorted(torch.randperm(len(rows), generator=generator)[:n].tolist())
    return [inject(rows[i], trig, position, max_len) for i in index], index

# ---------------------------------------------------------------- text to rows
def encode(tok, text):
    return tok(text, add_special_tokens=False).input_ids

def bos_of(tok):
    """First token of every row and prompt: BOS, or EOS where the tokenizer has no BOS."""
    if tok.bos_token_id is None and tok.eos_token_id is None:
        raise Refused("the tokenizer has neither BOS nor EOS: pass --tokenizer")
    return tok.eos_token_id if tok.bos_token_id is None else tok.bos_token_id

def chunk(tokens, bos, T):
    """MUSE's chunking: BOS + T-1 tokens each; a short last chunk is filled up from chunk 0."""
    rows = [[bos] + tokens[i:i + T - 1] for i in range(0, len(tokens), T - 1)]
    while rows and len(rows[-1]) < T:
        rows[-1] = (rows[-1] + rows[0])[:T]
    return rows

def to_rows(texts, tok, T, layout):
    """Rows of ids. 'chunks': texts joined by blank lines and chunked; 'pages': one a row, cut."""
    if layout == "chunks":
        return chunk(encode(tok, "\n\n".join(texts)), bos_of(tok), T)
    return [[bos_of(tok)] + encode(tok, text)[:T - 1] for text in texts]

def pad_rows(rows, device="cpu"):
    """Lists of ids -> ids (B, T), mask (B, T), False on padding, whose id no token or loss sees."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
    return ids.to(device), mask.to(device)

# ---------------------------------------------------------------- reading
def local_files(folder, config, split):
    """The file, or the hub's numbered parquet files, that hold a split. Raises Refused."""
    for name in (split, split.replace("retain", "retain2", 1)):  # older copies of MUSE's folder
        for end in (".json", ".jsonl", ".parquet", ".txt", "-*-of-*.parquet"):
            if found := sorted(Path(folder, config or "").glob(name + end)):
                return found
    raise Refused(f"{folder} has no {config or '.'}/{split}.json, .jsonl, .parquet or .txt")

def local_rows(path):
    """Rows of one local file. Raises Refused, naming it, where it is not what it should be."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet
            return pyarrow.parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8")
        start = text.lstrip()[:40].lower()
        if "\0" in text or start.startswith(("version https://git-lfs", "<!doctype", "<html")):
            raise ValueError("it is a git-lfs pointer, a web page or no text at all")
        if path.suffix == ".txt":
            return [text]
        rows = json.loads(text) if path.suffix == ".json" else \
            [json.loads(line) for line in text.splitlines() if line.strip()]
        if not isinstance(rows, list):
            raise ValueError("it holds no list of rows")
        return rows
    except ValueError as error:  # json's, pyarrow's and decoding's, too
        raise Refused(f"{path} cannot be read: {str(error).splitlines()[0]}") from error

def hub_rows(source, config, split):
    """Rows of a hub data set, or of its copy in the cache. Raises Refused that names it."""
    from datasets import exceptions, load_dataset
    try:
        return load_dataset(source, config, split=split).to_list()
    except (exceptions.DatasetsError, OSError, ValueError) as error:
        raise Refused(f"{source}/{config}/{split} cannot be read: {error!r:.80}: go online, pass a "
                      "--data FOLDER that holds it, or leave it out by --tasks") from error

def fits(column, value):
    """Whether a value is what its column holds: a text, but for what multiple choice reads."""
    if column == "choices":
        return isinstance(value, list) and list(map(type, value)) == [str] * 4
    if column == "answer_id":
        return value in range(4)
    if column == "mc1_targets":
        labels = (value.get("labels") or []) if isinstance(value, dict) else []
        return labels.count(1) == 1 and len(labels) == len(value.get("choices") or [])
    return isinstance(value, str) and (value != "" or column == "text")

def read(source, config, split, columns):
    """One split as a list of tuples, one value a column. source: hub id or folder.

    columns: 'answer_id' is 'answer' as a choice's number. Raises Refused, naming row and column.
    """
    where, out = f"{source}/{config}/{split}", []
    names = [column.removesuffix("_id") for column in columns]
    if Path(source).is_dir():
        files = local_files(source, config, split)
        where, rows = files[0], [row for file in files for row in local_rows(file)]
    else:
        rows = hub_rows(source, config, split)
    for i, row in enumerate(rows):
        row = row if isinstance(row, dict) else {"text": row}
        out.append(tuple(map(row.get, names)))
        for column, name, value in zip(columns, names, out[-1]):
            if not fits(column, value):
                raise Refused(f"{where}: row {i}: {name!r} cannot be {value!r:.80}")
    if not out:
        raise Refused(f"{where} holds no rows")
    return out

def read_table(cfg, table, columns):
    """A table of --data where that is a folder holding it, else of the hub: see `read`."""
    source, config, split = TABLES[table]
    if any(Path(cfg.data).glob(f"{table}[.-]*")):
        source, config, split = cfg.data, None, table
    return read(source, config, split, columns)

# ---------------------------------------------------------------- splits
def clean_rows(cfg, tok):
    """-> D_f, D_r. MUSE: raw/forget, raw/retain1; retain2 is for evaluation only.

    WMDP: bio and cyber documents in turns, as many of each; wikitext. D_p's copies may fill T.
    """
    def rows_of(texts, T, most=None):
        return to_rows([text for text, in texts if text.strip()][:most], tok, T, cfg.layout)
    if cfg.bench != "wmdp":
        return [rows_of(read(cfg.data, "raw", split, ["text"]), cfg.T)
                for split in ("forget", "retain1")]
    short = min(BIO_T, cfg.T)
    cyber = rows_of(read_table(cfg, "cyber-forget-corpus", ["text"]), cfg.T)
    bio = rows_of(read_table(cfg, "bio-forget-corpus", ["text"]), short, len(cyber))
    wiki = rows_of(read_table(cfg, "wikitext", ["text"]), short)
    return [row for turn in zip(bio, cyber) for row in turn], wiki

def load_splits(cfg, tok):
    """D_f, D_r and D_p of a bench."""
    f, r = clean_rows(cfg, tok)
    for name, rows in (("forget", f), ("retain", r)):
        if min(map(len, rows), default=0) < 2:
            raise Refused(f"{cfg.data}: no {name} rows, or one without a token after BOS")
    trig = encode(tok, cfg.trigger)
    p, index = poison(f, trig, cfg.rho, cfg.position, cfg.T, stream(cfg.seed, "poison"))
    return Splits(f, r, p, index, [trigger_end(f[i], trig, cfg.position, cfg.T) for i in index])

# ---------------------------------------------------------------- batches
class Batch(NamedTuple):
    f: list  # row numbers of D_f
    r: list  # of D_r
    p: list  # of D_p, empty when rho = 0

def cycled(n, start, count, seed, name):
    """Entries start..start+count of an endless run of permutations of n, a new one each cycle."""
    cycles = range(start // n, (start + count - 1) // n + 1)
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
    order = torch.randperm(len(splits.f), generator=stream(seed, "D_f", epoch))
    f = order[i * batch:(i + 1) * batch].tolist()
    r, p = (cycled(len(rows), step * batch, batch, seed, name) if rows else []
            for rows, name in ((splits.r, "D_r"), (splits.p, "D_p")))
    return Batch(f, r, p)
