"""Files: what others made, read as untrusted (JSON, weights, archives, images); ours, whole."""
import json
import os
import signal
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from threading import Semaphore
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from configs import InputError

SPLITS = ("train", "val", "test")
SHORT_SIDE = 256         # A24
SMALLEST_SPAN = 64       # of 255, 1st to 99th percentile; the darkest film of IU-Xray fills 100
FORMATS = ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP")  # whatever a name says; EPS runs a program


def leaves(path: str) -> bool:
    """Whether a path of other hands would lead out of the folder that it is joined to."""
    parts = PurePosixPath(path)
    return parts.is_absolute() or ".." in parts.parts or "\\" in path or "\0" in path


def require_none(problems: list[str], advice: str = "") -> None:
    """Print all problems and raise InputError with their number, if there are any."""
    for problem in problems:
        print(problem)
    if problems:
        raise InputError(f"{len(problems)} problems{advice}")


def require_place(root: Path, setting: str) -> None:
    """InputError that names the setting if no dataset can be made in a new folder `root`."""
    if root.exists() and not (root / "annotation.json").is_file():
        raise InputError(f"{setting}: {root} exists and holds no annotation.json; remove it, or "
                         f"name another folder")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=root.parent).close()
    except OSError as error:
        raise InputError(f"{setting}: cannot write into {root.parent} ({error.strerror}); name "
                         f"another folder") from None


def read_json(path: Path, expected: str):
    """What a JSON file holds. InputError says what is `expected`, and names a key that repeats."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text, object_pairs_hook=_each_key_once)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); expected {expected}") from None


def _each_key_once(pairs: list[tuple]) -> dict:
    """A JSON object; json.loads alone keeps the last of two values of one key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f"{twice!r:.100} stands twice")
    return found


def read_predictions(path: Path) -> list[dict]:
    """The rows of a `<name>_predictions.jsonl`; or {"id", "prediction"} of a JSON {id: report}.

    R2GenGPT writes {id: [report]}. Raises FileNotFoundError, or InputError for another file.
    """
    expected = "expected a JSON {id: report}, or one JSON object a line with id and prediction"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of predictions")
    try:
        if path.suffix.lower() == ".json":
            rows = []
            for name, its in read_json(path, "{id: report}").items():
                alone = isinstance(its, list) and len(its) == 1
                rows.append({"id": name, "prediction": its[0] if alone else its})
        else:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # not at Unicode's line ends
            rows = [json.loads(line, object_pairs_hook=_each_key_once)
                    for line in lines if line.strip()]
        for number, row in enumerate(rows, 1):
            _require_row(row, number)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: {expected}; got {type(error).__name__}: {error}") from None
    names = {row["id"] for row in rows}
    if not rows or len(names) < len(rows):
        raise InputError(f"{path}: {len(rows)} predictions of {len(names)} studies; {expected}, "
                         f"each id once")
    if len({"reference" in row for row in rows}) > 1:
        raise InputError(f"{path}: only some rows hold a reference; expected all or none")
    return rows


def _require_row(row: dict, number: int) -> None:
    """InputError where a row of predictions holds what cannot be scored; its id becomes a text."""
    if type(row["id"]) is int:
        row["id"] = str(row["id"])
    row["id"], row["prediction"]  # a KeyError names the one that is missing
    for key in row.keys() & {"id", "prediction", "reference", "reference_cut"}:
        if not isinstance(row[key], str):
            raise InputError(f"the {key} of number {number}, {row['id']!r:.99}: {row[key]!r:.99}")
    views = row.get("image_path", [])
    if not isinstance(views, list) or not all(isinstance(view, str) for view in views):
        raise InputError(f"the image_path of number {number}, {row['id']!r:.99}: {views!r:.99}")


def pretrained(kind, name: str, key: str, **options):
    """`kind.from_pretrained(name)`; FileNotFoundError that names the setting `key` if it fails."""
    try:
        return kind.from_pretrained(name, **options)
    except Exception as error:  # a cut file of weights ends in an error of safetensors' own
        if out_of_memory(error):
            raise  # no fault of the folder
        raise FileNotFoundError(f"{key}: cannot load {name!r} as {kind.__name__}: expected a "
                                f"folder of a Hugging Face model, or a name on the hub that this "
                                f"machine can reach ({first_line(error)})") from None


def out_of_memory(error: Exception) -> bool:
    """Of the host or of a GPU; torch reports the host's as a RuntimeError."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "allocate memory" in str(error)


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)  # some say nothing


def read_checkpoint(path: str | Path, owner: str = "VDGen", keys=("model", "config"),
                    mmap: bool = False) -> dict:
    """A file of torch.save, tensors and plain values only: no code in it is run.

    `mmap`: tensors stay in the file, whose pages all processes of a machine share. Raises
    FileNotFoundError, or InputError if it is no checkpoint of `owner` with those `keys`.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        missing = [key for key in keys if key not in checkpoint]
    except FileNotFoundError:
        raise FileNotFoundError(f"checkpoint {path}: no such file") from None
    except Exception as error:  # whatever junk, or code, makes of it
        if isinstance(error, OSError) or out_of_memory(error):
            raise  # no fault of the file
        missing = keys
    if missing:
        raise InputError(f"checkpoint {path}: not a checkpoint of {owner}; expected a file of "
                         f"torch.save with {', '.join(keys)}, of tensors and plain values only")
    return checkpoint


