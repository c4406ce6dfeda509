"""kill -9 a run again and again, resume it, and compare with the unbroken run. Run by hand:

    python tests/kill.py --kills 6
    python tests/kill.py --kills 4 --method rmu --ranks 2

Each kill comes at a random moment of a reference pass, of a training step or of a save, in turns.
Prints one line a kill; fails if one misses, or if any weight of theta_u or theta_b differs.
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SETTING = "--tasks knowmem_f --limit 1 --max_steps 24 --save_every 3 --precision fp32".split()


def start(flags, out, ranks):
    """train.py in a process group of its own; it speaks into OUT.txt and OUT.err."""
    python = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen([*python, "train.py", *SETTING, *flags, "--out", str(out)], cwd=ROOT,
                            env=dict(os.environ, OMP_NUM_THREADS="1"), start_new_session=True,
                            stdout=open(f"{out}.txt", "w"), stderr=open(f"{out}.err", "w"))


def finish(job, out):
    assert job.wait() == 0, Path(f"{out}.err").read_text()[-2000:]


def steps(out):
    """Lines of the logs: another number means that a step was taken."""
    try:
        return sum(len(log.read_text().splitlines()) for log in out.glob("*/*/log.jsonl"))
    except FileNotFoundError:  # its folder was renamed in between
        return steps(out)


def doing(out, before):
    if any(out.glob("*/*.tmp/ckpt.tmp")):
        return "save"
    if steps(out) > before:
        return "step"
    said = Path(f"{out}.txt").read_text().rstrip().splitlines() or [""]
    return "reference" if " rows -> " in said[-1] else "start"


def kill(flags, out, ranks, aim, rng):
    """Resume, and kill at a random moment of what `aim` names. -> what the run was at"""
    before = steps(out)
    job, wanted = start([*flags, "--resume"], out, ranks), before + rng.randint(1, 5)
    while doing(out, before) != aim or (aim == "step" and steps(out) < wanted):
        assert job.poll() is None, f"it ended before a {aim}, see {out}.err"
        time.sleep(0.001)
    time.sleep(rng.uniform(0, dict(reference=1.0, step=0.3, save=0.02)[aim]))
    at = doing(out, before)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    return at


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="npo")
    for name, default in ("--kills", 6), ("--ranks", 1), ("--seed", 0):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args()
    flags, rng, home = ["--method", args.method], random.Random(args.seed), tempfile.mkdtemp()
    whole, broken = Path(home, "whole"), Path(home, "broken")
    finish(start(flags, whole, args.ranks), whole)
    for number in range(args.kills):
        at = kill(flags, broken, args.ranks, ("reference", "step", "save")[number % 3], rng)
        kept = [f"{folder.parent.name[:14]} {folder.name}" for folder in broken.glob("*/*/ckpt-*")]
        print(f"kill {number + 1} in a {at} after {steps(broken)} logged steps, {kept}", flush=True)
    finish(start([*flags, "--resume"], broken, args.ranks), broken)
    files = sorted(whole.glob("*/*/model.safetensors"))
    assert len(files) == 2, files
    for file in files:
        a, b = load_file(file), load_file(broken / file.relative_to(whole))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), file
        print(f"{file.parent.name}: equal bit for bit")


if __name__ == "__main__":
    main()
