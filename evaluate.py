"""Generate the reports of a split, score them, and write what was found (Sec. 4.1.3, Table 1).

    python evaluate.py --checkpoint runs/iu_xray/best.pt [--split test] [--chexbert chexbert.pth]
    python evaluate.py --predictions runs/iu_xray/test_predictions.jsonl    # again, without a model
    python evaluate.py --predictions theirs.json --config configs/iu_xray.yaml         # {id: text}
    python evaluate.py --predictions A.jsonl [A2.jsonl ...] --against B.jsonl [B2.jsonl ...]
    python evaluate.py --checkpoint runs/iu_xray/best.pt --images frontal.png lateral.png

The last writes one report. The scores equal pycocoevalcap's on the same strings. References are
cleaned when the data is read; predictions are scored as they are, or cleaned by --clean.
"""
import argparse
import json
import math
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache, reduce
from importlib.util import find_spec
from itertools import product, zip_longest
from operator import getitem
from pathlib import Path

import numpy as np
import torch
from nltk.util import ngrams
from tqdm import tqdm

from configs import Config, InputError, load_config
from configs.chexbert import CONDITIONS, chexbert_labeller
from configs.files import SPLITS, image_problem, write_whole
from configs.findings import findings_details, findings_matrices, read_findings
from configs.report import draw_page, principal_plane
from data import (CLEANING, ReportDataset, Study, build_demo_if_missing, digest, end_in_one_line,
                  loader, read_image, read_studies)
from model import VDGen, join_ranks, load_checkpoint, ranks

METRICS = ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "METEOR", "ROUGE_L", "CIDEr")
PAPER = {  # Tables 1 and 3, the rows of VDGen; all on the test split
    "iu_xray": dict(zip(METRICS, (0.491, 0.325, 0.230, 0.169, 0.195, 0.362, 0.386))),
    "mimic_cxr": dict(zip(METRICS, (0.418, 0.274, 0.190, 0.136, 0.164, 0.301, 0.162)))
    | {"clinical": {"precision": 0.426, "recall": 0.397, "f1": 0.402}},
}
FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")  # CheXpert's
LABELS = {"14": CONDITIONS, "13": CONDITIONS[:-1], "5": FIVE}  # 13: without No Finding
READINGS = {"uncertain_negative": [1], "uncertain_positive": [1, 3]}  # the classes that are true
HEADLINE = ("uncertain_negative", "14", "macro")  # A17: as R2Gen, whose rows Table 3 starts from
PRF = ("precision", "recall", "f1")
HEAD = (*PRF, "95 % of F1", "studies")
MEANS = ("micro", "macro", "weighted", "example")
RESAMPLES, TAIL = 1000, 25  # sets of resampled studies; 2.5 % of them on each side of an interval
METEOR_SECONDS = 600  # for a corpus


# The text scores ----------------------------------------------------------------------------------

def score(predictions: dict[str, str], references: dict[str, str],
          meteor: bool = True) -> dict[str, float]:
    """Corpus BLEU-1..4, METEOR 1.5, ROUGE-L and CIDEr-D, one reference a study: pycocoevalcap's.

    Args:
        predictions, references: {study id: text}, scored as they are, words split at blanks.
        meteor: without it, and where `meteor_1_5` gives none, the key is missing.
    Returns:
        the keys of METRICS; CIDEr from 0 to 10, the others from 0 to 1.
    Raises:
        ValueError: no study, or not the same ids on both sides.
    """
    if not references or predictions.keys() != references.keys():
        raise ValueError(f"score: got {len(predictions)} predictions for {len(references)} "
                         "references; expected the same ids, at least one")
    pairs = [(predictions[name], references[name]) for name in references]
    scores = scores_of({"text": text_statistics(pairs)})
    return scores | meteor_1_5(predictions, references) if meteor else scores


def text_statistics(pairs: list[tuple[str, str]]) -> np.ndarray:
    """(12, N): of each (prediction, reference) the numbers whose sums give a corpus's scores.

    The rows: the ten of `bleu_statistics`, ROUGE-L, CIDEr-D, whose idf is that of all references.
    """
    predictions, references = zip(*pairs)
    rouge = [rouge_l(*pair) for pair in pairs]
    return np.array([*bleu_statistics(pairs), rouge, CiderD(references).each(predictions)])


def text_scores(sums: np.ndarray, studies: int) -> dict[str, np.ndarray]:
    """BLEU-1..4, ROUGE-L and CIDEr-D from sums of `text_statistics` over studies, (12, ...)."""
    *counts, rouge, cider = sums
    bleus = dict(zip(METRICS, bleu_scores(np.array(counts))))
    return bleus | {"ROUGE_L": rouge / studies, "CIDEr": cider / studies}


@lru_cache(maxsize=100_000)
def _ngram_counts(text: str) -> tuple[Counter, ...]:
    """Counts of the 1-, 2-, 3- and 4-grams of a text."""
    words = text.split()
    return tuple(Counter(ngrams(words, n)) for n in range(1, 5))