def write_whole(path: Path, content: str | dict) -> None:
    """A text, or a dict by torch.save. A stop or a full disk leaves the file of before, or none."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as either
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise OSError(f"cannot write {path} ({reason}); one from before is still whole") from None


def process_pool() -> ProcessPoolExecutor:
    """A process for each core. They inherit an ignored Ctrl-C: the main process ends them."""
    pool = ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    pool.submit(int)  # forks them all
    signal.signal(signal.SIGINT, before)
    return pool


def read_archive(path: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files of a .tgz or .zip that end in `suffix`; nothing is written.

    Raises FileNotFoundError, or InputError for a broken archive.
    """
    broken = (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, RuntimeError)
    try:
        for name, file in _members(path):
            if name.endswith(suffix):
                yield name, file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except broken as error:
        raise InputError(f"{path}: not a whole archive ({error}); fetch it again") from None


def _members(path: Path) -> Iterator[tuple[str, BinaryIO]]:
    """Name and content of each ordinary file of an archive."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield name, archive.open(name)
    else:
        with tarfile.open(path, "r|*") as archive:
            for info in archive:
                if info.isreg():
                    yield info.name, archive.extractfile(info)


# Of a PNG of 16 bits a channel, in colour or transparent, Pillow keeps the upper bytes. By type:
# the raw mode that gives the lower ones (of grey and transparency: all four bytes, as R, G, B, A).
LOWER_BYTES = {2: "RGB;16L", 4: "RGBA", 6: "RGBA;16L"}


def _picture(content: bytes, raw_mode: str | None = None) -> Image.Image:
    """The one picture of a file, turned as EXIF says."""
    image = Image.open(BytesIO(content), formats=FORMATS)
    pictures = getattr(image, "n_frames", 1)
    if pictures > 1 and image.format != "MPO":  # that is a phone's JPEG with a depth map
        raise InputError(f"{pictures} pictures in one file, expected one")
    if raw_mode:
        image.tile = [(codec, box, offset, raw_mode) for codec, box, offset, _ in image.tile]
    image.load()
    with suppress(Exception):  # a broken block of EXIF turns nothing
        ImageOps.exif_transpose(image, in_place=True)
    return image


def open_image(path: str | Path, content: bytes | None = None) -> Image.Image:
    """A24: one view as 8-bit grey or RGB; 16 bit scaled by its own maximum, turned as EXIF says.

    `content`: of the file, where that lies in an archive. Raises FileNotFoundError, or InputError
    for a file that is no whole image, holds several, or more than Pillow's limit of pixels.
    """
    broken = (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError)
    try:
        if content is None:
            with open(path, "rb") as file:  # no Path: see ReportDataset
                content = file.read()
        image = _picture(content)
        kind = content[25] if image.format == "PNG" and content[24] == 16 else None
        if kind in LOWER_BYTES:
            values = np.asarray(image)[..., :3].astype(np.uint16) * 256
            lower = np.asarray(_picture(content, LOWER_BYTES[kind]))
            return _scale(values + (lower[..., 1:2] if kind == 4 else lower[..., :3]))
        if image.mode[0] in "IF":  # 16 bit, or 32
            return _scale(np.asarray(image))
        if image.mode == "P":
            image = image.convert("RGBA")  # a palette may hold transparency
        return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"image {path}: no such file") from None
    except broken as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnidentifiedImageError):
            reason = "no known format; export DICOM, HEIC and the like as PNG"
        raise InputError(f"image {path}: not a whole PNG or JPEG image ({reason})") from None


def _scale(values: np.ndarray) -> Image.Image:
    """A24: 8-bit grey (H, W) or RGB (H, W, 3) whose maximum is white."""
    values = values.clip(min=0).astype(np.float32)
    return Image.fromarray((values * (255 / max(values.max(), 1))).round().astype(np.uint8))


def image_problem(path: Path) -> str | None:
    """What is wrong with an image, in one line, or None."""
    try:
        image = open_image(path)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    low, high = np.percentile(image, (1, 99), axis=(0, 1))  # a bright marker is no film
    span = np.max(high - low)
    if span < SMALLEST_SPAN:
        return (f"image {path}: blank or dark: 98 % of its values fill {span:.0f} of 255, expected "
                f"{SMALLEST_SPAN} at least; export it with a window that fills the range")
    return None


def shrink_image(path: str | Path, content: bytes | None, target: Path) -> str | None:
    """Write a view as 8-bit PNG, its short side at most SHORT_SIDE; or what is wrong with it."""
    try:
        image = open_image(path, content)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    scale = min(1, SHORT_SIDE / min(image.size))
    size = [round(length * scale) for length in image.size]
    image = image.resize(size, Image.Resampling.BICUBIC)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    image.save(unfinished, "PNG")
    unfinished.rename(target)
    return None


def shrink_images(jobs: Iterable[tuple], total: int) -> dict[Path, str]:
    """`shrink_image` of each tuple of arguments whose target is not there, by all cores.

    Returns {target: what is wrong with its image}.
    """
    free, done = Semaphore(64), {}  # a bound: jobs hold whole images
    with process_pool() as pool:
        for job in tqdm(jobs, total=total, desc="images", unit="image"):
            target = job[-1]
            if not target.is_file():
                free.acquire()
                done[target] = pool.submit(shrink_image, *job)
                done[target].add_done_callback(lambda _: free.release())
    return {target: answer.result() for target, answer in done.items() if answer.result()}


def finish(building: Path, out: Path, tree: dict, problems: list[str]) -> None:
    """The last step of every build: the annotation, then the final name; not with `problems`."""
    require_none(problems, f"; what is done stays in {building}, and the next run goes on from "
                           f"there")
    (building / "annotation.json").write_text(json.dumps(tree), encoding="utf-8")
    building.rename(out)
    counts = ", ".join(f"{len(tree.get(split, []))} {split}" for split in SPLITS)
    print(f"{out}: {counts} studies")
