"""The engine: the same numbers on any number of ranks; always a checkpoint to go on from."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import setting, tiny_model, whole

import data
import hooks
import train

STEPS = 20


def run(work, w, method, cfg_more=None, steps=STEPS):
    """theta_b of the tiny problem on this world. -> (weights, log rows)."""
    cfg, splits = setting(method, 0.5)
    cfg = replace(cfg, batch=4, epochs=10, max_steps=steps, lr=1e-4, log_every=1,
                  **(cfg_more or {}))
    work.mkdir(parents=True, exist_ok=True)
    plan = train.plan_of(cfg, splits)
    splits, folder = plan.splits, train.cache_folder(work, cfg, plan.splits, ("theta_o", "theta_u"))
    theta = tiny_model(seed=0)
    norms_u = train.norms_over("f", tiny_model(seed=1), cfg, splits, w, folder)
    cache = train.build_cache(cfg, splits, norms_u, theta, w, folder)
    train.unlearn(cfg, plan, theta, cache, work, w)
    weights = train.gather(theta, torch.float32, w.rank)
    rows = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    return weights, rows


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """One torchrun of this file: NPO and RMU on two gloo ranks."""
    out = tmp_path_factory.mktemp("ranks")
    job = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__, out],
        env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert job.returncode == 0, job.stderr[-2000:]
    return out


def test_only_downloads_show_a_bar_and_only_on_one_rank(monkeypatch, tmp_path, capsys):
    from huggingface_hub import utils
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    for local_rank, shown in ((0, True), (1, False)):
        utils.enable_progress_bars()
        train.only_download_bars(local_rank)
        assert utils.are_progress_bars_disabled() != shown
        tiny_model(seed=0).save_pretrained(tmp_path)
        assert capsys.readouterr().err == ""
    utils.enable_progress_bars()


@pytest.mark.parametrize("method", ["npo", "rmu"])
def test_two_ranks_equal_one(method, two_ranks, one, tmp_path):
    weights, rows = run(tmp_path / method, one, method)
    other = torch.load(two_ranks / f"{method}.pt", weights_only=True)
    logged = [json.loads(line) for line in
              (two_ranks / method / "log.jsonl").read_text().splitlines()]
    assert len(rows) == len(logged) == STEPS
    for a, b in zip(rows, logged):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    for name in weights:
        assert torch.allclose(weights[name], other[name], atol=1e-5), name


@pytest.mark.parametrize("more", [dict(recompute="yes"), dict(micro=1), dict(micro=2)])
@pytest.mark.parametrize("method", ["npo", "rmu"])
def test_recomputation_and_accumulation_change_nothing(method, more, one, tmp_path):
    plain, rows = run(tmp_path / "plain", one, method, steps=3)
    other, logged = run(tmp_path / "other", one, method, more, steps=3)
    assert rows[-1]["loss"] == pytest.approx(logged[-1]["loss"], rel=1e-5)
    for name in plain:
        assert torch.allclose(plain[name], other[name], atol=1e-6), name


@pytest.mark.parametrize("method", ["npo", "rmu"])
def test_mixed_precision_keeps_fp32_masters_of_what_trains(method, one):
    cfg, _ = setting(method, 0.5)
    model = tiny_model().to(torch.bfloat16)
    hooks.set_trainable(model, cfg.trainable)
    params = train.shard(model, replace(cfg, precision="bf16_mixed"), one.mesh)
    assert params and all(p.dtype == torch.float32 for p in params)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters() if not p.requires_grad)


def test_no_mask_reaches_attention():
    # a T x T mask would cost memory and keep sdpa from its causal kernel
    seen, model = [], tiny_model()
    handle = model.base_model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True)
    hooks.final_hidden(model, torch.zeros(2, 16, dtype=torch.long))
    handle.remove()
    assert seen == [None]


# ---------------------------------------------------------------- checkpoints

class Killed(BaseException):
    pass


def killed_at(step, monkeypatch):
    """The process dies in the forward of that step."""
    real, done = train.losses_of, []

    def losses_of(*args):
        done.append(args)
        if len(done) > step:
            raise Killed
        return real(*args)
    monkeypatch.setattr(train, "losses_of", losses_of)


@pytest.mark.parametrize("method", ["npo", "rmu"])
def test_resume_equals_the_unbroken_run_bit_for_bit(method, one, tmp_path, monkeypatch):
    unbroken, rows = run(tmp_path / "a", one, method, dict(save_every=2), steps=7)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(5, patch)
        run(tmp_path / "b", one, method, dict(save_every=2), steps=7)
    resumed, logged = run(tmp_path / "b", one, method, dict(save_every=2, resume="yes"), steps=7)
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    assert [row["loss"] for row in rows] == [row["loss"] for row in logged]


def test_references_are_not_computed_again_on_resume(one, tmp_path, monkeypatch):
    # theta is no longer theta_o then: what is in the file counts
    run(tmp_path, one, "npo", dict(save_every=1), steps=2)
    monkeypatch.setattr(hooks, "sink_norms", lambda *_, **__: 1 / 0)
    run(tmp_path, one, "npo", dict(save_every=1, resume="yes"), steps=2)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, one, "npo", dict(save_every=1, k=2), steps=2)


def test_references_that_are_gone_are_never_taken_for_zeros(one, tmp_path):
    run(tmp_path, one, "npo", dict(save_every=1), steps=2)
    next(tmp_path.glob("references-*/*.bin")).unlink()
    with pytest.raises(ValueError, match="damaged or gone: remove the folder"):
        run(tmp_path, one, "npo", dict(save_every=1, resume="yes"), steps=2)


def test_another_theta_o_that_was_begun_is_left_alone(one, tmp_path, monkeypatch):
    # it lies where this one would be made: --resume goes to a folder of its own
    cfg, origin = train.parse_config(["--n_docs", "4", "--resume", "--out", str(tmp_path)])
    begun = tmp_path / "toy" / "theta_o.tmp" / "ckpt"
    begun.mkdir(parents=True)
    (begun / "meta.json").write_text(json.dumps(dict(step=1, world=1, key="another")))
    monkeypatch.setattr(train, "train_theta_o", lambda *_: (None, {}))
    monkeypatch.setattr(train, "save_run", lambda *_: None)
    assert train.theta_o_of(cfg, origin, None, None, one).name.startswith("theta_o-")
    assert (begun / "meta.json").is_file()


def test_a_save_cut_short_leaves_the_checkpoint_it_went_on_from(one, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(2, patch)
        run(tmp_path, one, "npo", dict(save_every=1), steps=5)
    (tmp_path / "ckpt").rename(tmp_path / "ckpt.old")  # killed between the two renames
    real = Path.rename

    def killed(path, to):
        if path.name == "ckpt.tmp":
            raise Killed
        return real(path, to)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", killed)
        run(tmp_path, one, "npo", dict(save_every=1, resume="yes"), steps=5)
    assert train.find_checkpoint(tmp_path)[1]["step"] == 2


def test_a_full_disk_under_the_log_stops_every_rank(one, tmp_path, monkeypatch):
    def full(self, *_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train.Log, "step", full)
    with pytest.raises(ValueError, match="No space left on device.*free some disk"):
        run(tmp_path, one, "npo", steps=3)


def test_a_full_disk_leaves_the_last_checkpoint(one, tmp_path, monkeypatch):
    real = train.save_file
    written = []

    def full_at_the_third(state, path):
        written.append(path)
        if len(written) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(state, path)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="No space.*--resume"):
        patch.setattr(train, "save_file", full_at_the_third)
        run(tmp_path, one, "npo", dict(save_every=1), steps=6)
    assert json.loads((tmp_path / "ckpt" / "meta.json").read_text())["step"] == 2
    _, rows = run(tmp_path, one, "npo", dict(save_every=1, resume="yes"), steps=6)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_sigterm_leaves_a_checkpoint_and_exits_143(one, tmp_path, monkeypatch):
    monkeypatch.setattr(train._Sigterm, "asked", True)
    with pytest.raises(SystemExit, match="143"):
        run(tmp_path, one, "npo", dict(save_every=-1), steps=6)
    assert json.loads((tmp_path / "ckpt" / "meta.json").read_text())["step"] == 1


def test_resume_refuses_another_world_size_or_other_settings(one, tmp_path):
    run(tmp_path, one, "npo", dict(save_every=1), steps=3)
    with pytest.raises(ValueError, match="--nproc_per_node 1, or start without --resume"):
        run(tmp_path, one._replace(size=2), "npo", dict(resume="yes"), steps=3)
    with pytest.raises(ValueError, match="other settings"):
        run(tmp_path, one, "npo", dict(resume="yes", gamma=9.0), steps=3)


@pytest.mark.parametrize("batch, micro, size", [(3, 0, 2), (8, 3, 2), (2, 0, 4)])
def test_batch_that_does_not_split_is_refused(batch, micro, size):
    cfg = replace(setting("npo", 0.0)[0], batch=batch, micro=micro)
    with pytest.raises(ValueError, match="must be a multiple of"):
        train.micro_steps(cfg, size)


def test_micro_steps_hold_the_global_batch():
    cfg = replace(setting("npo", 0.0)[0], batch=8, micro=1)
    assert [train.micro_steps(cfg, size) for size in (1, 2, 4, 8)] == [(1, 8), (1, 4), (1, 2),
                                                                       (1, 1)]


if __name__ == "__main__":  # under torchrun
    world = train.dist_init(train.parse_config([])[0])
    for name in ("npo", "rmu"):
        result, _ = run(Path(sys.argv[1]) / name, world, name)
        if world.rank == 0:
            torch.save(result, Path(sys.argv[1]) / f"{name}.pt")
    torch.distributed.destroy_process_group()  # or gloo's threads may abort the exit
