"""The loop: exact resume, what a run writes, and what it refuses."""
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import train as training
from configs import parse_config
from conftest import TIMING, ReadBacks
from data import end_in_one_line
from model import read_checkpoint
from train import cosine_lr, prepare, train


def at(config, folder):
    return replace(config, train=replace(config.train, output=str(folder)))


class Stop(Exception):
    pass


def stop_at(step, monkeypatch):
    """Raise when the loop asks for the learning rate of that step (from 0)."""
    def stopping(s, *args):
        if s == step:
            raise Stop
        return cosine_lr(s, *args)
    monkeypatch.setattr(training, "cosine_lr", stopping)


def steps_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines if "step" in line]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("save_every, stop", [(2, 2), (2, 3), (1, 5)])
def test_resumed_run_equals_an_undisturbed_one_bit_for_bit(
        make_config, tmp_path, monkeypatch, precision, save_every, stop):
    """Stopped in the first or the second epoch, at a save or behind one; dropout and drop-path
    are on."""
    config = make_config(
        "train.epochs=2",
        f"train.save_every_steps={save_every}",
        f"train.precision={precision}",
        "train.lr=0.01",
    )
    train(at(config, tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(stop, patch)
        train(at(config, tmp_path / "stopped"))
    assert read_checkpoint(tmp_path / "stopped/last.pt")["step"] == stop - stop % save_every
    train(at(config, tmp_path / "stopped"), resume=True)
    for name in ("last.pt", "best.pt"):
        whole, stopped = (read_checkpoint(tmp_path / run / name) for run in ("whole", "stopped"))
        for key in ("model", "optimizer", "random") if name == "last.pt" else ("model",):
            ours, theirs = (torch.utils._pytree.tree_leaves(c[key]) for c in (whole, stopped))
            assert len(ours) == len(theirs)
            assert all(
                torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(ours, theirs)
            ), (name, key)
        assert (whole["step"], whole["best"]) == (stopped["step"], stopped["best"])
    # each step once, the validations too
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "stopped")
    for name in ("test_predictions.jsonl", "test_metrics.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (
            tmp_path / "stopped" / name
        ).read_bytes()


def test_run_writes_what_the_readme_says(make_config, tmp_path, capsys, monkeypatch):
    config = make_config("train.max_steps=3")
    metrics = train(config)
    folder = Path(config.train.output)
    assert {p.name for p in folder.iterdir()} >= {
        "config.yaml",
        "log.jsonl",
        "last.pt",
        "best.pt",
        "teacher.pt",
        "test_predictions.jsonl",
        "test_metrics.json",
    }
    assert parse_config(yaml.safe_load((folder / "config.yaml").read_text())) == config
    first, *lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert (
        first["arguments"] == config.to_dict()
        and first["parameters"]["frozen"] > 0
        and "torch" in first["versions"]
    )
    assert [line["step"] for line in lines] == [1, 2, 3, 3] and "val" in lines[-1]
    for line in lines[:3]:
        # Eq. 8
        assert line["total"] == pytest.approx(line["report"] + line["vse"] + line["did"], abs=1e-5)
        assert (
            min(
                line[key]
                for key in (
                    "studies_per_second",
                    "report_tokens_per_second",
                    "peak_memory_gb",
                    "gradient_norm",
                )
            )
            > 0
        )
    rows = [
        json.loads(line) for line in (folder / "test_predictions.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 5 and rows[0].keys() == {
        "id", "prediction", "reference", "reference_cut", "image_path", "visual_pca"
    }
    assert json.loads((folder / "test_metrics.json").read_text()) == json.loads(json.dumps(metrics))
    frozen = [
        name
        for name in read_checkpoint(folder / "last.pt")["model"]
        if name.startswith("llm.") and "lora_" not in name
    ]
    assert not frozen
    assert "5 studies" in capsys.readouterr().out


def test_weights_scale_the_terms(make_config, tmp_path):
    """Eq. 8 with other weights; the log holds the unweighted terms."""
    train(make_config("train.max_steps=1", "loss.vse_weight=0.5", "loss.did_weight=3"))
    line = steps_of(tmp_path / "run")[0]
    assert line["total"] == pytest.approx(
        line["report"] + 0.5 * line["vse"] + 3 * line["did"], abs=1e-5
    )


@pytest.mark.parametrize("settings", [(), ("train.recompute=true", "train.precision=bf16")])
def test_a_step_reads_back_once(make_config, monkeypatch, settings):
    """From the batch on the device to the line in the log; the optimizer's step is behind it.

    What `report_loss` checks is checked on a CPU only: test_losses.
    """
    steps, on_device, log_step = [], training.on_device, training.log_step

    def begin(*args):
        batch = on_device(*args)
        steps.append(ReadBacks().__enter__())
        return batch

    def end(*args):
        steps[-1].__exit__(None, None, None)
        log_step(*args)
    monkeypatch.setattr(training, "on_device", begin)
    monkeypatch.setattr(training, "log_step", end)
    train(make_config(*settings))
    checks = ("report_loss", "_check_ids")
    places = [[place for place in step.places if place not in checks] for step in steps]
    assert places == [["read_back"]] * 4


def test_cosine_lr_falls_from_lr_to_min_lr_per_step(make_config):
    settings = make_config().train
    values = [cosine_lr(step, 10, settings) for step in range(11)]
    assert values[0] == settings.lr and values[10] == pytest.approx(settings.min_lr)
    assert (
        values[5] == pytest.approx((settings.lr + settings.min_lr) / 2)
        and values == sorted(values, reverse=True)
    )


def test_best_is_the_best_validation(make_config, tmp_path, monkeypatch):
    """A later, worse validation does not replace best.pt; the test split is written by best.pt."""
    scores = iter([0.3, 0.5, 0.1])
    monkeypatch.setattr(training, "score", lambda *a, **k: {"BLEU_4": next(scores), "CIDEr": 0.0})
    train(make_config("train.epochs=3"))
    assert read_checkpoint(tmp_path / "run/best.pt")["step"] == 8  # of 12
    assert read_checkpoint(tmp_path / "run/last.pt")["best"] == 0.25


def test_run_without_val_and_test_splits(make_config, data_root, tmp_path):
    tree = json.loads((data_root / "annotation.json").read_text())
    (tmp_path / "images").symlink_to(data_root / "images")
    (tmp_path / "annotation.json").write_text(json.dumps({"train": tree["train"]}))
    assert train(make_config(f"data.root={tmp_path}", "train.epochs=2")) is None
    assert read_checkpoint(tmp_path / "run/best.pt")["step"] == 8
    (tmp_path / "annotation.json").write_text(
        json.dumps({"train": tree["train"], "val": tree["val"]})
    )
    assert (
        train(make_config(f"data.root={tmp_path}", f"train.output={tmp_path / 'other'}"))["n"] == 3
    )
    assert (tmp_path / "other/val_metrics.json").exists()


def test_nothing_is_overwritten_silently(make_config, capsys):
    train(make_config("train.max_steps=1"))
    with pytest.raises(ValueError, match="add --resume"):
        train(make_config("train.max_steps=1"))
    with pytest.raises(ValueError, match="train.seed was 42, is 43"):
        train(make_config("train.max_steps=1", "train.seed=43"), resume=True)
    # free to change
    train(make_config("train.max_steps=1", "train.save_every_steps=7"), resume=True)
    Path(make_config().train.output, "last.pt").unlink()  # to save space: best.pt is the result
    for resume in (False, True):
        with pytest.raises(ValueError, match="best.pt exists and no last.pt to go on from"):
            train(make_config("train.max_steps=1"), resume)


def test_last_without_best_is_refused(make_config, tmp_path):
    """A later validation that is worse would write no best.pt, and the run end without one."""
    train(make_config("train.max_steps=1"))
    (tmp_path / "run/best.pt").unlink()
    with pytest.raises(ValueError, match="says that best.pt was written, and .*run has none"):
        train(make_config("train.max_steps=2"), resume=True)


def test_a_resumed_run_meets_the_same_studies(make_config, data_root, tmp_path):
    """Wherever they lie now; a checkpoint of an older version does not say which they were."""
    train(make_config("train.max_steps=1"))
    moved = shutil.copytree(data_root, tmp_path / "moved")
    train(make_config("train.max_steps=2", f"data.root={moved}"), resume=True)
    tree = json.loads((moved / "annotation.json").read_text())
    tree["train"].reverse()
    (moved / "annotation.json").write_text(json.dumps(tree))
    other = make_config("train.max_steps=3", f"data.root={moved}")
    with pytest.raises(ValueError, match="trained on other studies than .*moved holds now"):
        train(other, resume=True)
    last = read_checkpoint(tmp_path / "run/last.pt")
    torch.save({key: value for key, value in last.items() if key != "studies"},
               tmp_path / "run/last.pt")
    train(other, resume=True)


def test_a_setting_that_an_older_version_lacked_has_its_default(make_config, tmp_path):
    train(make_config("train.max_steps=1"))
    last = read_checkpoint(tmp_path / "run/last.pt")
    del last["config"]["model"]["vse_expansion"]
    torch.save(last, tmp_path / "run/last.pt")
    train(make_config("train.max_steps=2"), resume=True)
    with pytest.raises(ValueError, match="vse_expansion was 2, is 1"):
        train(make_config("train.max_steps=3", "model.vse_expansion=1"), resume=True)


@pytest.mark.parametrize("line", ['{"step": 1, "rep\x00ort": 2', "5", "[]"])
def test_a_hurt_line_of_the_log_is_named(make_config, tmp_path, line):
    train(make_config("train.max_steps=1"))
    log = tmp_path / "run/log.jsonl"
    log.write_text(log.read_text() + line + "\n")
    with pytest.raises(ValueError, match="log.jsonl: not a line of a log: .*; remove it"):
        train(make_config("train.max_steps=2"), resume=True)


def test_a_run_goes_on_without_its_log(make_config, tmp_path):
    """last.pt and best.pt alone were copied to another machine."""
    train(make_config("train.max_steps=1"))
    (tmp_path / "run/log.jsonl").unlink()
    train(make_config("train.max_steps=2"), resume=True)
    first, step, *_ = map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines())
    assert "versions" in first and step["step"] == 2


def test_broken_findings_are_named_before_training(make_config, data_root, tmp_path):
    data_root = shutil.copytree(data_root, tmp_path / "data")
    ids = [study["id"] for split in json.loads((data_root / "annotation.json").read_text()).values()
           for study in split]
    held = {name: [dict(finding="nodule", side=None, extent=None)] for name in ids}
    good = dict(phrases={"nodule": ["nodules?"]}, sides={}, extents={}, studies=held)
    path = data_root / "findings.json"
    for broken in (dict(phrases={"nodule": ["(nodule"]}), dict(studies={ids[0]: [{}]}),
                   dict(studies=held | {ids[1]: [dict(finding="mass", side=None, extent=None)]}),
                   dict(sides=None)):
        path.write_text(json.dumps(good | broken))
        with pytest.raises(ValueError, match="findings.json: expected `phrases`, `sides`"):
            prepare(make_config(f"data.root={data_root}"), resume=False)
    path.write_text(json.dumps(good))
    prepare(make_config(f"data.root={data_root}"), resume=False).log.close()


@pytest.mark.parametrize("cpu, precision", [("AVX2", "bf16"), ("AVX2", "fp32"), ("AVX512", "bf16")])
def test_bfloat16_on_a_cpu_without_it_is_told(make_config, monkeypatch, capsys, cpu, precision):
    """Before the teacher reads the reports, which is slow there, too."""
    def reading(*_):
        raise Stop
    monkeypatch.setattr(training, "teacher_embeddings", reading)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    with pytest.raises(Stop):
        prepare(make_config(f"train.precision={precision}"), resume=False)
    told = "train.precision=fp32" in capsys.readouterr().out
    assert told == (cpu == "AVX2" and precision == "bf16")


def test_resume_without_a_checkpoint_says_so(make_config, capsys):
    train(make_config("train.max_steps=1"), resume=True)
    assert "starting at step 0" in capsys.readouterr().out


def test_resume_from_what_is_no_last_checkpoint_is_one_line(make_config, tmp_path):
    config = make_config("train.max_steps=1")
    train(config)
    shutil.copy(tmp_path / "run/best.pt", tmp_path / "run/last.pt")
    with pytest.raises(
        ValueError, match="last.pt: not a checkpoint of VDGen: it has no .*`optimizer`"
    ):
        train(config, resume=True)


def test_teacher_embeddings_are_computed_once(make_config, tmp_path, monkeypatch):
    """A5: kept beside the run, keyed by text and teacher."""
    calls, compute = [], training.embed_reports
    monkeypatch.setattr(training, "embed_reports", lambda *a: calls.append(1) or compute(*a))
    config = make_config("train.epochs=2", "train.max_steps=5")
    train(config)
    train(config, resume=True)
    assert len(calls) == 1
    kept = torch.load(tmp_path / "run/teacher.pt", weights_only=True)
    (tmp_path / "other").mkdir()
    torch.save(kept | {"key": kept["key"] | {"teacher": "another"}}, tmp_path / "other/teacher.pt")
    train(make_config("train.max_steps=1", f"train.output={tmp_path / 'other'}"))
    assert len(calls) == 2


def test_cut_teacher_embeddings_are_computed_again(make_config, tmp_path):
    train(make_config("train.max_steps=1"))
    kept = tmp_path / "run/teacher.pt"
    whole = read_checkpoint(kept, "the teacher", ("key", "embeddings"))["embeddings"]
    kept.write_bytes(kept.read_bytes()[:500])
    train(make_config("train.max_steps=2"), resume=True)
    again = read_checkpoint(kept, "the teacher", ("key", "embeddings"))["embeddings"]
    assert torch.equal(again, whole)


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs Linux's /proc")
def test_teacher_embeddings_stay_in_their_file(make_model, tmp_path):
    """Where they are computed as where they are read: the ranks of a machine share its pages."""
    maps, model = Path("/proc/self/maps"), make_model()
    for _ in range(2):
        teacher = training.teacher_embeddings(model, ["clear .", "no ."], tmp_path / "teacher.pt")
        assert f"{tmp_path}/teacher.pt" in maps.read_text() and teacher([0, 1]).shape == (2, 32)
        del teacher
        assert f"{tmp_path}/teacher.pt" not in maps.read_text()


def test_non_finite_loss_names_step_and_term(make_config, monkeypatch):
    monkeypatch.setattr("model.did_loss", lambda image, *args: image.sum() * math.nan)
    with pytest.raises(ValueError, match="step 1: the did loss is nan"):
        train(make_config())


def tree_equal(a, b):
    leaves = [torch.utils._pytree.tree_leaves(tree) for tree in (a, b)]
    return len(leaves[0]) == len(leaves[1]) and all(
        torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(*leaves))


def test_a_gradient_that_is_not_finite_changes_nothing(make_config, tmp_path, monkeypatch):
    """A finite loss whose gradient is not: no weight moves, no file is written, and the good
    last.pt stays."""
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(context, rows):
            return rows.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * math.inf
    config = make_config("train.save_every_steps=1")
    steps = []
    plain = training.cosine_lr
    monkeypatch.setattr(training, "cosine_lr", lambda *a: steps.append(a[0]) or plain(*a))
    def did(image, text, temperature, exact=__import__("losses").did_loss):
        return exact(Steep.apply(image) if len(steps) == 2 else image, text, temperature)
    monkeypatch.setattr("model.did_loss", did)
    with pytest.raises(
        ValueError,
        match=r"step 3: the gradient is (nan|inf).*--resume: .*last.pt holds a step before",
    ):
        train(config)
    stopped = read_checkpoint(tmp_path / "run/last.pt")
    assert (
        stopped["step"] == 2
        and all(value.isfinite().all() for value in stopped["model"].values())
    )
    monkeypatch.undo()
    train(at(config, tmp_path / "whole"))
    train(config, resume=True)
    whole, resumed = (read_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "run"))
    assert all(tree_equal(whole[key], resumed[key]) for key in ("model", "optimizer", "random"))


