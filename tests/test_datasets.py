"""The datasets from their official archives: what is built, what survives a kill, and what a
hostile archive can do."""
import csv
import gzip
import http.server
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from configs import Data, archives, iu_xray
from configs.archives import read_archive
from configs.iu_xray import build_iu_xray, download
from configs.mimic_cxr import report_section
from data import read_studies, require_images

REPOSITORY = Path(__file__).parent.parent


def png(size=(300, 400), mode="L", seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (*size[::-1], 3) if mode == "RGB" else size[::-1], dtype=np.uint8)
    image = Image.fromarray(pixels.astype(np.uint16) * 17 if mode == "I;16" else pixels)
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def tgz(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def xml(findings, images, extra=""):
    sections = (
        "" if findings is None else f'<AbstractText Label="FINDINGS">{findings}</AbstractText>'
    )
    return (f'<?xml version="1.0"?>{extra}<eCitation><Abstract>'
            f'<AbstractText Label="IMPRESSION">Normal.</AbstractText>{sections}</Abstract>'
            + "".join(f'<parentImage id="{image}"/>' for image in images) + "</eCitation>").encode()


@pytest.fixture
def collection(tmp_path, monkeypatch):
    """Two archives with the official names and eight studies, four of which R2Gen does not use."""
    names = {i: [f"CXR{i}_IM-{i:04d}-{view}001" for view in (1, 2)] for i in range(1, 9)}
    names[2] = [f"{name}-0001" for name in names[2]]  # some names have a part more
    names[3].append("CXR3_IM-0003-3001")
    names[5] = names[5][:1]
    findings = {i: f"Study {i}.  Clear &amp; well." for i in names} | {6: None, 7: " ", 8: ""}
    findings[1] = "No effusion. Mildly enlarged heart."
    reports = tgz(
        tmp_path / "NLMCXR_reports.tgz",
        {f"ecgen-radiology/{i}.xml": xml(findings[i], names[i]) for i in names},
    )
    modes = {1: "L", 2: "RGB", 3: "I;16", 4: "L"}
    images = tgz(
        tmp_path / "NLMCXR_png.tgz",
        {
            f"{name}.png": png(mode=modes.get(i, "L"), seed=i * 10 + j)
            for i in names
            for j, name in enumerate(names[i])
        },
    )
    split = dict(
        train=["CXR4_IM-0004", "CXR1_IM-0001"], val=["CXR2_IM-0002-1001"], test=["CXR3_IM-0003"]
    )
    (tmp_path / "split.json").write_text(json.dumps(split))
    monkeypatch.setattr(iu_xray, "SPLIT", tmp_path / "split.json")
    return reports, images


def tree_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    data.main()


def test_iu_xray_is_built_from_the_archives(collection, tmp_path, monkeypatch, capsys):
    reports, images = collection
    out = tmp_path / "iu_xray"
    # text, two images
    assert list(iu_xray.read_reports(reports)) == [
        "CXR1_IM-0001", "CXR2_IM-0002-1001", "CXR3_IM-0003", "CXR4_IM-0004"
    ]
    run_main(monkeypatch, "iu_xray", "--out", out, "--reports", reports, "--images", images)
    annotation = json.loads((out / "annotation.json").read_text())
    assert [[entry["id"] for entry in annotation[split]] for split in ("train", "val", "test")] == [
        ["CXR4_IM-0004", "CXR1_IM-0001"], ["CXR2_IM-0002-1001"], ["CXR3_IM-0003"]]
    assert annotation["train"][0] == {
        "id": "CXR4_IM-0004",
        "report": "Study 4.  Clear & well.",
        "split": "train",
        "image_path": ["CXR4_IM-0004/0.png", "CXR4_IM-0004/1.png"],
    }
    splits = read_studies(Data(root=str(out)))
    assert splits["val"][0].sections == "findings" and splits["val"][0].patient == "CXR2"
    require_images(splits, Data(root=str(out)))
    files = sorted(str(path.relative_to(out / "images")) for path in (out / "images").rglob("*.*"))
    assert files == sorted(
        path
        for entries in annotation.values()
        if isinstance(entries, list)
        for e in entries
        for path in e["image_path"]
    )
    for path, mode in (
        ("CXR1_IM-0001/0.png", "L"),
        ("CXR2_IM-0002-1001/1.png", "RGB"),
        ("CXR3_IM-0003/0.png", "L"),
    ):
        with Image.open(out / "images" / path) as image:
            assert image.size == (256, 341) and image.mode == mode
    original = Image.open(io.BytesIO(png(seed=41))).resize((256, 341), Image.Resampling.BICUBIC)
    assert np.array_equal(
        np.asarray(Image.open(out / "images/CXR4_IM-0004/1.png")), np.asarray(original)
    )
    before = tree_of(out)
    run_main(monkeypatch, "iu_xray", "--out", out)
    assert "nothing to do" in capsys.readouterr().out and tree_of(out) == before


def test_iu_xray_has_the_findings_that_its_reports_name(collection, tmp_path, monkeypatch, capsys):
    """A built folder has findings.json, and one built before it was known is given it."""
    run_main(monkeypatch, "iu_xray", "--out", tmp_path / "iu_xray", "--reports", collection[0],
             "--images", collection[1])
    path = tmp_path / "iu_xray/findings.json"
    built = json.loads(path.read_text())
    studies = built.pop("studies")
    assert built == json.loads(data.IU_XRAY_FINDINGS.read_text())
    assert studies.pop("CXR1_IM-0001") == [
        {"finding": "cardiomegaly", "side": None, "extent": "small"}]
    assert studies == {"CXR2_IM-0002-1001": [], "CXR3_IM-0003": [], "CXR4_IM-0004": []}
    before = tree_of(tmp_path / "iu_xray")
    path.unlink()
    capsys.readouterr()
    run_main(monkeypatch, "iu_xray", "--out", tmp_path / "iu_xray")
    assert capsys.readouterr().out.startswith(f"{path}: what the reports name")
    assert tree_of(tmp_path / "iu_xray") == before


def test_iu_xray_says_what_an_archive_lacks(collection, tmp_path):
    reports, images = collection
    few = tgz(
        tmp_path / "few.tgz",
        {f"CXR{i}_IM-000{i}-{v}001.png": png() for i in (1, 4) for v in (1, 2)},
    )
    with pytest.raises(
        ValueError, match="4 images are not in the archive, such as that of CXR2_IM-0002-1001/0.png"
    ):
        build_iu_xray(tmp_path / "out", reports, few)
    with pytest.raises(
        ValueError, match="3 of R2Gen's studies are not in it, such as CXR1_IM-0001"
    ):
        build_iu_xray(
            tmp_path / "out",
            tgz(
                tmp_path / "r.tgz",
                {"4.xml": xml("Clear.", ["CXR4_IM-0004-1001", "CXR4_IM-0004-2001"])},
            ),
            images,
        )
    broken = tgz(tmp_path / "broken.tgz", {"CXR2_IM-0002-1001-0001.png": png()[:500]})
    with pytest.raises(ValueError, match="CXR2_IM-0002-1001-0001.png: not a whole PNG"):
        build_iu_xray(tmp_path / "out", reports, broken)
    for content, message in (
        (b"<a", "not a report"),
        (xml("Clear.", ["../../evil-1", "b-2"]), "image names"),
        (xml("&a;", ["CXR1-1", "CXR1-2"], '<!DOCTYPE a [<!ENTITY a "b">]>'), "document type"),
        (xml("&a;", ["CXR1-1", "CXR1-2"], '<!DOCTYPE a [<!ENTITY a "b">]>').decode()
         .replace("utf-8", "utf-16").encode("utf-16"), "document type"),
        (b'<?xml version="1.0" encoding="foo"?><a/>', "not a report of the collection: .*foo"),
    ):
        with pytest.raises(ValueError, match=message):
            build_iu_xray(tmp_path / "out", tgz(tmp_path / "r.tgz", {"1.xml": content}), images)
    assert not (tmp_path / "out").exists()
    # what the failed runs have left is used or overwritten
    build_iu_xray(tmp_path / "out", reports, images)
    build_iu_xray(tmp_path / "clean", reports, images)
    whole = tree_of(tmp_path / "clean")
    assert tree_of(tmp_path / "out").keys() == whole.keys()


@pytest.mark.parametrize("images_done", [0, 1, 5])
def test_a_killed_build_goes_on_to_the_same_bytes(collection, tmp_path, images_done):
    reports, images = collection
    build_iu_xray(tmp_path / "undisturbed", reports, images)
    out, building = tmp_path / "iu_xray", tmp_path / "iu_xray.building"
    code = (f"import pathlib, time\nfrom configs import iu_xray\n"
            f"iu_xray.SPLIT = pathlib.Path({str(tmp_path / 'split.json')!r}); "
            f"plain = iu_xray.read_archive\n"
            f"def slow(*a):\n    for member in plain(*a):\n        yield member; time.sleep(0.05)\n"
            f"iu_xray.read_archive = slow; "
            f"iu_xray.build_iu_xray(pathlib.Path({str(out)!r}), "
            f"pathlib.Path({str(reports)!r}), pathlib.Path({str(images)!r}))")
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 120
    while (
        process.poll() is None
        and time.monotonic() < end
        and len(list(building.rglob("*.png"))) < images_done
    ):
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in building.rglob("*.png")}
    assert len(kept) >= images_done
    build_iu_xray(out, reports, images)
    assert tree_of(out) == tree_of(tmp_path / "undisturbed") and not building.exists()
    # not done again
    assert all(
        (out / path.relative_to(building)).stat().st_mtime_ns == changed
        for path, changed in kept.items()
    )


