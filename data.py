"""Studies from disk to batches: R2Gen's annotation format, its report cleaning (A15), images; and the datasets made ready.

    python data.py iu_xray [--reports NLMCXR_reports.tgz --images NLMCXR_png.tgz]     # fetched if not named
    python data.py mimic_cxr --jpg DIR --reports DIR [--sections findings+impression]
    python data.py check --config configs/iu_xray.yaml                                # open every image, count, compare
    python data.py demo                                                               # train.py does it by itself

Left out on purpose: augmentation (A21: a flip would turn left into right).
"""
import argparse
import csv
import fcntl
import gzip
import json
import os
import pickle
import re
import stat
import sys
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.request import Request, urlopen
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

import configs
from configs.demo import build_demo

SPLITS = ("train", "val", "test")

# R2Gen's character class. By accident `:-\[` is a range: it also deletes <, =, >, @ and capitals, and keeps - # $ (A15).
R2GEN_PUNCTUATION = re.compile(r"[.,?;*!%^&_+():-\[\]{}]")


@dataclass(frozen=True)
class Study:
    id: str
    report: str                   # cleaned
    image_paths: tuple[str, ...]  # one for each view, relative to images/
    patient: str | None = None    # subject_id, or the number of an IU-Xray id; None: not known
    sections: str | None = None   # of the report, as annotation.json states them (A19); None: not stated


class Packed(Sequence):
    """A list that keeps its items pickled in one block of bytes, and makes one when asked for it.

    A loader's worker shares its parent's memory until it writes to it, and reading a Python object
    writes its reference count: of 270,790 studies in an ordinary list each worker would soon hold a
    copy. A block stays shared.
    """

    def __init__(self):
        self.block, self.ends = bytearray(), array("q", [0])

    def append(self, item) -> None:
        self.block += pickle.dumps(item)
        self.ends.append(len(self.block))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int | slice):
        places = range(len(self))[index]  # with a list's rules: below 0 from the end, IndexError
        if isinstance(index, slice):
            return [self[place] for place in places]
        return pickle.loads(memoryview(self.block)[self.ends[places]:self.ends[places + 1]])


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
    """A15: R2Gen's cleaning of a MIMIC-CXR report: line breaks, runs of `_`, blanks and dots, then as IU-Xray."""
    report = report.replace("\n", " ")
    for pair, times in (("__", 7), ("  ", 6), ("..", 8)):
        for _ in range(times):
            report = report.replace(pair, pair[0])
    return clean_iu_xray(report)


CLEANING = {"iu_xray": clean_iu_xray, "mimic_cxr": clean_mimic_cxr, "demo": clean_iu_xray}
READY = {"demo": "python data.py demo", "iu_xray": "python data.py iu_xray",
         "mimic_cxr": "python data.py mimic_cxr --jpg DIR --reports DIR"}


def read_studies(data: configs.Data,
                 problems: list[str] | None = None) -> dict[str, Sequence[Study]]:
    """The studies of each split in `data.root`/annotation.json (R2Gen's format), reports cleaned.

    Raises FileNotFoundError if there is no annotation, and ValueError for one that is broken or has a patient in two splits,
    naming the study; with a list of `problems` those of single studies are collected there instead.
    """
    path, patients = Path(data.root) / "annotation.json", {}
    if not path.is_file():
        raise FileNotFoundError(f"data.root: there is no {path}; make it with `{READY[data.dataset]}` (see the README, "
                                f"\"Data\"), or set data.root to where it is")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("train"), list) or set(tree) - {*SPLITS, "sections"}:
        raise ValueError(f"{path}: expected {{'train': [...], 'val': [...], 'test': [...]}} (val, test may be missing)")
    seen, splits = set(), {}
    for split in SPLITS:
        entries = tree.get(split, [])
        if not isinstance(entries, list):
            raise ValueError(f"{path}: {split}: got {type(entries).__name__}, expected a list of studies")
        splits[split] = Packed()
        for i, entry in enumerate(entries[:data.limit]):
            try:
                study = _study(entry, f"{path}: {split}[{i}]", data.dataset, seen, tree.get("sections"))
                splits[split].append(study)
                if study.patient and patients.setdefault(study.patient, split) != split:
                    raise ValueError(f"{path}: {split}[{i}]: study {study.id!r}: its patient {study.patient} is in "
                                     f"{patients[study.patient]}, too; a patient must be in one split only")
            except ValueError as error:
                if problems is None:
                    raise
                problems.append(str(error))
    if not splits["train"]:
        raise ValueError(f"{path}: train: no studies")
    return splits


