"""The loop: exact resume, what a run writes, and what it refuses."""
import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml

import train as training
from configs import InputError, Loss, parse_config
from conftest import TIMING, ReadBacks
from data import end_in_one_line
from losses import did_loss
from model import VDGen
from configs.files import read_checkpoint
from train import train


def at(config, folder):
    return replace(config, train=replace(config.train, output=str(folder)))


class Stop(Exception):
    pass


def stop_at(step, monkeypatch):
    """Raise in the place of the optimizer's step of that number (from 0)."""
    real, steps = torch.optim.AdamW.step, []

    def stopping(*args):
        steps.append(1)
        if len(steps) > step:
            raise Stop
        return real(*args)
    monkeypatch.setattr(torch.optim.AdamW, "step", stopping)


def stop_in(name, monkeypatch):
    """Raise where train.py calls its function of that name."""
    def stopping(*args, **more):
        raise Stop
    monkeypatch.setattr(training, name, stopping)


def steps_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines if "step" in line]


def tree_equal(a, b):
    leaves = [torch.utils._pytree.tree_leaves(tree) for tree in (a, b)]
    return len(leaves[0]) == len(leaves[1]) and all(
        torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(*leaves))


def assert_same_checkpoint(one, other):
    one, other = ({k: v for k, v in read_checkpoint(path, keys=()).items() if k != "config"}
                  for path in (one, other))
    assert one.keys() == other.keys()
    assert not [key for key in one if not tree_equal(one[key], other[key])]


# Resuming -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("precision, save_every, stop", [
    ("fp32", 2, 3), ("bf16", 2, 2), ("bf16", 1, 5), ("fp32", 3, 7)])
