"""The datasets from their official archives: what is built, and what is wrong is named."""
import csv
import gzip
import http.server
import io
import json
import os
import sys
import tarfile
import threading
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from configs import Data, InputError, iu_xray
from configs.files import read_archive, shrink_images
from configs.findings import named_findings, read_findings
from configs.iu_xray import IU_XRAY_FINDINGS, build_iu_xray, download
from configs.mimic_cxr import report_section
from data import check, read_studies, require_images

SPLITS = ("train", "val", "test")


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


def xml(findings, images):
    section = f'<AbstractText Label="FINDINGS">{findings}</AbstractText>' if findings else ""
    views = "".join(f'<parentImage id="{image}"/>' for image in images)
    return (f'<?xml version="1.0"?><eCitation><Abstract>{section}'
            f'<AbstractText Label="IMPRESSION">Normal.</AbstractText></Abstract>{views}'
            f'</eCitation>').encode()


@pytest.fixture
def collection(tmp_path, monkeypatch):
    """Two archives with the official names and seven studies, three of which R2Gen does not use."""
    names = {i: [f"CXR{i}_IM-{i:04d}-{view}001" for view in (1, 2)] for i in range(1, 8)}
    names[2] = [f"{name}-0001" for name in names[2]]  # some names have a part more
    names[3].append("CXR3_IM-0003-3001")
    names[5] = names[5][:1]
    findings = {i: f"Study {i}.  Clear &amp; well." for i in names} | {6: None, 7: " "}
    findings[1] = "No effusion. Mildly enlarged heart."
    reports = tgz(tmp_path / "NLMCXR_reports.tgz", {
        f"ecgen-radiology/{i}.xml": xml(findings[i], names[i]) for i in names})
    modes = {1: "L", 2: "RGB", 3: "I;16"}
    images = tgz(tmp_path / "NLMCXR_png.tgz", {
        f"{name}.png": png(mode=modes.get(i, "L"), seed=i * 10 + j)
        for i in names for j, name in enumerate(names[i])})
    split = dict(train=["CXR4_IM-0004", "CXR1_IM-0001"], val=["CXR2_IM-0002-1001"],
                 test=["CXR3_IM-0003"])
    (tmp_path / "split.json").write_text(json.dumps(split))
    monkeypatch.setattr(iu_xray, "SPLIT", tmp_path / "split.json")
    return reports, images


def tree_of(folder):
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def ids_of(annotation):
    return [[entry["id"] for entry in annotation[split]] for split in SPLITS]


