"""The pages name only what exists: files, functions, tests, settings, commands and A-numbers."""
import importlib
import re
import shlex
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from configs import load_config, parse_config
from configs.demo import AGREES, DIFFERS, LINE, PLAIN, coloured, write_words

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "configs/README.md", "configs/results.md", "tests/README.md")
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.M | re.S)
TEXT = FENCE.sub("", "\n\n".join(PAGES.values()))
QUOTED = {" ".join(text.split()) for text in re.findall(r"`([^`]+)`", TEXT)}
FENCED = "\n".join(block for page in PAGES.values() for block in FENCE.findall(page)).splitlines()
LINES = [part for line in (*QUOTED, *FENCED) for part in line.split(" && ")]
WITHOUT_ENVIRONMENT = [re.sub(r"^(\w+=\S+ )+", "", line) for line in LINES]
COMMANDS = sorted({line.split("#")[0].strip() for line in WITHOUT_ENVIRONMENT
                   if line.startswith(("python ", "torchrun "))})


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    """Files, and headings as the page on the web names them."""
    for link in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", PAGES[name])):
        path, _, heading = link.partition("#")
        if path.startswith("https://"):
            continue
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.is_file(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", FENCE.sub("", target.read_text("utf-8")), re.M)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, link


def test_files_exist():
    """Of configs/ and tests/, and the scripts of the top level."""
    ours = re.compile(r"(?<![\w/.])(?:(?:configs|tests)/[\w./]*\w|\w+\.py\b)")
    named = {path for text in QUOTED for path in ours.findall(text)}
    assert named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_functions_exist():
    """`file.py: name`, `file.py: Class.name`."""
    found = {pair for text in QUOTED for pair in re.findall(r"^([\w/]+)\.py: ([\w.]+)$", text)}
    assert found
    for path, name in sorted(found):
        module = importlib.import_module(path.replace("/", "."))
        if name.endswith("_head"):  # W1 and W2 are made by the constructor
            assert f"self.{name} =" in (ROOT / "model.py").read_text()
        else:
            assert reduce(getattr, name.split("."), module), name


def test_tests_exist():
    sources = "".join(path.read_text() for path in ROOT.glob("tests/test_*.py"))
    named = {text for text in QUOTED if re.fullmatch(r"test_\w+", text)}
    assert named and named <= set(re.findall(r"^def (test_\w+)", sources, re.M))


def test_settings_exist():
    """Each `section.key`, and with a value if it stands there; those of commands: see there."""
    least = {"model": {"vision": "", "llm": ""}, "data": {"root": ""}}
    least = {section: dict.fromkeys(keys, "FOLDER") for section, keys in least.items()}
    tree = parse_config(least).to_dict()
    named = {setting for text in QUOTED - set(COMMANDS) for setting in re.findall(
        r"(?<![\w./])((model|data|loss|train|generate)\.(?!py\b|pt\b)(\w+)(=\S+)?)", text)}
    assert named
    for setting, section, key, value in named:
        assert key in tree[section], setting
        if value and not value.isupper():
            parse_config(least, [setting])


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_those_of_the_programs(command, monkeypatch, capsys):
    """The program is there, its help knows every option, and it takes the config and the values."""
    words = shlex.split(command)
    if words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:] if not word.startswith("-"))
        return
    if words[1] == "-m":
        words = ["python", words[2].replace(".", "/") + ".py", *words[3:]]
    program = next(i for i, word in enumerate(words) if word.endswith(".py"))
    name = words[program].removesuffix(".py").removeprefix("tests/").replace("/", ".")
    options = words[program + 1:]
    shown = words[program:program + (2 if name == "data" else 1)]
    monkeypatch.setattr("sys.argv", [*shown, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(name).main()
    text = capsys.readouterr().out
    for option in options:
        assert not option.startswith("--") or re.search(rf"{option}\b", text), option
    if "--config" in options and "..." not in options:
        values = options[options.index("--set") + 1:] if "--set" in options else []
        load_config(ROOT / options[options.index("--config") + 1], values)


def test_every_a_number_has_its_row():
    """Rows without a gap, and one for each number that a page cites. Code may cite more."""
    rows = re.findall(r"^\| (A\d+) \|", PAGES["configs/README.md"], re.M)
    assert rows and rows == [f"A{i}" for i in range(1, len(rows) + 1)]
    cited = {name for page in PAGES.values() for name in re.findall(r"\bA\d{1,2}\b", page)}
    assert cited <= set(rows)


def test_the_picture_marks_what_agrees_and_what_differs():
    """A finding, its side and its extent each for itself; a denied finding is plain."""
    spec = {"phrases": {"effusion": ["effusion"], "nodule": ["nodule"]},
            "sides": {"left": ["left"], "right": ["right"]},
            "extents": {"small": ["small", "mild"]}}
    reference = "a small left effusion . there is a nodule . no pneumothorax ."
    words = coloured(reference, "a mild right effusion . no nodule .", spec)
    marked = {word: colour for word, colour in words if colour != PLAIN}
    assert marked == {"small": AGREES, "left": DIFFERS, "effusion.": AGREES, "nodule.": DIFFERS}


def test_the_picture_underlines_words_and_no_full_stop():
    canvas, font = Image.new("RGB", (200, 60), "white"), ImageFont.load_default(22)
    draw = ImageDraw.Draw(canvas)
    write_words(draw, [("nodule.", DIFFERS)], 0, 0, font)
    line = np.array(canvas)[LINE - 3, :, 2] < 255
    assert line.any() and line.nonzero()[0].max() == round(draw.textlength("nodule", font))


def test_the_first_screen_has_two_commands_that_set_up_and_run():
    """.ci/run runs the second, as it stands there."""
    lines = [line for line in FENCE.findall(PAGES["README.md"])[1].splitlines()
             if line.startswith("pip install")]
    assert lines == [
        "pip install -r requirements.txt && python train.py --config configs/demo.yaml",
        "pip install -r tests/requirements.txt && python -m pytest -q tests"]
    assert "-r ../requirements.txt" in (ROOT / "tests/requirements.txt").read_text().splitlines()
