"""Studies from disk to batches: R2Gen's annotation format, its report cleaning (A15), images.

    python data.py demo                                                 # train.py does it by itself
    python data.py iu_xray [--reports NLMCXR_reports.tgz --images NLMCXR_png.tgz]    # else fetched
    python data.py mimic_cxr --jpg DIR --reports DIR [--sections ...] [--skip-missing]
    python data.py check --config configs/iu_xray.yaml           # open every image, count, compare

How a dataset is made stands in configs/NAME.py. Left out on purpose: augmentation (A21: a flip
would turn left into right).
"""
import argparse
import hashlib
import json
import os
import pickle
import re
import signal
import sys
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import configs
from configs import InputError
from configs.files import (SPLITS, image_problem, leaves, open_image, out_of_memory, process_pool,
                           require_none)
from configs.demo import build_demo
from configs.iu_xray import build_iu_xray, write_findings
from configs.mimic_cxr import annotate, build_mimic_cxr

# R2Gen's character class. By accident `:-\[` is a range: it also deletes <, =, >, @ and capitals,
# and keeps - # $ (A15).
R2GEN_PUNCTUATION = re.compile(r"[.,?;*!%^&_+():-\[\]{}]")


@dataclass(frozen=True)
class Study:
    id: str
    report: str                   # cleaned
    image_paths: tuple[str, ...]  # one for each view, relative to images/
    patient: str | None = None    # subject_id, or the number of an IU-Xray id; None: not known
    sections: str | None = None   # of the report, as annotation.json states them (A19)


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
    """A15: R2Gen's cleaning of an IU-Xray report: lower case, ` . ` after each sentence.

    Kept to the letter so that scores compare, quirks included: empty sentences stay, and cleaning
    twice differs from cleaning once ("a. b." becomes "a . b .", then "a . b  .").
    """
    for _ in range(3):
        report = report.replace("..", ".")
    report = report.replace("1. ", "")  # list numbers; "21. " loses its 1, too
    for before in (". ", " "):
        for number in "2345":
            report = report.replace(f"{before}{number}. ", ". ")
    sentences = report.strip().lower().split(". ")
    cleaned = [R2GEN_PUNCTUATION.sub("", re.sub(r"[\"/\\']", "", s).strip()) for s in sentences]
    return " . ".join(cleaned) + " ."


def clean_mimic_cxr(report: str) -> str:
    """A15: R2Gen's cleaning of a MIMIC-CXR report: line breaks and runs, then as IU-Xray."""
    report = report.replace("\n", " ")
    for pair, times in (("__", 7), ("  ", 6), ("..", 8)):
        for _ in range(times):
            report = report.replace(pair, pair[0])
    return clean_iu_xray(report)


CLEANING = {"iu_xray": clean_iu_xray, "mimic_cxr": clean_mimic_cxr, "demo": clean_iu_xray,
            "own": clean_iu_xray}


def read_studies(data: configs.Data,
                 problems: list[str] | None = None) -> dict[str, Sequence[Study]]:
    """The studies of each split in `data.root`/annotation.json (R2Gen's format), reports cleaned.

    Raises FileNotFoundError if there is none, and InputError as `parse_studies` does.
    """
    path = Path(data.root) / "annotation.json"
    if not path.is_file():
        command = "" if data.dataset == "own" else f" (`python data.py {data.dataset}`)"
        raise FileNotFoundError(f"data.root: there is no {path}; make it as the README shows under "
                                f"\"Data\"{command}, or set data.root to where it is")
    return parse_studies(read_annotation(path), path, data.dataset, data.limit, problems)


