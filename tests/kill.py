"""kill -9 a run again and again, resume it, and compare with the unbroken run. Run by hand:

    python tests/kill.py --kills 6    # --method rmu

Each kill comes at a random moment of a reference pass, of a training step or of a save, in turns.
Prints one line a kill; fails if one misses, or if any weight of theta_u or theta_b differs.
"""
import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SETTING = "--tasks knowmem_f --limit 1 --save_every 3 --precision fp32 --device cpu".split()
LONGEST = dict(reference=0.5, step=0.3, save=0.02)  # seconds that each takes


def start(args, out, *more):
    """train.py on one thread, which speaks into OUT.txt and OUT.err."""
    steps = str(3 + args.kills)
    command = [sys.executable, "train.py", *SETTING, "--method", args.method, "--max_steps", steps,
               "--out", str(out), *more]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=open(f"{out}.txt", "w"),
                            stderr=open(f"{out}.err", "w"))


def doing(out, since, before):
    """What a run is at that was started at `since`, after steps. -> (a word, logged steps)"""
    steps = 0
    saves = [0]
    try:
        for log in out.glob("*/*/log.jsonl"):
            steps += len(log.read_text().splitlines())
        for save in out.glob("*/*.tmp/ckpt.tmp"):
            saves.append(save.stat().st_mtime)
    except FileNotFoundError:  # it was renamed in between
        return doing(out, since, before)
    if since and max(saves) > since:
        return "save", steps
    if steps > before:
        return "step", steps
    said = Path(f"{out}.txt").read_text().rstrip().splitlines() if since else []
    if said and " rows -> " in said[-1]:
        return "reference", steps
    return "start", steps


def kill(args, out, aim, rng):
    """Resume, and kill at a random moment of what `aim` names. -> (what it was at, logged steps)"""
    since = time.time()
    _, before = doing(out, 0, 0)
    wanted = before + (rng.randint(1, 5) if aim == "step" else 0)
    job = start(args, out, "--resume")
    at, steps = doing(out, since, before)
    while at != aim or steps < wanted:
        assert job.poll() is None, f"it ended before a {aim}, see {out}.err"
        time.sleep(0.001)
        at, steps = doing(out, since, before)
    time.sleep(rng.uniform(0, LONGEST[aim]))
    found = doing(out, since, before)
    job.kill()
    job.wait()
    return found


def compare(whole, broken):
    for file in whole.glob("*/*/model.safetensors"):
        expected = load_file(file)
        weights = load_file(broken / file.relative_to(whole))
        assert expected.keys() == weights.keys(), file
        for name in expected:
            assert torch.equal(expected[name], weights[name]), (file, name)
        print(f"{file.parent.name}: equal bit for bit")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="npo")
    parser.add_argument("--kills", type=int, default=6)
    args = parser.parse_args()
    rng = random.Random(0)
    home = Path(tempfile.mkdtemp())
    whole = home / "whole"
    broken = home / "broken"
    assert start(args, whole).wait() == 0, f"see {whole}.err"
    for number in range(args.kills):
        aim = ("reference", "step", "save")[number % 3]
        at, steps = kill(args, broken, aim, rng)
        kept = [f"{file.parent.name[:12]} {file.name}" for file in broken.glob("*/*/ckpt-*")]
        print(f"kill {number + 1} in a {at}, after {steps} logged steps {kept}", flush=True)
    assert start(args, broken, "--resume").wait() == 0, f"see {broken}.err"
    compare(whole, broken)


if __name__ == "__main__":
    main()