def special(kind, name="a.png", link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


class Zeros(io.RawIOBase):
    """As many zero bytes as are asked for."""
    def readinto(self, buffer):
        buffer[:] = bytes(len(buffer))
        return len(buffer)

    def read(self, size=-1):
        return bytes(size)


HOSTILE = {
    "parent": (special(tarfile.REGTYPE, "../../evil.png"), "leaves the archive"),
    "absolute": (special(tarfile.REGTYPE, "/tmp/evil.png"), "leaves the archive"),
    "newline": (special(tarfile.REGTYPE, "evil\nname.png"), "leaves the archive"),
    "symbolic link": (special(tarfile.SYMTYPE, link="/etc/passwd"), "neither a file nor a folder"),
    "hard link": (special(tarfile.LNKTYPE, link="/etc/passwd"), "neither a file nor a folder"),
    "device": (special(tarfile.CHRTYPE), "neither a file nor a folder"),
    "pipe": (special(tarfile.FIFOTYPE), "neither a file nor a folder"),
}


@pytest.mark.parametrize("case", ["zip", "long name", "attributes"])
def test_an_archive_that_lies_about_its_size_stays_small(tmp_path, case):
    """200 MB of zeros, of which a header says less, or which a header is."""
    path, size = tmp_path / "bad", 200 << 20
    if case == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.png", bytes(size))
        said = path.read_bytes().replace(struct.pack("<I", size), struct.pack("<I", 100))
        path.write_bytes(said)
    else:
        info = special(tarfile.GNUTYPE_LONGNAME if case == "long name" else tarfile.XHDTYPE)
        info.size = size
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            for _ in range(200):
                file.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(ValueError, match="bad: (not a whole archive|refused)"):
        list(read_archive(path, ".png", 1 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


@pytest.mark.parametrize("case", [*HOSTILE, "10 GB", "not gzip", "cut short", "zip"])
def test_hostile_archives_end_in_one_line(case, collection, tmp_path, monkeypatch, capsys):
    reports, images = collection
    box = tmp_path / "box" / "in"
    box.mkdir(parents=True)
    path, message = box / "bad.tgz", "not a whole archive"
    if case == "10 GB":  # the header alone says it: no byte of it is read
        info = special(tarfile.REGTYPE, "CXR1_IM-0001-1001.png")
        info.size, message = 10 << 30, "10737418240 bytes, at most"
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(info.tobuf())
            file.write(bytes(1 << 20))
    elif case == "not gzip":
        path.write_bytes(b"hello")
    elif case == "cut short":
        path.write_bytes(images.read_bytes()[:-20000])
    elif case == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("../../evil.png", b"x")
        message = "leaves the archive"
    else:
        info, message = HOSTILE[case]
        with tarfile.open(path, "w:gz") as archive:
            archive.addfile(info)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message) as raised:
        run_main(
            monkeypatch, "iu_xray", "--out", box / "out", "--reports", reports, "--images", path
        )
    assert "\n" not in str(raised.value)
    written = set(tmp_path.rglob("*")) - before - {box / "out.lock"}
    assert all(path.is_relative_to(box / "out.building") for path in written)


def test_an_archive_of_too_many_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_FILES", 3)
    assert (
        len(
            list(
                read_archive(
                    tgz(tmp_path / "a.tgz", {f"{i}.png": b"x" for i in range(3)}), ".png", 10
                )
            )
        )
        == 3
    )
    with pytest.raises(ValueError, match="too many files"):
        list(
            read_archive(tgz(tmp_path / "a.tgz", {f"{i}.txt": b"x" for i in range(4)}), ".png", 10)
        )


@pytest.fixture
def server(tmp_path):
    """A web server that knows ranges and, while `server.cut` holds a number, hangs up after so
    many bytes."""
    content = os.urandom(3_000_000)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/file.tgz":
                return self.send_error(404)
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            server.asked.append(start)
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                return self.end_headers()
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:start + (server.cut or len(content))])

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.cut, server.asked = content, None, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_download_goes_on_where_it_stopped(server, tmp_path):
    url, path = f"http://127.0.0.1:{server.server_port}/file.tgz", tmp_path / "sub/file.tgz"
    server.cut = 1_000_000
    for _ in range(2):
        with pytest.raises(ValueError, match="run the command again to go on, or fetch it by hand"):
            download(url, path)
        assert not path.exists()
    server.cut = None
    assert (
        download(url, path).read_bytes() == server.content
        and server.asked == [0, 1_000_000, 2_000_000]
    )
    download(url, path)
    assert len(server.asked) == 3  # there already
    path.rename(path.with_name("file.tgz.part"))  # whole, but stopped before it had its name
    assert (
        download(url, path).read_bytes() == server.content
        and list(tmp_path.rglob("*.part")) == []
    )
    with pytest.raises(ValueError, match="404"):
        download(url + "x", tmp_path / "other.tgz")


