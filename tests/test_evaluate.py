"""The scores are pycocoevalcap's; the tables hold what they say."""
import json
import random
import subprocess
import sys
from collections import Counter

import pytest
import torch

import evaluate
from configs import parse_config
from data import clean_iu_xray
from evaluate import METRICS, best_constant, bleu, measure, meteor_1_5, named_findings, rouge_l, score, score_findings

SENTENCES = ["the heart is normal .", "lungs are clear .", "no pleural effusion or pneumothorax .", "xxxx are intact .",
             "a 12 mm nodule in the left upper lobe .", "degenerative changes of the spine .", "stable cardiomegaly ."]


def reports(studies, seed):
    rng = random.Random(seed)
    return {str(i): " ".join(rng.choices(SENTENCES, weights=range(7, 0, -1), k=rng.randint(2, 7))) for i in range(studies)}


def odd_cases():
    references = reports(12, 1)
    odd = ["", "the", "the " * 40 + ".", "a ||| b  c , ; ! ? ( ) \" '", "12 mm xxxx 3.5 cm", " lungs are clear . ", "\tlungs\nclear",
           "lungs are clear .", references["8"], references["9"][:-2], "unseen words only", "é ü 肺"]
    return dict(zip(references, odd)), references


CASES = {
    "random": (reports(60, 2), reports(60, 3)),
    "constant": (dict.fromkeys(reports(60, 2), SENTENCES[0] + " " + SENTENCES[1]), reports(60, 3)),
    "odd": odd_cases(),
    "empty": (dict.fromkeys(reports(5, 2), ""), reports(5, 3)),
    "equal": (reports(9, 4), reports(9, 4)),
    "single study": ({"a": "lungs are clear ."}, {"a": "the lungs are clear ."}),
    "longer than the reference": ({"a": "the lungs are clear . no effusion ."}, {"a": "the lungs are clear ."}),
    "one word": ({"a": "clear", "b": "heart"}, {"a": "clear", "b": "clear"}),
}


def theirs(predictions, references):
    """pycocoevalcap, called as every repository of this family calls it: no tokenizer, corpus scores."""
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    ours, gold = ({name: [text] for name, text in texts.items()} for texts in (predictions, references))
    values = dict(zip(METRICS, Bleu(4).compute_score(gold, ours, verbose=0)[0]))
    return values | {"ROUGE_L": Rouge().compute_score(gold, ours)[0], "CIDEr": Cider().compute_score(gold, ours)[0]}


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
        flat = {name: [" ".join(text.split())] for name, text in predictions.items()}  # a tab or line break ends its line
        reference, _ = Meteor().compute_score({name: [text] for name, text in references.items()}, flat)
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
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        common = table[-1][-1]
        p, r = common / len(a), common / len(b)
        expected = (1 + 1.44) * p * r / (r + 1.44 * p) if common else 0
        assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected, abs=1e-12)


def test_bleu_by_hand():
    """Clipping and brevity: "a a b" for "a b c d" has clipped unigrams 2/3, bigrams 1/2, and is one word short."""
    values = bleu([("a a b", "a b c d")])
    brevity = 2.718281828459045 ** (1 - 4 / 3)
    assert values[0] == pytest.approx(2 / 3 * brevity) and values[1] == pytest.approx((2 / 3 / 2) ** 0.5 * brevity)


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


SPEC = {"phrases": {"effusion": ["pleural effusion", "effusions"], "nodule": ["nodule"], "fracture": ["fracture"]},
        "sides": {"left": ["left"], "right": ["right"]}, "extents": {"small": ["small", "tiny"], "large": ["large"]},
        "studies": {"a": [{"finding": "effusion", "side": "left", "extent": "small"}],
                    "b": [{"finding": "nodule", "side": "right", "extent": None}, {"finding": "effusion", "side": "left", "extent": "large"}],
                    "c": []}}


def test_named_findings_reads_phrases_not_negations():
    assert named_findings("a tiny left pleural effusion . no nodule . the ribs are free of fracture .", SPEC) == {"effusion": ("left", "small")}
    assert named_findings("large effusions", SPEC) == {"effusion": (None, "large")}
    assert named_findings("nodules , fractures and a notable cardiac nodule .", SPEC) == {"nodule": (None, None)}
    assert named_findings("", SPEC) == {}


def test_score_findings_by_hand():
    found = score_findings({"a": "small right pleural effusion .", "b": "a nodule in the right lung .", "c": "a fracture ."}, SPEC)
    assert found["each"]["effusion"] == {"precision": 1, "recall": 0.5, "f1": pytest.approx(2 / 3), "studies": 2}
    assert found["each"]["fracture"] == {"precision": 0, "recall": 0, "f1": 0, "studies": 0}
    assert found["micro_precision"] == found["micro_recall"] == pytest.approx(2 / 3)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["side"] == 0.5 and found["extent"] == 1.0  # of two named rightly, one side; of one with an extent


