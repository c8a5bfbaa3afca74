"""The scores are pycocoevalcap's; the tables hold what they say."""
import base64
import io
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from configs import report
from configs.report import names_abnormality
from configs import parse_config
from data import IU_XRAY_FINDINGS, clean_iu_xray
from evaluate import (
    FIVE,
    METRICS,
    best_constant,
    bleu,
    measure,
    meteor_1_5,
    named_findings,
    precision_recall_f1,
    principal_plane,
    rouge_l,
    score,
    score_clinical,
    score_findings,
)
from model import CONDITIONS

SENTENCES = [
    "the heart is normal .",
    "lungs are clear .",
    "no pleural effusion or pneumothorax .",
    "xxxx are intact .",
    "a 12 mm nodule in the left upper lobe .",
    "degenerative changes of the spine .",
    "stable cardiomegaly .",
]


def reports(studies, seed):
    rng = random.Random(seed)
    return {
        str(i): " ".join(rng.choices(SENTENCES, weights=range(7, 0, -1), k=rng.randint(2, 7)))
        for i in range(studies)
    }


def odd_cases():
    references = reports(12, 1)
    odd = [
        "",
        "the",
        "the " * 40 + ".",
        "a ||| b  c , ; ! ? ( ) \" '",
        "12 mm xxxx 3.5 cm",
        " lungs are clear . ",
        "\tlungs\nclear",
        "lungs are clear .",
        references["8"],
        references["9"][:-2],
        "unseen words only",
        "é ü 肺",
    ]
    return dict(zip(references, odd)), references


CASES = {
    "random": (reports(60, 2), reports(60, 3)),
    "constant": (dict.fromkeys(reports(60, 2), SENTENCES[0] + " " + SENTENCES[1]), reports(60, 3)),
    "odd": odd_cases(),
    "empty": (dict.fromkeys(reports(5, 2), ""), reports(5, 3)),
    "equal": (reports(9, 4), reports(9, 4)),
    "single study": ({"a": "lungs are clear ."}, {"a": "the lungs are clear ."}),
    "longer than the reference": (
        {"a": "the lungs are clear . no effusion ."},
        {"a": "the lungs are clear ."},
    ),
    "one word": ({"a": "clear", "b": "heart"}, {"a": "clear", "b": "clear"}),
}


def theirs(predictions, references):
    """pycocoevalcap, called as every repository of this family calls it: no tokenizer, corpus
    scores."""
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    ours, gold = (
        {name: [text] for name, text in texts.items()} for texts in (predictions, references)
    )
    values = dict(zip(METRICS, Bleu(4).compute_score(gold, ours, verbose=0)[0]))
    return values | {
        "ROUGE_L": Rouge().compute_score(gold, ours)[0],
        "CIDEr": Cider().compute_score(gold, ours)[0],
    }


@pytest.mark.parametrize("case", CASES)
def test_score_equals_pycocoevalcap(case):
    predictions, references = CASES[case]
    ours = score(predictions, references)
    for name, value in theirs(predictions, references).items():
        assert ours[name] == pytest.approx(value, abs=1e-9), name
    assert "METEOR" not in ours  # no Java in this test


@pytest.mark.java
def test_meteor_equals_pycocoevalcap():
    """One process for several corpora, the same numbers as one wrapper for each."""
    pytest.importorskip("pycocoevalcap")
    if evaluate.shutil.which("java") is None:
        pytest.skip("no Java here")
    from pycocoevalcap.meteor.meteor import Meteor
    corpora = [CASES[name] for name in ("random", "odd", "empty")]
    ours = meteor_1_5([[(p[name], r[name]) for name in r] for p, r in corpora])
    for value, (predictions, references) in zip(ours, corpora):
        # a tab or line break ends its line
        flat = {name: [" ".join(text.split())] for name, text in predictions.items()}
        reference, _ = Meteor().compute_score(
            {name: [text] for name, text in references.items()}, flat
        )
        assert value == pytest.approx(reference, abs=1e-9)
    assert score(*corpora[0])["METEOR"] == ours[0] > 0.1


@pytest.mark.java
def test_meteor_is_ended_when_it_takes_too_long(monkeypatch):
    if evaluate.shutil.which("java") is None or evaluate.find_spec("pycocoevalcap") is None:
        pytest.skip("no Java or no pycocoevalcap here")
    monkeypatch.setattr(evaluate, "METEOR_SECONDS", 0.2)
    with pytest.raises(RuntimeError, match="the limit of 0.2 seconds"):
        meteor_1_5([[("a b", "a b")] * 10])


def test_meteor_says_what_is_missing():
    with pytest.raises(RuntimeError, match="needs Java and"):
        meteor_1_5([[("a", "a")]])


def test_score_refuses_other_ids():
    with pytest.raises(ValueError, match="same ids"):
        score({"a": "x"}, {"b": "x"})
    with pytest.raises(ValueError, match="same ids"):
        score({}, {})


def test_rouge_equals_a_plain_table():
    """The bit-parallel subsequence against the textbook table, on words of a small alphabet."""
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.choice("abcd") for _ in range(rng.randint(1, 90))] for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = (
                    table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
                )
        common = table[-1][-1]
        p, r = common / len(a), common / len(b)
        expected = (1 + 1.44) * p * r / (r + 1.44 * p) if common else 0
        assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected, abs=1e-12)


