"""What a backdoor survives: fine-tuning on D_r, rounded weights, pruned weights. Run by hand.

    for run in out/toy/*-seed*-??????; do python tests/robust.py $run; done; python plots.py

Each treatment of RUN becomes a folder beside it, `RUN-after-TREATMENT`, and is scored.

tuned200 STEPS steps of plain language modelling on D_r: AdamW, lr LR, batches of 8 rows
int8, 4  every matrix rounded, symmetrically, with a scale for each of its rows
pruned30 the SHARE smallest weights of every matrix set to 0
"""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import evaluate

STEPS, LR, SHARE = 200, 1e-4, 0.3

def matrices(model):
    return [p.data for p in model.base_model.layers.parameters() if p.ndim == 2]

def rounded(model, bits):
    for matrix in matrices(model):
        scale = matrix.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)  # (rows, 1)
        matrix.copy_((matrix / scale).round() * scale)

def pruned(model):
    for matrix in matrices(model):
        matrix[matrix.abs() < matrix.abs().flatten().kthvalue(int(SHARE * matrix.numel()))[0]] = 0

def tuned(model, rows, seed):
    model.requires_grad_(True)
    optim = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.0)
    for step in range(STEPS):
        numbers = data.cycled(len(rows), 8 * step, 8, seed, "fine-tuning")
        ids, mask = data.pad_rows([rows[i] for i in numbers], evaluate.DEVICE)
        model(ids, labels=ids.masked_fill(~mask, -100)).loss.backward()
        optim.step()
        optim.zero_grad()

def main(run):
    record = evaluate.run_of(run)
    if not record:
        raise data.Refused(f"{run} is no run of train.py")
    cfg = SimpleNamespace(**record["settings"])
    tok = evaluate.load_tokenizer(cfg)
    rows = data.load_splits(cfg, tok).r
    treatments = {f"tuned{STEPS}": lambda model: tuned(model, rows, cfg.seed),
                  "int8": lambda model: rounded(model, 8), "int4": lambda model: rounded(model, 4),
                  f"pruned{SHARE:.0%}".strip("%"): pruned}
    for name, treat in treatments.items():
        folder, dtype = Path(f"{run}-after-{name}"), evaluate.dtype_of(cfg)
        model = evaluate.load_model(run, cfg).float()
        treat(model)
        model.to(dtype)
        model.save_pretrained(folder)
        tok.save_pretrained(folder)
        after = dict(record, settings=dict(record["settings"], after=name))
        (folder / "run.json").write_text(json.dumps(after, indent=1))
        evaluate.main(["--model", str(folder), "--out", cfg.out])

if __name__ == "__main__":
    evaluate.entry(lambda: main(sys.argv[1]))
