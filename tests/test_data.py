"""From disk to batches: R2Gen's cleaning and format, images, batches."""
import errno
import gc
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

from configs import Data, parse_config
from configs.archives import open_image
from conftest import REPORTS, make_tokenizer
from configs.demo import DEMO_FINDINGS, TOKENS, build_demo, draw_film, draw_findings, write_report
from data import (Packed, ReportDataset, Study, build_demo_if_missing, build_once, check,
                  clean_iu_xray, clean_mimic_cxr, collate, epoch_batches, loader, read_image,
                  read_studies)
from evaluate import named_findings
from model import load_model


@pytest.mark.parametrize("report, cleaned", [
    ("The heart is normal. Lungs are clear.", "the heart is normal . lungs are clear ."),
    ("1. No effusion. 2. Normal heart, (stable).", "no effusion . normal heart stable ."),
    ("No change 2. Clear.", "no change . clear ."),
    ("Stable.. No XXXX... Fine", "stable . no xxxx . fine ."),
    ("Size 21. Next", "size 2next ."),         # quirk: the 1 of a list, eaten elsewhere
    # the accidental range
    ("A-B #3 $4 <5 =6 >7 @8 [9] {10} a/b \"q\" it's \\x", "a-b #3 $4 5 6 7 8 9 10 ab q its x ."),
    ("a; b: c? d! e* f% g^ h& i_ j( k) l+", "a b c d e f g h i j k l ."),
    ("Ends. . Middle", "ends .  . middle ."),  # quirk: empty sentences stay
    (".", " ."),
])
def test_clean_iu_xray(report, cleaned):
    assert clean_iu_xray(report) == cleaned


@pytest.mark.parametrize("report, cleaned", [
    ("PA and lateral.\nLungs  clear.\n\n 2. No ___ effusion.",
     "pa and lateral . lungs clear . no  effusion ."),
    ("Heart____size............normal", "heartsizenormal ."),
    ("Fine.\nDone.", "fine . done ."),
])
def test_clean_mimic_cxr(report, cleaned):
    assert clean_mimic_cxr(report) == cleaned


def test_cleaning_leaves_only_what_r2gen_leaves():
    everything = "".join(map(chr, range(32, 127)))
    kept = set(clean_iu_xray(everything))
    assert kept == set(" .-#$`|~abcdefghijklmnopqrstuvwxyz0123456789")
    # not idempotent, as R2Gen
    assert clean_iu_xray("a. b.") == "a . b ." and clean_iu_xray("a . b .") == "a . b  ."


def test_read_studies_reads_r2gens_format(data_root):
    splits = read_studies(Data(root=str(data_root)))
    assert {name: len(studies) for name, studies in splits.items()} == dict(train=12, val=3, test=5)
    assert splits["train"][0] == Study(
        "study00", "the heart is enlarged . no pleural effusion .", ("study00/0.png",)
    )
    assert [len(study.image_paths) for study in splits["train"][:3]] == [1, 2, 3]
    limited = read_studies(Data(root=str(data_root), limit=2))
    assert {name: len(studies) for name, studies in limited.items()} == dict(train=2, val=2, test=2)


GOOD = dict(id="a", report="Clear.", image_path=["a/0.png"])