REPORTS = {
    "plain": (
        " FINAL REPORT\n EXAMINATION: CHEST\n\n FINDINGS: \n\n "
        "The lungs are clear.  No effusion.\n\n IMPRESSION: \n\n Normal.\n",
        "The lungs are clear.  No effusion.",
    ),
    "any case": ("Indication: cough.\nFindings: Clear.\nImpression: Normal.", "Clear."),
    "joint": ("FINDINGS AND IMPRESSION: Clear and normal.\n", "Clear and normal."),
    "joint, slash": (" Impression/Findings:\nClear.\n", "Clear."),
    "several blocks": (
        "WET READ: fine\nFINDINGS: First.\n\nIMPRESSION: One.\n "
        "FINDINGS: Second.\nIMPRESSION: Two.",
        "Second.",
    ),
    "last block empty": ("FINDINGS: First.\nFINDINGS:\n ___\nIMPRESSION: Two.", "First."),
    "sentence with a colon": (
        "FINDINGS: Lungs: clear.\n Heart: normal.\n Note the following: nothing.\nIMPRESSION: x",
        "Lungs: clear.\n Heart: normal.\n Note the following: nothing.",
    ),
    "heading in capitals": (
        "FINDINGS: Clear.\nRECOMMENDATION(S): None.\nNOTIFICATION: By phone.",
        "Clear.",
    ),
    "the word in a sentence": (
        "INDICATION: These findings: cough.\nIMPRESSION: No findings: none.",
        "",
    ),
    "first reading": (
        "PROVISIONAL FINDINGS IMPRESSION (PFI): ___ 12:37 PM\n  Line in the atrium.\n"
        " ______________________\n                FINAL REPORT\n IMPRESSION: As above.",
        "",
    ),
    "first reading, then findings": (
        "PROVISIONAL FINDINGS IMPRESSION (PFI): Line.\n FINAL REPORT\n FINDINGS: Clear.\n"
        " NOTIFICATION OF FINDINGS: Dr. ___ was paged.",
        "Clear.",
    ),
    "addendum": (
        "FINDINGS: Clear.\n ______________________\n FINAL ADDENDUM\n Seen with Dr. ___ ___",
        "Clear.",
    ),
    "blanked out at the end": ("FINDINGS: Told to Dr. ___\nIMPRESSION: x", "Told to Dr. ___"),
    "none": (" FINAL REPORT\n AP chest compared to ___:\n Lungs are clear.\n", ""),
    "empty": ("", ""),
}


