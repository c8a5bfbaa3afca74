"""Generate the reports of a split, score them, and write what was found (Sec. 4.1.3, Table 1).

    python evaluate.py --checkpoint runs/iu_xray/best.pt [--split test] [--chexbert chexbert.pth]
    python evaluate.py --predictions runs/iu_xray/test_predictions.jsonl    # again, without a model
    python evaluate.py --predictions theirs.json --config configs/iu_xray.yaml         # {id: text}
    python evaluate.py --predictions A.jsonl [A2.jsonl ...] --against B.jsonl [B2.jsonl ...]
    python evaluate.py --checkpoint runs/iu_xray/best.pt --images frontal.png lateral.png

The last writes one report. The scores equal pycocoevalcap's on the same strings. References are
cleaned when the data is read; nothing here cleans.
"""
import argparse
import json
import math
import random
import re
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from nltk.util import ngrams
from tqdm import tqdm

from configs import Config, load_config, parse_config
from configs.findings import named_findings, named_in_each
from configs.report import write_page, write_whole
from data import (ReportDataset, Study, build_demo_if_missing, digest, end_in_one_line,
                  image_problem, loader, read_image, read_studies)
from model import (CONDITIONS, VDGen, chexbert_labeller, join_ranks, load_model, ranks,
                   read_checkpoint)

METRICS = ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "METEOR", "ROUGE_L", "CIDEr")
PAPER = {  # Tables 1 and 3, the rows of VDGen; all on the test split
    "iu_xray": dict(zip(METRICS, (0.491, 0.325, 0.230, 0.169, 0.195, 0.362, 0.386))),
    "mimic_cxr": dict(zip(METRICS, (0.418, 0.274, 0.190, 0.136, 0.164, 0.301, 0.162)))
    | {"clinical": {"precision": 0.426, "recall": 0.397, "f1": 0.402}},
}
FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")  # CheXpert's
LABELS = {"14": CONDITIONS, "13": CONDITIONS[:-1], "5": FIVE}
HEADLINE = ("uncertain_negative", "14", "macro")  # A17: as R2Gen, whose rows Table 3 starts from
MEANS = ("micro", "macro", "example")
RESAMPLES, TAIL = 1000, 25  # sets of resampled studies; 2.5 % of them on each side of an interval
METEOR_SECONDS = 600  # looping text can keep the aligner of METEOR busy for ever


# The scores ---------------------------------------------------------------------------------------

def score(predictions: dict[str, str], references: dict[str, str],
          meteor: bool = True) -> dict[str, float]:
    """Corpus BLEU-1..4, METEOR 1.5, ROUGE-L and CIDEr-D, one reference a study: pycocoevalcap's.

    Args:
        predictions, references: {study id: text}, scored as they are, words split at blanks.
        meteor: METEOR takes a Java process and some seconds; its key is missing without, or if Java
            is not there.
    Returns:
        the keys of METRICS; CIDEr from 0 to 10, the others from 0 to 1.
    Raises:
        ValueError: no study, or not the same ids on both sides.
    """
    if not references or predictions.keys() != references.keys():
        raise ValueError(f"score: got {len(predictions)} predictions for {len(references)} "
                         "references; expected the same ids, at least one")
    pairs = [(predictions[name], references[name]) for name in references]
    scores = text_totals(text_statistics(pairs))
    if meteor:
        with suppress(RuntimeError):  # `measure` says why
            scores["METEOR"] = meteor_1_5([pairs])[0]
    return scores


def text_statistics(pairs: list[tuple[str, str]]) -> np.ndarray:
    """(12, N): of each (prediction, reference) the numbers whose sums give a corpus's scores.

    The rows: the ten of `bleu_counts`, ROUGE-L, CIDEr-D, whose idf is that of all references here.
    """
    predictions, references = zip(*pairs)
    rouge = [rouge_l(*pair) for pair in pairs]
    return np.array([*bleu_counts(pairs), rouge, CiderD(references).each(predictions)])


def text_totals(statistics: np.ndarray) -> dict[str, float]:
    """BLEU-1..4, ROUGE-L and CIDEr-D of the corpus that `text_statistics` are of."""
    scores = text_scores(statistics.sum(axis=1), statistics.shape[1])
    return {name: float(value) for name, value in scores.items()}


def text_scores(sums: np.ndarray, studies: int) -> dict[str, np.ndarray]:
    """BLEU-1..4, ROUGE-L and CIDEr-D from sums of `text_statistics` over studies, (12, ...)."""
    *counts, rouge, cider = sums
    bleus = dict(zip(METRICS, bleu_of_counts(np.array(counts))))
    return bleus | {"ROUGE_L": rouge / studies, "CIDEr": cider / studies}


@lru_cache(maxsize=100_000)
def _ngram_counts(text: str) -> tuple[Counter, ...]:
    """Counts of the 1-, 2-, 3- and 4-grams of a text."""
    words = text.split()
    return tuple(Counter(ngrams(words, n)) for n in range(1, 5))


def bleu(pairs: list[tuple[str, str]]) -> list[float]:
    """Corpus BLEU-1..4 (Papineni et al., 2002) of (prediction, reference) pairs."""
    return [float(value) for value in bleu_of_counts(bleu_counts(pairs).sum(axis=1))]


def bleu_counts(pairs: list[tuple[str, str]]) -> np.ndarray:
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