def bleu_statistics(pairs: list[tuple[str, str]]) -> np.ndarray:
    """(10, N): right 1- to 4-grams (clipped), written 1- to 4-grams, words of either text."""
    columns = []
    for prediction, reference in pairs:
        length, correct = len(prediction.split()), []
        for ours, theirs in zip(_ngram_counts(prediction), _ngram_counts(reference)):
            clipped = (min(count, theirs[gram]) for gram, count in ours.items() if gram in theirs)
            correct.append(sum(clipped))
        guessed = [max(0, length - n) for n in range(4)]
        columns.append(correct + guessed + [length, len(reference.split())])
    return np.array(columns, dtype=float).T


def bleu_scores(counts: np.ndarray) -> np.ndarray:
    """BLEU-1..4 (Papineni et al., 2002), (4, ...), from sums of `bleu_statistics`, (10, ...).

    With coco-caption's 1e-15 and 1e-9.
    """
    correct, guessed, (written, expected) = counts[:4], counts[4:8], counts[8:]
    precisions = np.cumprod((correct + 1e-15) / (guessed + 1e-9), axis=0)
    ratio = (written + 1e-15) / (expected + 1e-9)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    return np.array([precision ** (1 / n) * brevity for n, precision in enumerate(precisions, 1)])


def rouge_l(prediction: str, reference: str, beta: float = 1.2) -> float:
    """ROUGE-L (Lin, 2004): F of the longest common subsequence, recall beta^2 times as heavy.

    Split at single blanks, as pycocoevalcap does.
    """
    ours, theirs = prediction.split(" "), reference.split(" ")
    places: dict[str, int] = {}
    for i, word in enumerate(ours):
        places[word] = places.get(word, 0) | 1 << i
    # Hyyrö's bit-parallel recurrence: the zeros of `row` count the common words.
    row = everywhere = (1 << len(ours)) - 1
    for word in theirs:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & everywhere
    common = len(ours) - row.bit_count()
    precision, recall = common / len(ours), common / len(theirs)
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision) if common else 0.0


class CiderD:
    """CIDEr-D (Vedantam et al., 2015): clipped tf-idf cosine of 1- to 4-grams, times 10.

    A Gaussian penalty on the difference in length, sigma 6 bigrams, as in coco-caption. The idf
    comes from the references given here.
    """

    def __init__(self, references: list[str]):
        frequency = Counter()
        for text in references:
            for counts in _ngram_counts(text):
                frequency.update(counts.keys())
        self.log_studies = math.log(len(references))
        self.idf = {gram: self.log_studies - math.log(count) for gram, count in frequency.items()}
        self.references = [self._vector(text) for text in references]

    def _vector(self, text: str) -> tuple[list[tuple[dict, float]], int]:
        """For each n: weights and their norm; and the number of bigrams."""
        vectors = []
        for counts in _ngram_counts(text):
            weights = {gram: count * self.idf.get(gram, self.log_studies)
                       for gram, count in counts.items()}
            vectors.append((weights, math.sqrt(sum(w * w for w in weights.values()))))
        return vectors, _ngram_counts(text)[1].total()

    def each(self, predictions: list[str]) -> list[float]:
        """One value a study, in the order of the references."""
        vector = lru_cache(maxsize=1000)(self._vector)  # a constant report is one vector
        return [self._similarity(vector(text), reference)
                for text, reference in zip(predictions, self.references, strict=True)]

    @staticmethod
    def _similarity(ours, theirs, sigma: float = 6.0) -> float:
        """Of two results of `_vector`."""
        total = 0.0
        for (our, our_norm), (their, their_norm) in zip(ours[0], theirs[0]):
            dot = sum(min(w, their[gram]) * their[gram] for gram, w in our.items() if gram in their)
            total += dot / (our_norm * their_norm) if our_norm and their_norm else dot
        return 10 * total / 4 * math.exp(-((ours[1] - theirs[1]) ** 2) / (2 * sigma**2))


def meteor_1_5(predictions: dict[str, str], references: dict[str, str]) -> dict[str, float]:
    """{"METEOR": METEOR 1.5 (Denkowski and Lavie, 2014), by pycocoevalcap's Java program}.

    {} without Java or pycocoevalcap, or where the program fails or takes METEOR_SECONDS.
    """
    if shutil.which("java") is None or find_spec("pycocoevalcap") is None:
        return {}
    from pycocoevalcap.meteor.meteor import Meteor
    # A line is a request, and ||| parts its texts.
    ours, theirs = ({name: [" ".join(text.replace("|||", "").split())]
                     for name, text in texts.items()} for texts in (predictions, references))
    program = Meteor()
    watchdog = threading.Timer(METEOR_SECONDS, program.meteor_p.kill)
    watchdog.start()
    try:
        return {"METEOR": program.compute_score(theirs, ours)[0]}
    except (OSError, ValueError):  # a pipe without a reader, an empty answer
        return {}
    finally:
        watchdog.cancel()
        program.meteor_p.kill()
        if program.lock.locked():  # an error left it so, and `Meteor.__del__` waits for it
            program.lock.release()


