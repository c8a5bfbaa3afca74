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
import os
import pickle
import re
import signal
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
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
                           read_json, require_none, require_place)
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

    A loader's worker shares its parent's memory until one of them writes, and reading a Python
    object writes its reference count: each worker would soon hold a copy of an ordinary list.
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
            "own": lambda report: " ".join(report.split())}  # blanks and line breaks alone


def read_studies(data: configs.Data,
                 problems: list[str] | None = None) -> dict[str, Sequence[Study]]:
    """`parse_studies` of `data.root`/annotation.json; FileNotFoundError if there is none."""
    path = Path(data.root) / "annotation.json"
    if not path.is_file():
        command = "" if data.dataset == "own" else f" (`python data.py {data.dataset}`)"
        raise FileNotFoundError(f"data.root: there is no {path}; make it as the README shows under "
                                f"\"Data\"{command}, or set data.root to where it is")
    return parse_studies(read_annotation(path), path, data.dataset, data.limit, problems)


def parse_studies(tree: dict, path: Path, dataset: str, limit: int | None = None,
                  problems: list[str] | None = None) -> dict[str, Sequence[Study]]:
    """The studies of each split, reports cleaned; a split that the annotation lacks is empty.

    Raises InputError for the first fault; with a list of `problems` it appends all of them there.
    """
    seen, patients, splits = set(), {}, {split: Packed() for split in SPLITS}
    for split, studies in splits.items():
        for i, entry in enumerate(tree.get(split, [])[:limit]):
            study, faults = _study(entry, dataset, seen, tree.get("sections"))
            first = patients.setdefault(study.patient, split) if study.patient else split
            if first != split:
                faults.append(f"patient {study.patient!r:.100} is in {first}, too; expected in one "
                              f"split only")
            name = f" study {study.id!r:.100}:" if study.id else ""
            for fault in faults:
                problem = f"{path}: {split}[{i}]:{name} {fault}"
                if problems is None:
                    raise InputError(problem)
                problems.append(problem)
            studies.append(study)
    return splits


def read_annotation(path: Path) -> dict:
    """The JSON of an annotation, its splits lists. Other keys that hold no studies are ignored."""
    expected = "one object {'train': [...], 'val': [...], 'test': [...]} of lists of studies"
    tree = read_json(path, f"{expected}, not CSV or a study a line")
    tree = tree if isinstance(tree, dict) else {}
    for name in tree.keys() - set(SPLITS):
        first = tree[name][0] if isinstance(tree[name], list) and tree[name] else None
        if isinstance(first, dict) and first.keys() & {"report", "image_path"}:
            raise InputError(f"{path}: {name!r:.100} holds studies; rename it to train, val (of "
                             f"validation) or test, or remove it")
    splits = [tree[split] for split in SPLITS if split in tree]
    if not any(splits) or not all(isinstance(studies, list) for studies in splits):
        raise InputError(f"{path}: expected {expected}; a split may be missing")
    return tree


def _study(entry, dataset: str, seen: set, sections: str | None) -> tuple[Study, list[str]]:
    """An entry of the annotation, as far as it can be read, and its faults; its id joins `seen`."""
    if not isinstance(entry, dict):
        return Study("", "", ()), [f"got {entry!r:.100}, expected id, report and image_path"]
    name, given, faults = entry.get("id"), entry.get("image_path"), []
    name = _text("id", str(name) if isinstance(name, int) else name, faults)
    if name and name in seen:
        faults.append("stands twice; ids must be unique in all splits")
    seen.add(name)
    report = _text("report", entry.get("report"), faults)
    paths = [_text("image_path", path, faults) for path in given] if isinstance(given, list) else []
    if not paths or any(map(leaves, paths)):
        faults.append(f"image_path: got {given!r:.100}, expected a list of one path or more, "
                      f"relative to the images folder")
    kept = tuple(path for path in paths if path and not leaves(path))
    patient = _patient(entry.get("subject_id"), name, dataset)
    return Study(name, report and CLEANING[dataset](report), kept, patient, sections), faults


def _text(key: str, value, faults: list[str]) -> str:
    """A text of an entry; "" and a line more in `faults` if it is none."""
    if not isinstance(value, str) or not value.strip():
        faults.append(f"{key}: got {value!r:.100}, expected a text")
    elif half := re.search("[\ud800-\udfff]", value):  # JSON can hold it, a tokenizer cannot
        faults.append(f"{key}: got {half[0]!r}, half a character; take it out")
    else:
        return value
    return ""


def _patient(subject, name: str, dataset: str) -> str | None:
    """subject_id, else the number of an IU-Xray id; None: not known."""
    subject = str(subject).strip().removesuffix(".0")  # pandas: NaN for a gap, then 7.0 for 7
    if subject.lower() not in ("", "none", "nan"):
        return subject
    number = re.match(r"CXR\d+", name) if dataset == "iu_xray" else None
    return number[0] if number else None


def require_images(splits: dict[str, Sequence[Study]], data: configs.Data) -> None:
    """FileNotFoundError if an image is not there."""
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
    """Studies as tensors, read and tokenised by the loader's workers.

    A report of at most `max_report_tokens` tokens ends in the end token; a longer one is cut and
    does not (A20, A23).

    Item: index, id, report, images (V, 3, H, W) uint8, report_ids (a list).
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

    Arrays, no tensors: a worker sends an array through a pipe, and a tensor by shared memory, of
    which a container may have too little (Docker: 64 MB).

    Returns: indices, ids, reports, view_counts, report_lengths (lists of B), images (sum of views,
    3, H, W) uint8, report_ids (B, L) padded on the right.
    """
    reports = [torch.tensor(item["report_ids"]) for item in items]
    return {"indices": [item["index"] for item in items],
            "ids": [item["id"] for item in items],
            "reports": [item["report"] for item in items],
            "images": torch.cat([item["images"] for item in items]).numpy(),
            "view_counts": [len(item["images"]) for item in items],
            "report_ids": torch.nn.utils.rnn.pad_sequence(reports, batch_first=True).numpy(),
            "report_lengths": [len(report) for report in reports]}