@pytest.fixture
def run_main(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
        data.main()
    return run


def test_iu_xray_is_built_from_the_archives(collection, tmp_path, run_main, capsys):
    reports, images = collection
    out = tmp_path / "iu_xray"
    run_main("iu_xray", "--out", out, "--reports", reports, "--images", images)
    annotation = json.loads((out / "annotation.json").read_text())
    assert ids_of(annotation) == [["CXR4_IM-0004", "CXR1_IM-0001"], ["CXR2_IM-0002-1001"],
                                  ["CXR3_IM-0003"]]
    assert annotation["train"][0] == {
        "id": "CXR4_IM-0004", "report": "Study 4.  Clear & well.", "split": "train",
        "image_path": ["CXR4_IM-0004/0.png", "CXR4_IM-0004/1.png"]}
    splits = read_studies(Data(root=str(out)))
    assert splits["val"][0].sections == "findings" and splits["val"][0].patient == "CXR2"
    require_images(splits, Data(root=str(out)))
    for path, mode in (("CXR1_IM-0001/0.png", "L"), ("CXR2_IM-0002-1001/1.png", "RGB"),
                       ("CXR3_IM-0003/0.png", "L")):
        with Image.open(out / "images" / path) as image:
            assert image.size == (256, 341) and image.mode == mode
    original = Image.open(io.BytesIO(png(seed=41))).resize((256, 341), Image.Resampling.BICUBIC)
    built = Image.open(out / "images/CXR4_IM-0004/1.png")
    assert np.array_equal(np.asarray(built), np.asarray(original))
    run_main("iu_xray", "--out", out)
    assert "there already" in capsys.readouterr().out


def test_iu_xray_has_the_findings_that_its_reports_name(tmp_path, run_main):
    """In R2Gen's own folder, too."""
    entry = dict(id="CXR1", report="No effusion. Mildly enlarged heart.", image_path=["a.png"])
    tree = {"train": [entry], "test": [dict(entry, id="CXR2", report="Clear.")]}
    (tmp_path / "annotation.json").write_text(json.dumps(tree))
    run_main("iu_xray", "--out", tmp_path)
    built = json.loads((tmp_path / "findings.json").read_text())
    assert built.pop("studies") == {
        "CXR1": [{"finding": "cardiomegaly", "side": None, "extent": "small"}], "CXR2": []}
    assert built == json.loads(IU_XRAY_FINDINGS.read_text())
    (tmp_path / "findings.json").write_text("a person's own")
    run_main("iu_xray", "--out", tmp_path)
    assert (tmp_path / "findings.json").read_text() == "a person's own"


def test_words_of_one_dataset_stand_in_its_findings():
    """`denied`; and a text may be as it was written: with capitals, decimals, semicolons."""
    spec = {"phrases": {"nodule": ["nodules?"], "effusion": ["effusion"]}, "sides": {},
            "extents": {}}
    text = "No 2.3 cm nodule; overlap could obscure an Effusion. Nodule: RESOLVED."
    assert list(named_findings(text, spec)) == ["effusion"]
    assert not named_findings(text, spec | {"denied": ["obscure"]})


@pytest.mark.parametrize("more, words", [
    ('"denied": []', "'denied' has no list"), ('"denied": ["("]', "expected one object"),
    ('"sides": {}', "'sides' stands twice")])
def test_broken_findings_are_named(tmp_path, more, words):
    (tmp_path / "findings.json").write_text(
        f'{{"phrases": {{}}, "sides": {{}}, "extents": {{}}, "studies": {{}}, {more}}}')
    with pytest.raises(InputError, match=words):
        read_findings(Data(root=str(tmp_path)), [])


def test_iu_xray_says_what_an_archive_lacks(collection, tmp_path, capsys):
    reports, images = collection
    few = {f"CXR{i}_IM-000{i}-{view}001.png": png() for i in (1, 4) for view in (1, 2)}
    few["CXR2_IM-0002-1001-0001.png"] = png()[:500]
    with pytest.raises(ValueError, match="4 problems.*out.building"):
        build_iu_xray(tmp_path / "out", reports, tgz(tmp_path / "few.tgz", few))
    printed = capsys.readouterr().out
    assert "CXR2_IM-0002-1001-0001: not a whole" in printed.replace(".png", "")
    assert "CXR3_IM-0003-1001.png: not in" in printed
    views = ["CXR4_IM-0004-1001", "CXR4_IM-0004-2001"]
    for content, words in ((xml("Clear.", views), "3 of R2Gen's studies"), (b"<a", "not a report")):
        with pytest.raises(ValueError, match=words):
            build_iu_xray(tmp_path / "out", tgz(tmp_path / "r.tgz", {"1.xml": content}), images)
    assert not (tmp_path / "out").exists()


def test_a_stopped_build_goes_on_to_the_same_bytes(collection, tmp_path, monkeypatch):
    build_iu_xray(tmp_path / "undisturbed", *collection)

    def stopped(jobs, total):
        shrink_images(islice(jobs, 5), total)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(iu_xray, "shrink_images", stopped)
        build_iu_xray(tmp_path / "out", *collection)
    building = tmp_path / "out.building"
    kept = {path: path.stat().st_mtime_ns for path in building.rglob("*.png")}
    assert len(kept) == 5 and not (tmp_path / "out").exists()
    build_iu_xray(tmp_path / "out", *collection)
    assert tree_of(tmp_path / "out") == tree_of(tmp_path / "undisturbed")
    for path, changed in kept.items():  # not done again
        assert (tmp_path / "out" / path.relative_to(building)).stat().st_mtime_ns == changed


def write_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("write", [tgz, write_zip])
def test_reading_an_archive_writes_nothing(tmp_path, write):
    """A path that leaves it is a name like others."""
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in/a", {"../../evil.png": b"x", "b.txt": b"y", "c.png": bytes(10)})
    assert dict(read_archive(path, ".png")) == {"../../evil.png": b"x", "c.png": bytes(10)}
    assert [found.name for found in tmp_path.rglob("*")] == ["in", "a"]
    write(path, {"cut.png": os.urandom(500)})
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="not a whole archive"):
        list(read_archive(path, ".png"))


