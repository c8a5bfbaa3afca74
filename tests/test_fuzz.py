"""Odd annotations and configs: every failure is a ValueError or a FileNotFoundError of one line.

100 cases a test; VDGEN_FUZZ=7000 makes it 7,000.
"""
import json
import os

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs import Data, load_config
from data import read_studies

many = settings(max_examples=int(os.environ.get("VDGEN_FUZZ", 100)), deadline=None, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
scalars = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
           | st.sampled_from(["1.", ". . .", "../x", "/x", "a.png", "\0"]))
values = st.recursive(
    scalars,
    lambda inner: (st.lists(inner, max_size=4)
                   | st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8)
studies = values | st.fixed_dictionaries({}, optional={
    "id": scalars, "report": scalars | values, "image_path": st.lists(scalars, max_size=3) | values,
    "subject_id": values})
trees = values | st.dictionaries(
    st.sampled_from(["train", "val", "test", "sections", "other"]),
    st.lists(studies, max_size=3) | values, max_size=4)


def only_clear_errors(call, *arguments):
    """What the call returns, or None if it refuses in one line."""
    try:
        return call(*arguments)
    except (ValueError, FileNotFoundError) as error:
        assert str(error) and "\n" not in str(error), repr(str(error))


@many
@given(tree=trees, dataset=st.sampled_from(["iu_xray", "mimic_cxr", "own"]))
def test_annotation_reader_refuses_clearly(tree, dataset, tmp_path):
    (tmp_path / "annotation.json").write_text(json.dumps(tree))
    splits = only_clear_errors(read_studies, Data(root=str(tmp_path), dataset=dataset))
    for studies in (splits or {}).values():
        for study in studies:
            assert isinstance(study.report, str) and study.image_paths
            for path in study.image_paths:
                assert not path.startswith("/") and ".." not in path.split("/")


SECTIONS = {
    "model": ["vision", "llm", "teacher", "lora", "vse_expansion"],
    "loss": ["vse_temperature", "did_temperature", "vse_weight", "did_weight"],
    "data": ["root", "dataset", "limit", "max_report_tokens"],
    "train": ["lr", "epochs", "batch_size", "precision", "seed"],
    "generate": ["num_beams", "min_new_tokens", "max_new_tokens"],
    "other": ["x"],
}
configs = values | st.fixed_dictionaries({}, optional={
    name: values | st.dictionaries(st.sampled_from(keys) | st.text(max_size=8), values, max_size=5)
    for name, keys in SECTIONS.items()})


@many
@given(tree=configs, override=st.none() | st.text(max_size=30) | st.builds(
    "{}.{}={}".format, st.sampled_from(list(SECTIONS)),
    st.sampled_from(["lr", "root", "lora", "lora.rank", "limit"]), st.text(max_size=12)))
def test_load_config_refuses_clearly(tree, override, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    only_clear_errors(load_config, path, [] if override is None else [override])