def _study(entry, place: str, dataset: str, seen: set, sections: str | None) -> Study:
    """Check one entry of the annotation."""
    expected = "expected a study with id, report and image_path"
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: got {entry!r:.100}, {expected}")
    name, report, paths = (entry.get(key) for key in ("id", "report", "image_path"))
    if name in (None, "") or isinstance(name, (dict, list)):
        raise ValueError(f"{place}: its id is {name!r:.100}; {expected}")
    name = str(name)
    place = f"{place}: study {name!r:.100}"
    if name in seen:
        raise ValueError(f"{place} stands twice; ids must be unique in all splits")
    seen.add(name)
    if not isinstance(report, str) or not report.strip():
        raise ValueError(f"{place} has no report: got {report!r:.100}, expected a text")
    if not isinstance(paths, list) or not paths or not all(isinstance(p, str) and p for p in paths):
        raise ValueError(f"{place}: image_path: got {paths!r:.100}, expected a list of one path or "
                         "more")
    for p in paths:
        if PurePosixPath(p).is_absolute() or ".." in PurePosixPath(p).parts or "\\" in p or "\0" in p:
            raise ValueError(f"{place}: image path {p!r:.100} leaves the images folder")
    patient = entry.get("subject_id") or (dataset == "iu_xray" and re.match(r"CXR\d+", name) or [None])[0]
    return Study(name, CLEANING[dataset](report), tuple(paths), patient and str(patient), sections)


def require_images(splits: dict[str, Sequence[Study]], data: configs.Data) -> None:
    """The cheap part of `data.py check` for the images: FileNotFoundError if one of them is not there."""
    images = Path(data.root) / "images"
    paths = (path for studies in splits.values() for study in studies for path in study.image_paths)
    missing = [path for path in paths if not os.path.isfile(f"{images}/{path}")]
    if missing:
        raise FileNotFoundError(f"{images}: {len(missing)} images of {data.root}/annotation.json are not there, such as "
                                f"{missing[0]}; `python data.py check --config ...` lists all that is wrong")


def open_image(path: str | Path | BytesIO, name: str = "") -> Image.Image:
    """A24: one view as 8-bit grey or RGB; 16 bit scaled by its own maximum, turned as EXIF says.

    Raises FileNotFoundError, or ValueError for a file that is no whole image, holds several, or
    more than Pillow's limit of 179 million pixels. `name`: what an error calls it.
    """
    try:
        with Image.open(path) as image:
            pictures = getattr(image, "n_frames", 1)
            if pictures > 1 and image.format != "MPO":  # that is a phone's JPEG with a depth map
                raise ValueError(f"{pictures} pictures in one file, expected one")
            image.load()
            with suppress(SyntaxError):  # a broken block of EXIF turns nothing
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode == "P":
                image = image.convert("RGBA")  # a palette may hold transparency
            if image.mode[0] in "IF":  # 16 bit, or 32
                values = np.asarray(image, dtype=np.float32).clip(min=0)
                image = Image.fromarray((values * (255 / max(values.max(), 1))).round().astype(np.uint8))
            return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"image {name or path}: no such file") from None
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnidentifiedImageError):
            reason = "no known format; export DICOM, HEIC and the like as PNG"
        raise ValueError(f"image {name or path}: not a whole PNG or JPEG image "
                         f"({reason})") from None


def read_image(path: str | Path, size: int, cache: str | Path | None = None) -> Tensor:
    """A24: one view as (3, size, size) uint8, bicubic and antialiased, aspect not kept; grey in three channels.

    `cache`: a file that holds these pixels, or will; it counts while it has the time of the image's last change.
    """
    pixels = _cached(path, cache) if cache else None
    if pixels is None or pixels.shape[:2] != (size, size):
        pixels = np.array(open_image(path).resize((size, size), Image.Resampling.BICUBIC))
        if cache:
            _cache(pixels, path, cache)
    pixels = torch.from_numpy(pixels)
    return pixels.expand(3, size, size) if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def _cached(path: str | Path, cache: str | Path) -> np.ndarray | None:
    try:
        return np.load(cache) if os.stat(cache).st_mtime_ns == os.stat(path).st_mtime_ns else None
    except (OSError, ValueError, EOFError):  # none yet, or cut short
        return None