def best_constant(train_reports: list[str]) -> str:
    """The one report that, given for every study, scores highest: what any model must beat.

    Of the 100 most frequent training reports the one with the highest (BLEU-4 + CIDEr) / 2 on at
    most 1,000 training studies (seed 0).
    """
    sample = random.Random(0).sample(train_reports, min(1000, len(train_reports)))
    cider = CiderD(sample)
    frequent = sorted(Counter(train_reports).items(), key=lambda item: (-item[1], item[0]))
    candidates = [text for text, _ in frequent[:100]]

    def value(text: str) -> float:
        sums = bleu_statistics([(text, reference) for reference in sample]).sum(axis=1)
        return bleu_scores(sums)[3] + np.mean(cider.each([text] * len(sample)))
    return max(tqdm(candidates, desc="best constant", leave=False), key=value)


# Clinical efficacy (Table 3), and findings for data that comes with findings.json -----------------

def precision_recall_f1(both: np.ndarray, named: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(3, ...) from three counts, as 2 both / (named + true) for F1; 0 / 0 is 0, as in R2Gen."""
    return np.array([both / np.maximum(named, 1), both / np.maximum(true, 1),
                     2 * both / np.maximum(named + true, 1)])


def label_statistics(named: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(3 L + 3, N) of (N, L) bool, N studies, L labels.

    The rows: of each label, named and true; named; true. Then precision, recall, F1 of the study.
    """
    both = named & true
    of_study = precision_recall_f1(both.sum(axis=1), named.sum(axis=1), true.sum(axis=1))
    return np.vstack([both.T, named.T, true.T, of_study])


def label_scores(sums: np.ndarray, studies: int) -> dict[str, np.ndarray]:
    """Precision, recall and F1 by every mean (A17), from sums of `label_statistics`, (3 L + 3, ...)

    micro: of all pairs of study and label; macro: mean over labels; weighted: the same, by the
    number of studies that have the label; example: mean over studies.
    """
    both, named, true = np.split(sums[:-3], 3)
    each = precision_recall_f1(both, named, true)
    micro = precision_recall_f1(both.sum(axis=0), named.sum(axis=0), true.sum(axis=0))
    weighted = (each * true).sum(axis=1) / np.maximum(true.sum(axis=0), 1)
    means = zip(MEANS, (micro, each.mean(axis=1), weighted, sums[-3:] / studies))
    return {f"{mean}_{key}": x for mean, values in means for key, x in zip(PRF, values)}


def each_label(statistics: np.ndarray, labels: Sequence[str]) -> dict[str, dict]:
    """{label: precision, recall, f1, and the studies that have it}, of `label_statistics`."""
    both, named, true = np.split(statistics[:-3].sum(axis=1), 3)
    columns = [*precision_recall_f1(both, named, true).tolist(), true.astype(int).tolist()]
    return {label: dict(zip((*PRF, "studies"), row)) for label, *row in zip(labels, *columns)}


# Scores of the corpus, their intervals, and comparisons -------------------------------------------

Statistics = dict[str, np.ndarray]  # {part: (K, N)}: by sums over studies, its scores


def study_statistics(predictions: dict[str, str], references: dict[str, str],
                     spec: dict | None = None, label: Callable | None = None) -> Statistics:
    """{"text": (12, N), "findings" and "clinical.<reading>.<size>": (3 L + 3, N) for L labels}.

    The texts are {study id: text}; spec and label are findings.json and CheXbert, as in `measure`.
    Both readings of "uncertain" are there, for 14, 13 and 5 labels (A17).
    """
    texts = {name: predictions[name] for name in references}
    parts = {"text": text_statistics(list(zip(texts.values(), references.values())))}
    if spec:
        parts["findings"] = label_statistics(*findings_matrices(texts, spec))
    classes = [label(list(part.values())) for part in (texts, references)] if label else []
    for reading, size in product(READINGS, LABELS) if label else ():
        columns = [CONDITIONS.index(name) for name in LABELS[size]]
        matrices = [np.isin(part, READINGS[reading])[:, columns] for part in classes]
        parts[f"clinical.{reading}.{size}"] = label_statistics(*matrices)
    return parts


def scores_of(statistics: Statistics, draws: np.ndarray | None = None) -> dict:
    """{"BLEU_1", .., "findings.micro_f1", ..} of all studies, or (R,) each of `resamples`.

    Of resamples without precision and recall: these get no interval.
    """
    scores = {}
    for part, rows in statistics.items():
        sums = rows.sum(axis=1) if draws is None else rows @ draws
        found = (text_scores if part == "text" else label_scores)(sums, rows.shape[1])
        prefix = "" if part == "text" else f"{part}."
        scores |= {prefix + key: value for key, value in found.items()}
    if draws is None:
        return {name: float(value) for name, value in scores.items()}
    return {name: value for name, value in scores.items() if not name.endswith(PRF[:2])}


def resamples(studies: int) -> np.ndarray:
    """(N, R): how often each study is in each of R sets of N studies drawn with replacement."""
    rng = np.random.default_rng(0)
    draws = (rng.integers(studies, size=studies) for _ in range(RESAMPLES))
    return np.array([np.bincount(draw, minlength=studies) for draw in draws], dtype=float).T


def interval(values: np.ndarray) -> list[float]:
    """The middle 95 % of (R,) values: two of them, so that of -values it is [-high, -low]."""
    ordered = np.sort(values)
    return [float(ordered[TAIL - 1]), float(ordered[-TAIL])]


def intervals(statistics: Statistics) -> dict:
    """95 % percentile bootstrap over studies: {score: [low, high]}, laid out as the scores.

    CIDEr's idf stays that of the whole split. METEOR has none: its program scores a corpus as one.
    """
    resampled = scores_of(statistics, resamples(statistics["text"].shape[1]))
    return nested({name: interval(values) for name, values in resampled.items()})


def nested(flat: dict) -> dict:
    """{"a.b": value} as {"a": {"b": value}}."""
    tree: dict = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        branch = tree
        for key in path:
            branch = branch.setdefault(key, {})
        branch[last] = value
    return tree


def compare(ours: list[Statistics], theirs: list[Statistics]) -> dict[str, dict]:
    """The difference of two settings in every score but METEOR, and its paired 95 % interval.

    Both sides are scored on the same resamples of studies. With several files a side, seeds of one
    setting, a score is their mean, and the files are resampled too; of one file, the seed is not
    in the interval.

    Args: a side's files; a column is the same study in all of them.
    Returns: {score: {"a", "b", "difference": a - b, "interval": [low, high], "excludes_0"}}.
    """
    draws = resamples(ours[0]["text"].shape[1])
    a, b = ([scores_of(statistics) for statistics in side] for side in (ours, theirs))
    a, b = ({name: float(np.mean([scores[name] for scores in side])) for name in side[0]}
            for side in (a, b))
    # The seed goes with the better side, wherever it stands: swapped sides swap the sign only.
    a_drawn = resampled_means(ours, draws, seed=1 + (a["BLEU_4"] > b["BLEU_4"]))
    b_drawn = resampled_means(theirs, draws, seed=1 + (b["BLEU_4"] > a["BLEU_4"]))
    found = {}
    for name in a_drawn:
        low, high = interval(a_drawn[name] - b_drawn[name])
        found[name] = {"a": a[name], "b": b[name], "difference": a[name] - b[name],
                       "interval": [low, high], "excludes_0": low > 0 or high < 0}
    return found


def resampled_means(files: list[Statistics], draws: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """{score: (R,)}: in each resample of studies, the mean over n of the n files, drawn anew.

    The mean of n drawn files has the variance (n - 1) / n * s^2 / n, where s^2 is the files'
    unbiased one, and should have s^2 / n: with w' the share of a file among those drawn, its weight
    is w = 1/n + sqrt(n / (n - 1)) * (w' - 1/n).
    """
    n = len(files)
    share = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).T / n
    weights = 1 / n + math.sqrt(n / max(n - 1, 1)) * (share - 1 / n)
    drawn = [scores_of(statistics, draws) for statistics in files]
    return {name: sum(w * scores[name] for w, scores in zip(weights, drawn)) for name in drawn[0]}


# All scores of an evaluation, and their tables ----------------------------------------------------

def measure(rows: list[dict], config: Config, split: str, train_reports: list[str],
            spec: dict | None = None, label: Callable | None = None) -> dict:
    """All scores of an evaluation, in the layout of `<split>_metrics.json`.

    Args:
        rows: a dict a study with id, prediction, reference and, where known, reference_cut.
        train_reports: cleaned; if there are none, there is no constant report.
        spec: findings.json (`read_findings`), for `findings`.
        label: from reports to the classes of CheXbert (`chexbert_labeller`), for `clinical`.
    """
    predictions = {row["id"]: row["prediction"] for row in rows}
    references = {row["id"]: row["reference"] for row in rows}
    cut = {row["id"]: row["reference_cut"] for row in rows if row.get("reference_cut") is not None}

    def tables(texts: dict[str, str]) -> dict:
        statistics = study_statistics(texts, references, spec, label)
        scores = scores_of(statistics) | meteor_1_5(texts, references)
        for part in statistics.keys() - {"text"}:
            labels = LABELS.get(part.rpartition(".")[2]) or spec["phrases"]
            scores[f"{part}.each"] = each_label(statistics[part], labels)
        counts = {"n": len(texts), "distinct": len(set(texts.values()))}
        found = counts | nested(scores) | {"intervals": intervals(statistics)}
        if cut:
            found["cut_references"] = counts | score(texts, cut)
        if spec:
            found["findings"] |= findings_details(texts, spec, found["findings"]["each"])
        if label:
            found["clinical"]["headline"] = HEADLINE
        return found
    metrics = tables(predictions) | {"constant": None, "paper": PAPER.get(config.data.dataset)}
    if train_reports:
        text = best_constant(train_reports)
        metrics["constant"] = tables(dict.fromkeys(predictions, text)) | {"text": text}
    texts = {"predictions": predictions, "references": references, "cut_references": cut}
    metrics["mean_words"] = {name: sum(len(text.split()) for text in part.values()) / len(part)
                             for name, part in texts.items() if part}
    metrics["notes"] = notes_on(metrics, rows, config, split)
    return metrics


def notes_on(metrics: dict, rows: list[dict], config: Config, split: str) -> list[str]:
    """Why a score is not there, or does not compare."""
    notes, known = [], set().union(*(row["reference"] for row in rows))
    strange = {c for row in rows for c in row["prediction"] if c not in known
               and (c.isupper() or not c.isalnum() and not c.isspace())}
    uncleaned = sum(not strange.isdisjoint(row["prediction"]) for row in rows)
    if "METEOR" not in metrics:
        notes.append("METEOR: needs Java and `pip install pycocoevalcap`, and is ended after "
                     f"{METEOR_SECONDS} seconds (looping text can keep it busy for ever)")
    if metrics["paper"] and split != "test":
        notes.append(f"paper: its row is of the test split, these scores are of {split}")
    if metrics["constant"] is None:
        notes.append(f"constant: needs the training reports; {config.data.root} holds none")
    if "cut_references" not in metrics:
        notes.append("cut_references: need the tokenizer of the LLM; the predictions hold none")
    if uncleaned:
        notes.append(f"predictions: {uncleaned} hold capitals or punctuation that no reference "
                     "has; `--predictions FILE --clean` cleans them as the references are (A15)")
    return notes


def print_table(title: str, head: Sequence[str], rows: list[tuple[str, Sequence]]) -> None:
    """A line a row, (its title, cells): None is "-", a float has three digits."""
    def shown(value) -> str:
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        return "-" if value is None else text
    lines = [[name, *map(shown, cells)] for name, cells in [(title, head), *rows]]
    widths = [max(map(len, column)) for column in zip_longest(*lines, fillvalue="")]
    print()
    for name, *cells in lines:
        cells = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:])]
        print("  ".join([name.ljust(widths[0]), *cells]))


