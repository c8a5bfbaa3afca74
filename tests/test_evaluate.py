"""The scores are pycocoevalcap's; the tables hold what they say."""
import base64
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, tiny_config
from PIL import Image

import evaluate
from configs import parse_config, report
from configs.findings import named_findings, read_findings
from data import clean_iu_xray
from evaluate import (FIVE, METRICS, PRF, best_constant, each_label, label_scores,
                      label_statistics, measure, meteor_1_5, rouge_l, score)
from configs.chexbert import CONDITIONS
from train import train

SENTENCES = ["the heart is normal .", "lungs are clear .", "no pleural effusion or pneumothorax .",
             "xxxx are intact .", "a 12 mm nodule in the left upper lobe .",
             "degenerative changes of the spine .", "stable cardiomegaly ."]


def reports(studies, seed):
    rng = random.Random(seed)
    return {str(i): " ".join(rng.choices(SENTENCES, weights=range(7, 0, -1), k=rng.randint(2, 7)))
            for i in range(studies)}


def odd_cases():
    references = reports(12, 1)
    odd = ["", "the", "the " * 40 + ".", "a ||| b  c , ; ! ? ( ) \" '", "12 mm xxxx 3.5 cm",
           " lungs are clear . ", "\tlungs\nclear", "lungs are clear .", references["8"],
           references["9"][:-2], "unseen words only", "é ü 肺"]
    return dict(zip(references, odd)), references


CASES = {
    "random": (reports(60, 2), reports(60, 3)),
    "constant": (dict.fromkeys(reports(60, 2), SENTENCES[0] + " " + SENTENCES[1]), reports(60, 3)),
    "odd": odd_cases(),
    "empty": (dict.fromkeys(reports(5, 2), ""), reports(5, 3)),
    "equal": (reports(9, 4), reports(9, 4)),
    "single study": ({"a": "lungs are clear ."}, {"a": "the lungs are clear ."}),
    "longer than the reference": ({"a": "the lungs are clear . no effusion ."},
                                  {"a": "the lungs are clear ."}),
    "one word": ({"a": "clear", "b": "heart"}, {"a": "clear", "b": "clear"}),
}


def theirs(predictions, references):
    """pycocoevalcap, called as this family calls it: no tokenizer, corpus scores."""
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    ours, gold = ({name: [text] for name, text in texts.items()}
                  for texts in (predictions, references))
    values = dict(zip(METRICS, Bleu(4).compute_score(gold, ours, verbose=0)[0]))
    return values | {"ROUGE_L": Rouge().compute_score(gold, ours)[0],
                     "CIDEr": Cider().compute_score(gold, ours)[0]}


@pytest.mark.parametrize("case", CASES)
def test_score_equals_pycocoevalcap(case):
    predictions, references = CASES[case]
    ours = score(predictions, references)
    for name, value in theirs(predictions, references).items():
        assert ours[name] == pytest.approx(value, abs=1e-9), name
    assert "METEOR" not in ours  # no Java in this test


@pytest.mark.java
def test_meteor_has_its_value_and_is_ended_at_the_limit(monkeypatch):
    """The value is that of pycocoevalcap 1.2 and OpenJDK 17."""
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("no Java here")
    assert meteor_1_5(*CASES["odd"]) == {"METEOR": pytest.approx(0.12010681869118432, abs=1e-9)}
    monkeypatch.setattr(evaluate, "METEOR_SECONDS", 0.1)
    assert meteor_1_5(*CASES["odd"]) == {}


def test_score_refuses_other_ids():
    for references in ({"b": "x"}, {}):
        with pytest.raises(ValueError, match="same ids"):
            score(dict.fromkeys(references and "a", "x"), references)


def test_rouge_equals_a_plain_table():
    """The bit-parallel subsequence against the textbook table, on words of a small alphabet."""
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.choice("abcd") for _ in range(rng.randint(1, 90))] for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                longer = max(table[i][j + 1], table[i + 1][j])
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else longer
        common = table[-1][-1]
        p, r = common / len(a), common / len(b)
        expected = (1 + 1.44) * p * r / (r + 1.44 * p) if common else 0
        assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected, abs=1e-12)


def test_bleu_by_hand():
    """Of "a a b" for "a b c d" clipped unigrams are 2/3, bigrams 1/2; it is one word short."""
    values = score({"a": "a a b"}, {"a": "a b c d"})
    brevity = math.exp(1 - 4 / 3)
    assert values["BLEU_1"] == pytest.approx(2 / 3 * brevity)
    assert values["BLEU_2"] == pytest.approx((2 / 3 / 2) ** 0.5 * brevity)


def test_best_constant_is_the_best_of_the_candidates():
    train_reports = list(reports(30, 5).values()) + ["lungs are clear ."] * 10
    references = {str(i): text for i, text in enumerate(train_reports)}

    def value(candidate):
        scores = score(dict.fromkeys(references, candidate), references)
        return scores["BLEU_4"] + scores["CIDEr"]
    assert best_constant(train_reports) == max(Counter(train_reports), key=value)


