"""What other hands have made, read as untrusted: archives and images; and images made small.

Shared by the makers of datasets, iu_xray.py and mimic_cxr.py beside this file, and by data.py.
"""
import json
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import suppress
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

SPLITS = ("train", "val", "test")
SHORT_SIDE = 256         # A24
LARGEST_TEXT = 1 << 20   # bytes
LARGEST_IMAGE = 64 << 20  # bytes
MOST_FILES = 500_000     # of an archive
FORMATS = ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP")  # whatever a name says; EPS runs a program
READ_AT_ONCE = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE,
                tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


def leaves(path: str) -> bool:
    """Whether a path of other hands would lead out of the folder that it is joined to."""
    parts = PurePosixPath(path)
    return parts.is_absolute() or ".." in parts.parts or "\\" in path or "\0" in path


def read_archive(path: Path, suffix: str, largest: int) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the files of a .tgz or .zip that end in `suffix`.

    Nothing is written, and no name of it used. Raises FileNotFoundError, or ValueError for a broken
    archive and for one that no honest hand has made: with a link or a device, a path that leaves
    it, a file of more than `largest` bytes, or more than MOST_FILES files.
    """
    members = _zip_members if zipfile.is_zipfile(path) else _tar_members
    broken = (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
              RuntimeError, IndexError, TypeError)
    try:
        for count, (name, size, is_folder, is_file, read) in enumerate(members(path)):
            reason = None
            if count >= MOST_FILES:
                reason = "too many files"
            elif leaves(name) or not name.isprintable():
                reason = "its path leaves the archive"
            elif not is_folder and not is_file:
                reason = "neither a file nor a folder"
            elif size > largest:
                reason = f"{size} bytes, at most {largest} expected"
            if reason:
                raise ValueError(f"{path}: refused: {name[:100]!r}: {reason}")
            if is_file and not is_folder and name.endswith(suffix):
                content = read(largest + 1)  # its header may say less than there is
                if len(content) > largest:
                    raise ValueError(f"{path}: refused: {name[:100]!r}: more than {largest} bytes")
                yield name, content
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except broken as error:
        raise ValueError(f"{path}: not a whole archive ({error}); fetch it again") from None


# Name, bytes, folder?, file?, and a function that reads at most so many bytes of it.
Member = tuple[str, int, bool, bool, Callable[[int], bytes]]


def _zip_members(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            is_file = kind in (0, stat.S_IFREG)

            def read(most: int, info: zipfile.ZipInfo = info) -> bytes:
                with archive.open(info) as file:
                    return file.read(most)
            yield info.filename, info.file_size, info.is_dir(), is_file, read


class _Header(tarfile.TarInfo):
    """A member's header; one of long names or attributes is read into memory: it must be small."""

    @classmethod
    def frombuf(cls, *arguments) -> tarfile.TarInfo:
        header = super().frombuf(*arguments)
        if header.type in READ_AT_ONCE and header.size > LARGEST_TEXT:
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


def _tar_members(path: Path) -> Iterator[Member]:
    with tarfile.open(path, "r|*", tarinfo=_Header) as archive:
        for info in archive:
            yield (info.name, info.size, info.isdir(), info.isreg(),
                   lambda most: archive.extractfile(info).read(most))


def open_image(path: str | Path | BytesIO, name: str = "") -> Image.Image:
    """A24: one view as 8-bit grey or RGB; 16 bit scaled by its own maximum, turned as EXIF says.

    Raises FileNotFoundError, or ValueError for a file that is no whole image, holds several, or
    more than Pillow's limit of 179 million pixels. `name`: what an error calls it.
    """
    broken = (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError)
    try:
        with Image.open(path, formats=FORMATS) as image:
            pictures = getattr(image, "n_frames", 1)
            if pictures > 1 and image.format != "MPO":  # that is a phone's JPEG with a depth map
                raise ValueError(f"{pictures} pictures in one file, expected one")
            image.load()
            with suppress(Exception):  # a broken block of EXIF turns nothing
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode == "P":
                image = image.convert("RGBA")  # a palette may hold transparency
            if image.mode[0] in "IF":  # 16 bit, or 32
                values = np.asarray(image, dtype=np.float32).clip(min=0)
                values = values * (255 / max(values.max(), 1))
                image = Image.fromarray(values.round().astype(np.uint8))
            return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"image {name or path}: no such file") from None
    except broken as error:
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, UnidentifiedImageError):
            reason = "no known format; export DICOM, HEIC and the like as PNG"
        raise ValueError(f"image {name or path}: not a whole PNG or JPEG image "
                         f"({reason})") from None


def shrink_image(source: bytes | Path, name: str, target: Path) -> None:
    """Write a view as 8-bit PNG whose short side has SHORT_SIDE pixels (a smaller one stays)."""
    image = open_image(BytesIO(source) if isinstance(source, bytes) else source, name)
    scale = min(1, SHORT_SIDE / min(image.size))
    size = [round(length * scale) for length in image.size]
    image = image.resize(size, Image.Resampling.BICUBIC)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    image.save(unfinished, "PNG")
    unfinished.rename(target)


def shrink_images(jobs: Iterable[tuple[bytes | Path, str, Path]], total: int) -> None:
    """`shrink_image` for all jobs, by a process for each core; what is there is not done again."""
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
    missing = [path for split in SPLITS for entry in tree.get(split, [])
               for path in entry["image_path"] if not (building / "images" / path).is_file()]
    if missing:
        raise ValueError(f"{len(missing)} images are not in the archive, such as that of "
                         f"{missing[0]}; is it the whole one? What is done stays in {building}, "
                         f"and the next run goes on from there")
    (building / "annotation.json").write_text(json.dumps(tree), encoding="utf-8")
    building.rename(out)
    counts = ", ".join(f"{len(tree.get(split, []))} {split}" for split in SPLITS)
    print(f"{out}: {counts} studies")
