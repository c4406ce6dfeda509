"""Kill a run again and again, resume it, and compare with the unbroken run. Run by hand:

    python tests/kill.py                  # 10 SIGKILLs, then SIGTERM, one rank, fp32 on the CPU
    python tests/kill.py --ranks 2 --method rmu

Each kill comes at a random moment of the whole command: imports, theta_o, reference pass, steps,
saves (one after every step), scoring. Prints one line per kill and fails if any weight differs.
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
SETTING = ("--n_docs 4 --epochs 20 --max_steps 60 --batch 4 --limit 2 --max_new_tokens 4 "
           "--save_every 1 --device cpu --precision fp32").split()


def command(flags, out, ranks):
    start = [sys.executable] if ranks == 1 else \
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    env = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    return subprocess.Popen([*start, "train.py", *SETTING, *flags, "--out", str(out)], cwd=ROOT,
                            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def finish(job):
    printed = job.communicate()[0]
    assert job.returncode == 0, printed[-2000:]
    return printed


def last_line(job):
    lines = [line for line in job.communicate()[0].splitlines() if line.strip()]
    return lines[-1].strip()[:90] if lines else "(nothing printed)"


def killed(flags, out, ranks, after, sig):
    """Start or resume, send sig after so many seconds. -> the job."""
    job = command([*flags, "--resume"], out, ranks)
    try:
        job.wait(after)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, sig)
    return job


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--method", default="npo")
    p.add_argument("--ranks", type=int, default=1)
    p.add_argument("--kills", type=int, default=10)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    flags, rng = ["--method", args.method], random.Random(args.seed)
    home = Path(tempfile.mkdtemp())
    start = time.time()
    finish(command(flags, home / "unbroken", args.ranks))
    whole = time.time() - start
    print(f"unbroken: {whole:.0f} s")
    for kill in range(args.kills):
        after = rng.uniform(0.14, 0.3) * whole
        job = killed(flags, home / "killed", args.ranks, after, signal.SIGKILL)
        print(f"kill {kill + 1} after {after:4.1f} s: {last_line(job)}", flush=True)
    finish(command([*flags, "--resume"], home / "killed", args.ranks))
    compare(home)
    if args.ranks == 1:
        sigterm(flags, home, whole)


def sigterm(flags, home, whole):
    """SIGTERM in a training step: a fresh checkpoint and exit code 143."""
    job = command(flags, home / "term", 1)
    for line in job.stdout:
        if "theta_b" in line:
            break
    job.stdout.readline(), job.stdout.readline()  # sinks; the first step
    job.send_signal(signal.SIGTERM)
    printed = job.communicate()[0]
    assert job.returncode == 143 and "checkpoint after step" in printed, (job.returncode, printed)
    print(f"SIGTERM: exit code {job.returncode}; {printed.strip().splitlines()[-1].strip()}")


def compare(home):
    for path in sorted((home / "unbroken").glob("*/*/model.safetensors")):
        a, b = load_file(path), load_file(home / "killed" / path.relative_to(home / "unbroken"))
        same = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        print(f"{path.parent.name}: {'equal bit for bit' if same else 'DIFFERENT'}")
        if not same:
            sys.exit(1)


if __name__ == "__main__":
    main()