def test_resumed_run_equals_an_undisturbed_one_bit_for_bit(
        make_config, tmp_path, monkeypatch, precision, save_every, stop):
    """Stopped in the first or the second epoch of four steps, at a save or behind one; dropout and
    drop-path are on."""
    config = make_config("train.epochs=2", f"train.save_every_steps={save_every}",
                         f"train.precision={precision}", "train.lr=0.01")
    train(at(config, tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(stop, patch)
        train(at(config, tmp_path / "stopped"))
    saved = max(step for step in (stop - stop % save_every, stop - stop % 4))
    assert read_checkpoint(tmp_path / "stopped/last.pt")["step"] == saved
    train(at(config, tmp_path / "stopped"), resume=True)
    for name in ("last.pt", "best.pt"):
        assert_same_checkpoint(tmp_path / "whole" / name, tmp_path / "stopped" / name)
    # each step once, the validations too
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "stopped")
    for name in ("test_predictions.jsonl", "test_metrics.json"):
        whole, stopped = (tmp_path / run / name for run in ("whole", "stopped"))
        assert whole.read_bytes() == stopped.read_bytes()


def test_nothing_is_overwritten_silently(make_config, tmp_path, capsys):
    one = make_config("train.max_steps=1")
    train(one, resume=True)
    assert "starting at step 0" in capsys.readouterr().out
    with pytest.raises(ValueError, match="add --resume"):
        train(one)
    with pytest.raises(ValueError, match="train.seed was 42, is 43"):
        train(make_config("train.max_steps=1", "train.seed=43"), resume=True)
    metrics = (tmp_path / "run/test_metrics.json").read_bytes()
    train(make_config("train.max_steps=1", "train.save_every_steps=7"), resume=True)  # free
    assert f"the results stand in {tmp_path}/run/test_metrics.json" in capsys.readouterr().out
    assert (tmp_path / "run/test_metrics.json").read_bytes() == metrics
    (tmp_path / "run/last.pt").unlink()  # to save space: best.pt is the result
    with pytest.raises(ValueError, match="holds a run"):
        train(one)
    shutil.copy(tmp_path / "run/best.pt", tmp_path / "run/last.pt")
    with pytest.raises(ValueError, match="last.pt: not a checkpoint of VDGen; .*optimizer"):
        train(one, resume=True)


def test_resume_with_what_helps_after_trouble(make_config, tmp_path, capsys):
    """The advice of a stop can be followed; what would be another experiment is refused."""
    train(make_config("train.max_steps=2"))
    changes = ["train.lr=0.01", "train.weight_decay=0.5", "train.max_steps=3"]
    train(make_config(*changes), resume=True)
    assert "train.lr was 0.0001, is 0.01 from step 3 on" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    changed = {"train.lr": 0.01, "train.max_steps": 3, "train.weight_decay": 0.5}
    assert {"step": 2, "changed": changed} in lines
    last = read_checkpoint(tmp_path / "run/last.pt")
    assert last["step"] == 3 and last["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    with pytest.raises(InputError, match="train.batch_size was 3, is 4"):
        train(make_config(*changes, "train.batch_size=4"), resume=True)
    with pytest.raises(InputError, match="model.lora.rank was 16, is None"):
        train(make_config(*changes, "model.lora=null"), resume=True)


def test_what_fails_in_validation_costs_the_validation_alone(make_config, tmp_path, monkeypatch):
    """last.pt stands before it; a run resumed there validates first, and ends as another."""
    config = make_config("train.epochs=2", "train.lr=0.01")
    train(at(config, tmp_path / "whole"))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_in("write_reports", patch)
        train(at(config, tmp_path / "stopped"))
    assert read_checkpoint(tmp_path / "stopped/last.pt")["step"] == 4
    assert not (tmp_path / "stopped/best.pt").exists()
    train(at(config, tmp_path / "stopped"), resume=True)
    assert_same_checkpoint(tmp_path / "whole/best.pt", tmp_path / "stopped/best.pt")
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "stopped")


def test_a_stop_in_the_last_evaluation_is_resumed_there(make_config, tmp_path, monkeypatch):
    """And where models have moved they are found under their new name."""
    config = make_config()
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_in("evaluate", patch)
        train(config)
    moved = shutil.copytree(config.model.llm, tmp_path / "moved")
    assert train(make_config(f"model.llm={moved}"), resume=True)["n"] == 5
    assert len([line for line in steps_of(tmp_path / "run") if "val" in line]) == 1


def test_a_resumed_run_meets_the_same_studies(make_config, data_root, tmp_path):
    """Wherever they lie now."""
    train(make_config("train.max_steps=1"))
    moved = shutil.copytree(data_root, tmp_path / "moved")
    train(make_config("train.max_steps=2", f"data.root={moved}"), resume=True)
    tree = json.loads((moved / "annotation.json").read_text())
    tree["train"].reverse()
    (moved / "annotation.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="trained on other studies than .*moved holds now"):
        train(make_config("train.max_steps=3", f"data.root={moved}"), resume=True)


def test_a_run_goes_on_without_its_log_and_names_a_hurt_one(make_config, tmp_path):
    train(make_config("train.max_steps=1"))
    log = tmp_path / "run/log.jsonl"
    whole = log.read_text()
    for line in ('{"step": 1, "rep\x00ort": 2', "5"):
        log.write_text(line + "\n" + whole)
        with pytest.raises(ValueError, match="log.jsonl: not a line of a log: .*; remove it"):
            train(make_config("train.max_steps=2"), resume=True)
    log.unlink()
    train(make_config("train.max_steps=2"), resume=True)
    first, changed, step, *_ = map(json.loads, log.read_text().splitlines())
    assert "versions" in first and "changed" in changed and step["step"] == 2


def test_a_new_run_starts_from_the_weights_of_another(make_config, tmp_path):
    """`train.init_from`: the first step's losses are those of the trained model."""
    train(make_config("train.lr=0.01", "train.epochs=2", f"train.output={tmp_path / 'first'}"))
    last = tmp_path / "first/last.pt"
    settings = ["train.max_steps=1", "train.min_lr=0", "train.lr=1.0e-12"]
    train(make_config(*settings, f"train.init_from={last}", f"train.output={tmp_path / 'second'}"))
    ours, theirs = (read_checkpoint(path)["model"] for path in (tmp_path / "second/last.pt", last))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    (tmp_path / "first/last.pt").unlink()  # it is read where there is no last.pt of its own
    train(make_config(*settings, f"train.init_from={last}", f"train.output={tmp_path / 'second'}"),
          resume=True)
    with pytest.raises(FileNotFoundError, match="none.pt: no such file"):
        train(make_config(f"train.init_from={tmp_path / 'none.pt'}"))


def test_a_new_run_takes_the_weights_that_fit(make_config, tmp_path, capsys):
    """What is missing, unexpected or of another shape is printed; --resume is strict."""
    train(make_config("loss.vse_weight=0", "train.max_steps=1"))
    best = tmp_path / "run/best.pt"
    settings = ["model.lora.rank=4", "train.max_steps=1", "train.lr=1.0e-12", "train.min_lr=0"]
    train(make_config(*settings, f"train.init_from={best}", f"train.output={tmp_path / 'next'}"))
    told = capsys.readouterr().out
    assert "2 tensors are missing: vse_head.bias, vse_head.weight" in told
    assert "8 tensors are of another shape: " in told and "unexpected" not in told
    ours, theirs = (read_checkpoint(path)["model"] for path in (tmp_path / "next/last.pt", best))
    assert torch.allclose(ours["norm.weight"], theirs["norm.weight"], atol=1e-6)
    torch.save({"model": {"other": torch.zeros(1)}, "config": {}}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="no tensor of that checkpoint fits"):
        train(make_config(f"train.init_from={tmp_path / 'other.pt'}", f"train.output={tmp_path}"))


# What a run writes --------------------------------------------------------------------------------

def test_run_writes_what_the_readme_says(make_config, tmp_path, capsys):
    config, folder = make_config("train.max_steps=3"), tmp_path / "run"
    metrics = train(config)
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml", "log.jsonl", "last.pt", "best.pt", "teacher.pt", "test_predictions.jsonl",
        "test_metrics.json", "test_report.html"}
    assert parse_config(yaml.safe_load((folder / "config.yaml").read_text())) == config
    first, *lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert first["arguments"] == config.to_dict() and first["parameters"]["frozen"] > 0
    assert first["visual_tokens"] == 16 and "torch" in first["versions"]
    assert [line["step"] for line in lines] == [1, 2, 3, 3] and "val" in lines[-1]
    for line in lines[:3]:  # Eq. 8
        assert line["total"] == pytest.approx(line["report"] + line["vse"] + line["did"], abs=1e-5)
        assert line["seconds"] > 0 and line["gradient_norm"] > 0 and 0 <= line["did_top1"] <= 1
    rows = [json.loads(line)
            for line in (folder / "test_predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and rows[0].keys() >= {
        "id", "prediction", "reference", "reference_cut", "image_path"}
    assert json.loads((folder / "test_metrics.json").read_text()) == json.loads(json.dumps(metrics))
    kept = read_checkpoint(folder / "last.pt")["model"]
    assert not [name for name in kept if name.startswith("llm.") and "lora_" not in name]
    out = capsys.readouterr().out
    assert "5 studies" in out and "12 training studies of 16 visual tokens" in out
    did = sum(line["did"] for line in lines[:3]) / 3
    assert f"DID {did:.3f} (chance 1.099), did_top1" in out


def test_weights_scale_the_terms(make_config, tmp_path):
    """Eq. 8 with other weights; the log holds the unweighted terms."""
    train(make_config("train.max_steps=1", "loss.vse_weight=0.5", "loss.did_weight=3"))
    line = steps_of(tmp_path / "run")[0]
    weighted = line["report"] + 0.5 * line["vse"] + 3 * line["did"]
    assert line["total"] == pytest.approx(weighted, abs=1e-5)


@pytest.mark.parametrize("settings", [(), ("train.recompute=true", "train.precision=bf16")])
def test_a_step_reads_back_once(make_config, monkeypatch, settings):
    """From the batch on the device to the line in the log; the optimizer's step is behind it.

    The library's forward reads back once besides, to look for packed sequences. What `report_loss`
    checks is checked on a CPU only: test_losses.
    """
    steps, loader, step = [], training.loader, torch.optim.AdamW.step

    def begin(*args):
        for batch in loader(*args):
            steps.append(ReadBacks().__enter__())
            yield batch

    def end(*args):
        steps[-1].__exit__(None, None, None)
        return step(*args)
    monkeypatch.setattr(training, "loader", begin)
    monkeypatch.setattr(torch.optim.AdamW, "step", end)
    train(make_config(*settings))
    checks = ("report_loss", "_check_ids")
    places = [[place for place in step.places if place not in checks] for step in steps]
    assert places == [["report_term", "train"]] * 4


def test_the_learning_rate_falls_by_half_a_cosine(make_config, tmp_path):
    """A13: from lr, per step; one more step would have min_lr."""
    config = make_config("train.epochs=2", "train.lr=0.001", "train.min_lr=0.0001")
    train(config)
    values = [line["lr"] for line in steps_of(tmp_path / "run") if "lr" in line]
    assert values[0] == 0.001 and values[4] == pytest.approx(0.00055)
    assert values == sorted(values, reverse=True) and 0.0001 < values[7] < 0.00015


def test_the_random_numbers_of_a_step_are_its_own(make_config, tmp_path, monkeypatch):
    """They come from (seed, step, rank), whatever was drawn before."""
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda number: seeds.append(number) or seed(number))
    train(make_config("train.max_steps=2"))
    train(make_config("train.max_steps=2", "train.seed=43", f"train.output={tmp_path / 'other'}"))
    assert len(seeds) == len({number % 2**32 for number in seeds}) == 6  # a start and two steps


EQ_8 = '+ weights.did_weight * terms.get("did", 0))'


def test_a_fourth_loss_is_four_edits(make_config, tmp_path, monkeypatch):
    """A function, its term, its weight, Eq. 8's sum: then it is trained, logged and drawn."""
    def variance_loss(h):
        return torch.relu(1 - h.std(dim=0)).mean()

    losses = VDGen.losses

    def with_variance(model, visual_tokens, *args):
        terms, measures = losses(model, visual_tokens, *args)
        return terms | {"variance": variance_loss(model.pool(visual_tokens))}, measures

    @dataclass(frozen=True)
    class WithVariance(Loss):
        variance_weight: float = 2.0
    monkeypatch.setattr(VDGen, "losses", with_variance)
    source = Path(training.__file__).read_text()
    assert source.count(EQ_8) == 1
    edited = source.replace(EQ_8, EQ_8[:-1] + ' + weights.variance_weight * terms["variance"])')
    module = {"__name__": "edited", "__file__": training.__file__}
    exec(compile(edited, training.__file__, "exec"), module)
    module["train"](replace(make_config(), loss=WithVariance()))
    for line in steps_of(tmp_path / "run")[:4]:
        expected = line["report"] + line["vse"] + line["did"] + 2 * line["variance"]
        assert line["variance"] > 0 and line["total"] == pytest.approx(expected, abs=1e-5)
    page = (tmp_path / "run/test_report.html").read_text()
    assert '"variance": [[1, ' in page


def test_best_is_the_best_validation(make_config, tmp_path, monkeypatch):
    """A later, worse validation does not replace best.pt; the test split is written by best.pt."""
    scores = iter([0.3, 0.5, 0.1])
    monkeypatch.setattr(training, "score", lambda *a, **k: {"BLEU_4": next(scores), "CIDEr": 0.0})
    train(make_config("train.epochs=3"))
    assert read_checkpoint(tmp_path / "run/best.pt")["step"] == 8  # of 12
    assert read_checkpoint(tmp_path / "run/best.pt")["best"] == 0.25


def test_any_split_but_train_may_be_missing(make_config, data_root, tmp_path):
    (tmp_path / "images").symlink_to(data_root / "images")
    tree = json.loads((data_root / "annotation.json").read_text())

    def with_splits(*names):
        annotation = {name: tree[name] for name in names}
        (tmp_path / "annotation.json").write_text(json.dumps(annotation))
        return make_config(f"data.root={tmp_path}", f"train.output={tmp_path / '_'.join(names)}")
    assert train(with_splits("train")) is None
    assert read_checkpoint(tmp_path / "train/best.pt")["step"] == 4
    assert train(with_splits("train", "val"))["n"] == 3
    assert (tmp_path / "train_val/val_metrics.json").exists()
    with pytest.raises(ValueError, match="the 0 training studies of .* do not fill"):
        train(with_splits("test"))


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


# Bad numbers, bad input ---------------------------------------------------------------------------

def test_non_finite_loss_names_step_and_term(make_config, monkeypatch):
    monkeypatch.setattr("model.did_loss", lambda image, *args: image.sum() * math.nan)
    with pytest.raises(ValueError, match="step 1: did is nan"):
        train(make_config())


def test_a_gradient_that_is_not_finite_changes_nothing(make_config, tmp_path, monkeypatch):
    """A finite loss whose gradient is not, at step 5: last.pt is that of step 4, and good."""
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(context, rows):
            return rows.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * math.inf
    config, steps = make_config("train.epochs=2", "train.save_every_steps=1"), []

    def did(image, text, temperature):
        steps.append(image)
        return did_loss(Steep.apply(image) if len(steps) == 5 else image, text, temperature)
    words = "step 5: gradient_norm is (nan|inf).*--resume.*last.pt"
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=words):
        patch.setattr("model.did_loss", did)
        train(config)
    stopped = read_checkpoint(tmp_path / "run/last.pt")
    assert stopped["step"] == 4
    assert all(value.isfinite().all() for value in stopped["model"].values())
    train(at(config, tmp_path / "whole"))
    train(config, resume=True)
    assert_same_checkpoint(tmp_path / "whole/last.pt", tmp_path / "run/last.pt")


