"""Kill a run again and again, resume it, and compare with the unbroken run. Run by hand:

    python tests/kill.py                  # 10 SIGKILLs, then SIGTERM, one rank, fp32 on the CPU
    python tests/kill.py --ranks 2 --method rmu

Each kill comes at a random moment of what AIMS names: between two checkpoints, while one is being
written (after every step), or in a reference pass. Prints one line per kill, with what the disk
says was going on, and fails if a kill misses or any weight differs.
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
AIMS = ("step save step reference "  # of theta_o, then of theta_u and of theta_b
        "step save step reference save step").split()
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


def doing(out):
    """What a run is at, by the files it has begun and not yet finished."""
    if any(out.glob("*/*.tmp/ckpt.tmp")):
        return "save"
    begun = out.glob("*/*.tmp/references-*/*.bin")
    return "step" if all(file.with_suffix(".json").exists() for file in begun) else "reference"


def checkpoints(out):
    """Which checkpoints are there, by inode: another set means that a step has been saved."""
    return {file.stat().st_ino for file in out.glob("*/*.tmp/ckpt/meta.json")}


def killed(flags, out, ranks, aim, rng):
    """Resume, let some steps pass, and kill at a random moment of `aim`. -> (job, doing)."""
    job, saves = command([*flags, "--resume"], out, ranks), rng.randint(1, 12)
    seen, since = checkpoints(out), None
    pause = rng.uniform(0, 0.005 if aim == "save" else 0.05)
    while job.poll() is None:
        try:
            now, at = checkpoints(out), doing(out)
        except FileNotFoundError:  # renamed in between
            continue
        if now != seen:
            saves, seen = saves - 1, now
        if since is None and at == aim and (aim == "reference" or saves <= 0):
            since = time.time()
        if since and time.time() - since >= pause:
            break
        time.sleep(0.0005)
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    return job, doing(out)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--method", default="npo")
    p.add_argument("--ranks", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    flags, rng = ["--method", args.method], random.Random(args.seed)
    home = Path(tempfile.mkdtemp())
    start = time.time()
    finish(command(flags, home / "unbroken", args.ranks))
    print(f"unbroken: {time.time() - start:.0f} s", flush=True)
    for kill, aim in enumerate(AIMS):
        job, at = killed(flags, home / "killed", args.ranks, aim, rng)
        print(f"kill {kill + 1}, in a {at}: {last_line(job)}", flush=True)
        assert job.returncode == -signal.SIGKILL, f"the run ended before it: {job.returncode}"
    finish(command([*flags, "--resume"], home / "killed", args.ranks))
    compare(home)
    if args.ranks == 1:
        sigterm(flags, home)


def sigterm(flags, home):
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
