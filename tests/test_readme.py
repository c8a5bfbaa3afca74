"""The three READMEs name only what exists: files, functions, tests, settings, commands, A-numbers;
no table of numbers stands without its command, and the first one stays short."""
import ast
import importlib
import json
import re
import shlex
from functools import reduce
from pathlib import Path

import pytest
from PIL import Image

from configs import load_config, parse_config
from configs.demo import AGREES, DIFFERS, PLAIN, coloured, draw_cases
from test_configs import LEAST

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "configs/README.md", "tests/README.md")
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.M | re.S)
COMMENT = re.compile(r"<!--.*?-->", re.S)
CODE = [*ROOT.glob("*.py"), *ROOT.glob("configs/*"), *ROOT.glob("tests/*.py")]


def quoted(page: str) -> list[str]:
    """What stands between backticks, outside blocks of code."""
    texts = re.findall(r"`([^`]+)`", COMMENT.sub("", FENCE.sub("", page)))
    return [" ".join(text.split()) for text in texts]


QUOTED = [text for page in PAGES.values() for text in quoted(page)]
LINES = [line for page in PAGES.values() for block in FENCE.findall(page)
         for line in block.splitlines()] + QUOTED
WITHOUT_SETTINGS = [re.sub(r"^(\w+=\S+ )+", "", line) for line in LINES]  # of the environment
COMMANDS = sorted({line.split("#")[0].strip() for line in WITHOUT_SETTINGS
                   if line.startswith(("python ", "torchrun "))})
# Made by a run, or brought by the reader.
MADE = ("runs/", "data/", "A/", "B/", "mimic-cxr", "<", "theirs.json", "last.pt", "best.pt")
OUTPUTS = {"config.yaml", "annotation.json", "findings.json"}


def test_files_exist():
    names = {word for text in QUOTED
             for word in re.findall(r"[\w./<>-]+\.(?:py|yaml|json|html|txt|md)\b", text)}
    own = {name for name in names if not name.startswith(MADE) and name not in OUTPUTS}
    assert len(own) > 15
    assert [name for name in sorted(own) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    """Files, and headings as the page on the web names them."""
    links = re.findall(r"\]\(([^)]+)\)", FENCE.sub("", PAGES[name]))
    for link in links:
        path, _, heading = link.partition("#")
        if path.startswith("https://"):
            continue
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.is_file(), link
        titles = re.findall(r"^#+ (.+)$", FENCE.sub("", target.read_text("utf-8")), re.M) \
            if heading else []
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not heading or heading in anchors, link


def test_functions_exist():
    """`file.py: name`, `file.py: Class.name`."""
    found = {pair for text in QUOTED for pair in re.findall(r"^([\w/]+)\.py: ([\w.]+)$", text)}
    assert len(found) > 12
    for path, name in sorted(found):
        module = importlib.import_module(path.replace("/", "."))
        if name.endswith("_head"):  # W1 and W2 are made by the constructor
            assert f"self.{name} =" in (ROOT / "model.py").read_text()
        else:
            assert reduce(getattr, name.split("."), module), name


def test_tests_exist():
    defined = {node.name for path in ROOT.glob("tests/test_*.py")
               for node in ast.walk(ast.parse(path.read_text()))
               if isinstance(node, ast.FunctionDef)}
    named = {text for text in QUOTED if re.fullmatch(r"test_\w+", text)}
    assert len(named) > 15 and named <= defined, named - defined


def test_settings_exist():
    """Each `section.key`, and with a value if it stands there."""
    tree = parse_config(LEAST).to_dict()
    known = {f"{section}.{key}" for section, values in tree.items() for key in values}
    named = {text.replace(": ", "=") for text in QUOTED
             if re.match(r"(model|data|loss|train|generate)\.\w+(=\S*|: \S+)?$", text)}
    named = {text for text in named if not re.search(r"\.(py|pt)\b", text)}
    assert len(named) > 12
    for text in named:
        assert text.split("=")[0] in known, text
        if "=" in text and "FOLDER" not in text:
            parse_config(LEAST, [text])


def test_options_exist():
    sources = "".join(path.read_text() for path in CODE if path.suffix == ".py")
    for option in {word for text in QUOTED for word in re.findall(r"--\w+", text)}:
        if option != "--nproc_per_node":
            assert re.search(rf"[\"'](--)?{option[2:]}[\"']", sources), option


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_configs_load_and_are_named(path):
    for name in NAMES[:2]:
        assert load_config(path) and f"configs/{path.name}" in PAGES[name]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_those_of_the_programs(command, monkeypatch, capsys):
    """The program is there, its help knows every option, and it takes the config and the values."""
    words = shlex.split(command)
    if words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:] if not word.startswith("-"))
        return
    if words[1] == "-m":
        words = [words[0], words[2].replace(".", "/") + ".py", *words[3:]]
    program = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[program]).is_file()
    name = words[program].removesuffix(".py").removeprefix("tests/").replace("/", ".")
    module, options = importlib.import_module(name), words[program + 1:]
    shown = words[program:program + (2 if name == "data" else 1)]
    monkeypatch.setattr("sys.argv", [*shown, "--help"])
    with pytest.raises(SystemExit):
        module.main()
    text = capsys.readouterr().out
    for option in options:
        assert not option.startswith("--") or re.search(rf"{option}\b", text), option
    if "--only" in options:
        assert re.search(rf"--only {{[\w,]*\b{options[options.index('--only') + 1]}\b", text)
    if "--config" in options and name != "benchmark":
        values = options[options.index("--set") + 1:] if "--set" in options else []
        load_config(ROOT / options[options.index("--config") + 1], values)