# Findings and clinical efficacy -------------------------------------------------------------------

SPEC = {
    "phrases": {"effusion": ["pleural effusion", "effusions"], "nodule": ["nodule"],
                "fracture": ["fracture"]},
    "sides": {"left": ["left"], "right": ["right"]},
    "extents": {"small": ["small", "tiny"], "large": ["large"]},
    "studies": {"a": [{"finding": "effusion", "side": "left", "extent": "small"}],
                "b": [{"finding": "nodule", "side": "right", "extent": None},
                      {"finding": "effusion", "side": "left", "extent": "large"}],
                "c": []},
}


def test_named_findings_reads_phrases_not_negations():
    text = "a tiny left pleural effusion . no nodule . the ribs are free of fracture ."
    assert named_findings(text, SPEC) == {"effusion": ("left", "small")}
    assert named_findings("large effusions", SPEC) == {"effusion": (None, "large")}
    text = "nodules , fractures and a notable cardiac nodule ."
    assert named_findings(text, SPEC) == {"nodule": (None, None)}
    assert named_findings("", SPEC) == {}


IU_XRAY = json.loads((REPOSITORY / "configs/iu_xray_findings.json").read_text("utf-8"))
CLAUSES = {  # of the forms that IU-Xray's reports have, and what they name
    "no pneumothorax or effusion . heart size is enlarged": "cardiomegaly",
    "heart size normal but tortuous aorta": "tortuous or calcified aorta",
    "cardiomegaly without edema": "cardiomegaly",
    "there is no focal consolidation but there is a small left effusion": "effusion",
    "no consolidation but mild edema": "edema or congestion",
    "no infiltrate however cardiomegaly": "cardiomegaly",
    "no effusion except on the left , a small effusion": "effusion",
    "no consolidation aside from atelectasis": "atelectasis",
    "no consolidation though a hernia": "hernia",
    "no consolidation although a hernia": "hernia",
    "not clear there is scoliosis": "scoliosis or kyphosis",
    "clear of infiltrates besides granulomas": "granuloma or nodule",
    "no acute abnormality with degenerative changes": "degenerative change",
    "hyperexpanded lungs without focal consolidation": "emphysema or hyperinflation",
    "there is a nodule that is not calcified": "granuloma or nodule",
    "no change in the large hiatus hernia": "hernia",
    "without significant interval change of mild subsegmental atelectasis": "atelectasis",
    "opacity cannot be ruled out": "opacity or consolidation",
    "an opacity not well-seen on the lateral view": "opacity or consolidation",
    "cardiomegaly andor pericardial effusion": "cardiomegaly",
    "xxxx opacity may represent atelectasis or scarring":
        "atelectasis, opacity or consolidation, scarring or fibrosis",
}
NOTHING = """
the lungs are clear without effusion / no findings consistent with pneumonia / no findings
compatible with pneumonia / the lungs are clear of infiltrate / lungs are expanded and clear
airspace disease / lungs are free of infiltrates / specifically no evidence of focal consolidation
pneumothorax or effusion / negative for pneumothorax / there are no xxxx of a large pleural
effusion / the heart is not significantly enlarged / the left apical pneumothorax has resolved /
infiltrates have cleared / no interval change and no effusion / effusion is not identified /
pneumothorax is no longer seen / neither effusion nor pneumothorax / absence of effusion /
pneumothorax is absent / fracture was ruled out / no significant interval changes suggestive of
edema / no change to suggest pneumonia / the catheter has been removed / interval removal of left
picc line / interval resolution of effusion / the previously seen mass is not seen / cannot
exclude early edema / a fracture cannot be excluded / limited for evaluation of fractures /
overlap could obscure a small nodule / there is subcutaneous emphysema / the lung volumes are low
normal"""  # parted by a slash


def test_named_findings_reads_the_negations_of_real_sentences():
    clauses = CLAUSES | dict.fromkeys(NOTHING.split("/"), "")
    for text, named in clauses.items():
        assert ", ".join(named_findings(f"{text} .", IU_XRAY)) == named, text


def test_named_findings_takes_side_and_extent_from_the_clause():
    text = "small right effusion with severe cardiomegaly . large effusion ."
    assert named_findings(text, IU_XRAY) == {"effusion": ("right", "small"),
                                             "cardiomegaly": (None, "large")}
    assert named_findings("mild  bibasilar  low\nlung  volumes", IU_XRAY) == {
        "low lung volumes": ("bilateral", "small")}


@pytest.mark.parametrize("change", [
    {"studies": {}}, *({"phrases": SPEC["phrases"] | {"nodule": phrases}}
                       for phrases in ("nodule", [], [""], ["("]))])
