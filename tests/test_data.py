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
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

from configs import Data, InputError
from configs.files import image_problem, open_image, process_pool
from conftest import REPORTS, make_tokenizer
from data import (CLEANING, Packed, ReportDataset, Study, batches_from, build_demo_if_missing,
                  clean_iu_xray, clean_mimic_cxr, collate, end_in_one_line, epoch_batches,
                  loader, read_image, read_studies)


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


def test_own_texts_keep_all_but_blanks():
    clean = CLEANING["own"]
    assert clean(" No 2.3 cm\r\n nodule;\tOK_?\u3000Yes. ") == "No 2.3 cm nodule; OK_? Yes."


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


@pytest.mark.parametrize("dataset", ["iu_xray", "mimic_cxr", "demo", "own"])
def test_read_studies_takes_any_split_of_any_dataset(tmp_path, dataset):
    """Without train, with a byte-order mark, with more keys."""
    path = tmp_path / "annotation.json"
    tree = {"info": {"year": 1}, "version": 2, "tags": ["a"], "test": [GOOD, GOOD | {"id": 7}]}
    path.write_text(json.dumps(tree), encoding="utf-8-sig")
    splits = read_studies(Data(root=str(tmp_path), dataset=dataset))
    assert {name: [study.id for study in studies] for name, studies in splits.items()} == dict(
        train=[], val=[], test=["a", "7"])
    assert splits["test"][0].report == ("Clear." if dataset == "own" else "clear .")


@pytest.mark.parametrize("tree, words", [
    ([], "expected one object {'train'"),
    ({"train": []}, "expected one object {'train'"),
    ({"train": [GOOD], "val": 3}, "lists of studies"),
    ({"train": [GOOD], "valid": [GOOD]}, "'valid' holds studies; rename it"),
    ('{"train": [], "train": []}', "'train' stands twice"),
    ('{"train": [{"id": 1, "report": "a", "report": "b"}]}', "'report' stands twice"),
    ('{"id": 1}\n{"id": 2}\n', "(Extra data: line 2 column 1 (char 10)); expected one object"),
    ("id,report\n1,Clear.\n", "not CSV or a study a line"),
    ({"train": [GOOD], "test": [GOOD]}, "test[0]: study 'a': stands twice"),
    ({"train": [GOOD | {"report": " "}]}, "'a': report: got ' '"),
    ({"train": [{"id": 7}]}, "train[0]: study '7': report: got None"),
    ({"train": [GOOD | {"image_path": []}]}, "image_path: got []"),
    ({"train": [GOOD | {"image_path": "a/0.png"}]}, "image_path: got 'a/0.png'"),
    ({"train": [GOOD | {"image_path": ["../../x.png"]}]}, "relative to the images folder"),
    ({"train": [GOOD | {"id": None}]}, "train[0]: id: got None"),
    ({"train": [GOOD | {"report": "Clear.\ud800"}]}, "'a': report: got '\\ud800', half a char"),
    ({"train": ["a"]}, "train[0]: got 'a', expected id, report and image_path"),
])
def test_read_studies_names_what_is_wrong(tmp_path, tree, words):
    text = tree if isinstance(tree, str) else json.dumps(tree)
    (tmp_path / "annotation.json").write_text(text)
    with pytest.raises(InputError, match=re.escape(words)):
        read_studies(Data(root=str(tmp_path)))


@pytest.mark.parametrize("subject, patient", [
    (0, "0"), (7.0, "7"), ("s1", "s1"), (None, None), (float("nan"), None)])
def test_a_patient_is_any_known_subject(tmp_path, subject, patient):
    tree = {"train": [GOOD | {"subject_id": subject}]}
    (tmp_path / "annotation.json").write_text(json.dumps(tree))
    study, = read_studies(Data(root=str(tmp_path)))["train"]
    assert study.patient == patient


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


def marked(values):
    """With a marker at the maximum of 16 bits in its corner."""
    values = values.astype(np.uint16)
    values[:12, :12] = 65_535
    return values