def print_metrics(metrics: dict, name: str) -> None:
    """The tables: model, best constant report and paper side by side, by both protocols (A16)."""
    n, distinct, words = metrics["n"], metrics["distinct"], metrics["mean_words"]
    print(f"\n{name}: {n} studies, {distinct} different reports ({distinct / n:.0%}), "
          f"{words['predictions']:.1f} words a report (references {words['references']:.1f})")
    scored = [("model", metrics), ("best constant report", metrics["constant"])]
    scored = [(title, row) for title, row in scored if row]
    paper = metrics["paper"] or {}
    rows = [*scored, ("paper, VDGen", paper)]
    rows += [(f"{title}, cut references", row["cut_references"])
             for title, row in scored if "cut_references" in row]
    lines = [(title, [row.get(key) for key in METRICS]) for title, row in rows]
    ends = zip(*(metrics["intervals"].get(key, (None, None)) for key in METRICS))
    lines[1:1] = zip(("  95 % interval from", "  to"), ends)
    print_table("", METRICS, lines)
    if "findings" in metrics:
        lines = [(key, [None, None, metrics["findings"][key]])
                 for key in ("macro_f1_frequent", "macro_f1_rare", "side", "extent")]
        print_table("findings", HEAD, label_lines(scored, "findings", each=True) + lines)
    if "clinical" in metrics:
        reading, size, mean = HEADLINE
        lines = label_lines(scored, "clinical", reading, size, each=True)
        if "clinical" in paper:
            lines.insert(0, ("paper, VDGen (average not stated)", paper["clinical"].values()))
        print_table(f"CheXbert, {size} labels, {reading}; headline: {mean}", HEAD, lines)
        lines = [label_lines([(" ".join(path), metrics)], "clinical", *path)
                 for path in product(READINGS, LABELS)]
        print_table("CheXbert, every average", HEAD[:4], sum(lines, []))
    for note in metrics["notes"]:
        print("note:", note)