def test_every_a_number_has_its_row():
    rows = re.findall(r"^\| (A\d+) \|", PAGES["configs/README.md"], re.M)
    assert rows == [f"A{i}" for i in range(1, 27)]
    files = [path for path in CODE if path.suffix in (".py", ".yaml", ".md", ".html")]
    named = {name for path in [*files, *map(ROOT.joinpath, NAMES)]
             for name in re.findall(r"\bA\d{1,2}\b", path.read_text(encoding="utf-8"))}
    assert named <= set(rows), named - set(rows)


@pytest.mark.parametrize("name", NAMES)
def test_every_table_of_numbers_is_followed_by_its_command(name):
    """Or by the test that holds it. A table of numbers: three numbers with two decimals or more."""
    tables = 0
    for part in re.split(r"^#+ .*$", FENCE.sub(lambda match: match[0].replace("#", ""),
                                               COMMENT.sub("", PAGES[name])), flags=re.M):
        paragraphs = part.split("\n\n")
        for i, paragraph in enumerate(paragraphs):
            if paragraph.startswith("| ") and len(re.findall(r"\d\.\d\d", paragraph)) > 2 \
                    and "| A1 " not in paragraph:
                tables += 1
                behind = " ".join("\n".join(paragraphs[i + 1:]).split())
                assert re.search(r"`python \w|`test_", behind), paragraph[:80]
    assert tables >= (2 if name == "README.md" else 1)


@pytest.mark.parametrize("name", NAMES)
def test_lines_are_short_and_nothing_is_left_to_fill_in(name):
    prose = [line for line in PAGES[name].splitlines() if not line.startswith("|")]
    assert [line for line in prose if len(line) > 100 and "python " not in line] == []
    assert "@@" not in PAGES[name] and "<!--" not in PAGES[name]


def test_readme_is_short():
    assert PAGES["README.md"].count("\n") < 200
    assert (ROOT / "configs/demo_cases.png").stat().st_size < 200_000


SPEC = {"phrases": {"effusion": ["effusion"], "nodule": ["nodule"]},
        "sides": {"left": ["left"], "right": ["right"]},
        "extents": {"small": ["small", "mild"], "large": ["large"]}}


def test_the_picture_marks_what_agrees_and_what_differs():
    """A finding, its side and its extent each for itself; a denied finding is plain."""
    reference = "a small left effusion . there is a nodule . no pneumothorax ."
    words = coloured(reference, "a mild right effusion . no nodule .", SPEC)
    assert " ".join(word for word, _ in words) == \
        "a small left effusion. there is a nodule. no pneumothorax."
    marked = {word: colour for word, colour in words if colour != PLAIN}
    assert marked == {"small": AGREES, "left": DIFFERS, "effusion.": AGREES, "nodule.": DIFFERS}
    assert {colour for _, colour in coloured("no nodule .", reference, SPEC)} == {PLAIN}


def test_the_picture_is_drawn_from_a_run(tmp_path):
    """Rows for both, one and no finding named; here no report names just one."""
    reference = "a left effusion . there is a nodule ."
    texts = {"a": reference, "b": "clear .", "c": "clear .", "d": reference}
    rows = [{"id": name, "prediction": text, "image_path": [f"{name}.png"] * 2,
             "reference": "an effusion ." if name == "d" else reference}
            for name, text in texts.items()]
    (tmp_path / "images").mkdir()
    for name in texts:
        Image.new("L", (96, 96), 130).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "findings.json").write_text(json.dumps(SPEC))
    (tmp_path / "test_predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    draw_cases(tmp_path, tmp_path, tmp_path / "cases.png")
    with Image.open(tmp_path / "cases.png") as picture:
        colours = {"#%02x%02x%02x" % colour for _, colour in picture.convert("RGB").getcolors(1000)}
        films = picture.convert("L").histogram()[130]
    assert {AGREES, DIFFERS, PLAIN, "#ffffff"} <= colours
    assert picture.height < 3 * 288  # what no report is like has a title only
    assert films == pytest.approx(2 * 2 * 288 * 288, rel=0.01)  # two rows of two views
    one_view = [row | {"image_path": row["image_path"][:1]} for row in rows]
    (tmp_path / "test_predictions.jsonl").write_text("\n".join(map(json.dumps, one_view)))
    draw_cases(tmp_path, tmp_path, tmp_path / "cases.png")
    with Image.open(tmp_path / "cases.png") as picture:
        films = picture.convert("L").histogram()[130]
    assert films == pytest.approx(2 * 288 * 288, rel=0.01)  # better one view than none