@pytest.mark.parametrize("values, fine", [
    (gradient_image() // 16, False), (gradient_image() // 3, True),
    (np.stack([gradient_image()] * 3, axis=-1) // 16, False), (np.zeros((9, 9), np.uint16), False),
    (marked(gradient_image() * 56.), False), (marked(gradient_image() * 128.), True),
], ids=["dark", "a third", "colour", "black of 16 bit", "14 bit, a marker", "15 bit, a marker"])
def test_an_image_of_few_values_is_named(tmp_path, values, fine):
    Image.fromarray(values).save(tmp_path / "a.tif")
    problem = image_problem(tmp_path / "a.tif")
    assert problem is None if fine else "a.tif: blank or dark" in problem


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
    (bytes(128) + b"DICM" + bytes(500), "(no known format; export DICOM, HEIC and the like"),
    (png_of(np.zeros((1, 1, 1), np.uint8), 0, 20_000, 20_000), "(Image size (400000000 pixels) ex"),
    (pictures("TIFF"), "(3 pictures in one file, expected one)"),
    (None, "(Is a directory)"),
    (png_of(gradient_image()[..., None], 0)[:9000], "(image file is truncated"),
], ids=["DICOM", "20,000 x 20,000", "TIFF", "directory", "cut"])
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


def test_a_worker_ignores_ctrl_c_and_needs_no_shared_memory(data_root):
    """A container's may be too small for batches: they come through a pipe."""
    data = Data(root=str(data_root))
    dataset = ReportDataset(read_studies(data)["train"], data, 32, make_tokenizer())
    read = iter(loader(dataset, [[i] for i in range(12)], 1, torch.device("cpu")))
    batch = next(read)
    assert not batch["images"].is_shared() and not batch["report_ids"].is_shared()
    worker, = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    assert len(list(read)) == 11  # more than it had read ahead


def test_a_process_of_a_pool_ignores_ctrl_c_from_its_first_moment():
    owner = Packed()  # for as long as it lives
    multiprocessing.util.register_after_fork(owner, lambda _: os.kill(os.getpid(), signal.SIGINT))
    with process_pool() as pool:
        assert list(pool.map(int, "123")) == [1, 2, 3]
    with pytest.raises(KeyboardInterrupt):  # and the main process does not
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("error, code, printed", [
    (KeyboardInterrupt("go on by ..."), 130, "go on by ...\n"),
    (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device", ""),
    (MemoryError(), "error: out of memory (MemoryError); in training set train.recompute, or lower "
     "train.batch_size (VSE and DID depend on it); where reports are written, lower "
     "train.eval_batch_size", "")])
def test_expected_faults_end_in_one_line(error, code, printed, capsys):
    def main():
        raise error
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        end_in_one_line(main)
    after = signal.signal(signal.SIGINT, before)
    assert ended.value.code == code and capsys.readouterr().err == printed
    assert after == (signal.SIG_IGN if code == 130 else before)  # a second Ctrl-C is too many


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
    first = read_image(data_root / "images/study00/0.png", 32)
    assert np.array_equal(batch["images"][3], first.numpy())
    assert batch["report_ids"].shape == (3, max(batch["report_lengths"]))
    fit = set()
    for report, ids, length in zip(batch["reports"], batch["report_ids"].tolist(),
                                   batch["report_lengths"]):
        whole = tokenizer(report, add_special_tokens=False).input_ids
        fit.add(len(whole) <= 12)
        expected = whole + [tokenizer.eos_token_id] if len(whole) <= 12 else whole[:12]
        assert ids[:length] == expected
    assert fit == {True, False}


def test_the_batches_that_are_left_begin_in_an_epoch():
    whole = list(islice(batches_from(0, 103, 16, seed=1), 20))
    assert whole[:6] == epoch_batches(103, 16, seed=1, epoch=0)
    assert whole[6:12] == epoch_batches(103, 16, seed=1, epoch=1)
    for step in (5, 6, 13):
        assert list(islice(batches_from(step, 103, 16, seed=1), 20 - step)) == whole[step:]


def test_epoch_batches_are_a_function_of_seed_and_epoch():
    first = epoch_batches(103, 16, seed=1, epoch=0)
    assert [len(b) for b in first] == [16] * 6  # A22: the last, incomplete batch is dropped
    assert len({i for b in first for i in b}) == 96
    assert first == epoch_batches(103, 16, seed=1, epoch=0)
    assert first != epoch_batches(103, 16, seed=1, epoch=1)
    assert first != epoch_batches(103, 16, seed=2, epoch=0)
    assert len(epoch_batches(32, 16, seed=20261127213000, epoch=1)) == 2  # a date and a time


def test_packed_is_a_list_that_cannot_be_changed():
    items, packed = [Study("a", "clear .", ("a.png",)), Study("c", "", ()), "b"], Packed()
    assert not packed
    for item in items:
        packed.append(item)
    assert list(packed) == items and len(packed) == 3
    assert packed[-1] == items[2] and packed[1:] == items[1:]
    with pytest.raises(IndexError):
        packed[3]


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
