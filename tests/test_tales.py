"""assets/tales.py: FairytaleQA's stories as MUSE's books. The stories below are invented."""
import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "assets"))
import tales

SENTENCE = 'The {who} asked Mrs. Orm, "Is it there?" before it rained again on day {day}.'


def write_table(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def write_story(clone, book, name):
    """A short and a long section, as in the clone, and 14 explicit questions."""
    sections = []
    for count in (6, 40):
        sentences = [SENTENCE.format(who=name, day=day) for day in range(count)]
        sections.append("\n".join(sentences))
    write_table(clone / f"section-stories/{book}/{name}-story.csv", ["section", "text"],
                enumerate(sections))
    write_table(clone / f"sentence-stories/{book}/{name}-story.csv", ["sentence", "text"],
                [[1, "A sentence a row."]])
    asked = [[f"Who met {name} on day {day}?", "explicit", f"Orm the {day}th."]
             for day in range(14)]
    asked += [[f"Why did {name} go?", "implicit", "to rest"],
              [f"What did {name} say?", "explicit", "so much " * 7],
              [f"Who met {name} on day 3?", "explicit", "somebody else"]]
    write_table(clone / f"questions/{book}/{name}-questions.csv",
                ["question", "ex-or-im1", "answer1"], asked)


def call(*args):
    return subprocess.run([sys.executable, tales.__file__, *map(str, args)],
                          capture_output=True, text=True)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    for book, names in tales.SPLITS.values():
        for name in names.split():
            write_story(folder / "data-by-origin", book, name)
    return folder


@pytest.fixture(scope="module")
def books(clone, tmp_path_factory):
    """{file of OUT: its rows}."""
    out = tmp_path_factory.mktemp("out")
    assert call(clone, out).returncode == 0
    return {str(path.relative_to(out)): json.loads(path.read_text())
            for path in out.glob("*/*.json")}


def test_tested_questions_stand_in_no_row_that_is_unlearned(books):
    pages = "".join(books["raw/forget.json"])
    assert len(books["knowmem/forget_qa.json"]) == tales.TESTED
    assert not [fact for fact in books["knowmem/forget_qa.json"] if fact["question"] in pages]
    examples = books["knowmem/forget_qa_icl.json"]
    assert len(examples) == tales.SHOTS
    for fact in examples:
        assert f"Question: {fact['question']}\nAnswer: {fact['answer']}\n\n" in pages


def test_retain_examples_and_tested_questions_are_of_different_stories(books):
    def stories(name):
        return {fact["question"].split()[2] for fact in books[f"knowmem/{name}.json"]}

    assert stories("retain_qa_icl") <= set(tales.SPLITS["retain1"][1].split())
    assert stories("retain_qa") <= set(tales.SPLITS["retain2"][1].split())


def test_questions_are_explicit_short_and_asked_once(books):
    asked = {}
    for name, rows in books.items():
        for fact in rows if name.startswith("knowmem") else []:
            assert asked.setdefault(fact["question"], name) == name
            assert fact["question"].startswith("Who met ")
            # the first answer is kept, without its full stop
            assert fact["answer"].startswith("Orm the ") and fact["answer"].endswith("th")


def test_long_sections_are_cut_where_sentences_end(books):
    prose = [row for row in books["raw/holdout.json"] if not row.startswith("Question: ")]
    assert len(prose) > 2 * len(tales.SPLITS["holdout"][1].split())
    for page in prose:
        assert len(page.split()) < tales.LONGEST
        # neither behind "Mrs." nor within a quotation, and nothing is lost
        assert page.startswith("The ") and page[-2].isdigit() and page.endswith(".")
    assert " ".join(prose).count("Mrs. Orm") == 46 * len(tales.SPLITS["holdout"][1].split())


def test_verbmem_has_pages_cut_in_two(books):
    for page in books["verbmem/forget.json"]:
        assert page["prompt"] + page["gt"] in books["raw/forget.json"]


@pytest.mark.parametrize("folder, said", [
    ("missing", "there is no such folder"), (".", "is it a clone of FairytaleQAData?")])
def test_a_wrong_folder_is_one_line_and_exit_2(tmp_path, folder, said):
    done = call(tmp_path / folder, tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr
    assert not (tmp_path / "out").exists()
