"""The demo: what its films and reports say, and the two models that come with it."""
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from configs import Data
from configs.demo import (DEMO_SPLITS, build_demo, describe_study, draw_film, draw_findings,
                          findings_spec, write_report)
from configs.demo_models.make import llama_config, swin_config, training_reports
from configs.findings import named_findings
from data import clean_iu_xray, read_studies

MODELS = Path(__file__).parents[1] / "configs/demo_models"
FEW = {"train": 6, "val": 2, "test": 2}


def test_a_build_gives_the_same_bytes_twice_and_reads_as_any_dataset(tmp_path):
    trees = []
    for name in "ab":
        build_demo(tmp_path / name, FEW)
        files = (path for path in sorted((tmp_path / name).rglob("*")) if path.is_file())
        trees.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    assert trees[0] == trees[1]
    splits = read_studies(Data(root=str(tmp_path / "a"), dataset="demo"))
    assert {split: len(studies) for split, studies in splits.items()} == FEW


def test_reports_name_just_the_findings_of_their_study():
    """A perfect report scores F1 1; findings are long-tailed, and many studies have none."""
    rng, counts = np.random.default_rng(0), Counter()
    for _ in range(2000):
        findings = draw_findings(rng)
        named = named_findings(clean_iu_xray(write_report(findings, rng)), findings_spec())
        assert named == {f["finding"]: (f["side"], f["extent"]) for f in findings}
        counts.update(named.keys() or ["none"])
    assert counts["effusion"] > 5 * counts["granuloma"] > 0 and counts["none"] > 300


BODY = np.random.default_rng(1).random(24).tolist()


def film_of(*findings):
    return draw_film(list(findings), False, BODY, np.random.default_rng(2)).astype(float)


@pytest.mark.parametrize("name", ["effusion", "pneumothorax", "atelectasis", "nodule",
                                  "rib fracture", "granuloma"])
def test_a_film_shows_a_finding_on_its_side(name):
    """It changes its own half of the frontal view; the patient's left is right."""
    for side, half in (("left", slice(48, 96)), ("right", slice(0, 48))):
        film = film_of({"finding": name, "side": side, "extent": "moderate"})
        changed = np.abs(film - film_of()) > 12
        assert changed[:, half].sum() > 0.9 * changed.sum() > 0
        assert changed.mean() < 0.12


def test_a_larger_extent_changes_more_of_the_film():
    films = [film_of({"finding": "effusion", "side": "left", "extent": extent})
             for extent in ("small", "moderate", "large")]
    areas = [np.abs(film - film_of()).sum() for film in films]
    assert areas == sorted(areas)


def settings_of(config):
    """What a config says, without what saving adds to it."""
    added = ("transformers_version", "dtype", "architectures", "_name_or_path")
    return {key: value for key, value in config.to_dict().items() if key not in added}


def test_the_models_load_and_their_configs_are_those_of_the_script():
    """The Llama's config holds the hash of the reports that it has read."""
    swin = AutoModel.from_pretrained(MODELS / "swin", add_pooling_layer=False)
    llama = AutoModelForCausalLM.from_pretrained(MODELS / "llama")
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "llama")
    assert settings_of(swin.config) == settings_of(swin_config())
    config = llama_config(training_reports(), len(tokenizer))
    assert settings_of(llama.config) == settings_of(config)


def test_the_llama_has_read_reports_of_train_only(tmp_path):
    """Of val and test it knows a text only where a training study has the same one."""
    build_demo(tmp_path / "demo", FEW)
    annotation = json.loads((tmp_path / "demo/annotation.json").read_text())
    drawn = [clean_iu_xray(study["report"]) for study in annotation["train"]]
    read = training_reports()
    assert read[:FEW["train"]] == drawn and len(read) == DEMO_SPLITS["train"]
    others = {clean_iu_xray(describe_study(split, i).report)
              for split in ("val", "test") for i in range(DEMO_SPLITS[split])}
    assert len(others - set(read)) > len(others) / 2
