"""The paper's table and figures from the files under out/; nothing here trains or scores.

    python plots.py --bench toy               # prints the table, writes table1.md and fig2.png

It takes the flags of the runs it should show (`--n_docs 4`, `--out runs`, ...): seeds are averaged,
and method, position and lam are what the rows and points differ in.
"""
import json
import statistics
from dataclasses import replace
from pathlib import Path

import data
import evaluate

NAMES = {("theta_o", ""): "theta_o", ("theta_u", "npo"): "+ NPO", ("theta_u", "rmu"): "+ RMU",
         ("theta_b", "npo"): "+ NPO-Backdoor", ("theta_b", "rmu"): "+ RMU-Backdoor"}
COLORS = {"prefix": "#D55E00", "infix": "#0072B2", "suffix": "#009E73",  # Okabe-Ito
          "theta_o": "#000000", "theta_u": "#7F7F7F"}
MARKERS = {"prefix": "o", "infix": "s", "suffix": "^", "theta_o": "*", "theta_u": "X"}


# ---------------------------------------------------------------- reading

def table(rows):
    """Markdown in the shape of Table 1. rows: {name: {"UE": {"KM": text}, ...}}."""
    columns = [(g, c) for g, part in next(iter(rows.values())).items() for c in part]
    lines = ["| model | " + " | ".join(f"{g} {c}" for g, c in columns) + " |",
             "|---|" + "---:|" * len(columns)]
    for name, scores in rows.items():
        lines.append(f"| {name} | " + " | ".join(scores[g][c] for g, c in columns) + " |")
    return "\n".join(lines)


def as_row(results):
    """-> (name, scores as text) of one results.json."""
    name = NAMES[results["role"], results["method"] if results["role"] != "theta_o" else ""]
    return name, {g: {c: f"{v:.1f}" for c, v in part.items()}
                  for g, part in results["scores"].items()}


def read_runs(cfg):
    """[(run.json, results.json)] of every scored run of the bench."""
    home, runs = Path(cfg.out) / cfg.bench, []
    for path in sorted(home.glob("*/results.json")):
        run = path.with_name("run.json")
        runs.append((json.loads(run.read_text()) if run.is_file() else {},
                     json.loads(path.read_text())))
    if not runs:
        raise ValueError(f"{home} holds no results.json: run train.py --bench {cfg.bench} first")
    return runs


def scores_of(runs, role, cfg):
    """Score tables, one a seed, of the runs that are `role` under cfg's settings and trigger."""
    from train import settings_key, theta_u_config
    want, _ = settings_key(theta_u_config(cfg) if role == "theta_u" else cfg)
    found = []
    for run, results in runs:
        same = role == "theta_o" or all(run.get("key", {}).get(name) == value
                                        for name, value in want.items() if name != "seed")
        if results["role"] == role and same:
            try:
                found.append(evaluate.columns(results["tasks"], cfg)["scores"])
            except KeyError:  # scored, but never under this trigger and position
                continue
    return found


def mean(found, group, column):
    return statistics.mean(scores[group][column] for scores in found)


def table1(runs, configs):
    """Table 1: theta_o, normal and backdoored unlearning by both methods, means over seeds."""
    rows = {}
    for cfg in configs:
        for role in ("theta_o", "theta_u", "theta_b"):
            found = scores_of(runs, role, cfg)
            name = NAMES[role, cfg.method if role != "theta_o" else ""]
            if found and name not in rows:
                seeds = f" ({len(found)} seeds)" if len(found) > 1 else ""
                rows[name + seeds] = {g: {c: f"{mean(found, g, c):.1f}" for c in part}
                                      for g, part in found[0].items()}
    order = list(NAMES.values())
    return table(dict(sorted(rows.items(), key=lambda row: order.index(row[0].split(" (")[0]))))


# ---------------------------------------------------------------- Fig. 2

def fig2(runs, cfg, path):
    """Fig. 2: UE and UT against BE for prefix, infix and suffix triggers, eq. (2) (lam = 0).

    Filled markers: lam = 0, as in the paper; ringed: lam on. The desired region is cut at the
    midpoint between theta_o and theta_u (BE, UE) and at 90% of theta_o's UT. Command:
    python plots.py --bench toy, after train.py with --position and --lam 0 for each of the three.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    o, u = scores_of(runs, "theta_o", cfg), scores_of(runs, "theta_u", cfg)
    if not o or not u:
        raise ValueError("Fig. 2 needs theta_o and theta_u scored under this trigger: run train.py")
    panels = [("BE", "KM", "UE", "KM"), ("BE", "KM", "UT", "KM"), ("BE", "VM", "UE", "VM")]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), facecolor="white")
    for axis, panel in zip(axes, panels):
        _shade(axis, o, u, panel)
        for name, found in (("theta_o", o), ("theta_u", u)):
            _point(axis, found, panel, name, {"theta_o": "original", "theta_u":
                                              f"normal {cfg.method.upper()}"}[name], filled=True)
        for lam in (0.0, cfg.lam):
            for position in data.POSITIONS:
                found = scores_of(runs, "theta_b", replace(cfg, position=position, lam=lam))
                label = f"{position}, " + (f"lam {lam:g}" if lam else "lam 0")
                if found:
                    _point(axis, found, panel, position, label, filled=not lam)
        condition = "retain set" if panel[2] == "UT" else "clean"
        axis.set(xlim=(-5, 105), ylim=(-5, 105), xlabel=f"{panel[0]} {panel[1]} (%), with trigger",
                 ylabel=f"{panel[2]} {panel[3]} (%), {condition}")
        axis.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _shade(axis, o, u, panel):
    gx, cx, gy, cy = panel
    left = (mean(o, gx, cx) + mean(u, gx, cx)) / 2
    low, high = (-5, (mean(o, gy, cy) + mean(u, gy, cy)) / 2) if gy == "UE" else \
        (0.9 * mean(o, gy, cy), 105)
    axis.fill_between([left, 105], low, high, color="#E69F00", alpha=0.18, linewidth=0,
                      label="desired region")


def _point(axis, found, panel, name, label, filled):
    gx, cx, gy, cy = panel
    axis.scatter(mean(found, gx, cx), mean(found, gy, cy), s=90 if filled else 230, marker=MARKERS[name], label=label,
                 facecolors=COLORS[name] if filled else "none", edgecolors=COLORS[name],
                 linewidths=1.8, zorder=3)


def main(argv=None):
    from train import BENCHES, parse_config
    cfg, _ = parse_config(argv)
    configs = [parse_config([*(argv or []), "--bench", cfg.bench, "--method", method])[0]
               for bench, method in BENCHES if bench == cfg.bench]
    runs = read_runs(cfg)
    home = Path(cfg.out) / cfg.bench
    text = table1(runs, configs)
    (home / "table1.md").write_text(text + "\n")
    print(text)
    print(f"written: {home / 'table1.md'}")
    for each in configs:
        if scores_of(runs, "theta_u", each):
            fig2(runs, each, home / f"fig2-{each.method}.png")
            print(f"written: {home / f'fig2-{each.method}.png'}")


if __name__ == "__main__":
    import sys

    from train import entry
    entry(lambda: main(sys.argv[1:]))
