"""The README names only what exists: files, functions, tests, settings, commands, A-numbers; and no number without its command."""
import ast
import importlib
import re
import shlex
from functools import reduce
from pathlib import Path

import pytest

from configs import load_config, parse_config
from test_configs import LEAST

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = [*ROOT.glob("*.py"), *ROOT.glob("configs/*"), *ROOT.glob("tests/*.py")]
QUOTED = [" ".join(text.split()) for text in re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"```.*?```", "", README, flags=re.S))]
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```\n(.*?)```", README, re.S) for line in block.splitlines()
            if line.startswith(("python ", "torchrun "))] + [text for text in QUOTED if text.startswith(("python ", "torchrun "))]
MADE = ("runs/", "data/", "mimic-cxr", "<", "chexbert.pth", "theirs.json")  # by a run, or brought by the reader


def test_files_exist():
    names = {word for text in QUOTED for word in re.findall(r"[\w./<>-]+\.(?:py|yaml|json|html|txt|md)\b", text)}
    outputs = {"config.yaml", "annotation.json", "findings.json", "vocab.txt"}  # of a run, a dataset, CheXbert
    own = {name for name in names if not name.startswith(MADE) and name not in outputs}
    assert len(own) > 15
    assert [name for name in sorted(own) if not (ROOT / name).is_file() and not (ROOT / "configs" / name).is_file()] == []


def test_functions_exist():
    """`file.py: name`, `file.py: Class.name`, and what else stands behind the comma in a cell of the table of code."""
    found = [(module, name) for text in QUOTED for module, name in re.findall(r"^(\w+)\.py: ([\w.]+)$", text)]
    assert len(found) > 12
    for module, name in found:
        target = importlib.import_module(module)
        if module == "model" and name.endswith("_head"):  # W1 and W2 are made by the constructor
            assert f"self.{name} =" in (ROOT / "model.py").read_text()
        else:
            assert reduce(getattr, name.split("."), target), name


def test_tests_exist():
    defined = {node.name for path in ROOT.glob("tests/test_*.py") for node in ast.walk(ast.parse(path.read_text()))
               if isinstance(node, ast.FunctionDef)}
    named = {name for text in QUOTED for name in re.findall(r"\btest_\w+\b(?!\.py)", text)} - {"test_metrics", "test_predictions", "test_report"}
    assert len(named) > 20 and named <= defined, named - defined


def test_settings_exist():
    """Each `section.key`, and with a value if it stands there."""
    known = {f"{section}.{key}" for section, values in parse_config(LEAST).to_dict().items() for key in values}
    named = [text.replace(": ", "=") for text in QUOTED if re.match(r"(model|data|loss|train|generate)\.\w+(=\S*|: \S+)?$", text)]
    named = [text for text in named if ".py" not in text]
    assert len(named) > 12
    for text in named:
        assert text.split("=")[0] in known, text
        if text.rstrip("=") != text.split("=")[0]:
            parse_config(LEAST, [text])


def test_options_exist():
    sources = "".join(path.read_text() for path in [*ROOT.glob("*.py"), ROOT / "tests/benchmark.py"])
    for option in {word for text in QUOTED for word in re.findall(r"--\w+", text)} - {"--nproc_per_node"}:
        assert re.search(rf"[\"']({option}|{option[2:]})[\"']", sources), option


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_configs_load_and_are_named(path):
    assert load_config(path) and f"configs/{path.name}" in README


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_those_of_the_programs(command, monkeypatch, capsys):
    """The program is there, its help knows every option, and it takes the config and the values that follow."""
    words = shlex.split(command)
    if words[1:3] == ["-m", "pytest"]:
        return
    program = next(i for i, word in enumerate(words) if word.endswith(".py"))
    module, options = importlib.import_module(Path(words[program]).stem), words[program + 1:]
    assert (ROOT / words[program]).is_file()
    monkeypatch.setattr("sys.argv", [*words[program:program + (2 if module.__name__ == "data" else 1)], "--help"])
    with pytest.raises(SystemExit):
        module.main()
    text = capsys.readouterr().out
    for option in options:
        assert not option.startswith("--") or re.search(rf"{option}\b", text), option
    if "--config" in options and module.__name__ != "benchmark":
        values = options[options.index("--set") + 1:] if "--set" in options else []
        load_config(ROOT / options[options.index("--config") + 1], values)


def test_every_a_number_has_its_row():
    rows = re.findall(r"^\| (A\d+) \|", README, re.M)
    assert rows == [f"A{i}" for i in range(1, len(rows) + 1)] and len(rows) == 26
    named = {name for path in [*CODE, ROOT / "README.md"] if path.suffix in (".py", ".yaml", ".md", ".html")
             for name in re.findall(r"\bA\d{1,2}\b", path.read_text(encoding="utf-8"))} - {"A100"}
    assert named <= set(rows), named - set(rows)


def test_every_table_of_numbers_is_followed_by_its_command():
    parts = [part for name in ("Results", "Speed") for part in re.search(rf"^## {name}\n(.*?)^## ", README, re.M | re.S).group(1).split("\n### ")]
    tables = 0
    for part in parts:
        paragraphs = part.split("\n\n")
        for i, paragraph in enumerate(paragraphs):
            if paragraph.startswith("|") and re.search(r"\d\.\d|\.\d\d", paragraph):
                tables += 1
                behind = " ".join(paragraphs[i + 1:])
                assert re.search(r"`python \w", behind), paragraph[:80]
    assert tables >= 5