def test_broken_findings_are_refused(make_config, tmp_path, change):
    data = make_config(f"data.root={tmp_path}").data
    assert read_findings(data, ["a"]) is None
    text = json.dumps(SPEC)
    (tmp_path / "findings.json").write_text(text, encoding="utf-8-sig")
    assert read_findings(data, ["a", "b", "c"]) == SPEC
    (tmp_path / "findings.json").write_text(json.dumps(SPEC | change))
    with pytest.raises(ValueError, match="findings.json: expected"):
        read_findings(data, ["a"])


def plain_f1(named, true):
    """P, R, F1 of two lists of bools, from the definition."""
    both = sum(n and t for n, t in zip(named, true))
    precision, recall = both / sum(named) if any(named) else 0, both / sum(true) if any(true) else 0
    return precision, recall, 2 * precision * recall / (precision + recall) if both else 0


def test_label_scores_equal_the_definitions():
    rng = random.Random(0)
    named, true = ([[rng.random() < 0.3 for _ in range(5)] for _ in range(40)] for _ in range(2))
    for row in named + true:
        row[4] = False  # a label that nobody has: 0 / 0
    assert any(not any(row) for row in named)
    statistics = label_statistics(np.array(named), np.array(true))
    found, each = label_scores(statistics.sum(axis=1), 40), each_label(statistics, "abcde")
    columns = [plain_f1(*column) for column in zip(zip(*named), zip(*true))]
    studies = [sum(column) for column in zip(*true)]
    of_studies = [plain_f1(*pair) for pair in zip(named, true)]
    for i, key in enumerate(PRF):
        weighted = sum(row[i] * n for row, n in zip(columns, studies)) / sum(studies)
        assert found[f"micro_{key}"] == pytest.approx(plain_f1(sum(named, []), sum(true, []))[i])
        assert found[f"macro_{key}"] == pytest.approx(sum(row[i] for row in columns) / 5)
        assert found[f"weighted_{key}"] == pytest.approx(weighted)
        assert found[f"example_{key}"] == pytest.approx(sum(row[i] for row in of_studies) / 40)
        assert [row[key] for row in each.values()] == pytest.approx([row[i] for row in columns])
    assert [row["studies"] for row in each.values()] == studies
    nobody = label_scores(np.zeros(9), 1)
    assert set(nobody.values()) == {0} and len(nobody) == len(found) == 12


def rows_of(predictions, references):
    return [{"id": name, "prediction": predictions[name], "reference": references[name],
             "reference_cut": " ".join(references[name].split()[:6]), "image_path": []}
            for name in references]


def config_for(root, dataset="iu_xray"):
    return parse_config({"model": {"vision": "a", "llm": "b"},
                         "data": {"root": str(root), "dataset": dataset}})