def label_lines(rows: list[tuple[str, dict]], *path: str, each: bool = False) -> list:
    """Rows of a table, of the part at that path of the metrics: its means; the first's labels."""
    lines, whole = [], reduce(getitem, path, rows[0][1])
    for title, row in rows:
        part, ends = (reduce(getitem, path, tree) for tree in (row, row["intervals"]))
        for mean in MEANS:
            within = "{:.3f} to {:.3f}".format(*ends[f"{mean}_f1"])
            lines.append((f"{mean}, {title}", [*(part[f"{mean}_{key}"] for key in PRF), within]))
    return lines + [(label, [*(row[key] for key in PRF), None, row["studies"]])
                    for label, row in (whole["each"].items() if each else ())]


def print_comparison(found: dict[str, dict]) -> None:
    """A row a score: both sides, their difference, its interval, and whether 0 lies outside."""
    rows = []
    for name, row in found.items():
        low, high = row["interval"]
        rows.append((name, [f"{row['a']:.4f}", f"{row['b']:.4f}", f"{row['difference']:+.4f}",
                            f"[{low:+.4f}, {high:+.4f}]", "yes" if row["excludes_0"] else "no"]))
    print_table("", ("A", "B", "A - B", "95 % interval", "excludes 0"), rows)


# An evaluation ------------------------------------------------------------------------------------