def _cache(pixels: np.ndarray, path: str | Path, cache: str | Path) -> None:
    unfinished = f"{cache}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(cache), exist_ok=True)
        with open(unfinished, "wb") as file:
            np.save(file, pixels)
        os.utime(unfinished, ns=(0, os.stat(path).st_mtime_ns))
        os.replace(unfinished, cache)
    except OSError:
        with suppress(OSError):  # a read-only or full disk: the image is read again the next time
            os.unlink(unfinished)


class ReportDataset(Dataset):
    """Studies as tensors, read and tokenised when asked for: by the loader's workers.

    A report of at most `max_report_tokens` tokens ends in the end token; a longer one is cut and does not (A20, A23).

    Item: {"index": int, "id": str, "report": str, "images": (V, 3, H, W) uint8, "report_ids": list of token ids}.
    """

    def __init__(self, studies: Sequence[Study], data: configs.Data, image_size: int, tokenizer):
        self.studies, self.image_size = studies, image_size
        # Strings: a Path interns its parts, and a worker would copy the table of interned strings.
        self.images = f"{data.root}/images"
        self.cache = f"{data.root}/cache_{image_size}" if data.cache_images else None
        self.tokenizer, self.limit = tokenizer, data.max_report_tokens

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, index: int) -> dict:
        study = self.studies[index]
        views = [read_image(f"{self.images}/{path}", self.image_size,
                            self.cache and f"{self.cache}/{path}.npy")
                 for path in study.image_paths]
        ids = self.tokenizer(study.report, add_special_tokens=False).input_ids
        ids = ids + [self.tokenizer.eos_token_id] if len(ids) <= self.limit else ids[:self.limit]
        return {"index": index, "id": study.id, "report": study.report,
                "images": torch.stack(views), "report_ids": ids}


def collate(items: list[dict]) -> dict:
    """One batch, the shortest report first; its studies may differ in their number of views (A8).

    Returns: indices (B numbers of studies), ids, reports (B strings each), images (sum of views, 3, H, W) uint8, view_counts (B ints), report_ids (B, L) padded on the
    right to the longest report, report_lengths (B ints).
    """
    items = sorted(items, key=lambda item: len(item["report_ids"]))  # like lengths stand together: see `report_term`
    reports = [torch.tensor(item["report_ids"]) for item in items]
    return {"indices": [item["index"] for item in items],
            "ids": [item["id"] for item in items], "reports": [item["report"] for item in items],
            "images": torch.cat([item["images"] for item in items]),
            "view_counts": [len(item["images"]) for item in items],
            "report_ids": torch.nn.utils.rnn.pad_sequence(reports, batch_first=True),
            "report_lengths": [len(report) for report in reports]}


def epoch_batches(studies: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The shuffled batches of one epoch, a function of its arguments alone; the incomplete last one is dropped (A22)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)  # a prime: no two (seed, epoch) in use collide
    order = torch.randperm(studies, generator=generator).tolist()
    return [order[i:i + batch_size] for i in range(0, studies - batch_size + 1, batch_size)]


# Findings that a text names -------------------------------------------------------------------------

# A clause ends with its sentence and before these words, but not at the "with" of "consistent with".
# In it, what follows a word of DENIED is not there ("clear airspace" lost its "of"), and nothing is
# there beside a word of GONE.
CLAUSE = re.compile(r"\.|\b(?:but|however|except|besides|aside|although|though|there|"
                    r"(?<!consistent )(?<!compatible )with)\b")
DENIED = re.compile(r"\b(?:no|not|without|free|negative|clear of|clear airspace|removal|resolution|"
                    r"exclude|evaluation|obscure|subcutaneous emphysema|pericardial effusion)\b")
GONE = re.compile(r"\b(?:resolved|cleared|removed|excluded|(?:is|are|was|were) not (?:well-)?seen)\b")