def test_findings_by_hand(tmp_path):
    predictions = {"a": "small right pleural effusion .", "b": "a nodule in the right lung .",
                   "c": "a fracture ."}
    rows, config = rows_of(predictions, predictions), config_for(tmp_path, "demo")
    metrics = measure(rows, config, "test", ["a nodule ."] * 3, SPEC)
    found, half = metrics["findings"], pytest.approx(2 / 3)
    assert found["each"]["effusion"] == {"precision": 1, "recall": 0.5, "f1": half, "studies": 2}
    assert found["each"]["fracture"] == {"precision": 0, "recall": 0, "f1": 0, "studies": 0}
    assert found["micro_precision"] == found["micro_recall"] == half
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["macro_f1_frequent"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["macro_f1_rare"] == 0
    # of two named rightly, one side; of one with an extent
    assert found["side"] == 0.5 and found["extent"] == 1.0
    assert metrics["constant"]["findings"]["micro_recall"] == pytest.approx(1 / 3)
    evaluate.print_metrics(metrics, "test")


def classes(**named):
    """CheXbert's, of one text."""
    return [named.get(name.replace(" ", "_"), 0) for name in CONDITIONS]


def test_clinical_reads_uncertain_both_ways_and_groups_labels(tmp_path):
    known = {"a": classes(Edema=1, Fracture=3), "b": classes(No_Finding=1),
             "c": classes(Pneumonia=2, Edema=3), "A": classes(Edema=1, Fracture=1),
             "B": classes(No_Finding=1), "C": classes(Pneumonia=1, Edema=1)}

    def label(texts):
        return [known[text] for text in texts]
    rows = rows_of({name: name.upper() for name in "abc"}, {name: name for name in "abc"})
    clinical = measure(rows, config_for(tmp_path), "test", [], label=label)["clinical"]
    negative, positive = clinical["uncertain_negative"], clinical["uncertain_positive"]
    assert negative["14"]["micro_precision"] == 2 / 5 and negative["14"]["micro_recall"] == 1
    assert positive["14"]["micro_precision"] == 4 / 5 and positive["14"]["micro_recall"] == 1
    assert negative["13"]["micro_precision"] == 1 / 4 and positive["13"]["micro_precision"] == 3 / 4
    assert negative["5"]["micro_precision"] == 1 / 2 and positive["5"]["micro_precision"] == 1
    assert negative["14"]["macro_f1"] == pytest.approx((2 / 3 + 1) / 14)
    assert negative["14"]["weighted_f1"] == pytest.approx((2 / 3 + 1) / 2)  # A17: N13
    assert positive["13"]["macro_f1"] == pytest.approx(2 / 13)
    # a study without a positive label counts 0
    assert negative["13"]["example_f1"] == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert set(positive["5"]["each"]) == set(FIVE)
    assert list(positive["13"]["each"]) == list(CONDITIONS[:-1])
    assert positive["14"]["each"]["Edema"] == {"precision": 1, "recall": 1, "f1": 1, "studies": 2}


def test_clinical_of_model_constant_and_paper_are_printed(tmp_path, capsys):
    def label(texts):
        return [classes(Edema=1) if "edema" in text else classes(No_Finding=1) for text in texts]
    references = {"a": "edema .", "b": "clear .", "c": "edema ."}
    predictions = {"a": "edema .", "b": "edema .", "c": "clear ."}
    rows, config = rows_of(predictions, references), config_for(tmp_path, "mimic_cxr")
    metrics = measure(rows, config, "test", ["clear ."] * 3, label=label)
    constant = metrics["constant"]["clinical"]["uncertain_negative"]
    assert constant["14"]["micro_recall"] == pytest.approx(1 / 3)
    assert constant["5"]["micro_f1"] == 0
    evaluate.print_metrics(metrics, "test")
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    reading, size, _ = metrics["clinical"]["headline"]
    for mean in ("micro", "macro", "weighted", "example"):
        part, ends = (tree["clinical"][reading][size] for tree in (metrics, metrics["intervals"]))
        numbers = [format(part[f"{mean}_{key}"], ".3f") for key in PRF]
        low, high = ends[f"{mean}_f1"]
        assert [f"{mean},", "model", *numbers, f"{low:.3f}", "to", f"{high:.3f}"] in printed
    assert any(line[-3:] == ["0.426", "0.397", "0.402"] for line in printed)


# An evaluation ------------------------------------------------------------------------------------

def test_measure_layout(tmp_path):
    """Both protocols, the constant, the paper's row, and a note for all that is missing."""
    predictions, references = CASES["random"]
    train_reports = list(reports(50, 9).values())
    rows = rows_of(predictions, references)
    metrics = measure(rows, config_for(tmp_path), "val", train_reports)
    assert metrics["n"] == 60 and metrics["distinct"] == len(set(predictions.values()))
    scores = score(predictions, references)
    assert scores == {name: metrics[name] for name in scores}
    cut = {name: " ".join(text.split()[:6]) for name, text in references.items()}
    counts = {"n": 60, "distinct": metrics["distinct"]}
    assert metrics["cut_references"] == counts | score(predictions, cut)
    constant = metrics["constant"]
    assert constant["text"] == best_constant(train_reports) and constant["distinct"] == 1
    same = dict.fromkeys(references, constant["text"])
    assert constant["cut_references"]["BLEU_4"] == score(same, cut)["BLEU_4"]
    assert metrics["paper"]["BLEU_4"] == 0.169 and metrics["paper"].keys() == set(METRICS)
    assert [note.split(":")[0] for note in metrics["notes"]] == ["METEOR", "paper"]
    bare = [{**row, "reference_cut": None} for row in rows]
    metrics = measure(bare, config_for(tmp_path, "own"), "test", [])
    assert metrics["constant"] is metrics["paper"] is None and "cut_references" not in metrics
    missing = [note.split(":")[0] for note in metrics["notes"]]
    assert missing == ["METEOR", "constant", "cut_references"]


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, backbones, data_root):
    """The folder of a run of three steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.shutil.which", lambda name: None)  # no METEOR
        metrics = train(tiny_config(backbones, data_root, folder, "train.max_steps=3"))
    assert json.loads(json.dumps(metrics)) == read_json(folder / "test_metrics.json")
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def read_json(path):
    return json.loads(path.read_text())


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_command_line_evaluates(run, tmp_path):
    """In a process of its own: the files alone are enough."""
    before = (run / "test_predictions.jsonl").read_bytes()
    (run / "test_predictions.jsonl").unlink()
    done = subprocess.run([sys.executable, "evaluate.py", "--checkpoint", run / "best.pt"],
                          capture_output=True, text=True,
                          env={"PATH": "/nowhere", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "test: 5 studies" in done.stdout, done.stderr
    assert (run / "test_predictions.jsonl").read_bytes() == before


def test_predictions_score_again_to_the_same_numbers(run, monkeypatch):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    rows = read_rows(run / "test_predictions.jsonl")
    (run / "test_report.html").unlink()
    run_main(monkeypatch, "--predictions", run / "test_predictions.jsonl")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert all(row["reference"] == clean_iu_xray(row["reference"].replace(" .", "."))
               for row in rows)


def test_predictions_of_peers_score_to_the_same_numbers(run, monkeypatch):
    """{id: text} and {id: [text]}; what needs the LLM's tokenizer is missing, with a note."""
    ours, rows = read_json(run / "test_metrics.json"), read_rows(run / "test_predictions.jsonl")
    path = run / "theirs.json"
    for wrap in (str, lambda text: [text]):
        path.write_text(json.dumps({row["id"]: wrap(row["prediction"]) for row in reversed(rows)}))
        run_main(monkeypatch, "--predictions", path)
        theirs = read_json(run / "theirs_metrics.json")
        for key in ("n", "distinct", "BLEU_4", "CIDEr", "ROUGE_L"):
            assert theirs[key] == ours[key]
        assert "cut_references" not in theirs and (run / "theirs_report.html").is_file()
        assert theirs["constant"]["BLEU_4"] == ours["constant"]["BLEU_4"]
        assert any("tokenizer" in note for note in theirs["notes"])
    with pytest.raises(ValueError, match="theirs.json and val: 8 studies"):
        run_main(monkeypatch, "--predictions", path, "--split", "val", "--name", "val")
    shutil.move(path, run.parent)
    with pytest.raises(FileNotFoundError, match="--config"):
        run_main(monkeypatch, "--predictions", run.parent / "theirs.json")