def parse_studies(tree: dict, path: Path, dataset: str, limit: int | None = None,
                  problems: list[str] | None = None) -> dict[str, Sequence[Study]]:
    """The studies of each split of an annotation; one that it lacks is empty.

    Raises InputError for a broken study, and for a patient in two splits; with a list of `problems`
    it appends these there instead.
    """
    seen, patients, splits = set(), {}, {split: Packed() for split in SPLITS}
    for split, studies in splits.items():
        for i, entry in enumerate(tree.get(split, [])[:limit]):
            place = f"{path}: {split}[{i}]"
            try:
                study = _study(entry, place, dataset, seen, tree.get("sections"))
                studies.append(study)
                if study.patient and patients.setdefault(study.patient, split) != split:
                    raise InputError(f"{place}: patient {study.patient} is in "
                                     f"{patients[study.patient]}, too; expected in one split only")
            except ValueError as error:
                if problems is None:
                    raise
                problems.append(str(error))
    return splits


def read_annotation(path: Path) -> dict:
    """The JSON of an annotation in R2Gen's format, its splits lists; any split may be missing."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    known = isinstance(tree, dict) and not set(tree) - {*SPLITS, "sections"}
    splits = [tree[split] for split in SPLITS if split in tree] if known else []
    if not any(splits) or not all(isinstance(studies, list) for studies in splits):
        raise InputError(f"{path}: expected {{'train': [...], 'val': [...], 'test': [...]}}, lists "
                         f"of studies; a split may be missing")
    return tree


def _study(entry, place: str, dataset: str, seen: set, sections: str | None) -> Study:
    """The Study of one entry of the annotation, which is checked; its id joins `seen`."""
    expected = "expected a study with id, report and image_path"
    if not isinstance(entry, dict):
        raise InputError(f"{place}: got {entry!r:.100}, {expected}")
    name, report, paths = (entry.get(key) for key in ("id", "report", "image_path"))
    if not isinstance(name, (str, int)) or name == "":
        raise InputError(f"{place}: its id is {name!r:.100}; {expected}")
    name = str(name)
    place = f"{place}: study {name!r:.100}"
    if name in seen:
        raise InputError(f"{place} stands twice; ids must be unique in all splits")
    seen.add(name)
    if not isinstance(report, str) or not report.strip():
        raise InputError(f"{place} has no report: got {report!r:.100}, expected a text")
    if not isinstance(paths, list) or not paths or \
            not all(isinstance(path, str) and path and not leaves(path) for path in paths):
        raise InputError(f"{place}: image_path: got {paths!r:.100}, expected a list of one path or "
                         f"more, relative to the images folder")
    patient = entry.get("subject_id")
    if dataset == "iu_xray" and (number := re.match(r"CXR\d+", name)):
        patient = patient or number[0]
    return Study(name, CLEANING[dataset](report), tuple(paths), patient and str(patient), sections)


def require_images(splits: dict[str, Sequence[Study]], data: configs.Data) -> None:
    """The cheap part of `data.py check`: FileNotFoundError if an image is not there."""
    images = Path(data.root) / "images"
    paths = (path for studies in splits.values() for study in studies for path in study.image_paths)
    missing = [path for path in paths if not os.path.isfile(f"{images}/{path}")]
    if missing:
        raise FileNotFoundError(f"{images}: {len(missing)} images are not there, such as "
                                f"{missing[0]}; `python data.py check --config ...` lists them all")


def read_image(path: str | Path, size: int) -> Tensor:
    """A24: one view as (3, size, size) uint8, bicubic and antialiased, aspect not kept."""
    pixels = np.array(open_image(path).resize((size, size), Image.Resampling.BICUBIC))
    pixels = torch.from_numpy(pixels)
    return pixels.expand(3, size, size) if pixels.dim() == 2 else pixels.permute(2, 0, 1)


class ReportDataset(Dataset):
    """Studies as tensors, read and tokenised when asked for: by the loader's workers.

    A report of at most `max_report_tokens` tokens ends in the end token; a longer one is cut and
    does not (A20, A23).

    Item: {"index": int, "id": str, "report": str, "images": (V, 3, H, W) uint8, "report_ids": list
    of token ids}.
    """

    def __init__(self, studies: Sequence[Study], data: configs.Data, image_size: int, tokenizer):
        self.studies, self.image_size = studies, image_size
        # Strings: a Path interns its parts, and a worker would copy the table of interned strings.
        self.images = f"{data.root}/images"
        self.tokenizer, self.limit = tokenizer, data.max_report_tokens

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, index: int) -> dict:
        study = self.studies[index]
        views = [read_image(f"{self.images}/{path}", self.image_size)
                 for path in study.image_paths]
        ids = self.tokenizer(study.report, add_special_tokens=False).input_ids
        ids = ids + [self.tokenizer.eos_token_id] if len(ids) <= self.limit else ids[:self.limit]
        return {"index": index, "id": study.id, "report": study.report,
                "images": torch.stack(views), "report_ids": ids}


def collate(items: list[dict]) -> dict:
    """One batch; its studies may differ in their number of views (A8).

    Returns: indices (B numbers of studies), ids, reports (B strings each), images (sum of views, 3,
    H, W) uint8, view_counts (B ints), report_ids (B, L) padded on the right to the longest report,
    report_lengths (B ints).
    """
    reports = [torch.tensor(item["report_ids"]) for item in items]
    return {"indices": [item["index"] for item in items],
            "ids": [item["id"] for item in items], "reports": [item["report"] for item in items],
            "images": torch.cat([item["images"] for item in items]),
            "view_counts": [len(item["images"]) for item in items],
            "report_ids": torch.nn.utils.rnn.pad_sequence(reports, batch_first=True),
            "report_lengths": [len(report) for report in reports]}


def digest(studies: Sequence[Study]) -> str:
    """Of ids, reports and image names, in their order; not of where they lie."""
    found = hashlib.sha256()
    for study in studies:
        found.update(repr((study.id, study.report, study.image_paths)).encode())
    return found.hexdigest()


def ignore_interrupt(worker: int) -> None:
    """A worker ignores Ctrl-C, which reaches it, too: the main process ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def loader(dataset: ReportDataset, batches: list[list[int]], workers: int,
           device: torch.device) -> DataLoader:
    """Those batches, read ahead by so many processes; without a draw of the global random state."""
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
        pin_memory=device.type == "cuda", worker_init_fn=ignore_interrupt,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        generator=torch.Generator())