def test_bleu_by_hand():
    """Clipping and brevity: "a a b" for "a b c d" has clipped unigrams 2/3, bigrams 1/2, and is
    one word short."""
    values = bleu([("a a b", "a b c d")])
    brevity = 2.718281828459045 ** (1 - 4 / 3)
    assert (
        values[0] == pytest.approx(2 / 3 * brevity)
        and values[1] == pytest.approx((2 / 3 / 2) ** 0.5 * brevity)
    )


def test_best_constant_is_the_best_of_the_candidates():
    train = list(reports(80, 5).values()) + ["lungs are clear ."] * 20
    text = best_constant(train)

    def value(candidate):
        ids = map(str, range(len(train)))
        references = dict(zip(ids, train))
        scores = score(dict.fromkeys(references, candidate), references)
        return scores["BLEU_4"] + scores["CIDEr"]
    ranked = [candidate for candidate, _ in Counter(train).most_common(100)]
    assert text == max(ranked, key=value) and best_constant(train) == text


SPEC = {
    "phrases": {
        "effusion": ["pleural effusion", "effusions"],
        "nodule": ["nodule"],
        "fracture": ["fracture"],
    },
    "sides": {"left": ["left"], "right": ["right"]},
    "extents": {"small": ["small", "tiny"], "large": ["large"]},
    "studies": {
        "a": [{"finding": "effusion", "side": "left", "extent": "small"}],
        "b": [
            {"finding": "nodule", "side": "right", "extent": None},
            {"finding": "effusion", "side": "left", "extent": "large"},
        ],
        "c": [],
    },
}


def test_named_findings_reads_phrases_not_negations():
    assert named_findings(
        "a tiny left pleural effusion . no nodule . the ribs are free of fracture .", SPEC
    ) == {"effusion": ("left", "small")}
    assert named_findings("large effusions", SPEC) == {"effusion": (None, "large")}
    assert named_findings("nodules , fractures and a notable cardiac nodule .", SPEC) == {
        "nodule": (None, None)
    }
    assert named_findings("", SPEC) == {}


IU_XRAY = json.loads(IU_XRAY_FINDINGS.read_text(encoding="utf-8"))
CLAUSES = {  # of the forms that IU-Xray's reports have, and what they name
    "the lungs are clear without effusion": "",
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
    "no findings consistent with pneumonia": "",
    "no findings compatible with pneumonia": "",
    "the lungs are clear of infiltrate": "",
    "lungs are expanded and clear airspace disease": "",
    "lungs are free of infiltrates": "",
    "specifically no evidence of focal consolidation pneumothorax or effusion": "",
    "negative for pneumothorax": "",
    "there are no xxxx of a large pleural effusion": "",
    "hyperexpanded lungs without focal consolidation": "emphysema or hyperinflation",
    "there is a nodule that is not calcified": "granuloma or nodule",
    "the heart is not significantly enlarged": "",
    "the left apical pneumothorax has resolved": "",
    "infiltrates have cleared": "",
    "no change in the large hiatus hernia": "hernia",
    "without significant interval change of mild subsegmental atelectasis": "atelectasis",
    "no interval change and no effusion": "",
    "effusion is not identified": "",
    "pneumothorax is no longer seen": "",
    "neither effusion nor pneumothorax": "",
    "absence of effusion": "",
    "pneumothorax is absent": "",
    "fracture was ruled out": "",
    "opacity cannot be ruled out": "opacity or consolidation",
    "no significant interval changes suggestive of edema": "",
    "no change to suggest pneumonia": "",
    "the catheter has been removed": "",
    "interval removal of left picc line": "",
    "interval resolution of effusion": "",
    "the previously seen mass is not seen": "",
    "an opacity not well-seen on the lateral view": "opacity or consolidation",
    "cannot exclude early edema": "",
    "a fracture cannot be excluded": "",
    "limited for evaluation of fractures": "",
    "overlap could obscure a small nodule": "",
    "there is subcutaneous emphysema": "",
    "cardiomegaly andor pericardial effusion": "cardiomegaly",
    "the lung volumes are low normal": "",
    "xxxx opacity may represent atelectasis or scarring":
        "atelectasis, opacity or consolidation, scarring or fibrosis",
}


@pytest.mark.parametrize("text", CLAUSES)
def test_named_findings_reads_the_negations_of_real_sentences(text):
    assert ", ".join(named_findings(f"{text} .", IU_XRAY)) == CLAUSES[text]


def test_named_findings_takes_side_and_extent_from_the_clause():
    text = "small right effusion with severe cardiomegaly . large effusion ."
    assert named_findings(text, IU_XRAY) == {"effusion": ("right", "small"),
                                             "cardiomegaly": (None, "large")}
    assert named_findings("mild  bibasilar  low\nlung  volumes", IU_XRAY) == {
        "low lung volumes": ("bilateral", "small")}