@pytest.mark.parametrize("tree, words", [
    ([], "expected {'train'"),
    ({"val": [GOOD]}, "expected {'train'"),
    ({"train": [GOOD], "extra": []}, "expected {'train'"),
    ({"train": []}, "train: no studies"),
    ({"train": [GOOD], "val": 3}, "val: got int"),
    ({"train": [GOOD, GOOD]}, "'a' stands twice"),
    ({"train": [GOOD], "test": [GOOD]}, r"test\[0\]: study 'a' stands twice"),
    ({"train": [GOOD | {"report": " "}]}, "'a' has no report"),
    ({"train": [GOOD | {"report": None}]}, "'a' has no report"),
    ({"train": [GOOD | {"image_path": []}]}, "image_path: got"),
    ({"train": [GOOD | {"image_path": "a/0.png"}]}, "image_path: got"),
    ({"train": [GOOD | {"image_path": ["../../x.png"]}]}, "leaves the images folder"),
    ({"train": [GOOD | {"image_path": ["/etc/x.png"]}]}, "leaves the images folder"),
    ({"train": [{"id": "a"}]}, r"train\[0\]: study 'a' has no report: got None, expected a text"),
    ({"train": [GOOD | {"report": 3}]}, r"train\[0\]: study 'a' has no report: got 3"),
    ({"train": [{"id": 7, "report": "Clear."}]}, r"train\[0\]: study '7': image_path: got None"),
    ({"train": [{"report": "Clear.", "image_path": ["a.png"]}]}, r"train\[0\]: its id is None"),
    ({"train": [GOOD | {"id": ["a"]}]}, r"train\[0\]: its id is \['a'\]"),
    ({"train": ["a"]}, r"train\[0\]: got 'a', expected a study with id, report and image_path"),
])
def test_read_studies_names_what_is_wrong(tmp_path, tree, words):
    (tmp_path / "annotation.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=re.escape(words) if "\\" not in words else words):
        read_studies(Data(root=str(tmp_path)))


def test_read_studies_without_annotation(tmp_path):
    with pytest.raises(FileNotFoundError, match="data.root: there is no"):
        read_studies(Data(root=str(tmp_path)))
    (tmp_path / "annotation.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_studies(Data(root=str(tmp_path)))


def gradient_image(height=300, width=200):
    y, x = np.mgrid[:height, :width]
    return ((np.sin(x / 9) + np.cos(y / 5) + 2) / 4 * 255).astype(np.uint8)


def test_read_image_equals_the_encoders_own_processor(tmp_path):
    """A24: straight to the square, bicubic, antialiased; grey in three channels."""
    Image.fromarray(gradient_image()).save(tmp_path / "grey.png")
    colours = np.stack([gradient_image(), gradient_image()[::-1], gradient_image() // 2], axis=-1)
    Image.fromarray(colours).save(tmp_path / "colour.png")
    processor = ViTImageProcessor(
        size=dict(height=64, width=64), resample=3, do_normalize=False, do_rescale=False
    )
    for name in ("grey", "colour"):
        ours = read_image(tmp_path / f"{name}.png", 64)
        theirs = processor(
            Image.open(tmp_path / f"{name}.png").convert("RGB"), return_tensors="pt"
        ).pixel_values[0]
        assert ours.shape == (3, 64, 64) and ours.dtype == torch.uint8
        # the two bicubic filters round differently
        assert (ours.float() - theirs.float()).abs().max() <= 1


def test_read_image_scales_16_bit_by_its_own_maximum(tmp_path):
    values = gradient_image(64, 64).astype(np.uint16) * 13
    Image.fromarray(values).save(tmp_path / "deep.png")
    expected = np.rint(values * (255 / values.max()))
    assert np.abs(read_image(tmp_path / "deep.png", 64)[0].numpy() - expected).max() <= 1
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(tmp_path / "black.png")
    assert read_image(tmp_path / "black.png", 8).max() == 0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16"])
def test_read_image_takes_every_usual_mode(tmp_path, mode):
    image = Image.fromarray(gradient_image(20, 20))
    image = (
        Image.fromarray(gradient_image(20, 20).astype(np.uint16))
        if mode == "I;16"
        else image.convert(mode)
    )
    path = tmp_path / ("a.tif" if mode in ("CMYK", "F", "I") else "a.png")
    image.save(path)
    view = read_image(path, 16)
    assert view.shape == (3, 16, 16) and view.float().std() > 10


def test_read_image_names_what_is_wrong(tmp_path):
    Image.fromarray(gradient_image()).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for name, content in dict(empty=b"", text=b"hello", cut=whole[:len(whole) // 2]).items():
        (tmp_path / f"{name}.png").write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.png: not a whole PNG or JPEG"):
            read_image(tmp_path / f"{name}.png", 32)
    with pytest.raises(FileNotFoundError, match="none.png: no such file"):
        read_image(tmp_path / "none.png", 32)
    with pytest.raises(ValueError, match="not a whole"):
        read_image(tmp_path, 32)


ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # the camera lay on its side: a quarter turn clockwise shows it upright


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "16 bit"])
def test_exif_rotation_is_applied(tmp_path, kind):
    pixels = gradient_image(40, 24)
    lying = np.rot90(pixels)  # counterclockwise
    if kind == "16 bit":
        lying = lying.astype(np.uint16) * 257
    path = tmp_path / ("a.jpg" if kind == "JPEG" else "a.png")
    Image.fromarray(np.ascontiguousarray(lying)).save(path, exif=ROTATED)
    assert open_image(path).size == (24, 40)
    upright = np.array(Image.fromarray(pixels).resize((24, 24), Image.Resampling.BICUBIC))
    difference = read_image(path, 24).float() - torch.from_numpy(upright)
    assert difference.abs().max() <= (12 if kind == "JPEG" else 1)


def png_of(width, height):
    """A PNG that says it has so many pixels, and holds none."""
    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def pictures(kind, **more):
    """A file of three pictures."""
    colour = Image.fromarray(np.stack([gradient_image(24, 20)] * 3, axis=-1))
    others = [colour.rotate(90 * i, expand=True).resize(colour.size) for i in (1, 2)]
    colour.save(file := io.BytesIO(), kind, save_all=True, append_images=others, **more)
    return file.getvalue()


@pytest.mark.parametrize("content, words", [
    (b"", "(no known format; export DICOM, HEIC and the like as PNG)"),
    (bytes(128) + b"DICM" + bytes(500), "(no known format; export DICOM, HEIC and the like"),
    (png_of(20_000, 20_000), "(Image size (400000000 pixels) exceeds limit"),
    (pictures("GIF"), "(3 pictures in one file, expected one)"),
    (pictures("PNG"), "(3 pictures in one file, expected one)"),
    (pictures("TIFF"), "(3 pictures in one file, expected one)"),
    (None, "(Is a directory)"),
], ids=["empty", "DICOM", "20,000 x 20,000", "GIF", "APNG", "TIFF", "directory"])
def test_open_image_refuses_what_is_no_film(tmp_path, content, words):
    path = tmp_path / "ein Bild \u00fc.png"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError) as refused:
        open_image(path)
    message = str(refused.value)
    assert message.startswith(f"image {path}: not a whole PNG or JPEG image {words}")


def test_no_program_is_run_for_an_image(tmp_path, monkeypatch):
    """A file that calls itself PNG and is EPS, which Pillow gives to Ghostscript."""
    ran = tmp_path / "ran"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    Image.fromarray(gradient_image(24, 20)).save(tmp_path / "view.eps")
    (tmp_path / "view.eps").rename(tmp_path / "view.png")
    with pytest.raises(ValueError, match="no known format"):
        open_image(tmp_path / "view.png")
    assert not ran.exists()


def test_open_image_takes_odd_but_whole_films(tmp_path, recwarn):
    """A phone's JPEG with a second picture, a palette with transparency, a broken block of EXIF."""
    (tmp_path / "phone.jpg").write_bytes(pictures("MPO"))
    assert open_image(tmp_path / "phone.jpg").size == (20, 24)
    grey = Image.fromarray(gradient_image(24, 20))
    grey.convert("P").save(tmp_path / "palette.png", transparency=bytes(256))
    assert np.array_equal(np.array(open_image(tmp_path / "palette.png"))[..., 0], np.array(grey))
    for kind in ("png", "jpg"):
        grey.save(tmp_path / f"exif.{kind}", exif=b"Exif\0\0garbage, not TIFF")
        assert open_image(tmp_path / f"exif.{kind}").size == (20, 24)
    assert not recwarn.list


def test_a_worker_outlives_signals_and_can_be_ended(make_model):
    """Of Ctrl-C, which reaches a group of processes, and of a scheduler, which reaches each."""
    model = make_model()
    dataset = ReportDataset(read_studies(model.config.data)["train"], model.config.data, 32,
                            model.tokenizer)
    read = iter(loader(dataset, [[i] for i in range(12)], 1, model.device))
    next(read)
    worker, = multiprocessing.active_children()
    assert os.getpgid(worker.pid) == worker.pid != os.getpgid(0)
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert len(list(read)) == 11  # more than it had read ahead
    read = iter(loader(dataset, [[i] for i in range(12)], 1, model.device))
    next(read)
    worker, = multiprocessing.active_children()
    worker.terminate()  # as Python does when a process ends whose loader is still there
    worker.join(20)
    assert not worker.is_alive()


@pytest.mark.filterwarnings("ignore")
def test_a_hurt_block_of_exif_is_no_fault(tmp_path):
    """Bytes, found by hurting a whole block at random, with which Pillow ends in struct.error."""
    exif = bytes.fromhex(
        "4578696600004d4d002a00000008003d0150000200000006000000320112000300000001000600008769000400"
        "000001cd000038000000006d616b6572000002900000070000000430323330920a000300000002003200010000"
        "0000")
    Image.new("L", (20, 24), 7).save(tmp_path / "hurt.jpg", exif=exif)
    assert open_image(tmp_path / "hurt.jpg").size in ((20, 24), (24, 20))  # turned, or as it lies


def test_check_lists_all_where_no_training_study_is_right(data_root, tmp_path):
    data_root = shutil.copytree(data_root, tmp_path / "data")
    tree = json.loads((data_root / "annotation.json").read_text())
    for study in tree["train"]:
        study["image_path"] = study["image_path"][0]
    (data_root / "annotation.json").write_text(json.dumps(tree))
    problems = check(Data(root=str(data_root)))
    assert len(problems) == 12 and "expected a list of one path" in problems[0]


def test_batches_hold_studies_with_differing_numbers_of_views(data_root):
    """A8, A20, A23: and the end token stands only where the whole report fits."""
    tokenizer, studies = make_tokenizer(), read_studies(Data(root=str(data_root)))["train"]
    dataset = ReportDataset(studies, Data(root=str(data_root), max_report_tokens=12), 32, tokenizer)
    batch = collate([dataset[i] for i in (2, 0, 1)])  # the shortest report first
    assert batch["ids"] == ["study01", "study02", "study00"] and batch["view_counts"] == [2, 3, 1]
    assert (
        batch["indices"] == [1, 2, 0]
        and batch["report_lengths"] == sorted(batch["report_lengths"])
    )
    assert batch["images"].shape == (6, 3, 32, 32)
    assert torch.equal(batch["images"][5], read_image(data_root / "images/study00/0.png", 32))
    assert batch["report_ids"].shape == (3, max(batch["report_lengths"]))
    for report, ids, length in zip(
        batch["reports"], batch["report_ids"].tolist(), batch["report_lengths"]
    ):
        whole = tokenizer(report, add_special_tokens=False).input_ids
        assert ids[:length] == (
            whole + [tokenizer.eos_token_id] if len(whole) <= 12 else whole[:12]
        )
    assert {
        len(tokenizer(s.report, add_special_tokens=False).input_ids) <= 12 for s in studies
    } == {True, False}


def test_epoch_batches_are_a_function_of_seed_and_epoch():
    first = epoch_batches(103, 16, seed=1, epoch=0)
    assert [len(b) for b in first] == [16] * 6  # A22: the last, incomplete batch is dropped
    assert len({i for b in first for i in b}) == 96
    assert first == epoch_batches(103, 16, seed=1, epoch=0)
    assert (
        first != epoch_batches(103, 16, seed=1, epoch=1)
        and first != epoch_batches(103, 16, seed=2, epoch=0)
    )
    assert sorted(i for b in epoch_batches(32, 16, 0, 0) for i in b) == list(range(32))
    assert epoch_batches(15, 16, 0, 0) == []
    assert len(epoch_batches(32, 16, seed=20261127213000, epoch=1)) == 2  # a date and a time


def small_demo(root):
    build_demo(root, clean_iu_xray, dict(train=40, val=3, test=3), swin_steps=3, llama_steps=3)
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_demo_is_deterministic_and_ordinary(tmp_path, capsys):
    """The same bytes twice; a data root and two Hugging Face folders like any other; no trace of
    the build's other name."""
    state = torch.get_rng_state()
    first, second = small_demo(tmp_path / "a"), small_demo(tmp_path / "b")
    assert first == second and len(first) > 80 and torch.equal(state, torch.get_rng_state())
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}
    data = Data(root=str(tmp_path / "a"), dataset="demo")
    splits = read_studies(data)
    assert {len(study.image_paths) for study in splits["train"]} == {1, 2}
    model = load_model(
        parse_config(
            dict(
                model=dict(vision=str(tmp_path / "a/swin"), llm=str(tmp_path / "a/llama")),
                data=dict(root=data.root, dataset="demo"),
            )
        )
    )
    view = read_image(tmp_path / "a/images" / splits["test"][0].image_paths[0], model.image_size)
    assert model.encode(view[None], [1]).shape == (1, TOKENS, 128)


BUILDER = """
import sys, time
from functools import partial
from pathlib import Path
import data
from configs import Data, demo
root = Path(sys.argv[1])
data.build_demo = partial(data.build_demo, studies=dict(train=20, val=3, test=3))
demo.pretrain_both = lambda *_: None
(root.parent / sys.argv[2]).touch()
while len(list(root.parent.glob("ready*"))) < 2:
    time.sleep(.01)
data.build_demo_if_missing(Data(root=str(root), dataset="demo"))
"""


@pytest.mark.parametrize("killed", [False, True])
def test_one_of_two_processes_builds_the_demo(tmp_path, killed):
    """The other waits for it, and builds itself if the first is killed; nothing else is left."""
    root = tmp_path / "demo"
    processes = [subprocess.Popen([sys.executable, "-c", BUILDER, root, f"ready{i}"], text=True,
                                  cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE)
                 for i in range(2)]
    first_lines = [process.stdout.readline() for process in processes]
    builds = ["drawing the demo" in line for line in first_lines]
    assert sorted(builds) == [False, True] and "another process" in first_lines[builds.index(False)]
    if killed:
        processes[builds.index(True)].kill()
    rest = [process.communicate(timeout=300)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [-9 if killed and first else 0 for first in builds]
    assert ("drawing the demo" in rest[builds.index(False)]) == killed
    assert {p.name for p in tmp_path.iterdir()} == {"demo", "ready0", "ready1"}
    assert len(read_studies(Data(root=str(root), dataset="demo"))["train"]) == 20


def test_demo_fails_as_its_pretraining_does(tmp_path):
    """Eight reports fill no batch of 32: the error of the process that meets it, and no demo.

    The other one, which would take days, is not waited for.
    """
    studies = dict(train=8, val=1, test=1)
    with pytest.raises(ValueError, match="sample than population"):
        build_demo(tmp_path / "demo", clean_iu_xray, studies, swin_steps=10 ** 6, llama_steps=3)
    assert not (tmp_path / "demo").exists()


LONG_BUILD = """
import sys
from pathlib import Path
from configs.demo import build_demo
from data import clean_iu_xray, end_in_one_line
studies = dict(train=40, val=1, test=1)
end_in_one_line(lambda: build_demo(Path(sys.argv[1]), clean_iu_xray, studies, 3, 10 ** 6))
"""


def test_a_folder_in_the_way_of_the_demo_is_named_before_it_is_built(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/.DS_Store").write_text("")
    monkeypatch.setattr("data.build_demo", lambda *_: pytest.fail("it was built"))
    with pytest.raises(ValueError, match="data.root: .*demo exists and holds no annotation.json"):
        build_demo_if_missing(Data(root=str(tmp_path / "demo"), dataset="demo"))


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("data.fcntl.lockf", none)
    with pytest.raises(OSError, match="demo.lock: cannot be locked .No locks available.; make"):
        build_once(tmp_path / "demo", lambda: None)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_build_leaves_no_process_behind(tmp_path, number):
    """The pretraining would else write into the folder of the next build; it holds the pipe.

    An interrupt of the parent alone does not wait for it, either.
    """
    build = subprocess.Popen([sys.executable, "-c", LONG_BUILD, tmp_path / "demo"], text=True,
                             cwd=Path(__file__).parent.parent, stderr=subprocess.PIPE)
    while "pretraining the Llama" not in build.stderr.readline(200):
        assert build.poll() is None
    build.send_signal(number)
    build.communicate(timeout=60)
    assert not (tmp_path / "demo").exists()


def test_ctrl_c_while_the_builders_start_ends_without_a_traceback(tmp_path):
    """A terminal sends it to all processes; the two builders still import torch by then."""
    build = subprocess.Popen([sys.executable, "-c", LONG_BUILD, tmp_path / "demo"], text=True,
                             cwd=Path(__file__).parent.parent, stderr=subprocess.PIPE,
                             start_new_session=True)
    while "drawing train" not in build.stderr.readline(30):
        assert build.poll() is None
    time.sleep(1)  # for Python itself to begin
    os.killpg(build.pid, signal.SIGINT)
    assert "Traceback" not in build.communicate(timeout=60)[1]
    assert build.returncode == 130 and not (tmp_path / "demo").exists()


def test_demo_reports_name_just_the_findings_of_their_study(tmp_path):
    """findings.json, its phrases and the drawn reports agree on every study: a perfect report
    scores F1 1."""
    rng, spec = (
        np.random.default_rng(0),
        {"phrases": {name: row["phrases"] for name, row in DEMO_FINDINGS.items()}},
    )
    sizes = {
        size: [size, grade]
        for size, grade in zip(("small", "moderate", "large"), ("mild", "moderate", "severe"))
    }
    spec |= {"sides": {"left": ["left"], "right": ["right"]}, "extents": sizes}
    counts = Counter()
    for _ in range(2000):
        findings = draw_findings(rng)
        named = named_findings(clean_iu_xray(write_report(findings, rng)), spec)
        assert named == {f["finding"]: (f["side"], f["extent"]) for f in findings}
        counts.update(named.keys() or ["none"])
    # long-tailed, and many are normal
    assert counts["effusion"] > 5 * counts["granuloma"] > 0 and counts["none"] > 300


def test_demo_films_show_the_finding_on_its_side():
    """Each finding changes its own side of the frontal view, and a small part of it; the left of
    the patient is right."""
    body = np.random.default_rng(1).random(24)
    plain = draw_film([], False, body, np.random.default_rng(2)).astype(float)
    for name in ("effusion", "pneumothorax", "atelectasis", "nodule", "rib fracture", "granuloma"):
        for side, half in (("left", slice(48, 96)), ("right", slice(0, 48))):
            film = draw_film(
                [dict(finding=name, side=side, extent="moderate")],
                False,
                body,
                np.random.default_rng(2),
            )
            changed = np.abs(film - plain) > 12
            assert changed[:, half].sum() > 0.9 * changed.sum() > 0, (name, side)
            assert changed.mean() < 0.12, name
    areas = [
        np.abs(
            draw_film(
                [dict(finding="effusion", side="left", extent=e)],
                False,
                body,
                np.random.default_rng(2),
            )
            - plain
        ).sum()
        for e in ("small", "moderate", "large")
    ]
    assert areas == sorted(areas) and areas[2] > 2 * areas[0]


def test_packed_is_a_list_that_cannot_be_changed():
    items = [Study("a", "clear .", ("a.png",)), Study("c", "", ()),
             Study("b", "no \u00fc .", ("b.png", "c.png"), "7", "findings")]
    packed = Packed()
    assert not packed and list(packed) == []
    for item in items:
        packed.append(item)
    assert list(packed) == items and len(packed) == 3
    assert packed[-1] == items[2] and packed[1:] == items[1:]
    for index in (3, -4):
        with pytest.raises(IndexError):
            packed[index]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file()
                    or multiprocessing.get_start_method() != "fork", reason="needs forked workers")
def test_a_workers_own_memory_stays_small(tmp_path, monkeypatch):
    """20,000 studies, whose images are not read."""
    report = " ".join(REPORTS)
    entries = [dict(id=f"s{i}", report=report, image_path=[f"p{i // 3}/s{i}.png"])
               for i in range(20_000)]
    (tmp_path / "annotation.json").write_text(json.dumps({"train": entries}))
    data = Data(root=str(tmp_path))
    dataset = ReportDataset(read_studies(data)["train"], data, 32, make_tokenizer())
    monkeypatch.setattr("data.read_image", lambda *_: torch.zeros(3, 1, 1, dtype=torch.uint8))
    batches = DataLoader(dataset, batch_sampler=epoch_batches(20_000, 400, seed=0, epoch=0),
                         num_workers=1, collate_fn=collate)
    own = []
    gc.freeze()  # what else stands in this process is no matter: it would be looked through, and so
    # written to, here, and the worker's share of it become its own
    for _ in batches:
        worker, = multiprocessing.active_children()
        rollup = Path(f"/proc/{worker.pid}/smaps_rollup").read_text()
        own.append(int(re.search(r"Private_Dirty:\s+(\d+) kB", rollup)[1]) / 1000)
    gc.unfreeze()
    assert own[-1] < 50 and own[-1] - own[5] < 5, own  # MB