def write_reports(model: VDGen,
                  studies: Sequence[Study]) -> tuple[dict[str, str], dict[str, list[float]]]:
    """Eq. 7 for every study, with a progress bar: {id: report}, and {id: h}."""
    data, size = model.config.data, model.config.train.eval_batch_size
    dataset = ReportDataset(studies, data, model.image_size, model.tokenizer)
    rank, world = ranks()
    batches = torch.arange(len(studies)).split(size)  # the same for any number of ranks
    share = [batch.tolist() for batch in batches[rank::world]]
    was_training, reports, visual_embeds = model.training, {}, {}
    model.eval()
    for batch in tqdm(loader(dataset, share, data.num_workers, model.device), desc="generate",
                      unit="batch", leave=False):
        texts, embeds = model.generate(batch["images"], batch["view_counts"])
        reports |= zip(batch["ids"], texts)
        visual_embeds |= zip(batch["ids"], embeds.tolist())
    model.train(was_training)
    if world > 1:
        parts = [None] * world
        torch.distributed.all_gather_object(parts, (reports, visual_embeds))
        for some_reports, some_embeds in parts:
            reports |= some_reports
            visual_embeds |= some_embeds
    return reports, visual_embeds


def results_name(checkpoint: Path, split: str) -> str:
    """What an evaluation's files begin with: the split for best.pt, `last_<split>` for last.pt."""
    return split if checkpoint.stem == "best" else f"{checkpoint.stem}_{split}"


def made_of(model: VDGen, split: str, studies: Sequence[Study]) -> dict:
    """Weights, decoding and data of an evaluation, as its metrics keep them."""
    return {"split": split, "step": model.step, "generate": asdict(model.config.generate),
            "precision": model.config.train.precision, "studies": digest(studies), "clean": False}


def made_before(path: Path) -> dict:
    """`made_of` of the `<name>_metrics.json` at that path; {} if there is none."""
    return json.loads(path.read_text(encoding="utf-8"))["made_of"] if path.is_file() else {}