@pytest.mark.parametrize("name, text", [
    ("x.jsonl", ""), ("x.jsonl", "[1]"), ("x.jsonl", "{"), ("x.jsonl", '{"id": "a"}'),
    ("x.jsonl", '{"id": "a", "prediction": null}'),
    ("x.jsonl", '{"id": "a", "prediction": "b"}\n' * 2),
    ("x.json", '{"a": 1}'), ("x.json", '{"a": [1]}'), ("x.json", "[]"), ("x.json", "{")])
def test_other_files_of_predictions_are_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}.* expected"):
        evaluate.read_predictions(tmp_path / name)


def test_rows_are_lines_of_json_lines(tmp_path):
    """Unicode's own ends of a line are none, a mark of byte order and a blank line are nothing."""
    row = {"id": "a", "prediction": "one\u2028two\u0085three", "reference": "one"}
    text = "\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n\n"
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8", newline="")
    assert evaluate.read_predictions(tmp_path / "rows.jsonl") == [row]


def test_an_evaluation_replaces_no_other(run, monkeypatch):
    """Of other weights, decoding or data; --name and --out write beside it."""
    def files():
        return {path.name: path.read_bytes() for path in run.glob("*_*")}
    before = files()
    assert read_json(run / "test_metrics.json")["made_of"]["step"] == 3
    run_main(monkeypatch, "--checkpoint", run / "last.pt")
    after = files()
    assert before.items() <= after.items() and "last_test_metrics.json" in after
    for change in ("generate.num_beams=1", "data.limit=2", "train.precision=bf16"):
        with pytest.raises(ValueError, match="test_metrics.json is another result.*--name"):
            run_main(monkeypatch, "--checkpoint", run / "best.pt", "--set", change)
    (run / "test.json").write_text(json.dumps({f"study{i}": "clear ." for i in range(15, 20)}))
    with pytest.raises(ValueError, match="--name"):  # a peer's file, whose metrics have our name
        run_main(monkeypatch, "--predictions", run / "test.json")
    (run / "test.json").unlink()
    assert files() == after
    run_main(monkeypatch, "--checkpoint", run / "best.pt", "--set", "generate.num_beams=1",
             "--name", "greedy", "--out", run / "new/folder")
    made = read_json(run / "new/folder/greedy_metrics.json")["made_of"]
    assert made["generate"]["num_beams"] == 1
    assert files() == after


def test_what_cannot_be_written_is_said_before_generating(run, monkeypatch):
    """A folder in whose place a file stands: root may write into any other."""
    monkeypatch.setattr(evaluate, "write_reports", None)
    (run / "file").write_text("")
    for arguments in (["--checkpoint", run / "best.pt"],
                      ["--predictions", run / "test_predictions.jsonl"]):
        with pytest.raises(OSError, match="cannot write into .*file/x.*--out"):
            run_main(monkeypatch, *arguments, "--out", run / "file/x")