def named_findings(text: str, spec: dict) -> dict[str, tuple[str | None, str | None]]:
    """{finding: (side, extent)} that a cleaned text says are there, by the phrases of findings.json.

    These are regular expressions of whole words. A finding that is probable or possible counts as
    named: in IU-Xray's reports the words that would tell it are often xxxx. Side and extent are
    those of the first clause that names the finding; None where it tells none.
    """
    named = {}
    for clause in CLAUSE.split(" ".join(text.split())):
        said = "" if GONE.search(clause) else DENIED.split(clause)[0]
        side, extent = (next(iter(_named(said, spec[key])), None) for key in ("sides", "extents"))
        for finding in _named(said, spec["phrases"]):
            named.setdefault(finding, (side, extent))
    return named


def _named(text: str, groups: dict[str, list[str]]) -> list[str]:
    """The groups that have a phrase in the text."""
    return [name for name, phrases in groups.items()
            if re.search(rf"\b(?:{'|'.join(phrases)})\b", text)]


# Datasets from their official archives, which are read as untrusted ------------------------------------------------------

OPEN_I = "https://openi.nlm.nih.gov/imgs/collections/"  # of the National Library of Medicine
IU_XRAY_SPLIT = Path(configs.__file__).parent / "iu_xray_split.json"  # R2Gen's ids of train, val and test
IU_XRAY_FINDINGS = IU_XRAY_SPLIT.with_name("iu_xray_findings.json")  # no clinical labeller
SHORT_SIDE = 256
LARGEST_TEXT, LARGEST_IMAGE, MOST_FILES = 1 << 20, 64 << 20, 500_000  # bytes, bytes, files of an archive


def download(url: str, path: Path) -> Path:
    """Fetch `url` into `path` by way of `<path>.part`, from where a stopped download goes on. Nothing to do if it is there."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not path.is_file():
            done = part.stat().st_size if part.is_file() else 0
            with urlopen(Request(url, headers={"Range": f"bytes={done}-"} if done else {}), timeout=60) as answer:
                done = done if answer.status == 206 else 0
                total = done + int(answer.headers["Content-Length"])
                bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=path.name)
                with part.open("ab" if done else "wb") as file, bar:
                    while block := answer.read(1 << 20):
                        bar.update(file.write(block))
            if part.stat().st_size != total:
                raise OSError(f"got {part.stat().st_size} of {total} bytes")
            part.rename(path)
    except (OSError, ValueError, TypeError) as error:  # no connection, no such page, no length
        if isinstance(error, HTTPError) and error.code == 416:  # nothing is left to send
            if error.headers["Content-Range"] == f"bytes */{part.stat().st_size}":
                return part.rename(path)  # it was whole, and only its name was not yet changed
        raise ValueError(f"{url}: {error}; run the command again to go on, or fetch it by hand and name it on the command "
                         f"line (--reports, --images)") from None
    return path


def read_archive(path: Path, suffix: str, largest: int) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the files of a .tgz or .zip that end in `suffix`. Nothing is written, and no name of it used.

    Raises FileNotFoundError, or ValueError for a broken archive, and for one that no honest hand has made: with a link or a
    device, a path that leaves it, a file of more than `largest` bytes, or more than MOST_FILES files.
    """
    def members() -> Iterator[tuple[str, int, bool, bool, Callable[[], bytes]]]:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    kind = stat.S_IFMT(info.external_attr >> 16)
                    yield info.filename, info.file_size, info.is_dir(), kind in (0, stat.S_IFREG), lambda: archive.read(info)
        else:
            with tarfile.open(path, "r|*") as archive:
                for info in archive:
                    yield info.name, info.size, info.isdir(), info.isreg(), lambda: archive.extractfile(info).read()
    try:
        for count, (name, size, is_folder, is_file, read) in enumerate(members()):
            parts = PurePosixPath(name).parts
            leaves = name.startswith("/") or ".." in parts or "\\" in name or not name.isprintable()
            reason = ("too many files" if count >= MOST_FILES else
                      "its path leaves the archive" if leaves else
                      "neither a file nor a folder" if not is_folder and not is_file else
                      f"{size} bytes, at most {largest} expected" if size > largest else None)
            if reason:
                raise ValueError(f"{path}: refused: {name[:100]!r}: {reason}")
            if is_file and not is_folder and name.endswith(suffix):
                yield name, read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise ValueError(f"{path}: not a whole archive ({error}); fetch it again") from None


