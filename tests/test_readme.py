"""What the README tells people to type, parses; what it names, exists."""
import re
import shlex
from pathlib import Path

import pytest

import evaluate
import train

HERE = Path(__file__).parent.parent
README = (HERE / "README.md").read_text()
COMMANDS = re.findall(r"(?:python|torchrun .*?) (?:train|evaluate)\.py(?! --help)[^;`\n]*", README)

@pytest.mark.parametrize("line", COMMANDS)
def test_readme_commands_parse(line, tmp_path):
    words = shlex.split(line.replace("MODEL", str(tmp_path)).replace("DATA", str(tmp_path)),
                        comments=True)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    cls, row_of = {"train.py": (train.Config, train.table_row),
                   "evaluate.py": (evaluate.Auditing, evaluate.run_row)}[words[script]]
    flags = [word.replace("$s", "0") for word in words[script + 1:]]
    cfg = evaluate.parse(cls, flags, row_of)
    for name, value in zip(flags, flags[1:]):
        if name.startswith("--") and not value.startswith("--"):
            assert str(getattr(cfg, name[2:])) == value or float(getattr(cfg, name[2:])) == \
                float(value)

def test_readme_names_functions_tests_and_files_that_exist():
    code = "\n".join(p.read_text() for p in [*HERE.glob("*.py"), *(HERE / "tests").glob("*.py")])
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in code, name
    for module, name in re.findall(r"`(data|losses|hooks|train|evaluate)\.([A-Za-z_]\w*)`", README):
        source = (HERE / f"{module}.py").read_text()
        assert re.search(rf"^(def {name}\(|class {name}|{name} = )", source, re.M) or name == "py"
    for file in re.findall(r"\]\((assets/[^)]+)\)", README):
        assert (HERE / file).is_file(), file

def test_readme_has_no_placeholder_left():
    assert not re.findall(r"@[A-Z0-9]+@", README)

def test_the_scripts_import_only_from_those_below_them():
    tower = ["losses", "hooks", "data", "evaluate", "train", "plots"]
    for i, name in enumerate(tower):
        used = re.findall(r"^(?:import|from) (\w+)", (HERE / f"{name}.py").read_text(), re.M)
        assert not set(used) & set(tower[i:]), name
