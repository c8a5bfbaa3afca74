"""The schema of a config file: one frozen dataclass for each YAML section, and `load_config`.

The defaults are the paper's settings for IU-Xray (Sec. 4.1.2), or our decision where the paper is
silent; the A-numbers are explained in configs/README.md. Nothing is read from anywhere but here,
the YAML file and `--set section.key=value`, in that order.
"""
import copy
import difflib
import math
import os
import sys
import types
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

import yaml

if os.name == "nt":
    sys.exit("error: VDGen needs Linux or macOS; on Windows run it in WSL")

# Sec. 3.4: the visual tokens stand between the two halves; <img> and </img> are plain text (A9).
PROMPT = ("Human: <img>",
          "</img> Generate a comprehensive and detailed diagnosis report for this chest X-ray "
          "image.\nAssistant:")


class InputError(ValueError):
    """Bad input at a boundary: what was got, what was expected, what to do. Ends a command in a line.

    Any other ValueError is a fault of the code, and keeps its traceback.
    """


def allowed(rule: str, test, *, default):
    """A field whose value must pass `test`; `rule` says in words what is allowed.

    None skips the test: the field's type says whether it is allowed.
    """
    return field(default=default, metadata={"rule": rule, "test": test})


def at_least(low, *, default):
    return allowed(f"at least {low}", lambda value: value >= low, default=default)


def above_zero(*, default):
    return allowed("above 0", lambda value: value > 0, default=default)


def one_of(*choices, default):
    rule = " or ".join(map(repr, choices))
    return allowed(rule, lambda value: value in choices, default=default)


@dataclass(frozen=True)
class Lora:
    """Sec. 4.1.2: rank and alpha are 16. Targets and dropout: A12."""
    rank: int = at_least(1, default=16)
    alpha: int = at_least(1, default=16)
    dropout: float = allowed("from 0 to below 1", lambda value: 0 <= value < 1, default=0.1)
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Model:
    """Hub names or local folders of Hugging Face models."""
    vision: str                                  # any encoder that gives `last_hidden_state`
    llm: str                                     # any causal LM that takes inputs_embeds
    teacher: str | None = None                   # null: the LLM itself (A5)
    lora: Lora | None = Lora()                   # null: "w/o LoRA" of Table 2 (A18)
    vse_expansion: int = at_least(1, default=2)  # D_z / D (A4)
    prompt: tuple[str, ...] = PROMPT             # Sec. 3.4: what stands before and behind the image
    image_size: int | None = at_least(1, default=None)  # null: the encoder's own


@dataclass(frozen=True)
class Loss:
    vse_temperature: float = above_zero(default=1.0)   # tau of Eq. 3 (A3)
    did_temperature: float = above_zero(default=0.07)  # tau of Eq. 6 (A3)
    report_weight: float = above_zero(default=1.0)     # Eq. 8; how to get Eq. 2's sum: A10
    vse_weight: float = at_least(0, default=1.0)       # Eq. 8; 0 is "w/o VSE" of Table 2
    did_weight: float = at_least(0, default=1.0)       # Eq. 8; 0 is "w/o DID" of Table 2
    vse_self_in_denominator: bool = False              # A1


@dataclass(frozen=True)
class Data:
    root: str                                            # holds annotation.json and images/
    # It says how reports are cleaned (A15), and with which row of the paper scores are compared.
    dataset: str = one_of("iu_xray", "mimic_cxr", "demo", "own", default="iu_xray")
    limit: int | None = at_least(1, default=None)        # studies of each split; null: all
    max_report_tokens: int = at_least(1, default=100)    # A23, A20
    reference_cut_tokens: int = at_least(1, default=60)  # A16: where R2GenGPT cuts the references
    num_workers: int = at_least(0, default=8)            # processes that read images


@dataclass(frozen=True)
class Train:
    output: str | None = None                                 # null: runs/<config name>
    init_from: str | None = None           # best.pt or last.pt whose weights a new run starts from
    seed: int = allowed("at least 0 and below 2**63", lambda value: 0 <= value < 2**63, default=42)
    precision: str = one_of("bf16", "fp32", default="bf16")   # A13
    batch_size: int = at_least(1, default=16)
    eval_batch_size: int = at_least(1, default=16)
    epochs: int = at_least(1, default=15)                     # A13
    max_steps: int | None = at_least(1, default=None)
    lr: float = above_zero(default=1e-4)
    min_lr: float = at_least(0, default=1e-6)                 # A13
    weight_decay: float = at_least(0, default=0.01)           # A13
    clip_norm: float = above_zero(default=1.0)                # A13
    # Activations are computed twice instead of kept: less memory, more time, same results.
    recompute: bool = False
    save_every_steps: int | None = at_least(1, default=None)  # null: at the end of each epoch only


@dataclass(frozen=True)
class Generate:
    """A14."""
    num_beams: int = at_least(1, default=3)
    repetition_penalty: float = above_zero(default=2.0)
    length_penalty: float = 2.0
    min_new_tokens: int = at_least(1, default=40)
    max_new_tokens: int = at_least(1, default=100)