def shrink_image(source: bytes | Path, name: str, target: Path) -> None:
    """Write a view as 8-bit PNG whose short side has SHORT_SIDE pixels (a smaller one stays as it is)."""
    image = open_image(BytesIO(source) if isinstance(source, bytes) else source, name)
    scale = min(1, SHORT_SIDE / min(image.size))
    image = image.resize([round(length * scale) for length in image.size], Image.Resampling.BICUBIC)
    target.parent.mkdir(parents=True, exist_ok=True)
    image.save(unfinished := target.with_suffix(".unfinished"), "PNG")
    unfinished.rename(target)


def shrink_images(jobs: Iterable[tuple[bytes | Path, str, Path]], total: int) -> None:
    """`shrink_image` for all jobs, in one process for each core, with progress; what is there already is not done again."""
    bar, pending = tqdm(total=total, desc="images", unit="image"), set()
    with ProcessPoolExecutor() as pool:
        try:
            for source, name, target in jobs:
                if not target.is_file():
                    if len(pending) >= 64:  # a bound: jobs hold whole images
                        done, pending = wait(pending, return_when=FIRST_COMPLETED)
                        for job in done:
                            job.result()
                    pending.add(pool.submit(shrink_image, source, name, target))
                bar.update()
            for job in pending:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)
            bar.close()


def finish(building: Path, out: Path, tree: dict) -> None:
    """The last step of every build: the annotation, then the final name."""
    missing = [path for split in SPLITS for entry in tree.get(split, []) for path in entry["image_path"]
               if not (building / "images" / path).is_file()]
    if missing:
        raise ValueError(f"{len(missing)} images are not in the archive, such as that of {missing[0]}; is it the whole one? "
                         f"What is done stays in {building}, and the next run goes on from there")
    (building / "annotation.json").write_text(json.dumps(tree), encoding="utf-8")
    building.rename(out)
    print(f"{out}: " + ", ".join(f"{len(tree.get(split, []))} {split}" for split in SPLITS) + " studies")


def read_iu_xray_reports(archive: Path) -> dict[str, tuple[str, list[str]]]:
    """{id: (FINDINGS text, names of the first two images)} of the studies that R2Gen uses: those with both.

    An id is the name of the first image less its last `-NNNN` part.
    """
    studies = {}
    for name, content in tqdm(read_archive(archive, ".xml", LARGEST_TEXT), desc="reports", unit="report"):
        try:
            if b"<!DOCTYPE" in content:
                raise ElementTree.ParseError("it declares a document type")  # whose entities could blow up
            tree = ElementTree.fromstring(content)
        except ElementTree.ParseError as error:
            raise ValueError(f"{archive}: {name}: not a report of the collection: {error}") from None
        findings = next((e.text for e in tree.iter("AbstractText") if e.get("Label") == "FINDINGS"), None)
        images = [e.get("id", "") for e in tree.iter("parentImage")]
        if findings and findings.strip() and len(images) >= 2:
            if not all(re.fullmatch(r"CXR[\w-]+-\d+", image) for image in images):
                raise ValueError(f"{archive}: {name}: image names such as {images[0][:100]!r} are not of the collection")
            studies[images[0].rpartition("-")[0]] = findings, images[:2]
    return studies