def epoch_batches(studies: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The shuffled batches of an epoch, by its arguments alone; no incomplete last one (A22)."""
    # Distinct for each (seed, epoch) of seeds below 2**43: no run has 1,000,003 epochs.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(studies, generator=generator).tolist()
    return [order[i:i + batch_size] for i in range(0, studies - batch_size + 1, batch_size)]


def check(data: configs.Data) -> list[str]:
    """Print a table of the data, and return all that is wrong with it: every image is opened."""
    problems: list[str] = []
    splits, owner = read_studies(data, problems), {}
    sections = next((studies[0].sections for studies in splits.values() if studies), None)
    print(f"{data.root}: {data.dataset}, sections: {sections or 'not stated'}")
    titles = ("studies", "patients", "views", "reports", "words", "longest")
    print(f"{'split':<8}" + "".join(f"{title:>10}" for title in titles))
    for split, studies in splits.items():
        words = [len(study.report.split()) for study in studies] or [0]
        patients = {study.patient for study in studies if study.patient}
        views = sum(len(study.image_paths) for study in studies)
        reports = len({study.report for study in studies})
        print(f"{split:<8}{len(studies):10}{len(patients) or '-':>10}{views:10}{reports:10}"
              f"{np.mean(words):10.1f}{max(words):10}")
        for study in studies:
            for path in study.image_paths:
                if owner.setdefault(path, study.id) != study.id:
                    problems.append(f"image {path}: of {owner[path]!r} and of {study.id!r}")
    paths = [Path(data.root) / "images" / path for path in owner]
    with process_pool() as pool:
        found = tqdm(pool.map(image_problem, paths, chunksize=32), "images", len(paths))
        problems += [problem for problem in found if problem]
    return problems


def build_demo_if_missing(data: configs.Data) -> None:
    """Draw the demo's films if they are not there; any other dataset must be."""
    root = Path(data.root)
    in_the_way = root.exists()
    if data.dataset != "demo" or (root / "annotation.json").is_file():
        return
    if in_the_way:
        raise InputError(f"data.root: {root} exists and holds no annotation.json; remove it, or "
                         f"name another folder")
    print(f"{root}: not there yet; drawing the demo", flush=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{root.name}.", dir=root.parent) as folder:
        build_demo(Path(folder) / root.name)
        with suppress(OSError):  # another process may have been faster
            (Path(folder) / root.name).rename(root)


def end_in_one_line(main: Callable[[], None]) -> None:
    """Run a command. An expected fault, a worker's too, ends it in one clear line and status 1.

    Expected are InputError, OSError, a lack of memory and a dead worker of the loader. Any other
    exception is a fault of the code, perhaps of a reader's edit: it keeps its traceback.
    """
    try:
        main()
    except KeyboardInterrupt as stop:
        if str(stop):
            print(stop, file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        if out_of_memory(error):
            text = (f"out of memory ({text.splitlines()[0]}); in training set train.recompute, or "
                    f"lower train.batch_size (VSE and DID depend on it); where reports are "
                    f"written, lower train.eval_batch_size")
        elif not isinstance(error, (InputError, OSError)) and "DataLoader worker (" not in text:
            raise  # a fault of the code
        elif "Original Traceback" in text:  # of a worker: its own message is the last line
            text = text.splitlines()[-1].partition(": ")[2]
        sys.exit(f"error: {text}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    makers = {name: commands.add_parser(name) for name in ("demo", "iu_xray", "mimic_cxr")}
    for name, maker in makers.items():
        maker.add_argument("--out", type=Path, default=Path("data", name), help="%(default)s")
    iu_xray, mimic = makers["iu_xray"], makers["mimic_cxr"]
    iu_xray.add_argument("--reports", type=Path, help="NLMCXR_reports.tgz; downloaded if not named")
    iu_xray.add_argument("--images", type=Path, help="NLMCXR_png.tgz; downloaded if not named")
    mimic.add_argument("--jpg", type=Path, required=True, help="the folder of mimic-cxr-jpg")
    source = mimic.add_mutually_exclusive_group(required=True)
    source.add_argument("--reports", type=Path, help="mimic-cxr, or mimic-cxr-reports.zip")
    source.add_argument("--annotation", type=Path, help="R2Gen's own annotation.json")
    mimic.add_argument("--sections", choices=("findings", "findings+impression"), help="A19")
    mimic.add_argument("--skip-missing", action="store_true",
                       help="leave out the studies whose images are missing or broken")
    checker = commands.add_parser("check")
    checker.add_argument("--config", required=True, help="a file of configs/")
    checker.add_argument("--set", nargs="+", action="extend", default=[], metavar="data.KEY=VALUE")
    args = parser.parse_args()
    if args.command == "mimic_cxr" and args.annotation and args.sections:
        raise InputError("--sections: of no use with --annotation, which holds the reports")
    for key in getattr(args, "set", ()):
        if not key.startswith("data."):
            raise InputError(f"--set {key}: of no use with check; that takes --set data")
    return args


def main() -> None:
    args = parse_arguments()
    if args.command == "check":
        require_none(check(configs.load_config(args.config, args.set).data))
        return print("nothing is wrong")
    if (args.out / "annotation.json").is_file():
        print(f"{args.out}: there already")
    elif args.out.exists():
        raise InputError(f"--out {args.out}: exists and holds no annotation.json; remove it, or "
                         f"name another folder")
    elif args.command == "demo":
        build_demo_if_missing(configs.Data(root=str(args.out), dataset="demo"))
    elif args.command == "iu_xray":
        build_iu_xray(args.out, args.reports, args.images)
    else:
        if args.annotation:
            tree = read_annotation(args.annotation)
            parse_studies(tree, args.annotation, "mimic_cxr")  # InputError if it is broken
        else:
            tree = annotate(args.jpg, args.reports, args.sections or "findings")
        build_mimic_cxr(args.out, args.jpg, tree, args.skip_missing)
    if args.command == "iu_xray":  # in R2Gen's own folder, too
        write_findings(args.out, read_studies(configs.Data(root=str(args.out))))


if __name__ == "__main__":
    end_in_one_line(main)
