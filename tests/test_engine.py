"""The same numbers on any number of ranks, after any stop; nothing stale, nothing overwritten."""
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import config, tiny_flags
from safetensors.torch import load_file

import evaluate
import losses
import train
from data import Refused

def run(folder, tok, out, method="npo", **more):
    """theta_b of the tiny problem. -> (its folder, weights, log rows)"""
    cfg = config(tiny_flags(folder, out, method, **{"theta_u": folder / "theta_u", **more}))
    home = train.stage(cfg, tok, cfg.theta_u)
    return home, load_file(home / "model.safetensors"), log_of(home)

def log_of(home):
    return [json.loads(line) for line in (home / "log.jsonl").read_text().splitlines()]

def equal(log, other, rel=1e-5):
    """Every term of every step but for fp32's rounding in another order of summation.

    1e-7: l_r and l_vn subtract nearly equal numbers. Losses seen to differ by 4e-7 of their value.
    """
    assert [row["step"] for row in log] == [row["step"] for row in other]
    for row, its in zip(log, other):
        for term in ("loss", "l_f", "l_r", "l_vn"):
            assert row[term] == pytest.approx(its[term], rel=rel, abs=1e-7), (row["step"], term)

# ---------------------------------------------------------------- parts of a batch
@pytest.mark.parametrize("method", ["npo", "rmu"])
def test_micro_batches_equal_one_batch(method, folder, tok, one, tmp_path):
    _, weights, log = run(folder, tok, tmp_path / "whole", method)
    _, other, its = run(folder, tok, tmp_path / "parts", method, micro=1)
    equal(log, its)
    assert log[0]["gnorm"] == pytest.approx(its[0]["gnorm"], rel=1e-5)
    assert all(torch.allclose(weights[name], other[name], atol=1e-5) for name in weights)

def test_mixed_precision_trains_fp32_masters_and_saves_bf16(
        folder, tok, one, tmp_path, monkeypatch):
    real, masters = train.fit, []

    def fit(model, *args):
        masters.extend(p.dtype for p in model.parameters() if p.requires_grad)
        real(model, *args)
    monkeypatch.setattr(train, "fit", fit)
    _, weights, [first, *_] = run(folder, tok, tmp_path / "mixed", "rmu", precision="bf16_mixed")
    assert masters == [torch.float32] and {p.dtype for p in weights.values()} == {torch.bfloat16}
    _, _, [exact, *_] = run(folder, tok, tmp_path / "fp32", "rmu")
    assert first["l_f"] == pytest.approx(exact["l_f"], rel=0.02)
    assert first["gnorm"] == pytest.approx(exact["gnorm"], rel=0.1)

def test_mixed_precision_leaves_the_references_in_fp32(folder, tok, one, tmp_path):
    _, _, [first, *_] = run(folder, tok, tmp_path, precision="bf16_mixed", beta=2.0)
    assert first["l_f"] == pytest.approx(math.log(2), rel=1e-5)  # (2 / beta) ln 2; in bf16 0.6921

# ---------------------------------------------------------------- stop and go on
class Killed(BaseException):
    pass

def killed(monkeypatch, after, *args, **more):
    """A run with a checkpoint a step dies in the step behind `after`."""
    real, calls = train.losses_of, []

    def losses_of(*inputs):
        calls.append(inputs)
        if len(calls) > after:
            raise Killed
        return real(*inputs)
    with monkeypatch.context() as patch:
        patch.setattr(train, "losses_of", losses_of)
        try:
            run(*args, save_every=1, **more)
        except Killed:
            return
    raise AssertionError("it was not killed")

@pytest.mark.parametrize("method", ["npo", "rmu"])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(
        method, folder, tok, one, tmp_path, monkeypatch):
    _, weights, log = run(folder, tok, tmp_path / "unbroken", method, max_steps=5)
    killed(monkeypatch, 3, folder, tok, tmp_path / "b", method, max_steps=5)
    killed(monkeypatch, 1, folder, tok, tmp_path / "b", method, max_steps=5, resume=True)
    _, resumed, its = run(folder, tok, tmp_path / "b", method, max_steps=5, resume=True)
    assert log == its
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)

def test_without_resume_a_run_begins_anew(folder, tok, one, tmp_path, monkeypatch, capsys):
    killed(monkeypatch, 2, folder, tok, tmp_path)
    _, _, log = run(folder, tok, tmp_path)
    assert [row["step"] for row in log] == [1, 2, 3] and "resumed" not in capsys.readouterr().out

# ---------------------------------------------------------------- nothing stale
def edit_data(home, patch):
    file = home / "books/raw/retain1.json"
    file.write_text(file.read_text().replace("noon", "dusk"))

def edit_weights(home, patch):
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "model")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(home / "model")