def test_an_annotation_without_train_is_enough(run, data_root, tmp_path, monkeypatch):
    """N1: the split that is scored; there is no constant report then, and a note says so."""
    tree = read_json(data_root / "annotation.json")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/annotation.json").write_text(json.dumps({"test": tree["test"]}))
    (tmp_path / "data/images").symlink_to(data_root / "images")
    root, before = f"data.root={tmp_path / 'data'}", read_json(run / "test_metrics.json")
    theirs = run / "theirs.json"
    theirs.write_text(json.dumps({study["id"]: study["report"] for study in tree["test"]}))
    run_main(monkeypatch, "--checkpoint", run / "best.pt", "--set", root)
    run_main(monkeypatch, "--predictions", theirs, "--set", root)
    for name in ("test", "theirs"):
        metrics = read_json(run / f"{name}_metrics.json")
        assert metrics["constant"] is None
        assert any(note.startswith("constant:") for note in metrics["notes"])
    assert read_json(run / "test_metrics.json")["BLEU_4"] == before["BLEU_4"]
    run_main(monkeypatch, "--predictions", theirs, "--against", theirs, "--set", root)
    assert read_json(run / "theirs_against.json")["n"] == 5
    with pytest.raises(ValueError, match="--split val"):
        run_main(monkeypatch, "--checkpoint", run / "best.pt", "--split", "val", "--set", root)


def test_predictions_that_nobody_cleaned_are_noted_and_cleaned(run, data_root, monkeypatch):
    """N2: each study's own raw report as its prediction."""
    test = read_json(data_root / "annotation.json")["test"]
    raw = {study["id"]: study["report"] for study in test}
    path = run / "raw.json"
    path.write_text(json.dumps(raw))
    run_main(monkeypatch, "--predictions", path)
    metrics = read_json(run / "raw_metrics.json")
    [note] = [note for note in metrics["notes"] if note.startswith("predictions:")]
    assert "5 hold capitals or punctuation" in note and "--clean" in note
    assert metrics["BLEU_1"] < 0.9
    run_main(monkeypatch, "--predictions", path, "--clean", "--name", "clean")
    metrics = read_json(run / "clean_metrics.json")
    assert metrics["BLEU_4"] == pytest.approx(1) and metrics["made_of"]["clean"]
    assert not any(note.startswith("predictions:") for note in metrics["notes"])


@pytest.mark.parametrize("text, uncleaned", [
    ("lungs clear .", 0), ("Lungs clear .", 1), ("lungs, clear .", 1), ("lungs 12 é 肺", 0)])
def test_capitals_and_punctuation_that_no_reference_has_are_noted(tmp_path, text, uncleaned):
    rows = rows_of({"a": text}, {"a": "heart normal . 3-4 X"})
    notes = measure(rows, config_for(tmp_path), "test", [])["notes"]
    assert sum(note.startswith("predictions: 1 hold") for note in notes) == uncleaned


def test_images_that_people_bring_give_a_report(run, tmp_path, monkeypatch, capsys):
    """One to seven views, of any usual mode, and names with blanks and letters of any alphabet."""
    rng, paths = np.random.default_rng(0), []
    for i, mode in enumerate(("L", "RGB", "CMYK", "P", "RGBA", "LA", "1")):
        image = Image.fromarray(rng.integers(0, 256, (50, 30 + i, 3), dtype=np.uint8))
        kind = "jpg" if mode in ("RGB", "CMYK") else "png"
        paths.append(tmp_path / f"vue {i} \u80ba\u00e9.{kind}")
        image.convert(mode).save(paths[-1])
    for views in (paths[:1], paths[2:4], paths):
        run_main(monkeypatch, "--checkpoint", run / "best.pt", "--images", *views)
        assert len(capsys.readouterr().out.splitlines()) == 1


def test_images_give_the_report_of_their_study(run, data_root, monkeypatch, capsys):
    row = read_rows(run / "test_predictions.jsonl")[1]
    views = [data_root / "images" / path for path in row["image_path"]]
    run_main(monkeypatch, "--checkpoint", run / "best.pt", "--images", *views)
    assert capsys.readouterr().out == row["prediction"] + "\n" and len(views) == 2


@pytest.mark.parametrize("make, words", [
    (lambda path: Image.new("RGB", (1, 1), "navy").save(path), "b.png: "),
    (lambda path: path.write_bytes(b""), "b.png: not a whole"),
    (lambda path: None, "b.png: no such file")], ids=["1 x 1", "empty", "missing"])
def test_images_that_are_none_are_refused(tmp_path, monkeypatch, make, words):
    """Before the checkpoint is read."""
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(paths[0])
    make(paths[1])
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        run_main(monkeypatch, "--checkpoint", tmp_path / "none.pt", "--images", *paths)


@pytest.mark.parametrize("arguments, unused", [
    ("--checkpoint x.pt --config c.yaml", "--config: of no use with --checkpoint"),
    ("--checkpoint x.pt --against b.jsonl", "--checkpoint: of no use with --against"),
    ("--checkpoint x.pt --clean", "--clean: of no use with --checkpoint"),
    ("--checkpoint x.pt --set train.lr=1", "--set train.lr=1: of no use with --checkpoint"),
    ("--checkpoint x.pt --images a.png --split val", "--split: of no use with --images"),
    ("--predictions x.jsonl --images a.png", "--images: of no use with --predictions"),
    ("--predictions x.jsonl --set generate.num_beams=5", "--set generate.num_beams=5: of no use"),
    ("--predictions x.jsonl y.jsonl", "several files only with --against")])