def bleu_of_counts(counts: np.ndarray) -> np.ndarray:
    """BLEU-1..4, (4, ...), from sums of `bleu_counts`, (10, ...); coco-caption's 1e-15 and 1e-9."""
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

    def _vector(self, text: str) -> tuple[list[dict], list[float], int]:
        """For each n: weights and norm; and the number of bigrams."""
        weights, norms = [], []
        for counts in _ngram_counts(text):
            vector = {gram: count * self.idf.get(gram, self.log_studies)
                      for gram, count in counts.items()}
            weights.append(vector)
            norms.append(math.sqrt(sum(weight * weight for weight in vector.values())))
        return weights, norms, _ngram_counts(text)[1].total()

    def __call__(self, predictions: list[str]) -> float:
        """Mean over the studies."""
        return float(np.mean(self.each(predictions)))

    def each(self, predictions: list[str]) -> list[float]:
        """One value a study, in the order of the references."""
        vector = lru_cache(maxsize=1000)(self._vector)  # a constant report is one vector
        return [self._similarity(vector(text), reference)
                for text, reference in zip(predictions, self.references, strict=True)]

    @staticmethod
    def _similarity(ours, theirs, sigma: float = 6.0) -> float:
        """Of two results of `_vector`."""
        total = 0.0
        for our, their, our_norm, their_norm in zip(ours[0], theirs[0], ours[1], theirs[1]):
            dot = sum(min(w, their[gram]) * their[gram] for gram, w in our.items() if gram in their)
            total += dot / (our_norm * their_norm) if our_norm and their_norm else dot
        return 10 * total / 4 * math.exp(-((ours[2] - theirs[2]) ** 2) / (2 * sigma**2))


def meteor_1_5(corpora: list[list[tuple[str, str]]]) -> list[float]:
    """METEOR 1.5 (Denkowski and Lavie, 2014) of each list of (prediction, reference) pairs.

    By its own Java program, in one process for all of them: it loads its tables for seconds. It is
    ended whatever happens, after METEOR_SECONDS at the latest. Raises RuntimeError with the reason
    if Java or the program (in pycocoevalcap) is not there, or it failed.
    """
    package = find_spec("pycocoevalcap")
    jar = package and Path(package.submodule_search_locations[0]) / "meteor" / "meteor-1.5.jar"
    if shutil.which("java") is None or not jar or not jar.is_file():
        raise RuntimeError("needs Java and `pip install pycocoevalcap`; at least one of them is "
                           "not there")
    command = ["java", "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    process = subprocess.Popen(
        command, cwd=jar.parent, text=True, encoding="utf-8", bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    watchdog = threading.Timer(METEOR_SECONDS, process.kill)
    watchdog.start()

    def ask(line: str | None = None) -> str:
        if line is not None:
            process.stdin.write(line + "\n")
        answer = process.stdout.readline().strip()
        if not answer:
            raise BrokenPipeError
        return answer
    try:
        scores = []
        for pairs in corpora:
            texts = [[" ".join(text.replace("|||", "").split()) for text in pair] for pair in pairs]
            statistics = [ask(f"SCORE ||| {reference} ||| {prediction}")
                          for prediction, reference in texts]
            ask("EVAL ||| " + " ||| ".join(statistics))
            answers = [ask() for _ in pairs]  # the studies behind the first, then the corpus
            scores.append(float(answers[-1]))
        return scores
    except (BrokenPipeError, ValueError):
        when = "less than" if watchdog.is_alive() else "the limit of"
        raise RuntimeError(f"its program stopped after {when} {METEOR_SECONDS} seconds (looping "
                           f"text can keep it busy for ever)") from None
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


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
        return bleu([(text, reference) for reference in sample])[3] + cider([text] * len(sample))
    return max(tqdm(candidates, desc="best constant", leave=False), key=value)


# Clinical efficacy (Table 3), and findings for data that comes with findings.json -----------------

def precision_recall_f1(named: np.ndarray, true: np.ndarray, labels: list[str]) -> dict:
    """Precision, recall and F1 of (N, L) bool matrices, N studies, L labels; 0 / 0 is 0 as in R2Gen

    micro_*: of all pairs of study and label; macro_*: mean over labels; example_*: over studies;
    each: for every label, with the number of studies in which it is true.
    """
    def scores(axis: int | None) -> tuple[np.ndarray, ...]:
        both, ours, theirs = (named & true).sum(axis), named.sum(axis), true.sum(axis)
        return (both / np.maximum(ours, 1), both / np.maximum(theirs, 1),
                2 * both / np.maximum(ours + theirs, 1))
    keys = ("precision", "recall", "f1")
    found = {f"{mean}_{key}": float(np.mean(value)) for mean, axis in zip(MEANS, (None, 0, 1))
             for key, value in zip(keys, scores(axis))}
    each = zip(labels, *(value.tolist() for value in scores(0)), true.sum(0).tolist())
    return found | {"each": {label: dict(zip((*keys, "studies"), row)) for label, *row in each}}


def score_clinical(predictions: list[list[int]], references: list[list[int]]) -> dict:
    """Table 3 from CheXbert's classes, (N, 14) each: both readings of "uncertain" (A17).

    Returns: {"uncertain_negative" | "uncertain_positive": {"14" | "13" | "5": see
    `precision_recall_f1`}}; "13" is without No Finding. The headline, HEADLINE, is the macro
    average of 14 labels with uncertain as negative.
    """
    found: dict[str, dict] = {}
    for reading, size, *matrices in clinical_matrices(predictions, references):
        found.setdefault(reading, {})[size] = precision_recall_f1(*matrices, LABELS[size])
    return found


def clinical_matrices(predictions: list[list[int]], references: list[list[int]]):
    """For each reading of "uncertain" and group of labels: their keys; named, true: (N, L) bool."""
    ours, theirs = np.array(predictions), np.array(references)
    for reading, positive in (("uncertain_negative", [1]), ("uncertain_positive", [1, 3])):
        named, true = np.isin(ours, positive), np.isin(theirs, positive)
        for size, labels in LABELS.items():
            columns = [CONDITIONS.index(label) for label in labels]
            yield reading, size, named[:, columns], true[:, columns]


def read_findings(config: Config, names) -> dict | None:
    """findings.json of the data, if there is one: what studies hold, and phrases that name it."""
    path = Path(config.data.root) / "findings.json"
    if not path.is_file():
        return None
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        for group in (spec["phrases"], spec["sides"], spec["extents"]):
            for name, phrases in group.items():
                if not isinstance(phrases, list) or not phrases or not all(phrases):
                    raise ValueError(f"{name!r} has no list of phrases")
        named_findings("", spec)
        unknown = [name for name in names if name not in spec["studies"]]
        for held in spec["studies"].values():
            for finding in held:
                spec["phrases"][finding["finding"]], finding["side"], finding["extent"]
    except (ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise ValueError(f"{path}: expected `phrases`, `sides` and `extents`, regular expressions, "
                         "and in `studies` for each study a list of {finding, side, extent}; got "
                         f"{type(error).__name__}: {error}") from None
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} studies are not in it, such as {unknown[0]!r}; "
                         "it must hold all of them")
    return spec


