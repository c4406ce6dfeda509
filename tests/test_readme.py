"""What the README tells people to type, parses; what it names, exists; the tower stands."""
import re
import shlex
from pathlib import Path

import pytest

import audit
import evaluate
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