def test_score_findings_by_hand():
    found = score_findings(
        {
            "a": "small right pleural effusion .",
            "b": "a nodule in the right lung .",
            "c": "a fracture .",
        },
        SPEC,
    )
    assert found["each"]["effusion"] == {
        "precision": 1, "recall": 0.5, "f1": pytest.approx(2 / 3), "studies": 2
    }
    assert found["each"]["fracture"] == {"precision": 0, "recall": 0, "f1": 0, "studies": 0}
    assert found["micro_precision"] == found["micro_recall"] == pytest.approx(2 / 3)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert (
        found["macro_f1_frequent"] == pytest.approx((2 / 3 + 1) / 2)
        and found["macro_f1_rare"] == 0
    )
    # of two named rightly, one side; of one with an extent
    assert found["side"] == 0.5 and found["extent"] == 1.0


def rows_of(predictions, references):
    return [
        dict(
            id=name,
            prediction=predictions[name],
            reference=references[name],
            reference_cut=" ".join(references[name].split()[:6]),
            image_path=[],
        )
        for name in references
    ]


def config_for(root, dataset="iu_xray"):
    return parse_config(
        dict(model=dict(vision="a", llm="b"), data=dict(root=str(root), dataset=dataset))
    )


def test_measure_layout(tmp_path):
    """Both protocols, the constant, the paper's row, and a note for every number that is
    missing."""
    predictions, references = CASES["random"]
    train = list(reports(50, 9).values())
    metrics = measure(rows_of(predictions, references), config_for(tmp_path), "val", train)
    assert metrics["n"] == 60 and metrics["distinct"] == len(set(predictions.values()))
    assert metrics["BLEU_4"] == score(predictions, references)["BLEU_4"]
    cut = {name: " ".join(text.split()[:6]) for name, text in references.items()}
    assert metrics["cut_references"]["CIDEr"] == score(predictions, cut)["CIDEr"]
    constant = metrics["constant"]
    assert constant["text"] == best_constant(train) and constant["distinct"] == 1
    assert constant["cut_references"]["BLEU_4"] == (
        score(dict.fromkeys(references, constant["text"]), cut)["BLEU_4"]
    )
    assert metrics["paper"]["BLEU_4"] == 0.169 and metrics["paper"].keys() == set(METRICS)
    assert (
        any("METEOR: needs Java" in note for note in metrics["notes"])
        and any("test split" in note for note in metrics["notes"])
    )
    bare = measure(
        [{**row, "reference_cut": None} for row in rows_of(predictions, references)],
        config_for(tmp_path, "demo"),
        "test",
        [],
    )
    assert bare["constant"] is None and bare["paper"] is None and "cut_references" not in bare
    assert sum(note.split(":")[0] in ("constant", "cut_references") for note in bare["notes"]) == 2


def test_measure_scores_findings_where_the_data_has_them(tmp_path):
    (tmp_path / "findings.json").write_text(json.dumps(SPEC))
    predictions = {"a": "left pleural effusion .", "b": "a nodule .", "c": "clear ."}
    metrics = measure(
        rows_of(predictions, predictions),
        config_for(tmp_path, "demo"),
        "test",
        ["left pleural effusion ."] * 3,
    )
    assert metrics["findings"] == score_findings(predictions, SPEC)
    assert metrics["constant"]["findings"]["micro_recall"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="findings.json: 1 studies are not in it, such as 'z'"):
        measure(
            rows_of({"z": "clear ."}, {"z": "clear ."}), config_for(tmp_path, "demo"), "test", []
        )
    evaluate.print_metrics(metrics, "test")


def plain_f1(named, true):
    """P, R, F1 of two lists of bools, from the definition."""
    both = sum(n and t for n, t in zip(named, true))
    precision, recall = both / sum(named) if any(named) else 0, both / sum(true) if any(true) else 0
    return precision, recall, 2 * precision * recall / (precision + recall) if both else 0


def test_precision_recall_f1_equals_the_definitions():
    rng = random.Random(0)
    named, true = ([[rng.random() < 0.3 for _ in range(5)] for _ in range(40)] for _ in range(2))
    for row in named + true:
        row[4] = False  # a label that nobody has: 0 / 0
    found = precision_recall_f1(np.array(named), np.array(true), list("abcde"))
    columns, keys = list(zip(zip(*named), zip(*true))), ("precision", "recall", "f1")
    for i, key in enumerate(keys):
        assert found[f"micro_{key}"] == pytest.approx(plain_f1(sum(named, []), sum(true, []))[i])
        assert found[f"macro_{key}"] == pytest.approx(
            sum(plain_f1(*column)[i] for column in columns) / 5
        )
        assert found[f"example_{key}"] == pytest.approx(
            sum(plain_f1(*pair)[i] for pair in zip(named, true)) / 40
        )
        assert [found["each"][label][key] for label in "abcde"] == pytest.approx(
            [plain_f1(*column)[i] for column in columns]
        )
    assert (
        found["each"]["a"]["studies"] == sum(row[0] for row in true)
        and any(not any(row) for row in named)
    )


