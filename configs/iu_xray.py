"""IU-Xray as R2Gen uses it, from the two archives of Open-i (iu_xray.yaml, iu_xray_small.yaml)."""
import json
import re
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen
from xml.etree import ElementTree

from tqdm import tqdm

from configs.archives import LARGEST_IMAGE, LARGEST_TEXT, finish, read_archive, shrink_images

OPEN_I = "https://openi.nlm.nih.gov/imgs/collections/"  # of the National Library of Medicine
SPLIT = Path(__file__).with_name("iu_xray_split.json")  # R2Gen's ids of train, val and test


def download(url: str, path: Path) -> Path:
    """Fetch `url` into `path` by way of `<path>.part`, from where a stopped download goes on.

    Nothing to do if it is there. torch.hub's would begin anew, and take a cut one for whole.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not path.is_file():
            done = part.stat().st_size if part.is_file() else 0
            request = Request(url, headers={"Range": f"bytes={done}-"} if done else {})
            with urlopen(request, timeout=60) as answer:
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
        raise ValueError(f"{url}: {error}; run the command again to go on, or fetch it by hand and "
                         f"name it on the command line (--reports, --images)") from None
    return path


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses a document type, whose entities could blow up."""

    def doctype(self, *_) -> None:
        raise ElementTree.ParseError("it declares a document type")


def read_reports(archive: Path) -> dict[str, tuple[str, list[str]]]:
    """{id: (FINDINGS text, names of the first two images)} of the studies that have both: R2Gen's.

    An id is the name of the first image less its last `-NNNN` part.
    """
    studies = {}
    reports = read_archive(archive, ".xml", LARGEST_TEXT)
    for name, content in tqdm(reports, desc="reports", unit="report"):
        try:
            tree = ElementTree.fromstring(content, ElementTree.XMLParser(target=_NoDoctype()))
        except (ElementTree.ParseError, LookupError, ValueError) as error:  # of its encoding, too
            raise ValueError(f"{archive}: {name}: not a report of the collection: "
                             f"{error}") from None
        sections = {e.get("Label"): e.text for e in reversed(list(tree.iter("AbstractText")))}
        findings = sections.get("FINDINGS")
        images = [e.get("id", "") for e in tree.iter("parentImage")]
        if findings and findings.strip() and len(images) >= 2:
            if not all(re.fullmatch(r"CXR[\w-]+-\d+", image) for image in images):
                raise ValueError(f"{archive}: {name}: image names such as {images[0][:100]!r} are "
                                 f"not of the collection")
            studies[images[0].rpartition("-")[0]] = findings, images[:2]
    return studies


def build_iu_xray(out: Path, reports: Path | None = None, images: Path | None = None) -> None:
    """Write `out` from the archives, which are downloaded beside it if they are not named."""
    reports = reports or download(OPEN_I + "NLMCXR_reports.tgz", out.parent / "NLMCXR_reports.tgz")
    images = images or download(OPEN_I + "NLMCXR_png.tgz", out.parent / "NLMCXR_png.tgz")
    split, studies = json.loads(SPLIT.read_text(encoding="utf-8")), read_reports(reports)
    names = [name for part in split.values() for name in part]
    unknown = [name for name in names if name not in studies]
    if unknown:
        raise ValueError(f"{reports}: {len(unknown)} of R2Gen's studies are not in it, such as "
                         f"{unknown[0]}; is it the whole archive?")
    building = out.with_name(out.name + ".building")
    targets = {image: building / "images" / name / f"{view}.png"
               for name in names for view, image in enumerate(studies[name][1])}
    files = read_archive(images, ".png", LARGEST_IMAGE)
    shrink_images(((content, name, targets[Path(name).stem]) for name, content in files
                   if Path(name).stem in targets), len(targets))
    tree = {"sections": "findings"}
    for key, part in split.items():
        tree[key] = [{"id": name, "report": studies[name][0], "split": key,
                      "image_path": [f"{name}/0.png", f"{name}/1.png"]} for name in part]
    finish(building, out, tree)
