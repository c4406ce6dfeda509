"""The same numbers on any number of ranks, after any stop; nothing stale, nothing overwritten."""
import gc
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import config, stage, tiny_flags
from safetensors.torch import load_file

import data
import evaluate
import train
from data import Refused


def run(folder, tok, out, method="npo", **more):
    """theta_b of the tiny problem. -> (its folder, weights, log rows)"""
    theta_u = folder / "theta_u"
    flags = tiny_flags(folder, out, method, **{"theta_u": theta_u, **more})
    home = stage(flags, tok, str(theta_u))
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


def close(weights, other):
    assert weights.keys() == other.keys()
    for name in weights:
        assert torch.allclose(weights[name], other[name], atol=1e-5), name


# ---------------------------------------------------------------- a step
def test_gradients_are_clipped_at_norm_1_and_logged_unclipped(folder, tok, tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def watched(optim):
        grads = [p.grad for p in optim.param_groups[0]["params"]]
        norms.append(float(train.whole(torch.nn.utils.get_total_norm(grads))))
        return step(optim)
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    _, _, log = run(folder, tok, tmp_path, gamma=20)
    assert [row["gnorm"] > 1 for row in log] == [True] * 3
    assert norms == pytest.approx([1, 1, 1], rel=1e-4)


# ---------------------------------------------------------------- parts of a batch
@pytest.mark.parametrize("method", ["npo", "rmu"])
def test_micro_batches_equal_one_batch(method, folder, tok, tmp_path):
    _, weights, log = run(folder, tok, tmp_path / "whole", method)
    _, other, its = run(folder, tok, tmp_path / "parts", method, micro=1)
    equal(log, its)
    assert log[0]["gnorm"] == pytest.approx(its[0]["gnorm"], rel=1e-5)
    close(weights, other)


def test_mixed_precision_trains_fp32_masters_and_saves_bf16(folder, tok, tmp_path, monkeypatch):
    real = train.fit
    masters = []

    def fit(model, *args):
        masters.extend(p.dtype for p in model.parameters() if p.requires_grad)
        real(model, *args)

    monkeypatch.setattr(train, "fit", fit)
    _, weights, log = run(folder, tok, tmp_path / "mixed", "rmu", precision="bf16_mixed")
    assert masters == [torch.float32] and {p.dtype for p in weights.values()} == {torch.bfloat16}
    _, _, exact = run(folder, tok, tmp_path / "fp32", "rmu")
    assert log[0]["l_f"] == pytest.approx(exact[0]["l_f"], rel=0.02)
    assert log[0]["gnorm"] == pytest.approx(exact[0]["gnorm"], rel=0.1)


def test_mixed_precision_leaves_the_references_in_fp32(folder, tok, tmp_path):
    _, _, log = run(folder, tok, tmp_path, precision="bf16_mixed", beta=2.0)
    # (2 / beta) ln 2; in bf16 0.6921, rows in other batches 0.69316
    assert log[0]["l_f"] == pytest.approx(math.log(2), rel=1e-4)


# ---------------------------------------------------------------- stop and go on
class Killed(BaseException):
    pass


def killed(monkeypatch, after, *args, **more):
    """A run with a checkpoint a step dies in the step behind `after`."""
    real = train.losses_of
    calls = []

    def losses_of(*inputs):
        calls.append(inputs)
        if len(calls) > after:
            raise Killed
        return real(*inputs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "losses_of", losses_of)
        run(*args, save_every=1, **more)


@pytest.mark.parametrize("method", ["npo", "rmu"])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(
        method, folder, tok, tmp_path, monkeypatch):
    _, weights, log = run(folder, tok, tmp_path / "unbroken", method, max_steps=5)
    killed(monkeypatch, 3, folder, tok, tmp_path / "b", method, max_steps=5)
    killed(monkeypatch, 1, folder, tok, tmp_path / "b", method, max_steps=5, resume=True)
    _, resumed, its = run(folder, tok, tmp_path / "b", method, max_steps=5, resume=True)
    assert log == its
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_without_resume_a_run_begins_anew(folder, tok, tmp_path, monkeypatch, capsys):
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
    model.save_pretrained(home / "model")  # the same names and sizes


def edit_code(home, patch):
    patch.setitem(evaluate.CODE, "losses", "another")


def copy_folder(home, patch):
    shutil.copytree(home, home.parent / "elsewhere")
    shutil.rmtree(home)
    (home.parent / "elsewhere").rename(home)


def edit_nothing(home, patch):
    pass


@pytest.fixture
def home(folder, tmp_path):
    """A copy of the tiny folder, to be changed."""
    return shutil.copytree(folder, tmp_path / "home")


def theta_u_of(home, out, tok):
    """-> (a run's folder, when it was made)"""
    cfg = train.plain(config(tiny_flags(home, out, max_steps=1)))
    Path(cfg.out, cfg.bench).mkdir(parents=True, exist_ok=True)
    made = train.stage(cfg, tok, data.clean_rows(cfg, tok))
    return made, (made / "run.json").stat().st_mtime_ns


@pytest.mark.parametrize("edit, again", [
    (edit_nothing, False), (copy_folder, False),
    (edit_data, True), (edit_weights, True), (edit_code, True)])
def test_theta_u_is_reused_until_what_it_was_made_from_changes(
        edit, again, home, tok, tmp_path, monkeypatch):
    first = theta_u_of(home, tmp_path / "out", tok)
    edit(home, monkeypatch)
    second = theta_u_of(home, tmp_path / "out", tok)
    assert (second != first) == again


def test_theta_u_is_reused_where_model_and_data_were_moved(home, tok, tmp_path):
    first = theta_u_of(home, tmp_path / "out", tok)
    assert theta_u_of(home.rename(tmp_path / "moved"), tmp_path / "out", tok) == first


@pytest.mark.parametrize("edit, kept", [(edit_data, 2), (edit_weights, 2), (edit_code, None)])
def test_resume_goes_on_from_the_same_inputs_alone(edit, kept, home, tok, tmp_path, monkeypatch):
    out = tmp_path / "out"
    killed(monkeypatch, 2, home, tok, out)
    edit(home, monkeypatch)
    if edit is edit_code:
        with pytest.raises(Refused, match="other settings, code, data or weights"):
            run(home, tok, out, resume=True)
    else:  # a run of another name
        _, _, log = run(home, tok, out, resume=True)
        assert [row["step"] for row in log] == [1, 2, 3]
    assert [path.name for path in out.glob("toy/*.tmp/ckpt*")] == ["ckpt-2"]


def test_what_is_finished_is_reused_by_resume_alone(folder, tok, tmp_path):
    stamps = []
    for more in ({}, dict(resume=True), {}):
        made, _, _ = run(folder, tok, tmp_path, max_steps=1, **more)
        stamps.append((made / "run.json").stat().st_mtime_ns)
    assert stamps[0] == stamps[1] < stamps[2]


def test_a_second_writer_is_refused_and_the_firsts_files_stay(folder, tok, tmp_path, monkeypatch):
    real = train.fit
    refused = []

    def fit(model, steps, work, cfg):
        (work / "mine").write_text("")
        with monkeypatch.context() as patch:
            patch.setattr(train, "fit", real)
            with pytest.raises(Refused, match="another run.*--out") as second:
                run(folder, tok, tmp_path)
        refused.append(second)
        assert (work / "mine").is_file()
        real(model, steps, work, cfg)

    monkeypatch.setattr(train, "fit", fit)
    _, _, log = run(folder, tok, tmp_path)
    assert refused and [row["step"] for row in log] == [1, 2, 3]


# ---------------------------------------------------------------- ranks
@pytest.fixture(scope="module")
def ranks(folder, tok, tmp_path_factory):
    """Two --out with the same runs: made by one rank, and by one torchrun of this file on two."""
    out = tmp_path_factory.mktemp("ranks")
    evaluate.dist_init(SimpleNamespace(device="cpu"))
    jobs = []
    for method, tasks in (("npo", "knowmem_f"), ("rmu", "wmdp_bio")):
        train.main(tiny_flags(folder, out / "1", method, tasks=tasks))
        jobs.append(tiny_flags(folder, out / "2", method, tasks=tasks))
    run(folder, tok, out / "1")
    with pytest.MonkeyPatch.context() as patch:  # broken on one rank, resumed on two
        killed(patch, 2, folder, tok, out / "2")
    jobs.append([*tiny_flags(folder, out / "2", theta_u=folder / "theta_u"), "--resume"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", __file__, str(out), json.dumps(jobs)]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    job = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert job.returncode == 0, job.stderr[-3000:]
    assert "resumed after step 2" in job.stdout
    return out


def test_two_ranks_train_as_one(ranks):
    homes = [path.parent.relative_to(ranks / "1") for path in ranks.glob("1/toy/*/log.jsonl")]
    assert len(homes) == 5  # theta_u and theta_b of NPO and RMU; the resumed run
    for home in homes:
        one = ranks / "1" / home
        two = ranks / "2" / home
        equal(log_of(one), log_of(two))
        close(load_file(one / "model.safetensors"), load_file(two / "model.safetensors"))


def test_two_ranks_score_as_one(ranks):
    files = [path.relative_to(ranks / "1") for path in ranks.glob("1/toy/*/scores/*.json")]
    assert len(files) == 12  # theta_o, theta_u, theta_b of two methods; clean, triggered
    for file in files:
        one = json.loads((ranks / "1" / file).read_text())
        two = json.loads((ranks / "2" / file).read_text())
        for name in ("task", "condition", "role", "score", "n"):
            assert one[name] == two[name]
        for answer, other in zip(one["answers"], two["answers"], strict=True):
            # their weights differ in the last digits
            assert answer.pop("lls", 0) == pytest.approx(other.pop("lls", 0), rel=1e-5)
            assert answer == other


def test_each_row_of_references_is_computed_by_one_of_the_ranks(ranks):
    calls = [json.loads((ranks / f"rank{rank}").read_text()) for rank in range(2)]
    assert len(calls[0]) == len(calls[1]) > 5
    for (kind, mine, used), (_, other, _) in zip(*calls):
        assert Counter(mine) + Counter(other) == Counter(used), kind
        assert abs(len(mine) - len(other)) <= 2, kind  # a batch of a rank


def computed_rows(calls):
    """`train.remember`, which notes a call's kind, the rows this rank computes and those used."""
    real = train.remember

    def remember(constants, splits, steps, kind, constants_of, cfg):
        pages = getattr(splits, kind)
        mine = []

        def noted(ids):
            for row in ids.tolist():
                found = [i for i, page in enumerate(pages) if row[:len(page)] == page]
                mine.append(max(found, key=lambda i: len(pages[i])))
            return constants_of(ids)

        real(constants, splits, steps, kind, noted, cfg)
        used = {row for batch in steps for row in getattr(batch, kind)}
        calls.append((kind, mine, sorted(used)))

    return remember


if __name__ == "__main__":  # under torchrun
    gc.freeze()  # as tests/conftest.py does
    out, jobs = sys.argv[1:]
    calls = []
    train.remember = computed_rows(calls)
    for words in json.loads(jobs):
        train.main(words)
    Path(out, f"rank{os.environ['RANK']}").write_text(json.dumps(calls))
    torch.distributed.destroy_process_group()  # or gloo's threads may abort the exit
