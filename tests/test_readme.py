"""What the README tells people to type, parses; what it names, exists."""
import re
import shlex
from pathlib import Path

import pytest

import plots
import train

HERE = Path(__file__).parent.parent
README = (HERE / "README.md").read_text()
COMMANDS = re.findall(r"^ {4}python (?:train|evaluate|plots)\.py.*$", README, re.M)


@pytest.mark.parametrize("line", COMMANDS)
def test_readme_commands_parse(line, tmp_path):
    words = [w.replace("DIR", str(tmp_path)) for w in shlex.split(line, comments=True)]
    assert (HERE / words[1]).is_file()
    if "--help" not in words:
        rest = plots.split_flags(words[2:])[1] if words[1] == "plots.py" else words[2:]
        train.parse_config(rest)


def test_readme_names_tests_functions_and_pictures_that_exist():
    code = "\n".join(p.read_text() for p in [*HERE.glob("*.py"), *(HERE / "tests").glob("*.py")])
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in code, name
    for module, name in re.findall(r"`(data|losses|hooks|train|evaluate)\.([A-Za-z_]\w*)`", README):
        source = (HERE / f"{module}.py").read_text()
        assert re.search(rf"^(def {name}\(|class {name}|{name} = )", source, re.M) or name == "py"
    for picture in re.findall(r"\]\((assets/[^)]+)\)", README):
        assert (HERE / picture).is_file(), picture


def test_readme_has_no_placeholder_left():
    assert not re.findall(r"@[A-Z]+@", README)
