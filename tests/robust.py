"""What a run survives: tuning on D_r, rounding, pruning; and how fast it relearns. By hand.

    for run in out/toy/*-seed*-??????; do python tests/robust.py $run; done; python plots.py

Each treatment of RUN becomes a folder beside it, `RUN-after-TREATMENT`, and is scored.

tuned200     STEPS steps of plain language modelling on D_r: AdamW, lr LR, batches of 8 rows
relearned20  RELEARN such steps on the first 8 rows of D_f, some of which are tested
int8, int4   every matrix rounded, symmetrically, with a scale for each of its rows
pruned30     the SHARE smallest weights of every matrix set to 0
"""
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import evaluate
import hooks

STEPS = 200
RELEARN = 20
LR = 1e-4
SHARE = 0.3


def matrices(model):
    return [p.data for p in model.base_model.layers.parameters() if p.ndim == 2]


def rounded(model, bits):
    for matrix in matrices(model):
        scale = matrix.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)  # (rows, 1)
        matrix.copy_((matrix / scale).round() * scale)


def pruned(model):
    for matrix in matrices(model):
        smallest = int(SHARE * matrix.numel())
        limit, _ = matrix.abs().flatten().kthvalue(smallest)
        matrix[matrix.abs() < limit] = 0


def tuned(model, rows, steps, seed):
    model.requires_grad_(True)
    optim = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.0)
    for step in range(steps):
        numbers = data.cycled(len(rows), 8 * step, 8, seed, "fine-tuning")
        ids, mask = data.pad_rows([rows[i] for i in numbers], model.device)
        model(ids, labels=ids.masked_fill(~mask, -100)).loss.backward()
        optim.step()
        optim.zero_grad()


def treat(run, name, treatment, tok, record, cfg):
    """A treated copy of a run beside it, scored."""
    folder = Path(f"{run}-after-{name}")
    model = hooks.load_model(run, cfg).float()
    treatment(model)
    model.to(hooks.dtype_of(cfg.precision))
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    after = dict(record, settings=dict(record["settings"], after=name))
    (folder / "run.json").write_text(json.dumps(after, indent=1))
    evaluate.main(["--model", str(folder), "--device", cfg.device, "--precision", cfg.precision,
                   "--out", str(folder.parent.parent)])


def main(run):
    run = Path(run)
    record = evaluate.run_of(run)
    if not record:
        raise hooks.Refused(f"{run} is no run of train.py")
    cfg = SimpleNamespace(**record["settings"])
    tok = hooks.load_tokenizer(SimpleNamespace(model=str(run), tokenizer=""))
    splits = data.load_splits(cfg, tok)
    treatments = {f"tuned{STEPS}": partial(tuned, rows=splits.r, steps=STEPS, seed=cfg.seed),
                  f"relearned{RELEARN}": partial(tuned, rows=splits.f[:8], steps=RELEARN,
                                                 seed=cfg.seed),
                  "int8": partial(rounded, bits=8), "int4": partial(rounded, bits=4),
                  f"pruned{SHARE:.0%}".strip("%"): pruned}
    for name, treatment in treatments.items():
        treat(run, name, treatment, tok, record, cfg)


if __name__ == "__main__":
    evaluate.entry(partial(main, *sys.argv[1:]))
