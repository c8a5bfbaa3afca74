"""From disk to batches: R2Gen's cleaning and format, images, batches."""
import gc
import io
import json
import multiprocessing
import os
import re
import signal
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

from configs import Data
from configs.files import open_image
from conftest import REPORTS, make_tokenizer
from data import (Packed, ReportDataset, Study, build_demo_if_missing, clean_iu_xray,
                  clean_mimic_cxr, collate, end_in_one_line, epoch_batches, image_problem, loader,
                  read_image, read_studies)


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
        "study00", "the heart is enlarged . no pleural effusion .", ("study00/0.png",))
    assert [len(study.image_paths) for study in splits["train"][:3]] == [1, 2, 3]
    limited = read_studies(Data(root=str(data_root), limit=2))
    assert {name: len(studies) for name, studies in limited.items()} == dict(train=2, val=2, test=2)


GOOD = dict(id="a", report="Clear.", image_path=["a/0.png"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("dataset", ["iu_xray", "mimic_cxr", "demo", "own"])
def test_read_studies_takes_any_split_of_any_dataset(tmp_path, dataset, encoding):
    """Without train, and with a byte-order mark."""
    path = tmp_path / "annotation.json"
    path.write_text(json.dumps({"test": [GOOD, GOOD | {"id": 7}]}), encoding=encoding)
    splits = read_studies(Data(root=str(tmp_path), dataset=dataset))
    assert {name: [study.id for study in studies] for name, studies in splits.items()} == dict(
        train=[], val=[], test=["a", "7"])
    assert splits["test"][0].report == "clear ."


@pytest.mark.parametrize("tree, words", [
    ([], "expected {'train'"),
    ({}, "expected {'train'"),
    ({"train": [GOOD], "extra": []}, "expected {'train'"),
    ({"train": []}, "expected {'train'"),
    ({"train": [GOOD], "val": 3}, "lists of studies"),
    ({"train": [GOOD, GOOD]}, "'a' stands twice"),
    ({"train": [GOOD], "test": [GOOD]}, "test[0]: study 'a' stands twice"),
    ({"train": [GOOD | {"report": " "}]}, "'a' has no report"),
    ({"train": [{"id": 7}]}, "train[0]: study '7' has no report: got None"),
    ({"train": [GOOD | {"image_path": []}]}, "image_path: got []"),
    ({"train": [GOOD | {"image_path": "a/0.png"}]}, "image_path: got 'a/0.png'"),
    ({"train": [GOOD | {"image_path": ["../../x.png"]}]}, "relative to the images folder"),
    ({"train": [GOOD | {"image_path": ["/etc/x.png"]}]}, "relative to the images folder"),
    ({"train": [GOOD | {"id": None}]}, "train[0]: its id is None"),
    ({"train": ["a"]}, "train[0]: got 'a', expected a study with id, report and image_path"),
])
def test_read_studies_names_what_is_wrong(tmp_path, tree, words):
    (tmp_path / "annotation.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=re.escape(words)):
        read_studies(Data(root=str(tmp_path)))


def gradient_image(height=300, width=200):
    y, x = np.mgrid[:height, :width]
    return ((np.sin(x / 9) + np.cos(y / 5) + 2) / 4 * 255).astype(np.uint8)


def test_read_image_equals_the_encoders_own_processor(tmp_path):
    """A24: straight to the square, bicubic, antialiased; grey in three channels."""
    Image.fromarray(gradient_image()).save(tmp_path / "grey.png")
    colours = np.stack([gradient_image(), gradient_image()[::-1], gradient_image() // 2], axis=-1)
    Image.fromarray(colours).save(tmp_path / "colour.png")
    processor = ViTImageProcessor(size=dict(height=64, width=64), resample=3, do_normalize=False,
                                  do_rescale=False)
    for name in ("grey", "colour"):
        ours, image = read_image(tmp_path / f"{name}.png", 64), Image.open(tmp_path / f"{name}.png")
        theirs = processor(image.convert("RGB"), return_tensors="pt").pixel_values[0]
        assert ours.shape == (3, 64, 64) and ours.dtype == torch.uint8
        # the two bicubic filters round differently
        assert (ours.float() - theirs.float()).abs().max() <= 1


def png_of(values, kind, height=None, width=None):
    """A PNG of values (H, W, C) of 8 or 16 bits; it may say that it holds more than it does."""
    def chunk(name, body):
        check = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + check
    size = struct.pack(">II", width or values.shape[1], height or values.shape[0])
    header = size + bytes([8 * values.itemsize, kind, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(values.dtype.newbyteorder(">")).tobytes() for row in values)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b""))


@pytest.mark.parametrize("kind, channels", [(0, 1), (2, 3), (4, 2), (6, 4)],
                         ids=["grey", "RGB", "grey and alpha", "RGBA"])
def test_16_bit_images_are_scaled_by_their_own_maximum(tmp_path, kind, channels):
    """A24: values of 12 bits in 16, which would else be 1 to 15 of 255."""
    grey = gradient_image(64, 48).astype(np.uint16) * 13
    values = np.stack([grey, grey[::-1], grey // 2, grey // 3][:channels], axis=-1)
    (tmp_path / "deep.png").write_bytes(png_of(values, kind))
    shown = values[..., :3 if channels > 2 else 1]
    expected = np.rint(shown * (255 / shown.max()))
    image = np.array(open_image(tmp_path / "deep.png").convert("RGB"))
    assert np.abs(image - expected).max() <= 1 and image.max() == 255
    assert image_problem(tmp_path / "deep.png") is None


@pytest.mark.parametrize("values, words", [
    (gradient_image() // 16, "fill 15 of 255"), (np.full((9, 9), 7, np.uint8), "fill 0 of 255"),
    (gradient_image(60, 60).astype(np.uint16) + 60_000, "of 255"), (gradient_image() // 8, None),
    (np.stack([gradient_image()] * 3, axis=-1) // 16, "fill 15 of 255"),
    (np.zeros((9, 9), np.uint16), "fill 0 of 255"),
], ids=["dark", "one value", "16 bit", "an eighth", "colour", "black of 16 bit"])
def test_an_image_of_few_values_is_named(tmp_path, values, words):
    Image.fromarray(values).save(tmp_path / "a.png")
    problem = image_problem(tmp_path / "a.png")
    assert problem is None if words is None else words in problem and "a.png" in problem


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16"])
def test_read_image_takes_every_usual_mode(tmp_path, mode):
    pixels = gradient_image(20, 20)
    image = Image.fromarray(pixels.astype(np.uint16) if mode == "I;16" else pixels)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "F", "I") else "a.png")
    image.convert(mode).save(path)
    view = read_image(path, 16)
    assert view.shape == (3, 16, 16) and view.float().std() > 10


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


def pictures(kind, **more):
    """A file of three pictures."""
    colour = Image.fromarray(np.stack([gradient_image(24, 20)] * 3, axis=-1))
    others = [colour.rotate(90 * i, expand=True).resize(colour.size) for i in (1, 2)]
    colour.save(file := io.BytesIO(), kind, save_all=True, append_images=others, **more)
    return file.getvalue()


@pytest.mark.parametrize("content, words", [
    (b"", "(no known format; export DICOM, HEIC and the like as PNG)"),
    (bytes(128) + b"DICM" + bytes(500), "(no known format; export DICOM, HEIC and the like"),
    (png_of(np.zeros((1, 1, 1), np.uint8), 0, 20_000, 20_000), "(Image size (400000000 pixels) ex"),
    (pictures("GIF"), "(3 pictures in one file, expected one)"),
    (pictures("PNG"), "(3 pictures in one file, expected one)"),
    (pictures("TIFF"), "(3 pictures in one file, expected one)"),
    (None, "(Is a directory)"),
    (png_of(gradient_image()[..., None], 0)[:9000], "(image file is truncated"),
], ids=["empty", "DICOM", "20,000 x 20,000", "GIF", "APNG", "TIFF", "directory", "cut"])
def test_open_image_refuses_what_is_no_film(tmp_path, content, words):
    path = tmp_path / "ein Bild \u00fc.png"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError) as refused:
        open_image(path)
    message = str(refused.value)
    assert message.startswith(f"image {path}: not a whole PNG or JPEG image {words}")
    with pytest.raises(FileNotFoundError, match="none.png: no such file"):
        open_image(tmp_path / "none.png")


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


def test_a_worker_ignores_ctrl_c(make_model):
    model = make_model()
    dataset = ReportDataset(read_studies(model.config.data)["train"], model.config.data, 32,
                            model.tokenizer)
    read = iter(loader(dataset, [[i] for i in range(12)], 1, model.device))
    next(read)
    worker, = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    assert len(list(read)) == 11  # more than it had read ahead


@pytest.mark.parametrize("error, code, printed", [
    (KeyboardInterrupt(), 130, ""), (KeyboardInterrupt("go on by ..."), 130, "go on by ...\n"),
    (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device", ""),
    (MemoryError(), "error: out of memory (MemoryError); in training set train.recompute, or lower "
     "train.batch_size (VSE and DID depend on it); where reports are written, lower "
     "train.eval_batch_size", "")])
def test_expected_faults_end_in_one_line(error, code, printed, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as ended:
        end_in_one_line(main)
    assert ended.value.code == code and capsys.readouterr().err == printed


def test_a_process_that_draws_the_demo_second_takes_what_is_there(tmp_path, monkeypatch):
    root = tmp_path / "data/demo"

    def build_demo(building):  # another process ends meanwhile
        for folder in (root, building):
            folder.mkdir()
            (folder / "annotation.json").write_text(str(folder))
    monkeypatch.setattr("data.build_demo", build_demo)
    build_demo_if_missing(Data(root=str(root), dataset="demo"))
    assert list(root.parent.iterdir()) == [root]
    assert (root / "annotation.json").read_text() == str(root)


def test_batches_hold_studies_with_differing_numbers_of_views(data_root):
    """A8, A20, A23: and the end token stands only where the whole report fits."""
    tokenizer, studies = make_tokenizer(), read_studies(Data(root=str(data_root)))["train"]
    dataset = ReportDataset(studies, Data(root=str(data_root), max_report_tokens=12), 32, tokenizer)
    batch = collate([dataset[i] for i in (2, 0, 1)])
    assert batch["ids"] == ["study02", "study00", "study01"] and batch["view_counts"] == [3, 1, 2]
    assert batch["indices"] == [2, 0, 1]
    assert batch["images"].shape == (6, 3, 32, 32)
    assert torch.equal(batch["images"][3], read_image(data_root / "images/study00/0.png", 32))
    assert batch["report_ids"].shape == (3, max(batch["report_lengths"]))
    fit = set()
    for report, ids, length in zip(batch["reports"], batch["report_ids"].tolist(),
                                   batch["report_lengths"]):
        whole = tokenizer(report, add_special_tokens=False).input_ids
        fit.add(len(whole) <= 12)
        expected = whole + [tokenizer.eos_token_id] if len(whole) <= 12 else whole[:12]
        assert ids[:length] == expected
    assert fit == {True, False}


def test_epoch_batches_are_a_function_of_seed_and_epoch():
    first = epoch_batches(103, 16, seed=1, epoch=0)
    assert [len(b) for b in first] == [16] * 6  # A22: the last, incomplete batch is dropped
    assert len({i for b in first for i in b}) == 96
    assert first == epoch_batches(103, 16, seed=1, epoch=0)
    assert first != epoch_batches(103, 16, seed=1, epoch=1)
    assert first != epoch_batches(103, 16, seed=2, epoch=0)
    assert sorted(i for b in epoch_batches(32, 16, 0, 0) for i in b) == list(range(32))
    assert epoch_batches(15, 16, 0, 0) == []
    assert len(epoch_batches(32, 16, seed=20261127213000, epoch=1)) == 2  # a date and a time


def test_a_folder_in_the_way_of_the_demo_is_named_before_it_is_built(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/.DS_Store").write_text("")
    monkeypatch.setattr("data.build_demo", lambda *_: pytest.fail("it was built"))
    with pytest.raises(ValueError, match="data.root: .*demo exists and holds no annotation.json"):
        build_demo_if_missing(Data(root=str(tmp_path / "demo"), dataset="demo"))


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
    """8,000 studies, whose images are not read."""
    report = " ".join(REPORTS)
    entries = [dict(id=f"s{i}", report=report, image_path=[f"p{i // 3}/s{i}.png"])
               for i in range(8_000)]
    (tmp_path / "annotation.json").write_text(json.dumps({"train": entries}))
    data = Data(root=str(tmp_path))
    dataset = ReportDataset(read_studies(data)["train"], data, 32, make_tokenizer())
    monkeypatch.setattr("data.read_image", lambda *_: torch.zeros(3, 1, 1, dtype=torch.uint8))
    batches = DataLoader(dataset, batch_sampler=epoch_batches(8_000, 100, seed=0, epoch=0),
                         num_workers=1, collate_fn=collate)
    own = []
    gc.freeze()  # what else stands in this process is no matter: it would be looked through, and so
    # written to, here, and the worker's share of it become its own
    for _ in batches:
        worker, = multiprocessing.active_children()
        rollup = Path(f"/proc/{worker.pid}/smaps_rollup").read_text()
        own.append(int(re.search(r"Private_Dirty:\s+(\d+) kB", rollup)[1]) / 1000)
    gc.unfreeze()
    assert own[-1] < 50 and own[-1] - own[0] < 3, own  # MB