def build_iu_xray(out: Path, reports: Path | None = None, images: Path | None = None) -> None:
    """R2Gen's IU-Xray from the two archives of Open-i, which are downloaded beside `out` if they are not named."""
    reports = reports or download(OPEN_I + "NLMCXR_reports.tgz", out.parent / "NLMCXR_reports.tgz")
    images = images or download(OPEN_I + "NLMCXR_png.tgz", out.parent / "NLMCXR_png.tgz")
    split, studies = json.loads(IU_XRAY_SPLIT.read_text(encoding="utf-8")), read_iu_xray_reports(reports)
    unknown = [name for names in split.values() for name in names if name not in studies]
    if unknown:
        raise ValueError(f"{reports}: {len(unknown)} of R2Gen's studies are not in it, such as {unknown[0]}; is it the "
                         f"whole archive?")
    building = out.with_name(out.name + ".building")
    targets = {image: building / "images" / name / f"{view}.png"
               for names in split.values() for name in names for view, image in enumerate(studies[name][1])}
    shrink_images(((content, name, targets[Path(name).stem]) for name, content in read_archive(images, ".png", LARGEST_IMAGE)
                   if Path(name).stem in targets), len(targets))
    finish(building, out, {"sections": "findings"} | {key: [{
        "id": name, "report": studies[name][0], "image_path": [f"{name}/0.png", f"{name}/1.png"], "split": key} for name in names]
        for key, names in split.items()})
    add_findings(out)


def add_findings(folder: Path) -> None:
    """findings.json of IU-Xray, whose annotation tells none: a study has what its report names."""
    spec = json.loads(IU_XRAY_FINDINGS.read_text(encoding="utf-8"))
    spec["studies"] = {
        study.id: [dict(zip(("finding", "side", "extent"), (finding, *details)))
                   for finding, details in named_findings(study.report, spec).items()]
        for studies in read_studies(configs.Data(root=str(folder))).values() for study in studies}
    unfinished = folder / "findings.unfinished"
    unfinished.write_text(json.dumps(spec), encoding="utf-8")
    unfinished.rename(folder / "findings.json")
    print(f"{folder / 'findings.json'}: what the reports name, by the phrases of "
          f"{IU_XRAY_FINDINGS.name}")


# A heading of a MIMIC-CXR report: capitals before a colon, or one of the usual names in any case, at the start of a line.
HEADING = re.compile(
    r"^[ \t]*((?:[A-Z][A-Z ,/&()-]*[A-Z)])|(?i:findings?(?:[ ]*(?:and|/|&)[ ]*impressions?)?|"
    r"impressions?(?:[ ]*(?:and|/|&)[ ]*findings?)?|indications?|(?:clinical )?history|comparisons?|techniques?|"
    r"exam(?:ination)?|reason for exam(?:ination)?|conclusions?|recommendations?|notifications?|wet read|final report))[ \t]*:",
    re.M)


def report_section(text: str, sections: str = "findings") -> str:
    """The FINDINGS of a MIMIC-CXR report, or FINDINGS and IMPRESSION (A19); "" if it has no FINDINGS.

    A joint section (FINDINGS AND IMPRESSION) is FINDINGS. Of several blocks with text the last counts: it is the final report.
    """
    found, headings = {}, list(HEADING.finditer(text))
    for heading, following in zip(headings, [*headings[1:], None]):
        body = text[heading.end():following and following.start()].strip()
        name = heading[1].lower()
        key = "findings" if "finding" in name else "impression" if "impression" in name else None
        if key and body.strip("_ \n"):
            found[key] = body
    if "findings" not in found:
        return ""
    return "\n".join(found[key] for key in sections.split("+") if key in found)