def score_findings(predictions: dict[str, str], spec: dict) -> dict:
    """`precision_recall_f1` of findings, present or not.

    macro_f1_frequent and _rare: over the half of the findings with most studies, and the other (the
    long tail, Sec. 1). `side` and `extent` are apart: the share named right, of the findings that
    are there, were named, and have one.
    """
    named = named_in_each(predictions.values(), spec)
    true = [{f["finding"]: (f["side"], f["extent"]) for f in spec["studies"][name]}
            for name in predictions]
    labels = list(spec["phrases"])
    present = [np.array([[label in row for label in labels] for row in rows])
               for rows in (named, true)]
    found = precision_recall_f1(*present, labels)
    f1 = [row["f1"] for row in sorted(found["each"].values(), key=lambda row: -row["studies"])]
    half = (len(f1) + 1) // 2
    found["macro_f1_frequent"] = float(np.mean(f1[:half]))
    found["macro_f1_rare"] = float(np.mean(f1[half:] or [0]))
    for i, key in enumerate(("side", "extent")):
        right = [ours[label][i] == theirs[label][i] for ours, theirs in zip(named, true)
                 for label in ours.keys() & theirs.keys() if theirs[label][i] is not None]
        found[key] = float(np.mean(right)) if right else None
    return found


# Intervals and comparisons ------------------------------------------------------------------------

Statistics = dict[str, np.ndarray]  # {part: (K, N)}: by sums over studies, its scores


def study_statistics(predictions: dict[str, str], references: dict[str, str],
                     spec: dict | None = None, label: Callable | None = None) -> Statistics:
    """{"text": (12, N), "findings" and "clinical.<reading>.<size>": (2 L, N) for L labels}.

    The texts are {study id: text}; spec and label are findings.json and CheXbert, as in `measure`.
    """
    texts = [predictions[name] for name in references]
    parts = {"text": text_statistics(list(zip(texts, references.values())))}
    if spec:
        named = named_in_each(texts, spec)
        true = [{found["finding"] for found in spec["studies"][name]} for name in references]
        matrices = (np.array([[finding in row for finding in spec["phrases"]] for row in rows])
                    for rows in (named, true))
        parts["findings"] = label_statistics(*matrices)
    if label:
        classes = label(texts), label(list(references.values()))
        for reading, size, *matrices in clinical_matrices(*classes):
            parts[f"clinical.{reading}.{size}"] = label_statistics(*matrices)
    return parts