def test_score_clinical_reads_uncertain_both_ways_and_groups_labels():
    def classes(**named):
        return [named.get(name.replace(" ", "_"), 0) for name in CONDITIONS]
    truth = [classes(Edema=1, Fracture=3), classes(No_Finding=1), classes(Pneumonia=2, Edema=3)]
    ours = [classes(Edema=1, Fracture=1), classes(No_Finding=1), classes(Pneumonia=1, Edema=1)]
    clinical = score_clinical(ours, truth)
    negative, positive = clinical["uncertain_negative"], clinical["uncertain_positive"]
    assert negative["14"]["micro_precision"] == 2 / 5 and negative["14"]["micro_recall"] == 1
    assert positive["14"]["micro_precision"] == 4 / 5 and positive["14"]["micro_recall"] == 1
    assert negative["13"]["micro_precision"] == 1 / 4 and positive["13"]["micro_precision"] == 3 / 4
    assert negative["5"]["micro_precision"] == 1 / 2 and positive["5"]["micro_precision"] == 1
    assert (
        negative["14"]["macro_f1"] == pytest.approx((2 / 3 + 1) / 14)
        and positive["13"]["macro_f1"] == pytest.approx(2 / 13)
    )
    # a study without a positive label counts 0
    assert negative["13"]["example_f1"] == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert (
        set(positive["5"]["each"]) == set(FIVE)
        and list(positive["13"]["each"]) == list(CONDITIONS[:-1])
    )
    assert positive["14"]["each"]["Edema"] == {"precision": 1, "recall": 1, "f1": 1, "studies": 2}


def test_measure_scores_clinical_efficacy_of_model_and_constant(tmp_path, capsys):
    # class 1 of Edema where a text names it, and the constant report's No Finding
    def label(texts):
        return [
            [int(name == "Edema" and "edema" in text
                 or name == "No Finding" and "edema" not in text) for name in CONDITIONS]
            for text in texts
        ]
    references = {"a": "edema .", "b": "clear .", "c": "edema ."}
    predictions = {"a": "edema .", "b": "edema .", "c": "clear ."}
    metrics = measure(
        rows_of(predictions, references),
        config_for(tmp_path, "mimic_cxr"),
        "test",
        ["clear ."] * 3,
        label,
    )
    clinical, constant = metrics["clinical"], metrics["constant"]["clinical"]
    assert clinical["uncertain_negative"]["14"]["micro_f1"] == pytest.approx(1 / 3)
    assert (
        constant["uncertain_negative"]["14"]["micro_recall"] == pytest.approx(1 / 3)
        and constant["uncertain_negative"]["5"]["micro_f1"] == 0
    )
    assert metrics["paper"]["clinical"] == {"precision": 0.426, "recall": 0.397, "f1": 0.402}
    reading, size, mean = clinical["headline"]
    evaluate.print_metrics(metrics, "test")
    printed = capsys.readouterr().out
    row = next(
        line
        for line in printed.splitlines()[printed[: printed.index("CheXbert")].count("\n") :]
        if line.startswith("model")
    )
    assert row.split()[1:4] == [
        format(clinical[reading][size][f"{mean}_{key}"], ".3f")
        for key in ("precision", "recall", "f1")
    ]
    assert "0.426" in printed


def test_predictions_score_again_to_the_same_numbers(make_config, tmp_path):
    from train import train
    metrics = train(make_config("train.max_steps=1"))
    path = tmp_path / "run/test_metrics.json"
    before, written = path.read_bytes(), path.stat().st_mtime_ns
    evaluate.score_again(tmp_path / "run/test_predictions.jsonl", None)
    assert path.read_bytes() == before and metrics["n"] == 5
    assert path.stat().st_mtime_ns > written
    rows = [
        json.loads(line)
        for line in (tmp_path / "run/test_predictions.jsonl").read_text().splitlines()
    ]
    assert all(
        row["reference"] == clean_iu_xray(row["reference"].replace(" .", ".")) for row in rows
    )
    for junk in ("", "[1]", "{", '{"id": "a"}',
                 '{"id": "a", "prediction": null, "reference": "b"}'):
        (tmp_path / "run/junk_predictions.jsonl").write_text(junk)
        with pytest.raises(ValueError, match="expected one JSON object a line"):
            evaluate.score_again(tmp_path / "run/junk_predictions.jsonl", None)
    line = (tmp_path / "run/test_predictions.jsonl").read_text().splitlines()[0]
    for change in ({"image_path": None}, {"image_path": "a/b.png"}, {"image_path": [None]},
                   {"reference_cut": 5}):
        hurt = json.dumps(json.loads(line) | change)
        (tmp_path / "run/junk_predictions.jsonl").write_text(f"{line}\n\n{hurt}\n")
        with pytest.raises(ValueError, match="junk_predictions.jsonl: line 3: got .*image_path"):
            evaluate.score_again(tmp_path / "run/junk_predictions.jsonl", None)
    two = [json.loads(line), json.loads(line) | {"id": "b"}]
    del two[1]["reference_cut"]
    (tmp_path / "run/junk_predictions.jsonl").write_text("\n".join(map(json.dumps, two)))
    with pytest.raises(ValueError, match="some lines have reference_cut and some have none"):
        evaluate.score_again(tmp_path / "run/junk_predictions.jsonl", None)
    (tmp_path / "run/junk_predictions.jsonl").write_text(f"{line}\n{line}\n")
    with pytest.raises(ValueError, match="the id 'study15' stands 2 times, expected once"):
        evaluate.score_again(tmp_path / "run/junk_predictions.jsonl", None)