def test_a_mode_refuses_what_it_does_not_use(monkeypatch, arguments, unused):
    with pytest.raises(ValueError, match=unused):
        run_main(monkeypatch, *arguments.split())


@pytest.mark.parametrize("arguments", [
    "--checkpoint x.pt --split val --name a --out b --set data.limit=2 train.eval_batch_size=64",
    "--checkpoint x.pt --images {image} --set generate.num_beams=2",
    "--checkpoint x.pt --chexbert c.pth",
    "--predictions x.json --config c.yaml --split val --clean --name a --out b --set data.limit=2",
    "--predictions x.jsonl --against b.json",
    "--predictions x.json --against b.json --config c.yaml --split val --clean --set data.root=a"])
def test_a_mode_takes_what_it_uses(run, data_root, monkeypatch, arguments):
    image = next((data_root / "images").rglob("*.png"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        run_main(monkeypatch, *arguments.format(image=image).split())


# The page -----------------------------------------------------------------------------------------

def page_data(path):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>',
                      path.read_text(), re.S)
    return json.loads(found.group(1))


def draw(tmp_path, rows, **judges):
    """The data of the page of made rows."""
    scored = [{"cider": float(i), "rouge_l": 0.5} | row for i, row in enumerate(rows)]
    shown = {"split": "test", "names": [], "config": {}, "metrics": {}}
    report.draw_page(tmp_path / "test_report.html", scored, tmp_path / "images", shown, **judges)
    return page_data(tmp_path / "test_report.html")


def test_page_is_self_contained_and_holds_the_cases(run):
    path, rows = run / "test_report.html", read_rows(run / "test_predictions.jsonl")
    text, data = path.read_text(), page_data(path)
    elsewhere = r"(?:src|href|url|import|fetch)\s*[=(]?\s*[\"']?(?:https?:|//|file:)"
    assert not re.search(elsewhere, text) and "default-src 'none'" in text
    assert data["metrics"] == read_json(run / "test_metrics.json") and data["split"] == "test"
    rows = {row["id"]: row for row in rows}
    assert sorted(case["id"] for case in data["cases"]) == sorted(rows)
    assert {case["group"] for case in data["cases"]} == {"best", "worst", "random"}
    for case in data["cases"]:
        row = rows[case["id"]]
        assert (case["reference"], case["prediction"]) == (row["reference"], row["prediction"])
        assert case["rouge_l"] == rouge_l(row["prediction"], row["reference"])
        assert len(case["views"]) == len(row["image_path"])
        for view in case["views"]:
            assert Image.open(io.BytesIO(base64.b64decode(view))).size == (36, 40)
    assert data["cases"][0]["cider"] == max(case["cider"] for case in data["cases"])
    steps = read_rows(run / "log.jsonl")[1:]
    assert data["curves"]["did"] == [[line["step"], line["did"]] for line in steps if "did" in line]
    assert data["curves"]["BLEU_4"] == [[3, steps[-1]["val"]["BLEU_4"]]]
    points = {point["id"]: point["at"] for point in data["points"]}
    assert points == {name: row["visual_pca"] for name, row in rows.items()}
    assert {len(point) for point in points.values()} == {3}


def test_page_escapes_hostile_text_and_survives_missing_images(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \u2028 ]]> <!--"
    rows = [{"id": f"{i}{evil}", "prediction": evil, "reference": evil,
             "image_path": ["../../none.png", f"{i}.png"]} for i in range(70)]
    cases = draw(tmp_path, rows)["cases"]
    text = (tmp_path / "test_report.html").read_text()
    assert "<script>alert" not in text and text.count("<script") == 2 and "<img src=x" not in text
    assert cases[0]["prediction"] == evil and cases[0]["views"] == [None, None]
    assert Counter(case["group"] for case in cases) == {"best": 20, "worst": 20, "random": 20}
    assert len({case["id"] for case in cases}) == 60


