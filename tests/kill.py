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
SETTING = "--tasks knowmem_f --limit 1 --save_every 3 --precision fp32".split()

def start(args, out, *more):
    """train.py on one thread, which speaks into OUT.txt and OUT.err."""
    flags = [*SETTING, "--method", args.method, "--max_steps", str(3 + args.kills)]
    return subprocess.Popen(
        [sys.executable, "train.py", *flags, "--out", str(out), *more], cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS="1"), stdout=open(f"{out}.txt", "w"),
        stderr=open(f"{out}.err", "w"))

def doing(out, since, before):
    """What a run is at that was started at `since`, after steps. -> (a word, logged steps)"""
    try:
        steps = sum(len(log.read_text().splitlines()) for log in out.glob("*/*/log.jsonl"))
        saves = [save.stat().st_mtime for save in out.glob("*/*.tmp/ckpt.tmp")]
    except FileNotFoundError:  # it was renamed in between
        return doing(out, since, before)
    if max(saves, default=0) > since:
        return "save", steps
    said = Path(f"{out}.txt").read_text().rstrip().splitlines() if since else []
    at = "reference" if said and " rows -> " in said[-1] else "start"
    return "step" if steps > before else at, steps

def kill(args, out, aim, rng):
    """Resume, and kill at a random moment of what `aim` names. -> (what it was at, logged steps)"""
    since, (_, before) = time.time(), doing(out, 0, 0)
    job, wanted = start(args, out, "--resume"), before + (aim == "step") * rng.randint(1, 5)
    while (now := doing(out, since, before))[0] != aim or now[1] < wanted:
        assert job.poll() is None, f"it ended before a {aim}, see {out}.err"
        time.sleep(0.001)
    time.sleep(rng.uniform(0, dict(reference=0.5, step=0.3, save=0.02)[aim]))
    at = doing(out, since, before)
    job.kill()
    job.wait()
    return at

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="npo")
    parser.add_argument("--kills", type=int, default=6)
    args, rng, home = parser.parse_args(), random.Random(0), Path(tempfile.mkdtemp())
    whole, broken = home / "whole", home / "broken"
    assert start(args, whole).wait() == 0, f"see {whole}.err"
    for number in range(args.kills):
        at, steps = kill(args, broken, ("reference", "step", "save")[number % 3], rng)
        kept = [f"{file.parent.name[:12]} {file.name}" for file in broken.glob("*/*/ckpt-*")]
        print(f"kill {number + 1} in a {at}, after {steps} logged steps {kept}", flush=True)
    assert start(args, broken, "--resume").wait() == 0, f"see {broken}.err"
    for file in whole.glob("*/*/model.safetensors"):
        a, b = load_file(file), load_file(broken / file.relative_to(whole))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), file
        print(f"{file.parent.name}: equal bit for bit")

if __name__ == "__main__":
    main()