def digest(studies: Sequence[Study]) -> str:
    """A hash of ids, reports and image names, in their order; the data's folder has no part."""
    found = hashlib.sha256()
    for study in studies:
        found.update(repr((study.id, study.report, study.image_paths)).encode())
    return found.hexdigest()


def loader(dataset: ReportDataset, batches: Iterable[list[int]], workers: int,
           device: torch.device) -> Iterator[dict]:
    """Those batches (`collate`), read ahead by so many processes; for a GPU in pinned memory.

    The workers inherit an ignored Ctrl-C: the main process ends them.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stream = iter(DataLoader(
            dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate,
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            generator=torch.Generator()))  # without a draw of the global random state
    finally:
        signal.signal(signal.SIGINT, before)
    for batch in stream:
        for key in ("images", "report_ids"):
            values = torch.from_numpy(batch[key])
            batch[key] = values.pin_memory() if device.type == "cuda" else values
        yield batch


def epoch_batches(studies: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The shuffled batches of an epoch, by its arguments alone; no incomplete last one (A22)."""
    # PyTorch's generator takes 32 bits: distinct for each (seed, epoch) of seeds below 4,294.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**32)
    order = torch.randperm(studies, generator=generator).tolist()
    return [order[i:i + batch_size] for i in range(0, studies - batch_size + 1, batch_size)]


def batches_from(step: int, studies: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """The batches of all epochs, one after the other, from that of `step` (from 0) on; endless."""
    first, done = divmod(step, studies // batch_size)
    for epoch in count(first):
        yield from epoch_batches(studies, batch_size, seed, epoch)[done:]
        done = 0


def print_table(splits: dict[str, Sequence[Study]]) -> None:
    """A row for each split, then what of its texts the scores cannot use."""
    titles, notes = ("studies", "patients", "views", "reports", "words", "longest"), []
    print(f"{'split':<8}" + "".join(f"{title:>10}" for title in titles))
    for split, studies in splits.items():
        words = [len(study.report.split()) for study in studies] or [0]
        patients = {study.patient for study in studies if study.patient}
        views = sum(len(study.image_paths) for study in studies)
        reports = len({study.report for study in studies})
        print(f"{split:<8}{len(studies):10}{len(patients) or '-':>10}{views:10}{reports:10}"
              f"{np.mean(words):10.1f}{max(words):10}")
        silent = [study.id for study in studies
                  if study.report and not any(map(str.isalnum, study.report))]
        if silent:
            notes.append(f"{split}: {len(silent)} reports without a word, as of {silent[0]!r}")
        letters = sum(len(study.report) for study in studies)
        if letters > 15 * sum(words):  # English has 6, Finnish 9
            notes.append(f"{split}: {letters / sum(words):.0f} letters a word; the scores need "
                         f"blanks between words")
    for note in notes:
        print(note)


def check(data: configs.Data) -> list[str]:
    """Print a table of the data, open every image, and return all that is wrong."""
    problems: list[str] = []
    splits, owner = read_studies(data, problems), {}
    sections = next((studies[0].sections for studies in splits.values() if studies), None)
    print(f"{data.root}: {data.dataset}, sections: {sections or 'not stated'}")
    print_table(splits)
    for study in (study for studies in splits.values() for study in studies):
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
    if data.dataset != "demo" or (root / "annotation.json").is_file():
        return
    require_place(root, "data.root")
    print(f"{root}: not there yet; drawing the demo", flush=True)
    with TemporaryDirectory(prefix=f"{root.name}.", dir=root.parent) as folder:
        build_demo(Path(folder) / root.name)
        with suppress(OSError):  # another process may have been faster
            (Path(folder) / root.name).rename(root)


def end_in_one_line(main: Callable[[], None]) -> None:
    """Run a command. InputError, OSError, a lack of memory and a dead worker end it in one line.

    Any other exception is a fault of the code, perhaps of a reader's edit: it keeps its traceback.
    """
    try:
        main()
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would end in a traceback
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
            raise
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


def make(args: argparse.Namespace) -> None:
    require_place(args.out, "--out")
    if args.command == "demo":
        build_demo_if_missing(configs.Data(root=str(args.out), dataset="demo"))
    elif args.command == "iu_xray":
        build_iu_xray(args.out, args.reports, args.images)
    elif args.annotation:
        tree = read_annotation(args.annotation)
        parse_studies(tree, args.annotation, "mimic_cxr")  # InputError if it is broken
        build_mimic_cxr(args.out, args.jpg, tree, args.skip_missing)
    else:
        tree = annotate(args.jpg, args.reports, args.sections or "findings")
        build_mimic_cxr(args.out, args.jpg, tree, args.skip_missing)


def main() -> None:
    args = parse_arguments()
    if args.command == "check":
        require_none(check(configs.load_config(args.config, args.set).data))
        print("nothing is wrong")
        return
    if (args.out / "annotation.json").is_file():
        print(f"{args.out}: there already")
    else:
        make(args)
    if args.command == "iu_xray" and not (args.out / "findings.json").is_file():
        write_findings(args.out, read_studies(configs.Data(root=str(args.out))))


if __name__ == "__main__":
    end_in_one_line(main)