@pytest.fixture
def server():
    """A web server that knows ranges and hangs up after `server.cut` bytes, if that is set."""
    content = os.urandom(3_000_000)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/file.tgz":
                return self.send_error(404)
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            server.asked.append(start)
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
    for _ in range(2):  # the second time it is there
        assert download(url, path).read_bytes() == server.content
    assert server.asked == [0, 1_000_000, 2_000_000]
    with pytest.raises(ValueError, match="404"):
        download(url + "x", tmp_path / "other.tgz")


@pytest.mark.parametrize("text, findings", [
    (" FINAL REPORT\n EXAMINATION: CHEST\n\n FINDINGS: \n\n The lungs are clear.  No effusion.\n"
     "\n IMPRESSION: \n\n Normal.\n", "The lungs are clear.  No effusion."),
    ("Indication: cough.\nFindings: Clear.\nImpression: Normal.", "Clear."),
    (" Impression/Findings:\nClear.\n", "Clear."),
    ("WET READ: fine\nFINDINGS: First.\n\nIMPRESSION: One.\n FINDINGS: Second.\nIMPRESSION: Two.",
     "Second."),
    ("FINDINGS: First.\nFINDINGS:\n ___\nIMPRESSION: Two.", "First."),
    ("FINDINGS: Lungs: clear.\n Heart: normal.\n Note the following: nothing.\nIMPRESSION: x",
     "Lungs: clear.\n Heart: normal.\n Note the following: nothing."),
    ("FINDINGS: Clear.\nRECOMMENDATION(S): None.\nNOTIFICATION: By phone.", "Clear."),
    ("INDICATION: These findings: cough.\nIMPRESSION: No findings: none.", ""),
    ("PROVISIONAL FINDINGS IMPRESSION (PFI): Line.\n FINAL REPORT\n FINDINGS: Clear.\n"
     " NOTIFICATION OF FINDINGS: Dr. ___ was paged.", "Clear."),
    ("FINDINGS: Clear.\n ______________________\n FINAL ADDENDUM\n Seen with Dr. ___", "Clear."),
    ("FINDINGS: Told to Dr. ___\nIMPRESSION: x", "Told to Dr. ___"),
    (" FINAL REPORT\n AP chest compared to ___:\n Lungs are clear.\n", ""),
], ids=["plain", "any case", "joint", "several blocks", "last block empty",
        "sentence with a colon", "heading in capitals", "the word in a sentence",
        "first reading, then findings", "addendum", "blanked out at the end", "none"])
def test_report_section_reads_findings(text, findings):
    assert report_section(text) == findings


def test_report_section_of_a19():
    text = "FINDINGS: Clear.\nIMPRESSION: Normal."
    assert report_section(text, "findings+impression") == "Clear.\nNormal."
    assert report_section("FINDINGS: Clear.", "findings+impression") == "Clear."
    # R2Gen's studies are those with findings
    assert report_section("IMPRESSION: Normal.", "findings+impression") == ""


