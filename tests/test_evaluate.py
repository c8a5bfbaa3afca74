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
from configs import InputError, parse_config, report
from configs.chexbert import CONDITIONS, FIVE
from configs.files import read_predictions
from configs.findings import named_findings, read_findings
from evaluate import (BLEUS, PRF, best_constant, each_label, label_scores, label_statistics,
                      measure, meteor_program, rouge_l, score, score_names)
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
    values = dict(zip(BLEUS, Bleu(4).compute_score(gold, ours, verbose=0)[0]))
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
def test_meteor_has_its_value_and_an_end(monkeypatch):
    """The value is that of pycocoevalcap 1.2 and OpenJDK 17; the program is ended at the limit."""
    if shutil.which("java") is None:
        pytest.skip("no Java here")
    pytest.importorskip("pycocoevalcap")
    value = {"METEOR": pytest.approx(0.12010681869118432, abs=1e-9)}
    with meteor_program() as meteor:
        assert meteor(*CASES["odd"]) == value
        assert meteor(*CASES["equal"]) == {"METEOR": pytest.approx(1)}
        assert meteor(*CASES["odd"]) == value
        monkeypatch.setattr(evaluate, "METEOR_SECONDS", 0)
        assert meteor(*CASES["random"]) == {}
        monkeypatch.setattr(evaluate, "METEOR_SECONDS", 600)
        assert meteor(*CASES["odd"]) == {}  # it has ended, and is not waited for


@pytest.mark.java
def test_an_evaluation_starts_meteor_once(tmp_path, monkeypatch):
    if shutil.which("java") is None:
        pytest.skip("no Java here")
    module = pytest.importorskip("pycocoevalcap.meteor.meteor")
    programs, program = [], module.Meteor
    monkeypatch.setattr(module, "Meteor", lambda: programs.append(1) or program())
    predictions, references = CASES["odd"]
    rows = rows_of(predictions, references)
    found = measure(rows, config_for(tmp_path), "test", ["lungs are clear ."] * 3)
    assert len(programs) == 1
    cut = {row["id"]: row["reference_cut"] for row in rows}
    constant = dict.fromkeys(cut, found["constant"]["text"])
    with meteor_program() as meteor:
        assert meteor(predictions, references)["METEOR"] == found["METEOR"]
        assert meteor(predictions, cut)["METEOR"] == found["cut_references"]["METEOR"]
        assert meteor(constant, references)["METEOR"] == found["constant"]["METEOR"]


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
    text = "nodules , fractures and a notable cardiac nodule ."
    assert named_findings(text, SPEC) == {"nodule": (None, None)}