def require_place(path: Path, made: dict) -> None:
    """Before anything is generated: `<name>_metrics.json` can be written, and replaces no other."""
    trial = path.with_suffix(".trial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink(missing_ok=True)  # another rank may have been faster
    except OSError as error:
        raise OSError(f"cannot write into {path.parent} ({error.strerror}); --out FOLDER names "
                      "another") from None
    old = made_before(path)
    for key in {**old, **made} if old else ():
        if old.get(key) != made.get(key):
            raise InputError(f"{path} is another result: its {key} is {old.get(key)}, not "
                             f"{made.get(key)}; --name NAME keeps both")


def evaluate(model: VDGen, split: str, splits: dict[str, Sequence[Study]], folder: Path,
             name: str | None = None, written: tuple[dict, dict] | None = None,
             chexbert: Path | None = None) -> dict:
    """Generate (unless `written` holds what `write_reports` returned) and score one split.

    `name`: what the files begin with; default: the split. Returns the metrics; {} on ranks after
    the first.
    """
    name, studies = name or split, splits[split]
    reports, visual_embeds = written or write_reports(model, studies)
    if ranks()[0]:
        return {}
    limit, tokenizer = model.config.data.reference_cut_tokens, model.tokenizer
    rows = rows_of(studies)
    points = principal_plane(np.array([visual_embeds[row["id"]] for row in rows]))
    for row, point in zip(rows, points):
        row["prediction"] = reports[row["id"]]
        row["visual_pca"] = [round(float(value), 5) for value in point]
        ids = tokenizer(row["reference"], add_special_tokens=False).input_ids[:limit]
        row["reference_cut"] = tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
    write_whole(folder / f"{name}_predictions.jsonl", "".join(lines))
    made = made_of(model, split, studies)
    return write_results(folder, name, rows, model.config, splits, made, chexbert)


def rows_of(studies: Sequence[Study]) -> list[dict]:
    return [{"id": study.id, "reference": study.report, "image_path": list(study.image_paths)}
            for study in studies]


def write_results(folder: Path, name: str, rows: list[dict], config: Config,
                  splits: dict[str, Sequence[Study]], made: dict, chexbert: Path | None) -> dict:
    """Score, print, and write `<name>_metrics.json` and `<name>_report.html`."""
    spec = read_findings(config.data, [row["id"] for row in rows])
    label = chexbert_labeller(chexbert) if chexbert else None
    train_reports = [study.report for study in splits["train"]]
    metrics = measure(rows, config, made["split"], train_reports, spec, label)
    studies = splits["train"] or splits[made["split"]]
    metrics["sections"] = studies[0].sections if studies else None
    if metrics["sections"]:  # A19: scores of different sections do not compare
        metrics["notes"].append(f"reports: the sections {metrics['sections']} (A19)")
    metrics["made_of"] = made
    text = json.dumps(metrics, indent=1, allow_nan=False)
    write_whole(folder / f"{name}_metrics.json", text + "\n")

    pairs = [(row["prediction"], row["reference"]) for row in rows]
    rouge, cider = text_statistics(pairs)[-2:].tolist()
    scored = [row | {"rouge_l": r, "cider": c} for row, r, c in zip(rows, rouge, cider)]
    classes = label and (lambda text: dict(zip(CONDITIONS, label([text])[0])))
    shown = {"split": made["split"], "names": METRICS, "config": config.to_dict()}
    draw_page(folder / f"{name}_report.html", scored, Path(config.data.root) / "images",
              shown | {"metrics": metrics}, spec, classes)
    print_metrics(metrics, name)
    return metrics


# Files of predictions -----------------------------------------------------------------------------

def read_predictions(path: Path) -> list[dict]:
    """The rows of a `<name>_predictions.jsonl`; or {"id", "prediction"} of a JSON {id: report}.

    R2GenGPT and its heirs write {id: [report]}. Raises FileNotFoundError, or InputError for
    another file.
    """
    expected = "expected a JSON {id: report}, or one JSON object a line with id and prediction"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of predictions")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            rows = [{"id": name, "prediction": its[0] if isinstance(its, list) and its else its}
                    for name, its in json.loads(text).items()]
        else:  # a text may hold Unicode's own line ends
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        for n, row in enumerate(rows, 1):
            if not isinstance(row["id"], str) or not isinstance(row["prediction"], str):
                raise InputError(f"number {n} is {row!r:.100}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: {expected}; got {type(error).__name__}: {error}") from None
    names = Counter(row["id"] for row in rows)
    if not rows or len(names) < len(rows):
        raise InputError(f"{path}: {len(rows)} predictions of {len(names)} studies; {expected}, "
                         "each id once")
    return rows


def read_files(args: argparse.Namespace, config: Config | None,
               splits: dict[str, Sequence[Study]]) -> dict[Path, list[dict]]:
    """{path: rows} of all files, in one order, each row with its reference; cleaned by --clean.

    The references are those of the first file that holds them; of the data, if --split names one
    or no file holds any. Raises InputError where a file is of other studies or references.
    """
    files = {path: read_predictions(path) for path in (*args.predictions, *(args.against or ()))}
    holders = [path for path, rows in files.items() if all("reference" in row for row in rows)]
    source = holders[0] if holders and not args.split else choose_split(splits, args.split)
    known = {row["id"]: row for row in files.get(source) or rows_of(splits[source])}
    for path, rows in files.items():
        wrong = known.keys() ^ {row["id"] for row in rows}
        wrong = wrong or {row["id"] for row in rows
                          if row.get("reference") not in (None, known[row["id"]]["reference"])}
        if wrong:
            raise InputError(f"{path} and {source}: {len(wrong)} studies, such as {min(wrong)!r}, "
                             "are in one only or have another reference")
        for row in rows if args.clean else ():
            row["prediction"] = CLEANING[config.data.dataset](row["prediction"])
        own = {row["id"]: row for row in rows}
        files[path] = [row | own[name] for name, row in known.items()]
    return files


def choose_split(splits: dict[str, Sequence[Study]], named: str | None) -> str:
    """--split; else test if there is one, else val. InputError where it has no studies."""
    split = named or ("test" if splits["test"] else "val")
    if not splits[split]:
        held = ", ".join(name for name, studies in splits.items() if studies) or "none"
        raise InputError(f"--split {split}: the data (--config, data.root) has only {held}")
    return split


def data_of(args: argparse.Namespace) -> tuple[Config | None, dict[str, Sequence[Study]]]:
    """The config of the data, --config or config.yaml beside the first file, and its studies.

    Without an annotation there are no studies; --against can do without a config.
    """
    path = args.config or args.predictions[0].with_name("config.yaml")
    none = dict.fromkeys(SPLITS, ())
    if not path.is_file():
        if args.against and not (args.config or args.set or args.clean):
            return None, none
        raise FileNotFoundError(f"{path}: no such file; --config names the config of the data")
    config = load_config(path, args.set)
    at_hand = (Path(config.data.root) / "annotation.json").is_file()
    return config, read_studies(config.data) if at_hand else none