@pytest.fixture
def physionet(tmp_path):
    """mimic-cxr-jpg and mimic-cxr with five studies: two images, no findings, no report, one for
    val, one for test."""
    jpg, text = tmp_path / "mimic-cxr-jpg", tmp_path / "mimic-cxr"
    rows = [("d1a", "50000001", "10000001", "train"), ("d1b", "50000001", "10000001", "train"),
            ("d2", "50000002", "10000001", "train"), ("d3", "50000003", "11000002", "validate"),
            ("d4", "50000004", "11000003", "test"), ("d5", "50000005", "11000003", "test")]
    for i, (dicom, study, subject, _) in enumerate(rows):
        folder = Path("files") / f"p{subject[:2]}" / f"p{subject}"
        (jpg / folder / f"s{study}").mkdir(parents=True, exist_ok=True)
        image = Image.open(io.BytesIO(png((500, 300), seed=i)))
        image.save(jpg / folder / f"s{study}" / f"{dicom}.jpg")
        (text / folder).mkdir(parents=True, exist_ok=True)
        body = "" if study == "50000002" else f"FINDINGS: Study {study}.\n\n"
        if study != "50000005":
            report = f" FINAL REPORT\n {body}IMPRESSION: Fine.\n"
            (text / folder / f"s{study}.txt").write_text(report)
    with gzip.open(jpg / "mimic-cxr-2.0.0-split.csv.gz", "wt", newline="",
                   encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("dicom_id", "study_id", "subject_id", "split"), *rows])
    with zipfile.ZipFile(text / "mimic-cxr-reports.zip", "w") as archive:
        for path in sorted(text.rglob("*.txt")):
            archive.write(path, path.relative_to(text))
    return jpg, text


def test_mimic_cxr_is_built_from_physionets_folders(physionet, tmp_path, run_main, capsys):
    jpg, text = physionet
    out = tmp_path / "mimic_cxr"
    run_main("mimic_cxr", "--out", out, "--jpg", jpg, "--reports", text)
    assert "of 5 studies 1 have no report" in (printed := capsys.readouterr().out)
    assert "1 have one without FINDINGS" in printed
    annotation = json.loads((out / "annotation.json").read_text())
    assert ids_of(annotation) == [["d1a", "d1b"], ["d3"], ["d4"]]
    assert annotation["val"][0] == {
        "id": "d3", "study_id": 50000003, "subject_id": 11000002, "report": "Study 50000003.",
        "split": "val", "image_path": ["p11/p11000002/s50000003/d3.png"]}
    with Image.open(out / "images/p11/p11000002/s50000003/d3.png") as image:
        assert image.size == (427, 256) and image.mode == "L"
    splits = read_studies(Data(root=str(out), dataset="mimic_cxr"))
    assert splits["test"][0].patient == "11000003" and splits["test"][0].sections == "findings"
    run_main("mimic_cxr", "--out", tmp_path / "zip", "--jpg", jpg,
             "--reports", text / "mimic-cxr-reports.zip")
    assert tree_of(tmp_path / "zip") == tree_of(out)
    run_main("mimic_cxr", "--out", tmp_path / "both", "--jpg", jpg, "--reports", text,
             "--sections", "findings+impression")
    both = json.loads((tmp_path / "both/annotation.json").read_text())
    assert both["sections"] == "findings+impression"
    assert both["test"][0]["report"] == "Study 50000004.\nFine."


def test_mimic_cxr_is_built_from_r2gens_annotation(physionet, tmp_path, run_main):
    path = "p11/p11000003/s50000004/d4"
    entry = dict(id="d4", report="Clear.", image_path=[f"{path}.jpg"])
    (tmp_path / "theirs.json").write_text(json.dumps({"test": [entry]}), encoding="utf-8-sig")
    run_main("mimic_cxr", "--out", tmp_path / "out", "--jpg", physionet[0],
             "--annotation", tmp_path / "theirs.json")
    annotation = json.loads((tmp_path / "out/annotation.json").read_text())
    assert annotation == {"test": [entry | {"image_path": [f"{path}.png"]}]}
    assert (tmp_path / f"out/images/{path}.png").is_file()