def test_broken_findings_are_named_before_training(make_config, data_root, tmp_path, monkeypatch):
    data_root = shutil.copytree(data_root, tmp_path / "data")
    tree = json.loads((data_root / "annotation.json").read_text())
    ids = [study["id"] for study in tree["val"] + tree["test"]]
    held = {name: [dict(finding="nodule", side=None, extent=None)] for name in ids}
    good = dict(phrases={"nodule": ["nodules?"]}, sides={}, extents={}, studies=held)
    path = data_root / "findings.json"
    for broken in (dict(phrases={"nodule": ["(nodule"]}), dict(studies={ids[0]: [{}]}),
                   dict(studies=held | {ids[1]: [dict(finding="mass", side=None, extent=None)]}),
                   dict(sides=None)):
        path.write_text(json.dumps(good | broken))
        with pytest.raises(ValueError, match="findings.json: expected .*`phrases`, `sides`"):
            train(make_config(f"data.root={data_root}"))
    path.write_text(json.dumps(good))
    stop_in("load_model", monkeypatch)
    with pytest.raises(Stop):
        train(make_config(f"data.root={data_root}"))


@pytest.mark.parametrize("cpu, precision", [("AVX2", "bf16"), ("AVX2", "fp32"), ("AVX512", "bf16")])
def test_bfloat16_on_a_cpu_without_it_is_told(make_config, monkeypatch, capsys, cpu, precision):
    """Before the teacher reads the reports, which is slow there, too."""
    stop_in("make_teacher", monkeypatch)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    with pytest.raises(Stop):
        train(make_config(f"train.precision={precision}"))
    told = "train.precision=fp32" in capsys.readouterr().out
    assert told == (cpu == "AVX2" and precision == "bf16")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fault_in_the_loader_is_one_line(make_config, data_root, tmp_path, workers):
    """A worker's as the main process's."""
    root = shutil.copytree(data_root, tmp_path / "data")
    path = root / "images/study03/0.png"
    path.write_bytes(path.read_bytes()[:300])
    config = make_config(f"data.root={root}", f"data.num_workers={workers}")
    with pytest.raises(SystemExit) as ended:
        end_in_one_line(lambda: train(config))
    assert str(ended.value).startswith(f"error: image {path}: not a whole PNG or JPEG image")
    assert "\n" not in str(ended.value)