@pytest.mark.parametrize("case", REPORTS)
def test_report_section_reads_findings(case):
    text, expected = REPORTS[case]
    assert report_section(text) == expected


def test_report_section_of_a19():
    text = "FINDINGS: Clear.\nIMPRESSION: Normal."
    assert report_section(text, "findings+impression") == "Clear.\nNormal."
    assert report_section("FINDINGS: Clear.", "findings+impression") == "Clear."
    # R2Gen's studies are those with findings
    assert report_section("IMPRESSION: Normal.", "findings+impression") == ""


@pytest.fixture
def physionet(tmp_path):
    """mimic-cxr-jpg and mimic-cxr with four studies: two images, no findings, one for val, one
    for test."""
    jpg, text = tmp_path / "mimic-cxr-jpg", tmp_path / "mimic-cxr"
    rows = [
        ("d1a", "50000001", "10000001", "train"),
        ("d1b", "50000001", "10000001", "train"),
        ("d2", "50000002", "10000001", "train"),
        ("d3", "50000003", "11000002", "validate"),
        ("d4", "50000004", "11000003", "test"),
    ]
    for i, (dicom, study, subject, _) in enumerate(rows):
        folder = Path("files") / f"p{subject[:2]}" / f"p{subject}"
        (jpg / folder / f"s{study}").mkdir(parents=True, exist_ok=True)
        Image.open(io.BytesIO(png((500, 300), seed=i))).save(
            jpg / folder / f"s{study}" / f"{dicom}.jpg"
        )
        (text / folder).mkdir(parents=True, exist_ok=True)
        body = (
            "IMPRESSION: Only that."
            if study == "50000002"
            else f"FINDINGS: Study {study}.\n\nIMPRESSION: Fine."
        )
        (text / folder / f"s{study}.txt").write_text(f" FINAL REPORT\n {body}\n")
    with gzip.open(jpg / "mimic-cxr-2.0.0-split.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows([("dicom_id", "study_id", "subject_id", "split"), *rows])
    with zipfile.ZipFile(text / "mimic-cxr-reports.zip", "w") as archive:
        for path in sorted(text.rglob("*.txt")):
            archive.write(path, path.relative_to(text))
    return jpg, text


def test_mimic_cxr_of_broken_or_foreign_files(physionet, tmp_path, monkeypatch):
    jpg, text = physionet
    for path in text.rglob("*.txt"):
        path.write_text("IMPRESSION: Only that.")
    build = ("mimic_cxr", "--out", tmp_path / "out", "--jpg", jpg, "--reports", text)
    with pytest.raises(ValueError, match="no training study .* has a report with FINDINGS"):
        run_main(monkeypatch, *build)
    table = jpg / "mimic-cxr-2.0.0-split.csv.gz"
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(ValueError, match="split.csv.gz: not a whole table"):
        run_main(monkeypatch, *build)


def test_mimic_cxr_is_built_from_physionets_folders(physionet, tmp_path, monkeypatch):
    jpg, text = physionet
    out = tmp_path / "mimic_cxr"
    run_main(monkeypatch, "mimic_cxr", "--out", out, "--jpg", jpg, "--reports", text)
    annotation = json.loads((out / "annotation.json").read_text())
    assert [[entry["id"] for entry in annotation[split]] for split in ("train", "val", "test")] == [
        ["d1a", "d1b"], ["d3"], ["d4"]
    ]
    assert annotation["val"][0] == {
        "id": "d3",
        "study_id": 50000003,
        "subject_id": 11000002,
        "report": "Study 50000003.",
        "split": "val",
        "image_path": ["p11/p11000002/s50000003/d3.png"],
    }
    with Image.open(out / "images/p11/p11000002/s50000003/d3.png") as image:
        assert image.size == (427, 256) and image.mode == "L"
    splits = read_studies(Data(root=str(out), dataset="mimic_cxr"))
    assert splits["test"][0].patient == "11000003" and splits["test"][0].sections == "findings"
    run_main(monkeypatch, "mimic_cxr", "--out", tmp_path / "zip", "--jpg", jpg,
             "--reports", text / "mimic-cxr-reports.zip")
    assert tree_of(tmp_path / "zip") == tree_of(out)
    run_main(
        monkeypatch,
        "mimic_cxr",
        "--out",
        tmp_path / "both",
        "--jpg",
        jpg,
        "--reports",
        text,
        "--sections",
        "findings+impression",
    )
    both = json.loads((tmp_path / "both/annotation.json").read_text())
    assert (
        both["sections"] == "findings+impression"
        and both["test"][0]["report"] == "Study 50000004.\nFine."
    )
    theirs = {
        split: [
            {**entry, "image_path": [path.replace(".png", ".jpg") for path in entry["image_path"]]}
            for entry in annotation[split]
        ]
        for split in ("train", "val", "test")
    }
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    run_main(
        monkeypatch,
        "mimic_cxr",
        "--out",
        tmp_path / "r2gen",
        "--jpg",
        jpg,
        "--annotation",
        tmp_path / "theirs.json",
    )
    r2gen = tree_of(tmp_path / "r2gen")
    assert {"sections": "findings"} | json.loads(r2gen.pop("annotation.json")) == annotation
    assert r2gen == {
        path: content for path, content in tree_of(out).items() if path != "annotation.json"
    }


def test_mimic_cxr_says_what_is_missing(physionet, tmp_path, monkeypatch):
    jpg, text = physionet

    def build(*arguments):
        run_main(monkeypatch, "mimic_cxr", "--out", tmp_path / "out", *arguments)
    with pytest.raises(FileNotFoundError, match="expected the folder of mimic-cxr-jpg"):
        build("--jpg", text, "--reports", text)
    with pytest.raises(FileNotFoundError, match="expected mimic-cxr-reports.zip, or the folder"):
        build("--jpg", jpg, "--reports", tmp_path)
    evil = {"train": [{"id": "a", "report": "x", "image_path": ["../../../etc/passwd"]}]}
    for content, message in ((json.dumps(evil), "'a': image path .* leaves the images folder"),
                             ("{", "expected R2Gen's"), ('{"a": 1}', "expected R2Gen's")):
        (tmp_path / "evil.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            build("--jpg", jpg, "--annotation", tmp_path / "evil.json")
    (jpg / "files/p11/p11000003/s50000004/d4.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="d4.jpg: no such file"):
        build("--jpg", jpg, "--reports", text)
    with gzip.open(jpg / "mimic-cxr-2.0.0-split.csv.gz", "wt") as file:
        file.write("dicom_id,study_id,subject_id,split\nd,50000001,../../..,train\n")
    with pytest.raises(ValueError, match="expected dicom_id, study_id, subject_id and split"):
        build("--jpg", jpg, "--reports", text)


def test_check_names_all_that_is_wrong(tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / f"images/{name}.png").write_bytes(png(seed=ord(name)))
    (tmp_path / "images/cut.png").write_bytes(png()[:400])
    Image.new("L", (30, 30), 7).save(tmp_path / "images/flat.png")
    (tmp_path / "config.yaml").write_text(
        (REPOSITORY / "configs/iu_xray.yaml")
        .read_text()
        .replace("root: data/iu_xray", f"root: {tmp_path}")
    )

    def write(**splits):
        (tmp_path / "annotation.json").write_text(
            json.dumps(
                {
                    split: [dict(zip(("id", "report", "image_path"), row)) for row in rows]
                    for split, rows in splits.items()
                }
            )
        )
    write(
        train=[("CXR1_x", "Clear. Fine.", ["a.png"]), ("CXR2_x", "Clear.", ["b.png"])],
        val=[("CXR3_x", "Clear.", ["c.png"])],
    )
    run_main(monkeypatch, "check", "--config", tmp_path / "config.yaml")
    printed = capsys.readouterr().out
    assert "nothing is wrong" in printed
    assert next(line for line in printed.splitlines() if line.startswith("train")).split() == [
        "train", "2", "2", "2", "2", "3.0", "4"
    ]
    write(
        train=[
            ("CXR1_x", "Clear.", ["a.png", "cut.png"]),
            ("CXR1_x", "Clear.", ["b.png"]),
            ("CXR4_x", " ", ["b.png"]),
            ("CXR5_x", "No.", ["flat.png"]),
        ],
        val=[("CXR1_y", "Clear.", ["none.png"]), ("CXR6_x", "Clear.", ["a.png"])],
    )
    with pytest.raises(ValueError, match="^7 problems$"):
        run_main(monkeypatch, "check", "--config", tmp_path / "config.yaml")
    printed = capsys.readouterr().out
    for message in (
        "study 'CXR1_x' stands twice",
        "study 'CXR4_x' has no report",
        "patient CXR1 is in train, too",
        "cut.png: not a whole",
        "none.png: no such file",
        "flat.png: every pixel has one value",
        "image a.png: in the studies 'CXR1_x' and 'CXR6_x'",
    ):
        assert message in printed, message
    write(train=[("CXR1_x", "Clear.", ["a.png"])], val=[("CXR1_y", "Clear.", ["b.png"])])
    with pytest.raises(ValueError, match="patient CXR1 is in train, too"):
        read_studies(Data(root=str(tmp_path)))
    write(train=[("CXR1_x", "Clear.", ["a.png", "none.png"])])
    with pytest.raises(FileNotFoundError, match="1 images of .* such as none.png"):
        require_images(read_studies(Data(root=str(tmp_path))), Data(root=str(tmp_path)))


@pytest.mark.parametrize("arguments, words", [
    ("mimic_cxr --jpg x --annotation y.json --sections findings", "--sections: of no use with"),
    ("check --config configs/iu_xray.yaml --set data.limit=2 train.lr=1", "--set train.lr=1: of"),
])
def test_a_command_refuses_what_it_does_not_use(monkeypatch, arguments, words):
    with pytest.raises(ValueError, match=words):
        run_main(monkeypatch, *arguments.split())


def test_train_without_data_says_how_to_make_it(tmp_path):
    for name, command in (
        ("iu_xray", "python data.py iu_xray"),
        ("mimic_cxr", "python data.py mimic_cxr --jpg DIR --reports DIR"),
    ):
        done = subprocess.run(
            [
                sys.executable,
                "train.py",
                "--config",
                f"configs/{name}.yaml",
                "--set",
                f"data.root={tmp_path / 'no'}",
                f"train.output={tmp_path / 'run'}",
            ],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        assert (
            done.returncode == 1
            and command in done.stderr
            and done.stderr.count("\n") == 1
        ), done.stderr
        assert not (tmp_path / "run").exists()


def test_r2gens_split_of_iu_xray():
    split = json.loads(iu_xray.SPLIT.read_text())
    assert {name: len(ids) for name, ids in split.items()} == {
        "train": 2069, "val": 296, "test": 590
    }
    patients = [{name.split("_")[0] for name in ids} for ids in split.values()]
    assert not patients[0] & patients[1] and not (patients[0] | patients[1]) & patients[2]
