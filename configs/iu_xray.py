"""IU-Xray as R2Gen uses it, from the two archives of Open-i (iu_xray.yaml, iu_xray_small.yaml)."""
import json
from collections.abc import Sequence
from pathlib import Path
from urllib.request import Request, urlopen
from xml.etree import ElementTree

from tqdm import tqdm

from configs import InputError
from configs.files import finish, read_archive, shrink_images, write_whole
from configs.findings import named_findings

OPEN_I = "https://openi.nlm.nih.gov/imgs/collections/"  # of the National Library of Medicine
SPLIT = Path(__file__).with_name("iu_xray_split.json")  # R2Gen's ids of train, val and test
IU_XRAY_FINDINGS = Path(__file__).with_name("iu_xray_findings.json")  # no clinical labeller


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
    except (OSError, TypeError) as error:  # no connection, no such page, no length
        raise InputError(f"{url}: {error}; run the command again to go on, or fetch it by hand and "
                         f"name it on the command line (--reports, --images)") from None
    return path


def read_reports(archive: Path) -> dict[str, tuple[str, list[str]]]:
    """{id: (FINDINGS text, names of the first two images)} of the studies that have both: R2Gen's.

    An id is the name of the first image less its last `-NNNN` part.
    """
    studies = {}
    for name, content in tqdm(read_archive(archive, ".xml"), desc="reports", unit="report"):
        try:
            tree = ElementTree.fromstring(content)
        except ElementTree.ParseError as error:
            raise InputError(f"{archive}: {name}: not a report of the collection: "
                             f"{error}") from None
        sections = {e.get("Label"): e.text for e in reversed(list(tree.iter("AbstractText")))}
        findings = sections.get("FINDINGS")
        images = [e.get("id", "") for e in tree.iter("parentImage")]
        if findings and findings.strip() and len(images) >= 2:
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
        raise InputError(f"{reports}: {len(unknown)} of R2Gen's studies are not in it, such as "
                         f"{unknown[0]}; is it the whole archive?")
    building = out.with_name(out.name + ".building")
    targets = {image: building / "images" / name / f"{view}.png"
               for name in names for view, image in enumerate(studies[name][1])}
    jobs = ((name, content, targets[Path(name).stem])
            for name, content in read_archive(images, ".png") if Path(name).stem in targets)
    problems = shrink_images(jobs, len(targets))
    absent = [f"image {name}.png: not in {images}" for name, target in targets.items()
              if target not in problems and not target.is_file()]
    tree = {"sections": "findings"}
    for key, part in split.items():
        tree[key] = [{"id": name, "report": studies[name][0], "split": key,
                      "image_path": [f"{name}/0.png", f"{name}/1.png"]} for name in part]
    finish(building, out, tree, [*problems.values(), *absent])


def write_findings(folder: Path, splits: dict[str, Sequence]) -> None:
    """findings.json of IU-Xray, whose annotation has none: a study has what its report names."""
    spec = json.loads(IU_XRAY_FINDINGS.read_text(encoding="utf-8"))
    spec["studies"] = {}
    for study in (study for studies in splits.values() for study in studies):
        named = named_findings(study.report, spec)
        spec["studies"][study.id] = [{"finding": finding, "side": side, "extent": extent}
                                     for finding, (side, extent) in named.items()]
    write_whole(folder / "findings.json", json.dumps(spec))
    print(f"{folder / 'findings.json'}: what the reports name, by the phrases of "
          f"{IU_XRAY_FINDINGS.name}")