def label_statistics(named: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(2 L, N) of (N, L) bool: F1's numerators, 2 (named and true); then named + true of each."""
    return np.vstack([2.0 * (named & true).T, 1.0 * named.T + true.T])


def label_scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    """F1 as in `precision_recall_f1`, from sums of `label_statistics` over studies, (2 L, ...)."""
    both, total = np.split(sums, 2)
    return {"micro_f1": both.sum(axis=0) / np.maximum(total.sum(axis=0), 1),
            "macro_f1": (both / np.maximum(total, 1)).mean(axis=0)}


def scores_of(statistics: Statistics, draws: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """{"BLEU_1", .., "findings.micro_f1", ..} of all studies, or (R,) each of `resamples`."""
    scores = {}
    for part, rows in statistics.items():
        sums = rows.sum(axis=1) if draws is None else rows @ draws
        if part == "text":
            scores |= text_scores(sums, rows.shape[1])
        else:
            scores |= {f"{part}.{key}": value for key, value in label_scores(sums).items()}
    return scores


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
    (a, a_drawn), (b, b_drawn) = (_mean_over_files(side, draws) for side in (ours, theirs))
    found = {}
    for name in a:
        low, high = interval(a_drawn[name] - b_drawn[name])
        found[name] = {"a": a[name], "b": b[name], "difference": a[name] - b[name],
                       "interval": [low, high], "excludes_0": low > 0 or high < 0}
    return found


def _mean_over_files(files: list[Statistics], draws: np.ndarray) -> tuple[dict, dict]:
    """{score: mean over the n files}, and {score: (R,)}: in each resample over n files drawn anew.

    The variance of such a mean is (n - 1) / n of what it should be; it is stretched by as much.
    """
    n = len(files)
    own_seed = [int(statistics["text"][:10].sum()) for statistics in files]
    rng = np.random.default_rng(own_seed)  # so that swapped sides swap the sign only
    share = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).T / n
    share = 1 / n + math.sqrt(n / max(n - 1, 1)) * (share - 1 / n)
    points = [scores_of(statistics) for statistics in files]
    drawn = [scores_of(statistics, draws) for statistics in files]
    means = {name: float(np.mean([scores[name] for scores in points])) for name in points[0]}
    return means, {name: sum(w * scores[name] for w, scores in zip(share, drawn)) for name in means}


def print_comparison(found: dict[str, dict]) -> None:
    """A row a score: both sides, their difference, its interval, and whether 0 lies outside."""
    width = max(map(len, found)) + 2
    print(f"{'':<{width}}{'A':>9}{'B':>9}{'A - B':>10}    95 % interval       excludes 0")
    for name, row in found.items():
        low, high = row["interval"]
        print(f"{name:<{width}}{row['a']:>9.4f}{row['b']:>9.4f}{row['difference']:>+10.4f}"
              f"    [{low:+.4f}, {high:+.4f}]  {'yes' if row['excludes_0'] else 'no':>8}")


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
        images = batch["images"].to(model.device, non_blocking=True)
        texts, embeds = model.generate(images, batch["view_counts"])
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


def principal_plane(embeds: np.ndarray) -> np.ndarray:
    """PCA of visual embeddings scaled to unit length (Eq. 4), as in Fig. 1(c).

    Args: embeds (n, D). Returns: (n, 3): two coordinates, the squared distance from their plane.
    The mean of all three squared lengths is the variance: 1 minus the mean cosine of two studies.
    """
    rows = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
    rows = rows - rows.mean(axis=0)
    _, _, axes = np.linalg.svd(rows, full_matrices=False)
    # The sign of an axis is free: the same in every run.
    axes = np.array([axis * np.sign(axis[np.abs(axis).argmax()]) for axis in axes[:2]])
    plane = rows @ axes.T
    plane = np.pad(plane, [(0, 0), (0, 2 - plane.shape[1])])  # a split of one study has one axis
    return np.column_stack([plane, np.maximum((rows**2).sum(axis=1) - (plane**2).sum(axis=1), 0)])


def measure(rows: list[dict], config: Config, split: str, train_reports: list[str],
            label: Callable[[list[str]], list[list[int]]] | None = None) -> dict:
    """All scores of an evaluation, in the layout of `<split>_metrics.json`.

    Args:
        rows: one dict a study with id, prediction, reference and, if known, reference_cut (see
            `evaluate`).
        train_reports: cleaned; empty if the data is not at hand: there is no constant report then.
        label: from reports to the classes of CheXbert (`chexbert_labeller`); without it there is no
            `clinical`.
    """
    predictions = {row["id"]: row["prediction"] for row in rows}
    references = {row["id"]: row["reference"] for row in rows}
    constant = dict.fromkeys(predictions, best_constant(train_reports)) if train_reports else None
    cut = {row["id"]: row["reference_cut"] for row in rows if row.get("reference_cut") is not None}
    spec = read_findings(config, predictions)

    scored = []  # every table of scores, and its pairs: METEOR is added at the end, by one Java

    def table(texts: dict[str, str], against: dict[str, str], text: dict[str, float]) -> dict:
        scores = {"n": len(texts), "distinct": len(set(texts.values())), **text}
        scored.append((scores, [(texts[name], against[name]) for name in against]))
        return scores

    def tables(texts: dict[str, str]) -> dict:
        statistics = study_statistics(texts, references, spec, label)
        scores = table(texts, references, text_totals(statistics["text"]))
        scores["intervals"] = intervals(statistics)
        if cut:
            scores["cut_references"] = table(texts, cut, score(texts, cut, meteor=False))
        if spec:
            scores["findings"] = score_findings(texts, spec)
        if label:
            classes = [label(list(part.values())) for part in (texts, references)]
            scores["clinical"] = {"headline": HEADLINE} | score_clinical(*classes)
        return scores
    metrics = tables(predictions)
    texts = {"predictions": predictions, "references": references}
    texts |= {"cut_references": cut} if cut else {}
    metrics["mean_words"] = {name: float(np.mean([len(text.split()) for text in part.values()]))
                             for name, part in texts.items()}
    metrics["constant"] = tables(constant) if constant else None
    if constant:
        metrics["constant"]["text"] = next(iter(constant.values()))
    metrics["paper"] = PAPER.get(config.data.dataset)
    metrics["notes"] = []
    try:
        for (scores, _), value in zip(scored, meteor_1_5([pairs for _, pairs in scored])):
            scores["METEOR"] = value
    except RuntimeError as reason:
        metrics["notes"].append(f"METEOR: {reason}")
    metrics["notes"] += _missing(metrics, config, split)
    return metrics


def _missing(metrics: dict, config: Config, split: str) -> list[str]:
    """Why a row is not there, or does not compare."""
    notes = []
    if metrics["paper"] and split != "test":
        notes.append(f"paper: its row is of the test split, these scores are of {split}")
    if metrics["constant"] is None:
        notes.append(f"constant: needs the training reports; there is no annotation in "
                     f"{config.data.root}")
    if "cut_references" not in metrics:
        notes.append("cut_references: need the tokenizer of the LLM; the predictions hold none")
    return notes


def print_metrics(metrics: dict, name: str) -> None:
    """The tables: model, best constant report and paper side by side, by both protocols (A16)."""
    n, distinct, words = metrics["n"], metrics["distinct"], metrics["mean_words"]
    print(f"\n{name}: {n} studies, {distinct} different reports ({distinct / n:.0%}), "
          f"{words['predictions']:.1f} words a report (references {words['references']:.1f})")
    rows = [("model", metrics), ("best constant report", metrics["constant"] or {}),
            ("paper, VDGen", metrics["paper"] or {})]
    cut = [(f"{title}, cut references", row["cut_references"])
           for title, row in rows if "cut_references" in row]
    _print_line("", METRICS)
    for title, row in rows + cut:
        _print_line(title, [row.get(key) for key in METRICS])
        for i, end in enumerate(("95 % interval from", "to")) if row is metrics else ():
            ends = [row["intervals"].get(key, (None, None))[i] for key in METRICS]
            _print_line(f"{end:>20}", ends)
    scored = [(title, row) for title, row in rows[:2] if row]
    if "findings" in metrics:
        _print_findings(scored)
    if "clinical" in metrics:
        _print_clinical(scored, metrics["paper"] or {})
    for note in metrics["notes"]:
        print("note:", note)


def _print_line(title: str, values) -> None:
    cells = ["-" if v is None else format(v, ".3f") if isinstance(v, float) else v for v in values]
    print(f"{title:<38}" + "".join(f"{cell:>10}" for cell in cells))


def _means(part: dict, mean: str) -> list[float]:
    return [part[f"{mean}_{key}"] for key in ("precision", "recall", "f1")]


def _within(part: dict, mean: str) -> list[str]:
    return ["   95 %: {:.3f} to {:.3f}".format(*part[f"{mean}_f1"])]


def _print_findings(rows: list[tuple[str, dict]]) -> None:
    """Each finding of the model; then the means of it and of the best constant report."""
    found = rows[0][1]["findings"]
    print()
    _print_line("findings", ("precision", "recall", "F1", "studies"))
    for title, row in found["each"].items():
        _print_line(title, row.values())
    for title, row in rows:
        suffix = "" if title == "model" else f", {title}"
        for mean in MEANS[:2]:
            spread = _within(row["intervals"]["findings"], mean)
            _print_line(mean + suffix, _means(row["findings"], mean) + spread)
    print(f"macro-F1 of the commoner half of the findings {found['macro_f1_frequent']:.3f}, of the "
          f"rarer {found['macro_f1_rare']:.3f}")
    shares = {key: "-" if found[key] is None else format(found[key], ".3f")
              for key in ("side", "extent")}
    print("of the findings named rightly: "
          + ", ".join(f"{key} right {share}" for key, share in shares.items()))


def _print_clinical(rows: list[tuple[str, dict]], paper: dict) -> None:
    """Table 3: the headline beside the paper's row, each label, then every other average (A17)."""
    reading, size, mean = HEADLINE
    clinical = rows[0][1]["clinical"]
    print()
    _print_line(f"CheXbert, {size} labels, {mean} (headline)",
                ("precision", "recall", "F1", "studies"))
    for title, row in rows:
        spread = _within(row["intervals"]["clinical"][reading][size], mean)
        _print_line(title, _means(row["clinical"][reading][size], mean) + spread)
    if "clinical" in paper:
        _print_line("paper, VDGen (average not stated)", paper["clinical"].values())
    for title, row in clinical[reading][size]["each"].items():
        _print_line(title, row.values())
    _print_line("uncertain as", ("negative:", "", "", "positive:"))
    for size in clinical[reading]:
        for mean in MEANS:
            negative, positive = (clinical[part][size]
                                  for part in ("uncertain_negative", "uncertain_positive"))
            _print_line(f"{size} labels, {mean}", _means(negative, mean) + _means(positive, mean))


def results_name(checkpoint: Path, split: str) -> str:
    """What an evaluation's files begin with: the split for best.pt, `last_<split>` for last.pt."""
    return split if checkpoint.stem == "best" else f"{checkpoint.stem}_{split}"


def origin(config: Config, step: int | None, studies: Sequence[Study]) -> dict:
    """Weights, decoding, precision and studies of an evaluation: kept in its metrics."""
    return {"step": step, "generate": asdict(config.generate), "precision": config.train.precision,
            "studies": digest(studies)}


def require_nothing_lost(path: Path, config: Config, chexbert: Path | None,
                         of: dict | None = None) -> dict:
    """What a `<name>_metrics.json` holds, {} if it is not there.

    Raises ValueError, before any work, where new scores (`of`: their `origin`) would replace those
    of another origin, or lack clinical scores or findings. Metrics of older versions have no
    origin: these are replaced.
    """
    old, reason = {}, None
    with suppress(OSError, ValueError, TypeError):
        old = dict(json.loads(path.read_text(encoding="utf-8")))
    if of and old.get("origin", of) != of:
        reason = (f"is of other weights, settings or studies ({old['origin']}): move it away with "
                  f"its predictions, or work in another folder")
    elif "clinical" in old and not chexbert:
        reason = "has clinical scores, which would be lost: add --chexbert, or move it away"
    elif "findings" in old and not (Path(config.data.root) / "findings.json").is_file():
        reason = (f"has scores of findings, which would be lost: there is no findings.json in "
                  f"{config.data.root}; --set data.root names the data, or move it away")
    if reason:
        raise ValueError(f"{path} {reason}")
    return old


def evaluate(model: VDGen, split: str, splits: dict[str, Sequence[Study]], folder: Path,
             step: int | None = None, written: tuple[dict, dict] | None = None,
             chexbert: Path | None = None, name: str | None = None) -> dict:
    """Generate (unless `written` holds what `write_reports` returned) and score one split.

    `step`: that of the weights; `name`: see `results_name`; the default is the split.
    """
    name = name or split
    if not splits[split]:
        raise ValueError(f"--split {split}: the annotation has no such studies; there are "
                         f"{', '.join(name for name, studies in splits.items() if studies)}")
    reports, visual_embeds = written or write_reports(model, splits[split])
    if ranks()[0]:
        return {}  # the first rank scores and writes
    limit, tokenizer = model.config.data.reference_cut_tokens, model.tokenizer
    rows = _rows(splits[split], reports)
    points = principal_plane(np.array([visual_embeds[row["id"]] for row in rows]))
    for row, point in zip(rows, points):
        row["visual_pca"] = [round(float(value), 5) for value in point]
        ids = tokenizer(row["reference"], add_special_tokens=False).input_ids[:limit]
        row["reference_cut"] = tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
    write_whole(folder / f"{name}_predictions.jsonl", "".join(lines))
    return write_results(folder, name, rows, model.config, split, splits["train"], chexbert,
                         origin(model.config, step, splits[split]))


def _rows(studies: Sequence[Study], reports: dict[str, str]) -> list[dict]:
    return [{"id": study.id, "prediction": reports[study.id], "reference": study.report,
             "image_path": list(study.image_paths)} for study in studies]


def tag(row: dict, spec: dict | None, label: Callable | None) -> dict[str, list] | None:
    """What reference and prediction name: {side: [[finding, detail], ...]}; or None."""
    if spec:
        named = {"reference": {f["finding"]: (f["side"], f["extent"])
                               for f in spec["studies"][row["id"]]},
                 "prediction": named_findings(row["prediction"], spec)}
        return {side: [[name, " ".join(filter(None, details))] for name, details in found.items()]
                for side, found in named.items()}
    if label is None:
        return None
    words = {1: "", 3: "uncertain"}
    tags = {}
    for side in ("reference", "prediction"):
        classes = zip(CONDITIONS, label([row[side]])[0])
        tags[side] = [[name, words[c]] for name, c in classes if c in words]
    return tags


def write_results(folder: Path, name: str, rows: list[dict], config: Config, split: str,
                  train_studies: list[Study], chexbert: Path | None,
                  of: dict | None = None) -> dict:
    """Score, print, and write `<name>_metrics.json` and `<name>_report.html`; `of`: `origin`."""
    label = chexbert_labeller(chexbert, folder / f"{name}_chexbert.json") if chexbert else None
    metrics = measure(rows, config, split, [study.report for study in train_studies], label)
    # A19: scores of different sections do not compare.
    metrics["sections"] = train_studies[0].sections if train_studies else None
    if metrics["sections"]:
        metrics["notes"].append(f"reports: the sections {metrics['sections']} (A19)")
    if of:
        metrics["origin"] = of
    text = json.dumps(metrics, indent=1, allow_nan=False)
    write_whole(folder / f"{name}_metrics.json", text + "\n")
    draw_page(folder / f"{name}_report.html", rows, metrics, config, split, label)
    print_metrics(metrics, name)
    return metrics


def draw_page(path: Path, rows: list[dict], metrics: dict, config: Config, split: str,
              label: Callable | None = None) -> None:
    """`<name>_report.html`, by configs/report.py: Tables 1 and 3, curves, cases as in Fig. 3."""
    spec = read_findings(config, [row["id"] for row in rows])
    cider = CiderD([row["reference"] for row in rows]).each([row["prediction"] for row in rows])
    scored = [row | {"cider": value, "rouge_l": rouge_l(row["prediction"], row["reference"]),
                     "tags": tag(row, spec, label)} for row, value in zip(rows, cider)]
    tagger = "findings.json" if spec else "CheXbert" if label else None
    write_page(path, scored, Path(config.data.root) / "images",
               {"split": split, "names": METRICS, "config": config.to_dict(), "metrics": metrics,
                "tagger": tagger})


def read_rows(path: Path) -> list[dict]:
    """The rows of a `<split>_predictions.jsonl`."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{path}: {error}; expected a text in UTF-8") from None
    for n, line in enumerate(text.split("\n"), 1):  # a text may hold Unicode's own line ends
        if line.strip():
            rows.append(_row(line))
            if rows[-1] is None:
                raise ValueError(f"{path}: line {n}: got {line!r:.100}, expected one JSON object a "
                                 f"line, with id, prediction and reference; if it has them, "
                                 f"reference_cut (a text) and image_path (a list)")
    if not rows:
        raise ValueError(f"{path}: it is empty; expected one JSON object a line")
    if len({row.get("reference_cut") is None for row in rows}) > 1:
        raise ValueError(f"{path}: some lines have reference_cut and some have none")
    name, times = Counter(row["id"] for row in rows).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{path}: the id {name!r} stands {times} times, expected once")
    return rows


def _row(line: str) -> dict | None:
    """A row of predictions; None where the line is none."""
    try:
        row = json.loads(line)
        texts = [row.get(key) for key in ("id", "prediction", "reference")]
        cut = row.get("reference_cut")
        texts += ["" if cut is None else cut, *row.get("image_path", [])]
    except (ValueError, AttributeError, TypeError, RecursionError):
        return None
    views = row.get("image_path", [])
    return row if isinstance(views, list) and all(isinstance(t, str) for t in texts) else None


def _read_theirs(path: Path) -> dict[str, str]:
    """{id: report} of a JSON {id: report} or {id: [report]}."""
    with suppress(ValueError, AttributeError, RecursionError):
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
        reports = {name: text[0] if isinstance(text, list) and len(text) == 1 else text
                   for name, text in tree.items()}
        if reports and all(isinstance(text, str) for text in reports.values()):
            return reports
    raise ValueError(f"{path}: expected one JSON object, {{id: report}} or {{id: [report]}}")


def score_again(path: Path, config_path: Path | None, overrides: list[str] = (),
                split: str | None = None, chexbert: Path | None = None) -> None:
    """Score a file of predictions without a model.

    `.jsonl`: ours, which holds the references. `.json`: {id: text} or {id: [text]}, as R2GenGPT and
    its heirs write it; the references are those of a split of `--config`. The config of a file that
    lies in a run is config.yaml beside it.
    """
    config_path = config_path or path.parent / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"--predictions {path}: no such file")
    if not config_path.is_file():
        raise FileNotFoundError(f"--predictions {path}: there is no {config_path}; name the config "
                                f"of its data with --config")
    config = load_config(config_path, overrides)
    name, ours = path.stem.removesuffix("_predictions"), path.suffix != ".json"
    theirs = None if ours else {"file": path.name}
    old = require_nothing_lost(path.with_name(f"{name}_metrics.json"), config, chexbert, theirs)
    annotation = (Path(config.data.root) / "annotation.json").is_file()
    splits = {"train": []} if ours and not annotation else read_studies(config.data)
    if ours:
        split, rows = name.rpartition("_")[2], read_rows(path)
    else:
        split = split or ("test" if splits["test"] else "val")
        reports = _read_theirs(path)
        wrong = reports.keys() ^ {study.id for study in splits[split]}
        if wrong:
            raise ValueError(f"{path}: {len(reports)} reports for the {len(splits[split])} studies "
                             f"of {split} in {config.data.root}; {len(wrong)} ids are in one of "
                             f"them only, such as {min(wrong)!r}; --split names another split")
        rows = _rows(splits[split], reports)
    write_results(path.parent, name, rows, config, split, splits["train"], chexbert,
                  theirs or old.get("origin"))


def score_against(ours: list[Path], theirs: list[Path], config_path: Path | None = None,
                  overrides: list[str] = (), split: str | None = None,
                  chexbert: Path | None = None) -> None:
    """`compare` two settings, print it, and write `<split>_against.json` beside the first file.

    Args:
        ours, theirs: the files of a side, as in `score_again`; several are seeds of one setting.
        config_path: of the data, for its findings.json, and its references if no file holds them;
            the default is config.yaml beside the first file, if there is one.
    """
    folder, name = ours[0].parent, ours[0].stem.removesuffix("_predictions")
    if config_path is None and (folder / "config.yaml").is_file():
        config_path = folder / "config.yaml"
    if overrides and not config_path:
        raise ValueError(f"--set {overrides[0]}: there is no config to change; name one with "
                         "--config")
    config = load_config(config_path, overrides) if config_path else None
    reports, references = _read_sides([*ours, *theirs], config, split)
    spec = read_findings(config, references) if config else None
    label = chexbert_labeller(chexbert, folder / f"{name}_chexbert.json") if chexbert else None
    sides = ([study_statistics(reports[path], references, spec, label) for path in side]
             for side in (ours, theirs))
    found = compare(*sides)
    written = {"a": list(map(str, ours)), "b": list(map(str, theirs)), "n": len(references),
               "scores": nested(found)}
    text = json.dumps(written, indent=1, allow_nan=False)
    write_whole(folder / f"{name}_against.json", text + "\n")
    print(f"{len(references)} studies; A: {', '.join(written['a'])}; B: {', '.join(written['b'])}")
    print_comparison(found)
    if 1 in (len(ours), len(theirs)):
        print("note: of a side of one file, what another seed would change is not in the intervals")


def _read_sides(paths: list[Path], config: Config | None, split: str | None) -> tuple[dict, dict]:
    """{path: {id: report}}, and the {id: reference} of all; ValueError if a file has others."""
    reports, held = {}, {}  # what the files hold
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file of predictions")
        if path.suffix == ".json":
            reports[path] = _read_theirs(path)
        else:
            rows = read_rows(path)
            reports[path] = {row["id"]: row["prediction"] for row in rows}
            held[path] = {row["id"]: row["reference"] for row in rows}
    if not held and config is None:
        raise ValueError(f"{paths[0]}: no file holds references; name the data with --config")
    if not held:
        splits = read_studies(config.data)
        studies = splits[split or ("test" if splits["test"] else "val")]
        held[config.data.root] = {study.id: study.report for study in studies}
    source, references = next(iter(held.items()))
    for path in paths:
        wrong = reports[path].keys() ^ references.keys()
        if not wrong:
            own = held.get(path, references)
            wrong = {name for name, text in references.items() if own[name] != text}
        if wrong:
            raise ValueError(f"{path} and {source}: {len(wrong)} studies, such as {min(wrong)!r}, "
                             "are in one only or have another reference; both sides need the same")
    return reports, references


# What each mode takes besides its files: flags, and sections or keys of --set.
PLACE = ["data.root", "data.dataset", "data.limit"]
TAKES = {
    "--checkpoint": (["split", "chexbert"],
                     ["model", "data", "generate", "train.eval_batch_size", "train.precision"]),
    "--checkpoint and --images": (["images"], ["model", "data", "generate", "train.precision"]),
    "--predictions with references": (["against", "config", "chexbert"], PLACE),
    "--predictions without references": (["against", "config", "split", "chexbert"], PLACE),
}


def refuse_unused(args: argparse.Namespace) -> None:
    """ValueError for a flag, or a key of --set, that has no meaning in this mode."""
    files = [*(args.predictions or ()), *(args.against or ())]
    bare = all(path.suffix == ".json" for path in files)
    mode = f"--predictions {'without' if bare else 'with'} references"
    if args.checkpoint:
        mode = "--checkpoint and --images" if args.images else "--checkpoint"
    flags, keys = TAKES[mode]
    unused = [f"--{name}" for name, value in vars(args).items()
              if value and name not in ("checkpoint", "predictions", "set", *flags)]
    unused += [f"--set {given}" for given in args.set if not given.startswith(tuple(keys))]
    if unused:
        taken = [f"--{name}" for name in flags] + [f"--set {key}" for key in keys]
        raise ValueError(f"{unused[0]}: of no use with {mode}; that takes {', '.join(taken)}")


def require_views(paths: list[Path]) -> None:
    """ValueError, before a model is read, for a view that is none, is blank, or is named twice."""
    seen = {}
    for path in paths:
        problem = image_problem(path)
        if problem:
            raise ValueError(problem)
        other = seen.setdefault(path.read_bytes(), path)
        if other is not path:
            raise ValueError(f"image {path}: the same picture as {other}; name each view once")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", type=Path, help="best.pt or last.pt of a run")
    source.add_argument("--predictions", nargs="+", type=Path, metavar="FILE",
                        help="<split>_predictions.jsonl of a run, or a JSON {id: report}")
    parser.add_argument("--against", nargs="+", type=Path, metavar="FILE",
                        help="compare --predictions with these; several files a side are seeds")
    parser.add_argument("--split", choices=("train", "val", "test"),
                        help="default: test if there is one, else val")
    parser.add_argument("--chexbert", type=Path, help="chexbert.pth: clinical efficacy (Table 3)")
    parser.add_argument("--images", nargs="+", type=Path, help="the views of one study")
    parser.add_argument("--config", type=Path,
                        help="with --predictions: default is config.yaml beside the file")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="override the config")
    args = parser.parse_args()
    refuse_unused(args)
    if args.predictions and len(args.predictions) > 1 and not args.against:
        parser.error("--predictions takes several files only with --against")
    return args


def main() -> None:
    args = parse_arguments()
    if args.against:
        return score_against(args.predictions, args.against, args.config, args.set, args.split,
                             args.chexbert)
    if args.predictions:
        return score_again(args.predictions[0], args.config, args.set, args.split, args.chexbert)
    require_views(args.images or [])
    if args.chexbert and not args.chexbert.is_file():
        raise FileNotFoundError(f"--chexbert {args.chexbert}: no such file")
    join_ranks()
    checkpoint = read_checkpoint(args.checkpoint)
    config = parse_config(checkpoint["config"], args.set, str(args.checkpoint))
    build_demo_if_missing(config.data)
    if not args.images:
        splits, step = read_studies(config.data), checkpoint.get("step")
        split = args.split or ("test" if splits["test"] else "val")
        name = results_name(args.checkpoint, split)
        require_nothing_lost(args.checkpoint.with_name(f"{name}_metrics.json"), config,
                             args.chexbert, origin(config, step, splits[split]))
    model = load_model(config).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    model.load_trained_state(checkpoint["model"])
    if args.images:
        views = torch.stack([read_image(path, model.image_size) for path in args.images])
        reports, _ = model.generate(views.to(model.device), [len(views)])
        return print(reports[0])
    evaluate(model, split, splits, args.checkpoint.parent, step, chexbert=args.chexbert, name=name)


if __name__ == "__main__":
    end_in_one_line(main)