@dataclass(frozen=True)
class Config:
    model: Model
    data: Data
    loss: Loss = Loss()
    train: Train = Train()
    generate: Generate = Generate()

    def to_dict(self) -> dict:
        """Plain dicts, lists and scalars: what config.yaml and the checkpoints hold."""
        return _plain(asdict(self))


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML file and apply overrides such as `train.lr=1.0e-4` (values are YAML).

    Raises InputError for an unknown key, a wrong type or an impossible value, naming the key, and
    FileNotFoundError for a missing file. `train.output` is filled in: `runs/<name of the file>`.
    """
    path = Path(path)
    if not path.is_file():
        known = sorted(str(p) for p in Path(__file__).parent.glob("*.yaml"))
        raise FileNotFoundError(f"config {path}: no such file; there are {', '.join(known)}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        config = parse_config(tree, overrides, str(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"config {path}: not valid YAML: {reason}") from None
    if config.train.output is None:
        config = replace(config, train=replace(config.train, output=f"runs/{path.stem}"))
    return config


def parse_config(tree: dict, overrides: list[str] = (), source: str = "config") -> Config:
    """Check a tree of plain values, as YAML gives it, against the schema.

    Args:
        tree: {section: {key: value}}; it is not changed.
        overrides: `section.key=value` each, applied in order, the value in YAML.
        source: what errors name as the place of the tree.
    Raises:
        InputError: an unknown or a missing key, a wrong type, or an impossible value.
    """
    if not isinstance(tree, dict):
        raise InputError(f"{source}: got {_show(tree)}, expected the sections "
                         f"{', '.join(_names(Config))}")
    tree = copy.deepcopy(tree)
    for override in overrides:
        _override(tree, override)
    config = _build(Config, tree, "", source)
    train, generate = config.train, config.generate
    if generate.min_new_tokens > generate.max_new_tokens:
        raise InputError(f"{source}: generate.min_new_tokens: got {generate.min_new_tokens}, "
                         f"expected at most generate.max_new_tokens ({generate.max_new_tokens})")
    if train.min_lr > train.lr:
        raise InputError(f"{source}: train.min_lr: got {train.min_lr}, expected at most train.lr")
    if train.batch_size < 2 and (config.loss.vse_weight or config.loss.did_weight):
        raise InputError(f"{source}: train.batch_size: got 1, expected at least 2 (VSE and DID "
                         "compare the studies of a batch), or set loss.vse_weight and "
                         "loss.did_weight to 0")
    return config


def _override(tree: dict, override: str) -> None:
    """Set one `section.key=value` in the tree."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override!r}: expected section.key=value")
    *sections, leaf = key.split(".")
    branch = tree
    for section in sections:
        if not isinstance(branch.get(section), dict):
            branch[section] = {}
        branch = branch[section]
    try:
        branch[leaf] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # a ValueError: what looks like a date and is none
        raise InputError(f"--set {override!r}: the value is not valid YAML") from None


def _names(section) -> list[str]:
    return [f.name for f in fields(section)]


def _kinds(hint) -> tuple:
    """The types that a hint allows: (int, NoneType) of `int | None`, (int,) of `int`."""
    return get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _all_keys(section, prefix: str = ""):
    """Every key of a section, dotted: model, model.vision, ..."""
    for name, hint in get_type_hints(section).items():
        yield prefix + name
        kind = _kinds(hint)[0]
        if is_dataclass(kind):
            yield from _all_keys(kind, f"{prefix}{name}.")


def _plain(value):
    """The value with lists in place of tuples, as YAML has none."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _show(value) -> str:
    return f"{value!r} ({type(value).__name__})"


def _build(section, tree, prefix: str, source: str):
    """A dataclass of the schema from a dict: every key known, every value of its type and allowed.

    `prefix` is where the dict stands in the file: "" or, say, "model.lora.".
    """
    if not isinstance(tree, dict):
        raise InputError(f"{source}: {prefix[:-1]}: got {_show(tree)}, expected keys: "
                         f"{', '.join(_names(section))}")
    for key in tree:
        if key not in _names(section):
            raise _unknown_key(section, key, prefix, source)
    hints, values = get_type_hints(section), {}
    for f in fields(section):
        name = prefix + f.name
        if f.name in tree:
            values[f.name] = _check(tree[f.name], hints[f.name], f.metadata, name, source)
        elif f.default is MISSING:
            if not is_dataclass(hints[f.name]):
                raise InputError(f"{source}: {name}: missing; every config must set it")
            values[f.name] = _build(hints[f.name], {}, name + ".", source)
    return section(**values)


def _unknown_key(section, key, prefix: str, source: str) -> InputError:
    """The error for a key that the section does not have; it names the nearest of the schema."""
    known = list(_all_keys(Config))
    near = [name for name in known if name.split(".")[-1] == key]
    near = near or difflib.get_close_matches(f"{prefix}{key}", known, 1, cutoff=0)
    printable = key if str(key).isprintable() else repr(key)
    return InputError(f"{source}: {prefix}{printable}: unknown key; the nearest known key is "
                      f"{near[0]} (known here: {', '.join(_names(section))})")


def _check(value, hint, metadata, name: str, source: str):
    """A value as the schema wants it, or InputError; `hint` is its type, `metadata` its rule."""
    kinds = _kinds(hint)
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    if is_dataclass(kind):
        return _build(kind, value, name + ".", source)
    if kind is float and type(value) is int:
        value = float(value)
    if kind == tuple[str, ...] and isinstance(value, list) and value:
        if all(type(item) is str for item in value):
            return tuple(value)
    if type(value) is not kind:
        expected = "a list of names" if kind == tuple[str, ...] else kind.__name__
        or_null = " or null" if type(None) in kinds else ""
        written = kind is float and isinstance(value, str)
        advice = " (YAML reads 1e-4 as text: write 1.0e-4)" if written else ""
        raise InputError(f"{source}: {name}: got {_show(value)}, expected {expected}{or_null}"
                         f"{advice}")
    if kind is str and not value.strip():
        raise InputError(f"{source}: {name}: got an empty text")
    finite = kind is not float or math.isfinite(value)
    passes = metadata.get("test", lambda value: True)
    if not (finite and passes(value)):
        rule = metadata.get("rule", "a finite number")
        raise InputError(f"{source}: {name}: got {value!r}, expected {rule}")
    return value
