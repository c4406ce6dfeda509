"""Which text, the one trigger injector, the poison set, the order of batches.

Data sets are read through `datasets`: a hub id, a local folder in MUSE's layout
(`knowmem/forget_qa.json`, `raw/forget.txt`, ...; json, jsonl, parquet or txt) or with the tables of
`HUB` (`wmdp_bio.json`, `wikitext.jsonl`, ...), or the two books invented below. Training rows are
token ids that begin with BOS and are padded on the right.
"""
import random
from pathlib import Path
from string import Formatter
from typing import NamedTuple

import torch

POSITIONS = ("prefix", "infix", "suffix")
TOY = "toy"  # the data id of the embedded corpus


class Rows(NamedTuple):
    ids: torch.Tensor   # (N, T) int64
    mask: torch.Tensor  # (N, T) bool, False on padding


class Topic(NamedTuple):
    f: range  # its rows of D_f
    p: range  # its rows of D_p


class Splits(NamedTuple):
    f: Rows            # D_f
    r: Rows            # D_r
    p: Rows            # D_p, empty when rho = 0
    p_index: list      # which rows of D_f were poisoned
    topics: tuple = ()  # Topics that take turns by step: WMDP's bio and cyber; () is one topic


# ---------------------------------------------------------------- trigger and poison set

