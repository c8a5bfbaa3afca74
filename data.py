"""Studies from disk to batches: R2Gen's annotation format, its report cleaning (A15), images, and the embedded demo.

    python data.py demo [--out data/demo]      draw the demo (train.py does it by itself when it is missing)

Left out on purpose: augmentation (A21: a flip would turn left into right).
"""
import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

import configs

SPLITS = ("train", "val", "test")

# R2Gen's character class. By accident `:-\[` is a range: it also deletes <, =, >, @ and capitals, and keeps - # $ (A15).
R2GEN_PUNCTUATION = re.compile(r"[.,?;*!%^&_+():-\[\]{}]")


@dataclass(frozen=True)
class Study:
    id: str
    report: str                   # cleaned
    image_paths: tuple[str, ...]  # one for each view, relative to images/


def clean_iu_xray(report: str) -> str:
    """A15: R2Gen's cleaning of an IU-Xray report: lower case, no punctuation but ` . ` behind each sentence.

    Kept to the letter so that scores compare, quirks included: empty sentences stay, and cleaning twice differs from
    cleaning once ("a. b." becomes "a . b .", then "a . b  .").
    """
    for _ in range(3):
        report = report.replace("..", ".")
    report = report.replace("1. ", "")  # list numbers; "21. " loses its 1, too
    for before in (". ", " "):
        for number in "2345":
            report = report.replace(f"{before}{number}. ", ". ")
    sentences = report.strip().lower().split(". ")
    return " . ".join(R2GEN_PUNCTUATION.sub("", re.sub(r"[\"/\\']", "", s).strip()) for s in sentences) + " ."


def clean_mimic_cxr(report: str) -> str:
    """A15: R2Gen's cleaning of a MIMIC-CXR report: line breaks and runs of `_`, blanks and dots first, then as IU-Xray."""
    report = report.replace("\n", " ")
    for pair, times in (("__", 7), ("  ", 6), ("..", 8)):
        for _ in range(times):
            report = report.replace(pair, pair[0])
    return clean_iu_xray(report)


CLEANING = {"iu_xray": clean_iu_xray, "mimic_cxr": clean_mimic_cxr, "demo": clean_iu_xray}


def read_studies(data: configs.Data) -> dict[str, list[Study]]:
    """The studies of each split in `data.root`/annotation.json (R2Gen's format), reports cleaned.

    Raises FileNotFoundError if there is no annotation, ValueError for one that is broken, naming the study.
    """
    path = Path(data.root) / "annotation.json"
    if not path.is_file():
        raise FileNotFoundError(f"data.root: there is no {path}; see the README, \"Data\", for how to make "
                                f"{data.dataset} ready, or set data.root to where it is")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("train"), list) or set(tree) - set(SPLITS):
        raise ValueError(f"{path}: expected {{'train': [...], 'val': [...], 'test': [...]}} (val and test may be missing)")
    seen, splits = set(), {}
    for split in SPLITS:
        entries = tree.get(split, [])
        if not isinstance(entries, list):
            raise ValueError(f"{path}: {split}: got {type(entries).__name__}, expected a list of studies")
        splits[split] = [_study(entry, f"{path}: {split}[{i}]", CLEANING[data.dataset], seen)
                         for i, entry in enumerate(entries[:data.limit])]
    if not splits["train"]:
        raise ValueError(f"{path}: train: no studies")
    return splits


def _study(entry, place: str, clean, seen: set) -> Study:
    """Check one entry of the annotation."""
    if not isinstance(entry, dict) or not {"id", "report", "image_path"} <= entry.keys():
        raise ValueError(f"{place}: expected a study with id, report and image_path")
    name, report, paths = str(entry["id"]), entry["report"], entry["image_path"]
    if name in seen:
        raise ValueError(f"{place}: id {name!r} stands twice; ids must be unique in all splits")
    seen.add(name)
    if not isinstance(report, str) or not report.strip():
        raise ValueError(f"{place}: study {name!r} has no report")
    if not isinstance(paths, list) or not paths or not all(isinstance(p, str) and p for p in paths):
        raise ValueError(f"{place}: study {name!r}: image_path: got {paths!r}, expected a list of one path or more")
    for p in paths:
        if PurePosixPath(p).is_absolute() or ".." in PurePosixPath(p).parts or "\\" in p or "\0" in p:
            raise ValueError(f"{place}: study {name!r}: image path {p!r} leaves the images folder")
    return Study(name, clean(report), tuple(paths))


def read_image(path: str | Path, size: int) -> Tensor:
    """A24: one view as (3, size, size) uint8, bicubic and antialiased, aspect not kept; grey repeated to three channels.

    Raises FileNotFoundError, or ValueError for a file that is no whole image.
    """
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # 16 bit, or 32: scaled by its own maximum
                values = np.asarray(image, dtype=np.float32).clip(min=0)
                image = Image.fromarray((values * (255 / max(values.max(), 1))).round().astype(np.uint8))
            image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
            pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    except FileNotFoundError:
        raise FileNotFoundError(f"image {path}: no such file") from None
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path}: not a whole PNG or JPEG image ({error})") from None
    pixels = torch.from_numpy(pixels.copy())
    return pixels.expand(3, size, size) if pixels.dim() == 2 else pixels.permute(2, 0, 1)


class ReportDataset(Dataset):
    """Studies as tensors. Every report is tokenised once, here; images are read when asked for.

    A report of at most `max_report_tokens` tokens ends in the end token; a longer one is cut and does not (A20, A23).

    Item: {"id": str, "report": str, "images": (V, 3, H, W) uint8, "report_ids": list of token
    ids}.
    """

    def __init__(self, studies: list[Study], root: str | Path, image_size: int, tokenizer, max_report_tokens: int):
        self.studies, self.images, self.image_size = studies, Path(root) / "images", image_size
        ids = tokenizer([study.report for study in studies], add_special_tokens=False).input_ids
        self.report_ids = [row + [tokenizer.eos_token_id] if len(row) <= max_report_tokens else row[:max_report_tokens]
                           for row in ids]

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, index: int) -> dict:
        study = self.studies[index]
        views = [read_image(self.images / path, self.image_size) for path in study.image_paths]
        return {"id": study.id, "report": study.report, "images": torch.stack(views),
                "report_ids": self.report_ids[index]}


def collate(items: list[dict]) -> dict:
    """One batch; its studies may differ in their number of views (A8).

    Returns: ids, reports (B strings each), images (sum of views, 3, H, W) uint8, view_counts (B ints), report_ids (B, L) padded on the
    right to the longest report, report_lengths (B,).
    """
    reports = [torch.tensor(item["report_ids"]) for item in items]
    return {"ids": [item["id"] for item in items],
            "reports": [item["report"] for item in items],
            "images": torch.cat([item["images"] for item in items]),
            "view_counts": [len(item["images"]) for item in items],
            "report_ids": torch.nn.utils.rnn.pad_sequence(reports, batch_first=True),
            "report_lengths": torch.tensor([len(report) for report in reports])}


def epoch_batches(studies: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The shuffled batches of one epoch, a function of its arguments alone; the incomplete last one is dropped (A22)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)  # a prime: no two (seed, epoch) in use collide
    order = torch.randperm(studies, generator=generator).tolist()
    return [order[i:i + batch_size] for i in range(0, studies - batch_size + 1, batch_size)]


def build_demo_if_missing(data):
    pass
