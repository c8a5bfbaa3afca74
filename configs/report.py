"""The page of an evaluation: `<split>_report.html`, one self-contained file made from report.html.

What it shows comes from the caller; how it looks stands in the template beside this file.
"""
import base64
import io
import json
import math
import random
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from configs.files import leaves, open_image, write_whole
from configs.findings import named_findings

CASES, PIXELS = 60, 352  # studies, and the longer side of a view: under 3 MB with two views each
CURVE_POINTS = 300
RANKED_BY = "CIDEr"
NOT_DRAWN = {"step", "epoch", "lr", "seconds", "peak_memory_gb", "peak_reserved_gb",
             "BLEU_1", "BLEU_2", "BLEU_3"}  # of the log's numbers
NORMALITY = {"no", "not", "without", "free", "normal", "clear", "unremarkable", "intact",
             "negative", "stable"}


def curves(log: Path) -> tuple[dict | None, dict[str, list]]:
    """The header of log.jsonl, and {number of a step, or "val: <score>": [[step, value], ...]}.

    The values of a step are means over at most CURVE_POINTS equal pieces of the run.
    """
    if not log.is_file():
        return None, {}
    lines = []
    for text in log.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # a killed run may have left half a line
            lines.append(json.loads(text))
    header = next((line for line in lines if "versions" in line), None)
    steps, found = [line for line in lines if "report" in line], {}
    size = max(1, math.ceil(len(steps) / CURVE_POINTS))
    for start in range(0, len(steps), size):
        piece = steps[start:start + size]
        for key, last in piece[-1].items():
            if key not in NOT_DRAWN and isinstance(last, (int, float)):
                values = [line[key] for line in piece if key in line]
                found.setdefault(key, []).append([piece[-1]["step"], float(np.mean(values))])
    for line in lines:
        for key, value in line.get("val", {}).items():
            if key not in NOT_DRAWN:
                found.setdefault(f"val: {key}", []).append([line["step"], value])
    return header, found


def choose_cases(values: list[float]) -> dict[str, list[int]]:
    """Which studies the page shows: best and worst by `values`, and random ones (seed 0)."""
    third = min(len(values), CASES) // 3
    order = sorted(range(len(values)), key=lambda i: -values[i])
    middle = order[third:len(order) - third]
    chosen = random.Random(0).sample(middle, min(len(middle), CASES - 2 * third))
    return {"best": order[:third], "worst": order[len(order) - third:][::-1], "random": chosen}


def thumbnail(path: Path, pixels: int) -> str | None:
    """A view as a small JPEG in base64, its aspect kept; None if it is not there."""
    try:
        image = open_image(path)
    except (FileNotFoundError, ValueError):
        return None
    image.thumbnail((pixels, pixels))
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=75)
    return base64.b64encode(jpeg.getvalue()).decode()


def names_abnormality(reference: str) -> bool:
    """A rough reading where no labels are: a sentence with no word that denies or says normal."""
    sentences = (re.findall(r"[a-z]{2,}", part) for part in reference.lower().split("."))
    return any(words and not NORMALITY & set(words) for words in sentences)


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


def tag(row: dict, spec: dict | None, classes: Callable | None) -> dict[str, list] | None:
    """What reference and prediction name: {side: [[finding, detail], ...]}; or None.

    By findings.json (`spec`), else by CheXbert (`classes`: a text's {condition: class}).
    """
    if spec:
        held = spec["studies"][row["id"]]
        named = {"reference": {f["finding"]: (f["side"], f["extent"]) for f in held},
                 "prediction": named_findings(row["prediction"], spec)}
        return {side: [[name, " ".join(filter(None, details))] for name, details in found.items()]
                for side, found in named.items()}
    if classes is None:
        return None
    words = {1: "", 3: "uncertain"}
    return {side: [[name, words[c]] for name, c in classes(row[side]).items() if c in words]
            for side in ("reference", "prediction")}


def draw_cases(rows: list[dict], tags: list, images: Path) -> list[dict]:
    """The studies of `choose_cases`, with their films; more views a study are shown smaller."""
    values = [row["scores"][RANKED_BY] for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -values[i])
    groups = choose_cases(values)
    views = sum(len(rows[i].get("image_path", [])) for group in groups.values() for i in group)
    pixels = int(PIXELS * min(1, math.sqrt(2 * CASES / max(views, 1))))
    cases, keys = [], ("id", "reference", "prediction", "scores")
    for group, chosen in groups.items():
        for i in chosen:
            films = [None if leaves(view) else thumbnail(images / view, pixels)  # of other hands
                     for view in rows[i].get("image_path", [])]
            place = {"group": group, "rank": order.index(i) + 1}
            shown = {key: rows[i][key] for key in keys}
            cases.append(shown | place | {"tags": tags[i], "views": films})
    return cases


def draw_page(path: Path, rows: list[dict], images: Path, shown: dict, spec: dict | None = None,
              classes: Callable | None = None) -> None:
    """Write the page of one split: Tables 1 and 3, curves, embeddings, cases as in Fig. 3.

    Args:
        rows: a dict a study: id, prediction, reference, image_path, scores, perhaps visual_pca.
        images: the folder of the views.
        shown: split, names (of the metrics), config, metrics.
        spec, classes: as in `tag`.
    """
    tags, points = [tag(row, spec, classes) for row in rows], []
    for row, its in zip(rows, tags):
        named = its["reference"] if its else []
        if "visual_pca" in row:
            points.append({"id": row["id"], "at": row["visual_pca"],
                           "abnormal": names_abnormality(row["reference"]),
                           "findings": [name for name, _ in named if name != "No Finding"]})
    header, lines = curves(path.parent / "log.jsonl")
    tagger = "findings.json" if spec else "CheXbert" if classes else None
    data = shown | {"name": path.stem.removesuffix("_report"), "header": header, "curves": lines,
                    "cases": draw_cases(rows, tags, images), "ranked_by": RANKED_BY,
                    "points": points, "tagger": tagger}
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    # Nothing in the data can end the script that holds it.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    write_whole(path, template.replace("/*DATA*/", text))