def rows_of(predictions, references):
    return [dict(id=name, prediction=predictions[name], reference=references[name],
                 reference_cut=" ".join(references[name].split()[:6]), image_path=[]) for name in references]


def config_for(root, dataset="iu_xray"):
    return parse_config(dict(model=dict(vision="a", llm="b"), data=dict(root=str(root), dataset=dataset)))


def test_measure_layout(tmp_path):
    """Both protocols, the constant, the paper's row, and a note for every number that is missing."""
    predictions, references = CASES["random"]
    train = list(reports(50, 9).values())
    metrics = measure(rows_of(predictions, references), config_for(tmp_path), "val", train)
    assert metrics["n"] == 60 and metrics["distinct"] == len(set(predictions.values()))
    assert metrics["BLEU_4"] == score(predictions, references)["BLEU_4"]
    cut = {name: " ".join(text.split()[:6]) for name, text in references.items()}
    assert metrics["cut_references"]["CIDEr"] == score(predictions, cut)["CIDEr"]
    constant = metrics["constant"]
    assert constant["text"] == best_constant(train) and constant["distinct"] == 1
    assert constant["cut_references"]["BLEU_4"] == score(dict.fromkeys(references, constant["text"]), cut)["BLEU_4"]
    assert metrics["paper"]["BLEU_4"] == 0.169 and metrics["paper"].keys() == set(METRICS)
    assert any("METEOR: needs Java" in note for note in metrics["notes"]) and any("test split" in note for note in metrics["notes"])
    bare = measure([{**row, "reference_cut": None} for row in rows_of(predictions, references)], config_for(tmp_path, "demo"), "test", [])
    assert bare["constant"] is None and bare["paper"] is None and "cut_references" not in bare
    assert sum(note.split(":")[0] in ("constant", "cut_references") for note in bare["notes"]) == 2


def test_measure_scores_findings_where_the_data_has_them(tmp_path):
    (tmp_path / "findings.json").write_text(json.dumps(SPEC))
    predictions = {"a": "left pleural effusion .", "b": "a nodule .", "c": "clear ."}
    metrics = measure(rows_of(predictions, predictions), config_for(tmp_path, "demo"), "test", ["left pleural effusion ."] * 3)
    assert metrics["findings"] == score_findings(predictions, SPEC)
    assert metrics["constant"]["findings"]["micro_recall"] == pytest.approx(2 / 3)
    evaluate.print_metrics(metrics, "test")


def test_predictions_score_again_to_the_same_numbers(make_config, tmp_path):
    from train import train
    metrics = train(make_config("train.max_steps=1"))
    path = tmp_path / "run/test_metrics.json"
    before = path.read_bytes()
    path.unlink()
    evaluate.score_again(tmp_path / "run/test_predictions.jsonl", None)
    assert path.read_bytes() == before and metrics["n"] == 5
    rows = [json.loads(line) for line in (tmp_path / "run/test_predictions.jsonl").read_text().splitlines()]
    assert all(row["reference"] == clean_iu_xray(row["reference"].replace(" .", ".")) for row in rows)
    for junk in ("", "[1]", "{", '{"id": "a"}'):
        (tmp_path / "run/junk_predictions.jsonl").write_text(junk)
        with pytest.raises(ValueError, match="expected one JSON object a line"):
            evaluate.score_again(tmp_path / "run/junk_predictions.jsonl", None)


def test_command_line_evaluates_and_writes_one_report(make_config, data_root, tmp_path):
    """`--checkpoint`, `--set`, and `--images` in processes of their own: the files alone are enough."""
    from train import train
    train(make_config("train.max_steps=1"))
    best = str(tmp_path / "run/best.pt")
    before = (tmp_path / "run/test_predictions.jsonl").read_bytes()
    done = subprocess.run([sys.executable, "evaluate.py", "--checkpoint", best], capture_output=True, text=True,
                          env={"PATH": "/nowhere", "HOME": str(tmp_path)})
    assert done.returncode == 0 and "5 studies" in done.stdout, done.stderr
    assert (tmp_path / "run/test_predictions.jsonl").read_bytes() == before
    row = json.loads(before.decode().splitlines()[1])
    views = [str(data_root / "images" / path) for path in row["image_path"]]
    assert len(views) == 2
    done = subprocess.run([sys.executable, "evaluate.py", "--checkpoint", best, "--images", *views], capture_output=True, text=True)
    assert done.stdout.rstrip("\n") == row["prediction"] and done.returncode == 0, done.stderr
    done = subprocess.run([sys.executable, "evaluate.py", "--checkpoint", best, "--split", "val", "--set", "data.limit=2"],
                          capture_output=True, text=True, env={"PATH": "/nowhere", "HOME": str(tmp_path)})
    assert "val: 2 studies" in done.stdout and torch.load(best, weights_only=True)["step"] == 1, done.stderr