def test_rows_are_lines_of_json_lines(tmp_path):
    """Unicode's own ends of a line are none, a mark of byte order and a blank line are nothing."""
    row = {"id": "a", "prediction": "one\u2028two\u0085three", "reference": "one"}
    text = "\ufeff" + json.dumps(row, ensure_ascii=False) + "\r\n\n"
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8", newline="")
    assert evaluate.read_rows(tmp_path / "rows.jsonl") == [row]


def test_an_evaluation_replaces_no_other(make_config, data_root, tmp_path, monkeypatch):
    """Of last.pt, of other settings, and one that had findings or clinical scores."""
    from train import train
    root = shutil.copytree(data_root, tmp_path / "data")
    (root / "findings.json").write_text(json.dumps(
        SPEC | {"studies": {f"study{i:02d}": [] for i in range(20)}}))
    train(make_config("train.max_steps=1", f"data.root={root}"))
    folder = tmp_path / "run"

    def files():
        return {path.name: path.read_bytes() for path in folder.glob("*_*")}
    before = files()
    assert json.loads(before["test_metrics.json"])["origin"]["step"] == 1
    run_main(monkeypatch, "--checkpoint", folder / "last.pt")
    after = files()
    assert before.items() <= after.items() and "last_test_metrics.json" in after
    run_main(monkeypatch, "--predictions", folder / "last_test_predictions.jsonl")
    assert files() == after
    notes = json.loads(after["last_test_metrics.json"])["notes"]
    assert not any("its row is of the test split" in note for note in notes)
    theirs = folder / "test.json"  # of a peer, whose metrics would have our name
    theirs.write_text(json.dumps({f"study{i}": "clear ." for i in range(15, 20)}))
    with pytest.raises(ValueError, match="test_metrics.json is of other weights, settings or"):
        run_main(monkeypatch, "--predictions", theirs)
    theirs.rename(folder / "peer.json")
    for _ in range(2):  # its own it may replace
        run_main(monkeypatch, "--predictions", folder / "peer.json")
    assert json.loads((folder / "peer_metrics.json").read_text())["origin"] == {"file": "peer.json"}
    for change in ("generate.num_beams=1", "data.limit=2", "train.precision=bf16"):
        with pytest.raises(ValueError, match="test_metrics.json is of other weights, settings or"):
            run_main(monkeypatch, "--checkpoint", folder / "best.pt", "--set", change)
    with pytest.raises(ValueError, match="has scores of findings, which would be lost"):
        run_main(monkeypatch, "--predictions", folder / "test_predictions.jsonl",
                 "--set", "data.root=/nowhere")
    clinical = json.loads(before["test_metrics.json"]) | {"clinical": {}}
    (folder / "test_metrics.json").write_text(json.dumps(clinical))
    with pytest.raises(ValueError, match="has clinical scores, which would be lost: add --chex"):
        run_main(monkeypatch, "--predictions", folder / "test_predictions.jsonl")


@pytest.mark.parametrize("phrases", ["nodule", [], [""]])
def test_a_finding_without_phrases_is_refused(make_config, tmp_path, phrases):
    (tmp_path / "findings.json").write_text(json.dumps(SPEC | {"phrases": {"nodule": phrases}}))
    with pytest.raises(ValueError, match="findings.json: expected .*'nodule' has no list"):
        evaluate.read_findings(make_config(f"data.root={tmp_path}"), ["a"])


def test_predictions_of_peers_score_to_the_same_numbers(make_config, data_root, tmp_path):
    """{id: text} and {id: [text]}, references from the config; what needs the LLM's tokenizer is
    missing, with a note."""
    from train import train
    ours = train(make_config("train.max_steps=1"))
    rows = [
        json.loads(line)
        for line in (tmp_path / "run/test_predictions.jsonl").read_text().splitlines()
    ]
    for wrap in (str, lambda text: [text]):
        path = tmp_path / "theirs.json"
        path.write_text(json.dumps({row["id"]: wrap(row["prediction"]) for row in reversed(rows)}))
        evaluate.score_again(path, tmp_path / "run/config.yaml")
        theirs = json.loads((tmp_path / "theirs_metrics.json").read_text())
        assert (
            all(theirs[key] == ours[key] for key in ("n", "distinct", "BLEU_4", "CIDEr", "ROUGE_L"))
            and "cut_references" not in theirs
        )
        assert (
            theirs["constant"]["BLEU_4"] == ours["constant"]["BLEU_4"]
            and any("tokenizer" in note for note in theirs["notes"])
        )
        assert (tmp_path / "theirs_report.html").is_file()
    for text, message in (
        ('{"a": 1}', "expected one JSON object"),
        ('{"a": [1]}', "expected one JSON object"),
        ("[]", "expected one JSON object"),
        ("{", "expected one JSON object"),
        ('{"nobody": "clear ."}', "1 reports for the 5 studies of test.*6 ids"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            evaluate.score_again(path, tmp_path / "run/config.yaml")
    with pytest.raises(FileNotFoundError, match="name the config of its data with --config"):
        evaluate.score_again(path, None)
    with pytest.raises(ValueError, match="1 reports for the 3 studies of val"):
        evaluate.score_again(path, tmp_path / "run/config.yaml", split="val")


def page_data(path):
    text = path.read_text()
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S).group(1)
    )


