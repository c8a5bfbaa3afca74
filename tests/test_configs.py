"""The schema: what is wrong is named, with what was got and what is allowed."""
import re
from pathlib import Path

import pytest
import yaml

import configs
from configs import Config, load_config, parse_config

FILES = sorted(Path("configs").glob("*.yaml"))
LEAST = dict(model=dict(vision="a", llm="b"), data=dict(root="c"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_loads_and_every_value_has_a_source(path):
    config = load_config(path)
    assert config.train.output == f"runs/{path.stem}"
    lines = path.read_text().splitlines()
    assert "python train.py --config " + str(path) in "\n".join(lines[:3]) and len(lines) <= 60
    for line in lines:
        if re.match(r"\s+\w+: \S", line) and path.stem != "demo":
            assert "# " in line or line.strip().startswith("root:"), f"{path}: no source: {line}"


def test_paper_settings():
    """Sec. 4.1.2, and what A3, A13 and A14 add."""
    for name in ("iu_xray", "mimic_cxr"):
        c = load_config(f"configs/{name}.yaml")
        lora, train, generate = c.model.lora, c.train, c.generate
        assert (lora.rank, lora.alpha, train.batch_size, train.eval_batch_size) == (16,) * 4
        assert (train.lr, train.init_from, c.data.max_report_tokens) == (1e-4, None, 100)
        assert (generate.num_beams, generate.repetition_penalty) == (3, 2.0)
        assert generate.length_penalty == 2.0
    assert (generate.min_new_tokens, generate.max_new_tokens, train.epochs) == (80, 120, 5)
    defaults = load_config("configs/iu_xray.yaml").to_dict()
    least = parse_config(dict(model={k: defaults["model"][k] for k in ("vision", "llm")},
                              data=dict(root="data/iu_xray"), train=dict(output="runs/iu_xray")))
    assert least.to_dict() == defaults  # the defaults of the schema are the paper's settings


def test_eq8_is_the_same_in_every_config():
    """Weights 1, and one temperature for each loss (A3)."""
    sections = [load_config(path).to_dict()["loss"] for path in FILES]
    assert len(sections) == 4 and all(section == sections[0] for section in sections)
    weights = {key: value for key, value in sections[0].items() if key.endswith("weight")}
    assert weights == {"report_weight": 1.0, "vse_weight": 1.0, "did_weight": 1.0}
    assert (sections[0]["vse_temperature"], sections[0]["did_temperature"]) == (1.0, 0.07)


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
    assert isinstance(config, Config) and isinstance(config.loss.vse_weight, float)


@pytest.mark.parametrize("override, words", [
    ("train.batchsize=4",
     "train.batchsize: unknown key; the nearest known key is train.batch_size"),
    ("batch_size=4", "batch_size: unknown key; the nearest known key is train.batch_size"),
    ("trian.lr=1.0", "trian: unknown key; the nearest known key is train"),
    ("train.lr=1e-4", r"train.lr: got '1e-4' \(str\), expected float .*write 1.0e-4"),
    ("train.lr=0", "train.lr: got 0.0, expected above 0"),
    ("train.lr=.inf", "train.lr: got inf"),
    ("loss.vse_weight=.nan", "loss.vse_weight: got nan"),
    ("train.batch_size=2.5", r"train.batch_size: got 2.5 \(float\), expected int"),
    ("train.batch_size=true", r"train.batch_size: got True \(bool\), expected int"),
    ("train.batch_size=1", "train.batch_size: got 1, expected at least 2"),
    ("data.limit=many", "data.limit: got 'many' .*expected int or null"),
    ("data.dataset=iu", "data.dataset: got 'iu', expected 'iu_xray' or .* or 'own'"),
    ("model.lora=16", r"model.lora: got 16 \(int\), expected keys: rank"),
    ("model.lora.target_modules=q_proj", "target_modules: got 'q_proj' .*a list of names"),
    ("model.vision=null", "model.vision: got None .*expected str"),
    ("generate.min_new_tokens=200", "min_new_tokens: got 200, expected at most"),
    ("train.min_lr=1.0", "train.min_lr"),
    ("train.lr", "expected section.key=value"),
    ("train.lr=[", "not valid YAML"),
])
def test_what_is_wrong_is_named(override, words):
    with pytest.raises(ValueError, match=words):
        parse_config(LEAST, [override])


def test_missing_or_broken_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="iu_xray.yaml"):
        load_config(tmp_path / "none.yaml")
    for text, words in (("a: [", "not valid YAML"), ("", "expected the sections"),
                        ("model: {vision: a, llm: b}", "data.root: missing"),
                        ("!!python/object:os.system x", "YAML")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=words):
            load_config(tmp_path / "bad.yaml")


def test_windows_is_told_of_wsl(monkeypatch):
    """Before anything is imported that Windows has not: every script imports configs first."""
    code = Path(configs.__file__).read_text()
    monkeypatch.setattr("os.name", "nt")
    with pytest.raises(SystemExit, match="WSL"):
        exec(code, {"__name__": "configs"})