def edit_code(home, patch):
    assert evaluate.SOURCE["losses"] == Path(losses.__file__).read_text()
    patch.setitem(evaluate.SOURCE, "losses", evaluate.SOURCE["losses"] + "# edited")

@pytest.fixture
def home(folder, tmp_path):
    """A copy of the tiny folder, to be changed."""
    return shutil.copytree(folder, tmp_path / "home")

@pytest.mark.parametrize("edit", [edit_data, edit_weights, edit_code])
def test_theta_u_is_reused_until_what_it_was_made_from_changes(
        edit, home, tok, one, tmp_path, monkeypatch):
    def theta_u():
        made = train.stage(train.plain(config(tiny_flags(home, tmp_path / "out"))), tok)
        return made, (made / "run.json").stat().st_mtime_ns
    first, second, _ = theta_u(), theta_u(), edit(home, monkeypatch)
    third = theta_u()
    assert first == second and third[0] == first[0] and third[1] > first[1]

@pytest.mark.parametrize("edit", [edit_data, edit_weights, edit_code])
def test_resume_goes_on_from_the_same_inputs_alone(edit, home, tok, one, tmp_path, monkeypatch):
    killed(monkeypatch, 2, home, tok, tmp_path / "out")
    edit(home, monkeypatch)
    with pytest.raises(Refused, match="other settings, code, data or weights"):
        run(home, tok, tmp_path / "out", resume=True)
    assert [path.name for path in tmp_path.glob("out/toy/*.tmp/ckpt*")] == ["ckpt-2"]

def test_what_is_finished_is_reused_by_resume_alone(folder, tok, one, tmp_path):
    stamps = [(run(folder, tok, tmp_path, max_steps=1, **more)[0] / "run.json").stat().st_mtime_ns
              for more in ({}, dict(resume=True), {})]
    assert stamps[0] == stamps[1] < stamps[2]

def test_a_second_writer_is_refused_and_the_firsts_files_stay(
        folder, tok, one, tmp_path, monkeypatch):
    real, refused = train.fit, []

    def fit(model, refs, work, cfg):
        with monkeypatch.context() as patch:
            patch.setattr(train, "fit", real)
            (work / "mine").write_text("")
            with pytest.raises(Refused, match="another run.*--out") as second:
                run(folder, tok, tmp_path)
            refused.append(second)
            assert (work / "mine").is_file()
        real(model, refs, work, cfg)
    monkeypatch.setattr(train, "fit", fit)
    _, _, log = run(folder, tok, tmp_path)
    assert refused and [row["step"] for row in log] == [1, 2, 3]

# ---------------------------------------------------------------- ranks
@pytest.fixture(scope="module")
def ranks(folder, tok, tmp_path_factory):
    """Two --out with the same runs: made by one rank, and by one torchrun of this file on two."""
    out, jobs = tmp_path_factory.mktemp("ranks"), []
    for method in ("npo", "rmu"):
        flags = [tiny_flags(folder, out / ranks, method, tasks="knowmem_f") for ranks in "12"]
        train.main(flags[0])
        jobs.append(flags[1])
    evaluate.dist_init()
    run(folder, tok, out / "1")
    with pytest.MonkeyPatch.context() as patch:  # broken on one rank, resumed on two
        killed(patch, 2, folder, tok, out / "2")
    jobs.append([*tiny_flags(folder, out / "2", theta_u=folder / "theta_u"), "--resume"])
    job = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         __file__, json.dumps(jobs)], env=dict(os.environ, OMP_NUM_THREADS="1"),
        capture_output=True, text=True)
    assert job.returncode == 0, job.stderr[-3000:]
    assert "resumed after step 2" in job.stdout
    return out / "1", out / "2"

def test_two_ranks_train_as_one(ranks):
    homes = [path.parent.relative_to(ranks[0]) for path in ranks[0].rglob("log.jsonl")]
    assert len(homes) == 5  # theta_u and theta_b of NPO and RMU; the resumed run
    for home in homes:
        equal(*(log_of(out / home) for out in ranks))
        weights, other = (load_file(out / home / "model.safetensors") for out in ranks)
        assert weights.keys() == other.keys()
        assert all(torch.allclose(weights[name], other[name], atol=1e-5) for name in weights), home

def test_two_ranks_score_as_one(ranks):
    files = [path.relative_to(ranks[0]) for path in ranks[0].rglob("scores/*.json")]
    assert len(files) == 10  # theta_o, and theta_u and theta_b of two methods; clean, triggered
    for file in files:
        scores, other = (json.loads((out / file).read_text()) for out in ranks)
        for score in (scores, other):  # the model's folder is below --out
            del score["fingerprint"], score["model"]
        assert scores == other

if __name__ == "__main__":  # under torchrun
    for words in json.loads(sys.argv[1]):
        train.main(words)
    torch.distributed.destroy_process_group()  # or gloo's threads may abort the exit