def test_page_is_self_contained_and_holds_the_cases(make_config, tmp_path):
    from train import train
    metrics = train(make_config("train.max_steps=3"))
    path = tmp_path / "run/test_report.html"
    text, data = path.read_text(), page_data(path)
    assert (
        not re.search(r"(?:src|href|url|import|fetch)\s*[=(]?\s*[\"']?(?:https?:|//|file:)", text)
        and "default-src 'none'" in text
    )
    assert data["metrics"] == json.loads(json.dumps(metrics)) and data["split"] == "test"
    rows = {
        row["id"]: row
        for row in map(
            json.loads, (tmp_path / "run/test_predictions.jsonl").read_text().splitlines()
        )
    }
    assert sorted(case["id"] for case in data["cases"]) == sorted(rows)
    assert {case["group"] for case in data["cases"]} == {"best", "worst", "random"}
    for case in data["cases"]:
        row = rows[case["id"]]
        assert (case["reference"], case["prediction"]) == (row["reference"], row["prediction"])
        assert (
            case["rouge_l"] == rouge_l(row["prediction"], row["reference"])
            and len(case["views"]) == len(row["image_path"])
        )
        for view in case["views"]:
            assert Image.open(io.BytesIO(base64.b64decode(view))).size == (36, 40)
    assert data["cases"][0]["cider"] == max(case["cider"] for case in data["cases"])
    steps = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()][1:]
    assert data["curves"]["did"] == [[line["step"], line["did"]] for line in steps if "did" in line]
    assert data["curves"]["BLEU_4"] == [[3, steps[-1]["val"]["BLEU_4"]]]
    assert {point["id"]: point["at"] for point in data["points"]} == {
        name: row["visual_pca"] for name, row in rows.items()
    }
    assert (
        {len(point["at"]) for point in data["points"]} == {3}
        and any(point["at"][0] for point in data["points"])
    )


def test_page_escapes_hostile_text_and_survives_missing_images(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \u2028 ]]> <!--"
    rows = [
        dict(
            id=f"{i}{evil}",
            prediction=evil,
            reference=evil,
            image_path=["../../none.png", f"{i}.png"],
        )
        for i in range(70)
    ]
    config = config_for(tmp_path)
    metrics = measure(rows, config, "test", [evil])
    evaluate.draw_page(tmp_path / "test_report.html", rows, metrics, config, "test")
    text, data = (
        (tmp_path / "test_report.html").read_text(),
        page_data(tmp_path / "test_report.html"),
    )
    assert (
        "<script>alert" not in text
        and "onerror=" in text
        and text.count("<script") == 2
        and "<img src=x" not in text
    )
    assert data["cases"][0]["prediction"] == evil and data["cases"][0]["views"] == [None, None]
    assert [
        sum(case["group"] == group for case in data["cases"])
        for group in ("best", "worst", "random")
    ] == [20, 20, 20]
    assert len({case["id"] for case in data["cases"]}) == 60


def test_page_stays_under_3_mb_with_noisy_films_of_many_views(tmp_path):
    """60 cases of two views at full size; more views share the same room."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(3):  # near 0.8 bit a pixel as JPEG, as films have
        noise = Image.fromarray(rng.integers(60, 200, (32, 32), dtype=np.uint8)).resize(
            (2400, 2400), Image.Resampling.BICUBIC
        )
        noise.save(tmp_path / f"images/{i}.png")
    for views in (2, 5):
        rows = [
            dict(
                id=str(i),
                prediction=f"no {i} . " * 12,
                reference="clear . " * 20,
                image_path=[f"{j % 3}.png" for j in range(views)],
            )
            for i in range(60)
        ]
        metrics = measure(rows, config_for(tmp_path), "test", [])
        evaluate.draw_page(
            tmp_path / "test_report.html", rows, metrics, config_for(tmp_path), "test"
        )
        assert (tmp_path / "test_report.html").stat().st_size < 3e6
        if views == 2:
            view = page_data(tmp_path / "test_report.html")["cases"][0]["views"][0]
            assert max(Image.open(io.BytesIO(base64.b64decode(view))).size) == report.PIXELS


def test_curves_are_means_of_equal_pieces(tmp_path):
    lines = [{"versions": {}}] + [
        {"step": i, "report": float(i), "vse": 0.0} for i in range(1, 601)
    ]
    lines.insert(
        300, {"step": 299, "val": {"BLEU_4": 0.1, "ROUGE_L": 0.2, "CIDEr": 0.3, "distinct": 4}}
    )
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 601, "rep')
    header, found = report.curves(tmp_path / "log.jsonl")
    assert (
        header == {"versions": {}}
        and len(found["report"]) == 300
        and found["report"][:2] == [[2, 1.5], [4, 3.5]]
    )
    assert found["vse"][0] == [2, 0.0] and found["CIDEr"] == [[299, 0.3]] and "did" not in found
    assert report.curves(tmp_path / "none.jsonl") == (None, {})
    for lost, at in (("", {}), ('{"val": {"CIDEr": 1}\n5\n', {}),
                     ('{"step": 4, "changed": {}}\n', {})):  # of a run without its log
        (tmp_path / "log.jsonl").write_text(lost)
        assert report.curves(tmp_path / "log.jsonl") == (None, at)


def test_the_page_shows_no_picture_from_elsewhere(tmp_path):
    """Another person's rows may name any path of this machine."""
    Image.new("L", (8, 8), 3).save(tmp_path / "secret.png")
    images = tmp_path / "images"
    images.mkdir()
    Image.new("L", (8, 8), 3).save(images / "own.png")
    views = [str(tmp_path / "secret.png"), "../secret.png", "own.png"]
    row = dict(id="a", prediction="x", reference="x", image_path=views, cider=1.0, rouge_l=1.0,
               tags=None)
    report.write_page(tmp_path / "test_report.html", [row], images,
                      {"split": "test", "names": [], "config": {}, "metrics": {}, "tagger": None})
    films = page_data(tmp_path / "test_report.html")["cases"][0]["views"]
    assert films[:2] == [None, None] and films[2]