def test_the_log_says_which_term_moves_the_encoder(make_config, make_model, tmp_path, monkeypatch):
    """pull_*: the norm of each weighted term's gradient at X^e, of that term and no other;
    did_top1."""
    config = make_config(
        "train.max_steps=1",
        "loss.vse_weight=0.5",
        "loss.did_weight=3",
        "loss.report_weight=2",
        "model.lora.dropout=0",
    )
    expected = {}
    forward = training.VDGen.forward

    def watched(model, *args):
        terms, visual_tokens, did_top1 = forward(model, *args)
        for name, weight in (("report", 2), ("vse", 0.5), ("did", 3)):
            gradient, = torch.autograd.grad(terms[name], visual_tokens, retain_graph=True)
            expected[f"pull_{name}"] = weight * gradient.norm().item()
        expected["did_top1"] = did_top1.item()
        return terms, visual_tokens, did_top1
    monkeypatch.setattr(training.VDGen, "forward", watched)
    train(config)
    line = steps_of(tmp_path / "run")[0]
    assert {key: line[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    # else the test would say little
    assert len({round(value, 6) for value in expected.values()}) == 4


def test_a_term_that_does_not_do_its_work_is_named(make_config, tmp_path):
    config = make_config("train.batch_size=12")

    def advice_of(did, pull_vse, pull_did):
        with (tmp_path / "log.jsonl").open("w+") as file:
            lines = [{"arguments": {}}] + [{"step": i, "did": 9.0} for i in range(150)]
            lines += [
                dict(step=i, did=did, pull_vse=pull_vse, pull_did=pull_did) for i in range(50)
            ]
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            return training.advice(file, config)
    assert advice_of(2.2, 1.0, 0.2) == []
    assert "chance is 2.485" in advice_of(2.47, 1.0, 0.2)[0]
    assert "VSE pulls the encoder 11 times as hard as DID" in advice_of(2.2, 1.1, 0.1)[0]


def test_resume_with_what_helps_after_trouble(make_config, tmp_path, capsys):
    """The advice of a stop can be followed; what would be another experiment is refused."""
    train(make_config("train.max_steps=2"))
    changes = ["train.lr=0.01", "train.weight_decay=0.5", "train.max_steps=3"]
    train(make_config(*changes), resume=True)
    assert "train.lr was 0.0001, is 0.01 from step 3 on" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert {
        "step": 2,
        "changed": {"train.lr": 0.01, "train.max_steps": 3, "train.weight_decay": 0.5},
    } in lines
    last = read_checkpoint(tmp_path / "run/last.pt")
    assert last["step"] == 3 and last["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    with pytest.raises(ValueError, match="train.max_steps was 3, is 2"):
        train(make_config(*changes[:2], "train.max_steps=2"), resume=True)


def test_a_checkpoint_of_the_old_temperature_is_one_line(make_config, tmp_path):
    config = make_config("train.max_steps=1")
    train(config)
    last = read_checkpoint(tmp_path / "run/last.pt")
    last["config"]["loss"] = {"temperature": 0.07}
    torch.save(last, tmp_path / "run/last.pt")
    with pytest.raises(
        ValueError, match="last.pt: loss.temperature: .* expected loss.vse_temperature"
    ):
        train(config, resume=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_in_the_loader_is_one_line(make_config, data_root, tmp_path, monkeypatch, workers):
    """A worker's as the main process's."""
    root = tmp_path / "data"
    shutil.copytree(data_root, root)
    path = root / "images/study03/0.png"
    path.write_bytes(path.read_bytes()[:300])
    config = make_config(f"data.root={root}", f"data.num_workers={workers}")
    with pytest.raises(SystemExit) as ended:
        end_in_one_line(lambda: train(config))
    assert str(ended.value) == (
        f"error: image {path}: not a whole PNG or JPEG image (image file is truncated)"
    )


@pytest.mark.parametrize("error, line", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
     "error: out of memory (CUDA out of memory. Tried to allocate 2 GiB.); "
     "lower train.batch_size"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
     "error: DataLoader worker (pid 7) is killed"),
    (MemoryError(), "error: out of memory (MemoryError); lower train.batch_size"),
    (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device"),
    (KeyboardInterrupt(), "130")])
def test_expected_faults_end_in_one_line(error, line):
    def main():
        raise error
    with pytest.raises(SystemExit) as ended:
        end_in_one_line(main)
    assert str(ended.value).startswith(line) and "\n" not in str(ended.value)


def test_an_unexpected_fault_keeps_its_traceback():
    def main():
        raise RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        end_in_one_line(main)


def test_fewer_studies_than_a_batch(make_config):
    with pytest.raises(ValueError, match="12 training studies do not fill one batch of 13"):
        train(make_config("train.batch_size=13"))


@pytest.mark.parametrize("script, arguments, words", [
    ("train.py", ["--config", "configs/none.yaml"],
     "error: config configs/none.yaml: no such file"),
    ("train.py", ["--config", "configs/demo.yaml", "--set", "train.lrate=1"],
     "the nearest known key is train.lr"),
    ("train.py", ["--config", "configs/demo.yaml", "--set", "model.llm=2020-13-45"],
     "error: --set 'model.llm=2020-13-45': the value is not valid YAML"),
    ("train.py", ["--config", "configs/demo.yaml", "--set", f"train.seed={2**63}"],
     "train.seed: got 9223372036854775808, expected at least 0 and below 2**63"),
    ("train.py", ["--config", "configs/iu_xray.yaml", "--set", "data.root=/nowhere"],
     "error: data.root: there is no"),
    ("evaluate.py", ["--checkpoint", "none.pt"], "error: checkpoint none.pt: no such file"),
    ("evaluate.py", ["--checkpoint", "none.pt", "--chexbert", "none.pth"],
     "error: --chexbert none.pth: no such file"),
    ("evaluate.py", ["--predictions", "none.jsonl"],
     "error: --predictions none.jsonl: no such file"),
])
def test_bad_input_gets_one_line(script, arguments, words, tmp_path):
    extra = ["--set", f"train.output={tmp_path}"] if script == "train.py" else []
    done = subprocess.run(
        [sys.executable, script, *arguments, *extra], capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and words in done.stderr
        and len(done.stderr.splitlines()) == 1
    ), done.stderr