def test_fewer_studies_than_a_batch(make_config):
    with pytest.raises(InputError, match="the 12 training studies of .* one batch of 13"):
        train(make_config("train.batch_size=13"))


def test_a_folder_of_a_model_that_is_not_here_is_named_before_the_demo_is_drawn(
        make_config, tmp_path, monkeypatch):
    """As in a run that is started in another working folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="model.vision: there is no folder configs/demo"):
        train(make_config("model.vision=configs/demo_models/swin", "data.root=data/demo",
                          "data.dataset=demo"))
    assert not (tmp_path / "data").exists()


def test_a_readers_own_mistake_keeps_its_traceback(make_config, monkeypatch):
    """A shape that a loss refuses is a ValueError, and no bad input."""
    monkeypatch.setattr(VDGen, "pool", staticmethod(lambda tokens: tokens))
    with pytest.raises(ValueError, match=r"z: got .* of shape \(3, 16, 64\)") as raised:
        end_in_one_line(lambda: train(make_config()))
    assert not isinstance(raised.value, InputError)


def test_bad_input_on_the_command_line_gets_one_line(tmp_path):
    done = subprocess.run([sys.executable, "train.py", "--config", "configs/demo.yaml", "--set",
                           "train.lrate=1"], cwd=Path(training.__file__).parent,
                          capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "the nearest known key is train.lr" in done.stderr