def build_mimic_cxr(out: Path, jpg: Path, reports: Path | None, sections: str = "findings",
                    annotation: Path | None = None) -> None:
    """MIMIC-CXR in R2Gen's form from PhysioNet's folders: an entry for each image of a study with FINDINGS, the official split.

    Args:
        jpg: mimic-cxr-jpg, with files/ and the table of the split.
        reports: mimic-cxr, with files/p10/p10000032/s50414267.txt and so on, or its mimic-cxr-reports.zip.
        annotation: R2Gen's own file; then the reports are not read.
    """
    tables = sorted(jpg.glob("mimic-cxr-2.*-split.csv*"))
    if annotation is None and not tables:
        raise FileNotFoundError(f"--jpg {jpg}: there is no mimic-cxr-2.*-split.csv.gz; expected the folder of mimic-cxr-jpg")
    if annotation:
        try:
            tree = json.loads(annotation.read_text(encoding="utf-8"))
        except ValueError:
            tree = None
        if not isinstance(tree, dict) or set(tree) - set(SPLITS) or not all(isinstance(entries, list) for entries in tree.values()):
            raise ValueError(f"--annotation {annotation}: expected R2Gen's {{'train': [...], 'val': [...], 'test': [...]}}")
        seen = set()
        for i, entry in enumerate(entry for split in SPLITS for entry in tree.get(split, [])):
            _study(entry, f"{annotation}: study {i}", "mimic_cxr", seen, None)  # no path leaves the folder
    else:
        with (gzip.open if tables[0].suffix == ".gz" else open)(tables[0], "rt", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            if not all(re.fullmatch(r"\d{8}" if key != "dicom_id" else r"[\w-]+", row.get(key) or "")
                       for key in ("dicom_id", "study_id", "subject_id")) or row.get("split") not in ("train", "validate", "test"):
                raise ValueError(f"{tables[0]}: got {row}; expected dicom_id, study_id, subject_id and split of MIMIC-CXR")
        texts = {study: report_section(text, sections) for study, text in read_mimic_cxr_reports(reports, rows).items()}
        tree = {split: [] for split in SPLITS}
        for row in rows:
            split, report = row["split"].replace("validate", "val"), texts.get(row["study_id"])
            if report:
                path = f"p{row['subject_id'][:2]}/p{row['subject_id']}/s{row['study_id']}/{row['dicom_id']}.jpg"
                tree[split].append({"id": row["dicom_id"], "study_id": int(row["study_id"]), "split": split,
                                    "subject_id": int(row["subject_id"]), "report": report, "image_path": [path]})
    building, targets = out.with_name(out.name + ".building"), {}  # {original: its small PNG}
    for entry in (entry for split in SPLITS for entry in tree.get(split, [])):
        small = [str(PurePosixPath(path).with_suffix(".png")) for path in entry["image_path"]]
        targets |= {jpg / "files" / path: building / "images" / png for path, png in zip(entry["image_path"], small)}
        entry["image_path"] = small
    shrink_images(((path, str(path), target) for path, target in targets.items()), len(targets))
    finish(building, out, tree if annotation else {"sections": sections} | tree)


def read_mimic_cxr_reports(reports: Path, rows: list[dict]) -> dict[str, str]:
    """{study_id: text} from a folder or a zip of report files."""
    if reports.is_file():
        return {Path(name).stem[1:]: content.decode("utf-8", "replace") for name, content in
                tqdm(read_archive(reports, ".txt", LARGEST_TEXT), desc="reports", unit="report")}
    files = reports / "files" if (reports / "files").is_dir() else reports
    paths = {row["study_id"]: files / f"p{row['subject_id'][:2]}/p{row['subject_id']}/s{row['study_id']}.txt" for row in rows}
    texts = {name: path.read_text(encoding="utf-8", errors="replace")
             for name, path in tqdm(paths.items(), desc="reports", unit="report") if path.is_file()}
    if not texts:
        raise FileNotFoundError(f"--reports {reports}: no report is there; expected mimic-cxr-reports.zip, or the folder with "
                                f"files/p10/p10000032/s50414267.txt")
    return texts


def check(data: configs.Data) -> list[str]:
    """Print a table of the data, and return all that is wrong with it: every image is opened."""
    problems: list[str] = []
    splits, owner = read_studies(data, problems), {}
    print(f"{data.root}: {data.dataset}, sections: {splits['train'][0].sections or 'not stated'}")
    print(f"{'split':<8}{'studies':>9}{'patients':>10}{'views':>9}{'reports':>9}{'words':>8}{'longest':>9}")
    for split, studies in splits.items():
        words = [len(study.report.split()) for study in studies] or [0]
        patients = {study.patient for study in studies if study.patient}
        print(f"{split:<8}{len(studies):9}{len(patients) or '-':>10}{sum(len(study.image_paths) for study in studies):9}"
              f"{len({study.report for study in studies}):9}{np.mean(words):8.1f}{max(words):9}")
        for study in studies:
            for path in study.image_paths:
                if owner.setdefault(path, study.id) != study.id:
                    problems.append(f"image {path}: in the studies {owner[path]!r} and {study.id!r}")
    with ProcessPoolExecutor() as pool:
        paths = [Path(data.root) / "images" / path for path in owner]
        found = pool.map(image_problem, paths, chunksize=32)
        problems += [problem for problem in tqdm(found, total=len(owner), desc="images", unit="image") if problem]
    return problems


def image_problem(path: Path) -> str | None:
    """What is wrong with an image, in one line, or None."""
    try:
        image = open_image(path)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    blank = all(low == high for low, high in np.atleast_2d(image.getextrema()))
    return f"image {path}: every pixel has one value" if blank else None


def build_once(out: Path, build: Callable[[], None]) -> None:
    """Let `build` make the data root `out` unless it is there: one process builds, others wait."""
    lock = out.with_name(out.name + ".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print(f"{out}: another process is making it; waiting", flush=True)
            fcntl.lockf(file, fcntl.LOCK_EX)  # until that process ends, however it ends
        if not (out / "annotation.json").is_file():
            build()
        lock.unlink(missing_ok=True)  # not where `build` failed: others may wait for this very file


def build_demo_if_missing(data: configs.Data) -> None:
    def build() -> None:
        print(f"{data.root}: not there yet; drawing the demo and pretraining its two models, about "
              "three minutes", flush=True)
        build_demo(Path(data.root), clean_iu_xray)
    if data.dataset == "demo" and not (Path(data.root) / "annotation.json").is_file():
        build_once(Path(data.root), build)


def end_in_one_line(main: Callable[[], None]) -> None:
    """Run a command. An expected fault, a loader's worker's as our own, ends it with one clear line and exit status 1."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        text = str(error).strip()
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text:
            text = (f"out of memory ({text.splitlines()[0]}); lower train.batch_size (VSE and DID depend on it) or "
                    f"train.eval_batch_size, or take smaller models")
        elif "Original Traceback" in text:  # of a worker: its own message is the last line
            text = text.splitlines()[-1].partition(": ")[2]
        elif isinstance(error, RuntimeError) and "DataLoader worker" not in text:
            raise
        sys.exit(f"error: {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    makers = {name: commands.add_parser(name) for name in READY}
    for name, maker in makers.items():
        maker.add_argument("--out", type=Path, default=Path("data") / name, help="default: %(default)s")
    for name, file in (("reports", "NLMCXR_reports.tgz"), ("images", "NLMCXR_png.tgz")):
        makers["iu_xray"].add_argument(f"--{name}", type=Path, help=f"{file}; downloaded if not named")
    makers["mimic_cxr"].add_argument("--jpg", type=Path, required=True, help="the folder of mimic-cxr-jpg")
    source = makers["mimic_cxr"].add_mutually_exclusive_group(required=True)
    source.add_argument("--reports", type=Path, help="the folder of mimic-cxr, or mimic-cxr-reports.zip")
    source.add_argument("--annotation", type=Path, help="R2Gen's own annotation.json")
    makers["mimic_cxr"].add_argument("--sections", choices=("findings", "findings+impression"),
                                     help="of --reports (A19); default: findings")
    checker = commands.add_parser("check")
    checker.add_argument("--config", required=True, help="a file of configs/")
    checker.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override the config")
    args = parser.parse_args()
    if args.command == "mimic_cxr" and args.annotation and args.sections:
        raise ValueError("--sections: of no use with --annotation, which holds the reports")
    if args.command == "check":
        for key in args.set:
            if not key.startswith("data."):
                raise ValueError(f"--set {key}: of no use with check; that takes --set data")
        problems = check(configs.load_config(args.config, args.set).data)
        for problem in problems[:50]:
            print(problem)
        if problems:
            raise ValueError(f"{len(problems)} problems" + (", the first 50 of them above" if len(problems) > 50 else ""))
        return print("nothing is wrong")
    if (args.out / "annotation.json").is_file():
        if args.command == "iu_xray" and not (args.out / "findings.json").is_file():
            return add_findings(args.out)
        return print(f"{args.out}: there already; nothing to do")
    if args.out.exists():
        raise ValueError(f"--out {args.out}: exists and holds no annotation.json; remove it, or name another folder")
    if args.command == "demo":
        build = partial(build_demo, args.out, clean_iu_xray)
    elif args.command == "iu_xray":
        build = partial(build_iu_xray, args.out, args.reports, args.images)
    else:
        build = partial(build_mimic_cxr, args.out, args.jpg, args.reports,
                        args.sections or "findings", args.annotation)
    build_once(args.out, build)


if __name__ == "__main__":
    end_in_one_line(main)