def test_mimic_cxr_half_downloaded(physionet, tmp_path, run_main, capsys):
    """All that is missing or cut is named, and --skip-missing builds without it."""
    jpg, text = physionet
    build = ("mimic_cxr", "--out", tmp_path / "out", "--jpg", jpg, "--reports", text)
    cut = jpg / "files/p10/p10000001/s50000001/d1b.jpg"
    cut.write_bytes(cut.read_bytes()[:1000])
    (jpg / "files/p11/p11000003/s50000004/d4.jpg").unlink()
    with pytest.raises(ValueError, match="^2 problems"):
        run_main(*build)
    printed = capsys.readouterr().out
    assert "d1b.jpg: not a whole" in printed and "d4.jpg: no such file" in printed
    assert not (tmp_path / "out").exists()
    run_main(*build, "--skip-missing")
    printed = capsys.readouterr().out
    assert "train: 1 of 2 studies left out" in printed and "val: 0 of 1" in printed
    annotation = json.loads((tmp_path / "out/annotation.json").read_text())
    assert ids_of(annotation) == [["d1a"], ["d3"], []]


def test_mimic_cxr_of_broken_or_foreign_files(physionet, tmp_path, run_main):
    jpg, text = physionet

    def refused(words, *arguments, error=ValueError):
        with pytest.raises(error, match=words):
            run_main("mimic_cxr", "--out", tmp_path / "out", *arguments)
    refused("expected the folder of mimic-cxr-jpg", "--jpg", text, "--reports", text,
            error=FileNotFoundError)
    refused("expected mimic-cxr-reports.zip", "--jpg", jpg, "--reports", tmp_path,
            error=FileNotFoundError)
    evil = {"train": [{"id": "a", "report": "x", "image_path": ["../../../etc/passwd"]}]}
    (tmp_path / "evil.json").write_text(json.dumps(evil))
    refused("'a': image_path", "--jpg", jpg, "--annotation", tmp_path / "evil.json")
    for path in text.rglob("*.txt"):
        path.write_text("IMPRESSION: Only that.")
    refused("no training study .* FINDINGS", "--jpg", jpg, "--reports", text)
    table = jpg / "mimic-cxr-2.0.0-split.csv.gz"
    table.write_bytes(table.read_bytes()[:-20])
    refused("split.csv.gz: not a whole table", "--jpg", jpg, "--reports", text)
    with gzip.open(table, "wt") as file:
        file.write("dicom_id,study_id,subject_id,split\nd,50000001,../../..,train\n")
    refused("expected dicom_id, study_id, subject_id", "--jpg", jpg, "--reports", text)


def write_annotation(root, **splits):
    keys = ("id", "report", "image_path", "subject_id")
    tree = {split: [dict(zip(keys, row)) for row in rows] for split, rows in splits.items()}
    (root / "annotation.json").write_text(json.dumps(tree))


@pytest.fixture
def films(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / f"images/{name}.png").write_bytes(png(seed=ord(name)))
    return tmp_path


