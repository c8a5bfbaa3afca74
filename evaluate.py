"""Generate the reports of a split, score them, and write what was found (Sec. 4.1.3, Table 1).

    python evaluate.py --checkpoint runs/iu_xray/best.pt [--split test] [--chexbert chexbert.pth]
    python evaluate.py --checkpoint runs/mimic_cxr/best.pt --config configs/iu_xray.yaml --name iu
    python evaluate.py --predictions runs/iu_xray/test_predictions.jsonl    # again, without a model
    python evaluate.py --predictions theirs.json --config configs/iu_xray.yaml         # {id: text}
    python evaluate.py --predictions A.jsonl [A2.jsonl ...] --against B.jsonl [B2.jsonl ...]
    python evaluate.py --checkpoint runs/iu_xray/best.pt --images frontal.png lateral.png

The second takes data and decoding from another config; the last prints one report. The scores equal
pycocoevalcap's on the same strings. References are cleaned when the data is read; predictions are
scored as they are; --clean cleans files of others. A predictions file is never replaced.
"""
import argparse
import dataclasses
import json
import math
import random
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, reduce
from importlib.util import find_spec
from itertools import product, zip_longest
from operator import getitem
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from nltk.util import ngrams
from tqdm import tqdm

from configs import Config, InputError, load_config
from configs.chexbert import (CONDITIONS, LABELS, READINGS, chexbert_labeller,
                              chexbert_matrices)
from configs.files import SPLITS, image_problem, read_json, read_predictions, write_whole
from configs.findings import findings_details, findings_matrices, read_findings
from configs.report import draw_page, principal_plane
from data import (CLEANING, ReportDataset, Study, build_demo_if_missing, digest, end_in_one_line,
                  loader, read_image, read_studies)
from model import VDGen, join_ranks, leave_ranks, load_checkpoint, ranks

BLEUS = ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4")
PAPER = {  # Tables 1 and 3, the rows of VDGen; all on the test split
    "iu_xray": {"BLEU_1": 0.491, "BLEU_2": 0.325, "BLEU_3": 0.230, "BLEU_4": 0.169,
                "METEOR": 0.195, "ROUGE_L": 0.362, "CIDEr": 0.386},
    "mimic_cxr": {"BLEU_1": 0.418, "BLEU_2": 0.274, "BLEU_3": 0.190, "BLEU_4": 0.136,
                  "METEOR": 0.164, "ROUGE_L": 0.301, "CIDEr": 0.162,
                  "clinical": {"precision": 0.426, "recall": 0.397, "f1": 0.402}},
}
HEADLINE = ("uncertain_negative", "14", "macro")  # A17: as R2Gen, whose rows Table 3 starts from
PRF = ("precision", "recall", "f1")
HEAD = (*PRF, "95 % of F1", "studies")
MEANS = ("micro", "macro", "weighted", "example")
RESAMPLES, TAIL = 1000, 25  # sets of resampled studies; 2.5 % of them on each side of an interval
METEOR_SECONDS = 600  # for a corpus
# Five letters of Thai, Lao, Burmese, Khmer, Japanese or Chinese, which write no blanks.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]{5}")


# The text scores ----------------------------------------------------------------------------------

@lru_cache(maxsize=100_000)
def _ngram_counts(text: str) -> tuple[Counter, ...]:
    """Counts of the 1-, 2-, 3- and 4-grams of a text."""
    words = text.split()
    return tuple(Counter(ngrams(words, n)) for n in range(1, 5))