IU_XRAY = json.loads((REPOSITORY / "configs/iu_xray_findings.json").read_text("utf-8"))
CLAUSES = {  # of the forms that IU-Xray's reports have, and what they name
    "no pneumothorax or effusion . heart size is enlarged": "cardiomegaly",
    "there is no focal consolidation but there is a small left effusion": "effusion",
    "no infiltrate however cardiomegaly": "cardiomegaly",
    "no effusion except on the left , a small effusion": "effusion",
    "no consolidation aside from atelectasis": "atelectasis",
    "no consolidation though a hernia": "hernia",
    "no consolidation although a hernia": "hernia",
    "not clear there is scoliosis": "scoliosis or kyphosis",
    "clear of infiltrates besides granulomas": "granuloma or nodule",
    "no acute abnormality with degenerative changes": "degenerative change",
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
compatible with pneumonia / lungs are free of infiltrates / negative for pneumothorax / the heart is
not significantly enlarged / the left apical pneumothorax has resolved / infiltrates have cleared /
no interval change and no effusion / effusion is not identified / pneumothorax is no longer seen /
neither effusion nor pneumothorax / absence of effusion / pneumothorax is absent / fracture was
ruled out / no change to suggest pneumonia / the catheter has been removed / interval removal of
left picc line / interval resolution of effusion / cannot exclude early edema / a fracture cannot be
excluded / limited for evaluation of fractures / overlap could obscure a small nodule / there is
subcutaneous emphysema / the lung volumes are low normal"""  # parted by a slash


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
    (tmp_path / "findings.json").write_text(json.dumps(SPEC), encoding="utf-8-sig")
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
    assert set(nobody.values()) == {0} and nobody.keys() == found.keys()


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
    found = metrics["findings"]
    assert found["each"]["effusion"] == {"precision": 1, "recall": 0.5, "f1": pytest.approx(2 / 3),
                                         "studies": 2}
    assert found["macro_f1_frequent"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["macro_f1_rare"] == 0
    # of two named rightly, one side; of one with an extent
    assert found["side"] == 0.5 and found["extent"] == 1.0
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
    # a study without a positive label counts 0
    assert negative["13"]["example_f1"] == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert set(positive["5"]["each"]) == set(FIVE)
    assert list(positive["13"]["each"]) == list(CONDITIONS[:-1])


def test_clinical_of_model_constant_and_paper_are_printed(tmp_path, capsys):
    def label(texts):
        return [classes(Edema=1) if "edema" in text else classes(No_Finding=1) for text in texts]
    references = {"a": "edema .", "b": "clear .", "c": "edema ."}
    rows = rows_of({"a": "edema .", "b": "edema .", "c": "clear ."}, references)
    metrics = measure(rows, config_for(tmp_path, "mimic_cxr"), "test", ["clear ."] * 3, label=label)
    evaluate.print_metrics(metrics, "test")
    printed = capsys.readouterr().out
    for title, row in (("model", metrics), ("best constant report", metrics["constant"])):
        for mean in ("micro", "macro", "weighted", "example"):
            f1 = row["clinical"]["uncertain_negative"]["14"][f"{mean}_f1"]
            assert re.search(rf"{mean}, {title} .* {f1:.3f} ", printed)
    assert re.search("paper, VDGen .* 0.426 +0.397 +0.402", printed)


# An evaluation ------------------------------------------------------------------------------------

def test_measure_layout(tmp_path, capsys):
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
    assert metrics["paper"]["BLEU_4"] == 0.169 and metrics["paper"].keys() == set(score_names())
    assert [note.split(":")[0] for note in metrics["notes"]] == ["METEOR", "paper"]
    bare = [{**row, "reference_cut": None} for row in rows]
    metrics = measure(bare, config_for(tmp_path, "own"), "test", [])
    assert metrics["constant"] is metrics["paper"] is None and "cut_references" not in metrics
    missing = [note.split(":")[0] for note in metrics["notes"]]
    assert missing == ["METEOR", "constant", "cut_references"]
    evaluate.print_metrics(metrics, "test")
    assert "paper, VDGen" not in capsys.readouterr().out


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


@pytest.mark.parametrize("name, text, words", [
    ("x.jsonl", "", "0 predictions"), ("x.jsonl", "{", "JSON"),
    ("x.jsonl", '{"id": "a"}', "prediction"),
    ("x.jsonl", '{"id": "a", "prediction": null}', "number 1"),
    ("x.jsonl", '{"id": "a", "prediction": "b"}\n' * 2, "2 predictions of 1 studies"),
    ("x.jsonl", '{"id": 7, "prediction": "b"}\n{"id": "7", "prediction": "b"}', "of 1 studies"),
    ("x.json", '{"a": 1}', "'a': 1"), ("x.json", '{"a": [1]}', "'a': 1"), ("x.json", "[]", "got"),
    ("x.json", '{"a": ["b", "c"]}', r"'a': \['b', 'c'\]"),
    ("x.json", '{"a": []}', "'a'"), ("x.json", '{"a": "b", "c": "", "a": "d"}', "'a' stands twice"),
    ("x.jsonl", '{"id": "a", "prediction": "b", "reference": null}', "the reference of number 1"),
    ("x.jsonl", '{"id": "a", "prediction": "b", "image_path": [1]}', "the image_path of number 1"),
    ("x.jsonl", '{"id": "a", "prediction": "b", "reference": "c"}\n{"id": "d", "prediction": "b"}',
     "all or none")])
def test_other_files_of_predictions_are_refused(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"{name}.* expected.*{words}|{name}.*{words}.* expected"):
        read_predictions(tmp_path / name)


ROW = {"id": "17", "prediction": "one\u2028two\u0085three"}  # Unicode's own ends of a line


@pytest.mark.parametrize("name, tree, more", [
    ("x.jsonl", ROW | {"id": 17}, ""), ("x.jsonl", ROW, "\r\n\n"),
    ("x.JSON", {"17": ROW["prediction"]}, ""), ("x.json", {"17": [ROW["prediction"]]}, "")])
def test_files_of_predictions_are_read(tmp_path, name, tree, more):
    """Ids that are numbers, lists of one text, a mark of byte order, an empty line."""
    text = "\ufeff" + json.dumps(tree, ensure_ascii=False) + more
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_predictions(tmp_path / name) == [ROW]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*_*")}


def test_an_evaluation_never_replaces_predictions(run, monkeypatch):
    """It looks before it generates; --name and --out write beside them."""
    before = files_of(run)
    run_main(monkeypatch, "--checkpoint", run / "last.pt")
    after = files_of(run)
    assert before.items() <= after.items() and "last_test_metrics.json" in after
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "write_reports", None)
        with pytest.raises(InputError, match="test_predictions.jsonl is there.*--name.*--out"):
            run_main(patch, "--checkpoint", run / "best.pt")
    assert files_of(run) == after
    run_main(monkeypatch, "--checkpoint", run / "best.pt", "--set", "generate.num_beams=1",
             "--name", "greedy", "--out", run / "new/folder")
    made = read_json(run / "new/folder/greedy_metrics.json")["made_of"]
    assert made["generate"]["num_beams"] == 1 and made["step"] == 3
    assert files_of(run) == after


def test_of_two_evaluations_at_once_one_is_refused(run, monkeypatch):
    """The other one has written while this one generated."""
    (run / "test_predictions.jsonl").unlink()
    write = evaluate.write_reports

    def while_another_writes(*arguments):
        written = write(*arguments)
        (run / "test_predictions.jsonl").write_text("of the other one")
        return written
    monkeypatch.setattr(evaluate, "write_reports", while_another_writes)
    with pytest.raises(InputError, match="is there already.*--name"):
        run_main(monkeypatch, "--checkpoint", run / "best.pt")
    assert (run / "test_predictions.jsonl").read_text() == "of the other one"


def test_scoring_again_writes_the_same_and_keeps_what_is_known_of_the_generation(run, monkeypatch):
    """`made_of` is a record: nothing in it stops a re-score."""
    path, page, before = run / "test_metrics.json", run / "test_report.html", files_of(run)
    metrics = read_json(path)
    path.write_text(json.dumps(metrics | {"BLEU_4": 5, "notes": None}))
    page.unlink()
    run_main(monkeypatch, "--predictions", run / "test_predictions.jsonl")
    assert files_of(run) == before
    path.unlink()
    run_main(monkeypatch, "--predictions", run / "test_predictions.jsonl")
    assert read_json(path)["made_of"]["file"] == "test_predictions.jsonl"
    assert read_json(path)["BLEU_4"] == metrics["BLEU_4"]


def test_what_cannot_be_written_is_said_before_anything_is_computed(run, monkeypatch):
    """A folder in whose place a file stands: root may write into any other."""
    for name in ("write_reports", "measure", "compare"):
        monkeypatch.setattr(evaluate, name, None)
    (run / "file").write_text("")
    path = run / "test_predictions.jsonl"
    for arguments in (["--checkpoint", run / "best.pt"], ["--predictions", path],
                      ["--predictions", path, "--against", path]):
        with pytest.raises(OSError, match="cannot write into .*file/x.*--out"):
            run_main(monkeypatch, *arguments, "--out", run / "file/x")


def test_a_checkpoint_takes_data_and_decoding_from_another_config(run, data_root, monkeypatch):
    """A model of MIMIC-CXR on IU-Xray; --set wins over both configs."""
    other = run / "other.yaml"
    other.write_text(f"""
        model: {{vision: nothing, llm: nowhere}}
        data: {{root: {data_root}, dataset: mimic_cxr, num_workers: 0, limit: 3}}
        generate: {{num_beams: 1, min_new_tokens: 1, max_new_tokens: 5}}""")
    arguments = ["--checkpoint", run / "best.pt", "--config", other, "--name", "there"]
    run_main(monkeypatch, *arguments, "--set", "data.limit=4", "generate.max_new_tokens=6")
    metrics = read_json(run / "there_metrics.json")
    assert metrics["n"] == 4 and metrics["paper"] == evaluate.PAPER["mimic_cxr"]
    made = metrics["made_of"]
    assert made["generate"]["num_beams"] == 1 and made["generate"]["max_new_tokens"] == 6
    assert page_data(run / "there_report.html")["config"]["data"]["limit"] == 4
    other.write_text(other.read_text().replace("max_new_tokens: 5}", "max_new_tokens: 5000}"))
    with pytest.raises(InputError, match="generate.max_new_tokens: a prompt of .* do not fit"):
        run_main(monkeypatch, *arguments[:4], "--name", "long")


def test_an_annotation_without_train_is_enough(run, data_root, tmp_path, monkeypatch):
    """N1: the split that is scored; there is no constant report then, and a note says so."""
    tree = read_json(data_root / "annotation.json")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/annotation.json").write_text(json.dumps({"test": tree["test"]}))
    (tmp_path / "data/images").symlink_to(data_root / "images")
    root, before = f"data.root={tmp_path / 'data'}", read_json(run / "test_metrics.json")
    theirs = run / "theirs.json"
    theirs.write_text(json.dumps({study["id"]: study["report"] for study in tree["test"]}))
    (run / "test_predictions.jsonl").unlink()
    run_main(monkeypatch, "--checkpoint", run / "best.pt", "--set", root)
    run_main(monkeypatch, "--predictions", theirs, "--set", root)
    for name in ("test", "theirs"):
        metrics = read_json(run / f"{name}_metrics.json")
        assert metrics["constant"] is None
        assert any(note.startswith("constant:") for note in metrics["notes"])
    assert read_json(run / "test_metrics.json")["BLEU_4"] == before["BLEU_4"]
    with pytest.raises(ValueError, match="--split val"):
        run_main(monkeypatch, "--checkpoint", run / "best.pt", "--split", "val", "--set", root)


def test_predictions_that_nobody_cleaned_are_noted_and_cleaned(run, data_root, monkeypatch):
    """N2: each study's own raw report as its prediction."""
    test = read_json(data_root / "annotation.json")["test"]
    (run / "raw.json").write_text(json.dumps({study["id"]: study["report"] for study in test}))
    for more, noted in (([], True), (["--clean"], False)):
        run_main(monkeypatch, "--predictions", run / "raw.json", *more)
        metrics = read_json(run / "raw_metrics.json")
        assert any("5 hold capitals or punc" in note for note in metrics["notes"]) == noted
        assert (metrics["BLEU_4"] < 0.9) == noted and metrics["made_of"]["clean"] != noted


def test_only_files_of_others_are_cleaned(run, monkeypatch):
    """Cleaning twice changes a text, and what our model wrote is scored as decoded."""
    ours, theirs = run / "test_predictions.jsonl", run / "raw.json"
    rows = read_rows(ours)
    for row in rows:
        row["prediction"] = "a . b ."  # cleaned again it would have one more blank
    ours.write_text("".join(json.dumps(row) + "\n" for row in rows))
    theirs.write_text(json.dumps({row["id"]: "A. B." for row in rows}))
    for more in ([], ["--against", ours]):
        with pytest.raises(InputError, match="--clean: .*test_predictions.jsonl holds references"):
            run_main(monkeypatch, "--predictions", ours, *more, "--clean")
    run_main(monkeypatch, "--predictions", ours, "--against", theirs, "--clean")
    scores = read_json(run / "test_against.json")["scores"]
    assert all(row["difference"] == 0 for row in scores.values())


@pytest.mark.parametrize("predictions, references, words", [
    ({"a": "clear\nheart .", "b": "x"}, {"a": "clear .", "b": "x ."}, "predictions: 1 hold line b"),
    ({"a": "clear .", "b": "心脏 大小 正常 ."}, {"a": "clear .", "b": "心脏大小正常 ."},
     "references: 1 hold words that no blanks"),
    ({"a": "clear ."}, {"a": "clear ."}, "CIDEr: 0 for a single study"),
    ({"a": "Clear .", "b": "x"}, {"a": "clear .", "b": "x ."}, "predictions: 1 hold capitals"),
    ({"a": "clear,", "b": "12 é 肺"}, {"a": "a .", "b": "b ."}, "predictions: 1 hold capitals")])
def test_notes_say_what_scores_do_not_see(tmp_path, predictions, references, words):
    def noted(predictions, references):
        rows = [{"id": name, "prediction": text, "reference": references[name]}
                for name, text in predictions.items()]
        notes = measure(rows, config_for(tmp_path), "test", [])["notes"]
        return sum(note.startswith(words) for note in notes)
    plain = {"a": "heart is normal .", "b": "心脏 大小 正常 ."}
    assert noted(predictions, references) == 1 and noted(plain, plain) == 0


def test_what_our_model_wrote_needs_no_cleaning(tmp_path):
    """The note is meant for files that nobody cleaned; those of others hold no cut references."""
    rows = [row | {"reference_cut": "clear ."}
            for row in rows_of({"a": "Clear!", "b": "x"}, {"a": "clear .", "b": "x ."})]
    notes = measure(rows, config_for(tmp_path), "test", [])["notes"]
    assert not [note for note in notes if "capitals" in note]


def test_a_new_score_of_each_study_is_one_line(run, monkeypatch, capsys):
    """It is in metrics, intervals, comparison, printed tables and page; the others stay."""
    def shared_words(predictions, references):
        pairs = zip(predictions, references)
        return [len(set(a.split()) & set(b.split())) / 100 for a, b in pairs]
    path = run / "test_predictions.jsonl"
    before, rows = read_json(run / "test_metrics.json"), read_rows(path)
    monkeypatch.setitem(evaluate.EACH, "shared", shared_words)
    run_main(monkeypatch, "--predictions", path)
    metrics, page = read_json(run / "test_metrics.json"), page_data(run / "test_report.html")
    values = shared_words(*([row[key] for row in rows] for key in ("prediction", "reference")))
    assert metrics["shared"] == pytest.approx(np.mean(values))
    for part in (metrics, metrics["constant"]):
        low, high = part["intervals"]["shared"]
        assert low <= part["shared"] <= high and "shared" in part["cut_references"]
    for part in (metrics, metrics["constant"]):
        for tree in (part, part["intervals"], part["cut_references"]):
            del tree["shared"]
    assert metrics == before and page["names"] == list(score_names())
    of_study = dict(zip((row["id"] for row in rows), values))
    assert {case["id"]: case["scores"]["shared"] for case in page["cases"]} == of_study
    assert "shared" in capsys.readouterr().out
    run_main(monkeypatch, "--predictions", path, "--against", path)
    row = read_json(run / "test_against.json")["scores"]["shared"]
    assert row["a"] == pytest.approx(np.mean(values)) and row["interval"] == [0, 0]


def test_images_give_the_report_of_their_study(run, data_root, monkeypatch, capsys):
    row = read_rows(run / "test_predictions.jsonl")[1]
    views = [data_root / "images" / path for path in row["image_path"]]
    run_main(monkeypatch, "--checkpoint", run / "best.pt", "--images", *views)
    assert capsys.readouterr().out == row["prediction"] + "\n" and len(views) == 2


@pytest.mark.parametrize("make, words", [
    (lambda path: Image.new("RGB", (1, 1), "navy").save(path), "b.png: "),
    (lambda path: path.write_bytes(b""), "b.png: not a whole")], ids=["1 x 1", "empty"])
def test_images_that_are_none_are_refused(tmp_path, monkeypatch, make, words):
    """Before the checkpoint is read."""
    make(tmp_path / "b.png")
    with pytest.raises(InputError, match=words):
        run_main(monkeypatch, "--checkpoint", tmp_path / "none.pt", "--images", tmp_path / "b.png")


@pytest.mark.parametrize("arguments, unused", [
    ("--checkpoint x.pt --images a.png --config c.yaml", "--config: of no use with --images"),
    ("--checkpoint x.pt --against b.jsonl", "--checkpoint: of no use with --against"),
    ("--checkpoint x.pt --clean", "--clean: of no use with --checkpoint"),
    ("--checkpoint x.pt --set train.lr=1", "--set train.lr=1: of no use with --checkpoint"),
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
    scored = [row | {"scores": {"ROUGE_L": 0.5, "CIDEr": float(i)}} for i, row in enumerate(rows)]
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
        assert case["scores"]["ROUGE_L"] == rouge_l(row["prediction"], row["reference"])
        assert len(case["views"]) == len(row["image_path"])
        for view in case["views"]:
            assert Image.open(io.BytesIO(base64.b64decode(view))).size == (36, 40)
    assert data["cases"][0]["scores"]["CIDEr"] == max(
        case["scores"]["CIDEr"] for case in data["cases"])
    steps = read_rows(run / "log.jsonl")[1:]
    assert data["curves"]["did"] == [[line["step"], line["did"]] for line in steps if "did" in line]
    assert data["curves"]["val: BLEU_4"] == [[3, steps[-1]["val"]["BLEU_4"]]]
    points = {point["id"]: point["at"] for point in data["points"]}
    assert points == {name: row["visual_pca"] for name, row in rows.items()}


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
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    noise = Image.fromarray(rng.integers(60, 200, (32, 32), dtype=np.uint8))
    # near 0.8 bit a pixel as JPEG, as films have
    noise.resize((360, 360), Image.Resampling.BICUBIC).save(tmp_path / "images/a.png")
    row = {"prediction": "no . " * 12, "reference": "clear . " * 20}
    for views in (2, 5):
        draw(tmp_path, [row | {"id": str(i), "image_path": ["a.png"] * views} for i in range(60)])
        assert (tmp_path / "test_report.html").stat().st_size < 3e6


def test_curves_are_means_of_equal_pieces(tmp_path):
    """Of every number that the log holds a step; what was measured on val says so."""
    lines = [{"versions": {}}]
    lines += [{"step": i, "epoch": 1, "report": float(i), "variance": 0.0, "lr": 1e-4,
               "seconds": 1.0} for i in range(1, 601)]
    val = {"BLEU_4": 0.1, "F1": 0.2, "variance": 0.3, "distinct": 4}
    lines.insert(300, {"step": 299, "val": val, "seconds": 9.0})
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 601, "rep')
    header, found = report.curves(log)
    assert header == {"versions": {}} and len(found["report"]) == report.CURVE_POINTS
    assert found["report"][:2] == [[2, 1.5], [4, 3.5]] and found["variance"][0] == [2, 0.0]
    assert found["val: F1"] == [[299, 0.2]] and found["val: variance"] == [[299, 0.3]]
    assert found.keys() == {"report", "variance", *(f"val: {key}" for key in val)}
    assert report.curves(tmp_path / "none.jsonl") == (None, {})


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
    [row] = rows_of({"a": "clear ."}, {"a": "clear ."})
    with pytest.raises(ValueError, match="JSON"):
        draw(tmp_path, [row | {"visual_pca": [math.nan, 0, 0]}])
    monkeypatch.setattr(evaluate, "measure", lambda *_: {"BLEU_4": math.inf, "notes": []})
    with pytest.raises(ValueError, match="JSON"):
        evaluate.write_results(tmp_path, "test", [row], config_for(tmp_path),
                               {"train": [], "test": []}, {"split": "test"}, None)
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
