"""Files: what others made, read as untrusted (checkpoints, archives, images); ours, written whole."""
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
from threading import Semaphore
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from configs import InputError

SPLITS = ("train", "val", "test")
SHORT_SIDE = 256         # A24
LARGEST_TEXT = 1 << 20   # bytes
LARGEST_IMAGE = 64 << 20  # bytes
FORMATS = ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP")  # whatever a name says; EPS runs a program


def leaves(path: str) -> bool:
    """Whether a path of other hands would lead out of the folder that it is joined to."""
    parts = PurePosixPath(path)
    return parts.is_absolute() or ".." in parts.parts or "\\" in path or "\0" in path


def require_none(problems: list[str], advice: str = "") -> None:
    """Print the first 50 problems and raise InputError with their number, if there are any."""
    for problem in problems[:50]:
        print(problem)
    if problems:
        shown = ", the first 50 of them above" if len(problems) > 50 else ""
        raise InputError(f"{len(problems)} problems{shown}{advice}")


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

    Args:
        path: best.pt or last.pt, or a file of another owner.
        owner: whose checkpoint is expected; for the error.
        keys: those that it must have.
        mmap: tensors stay in the file, whose pages all processes of a machine share.
    Raises:
        FileNotFoundError: no such file. InputError: it is no such checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        missing = [key for key in keys if key not in checkpoint]
    except FileNotFoundError:
        raise FileNotFoundError(f"checkpoint {path}: no such file") from None
    except Exception as error:  # whatever junk, or code, makes of it
        if isinstance(error, OSError) or out_of_memory(error):
            raise  # it may not be read, or not now: no fault of the file
        missing = keys
    if missing:
        raise InputError(f"checkpoint {path}: not a checkpoint of {owner}; expected a file of "
                         f"torch.save with {', '.join(keys)}, of tensors and plain values only")
    return checkpoint


def write_whole(path: Path, content: str | dict) -> None:
    """A text, or a dict by torch.save, under another name, then renamed.

    A stop or a full disk leaves the file of before, or none.
    """
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
    """A process for each core. They ignore Ctrl-C: the main process ends them."""
    return ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))


def read_archive(path: Path, suffix: str, largest: int) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files of a .tgz or .zip that end in `suffix`; nothing is written.

    Raises FileNotFoundError, or InputError for a broken archive and for a file of more than
    `largest` bytes.
    """
    broken = (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, RuntimeError)
    try:
        for name, file in _members(path):
            if name.endswith(suffix):
                content = file.read(largest + 1)  # its header may say less than there is
                if len(content) > largest:
                    raise InputError(f"{path}: {name[:100]!r}: more than {largest} bytes")
                yield name, content
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

    `content`: what stands in the file, if not to be read from there. Raises FileNotFoundError, or
    InputError for a file that is no whole image, holds several, or more than Pillow's limit of 179
    million pixels.
    """
    broken = (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError)
    try:
        if content is None:
            with open(path, "rb") as file:
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
    span = max(high - low for low, high in np.atleast_2d(image.getextrema()))
    if span < 25.5:
        return (f"image {path}: blank or nearly so: its values fill {span} of 255; export it with "
                f"values that fill the range")
    return None


def shrink_image(path: str | Path, content: bytes | None, target: Path) -> str | None:
    """Write a view as 8-bit PNG whose short side has SHORT_SIDE pixels (a smaller one stays).

    Returns what is wrong with it, if it is no image.
    """
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


Job = tuple[str | Path, bytes | None, Path]  # the arguments of shrink_image


def shrink_images(jobs: Iterable[Job], total: int) -> dict[Path, str]:
    """`shrink_image` for all jobs but those whose target is there, by a process for each core.

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
