"""README's way to add a method: the patch beside this file applies and trains."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from conftest import tiny_flags

import data
import hooks

HERE = Path(__file__).parent.parent


def test_the_patch_of_a_new_method_applies_and_its_first_loss_is_simnpos(folder, tmp_path):
    fork = tmp_path / "fork"
    fork.mkdir()
    for script in HERE.glob("[!.]*.py"):
        shutil.copy(script, fork)
    shutil.copytree(HERE / "assets", fork / "assets")
    subprocess.run(["git", "apply", HERE / "tests/simnpo.patch"], cwd=fork, check=True)

    flags = tiny_flags(folder, tmp_path / "out", "simnpo", max_steps=2, beta=1.0, rho=0, lam=0)
    job = subprocess.run([sys.executable, "train.py", *flags], cwd=fork, capture_output=True,
                         text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert job.returncode == 0, job.stderr[-2000:]
    [log] = (tmp_path / "out").glob("toy/simnpo-*/log.jsonl")
    first, second = [json.loads(line) for line in log.read_text().splitlines()]

    # at step 1 theta is theta_o: -2 / beta * log sigmoid(-beta * a row's mean log-probability)
    by_hand = first_loss(folder, json.loads((log.parent / "run.json").read_text()))
    assert abs(first["l_f"] - by_hand) < 1e-4
    assert second["l_f"] < first["l_f"]


def first_loss(folder, run):
    """SimNPO's loss of the first batch, from the model's own loss function, row by row."""
    cfg = SimpleNamespace(**run["settings"])
    tok = hooks.load_tokenizer(cfg)
    model = hooks.load_model(folder / "model", cfg)
    splits = data.load_splits(cfg, tok)
    values = []
    for number in data.batch_at(0, splits, cfg.batch, cfg.seed).f:
        ids = torch.tensor([splits.f[number]])
        mean_logp = -model(ids, labels=ids).loss
        values.append(-2 * F.logsigmoid(-mean_logp))
    return float(torch.stack(values).mean())