def test_check_names_all_that_is_wrong(films, run_main, capsys):
    write_annotation(films, val=[("CXR3_x", "Clear.", ["c.png"])],  # and no train
                     test=[("CXR1_x", "Clear. Fine.", ["a.png"]), ("CXR2_x", "Clear.", ["b.png"])])
    command = ("check", "--config", "configs/iu_xray.yaml", "--set", f"data.root={films}")
    run_main(*command)
    printed = capsys.readouterr().out
    assert "nothing is wrong" in printed
    row = next(line for line in printed.splitlines() if line.startswith("test"))
    assert row.split() == ["test", "2", "2", "2", "2", "3.0", "4"]
    (films / "images/cut.png").write_bytes(png()[:400])
    Image.new("L", (30, 30), 7).save(films / "images/flat.png")
    write_annotation(
        films,
        train=[("CXR1_x", "Clear.", ["a.png", "cut.png"]), ("CXR1_x", "Clear.", ["b.png"]),
               ("CXR4_x", " ", ["none4.png", None]), ("CXR5_x", "No.", ["flat.png"])],
        val=[("CXR1_y", "Clear.", ["none.png"]), ("CXR6_x", "Clear.", ["a.png"])])
    with pytest.raises(ValueError, match="problems$"):
        run_main(*command)
    printed = capsys.readouterr().out
    for words in ("study 'CXR1_x': stands twice", "study 'CXR4_x': report: got ' '",
                  "study 'CXR4_x': image_path: got None", "patient 'CXR1' is in train, too",
                  "cut.png: not a whole", "none.png: no such file", "none4.png: no such file",
                  "flat.png: blank or dark", "image a.png: of 'CXR1_x' and of 'CXR6_x'"):
        assert words in printed, words
    write_annotation(films, train=[("CXR1_x", "Clear.", ["a.png", "none.png"])])
    with pytest.raises(FileNotFoundError, match="1 images .* such as none.png"):
        require_images(read_studies(Data(root=str(films))), Data(root=str(films)))


def test_check_says_which_texts_the_scores_cannot_use(films, capsys):
    write_annotation(films, train=[("x", "-", ["a.png"]), ("y", "Clear.", ["b.png"])],
                     test=[("z", "\u53cc\u80ba\u7eb9\u7406\u6e05\u6670\u3002" * 4, ["c.png"])])
    assert not check(Data(root=str(films), dataset="own"))
    *_, silent, no_blanks = capsys.readouterr().out.splitlines()
    assert silent == "train: 1 reports without a word, as of 'x'"
    assert no_blanks.startswith("test: 28 letters a word") and "need blanks" in no_blanks


def test_no_patient_in_two_splits(films):
    """By the id of IU-Xray's studies, or by subject_id, which one's own data may have, too."""
    write_annotation(films, train=[("CXR1_x", "Clear.", ["a.png"])],
                     val=[("CXR1_y", "Clear.", ["b.png"])])
    with pytest.raises(ValueError, match="patient 'CXR1' is in train, too"):
        read_studies(Data(root=str(films)))
    read_studies(Data(root=str(films), dataset="own"))
    write_annotation(films, train=[("x", "1. Clear.", ["a.png"], 7)],
                     test=[("y", "Clear.", ["b.png"], 7)])
    assert "patient '7'" in check(Data(root=str(films), dataset="own"))[0]


@pytest.mark.parametrize("arguments, words", [
    ("mimic_cxr --jpg x --annotation y.json --sections findings", "--sections: of no use with"),
    ("iu_xray --out configs", "--out: configs exists"),
    ("mimic_cxr --jpg x --reports y --out /proc/x", "--out: cannot write into /proc"),
])
def test_a_command_refuses_what_it_cannot_use(run_main, arguments, words):
    with pytest.raises(ValueError, match=words):
        run_main(*arguments.split())


@pytest.mark.parametrize("dataset, words", [
    ("iu_xray", "python data.py iu_xray"), ("own", "as the README shows")])
def test_data_that_is_not_there_says_how_to_make_it(tmp_path, dataset, words):
    with pytest.raises(FileNotFoundError, match=words):
        read_studies(Data(root=str(tmp_path), dataset=dataset))


def test_r2gens_split_of_iu_xray():
    split = json.loads(iu_xray.SPLIT.read_text())
    counts = {name: len(ids) for name, ids in split.items()}
    assert counts == {"train": 2069, "val": 296, "test": 590}
    patients = [{name.split("_")[0] for name in ids} for ids in split.values()]
    assert not patients[0] & patients[1] and not (patients[0] | patients[1]) & patients[2]