def bleu_statistics(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """(10, N): right 1- to 4-grams (clipped), written 1- to 4-grams, words of either text."""
    columns = []
    for prediction, reference in zip(predictions, references):
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

    def __init__(self, references: Sequence[str]):
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

    def each(self, predictions: Sequence[str]) -> list[float]:
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


# The scores that are means over studies: functions of N predictions and N references to N values.
# Another one is one line more; metrics, intervals, --against, tables and page take it from here.
EACH: dict[str, Callable[[Sequence[str], Sequence[str]], Sequence[float]]] = {
    "ROUGE_L": lambda predictions, references: list(map(rouge_l, predictions, references)),
    "CIDEr": lambda predictions, references: CiderD(references).each(predictions),
}


def score_names() -> tuple[str, ...]:
    """The text scores, in the order of the tables."""
    return (*BLEUS, "METEOR", *EACH)


def scores_of_each(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """(len(EACH), N): every score of EACH for each study."""
    return np.array([function(predictions, references) for function in EACH.values()], dtype=float)


@contextmanager
def meteor_program() -> Iterator[Callable[[dict, dict], dict[str, float]]]:
    """A function of predictions and references: {"METEOR": METEOR 1.5 (Denkowski and Lavie, 2014)}.

    All calls share one Java program. They return {} without Java or pycocoevalcap, and once the
    program has failed or taken METEOR_SECONDS for a corpus.
    """
    if shutil.which("java") is None or find_spec("pycocoevalcap") is None:
        yield lambda predictions, references: {}
        return
    from pycocoevalcap.meteor.meteor import Meteor
    program = Meteor()

    def in_lines(texts: dict[str, str]) -> dict[str, list[str]]:
        """A line is a request, and ||| parts its texts."""
        return {name: [" ".join(text.replace("|||", "").split())] for name, text in texts.items()}

    def meteor(predictions: dict[str, str], references: dict[str, str]) -> dict[str, float]:
        watchdog = threading.Timer(METEOR_SECONDS, program.meteor_p.kill)
        watchdog.start()
        try:
            return {"METEOR": program.compute_score(in_lines(references), in_lines(predictions))[0]}
        except (OSError, ValueError):  # a pipe without a reader, an empty answer
            return {}
        finally:
            watchdog.cancel()
            if program.lock.locked():  # an error left it so, and the next call waits for it
                program.lock.release()
    try:
        yield meteor
    finally:
        program.meteor_p.kill()
        with suppress(OSError):  # what was not read; `Meteor.__del__` would complain of it
            program.meteor_p.stdin.close()


def score(predictions: dict[str, str], references: dict[str, str],
          meteor: bool = True) -> dict[str, float]:
    """Corpus BLEU-1..4, METEOR 1.5, ROUGE-L and CIDEr-D, one reference a study: pycocoevalcap's.

    Args:
        predictions, references: {study id: text}, scored as they are, words split at blanks.
        meteor: False leaves METEOR out.
    Returns:
        {name: value} for `score_names`; CIDEr from 0 to 10, the others from 0 to 1.
    Raises:
        ValueError: no study, or not the same ids on both sides.
    """
    if not references or predictions.keys() != references.keys():
        raise ValueError(f"score: got {len(predictions)} predictions for {len(references)} "
                         "references; expected the same ids, at least one")
    scores = scores_of(study_statistics(predictions, references))
    if not meteor:
        return scores
    with meteor_program() as meteor_1_5:
        return scores | meteor_1_5(predictions, references)


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
        texts = [text] * len(sample)
        bleu_4 = bleu_scores(bleu_statistics(texts, sample).sum(axis=1))[3]
        return bleu_4 + np.mean(cider.each(texts))
    return max(tqdm(candidates, desc="best constant", leave=False), key=value)


# Clinical efficacy (Table 3), and findings for data that comes with findings.json -----------------

def precision_recall_f1(both: np.ndarray, named: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(3, ...) from three counts, as 2 both / (named + true) for F1; 0 / 0 is 0, as in R2Gen."""
    return np.array([both / np.maximum(named, 1), both / np.maximum(true, 1),
                     2 * both / np.maximum(named + true, 1)])


def label_statistics(named: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(3 L + 3, N) of (N, L) bool: each label named and true, named, true; P, R, F1 of a study."""
    both = named & true
    of_study = precision_recall_f1(both.sum(axis=1), named.sum(axis=1), true.sum(axis=1))
    return np.vstack([both.T, named.T, true.T, of_study])


def label_scores(sums: np.ndarray, studies: int) -> dict[str, np.ndarray]:
    """Precision, recall and F1 by every mean (A17), from sums of `label_statistics`.

    micro: of all pairs of study and label; macro: mean over labels; weighted: the same, by the
    number of studies that have the label; example: mean over studies.
    """
    both, named, true = np.split(sums[:-3], 3)
    each = precision_recall_f1(both, named, true)
    micro = precision_recall_f1(both.sum(axis=0), named.sum(axis=0), true.sum(axis=0))
    weighted = (each * true).sum(axis=1) / np.maximum(true.sum(axis=0), 1)
    means = np.concatenate([micro, each.mean(axis=1), weighted, sums[-3:] / studies])
    return dict(zip((f"{mean}_{key}" for mean, key in product(MEANS, PRF)), means))


def each_label(statistics: np.ndarray, labels: Sequence[str]) -> dict[str, dict]:
    """{label: precision, recall, f1, and the studies that have it}, of `label_statistics`."""
    both, named, true = np.split(statistics[:-3].sum(axis=1), 3)
    columns = [*precision_recall_f1(both, named, true).tolist(), true.astype(int).tolist()]
    return {label: dict(zip((*PRF, "studies"), row)) for label, *row in zip(labels, *columns)}


# Scores of the corpus, their intervals, and comparisons -------------------------------------------

def study_statistics(predictions: dict[str, str], references: dict[str, str],
                     spec: dict | None = None, label: Callable | None = None) -> dict:
    """{part: (K, N)}: K numbers of each of N studies, from whose sums all scores follow.

    `text`: the rows of `bleu_statistics`, then of `scores_of_each`; `findings`, with findings.json,
    and `clinical.<reading>.<size>` (A17), with CheXbert: those of `label_statistics`.
    """
    texts = {name: predictions[name] for name in references}
    ours, theirs = list(texts.values()), list(references.values())
    parts = {"text": np.vstack([bleu_statistics(ours, theirs), scores_of_each(ours, theirs)])}
    if spec:
        parts["findings"] = label_statistics(*findings_matrices(texts, spec))
    if label:
        for part, matrices in chexbert_matrices(label(ours), label(theirs)).items():
            parts[f"clinical.{part}"] = label_statistics(*matrices)
    return parts


def scores_of(statistics: dict, draws: np.ndarray | None = None) -> dict:
    """{"BLEU_1", .., "findings.micro_f1", ..} of all studies, or (R,) each of `resamples`.

    The labels' precision and recall get no interval, and are left out of resamples.
    """
    scores = {}
    for part, rows in statistics.items():
        sums, studies = rows.sum(axis=1) if draws is None else rows @ draws, rows.shape[1]
        if part == "text":
            values = [*bleu_scores(sums[:10]), *(sums[10:] / studies)]
            scores |= zip((*BLEUS, *EACH), values)
            continue
        for key, value in label_scores(sums, studies).items():
            if draws is None or key.endswith("f1"):
                scores[f"{part}.{key}"] = value
    return scores if draws is not None else {name: float(x) for name, x in scores.items()}


def resamples(studies: int) -> np.ndarray:
    """(N, R): how often each study is in each of R sets of N studies drawn with replacement."""
    rng = np.random.default_rng(0)
    draws = (rng.integers(studies, size=studies) for _ in range(RESAMPLES))
    return np.array([np.bincount(draw, minlength=studies) for draw in draws], dtype=float).T


def interval(values: np.ndarray) -> list[float]:
    """[low, high], the middle 95 % of (R,) values: as many lie below low as above high."""
    return np.sort(values)[[TAIL - 1, -TAIL]].tolist()


def intervals(statistics: dict) -> dict:
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


def compare(ours: list[dict], theirs: list[dict]) -> dict[str, dict]:
    """The difference of two settings in every score but METEOR, and its paired 95 % interval.

    Both sides are scored on the same resamples of studies. Several files a side are seeds of one
    setting: a score is their mean, and the files are resampled too.

    Args: a side's files; a column is the same study in all of them.
    Returns: {score: {"a", "b", "difference": a - b, "interval": [low, high], "excludes_0"}}.
    """
    draws = resamples(ours[0]["text"].shape[1])
    a, b = (mean_scores(files, [1 / len(files)] * len(files)) for files in (ours, theirs))
    # The better side has seed 2, the other one seed 1: swapped sides swap the sign and no more.
    a_drawn = mean_scores(ours, file_weights(len(ours), 1 + (a["BLEU_4"] > b["BLEU_4"])), draws)
    b_drawn = mean_scores(theirs, file_weights(len(theirs), 1 + (b["BLEU_4"] > a["BLEU_4"])), draws)
    found = {}
    for name in a_drawn:
        low, high = interval(a_drawn[name] - b_drawn[name])
        found[name] = {"a": a[name], "b": b[name], "difference": a[name] - b[name],
                       "interval": [low, high], "excludes_0": low > 0 or high < 0}
    return found


def mean_scores(files: list[dict], weights: Sequence,
                draws: np.ndarray | None = None) -> dict:
    """`scores_of` each file, summed with its weight: a number, or one for each resample."""
    means = {}
    for weight, statistics in zip(weights, files):
        for name, value in scores_of(statistics, draws).items():
            means[name] = means.get(name, 0) + weight * value
    return means


def file_weights(n: int, seed: int) -> np.ndarray:
    """(n, R): the weights of n files whose mean is that of n files drawn anew in each resample.

    That mean has the variance (n - 1) / n * s^2 / n, where s^2 is the files' unbiased one, and
    should have s^2 / n: with w' the share of a file among those drawn, its weight is
    w = 1/n + sqrt(n / (n - 1)) * (w' - 1/n).
    """
    share = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).T / n
    return 1 / n + math.sqrt(n / max(n - 1, 1)) * (share - 1 / n)


# All scores of an evaluation, and their tables ----------------------------------------------------

def tables(texts: dict[str, str], references: dict[str, str], cut: dict[str, str],
           spec: dict | None, label: Callable | None, meteor: Callable) -> dict:
    """All scores of {study id: text}, with their intervals; `cut`: the cut references, or {}."""
    statistics = study_statistics(texts, references, spec, label)
    scores = scores_of(statistics) | meteor(texts, references)
    for part in statistics.keys() - {"text"}:
        labels = LABELS.get(part.rpartition(".")[2]) or spec["phrases"]
        scores[f"{part}.each"] = each_label(statistics[part], labels)
    counts = {"n": len(texts), "distinct": len(set(texts.values()))}
    found = counts | nested(scores) | {"intervals": intervals(statistics)}
    if cut:
        found["cut_references"] = counts | score(texts, cut, meteor=False) | meteor(texts, cut)
    if spec:
        found["findings"] |= findings_details(texts, spec, found["findings"]["each"])
    if label:
        found["clinical"]["headline"] = HEADLINE
    return found


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
    constant = None
    with meteor_program() as meteor:
        judges = references, cut, spec, label, meteor
        metrics = tables(predictions, *judges)
        if train_reports:
            text = best_constant(train_reports)
            constant = tables(dict.fromkeys(predictions, text), *judges) | {"text": text}
    texts = {"predictions": predictions, "references": references, "cut_references": cut}
    words = {name: " ".join(part.values()).split() for name, part in texts.items() if part}
    means = {name: len(part) / len(rows) for name, part in words.items()}
    metrics |= {"constant": constant, "paper": PAPER.get(config.data.dataset), "mean_words": means}
    return metrics | {"notes": notes_on(metrics, rows, config, split)}


def notes_on(metrics: dict, rows: list[dict], config: Config, split: str) -> list[str]:
    """Why a score is not there, or does not compare."""
    broken = sum("\n" in row["prediction"] or "\r" in row["prediction"] for row in rows)
    unspaced = sum(bool(UNSPACED.search(row["reference"])) for row in rows)
    foreign = set().union(*(row["prediction"] for row in rows))
    foreign -= set().union(*(row["reference"] for row in rows))
    strange = {c for c in foreign if c.isupper() or not (c.isalnum() or c.isspace())}
    uncleaned = sum(not strange.isdisjoint(row["prediction"]) for row in rows)
    notes = [
        ("METEOR" not in metrics, "METEOR: needs Java and `pip install pycocoevalcap`; is ended "
         f"after {METEOR_SECONDS} seconds (looping text can keep it busy for ever)"),
        (metrics["paper"] and split != "test",
         f"paper: its row is of the test split, these scores are of {split}"),
        (metrics["constant"] is None,
         f"constant: needs the training reports; {config.data.root} holds none"),
        ("cut_references" not in metrics, "cut_references: need the tokenizer of the LLM"),
        (len(rows) == 1, "CIDEr: 0 for a single study: its words are in every reference (idf 0)"),
        (broken, f"predictions: {broken} hold line breaks; ROUGE-L splits words at blanks only"),
        (unspaced, f"references: {unspaced} hold words that no blanks part; all scores split words "
         "at blanks, so put blanks between words, in the predictions too"),
        (uncleaned and "cut_references" not in metrics,  # not of files of ours
         f"predictions: {uncleaned} hold capitals or punctuation that no reference has; "
         "--clean cleans a file of others as the references are (A15)"),
    ]
    return [note for holds, note in notes if holds]


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
    scored = {"model": metrics, "best constant report": metrics["constant"]}
    scored = {title: row for title, row in scored.items() if row}
    paper, names = metrics["paper"] or {}, score_names()
    rows = scored | ({"paper, VDGen": paper} if paper else {})
    rows |= {f"{title}, cut references": row["cut_references"]
             for title, row in scored.items() if "cut_references" in row}
    lines = [(title, list(map(row.get, names))) for title, row in rows.items()]
    ends = [metrics["intervals"].get(key, (None, None)) for key in names]
    lines[1:1] = zip(("  95 % interval from", "  to"), zip(*ends))
    print_table("", names, lines)
    if "findings" in metrics:
        part = metrics["findings"]
        lines = mean_lines(scored, "findings") + label_lines(part)
        for key in ("macro_f1_frequent", "macro_f1_rare", "side", "extent"):
            lines.append((key, [None, None, part[key]]))
        print_table("findings", HEAD, lines)
    if "clinical" in metrics:
        reading, size, mean = HEADLINE
        lines = mean_lines(scored, f"clinical.{reading}.{size}")
        lines += label_lines(metrics["clinical"][reading][size])
        if "clinical" in paper:
            lines.insert(0, ("paper, VDGen (average not stated)", paper["clinical"].values()))
        print_table(f"CheXbert, {size} labels, {reading}; headline: {mean}", HEAD, lines)
        lines = []
        for reading, size in product(READINGS, LABELS):
            lines += mean_lines({f"{reading} {size}": metrics}, f"clinical.{reading}.{size}")
        print_table("CheXbert, every average", HEAD[:4], lines)
    for note in metrics["notes"]:
        print("note:", note)


def mean_lines(scored: dict[str, dict], part: str) -> list:
    """Rows of a table: precision, recall and F1 by every mean, of a part "a.b"."""
    lines = []
    for title, row in scored.items():
        values, ends = (reduce(getitem, part.split("."), tree) for tree in (row, row["intervals"]))
        for mean in MEANS:
            cells, (low, high) = [values[f"{mean}_{key}"] for key in PRF], ends[f"{mean}_f1"]
            lines.append((f"{mean}, {title}", [*cells, f"{low:.3f} to {high:.3f}"]))
    return lines


def label_lines(part: dict) -> list:
    """Rows of a table: precision, recall and F1 of every label, and the studies that have it."""
    return [(label, [*map(row.get, PRF), None, row["studies"]])
            for label, row in part["each"].items()]


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
    read = loader(dataset, share, data.num_workers, model.device)
    for batch in tqdm(read, "generate", len(share), unit="batch", leave=False):
        texts, embeds = model.generate(batch["images"], batch["view_counts"])
        reports |= zip(batch["ids"], texts)
        visual_embeds |= zip(batch["ids"], embeds.tolist())
    model.train(was_training)
    if world > 1:
        parts = [None] * world
        torch.distributed.all_gather_object(parts, (reports, visual_embeds))
        for part in parts:
            reports |= part[0]
            visual_embeds |= part[1]
    return reports, visual_embeds


def results_name(checkpoint: Path, split: str) -> str:
    """What an evaluation's files begin with: the split for best.pt, `last_<split>` for last.pt."""
    return split if checkpoint.stem == "best" else f"{checkpoint.stem}_{split}"


def require_writable(folder: Path) -> None:
    """OSError, before anything is computed, where no file could be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"cannot write into {folder} ({error.strerror}); --out FOLDER names "
                      "another") from None


def require_none_there(path: Path) -> None:
    """A predictions file holds hours of work: no other evaluation replaces it."""
    if path.exists():
        raise InputError(f"{path} is there already; --name NAME or --out FOLDER keeps both")


def evaluate(model: VDGen, split: str, splits: dict[str, Sequence[Study]], folder: Path,
             name: str | None = None, replace: bool = False, chexbert: Path | None = None) -> dict:
    """Generate and score one split: `<name>_predictions.jsonl`, `_metrics.json`, `_report.html`.

    Args:
        name: what the files begin with; default: the split.
        replace: of train.py. Without it, predictions that are there raise InputError.
    Returns: the metrics; {} on ranks after the first.
    """
    name, studies = name or split, splits[split]
    path = folder / f"{name}_predictions.jsonl"
    if not replace:
        require_none_there(path)
    require_writable(folder)
    reports, visual_embeds = write_reports(model, studies)
    if ranks()[0]:
        return {}
    config, tokenizer = model.config, model.tokenizer
    rows = rows_of(studies)
    points = principal_plane(np.array([visual_embeds[row["id"]] for row in rows]))
    for row, point in zip(rows, points.round(5).tolist()):
        row |= {"prediction": reports[row["id"]], "visual_pca": point}
        ids = tokenizer(row["reference"], add_special_tokens=False).input_ids
        ids = ids[:config.data.reference_cut_tokens]
        row["reference_cut"] = tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()
    if not replace:  # another evaluation may have been faster
        require_none_there(path)
    write_whole(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    made = {"split": split, "step": model.step, "generate": dataclasses.asdict(config.generate),
            "precision": config.train.precision, "studies": digest(studies), "clean": False}
    return write_results(folder, name, rows, config, splits, made, chexbert)


def rows_of(studies: Sequence[Study]) -> list[dict]:
    return [{"id": study.id, "reference": study.report, "image_path": list(study.image_paths)}
            for study in studies]


def write_results(folder: Path, name: str, rows: list[dict], config: Config,
                  splits: dict[str, Sequence[Study]], made: dict, chexbert: Path | None) -> dict:
    """Score, print, and write `<name>_metrics.json` and `<name>_report.html`.

    `made`: the record of weights, decoding, data and cleaning that the metrics keep as `made_of`.
    """
    spec = read_findings(config.data, [row["id"] for row in rows])
    label = chexbert_labeller(chexbert) if chexbert else None
    train_reports = [study.report for study in splits["train"]]
    metrics = measure(rows, config, made["split"], train_reports, spec, label)
    studies = splits["train"] or splits[made["split"]]
    metrics["sections"] = studies[0].sections if studies else None
    if metrics["sections"]:  # A19: scores of different sections do not compare
        metrics["notes"].append(f"reports: the sections {metrics['sections']} (A19)")
    metrics["made_of"] = made | {"chexbert": chexbert and chexbert.name}
    text = json.dumps(metrics, indent=1, allow_nan=False)
    write_whole(folder / f"{name}_metrics.json", text + "\n")

    predictions = [row["prediction"] for row in rows]
    references = [row["reference"] for row in rows]
    values = scores_of_each(predictions, references).T.tolist()
    scored = [row | {"scores": dict(zip(EACH, its))} for row, its in zip(rows, values)]
    classes = label and (lambda text: dict(zip(CONDITIONS, label([text])[0])))
    shown = {"split": made["split"], "names": score_names(), "config": config.to_dict(),
             "metrics": metrics}
    images = Path(config.data.root) / "images"
    draw_page(folder / f"{name}_report.html", scored, images, shown, spec, classes)
    print_metrics(metrics, name)
    return metrics


# Files of predictions -----------------------------------------------------------------------------

def read_files(args: argparse.Namespace, config: Config | None,
               splits: dict[str, Sequence[Study]]) -> dict[Path, list[dict]]:
    """{path: rows} of all files, in one order, each row with its reference.

    A file of others holds no references; --clean cleans it. References are those of the first file
    that holds them; of the data, if --split names one or no file holds any.
    """
    files = {path: read_predictions(path) for path in (*args.predictions, *(args.against or ()))}
    ours = [path for path, rows in files.items() if "reference" in rows[0]]
    if args.clean and len(ours) == len(files):
        raise InputError(f"--clean: {ours[0]} holds references: it is ours, and is scored as "
                         "decoded; --clean is for files of others")
    source = ours[0] if ours and not args.split else choose_split(splits, args.split)
    known = {row["id"]: row for row in files.get(source) or rows_of(splits[source])}
    for path, rows in files.items():
        if args.clean and path not in ours:
            for row in rows:
                row["prediction"] = CLEANING[config.data.dataset](row["prediction"])
        own = {row["id"]: row for row in rows}
        wrong = known.keys() ^ own.keys()
        wrong = wrong or {name for name, row in known.items()
                          if own[name].get("reference", row["reference"]) != row["reference"]}
        if wrong:
            raise InputError(f"{path} and {source}: {len(wrong)} studies, such as {min(wrong)!r}, "
                             "are in one only or have another reference")
        files[path] = [row | own[name] for name, row in known.items()]
    return files


def choose_split(splits: dict[str, Sequence[Study]], named: str | None) -> str:
    """--split; else test if there is one, else val. InputError where it has no studies."""
    split = named or ("test" if splits["test"] else "val")
    if not splits[split]:
        raise InputError(f"--split {split}: the data (--config, data.root) has no such studies")
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
    rows, stem = read_files(args, config, splits)[path], path.stem.removesuffix("_predictions")
    name, folder = args.name or stem, args.out or path.parent
    require_writable(folder)
    made, before = {"file": path.name}, path.with_name(f"{stem}_metrics.json")
    if stem != path.stem and before.is_file():  # keep what it says of the generation
        made = read_json(before, "the metrics of an evaluation").get("made_of", made)
    split = args.split or made.get("split") or ("test" if splits["test"] else "val")
    made |= {"split": split, "clean": args.clean}
    write_results(folder, name, rows, config, splits, made, args.chexbert)


def score_against(args: argparse.Namespace) -> None:
    """--against: `compare` two settings, each of one file or of seeds; `<name>_against.json`."""
    ours, theirs, (config, splits) = args.predictions, args.against, data_of(args)
    files = read_files(args, config, splits)
    name = args.name or ours[0].stem.removesuffix("_predictions")
    folder = args.out or ours[0].parent
    require_writable(folder)
    references = {row["id"]: row["reference"] for row in files[ours[0]]}
    spec = read_findings(config.data, references) if config else None
    label = chexbert_labeller(args.chexbert) if args.chexbert else None

    def statistics(path: Path) -> dict:
        reports = {row["id"]: row["prediction"] for row in files[path]}
        return study_statistics(reports, references, spec, label)
    found = compare(list(map(statistics, ours)), list(map(statistics, theirs)))
    about = {"a": list(map(str, ours)), "b": list(map(str, theirs)), "n": len(references)}
    text = json.dumps(about | {"scores": nested(found)}, indent=1, allow_nan=False)
    write_whole(folder / f"{name}_against.json", text + "\n")
    print(f"{len(references)} studies; A: {', '.join(about['a'])}; B: {', '.join(about['b'])}")
    print_comparison(found)
    if 1 in (len(ours), len(theirs)):
        print("note: of a side of one file, what another seed would change is not in the intervals")


def score_checkpoint(args: argparse.Namespace) -> None:
    """--checkpoint: generate and score; with --config on its data and with its decoding."""
    of_both = [text for text in args.set if text.startswith(("data.", "generate."))]
    other = load_config(args.config, of_both) if args.config else None  # --set wins over both
    model = load_checkpoint(args.checkpoint, args.set)
    if other:
        model.config = dataclasses.replace(model.config, data=other.data, generate=other.generate)
        model.require_context()
    build_demo_if_missing(model.config.data)
    splits = read_studies(model.config.data)
    split = choose_split(splits, args.split)
    folder = args.out or args.checkpoint.parent
    name = args.name or results_name(args.checkpoint, split)
    evaluate(model, split, splits, folder, name, chexbert=args.chexbert)


def write_one(args: argparse.Namespace) -> None:
    """--images: print the report of one study."""
    for problem in filter(None, map(image_problem, args.images)):
        raise InputError(problem)
    model = load_checkpoint(args.checkpoint, args.set)
    views = torch.stack([read_image(path, model.image_size) for path in args.images])
    reports, _ = model.generate(views, [len(views)])
    print(reports[0])


# What each mode uses: flags, and keys of --set.
OF_MODEL = ("model.", "data.", "generate.", "train.eval_batch_size", "train.precision")
USES = {
    "against": ("predictions config split chexbert clean name out set", "data."),
    "predictions": ("config split chexbert clean name out set", "data."),
    "images": ("checkpoint set", OF_MODEL),
    "checkpoint": ("config split chexbert name out set", OF_MODEL),
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
    add("--config", type=Path, help="of the data, and with --checkpoint of the decoding; default: "
        "the run's own")
    add("--clean", action="store_true", help="clean files of others as references are (A15)")
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
    if args.against:
        return score_against(args)
    if args.predictions:
        return score_predictions(args)
    if args.images:
        return write_one(args)
    join_ranks()
    score_checkpoint(args)
    leave_ranks()


if __name__ == "__main__":
    end_in_one_line(main)