def score_predictions(args: argparse.Namespace) -> None:
    """--predictions: score a file without a model."""
    path, (config, splits) = args.predictions[0], data_of(args)
    own = path.stem.removesuffix("_predictions")
    name, folder, made = args.name or own, args.out or path.parent, {}
    if path.name == f"{own}_predictions.jsonl":
        made = made_before(path.with_name(f"{own}_metrics.json"))
    split = args.split or made.get("split") or ("test" if splits["test"] else "val")
    made = (made or {"file": path.name}) | {"split": split, "clean": args.clean}
    require_place(folder / f"{name}_metrics.json", made)
    rows = read_files(args, config, splits)[path]
    write_results(folder, name, rows, config, splits, made, args.chexbert)


def score_against(args: argparse.Namespace) -> None:
    """--against: `compare` two settings, each of one file or of seeds; `<name>_against.json`."""
    ours, theirs, (config, splits) = args.predictions, args.against, data_of(args)
    files = read_files(args, config, splits)
    references = {row["id"]: row["reference"] for row in files[ours[0]]}
    spec = read_findings(config.data, references) if config else None
    label = chexbert_labeller(args.chexbert) if args.chexbert else None

    def statistics(path: Path) -> Statistics:
        reports = {row["id"]: row["prediction"] for row in files[path]}
        return study_statistics(reports, references, spec, label)
    found = compare(list(map(statistics, ours)), list(map(statistics, theirs)))
    about = {"a": list(map(str, ours)), "b": list(map(str, theirs)), "n": len(references)}
    name = args.name or ours[0].stem.removesuffix("_predictions")
    text = json.dumps(about | {"scores": nested(found)}, indent=1, allow_nan=False)
    write_whole((args.out or ours[0].parent) / f"{name}_against.json", text + "\n")
    print(f"{len(references)} studies; A: {', '.join(about['a'])}; B: {', '.join(about['b'])}")
    print_comparison(found)
    if 1 in (len(ours), len(theirs)):
        print("note: of a side of one file, what another seed would change is not in the intervals")


# What each mode uses: flags, and keys of --set.
OF_MODEL = ("model.", "data.", "generate.", "train.eval_batch_size", "train.precision")
USES = {
    "against": ("predictions config split chexbert clean name out set", "data."),
    "predictions": ("config split chexbert clean name out set", "data."),
    "images": ("checkpoint set", OF_MODEL),
    "checkpoint": ("split chexbert name out set", OF_MODEL),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="best.pt or last.pt of a run")
    source.add_argument("--predictions", nargs="+", type=Path, metavar="FILE",
                        help="<split>_predictions.jsonl of a run, or a JSON {id: report}")
    add = parser.add_argument
    add("--against", nargs="+", type=Path, metavar="FILE",
        help="compare --predictions with these; several files a side are seeds")
    add("--split", choices=SPLITS, help="default: test if there is one, else val")
    add("--chexbert", type=Path, help="chexbert.pth: clinical efficacy (Table 3)")
    add("--images", nargs="+", type=Path, help="the views of one study")
    add("--config", type=Path, help="of the data; default: config.yaml beside --predictions")
    add("--clean", action="store_true", help="clean predictions as the references are (A15)")
    add("--name", help="what the files begin with; default: the split")
    add("--out", type=Path, metavar="FOLDER", help="default: beside what is scored")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="override the config")
    args = parser.parse_args()
    mode = next(mode for mode in USES if getattr(args, mode))
    flags, keys = USES[mode]
    unused = [flag for flag, value in vars(args).items()
              if value and flag not in (mode, *flags.split())]
    unused += [f"set {key}" for key in args.set if not key.startswith(keys)]
    if unused:
        raise InputError(f"--{unused[0]}: of no use with --{mode}")
    if mode == "predictions" and len(args.predictions) > 1:
        raise InputError("--predictions: several files only with --against")
    if args.chexbert and not args.chexbert.is_file():
        raise FileNotFoundError(f"--chexbert {args.chexbert}: no such file")
    return args


def main() -> None:
    args = parse_arguments()
    if args.predictions:
        return score_against(args) if args.against else score_predictions(args)
    for problem in filter(None, map(image_problem, args.images or [])):
        raise InputError(problem)
    join_ranks()
    model = load_checkpoint(args.checkpoint, args.set)
    if args.images:
        views = torch.stack([read_image(path, model.image_size) for path in args.images])
        reports, _ = model.generate(views, [len(views)])
        return print(reports[0])
    build_demo_if_missing(model.config.data)
    splits = read_studies(model.config.data)
    split = choose_split(splits, args.split)
    folder = args.out or args.checkpoint.parent
    name = args.name or results_name(args.checkpoint, split)
    require_place(folder / f"{name}_metrics.json", made_of(model, split, splits[split]))
    evaluate(model, split, splits, folder, name, chexbert=args.chexbert)


if __name__ == "__main__":
    end_in_one_line(main)
