"""MIMIC-CXR in R2Gen's form, from PhysioNet's folders (mimic_cxr.yaml)."""
import csv
import gzip
import re
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from configs import InputError
from configs.files import SPLITS, finish, read_archive, shrink_images

# A heading of a report, at the start of a line: capitals before a colon, or one of the usual names
# in any case; or a line that parts the preliminary from the final text, without a colon.
HEADING = re.compile(
    r"^[ \t]*(?:(_{10,}|FINAL (?:REPORT|ADDENDUM))[ \t]*$|"
    r"((?:[A-Z][A-Z ,/&()-]*[A-Z)])|(?i:findings?(?:[ ]*(?:and|/|&)[ ]*impressions?)?|"
    r"impressions?(?:[ ]*(?:and|/|&)[ ]*findings?)?|indications?|(?:clinical )?history|"
    r"comparisons?|techniques?|exam(?:ination)?|reason for exam(?:ination)?|conclusions?|"
    r"recommendations?|notifications?|wet read|final report))[ \t]*:)", re.M)
# Findings of a first reading, and who was told of them, are not FINDINGS of the final report.
NOT_FINAL = re.compile("provisional|preliminary|notification|communication")


def report_section(text: str, sections: str = "findings") -> str:
    """The FINDINGS of a report, or FINDINGS and IMPRESSION (A19); "" if it has no FINDINGS.

    A joint section (FINDINGS AND IMPRESSION) is FINDINGS. Of several blocks with text the last
    counts: it is the final report.
    """
    found, headings = {}, list(HEADING.finditer(text))
    for heading, following in zip(headings, [*headings[1:], None]):
        body = text[heading.end():following and following.start()].strip()
        name = (heading[1] or heading[2]).lower()
        key = "findings" if "finding" in name else "impression" if "impression" in name else None
        if key and not NOT_FINAL.search(name) and body.strip("_ \n"):
            found[key] = body
    if "findings" not in found:
        return ""
    return "\n".join(found[key] for key in sections.split("+") if key in found)


def read_split(jpg: Path) -> list[dict]:
    """The rows of the official split: dicom_id, study_id, subject_id and split of each image."""
    tables = sorted(jpg.glob("mimic-cxr-2.*-split.csv*"))
    if not tables:
        raise FileNotFoundError(f"--jpg {jpg}: there is no mimic-cxr-2.*-split.csv.gz; expected "
                                f"the folder of mimic-cxr-jpg")
    open_table = gzip.open if tables[0].suffix == ".gz" else open
    with open_table(tables[0], "rt", encoding="utf-8-sig", newline="") as file:
        try:
            rows = list(csv.DictReader(file))
        except (EOFError, OSError, zlib.error, csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{tables[0]}: not a whole table ({error})") from None
    forms = {"dicom_id": r"[\w-]+", "study_id": r"\d{8}", "subject_id": r"\d{8}",
             "split": "train|validate|test"}
    for row in rows:
        if not all(re.fullmatch(form, row.get(key) or "") for key, form in forms.items()):
            raise InputError(f"{tables[0]}: got {row}; expected dicom_id, study_id, subject_id and "
                             f"split of MIMIC-CXR")
    return rows


def read_reports(reports: Path, rows: list[dict]) -> dict[str, str]:
    """{study_id: text} from a folder or a zip of report files."""
    if reports.is_file():
        files = tqdm(read_archive(reports, ".txt"), desc="reports", unit="report")
        return {Path(name).stem[1:]: content.decode("utf-8", "replace") for name, content in files}
    root = reports / "files" if (reports / "files").is_dir() else reports
    texts = {}
    for row in tqdm(rows, desc="reports", unit="report"):
        study, subject = row["study_id"], row["subject_id"]
        path = root / f"p{subject[:2]}/p{subject}/s{study}.txt"
        if study not in texts and path.is_file():
            texts[study] = path.read_text(encoding="utf-8", errors="replace")
    if not texts:
        raise FileNotFoundError(f"--reports {reports}: no report is there; expected "
                                f"mimic-cxr-reports.zip, or the folder with "
                                f"files/p10/p10000032/s50414267.txt")
    return texts


def annotate(jpg: Path, reports: Path, sections: str) -> dict:
    """R2Gen's tree: an entry for each image of a study with FINDINGS, in the official split."""
    rows = read_split(jpg)
    files = read_reports(reports, rows)
    texts = {study: report_section(text, sections) for study, text in files.items()}
    tree = {"sections": sections} | {split: [] for split in SPLITS}
    for row in rows:
        split, report = row["split"].replace("validate", "val"), texts.get(row["study_id"])
        if report:
            subject, study = row["subject_id"], row["study_id"]
            path = f"p{subject[:2]}/p{subject}/s{study}/{row['dicom_id']}.jpg"
            tree[split].append({"id": row["dicom_id"], "study_id": int(study), "split": split,
                                "subject_id": int(subject), "report": report, "image_path": [path]})
    studies = {row["study_id"] for row in rows}
    absent = studies - set(texts)
    silent = [study for study in studies & set(texts) if not texts[study]]
    print(f"of {len(studies)} studies {len(absent)} have no report in {reports}, and "
          f"{len(silent)} have one without FINDINGS; they are left out")
    if not tree["train"]:
        raise InputError(f"--reports {reports}: no training study of {jpg} has a report with "
                         f"FINDINGS there; expected the reports of MIMIC-CXR")
    return tree


def build_mimic_cxr(out: Path, jpg: Path, tree: dict, skip_missing: bool = False) -> None:
    """Write `out`: the images of mimic-cxr-jpg, and the tree of an annotation.

    InputError if an image is missing or broken, after all of them; with `skip_missing` its study is
    left out.
    """
    building, targets = out.with_name(out.name + ".building"), {}  # {small PNG: its original}
    for entry in (entry for split in SPLITS for entry in tree.get(split, [])):
        small = [str(PurePosixPath(path).with_suffix(".png")) for path in entry["image_path"]]
        for path, png in zip(entry["image_path"], small):
            targets[building / "images" / png] = jpg / "files" / path
        entry["image_path"] = small
    jobs = ((path, None, target) for target, path in targets.items())
    problems = shrink_images(jobs, len(targets))
    if skip_missing:
        for split in SPLITS:
            studies = tree.get(split, [])
            tree[split] = [entry for entry in studies if not any(
                building / "images" / path in problems for path in entry["image_path"])]
            print(f"{split}: {len(studies) - len(tree[split])} of {len(studies)} studies left out, "
                  f"whose images are missing or broken")
        problems = {}
    finish(building, out, tree, list(problems.values()))
