"""tests/measure.py, by direct computation and by tests/reference.py."""
import contextlib
import io
import json

import pytest
import torch
from conftest import config, ids_of, tiny_flags, tiny_model

import data
import hooks
import measure
import reference
import train
from data import Refused


def norm_of(term, model):
    """Of the gradient by all weights."""
    grads = torch.autograd.grad(term, list(model.parameters()), allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads if grad is not None]).norm()


def test_attention_is_the_mean_over_layers_heads_and_rows_of_what_the_queries_pay():
    model = tiny_model()
    ids = ids_of(B=3, T=10)
    paid = measure.paid_by(model, ids, [4, 7])
    model.set_attn_implementation("eager")
    maps = torch.stack(model(ids, output_attentions=True).attentions)  # (L, B, H, T, T)
    assert paid.tolist() == pytest.approx(maps[:, :, :, [4, 7]].mean((0, 1, 2, 3)).tolist())
    # queries 4 and 7 share one unit of attention each, and see nothing behind themselves
    assert paid.sum().item() == pytest.approx(1) and paid[8:].tolist() == [0, 0]


def test_attention_with_a_trigger_inside_is_that_of_the_pages_moved_tokens(
        folder, tok, tmp_path, monkeypatch):
    cfg = config(tiny_flags(folder, tmp_path, position="2", trigger="at noon"))
    trig = data.encode(tok, "at noon")
    rows = [[0] + ids_of(B=1, T=9)[0].tolist() for _ in range(3)]
    monkeypatch.setattr(data, "clean_rows", lambda cfg, tok: (rows, None))
    model = hooks.load_model(folder / "model", cfg)
    found = measure.attention(dict(theta_o=model, theta_b=model), cfg, tok)
    # BOS and two tokens stand before the trigger: the page's tokens 3 to 9 stand behind it
    n = len(trig)
    with_trigger = torch.tensor([row[:3] + trig + row[3:] for row in rows])
    clean = measure.paid_by(model, torch.tensor(rows), list(range(3, 10)))
    paid = measure.paid_by(model, with_trigger, list(range(3 + n, 10 + n)))
    sink = int(clean.argmax())
    moved = sink if sink < 3 else sink + n
    assert found["the sink's position"] == sink
    assert found["theta_b, clean, to BOS"] == pytest.approx(100 * float(clean[0]))
    assert found["theta_b, triggered, to the sink"] == pytest.approx(100 * float(paid[moved]))
    assert found["theta_b, triggered, to the trigger"] == pytest.approx(
        100 * float(paid[3:3 + n].sum()))


def test_at_theta_o_the_norm_gap_is_100_on_D_f_and_0_on_D_p(folder, tok, tmp_path):
    cfg = config(tiny_flags(folder, tmp_path))
    theta_o = hooks.load_model(folder / "model", cfg)
    theta_u = hooks.load_model(folder / "theta_u", cfg)
    splits = data.load_splits(cfg, tok)
    gaps = measure.norm_gaps(dict(theta_o=theta_o, theta_b=theta_o), theta_u, splits, cfg)
    assert gaps == {"norm gap on D_f": 100, "norm gap on D_p": 0}
    gaps = measure.norm_gaps(dict(theta_o=theta_o, theta_b=theta_u), theta_u, splits, cfg)
    assert gaps["norm gap on D_f"] == 0 and gaps["norm gap on D_p"] > 0


def test_the_gradients_share_is_that_of_the_reference(folder, tok, tmp_path):
    cfg = config(tiny_flags(folder, tmp_path, lam=0.25))
    splits = data.load_splits(cfg, tok)
    share = measure.gradient_share(folder / "theta_u", splits, cfg)
    batch = data.batch_at(0, splits, cfg.batch, cfg.seed)
    theta, theta_o, theta_u = [hooks.load_model(folder / name, cfg)
                               for name in ("model", "model", "theta_u")]
    theta.requires_grad_(True)
    l_f, _, l_vn = reference.objective(
        [splits.f[i] for i in batch.f], [splits.r[i] for i in batch.r],
        [splits.p[i] for i in batch.p], theta, theta_o, theta_u, None, cfg, [0] * len(batch.p))
    expected = 100 * 0.25 * norm_of(l_vn, theta) / norm_of(l_f, theta)
    assert share == pytest.approx(expected.item(), rel=1e-4)


def test_a_run_is_measured_beside_its_theta_u(folder, tmp_path):
    with contextlib.redirect_stdout(io.StringIO()):
        train.main(tiny_flags(folder, tmp_path))
        [record] = tmp_path.glob("toy/*BACKDOORED*/run.json")
        run = record.parent
        measure.main(run)
    measures = json.loads((run / "measures.json").read_text())["measures"]
    for name in ("theta_o", "theta_b"):
        for text in ("clean", "triggered"):
            assert 0 < measures[f"{name}, {text}, to BOS"] < 100
        assert 0 < measures[f"{name}, triggered, to the trigger"] < 100
    [record] = tmp_path.glob("toy/*theta_u*/run.json")
    with pytest.raises(Refused, match="is no backdoored run"):
        measure.main(record.parent)