def test_page_tags_findings(tmp_path):
    (tmp_path / "findings.json").write_text(json.dumps(SPEC))
    predictions = {"a": "left pleural effusion .", "b": "a nodule .", "c": "clear ."}
    rows, config = rows_of(predictions, predictions), config_for(tmp_path, "demo")
    evaluate.draw_page(
        tmp_path / "p_report.html", rows, measure(rows, config, "test", []), config, "test"
    )
    tags = {case["id"]: case["tags"] for case in page_data(tmp_path / "p_report.html")["cases"]}
    assert tags["a"] == {
        "reference": [["effusion", "left small"]], "prediction": [["effusion", "left"]]
    }
    assert tags["c"] == {"reference": [], "prediction": []}
    (tmp_path / "findings.json").unlink()

    def label(texts):
        return [
            [3 if name == "Edema" else 1 if name == "Fracture" else 2 for name in CONDITIONS]
            for _ in texts
        ]
    evaluate.draw_page(
        tmp_path / "p_report.html", rows, measure(rows, config, "test", []), config, "test", label
    )
    assert page_data(tmp_path / "p_report.html")["cases"][0]["tags"]["reference"] == [
        ["Edema", "uncertain"], ["Fracture", ""]
    ]


def test_command_line_evaluates_and_writes_one_report(make_config, data_root, tmp_path):
    """`--checkpoint`, `--set`, and `--images` in processes of their own: the files alone are
    enough."""
    from train import train
    train(make_config("train.max_steps=1"))
    best = str(tmp_path / "run/best.pt")
    before = (tmp_path / "run/test_predictions.jsonl").read_bytes()
    done = subprocess.run(
        [sys.executable, "evaluate.py", "--checkpoint", best],
        capture_output=True,
        text=True,
        env={"PATH": "/nowhere", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0 and "5 studies" in done.stdout, done.stderr
    assert (tmp_path / "run/test_predictions.jsonl").read_bytes() == before
    row = json.loads(before.decode().splitlines()[1])
    views = [str(data_root / "images" / path) for path in row["image_path"]]
    assert len(views) == 2
    done = subprocess.run(
        [sys.executable, "evaluate.py", "--checkpoint", best, "--images", *views],
        capture_output=True,
        text=True,
    )
    assert done.stdout.rstrip("\n") == row["prediction"] and done.returncode == 0, done.stderr
    done = subprocess.run(
        [
            sys.executable,
            "evaluate.py",
            "--checkpoint",
            best,
            "--split",
            "val",
            "--set",
            "data.limit=2",
        ],
        capture_output=True,
        text=True,
        env={"PATH": "/nowhere", "HOME": str(tmp_path)},
    )
    assert (
        "val: 2 studies" in done.stdout
        and torch.load(best, weights_only=True)["step"] == 1
    ), done.stderr


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


@pytest.fixture
def checkpoint(make_model, tmp_path):
    model, path = make_model(), tmp_path / "best.pt"
    torch.save({"model": model.trained_state(), "config": model.config.to_dict()}, path)
    return path


def test_images_that_people_bring_give_a_report(checkpoint, tmp_path, monkeypatch, capsys):
    """One to seven views, of any usual mode, and names with blanks and letters of any alphabet."""
    rng, paths = np.random.default_rng(0), []
    modes = ("L", "RGB", "CMYK", "P", "RGBA", "LA", "1")
    for i, mode in enumerate(modes):
        image = Image.fromarray(rng.integers(0, 256, (50, 30 + i, 3), dtype=np.uint8))
        kind = "jpg" if mode in ("RGB", "CMYK") else "png"
        paths.append(tmp_path / f"vue {i} \u80ba\u00e9.{kind}")
        image.convert(mode).save(paths[-1])
    for views in (paths[:1], paths[2:4], paths):
        run_main(monkeypatch, "--checkpoint", checkpoint, "--images", *views)
        assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("make, words", [
    (lambda a, b: Image.new("RGB", (1, 1), "navy").save(b), "b.png: every pixel has one value"),
    (lambda a, b: b.write_bytes(a.read_bytes()), "b.png: the same picture as .*a.png; name each"),
    (lambda a, b: b.write_bytes(b""), "b.png: not a whole PNG or JPEG image"),
    (lambda a, b: None, "b.png: no such file"),
], ids=["1 x 1", "twice", "empty", "missing"])
def test_images_that_people_bring_are_refused_in_one_line(tmp_path, monkeypatch, make, words):
    """Before the checkpoint is read."""
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(paths[0])
    make(*paths)
    with pytest.raises(ValueError, match=words):
        run_main(monkeypatch, "--checkpoint", tmp_path / "none.pt", "--images", *paths)


@pytest.mark.parametrize("arguments, unused", [
    ("--checkpoint x.pt --config c.yaml",
     "--config: of no use with --checkpoint; that takes --split, --chexbert, --set model,"),
    ("--checkpoint x.pt --against b.jsonl", "--against: of no use with --checkpoint;"),
    ("--checkpoint x.pt --set train.lr=1", "--set train.lr=1: of no use with --checkpoint;"),
    ("--checkpoint x.pt --set loss.vse_weight=0", "--set loss.vse_weight=0: of no use"),
    ("--checkpoint x.pt --images a.png --split val", "--split: of no use with --checkpoint and"),
    ("--checkpoint x.pt --images a.png --chexbert c.pth", "--chexbert: of no use"),
    ("--checkpoint x.pt --images a.png --config c.yaml", "--config: of no use"),
    ("--predictions x.jsonl --images a.png", "--images: of no use with --predictions with ref"),
    ("--predictions x.jsonl --split val", "--split: of no use with --predictions with ref"),
    ("--predictions x.jsonl --set generate.num_beams=5", "--set generate.num_beams=5: of no use"),
    ("--predictions x.json --images a.png", "--images: of no use with --predictions without"),
    ("--predictions x.json --against b.jsonl --split val", "--split: of no use"),
    ("--predictions x.json --set train.seed=1", "--set train.seed=1: of no use"),
])
def test_a_mode_refuses_what_it_does_not_use(monkeypatch, arguments, unused):
    with pytest.raises(ValueError, match=f"^{re.escape(unused)}.*"):
        run_main(monkeypatch, *arguments.split())


@pytest.mark.parametrize("arguments", [
    "--checkpoint x.pt --split val --chexbert c.pth --set data.limit=2 train.eval_batch_size=64",
    "--predictions x.jsonl --config c.yaml --chexbert c.pth --set data.limit=2",
    "--predictions x.json --config c.yaml --split val --chexbert c.pth --set data.limit=2",
    "--predictions x.jsonl --against b.json --chexbert c.pth",
    "--predictions x.json --against b.json --split val --chexbert c.pth",
])
def test_a_mode_takes_what_it_uses(monkeypatch, arguments):
    with pytest.raises((FileNotFoundError, ValueError), match="no such file|name the data with"):
        run_main(monkeypatch, *arguments.split())


def test_no_file_holds_a_number_that_json_has_not(tmp_path, monkeypatch):
    rows = [dict(id="a", prediction="clear .", reference="clear .", visual_pca=[math.nan, 0, 0])]
    config, page = config_for(tmp_path), tmp_path / "test_report.html"
    metrics = measure(rows, config, "test", [])
    with pytest.raises(ValueError, match="not JSON compliant"):
        evaluate.draw_page(page, rows, metrics, config, "test")
    monkeypatch.setattr(evaluate, "measure", lambda *_: metrics | {"BLEU_4": math.inf})
    with pytest.raises(ValueError, match="not JSON compliant"):
        evaluate.write_results(tmp_path, "test", rows, config, "test", [], None)
    assert not page.exists() and not (tmp_path / "test_metrics.json").exists()


def test_a_checkpoint_that_is_not_finite_is_refused(checkpoint, data_root, monkeypatch):
    stored = torch.load(checkpoint, weights_only=True)
    stored["model"]["norm.weight"][3] = math.nan
    torch.save(stored, checkpoint)
    with pytest.raises(ValueError, match="norm.weight holds values that are not finite"):
        run_main(monkeypatch, "--checkpoint", checkpoint)


def test_principal_plane_is_that_of_the_unit_vectors():
    """Against the eigenvectors of the covariance; the three numbers hold the whole variance, and
    so the mean cosine."""
    embeds = np.random.default_rng(0).normal(size=(40, 6)) * [5, 3, 1, 1, 1, 1] + 2
    points = principal_plane(embeds)
    unit = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(np.cov(unit.T, bias=True))
    for axis in (0, 1):
        expected = (unit - unit.mean(axis=0)) @ vectors[:, -1 - axis]
        assert (
            np.allclose(np.abs(points[:, axis]), np.abs(expected))
            and (points[:, axis]**2).mean() == pytest.approx(values[-1 - axis])
        )
    assert np.allclose(points, principal_plane(7 * embeds))
    variance = (points[:, 0]**2 + points[:, 1]**2 + points[:, 2]).mean()
    assert variance == pytest.approx(1 - (unit @ unit.T).mean())
    assert principal_plane(embeds[:1]).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("text, abnormal", [
    ("the lungs are clear . no pleural effusion . heart size is normal .", False),
    ("there is a small left effusion . lungs are clear .", True),
    ("Lungs are clear. 1. 2.", False), ("", False), ("cardiomegaly", True)])
def test_a_report_without_words_of_denial_names_an_abnormality(text, abnormal):
    assert names_abnormality(text) == abnormal
