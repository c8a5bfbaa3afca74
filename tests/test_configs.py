"""The schema: what is wrong is named, with what was got and what is allowed."""
import re
from pathlib import Path

import pytest
import yaml

import configs
from configs import PROMPT, InputError, load_config, parse_config

FILES = sorted(Path("configs").glob("*.yaml"))
LEAST = dict(model=dict(vision="a", llm="b"), data=dict(root="c"))
SOURCE = re.compile(r" *# (Sec\. \d|A\d|ours\b)")  # what follows a value


def value_ends(node):
    """Line and column behind each value of a YAML tree; a list is one value."""
    if isinstance(node, yaml.MappingNode):
        return [end for _, value in node.value for end in value_ends(value)]
    return [(node.end_mark.line, node.end_mark.column)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_loads_and_names_its_command(path):
    assert load_config(path).train.output == f"runs/{path.stem}"
    header = re.match(r"(#.*\n)+", path.read_text())
    assert f"#   python train.py --config {path}\n" in header[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_value_has_a_source(path):
    lines = path.read_text().splitlines()
    for line, column in value_ends(yaml.compose(path.read_text())):
        assert SOURCE.match(lines[line][column:]), f"{path}: no source: {lines[line]}"


def test_paper_settings():
    """Sec. 4.1.2, and what A13 and A14 add."""
    for name in ("iu_xray", "mimic_cxr"):
        c = load_config(f"configs/{name}.yaml")
        lora, train, generate = c.model.lora, c.train, c.generate
        assert (lora.rank, lora.alpha, train.batch_size) == (16, 16, 16)
        assert (train.lr, train.init_from, c.data.max_report_tokens) == (1e-4, None, 100)
        assert (generate.num_beams, generate.repetition_penalty) == (3, 2.0)
        assert generate.length_penalty == 2.0 and c.model.prompt == PROMPT
    assert (generate.min_new_tokens, generate.max_new_tokens, train.epochs) == (80, 120, 5)
    defaults = load_config("configs/iu_xray.yaml").to_dict()
    least = parse_config(dict(model={k: defaults["model"][k] for k in ("vision", "llm")},
                              data=dict(root="data/iu_xray"), train=dict(output="runs/iu_xray")))
    assert least.to_dict() == defaults  # the defaults of the schema are the paper's settings


def test_eq8_is_the_same_in_every_config():
    """The paper's three weights are 1, any other term is off; one temperature a loss (A3)."""
    paper = {"report_weight": 1.0, "vse_weight": 1.0, "did_weight": 1.0}
    for path in FILES:
        loss = load_config(path).to_dict()["loss"]
        weights = {key: value for key, value in loss.items() if key.endswith("_weight")}
        assert weights == dict.fromkeys(weights, 0.0) | paper, path
        assert (loss["vse_temperature"], loss["did_temperature"]) == (1.0, 0.07), path
        assert loss["vse_self_in_denominator"] is False, path


def test_config_survives_being_written(tmp_path):
    """A byte-order mark is no part of it."""
    config = load_config("configs/iu_xray.yaml", [
        "model.lora=null", "train.lr=3.0e-4", "data.limit=7", "model.teacher=x",
        "train.init_from=best.pt", "data.dataset=own"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8-sig")
    assert load_config(tmp_path / "config.yaml") == config
    assert config.model.lora is None and config.train.lr == 3e-4 and config.data.limit == 7
    assert config.train.init_from == "best.pt" and config.data.dataset == "own"


def test_override_reaches_into_sections():
    config = parse_config(LEAST, ["model.lora.rank=4", "loss.vse_weight=0"])
    assert config.model.lora.rank == 4 and config.model.lora.alpha == 16
    assert isinstance(config.loss.vse_weight, float)


@pytest.mark.parametrize("key, text, read", [
    ("train.output", "/x/exp #3", "/x/exp #3"),
    ("train.output", "null", None),
    ("train.init_from", "a=b", "a=b"),
    ("model.teacher", "yes", "yes"),
    ("data.root", "007", "007"),
    ("data.root", "none", "none"),  # null is not allowed here: a folder
    ("data.limit", "7 # of all", 7),
    ("data.limit", "~", None),
    ("model.lora", "null", None),
    ("model.prompt", '["a: ", " b\\n"]', ("a: ", " b\n")),
])
def test_an_override_reads_a_text_as_typed_and_the_rest_as_yaml(key, text, read):
    section, name = key.split(".")
    config = parse_config(LEAST, [f"{key}={text}"])
    assert getattr(getattr(config, section), name) == read


def test_home_is_expanded_in_paths(monkeypatch):
    """Not in other texts; `data.root=~` is the home, as null is not allowed there."""
    monkeypatch.setenv("HOME", "/home/me")
    for key in ("model.vision", "model.teacher", "data.root", "train.output", "train.init_from"):
        section, name = key.split(".")
        config = parse_config(LEAST, [f"{key}=~/x", 'model.prompt=["~/x", b]'])
        assert getattr(getattr(config, section), name) == "/home/me/x"
        assert config.model.prompt[0] == "~/x"
    assert parse_config(LEAST, ["data.root=~"]).data.root == "/home/me"


@pytest.mark.parametrize("setting", [
    "train.output=~", "model.teacher=None", "model.lora=none", "data.limit=None"])
def test_none_is_no_null(setting):
    with pytest.raises(InputError, match=rf"{setting.split('=')[0]}: got .*write null"):
        parse_config(LEAST, [setting])


@pytest.mark.parametrize("text, key", [
    ("train: {lr: 1.0}\ndata: {root: c}\ntrain: {lr: 2.0}", "train .*line 3"),
    ("model:\n  lora:\n    rank: 1\n    alpha: 2\n    rank: 1", "rank .*line 5"),
])
def test_what_stands_twice_is_refused(text, key, tmp_path):
    (tmp_path / "twice.yaml").write_text(text)
    with pytest.raises(InputError, match=f"twice.yaml: .*{key}"):
        load_config(tmp_path / "twice.yaml")
    with pytest.raises(InputError, match="rank stands twice"):
        parse_config(LEAST, ["model.lora={rank: 1, rank: 2}"])


@pytest.mark.parametrize("override, words", [
    ("train.batchsize=4", "batchsize': unknown key; the nearest known key is train.batch_size"),
    ("batch_size=4", "'batch_size': unknown key; the nearest known key is train.batch_size"),
    ("train.rank=4", "'train.rank': unknown key; the nearest known key is model.lora.rank"),
    ("train.lr=1e-4", r"train.lr: got '1e-4' \(str\), expected float.*write 1.0e-4"),
    ("train.lr=0", r"train.lr: got 0.0 \(float\), expected float above 0"),
    ("loss.vse_weight=.nan", "loss.vse_weight: got nan"),
    ("train.batch_size=true", r"train.batch_size: got True \(bool\), expected int"),
    ("train.batch_size=1", r"train.batch_size: got 1 \(int\), expected at least 2"),
    ("data.limit=many", "data.limit: got 'many' .*expected int .*or null"),
    ("data.dataset=iu", "data.dataset: got 'iu' .*expected 'iu_xray' or .* or 'own'"),
    ("model.lora=16", r"model.lora: got 16 \(int\), expected keys: rank"),
    ("model.lora.target_modules=q_proj", "target_modules: got 'q_proj' .*a list of names"),
    ("model.vision=null", "model.vision: got None .*expected text"),
    ("generate.min_new_tokens=200", "min_new_tokens: got 200 .*expected at most"),
    ("train.min_lr=1.0", "train.min_lr"),
    ("train.output= ", "train.output: got ' ' .*expected text"),
    ("model.prompt=[a, 1]", "model.prompt: got .*a list of two texts"),
    ("train={output: 7}", r"train.output: got 7 \(int\), expected text, in quotes .*or null"),
    ("train.seed=2024-02-31", "not valid YAML"),
    ("train.lr", "expected section.key=value"),
    ("train.lr=[", "not valid YAML"),
])
def test_what_is_wrong_is_named(override, words):
    with pytest.raises(InputError, match=words):
        parse_config(LEAST, [override])


def test_missing_or_broken_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="iu_xray.yaml"):
        load_config(tmp_path / "none.yaml")
    for text, words in (("a: [", "not valid YAML"), ("", "expected the sections"),
                        ("model: {vision: a, llm: b}", "data.root: missing")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError, match=words):
            load_config(tmp_path / "bad.yaml")


def test_windows_is_told_of_wsl(monkeypatch):
    """Before anything is imported that Windows has not: every script imports configs first."""
    code = Path(configs.__file__).read_text()
    monkeypatch.setattr("os.name", "nt")
    with pytest.raises(SystemExit, match="WSL"):
        exec(code, {"__name__": "configs"})