def test_page_stays_under_3_mb_with_noisy_films_of_many_views(tmp_path):
    """60 cases of two views at full size; more views share the same room."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    noise = Image.fromarray(rng.integers(60, 200, (32, 32), dtype=np.uint8))
    # near 0.8 bit a pixel as JPEG, as films have
    noise.resize((360, 360), Image.Resampling.BICUBIC).save(tmp_path / "images/a.png")
    row = {"prediction": "no . " * 12, "reference": "clear . " * 20}
    for views, pixels in ((2, report.PIXELS), (5, None)):
        rows = [row | {"id": str(i), "image_path": ["a.png"] * views} for i in range(60)]
        view = draw(tmp_path, rows)["cases"][0]["views"][0]
        assert (tmp_path / "test_report.html").stat().st_size < 3e6
        assert pixels in (None, max(Image.open(io.BytesIO(base64.b64decode(view))).size))


def test_curves_are_means_of_equal_pieces(tmp_path):
    lines = [{"versions": {}}]
    lines += [{"step": i, "report": float(i), "vse": 0.0, "pull_vse": 1.0} for i in range(1, 601)]
    val = {"BLEU_4": 0.1, "ROUGE_L": 0.2, "CIDEr": 0.3, "distinct": 4}
    lines.insert(300, {"step": 299, "val": val})
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 601, "rep')
    header, found = report.curves(log)
    assert header == {"versions": {}} and len(found["report"]) == 300
    assert found["report"][:2] == [[2, 1.5], [4, 3.5]] and found["vse"][0] == [2, 0.0]
    assert found["CIDEr"] == [[299, 0.3]] and not {"did", "pull_vse"} & found.keys()
    assert report.curves(tmp_path / "none.jsonl") == (None, {})
    log.write_text('{"val": {"CIDEr": 1}\n5\n')  # of a run without its log
    assert report.curves(log) == (None, {})


def test_the_page_shows_no_picture_from_elsewhere(tmp_path):
    """Another person's rows may name any path of this machine."""
    (tmp_path / "images").mkdir()
    for path in ("secret.png", "images/own.png"):
        Image.new("L", (8, 8), 3).save(tmp_path / path)
    views = [str(tmp_path / "secret.png"), "../secret.png", "own.png"]
    row = {"id": "a", "prediction": "x", "reference": "x", "image_path": views}
    films = draw(tmp_path, [row])["cases"][0]["views"]
    assert films[:2] == [None, None] and films[2]


def test_page_tags_findings(tmp_path):
    texts = {"a": "left pleural effusion .", "b": "a nodule .", "c": "clear ."}
    data = draw(tmp_path, rows_of(texts, texts), spec=SPEC)
    tags = {case["id"]: case["tags"] for case in data["cases"]}
    assert tags["a"] == {"reference": [["effusion", "left small"]],
                         "prediction": [["effusion", "left"]]}
    assert tags["c"] == {"reference": [], "prediction": []} and data["tagger"] == "findings.json"
    of_text = dict.fromkeys(CONDITIONS, 2) | {"Edema": 3, "Fracture": 1}
    data = draw(tmp_path, rows_of(texts, texts), classes=lambda text: of_text)
    assert data["cases"][0]["tags"]["reference"] == [["Edema", "uncertain"], ["Fracture", ""]]
    assert draw(tmp_path, rows_of(texts, texts))["cases"][0]["tags"] is None


def test_no_file_holds_a_number_that_json_has_not(tmp_path, monkeypatch):
    rows = rows_of({"a": "clear ."}, {"a": "clear ."})
    with pytest.raises(ValueError, match="JSON"):
        draw(tmp_path, [rows[0] | {"visual_pca": [math.nan, 0, 0]}])
    monkeypatch.setattr(evaluate, "measure", lambda *_: {"BLEU_4": math.inf, "notes": []})
    splits = {"train": [], "val": [], "test": []}
    with pytest.raises(ValueError, match="JSON"):
        evaluate.write_results(tmp_path, "test", rows, config_for(tmp_path), splits,
                               {"split": "test"}, None)
    assert os.listdir(tmp_path) == []


def test_principal_plane_is_that_of_the_unit_vectors():
    """Against the eigenvectors of the covariance; the three numbers hold the whole variance."""
    embeds = np.random.default_rng(0).normal(size=(40, 6)) * [5, 3, 1, 1, 1, 1] + 2
    points = report.principal_plane(embeds)
    unit = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(np.cov(unit.T, bias=True))
    for axis in (0, 1):
        expected = (unit - unit.mean(axis=0)) @ vectors[:, -1 - axis]
        assert np.allclose(np.abs(points[:, axis]), np.abs(expected))
        assert (points[:, axis]**2).mean() == pytest.approx(values[-1 - axis])
    assert np.allclose(points, report.principal_plane(7 * embeds))
    variance = (points[:, 0]**2 + points[:, 1]**2 + points[:, 2]).mean()
    assert variance == pytest.approx(1 - (unit @ unit.T).mean())
    assert report.principal_plane(embeds[:1]).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("text, abnormal", [
    ("the lungs are clear . no pleural effusion . heart size is normal .", False),
    ("there is a small left effusion . lungs are clear .", True),
    ("Lungs are clear. 1. 2.", False), ("", False), ("cardiomegaly", True)])
def test_a_report_without_words_of_denial_names_an_abnormality(text, abnormal):
    assert report.names_abnormality(text) == abnormal