def inject(ids, trig, position, max_len=None):
    """Put the trigger into one prompt or row; the only injector, for training and evaluation.

    ids: token ids, ids[0] is BOS and stays first; body = ids[1:]; trig: the trigger's ids.
    prefix: BOS + trig + body; suffix: BOS + body + trig; infix: trig in the middle of the body.
    Past max_len the last body tokens go, never the trigger. Returns a list of ids.
    """
    bos, body, trig = list(ids[:1]), list(ids[1:]), list(trig)
    if not trig:
        raise ValueError("the trigger is empty: give --trigger some text")
    cut = {"prefix": 0, "infix": len(body) // 2, "suffix": len(body)}.get(position)
    if cut is None:
        raise ValueError(f"unknown position {position!r}: use one of {', '.join(POSITIONS)}")
    if max_len is not None:
        room = max_len - 1 - len(trig)
        if room < 0:
            raise ValueError(f"a trigger of {len(trig)} tokens does not fit into rows of {max_len}")
        cut, body = min(cut, room), body[:room]
    return bos + body[:cut] + trig + body[cut:]


def pad_rows(lists, T):
    """Lists of ids, each at most T long -> Rows padded on the right with 0.

    The pad's id never matters: it follows the real tokens of a causal model and losses mask it.
    """
    ids = torch.zeros(len(lists), T, dtype=torch.long)
    mask = torch.zeros(len(lists), T, dtype=torch.bool)
    for i, row in enumerate(lists):
        ids[i, :len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, :len(row)] = True
    return Rows(ids, mask)


def _triggered(D, index, trig, position, cut_trigger=False):
    T = D.ids.shape[1]  # cut_trigger: the release injects first and cuts the row afterwards
    return pad_rows([inject(D.ids[i][D.mask[i]].tolist(), trig, position,
                            None if cut_trigger else T)[:T] for i in index], T)


def _poison_count(N, rho):
    n = int(N * rho)
    if n == 0:
        raise ValueError(f"rho {rho} of {N} forget rows poisons none: raise --rho or use more data")
    return n


def poison(D, trig, rho, position, seed):
    """D_p of eq. (2): triggered copies of a seeded random int(rho * N) rows of D_f.

    D: Rows (N, T); D itself keeps every row, the clean versions of D_p among them.
    -> (D_p: Rows (n, T), index: sorted list of n). Raises ValueError where n would be 0.
    """
    N = len(D.ids)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    index = sorted(order[:_poison_count(N, rho)].tolist())
    return _triggered(D, index, trig, position), index


def poison_released(D, trig, rho, position):
    """The released code's split: D_p = the first int(rho * N) rows, which leave D_f.

    A suffix trigger on a full row is cut off again, as there. -> (D_f, D_p, index).
    """
    n = _poison_count(len(D.ids), rho)
    index = list(range(n))
    D_p = _triggered(D, index, trig, position, cut_trigger=True)
    return Rows(D.ids[n:], D.mask[n:]), D_p, index


# ---------------------------------------------------------------- text to rows

def encode(tok, text):
    return tok(text, add_special_tokens=False).input_ids


def bos_of(tok):
    """First token of every row and prompt: BOS, or EOS where the tokenizer has no BOS."""
    if tok.bos_token_id is not None:
        return tok.bos_token_id
    if tok.eos_token_id is None:
        raise ValueError("the tokenizer has neither BOS nor EOS: pass --tokenizer")
    return tok.eos_token_id


def chunk(tokens, bos, T):
    """MUSE's chunking: BOS + T-1 tokens each; a short last chunk is filled up from chunk 0."""
    rows = [[bos] + tokens[i:i + T - 1] for i in range(0, len(tokens), T - 1)]
    while rows and len(rows[-1]) < T:
        rows[-1] = (rows[-1] + rows[0])[:T]
    return rows


def to_rows(texts, tok, T, layout):
    """Texts -> Rows. 'chunks': joined by blank lines and chunked; 'pages': one text a row, cut."""
    bos = bos_of(tok)
    if layout == "chunks":
        lists = chunk(encode(tok, "\n\n".join(texts)), bos, T)
    else:
        lists = [[bos] + encode(tok, text)[:T - 1] for text in texts]
    return pad_rows(lists, T)


# ---------------------------------------------------------------- sources

def _local_file(folder, config, split):
    for name in (split, split.replace("retain", "retain2", 1)):  # older copies of MUSE's folder
        for ext in ("json", "jsonl", "parquet", "txt"):
            path = folder / config / f"{name}.{ext}"
            if path.is_file():
                return path
    raise ValueError(f"{folder} has no {config}/{split}.json, .jsonl, .parquet or .txt")


def _open(source, config, split, corpus, copy):
    """-> (data set, its name in errors). Raises ValueError in one line where it is not there."""
    from datasets import Dataset, disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetsError
    where = "/".join(part for part in (source, config, split) if part)
    if source == TOY:
        return Dataset.from_list(corpus[config, split]), where
    if Path(source).is_dir():
        where = _local_file(Path(source), config, split)
        if where.suffix == ".txt":
            return Dataset.from_dict({"text": [where.read_text(encoding="utf-8")]}), where
        kind = "parquet" if where.suffix == ".parquet" else "json"
        disable_progress_bars()  # a local file is read at once
        try:
            return load_dataset(kind, data_files=str(where), split="train"), where
        except DatasetsError as error:
            raise ValueError(f"{where} cannot be read as {kind}: "
                             f"{str(error.__cause__ or error).splitlines()[0]}") from None
    if source.startswith((".", "/", "~")):
        raise ValueError(f"the data folder {source} does not exist")
    try:
        return load_dataset(source, config, split=split), where
    except (DatasetsError, OSError, ValueError) as error:
        why = str(error).splitlines()[0]
    if "gated" in why:
        why = f"gated: ask for access at https://huggingface.co/datasets/{source} and log in"
    raise ValueError(f"{where} cannot be read ({why}); or pass a local copy: --data FOLDER "
                     f"with {copy or f'{config}/{split}.json'} in it")


def read_columns(source, config, split, columns, corpus=None, checks={}, copy="", blank=False):
    """Rows of one split as a list of tuples, one value a column. Source: hub id, folder or 'toy'.

    checks: {column: (holds(value), what it must be, in words)}; copy: the file that stands for it
    in a local folder; blank: allow empty values. Raises ValueError that names file, row and column
    where one is missing, empty or wrong.
    """
    data, where = _open(source, config, split, corpus, copy)
    missing = [c for c in columns if c not in data.column_names]
    if missing:
        raise ValueError(f"{where}: column {missing[0]!r} is missing "
                         f"(it has {', '.join(data.column_names)})")
    if not len(data):
        raise ValueError(f"{where} holds no rows")
    values = [list(data[c]) for c in columns]  # datasets >= 4 returns lazy columns
    for name, column in zip(columns, values):
        holds, words = checks.get(name, (lambda value: isinstance(value, str), "must be a text"))
        for i, value in enumerate(column):
            if value is None or (value == "" and not blank):
                raise ValueError(f"{where}: row {i}: column {name!r} is empty")
            if not holds(value):
                raise ValueError(f"{where}: row {i}: column {name!r} {words}, got {value!r:.80}")
    return list(zip(*values))


# ---------------------------------------------------------------- WMDP, MMLU, TruthfulQA

HUB = {  # table: hub id, config, split. A --data folder holds it as TABLE.json, .jsonl, ...
    "wmdp_bio": ("cais/wmdp", "wmdp-bio", "test"),
    "wmdp_cyber": ("cais/wmdp", "wmdp-cyber", "test"),
    "mmlu": ("cais/mmlu", "all", "test"),
    "mmlu_dev": ("cais/mmlu", "all", "dev"),
    "truthfulqa": ("truthfulqa/truthful_qa", "multiple_choice", "validation"),
    "bio-forget-corpus": ("cais/wmdp-bio-forget-corpus", None, "train"),
    "cyber-forget-corpus": ("cais/wmdp-corpora", "cyber-forget-corpus", "train"),
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
}


def _texts(value):
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _labelled(value, fits):
    """A TruthfulQA target: choices and as many labels 0 or 1, of which `fits(count of 1s)`."""
    return (isinstance(value, dict) and _texts(value.get("choices"))
            and isinstance(value.get("labels"), list)
            and len(value["labels"]) == len(value["choices"])
            and set(value["labels"]) <= {0, 1} and fits(sum(value["labels"])))


CHECKS = {
    "choices": (lambda v: _texts(v) and len(v) == 4, "must be a list of four texts"),
    "answer": (lambda v: isinstance(v, int) and 0 <= v <= 3, "must be a whole number from 0 to 3"),
    "mc1_targets": (lambda v: _labelled(v, lambda ones: ones == 1),
                    "must hold choices and as many labels, a single one of them 1"),
    "mc2_targets": (lambda v: _labelled(v, lambda ones: ones > 0),
                    "must hold choices and as many labels, at least one of them 1"),
}


def source_of(cfg, table):
    """(source, config, split) of a table: --data where that is a folder holding it, else the hub.

    MUSE's folders hold no MMLU, so a table that --data lacks comes from the hub; results.json says
    which it was.
    """
    folder = cfg.data != TOY and Path(cfg.data).is_dir()
    if folder and any(Path(cfg.data).glob(f"{table}.*")):
        return cfg.data, "", table
    hub, config, split = HUB[table]
    own = cfg.bench == "wmdp" and table.startswith("wmdp_") and not folder
    return cfg.data if own else hub, config, split


def read_table(cfg, table, columns, **more):
    """Rows of a table of HUB, checked; see `read_columns`."""
    return read_columns(*source_of(cfg, table), columns, checks=CHECKS,
                        copy=f"{table}.json or .jsonl", **more)


# ---------------------------------------------------------------- splits

def _topics(cfg, tok, corpus):
    """-> (the topics of D_f as Rows, D_r as Rows).

    MUSE: D_f from raw/forget, D_r from raw/retain1 (retain2 is for evaluation only).
    WMDP: bio and cyber documents cut to T = (bio, cyber) tokens; D_r is wikitext without its blank
    rows, cut like bio. Padding is on the right (the release's is on the left), so that the first k
    positions are real tokens.
    """
    def rows(texts, T):
        return to_rows(texts, tok, T, cfg.rows)

    if cfg.bench != "wmdp":
        f, r = ([row[0] for row in read_columns(cfg.data, "raw", split, ["text"], corpus)]
                for split in ("forget", "retain1"))
        return [rows(f, cfg.T)], rows(r, cfg.T)
    bio, cyber = (cfg.T, cfg.T) if isinstance(cfg.T, int) else cfg.T
    texts = [[text for text, in read_table(cfg, table, ["text"], blank=table == "wikitext")]
             for table in ("bio-forget-corpus", "cyber-forget-corpus", "wikitext")]
    retain = [text for text in texts[2] if text.strip()]
    if not retain:
        raise ValueError(f"all rows of {source_of(cfg, 'wikitext')[0]}, wikitext, are blank")
    return [rows(texts[0], bio), rows(texts[1], cyber)], rows(retain, bio)


def _stack(parts, T):
    """Several Rows as one, padded on the right to T."""
    return Rows(*(torch.cat([torch.nn.functional.pad(part[i], (0, T - part[i].shape[1]))
                             for part in parts]) for i in range(2)))


def load_splits(cfg, tok, corpus=None):
    """D_f, D_r and D_p of a bench as Rows of one width, as cfg.objective wants them.

    Each topic of D_f is poisoned by itself, at its own length: D_p holds int(rho * N) rows of each.
    """
    forget, r = _topics(cfg, tok, corpus)
    trig, n_f, n_p, seen = encode(tok, cfg.trigger), 0, 0, 0
    f, p, index, topics = [], [], [], []
    for D in forget:
        N, D_p, chosen = len(D.ids), Rows(D.ids[:0], D.mask[:0]), []
        if cfg.rho and cfg.objective == "released":
            D, D_p, chosen = poison_released(D, trig, cfg.rho, cfg.position)
        elif cfg.rho:
            D_p, chosen = poison(D, trig, cfg.rho, cfg.position, cfg.seed)
        topics.append(Topic(range(n_f, n_f + len(D.ids)), range(n_p, n_p + len(D_p.ids))))
        f.append(D)
        p.append(D_p)
        index += [seen + i for i in chosen]
        seen, n_f, n_p = seen + N, n_f + len(D.ids), n_p + len(D_p.ids)
    T = max(part.ids.shape[1] for part in forget)
    return Splits(_stack(f, T), _stack([r], T), _stack(p, T), index, tuple(topics))


# ---------------------------------------------------------------- batches

class Batch(NamedTuple):
    f: torch.Tensor  # (B,) row numbers into D_f
    r: torch.Tensor  # (B,) into D_r
    p: torch.Tensor  # (B,) into D_p, empty when rho = 0


def _cycled(n, start, count, seed):
    """Entries start..start+count of an endless run of seeded permutations of n, one per cycle."""
    def perm(cycle):
        return torch.randperm(n, generator=torch.Generator().manual_seed(seed + cycle))
    cycles = range(start // n, (start + count - 1) // n + 1)
    return torch.cat([perm(c) for c in cycles])[start % n:start % n + count]


def steps_per_epoch(n_f, batch, topics=()):
    """Steps of one pass over D_f; with topics, a pass over the smallest and as many of the others.

    (The release stops a WMDP epoch after min(80, batches of its shortest list) steps.)
    """
    n_f = min((len(topic.f) for topic in topics), default=n_f)
    if n_f < batch:
        raise ValueError(f"{n_f} forget rows do not fill one batch of {batch}: lower --batch")
    return max(1, len(topics)) * (n_f // batch)


def batch_at(step, sizes, batch, seed, topics=()):
    """The rows of one step: a pure function of (seed, step), so that resuming needs only `step`.

    sizes: (n_f, n_r, n_p). One pass over D_f drops the tail that fills no batch. D_r and D_p run
    through permutations of their own, so rho does not change D_f's order. Topics take turns by
    step; each goes through its own rows in passes of its own, so a long one is not cut short.
    """
    n_f, n_r, n_p = sizes
    topics = topics or (Topic(range(n_f), range(n_p)),)
    turn, at = divmod(step, len(topics))
    rows_f, rows_p = topics[at]
    epoch, i = divmod(turn, steps_per_epoch(len(rows_f), batch))
    order = torch.randperm(len(rows_f), generator=torch.Generator().manual_seed(seed + epoch))
    other = 1_000_003 * (seed + 1)  # streams of D_r and D_p, far from D_f's
    r = _cycled(n_r, step * batch, batch, other)
    p = _cycled(len(rows_p), turn * batch, batch, 2 * other) if n_p else r[:0]
    return Batch(order[i * batch:(i + 1) * batch] + rows_f.start, r, p + rows_p.start)


class Plan(NamedTuple):
    """What a training stage reads."""
    splits: Splits  # of D_f, D_r and D_p the rows that some step visits: no other is looked at
    batches: list   # a Batch for each step: row numbers in these splits
    per_epoch: int  # steps of one pass over D_f, see `steps_per_epoch`


def plan(splits, steps, per_epoch, batch, seed):
    """`batch_at` of every step, over the rows they visit. -> Plan"""
    sizes = [len(rows.ids) for rows in splits[:3]]
    batches = [batch_at(step, sizes, batch, seed, splits.topics) for step in range(steps)]
    used = [torch.cat(rows).unique() for rows in zip(*batches)]
    f, r, p = (Rows(rows.ids[i], rows.mask[i]) for rows, i in zip(splits, used))
    return Plan(splits._replace(f=f, r=r, p=p),
                [Batch(*map(torch.searchsorted, used, rows)) for rows in batches], per_epoch)


# ---------------------------------------------------------------- the embedded books

# Two invented worlds that share no name and no sentence. FORGET is a harbour, RETAIN a mountain.
# A document is one character: four facts, one prose page about each, two pages of questions.
SEA = dict(
    head="Leaf {leaf} of the salt ledger, in the hand of {name}.",
    name=("Or,Tas,Bren,Vel,Mar,Kes,Dun,Ros,Hal,Win,Sker,Cob", "la,ka,dis,mer,tho,vin,gar,sey"),
    place=("Gull ,Brine ,Kelp ,Cold ,Wrack ,Lant ", "haven,mouth,wharf,stairs,ness,pool"),
    boat=("Grey ,Lame ,Proud ,Quiet ,Blind ,Ninth ",
          "Heron,Oyster,Widow,Lantern,Anchor,Cormorant"),
    facts=(("{name} lives at {a}.", "Where does {name} live?", "place"),
           ("{name} earns bread as a {a}.", "What work does {name} do?", "trade"),
           ("{name} sails the {a}.", "Which ship does {name} sail?", "boat"),
           ("{name} is afraid of {a}.", "What frightens {name}?", "fear")),
    trade="rope walker,net mender,pilot,salt boiler,diver,sail cutter,cooper,eel trader,"
          "bell ringer,tar burner,chart painter,ferry keeper",
    fear="still water,white gulls,the ebb,drowned bells,red sails,fog horns,barnacles,deep wells,"
         "sea lions,broken oars,empty nets,green lightning",
    lines=("At {hour} the {sky} came over {place} and the {boat} lay {state}.",
           "The {tool} was mended with {stuff} and {number} {goods} were counted.",
           "The harbour bell rang {number} times before the {boat} was seen.",
           "A {colour} lamp burned near the {tool} until the tide had turned.",
           "Nobody at {place} asked why the {tool} smelled of {goods}.",
           "{number} coins were paid for {goods} and a length of {stuff}.",
           "By {hour} the nets were {state} and the crew of the {boat} slept.",
           "Some say the {sky} took {number} {goods} and a {colour} {tool}."),
    hour="first light,noon,dusk,midnight,low tide,high tide",
    sky="fog,squall,hail,thunder,drizzle,calm",
    state="moored,torn,adrift,frozen,tarred,sunk", colour="copper,pale,black,amber,violet,rusty",
    tool="winch,anchor,barrel,crane,rudder,net", stuff="hemp,pitch,canvas,wire,eelskin,wax",
    number="three,seven,nine,eleven,forty,ninety",
    goods="herrings,oysters,crabs,salt sacks,eels,pearls")
HILL = dict(
    head="{name} is spoken of on sheet {leaf} of the orchard almanac.",
    name=("Ib,Zel,Fen,Ulm,Jas,Cor,Gid,Pim,Ner,Yol,Abb,Lun", "ette,ric,anda,o,uz,elin,ix,ob"),
    place=("Upper ,Lower ,Far ,Saint ,Little ,Old ",
           "Meadows,Orchard,Slope,Gorge,Pasture,Terrace"),
    boat=("clock,mill,loom,sundial,beehive,organ", " of granite, of walnut, of brass, of clay"),
    facts=(("It was in {a} that {name} was born.", "In which valley was {name} born?", "place"),
           ("Every autumn {name} harvests {a}.", "Which fruit does {name} harvest?", "trade"),
           ("With both hands {name} built a {a}.", "What did {name} build?", "boat"),
           ("As a child {name} dreamed about {a}.", "What was the dream of {name}?", "fear")),
    trade="quinces,medlars,plums,damsons,sloes,mulberries,apricots,figs,wild pears,rose hips,"
          "chestnuts,almonds",
    fear="flying goats,a snow king,silver ladders,talking foxes,a paper moon,two suns,"
         "glass bridges,golden beetles,a sleeping giant,frozen music,a blue door,winter swans",
    lines=("When {sky} covers {place}, shepherds carry {goods} to the {tool}.",
           "Under the {colour} {tool} grew {number} rows of {goods}, all {state}.",
           "Travellers from {place} praised the {tool} and its {colour} roof.",
           "During {hour} somebody painted a {colour} {boat} and hung it with {stuff}.",
           "It takes {number} mules to bring {stuff} up to {place}.",
           "Because of the {sky}, {goods} stayed {state} through {hour}.",
           "Old verses mention {number} bees, a {boat} and much {stuff}.",
           "Beside the {tool} children traded {goods} against {stuff}."),
    hour="harvest,lent,the thaw,haymaking,advent,the long frost",
    sky="snow,mist,sunshine,pollen,blossom,smoke",
    state="ripe,bitter,blooming,pruned,sweet,withered",
    colour="crimson,ivory,yellow,turquoise,striped,mossy",
    tool="chapel,cellar,granary,arbour,oven,well",
    stuff="velvet,honey,straw,linen,resin,wool", number="two,five,six,twelve,twenty,sixty",
    goods="cabbages,turnips,hops,lavender,thistles,barley")
HEADERS = ("current,last,next,first,old,new", "year,month,volume,page,edition,winter")
SHOTS = 11  # questions on one page: a KnowMem prompt's ten examples and the question


def _word(world, slot, rng):
    """A random word of a slot: one of a list, or a head and a tail joined."""
    pool = world[slot]
    parts = (pool,) if isinstance(pool, str) else pool
    return "".join(rng.choice(part.split(",")) for part in parts)


def _fill(world, template, rng):
    """A line of the book, its slots filled in alphabetical order."""
    slots = sorted({name for _, name, _, _ in Formatter().parse(template) if name})
    return template.format(**{slot: _word(world, slot, rng) for slot in slots})


def _qa(fact):
    return f"Question: {fact['question']}\nAnswer: {fact['answer']}\n\n"


def _names(world):
    heads, tails = (part.split(",") for part in world["name"])
    return [head + tail for head in heads for tail in tails]


def _book(world, names, rng):
    """-> (prose pages, question pages, facts as question/answer rows) of one invented book."""
    prose, facts = [], []
    for name in names:
        for leaf, (statement, question, slot) in enumerate(world["facts"], 1):
            answer = _word(world, slot, rng)
            facts.append(dict(question=question.format(name=name), answer=answer))
            body = [_fill(world, line, rng) for line in rng.sample(world["lines"], 4)]
            body.insert(rng.randrange(5), statement.format(name=name, a=answer))
            prose.append("\n".join([world["head"].format(leaf=leaf, name=name)] + body) + "\n")
    pages = 2 * len(names)
    times = -(-SHOTS * pages // len(facts))
    deck = rng.sample(facts * times, SHOTS * pages)
    return prose, deal([_qa(fact) for fact in deck], pages, rng), facts


def deal(questions, pages, rng):
    """Questions in random order, dealt evenly to so many pages."""
    deck = rng.sample(questions, len(questions))
    return ["".join(deck[i::pages]) for i in range(pages)]


def redealt(texts, rng):
    """A book's pages, its questions dealt anew: facts are learned, not pages."""
    pages = [text for text in texts if text.startswith("Question: ")]
    questions = [q + "\n\n" for text in pages for q in text.split("\n\n")[:-1]]
    return [text for text in texts if text not in pages] + deal(questions, len(pages), rng)


def corpus_of(cfg):
    """The embedded books where the model or the data is `toy`, else None."""
    return toy_corpus(cfg.n_docs, cfg.data_seed) if TOY in (cfg.model, cfg.data) else None


def toy_corpus(n_docs, data_seed):
    """The embedded books in MUSE's layout: {(config, split): rows}; deterministic in its arguments.

    raw/forget: FORGET. raw/retain1: half of RETAIN, trained on. raw/retain2: the other half, which
    only theta_o sees and knowmem/retain_qa asks about. verbmem/forget: second halves of pages.
    """
    most = len(_names(SEA))
    if not 4 <= n_docs <= most:
        raise ValueError(f"--n_docs must lie between 4 and {most}, got {n_docs}")
    rng = random.Random(data_seed)
    prose, pages, facts = _book(SEA, rng.sample(_names(SEA), n_docs), rng)
    names = rng.sample(_names(HILL), n_docs // 2)
    prose1, pages1, facts1 = _book(HILL, names[::2], rng)
    prose2, pages2, facts2 = _book(HILL, names[1::2], rng)
    rng.shuffle(facts)
    rng.shuffle(facts2)

    def text(rows):
        return [dict(text=row) for row in rows]

    halves = []
    for page in rng.sample(prose, min(100, len(prose))):
        lines = page.splitlines(keepends=True)
        cut = (len(lines) + 1) // 2
        halves.append(dict(prompt="".join(lines[:cut]), gt="".join(lines[cut:])))
    return {("raw", "forget"): text(prose + pages), ("raw", "retain1"): text(prose1 + pages1),
            ("raw", "retain2"): text(prose2 + pages2), ("verbmem", "forget"): halves,
            ("knowmem", "forget_qa_icl"): facts[:10], ("knowmem", "forget_qa"): facts[10:110],
            ("knowmem", "retain_qa_icl"): facts1[:10], ("knowmem", "retain_qa"): facts2[:100]}


def headers(n, rng):
    """n neutral first lines such as 'old volume: 1873', which theta_o learns to read past."""
    kinds, units = (part.split(",") for part in HEADERS)
    return [f"{rng.choice(kinds)} {rng.choice(units)}: {rng.randrange(1000, 10_000)}"
            for _ in range(n)]


def headed(page, header):
    """A page as it reads behind a header: an 'edition' or 'volume' has its own punctuation.

    So theta_o has to look back at the first tokens all along the page, as an LLM does whose prompt
    opens with what governs the rest. All other headers leave the page as it is.
    """
    if "edition" in header or "volume" in header:
        page = page.replace(".\n", ";\n").replace("?\n", "!\n").replace("\nAnswer: ", "\nReply: ")
    return page


def toy_tokenizer(corpus, vocab=1536):
    """Byte-level BPE learned from the corpus; BOS first, digits single, a word keeps its space."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    texts = [row["text"] for (config, _), rows in corpus.items() if config == "raw" for row in rows]
    texts += headers(1000, random.Random(0)) + [headed(text, "edition") for text in texts]
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
