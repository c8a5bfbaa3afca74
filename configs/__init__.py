"""The schema of a config file: one frozen dataclass for each YAML section, and `load_config`.

The defaults are the paper's settings for IU-Xray (Sec. 4.1.2), or our decision where the paper is
silent; the A-numbers are explained in configs/README.md. The YAML file overrides a default, and
`--set section.key=value` overrides the file.
"""
import copy
import difflib
import json
import math
import os
import sys
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, get_args

import yaml

if os.name == "nt":
    sys.exit("error: VDGen needs Linux or macOS; on Windows run it in WSL")

# Sec. 3.4: the visual tokens stand between the two halves; <img> and </img> are plain text (A9).
PROMPT = ("Human: <img>",
          "</img> Generate a comprehensive and detailed diagnosis report for this chest X-ray "
          "image.\nAssistant:")


class InputError(ValueError):
    """Bad input: what was got, what was expected, what to do. It ends a command in one line."""


def _one_of(*choices: str):
    return Annotated[str, " or ".join(map(repr, choices)), lambda value: value in choices]


# A setting's type carries its rule: the Python type, the rule in words, a test of the value.
Flag = Annotated[bool, "true or false", lambda value: True]
AtLeast0 = Annotated[int, "int of at least 0", lambda value: value >= 0]
AtLeast1 = Annotated[int, "int of at least 1", lambda value: value >= 1]
Seed = Annotated[int, "int of at least 0 and below 2**63", lambda value: 0 <= value < 2**63]
Share = Annotated[float, "float from 0 to below 1", lambda value: 0 <= value < 1]
Finite = Annotated[float, "float that is finite", math.isfinite]
Above0 = Annotated[float, "float above 0", lambda value: 0 < value < math.inf]
NotNegative = Annotated[float, "float of at least 0", lambda value: 0 <= value < math.inf]
Text = Annotated[str, "text, in quotes if it looks like a number or a date", str.strip]
Names = Annotated[tuple, "a list of names", lambda value: {type(item) for item in value} == {str}]
TwoTexts = Annotated[tuple, "a list of two texts",
                     lambda value: [type(item) for item in value] == [str, str]]


@dataclass(frozen=True)
class Lora:
    """Sec. 4.1.2: rank and alpha are 16. Targets and dropout: A12."""
    rank: AtLeast1 = 16
    alpha: AtLeast1 = 16
    dropout: Share = 0.1
    target_modules: Names = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Model:
    """Hub names or local folders of Hugging Face models, and how they are joined."""
    vision: Text                        # any encoder that gives `last_hidden_state`
    llm: Text                           # any causal LM that takes inputs_embeds
    teacher: Text | None = None         # null: the LLM itself (A5)
    lora: Lora | None = Lora()          # null: "w/o LoRA" of Table 2 (A18)
    vse_expansion: AtLeast1 = 2         # D_z / D (A4)
    prompt: TwoTexts = PROMPT           # Sec. 3.4: what stands before and behind the image
    image_size: AtLeast1 | None = None  # null: the encoder's own, 224 for the Swin of Sec. 4.1.2


@dataclass(frozen=True)
class Loss:
    vse_temperature: Above0 = 1.0          # tau of Eq. 3 (A3)
    did_temperature: Above0 = 0.07         # tau of Eq. 6 (A3)
    report_weight: Above0 = 1.0            # Eq. 8; how to get Eq. 2's sum: A10
    vse_weight: NotNegative = 1.0          # Eq. 8; 0 is "w/o VSE" of Table 2
    did_weight: NotNegative = 1.0          # Eq. 8; 0 is "w/o DID" of Table 2
    vse_self_in_denominator: Flag = False  # A1


@dataclass(frozen=True)
class Data:
    root: Text                           # holds annotation.json and images/
    # It says how reports are cleaned (A15), and with which row of the paper scores are compared.
    dataset: _one_of("iu_xray", "mimic_cxr", "demo", "own") = "iu_xray"
    limit: AtLeast1 | None = None        # studies of each split; null: all
    max_report_tokens: AtLeast1 = 100    # A23, A20
    reference_cut_tokens: AtLeast1 = 60  # A16: where R2GenGPT cuts the references
    num_workers: AtLeast0 = 8            # processes that read images


@dataclass(frozen=True)
class Train:
    output: Text | None = None                # null: runs/<config name>
    init_from: Text | None = None             # best.pt or last.pt whose weights a new run takes
    seed: Seed = 42
    precision: _one_of("bf16", "fp32") = "bf16"  # A13
    batch_size: AtLeast1 = 16
    eval_batch_size: AtLeast1 = 64            # ours; 16 in Sec. 4.1.2
    epochs: AtLeast1 = 15                     # A13
    max_steps: AtLeast1 | None = None         # null: all epochs
    lr: Above0 = 1e-4
    min_lr: NotNegative = 1e-6                # A13
    weight_decay: NotNegative = 0.01          # A13
    clip_norm: Above0 = 1.0                   # A13
    # Activations are computed twice instead of kept: less memory, more time, same results.
    recompute: Flag = False
    save_every_steps: AtLeast1 | None = None  # null: at the end of each epoch only


@dataclass(frozen=True)
class Generate:
    """A14."""
    num_beams: AtLeast1 = 3
    repetition_penalty: Above0 = 2.0
    length_penalty: Finite = 2.0
    min_new_tokens: AtLeast1 = 40
    max_new_tokens: AtLeast1 = 100


@dataclass(frozen=True)
class Config:
    model: Model
    data: Data
    loss: Loss = Loss()
    train: Train = Train()
    generate: Generate = Generate()

    def to_dict(self) -> dict:
        """Plain dicts, lists and scalars: what config.yaml and the checkpoints hold."""
        return json.loads(json.dumps(asdict(self)))  # tuples become lists


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """`parse_config` of a YAML file, or FileNotFoundError; `train.output` is filled in."""
    path = Path(path)
    if not path.is_file():
        known = sorted(str(p) for p in Path(__file__).parent.glob("*.yaml"))
        raise FileNotFoundError(f"config {path}: no such file; there are {', '.join(known)}")
    config = parse_config(_read_yaml(path.read_bytes(), str(path)), overrides, str(path))
    if config.train.output is None:
        config = replace(config, train=replace(config.train, output=f"runs/{path.stem}"))
    return config


def parse_config(tree: dict, overrides: list[str] = (), source: str = "config") -> Config:
    """The config of {section: {key: value}} and of overrides such as `train.lr=1.0e-4`.

    Raises InputError, which names the `source`, for an unknown or missing key or a wrong value.
    """
    if not isinstance(tree, dict):
        raise InputError(f"{source}: got {tree!r}, expected the sections model, data, ...")
    tree = {"model": {}, "data": {}} | copy.deepcopy(tree)  # so that a missing key is named in full
    for override in overrides:
        _override(tree, override)
    try:
        config = _build(Config, tree, "")
        _require_sense(config)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return config


class _Loader(yaml.SafeLoader):
    """Plain YAML in which no key may stand twice."""
    def compose_mapping_node(self, anchor):
        node, seen = super().compose_mapping_node(anchor), []
        for key, _ in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"{key.value} stands twice, again in line {line}; keep one")
            seen.append(key.value)
        return node


def _read_yaml(text: str | bytes, source: str):
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a date such as 2024-02-31
        reason = " ".join(str(error).split())
        raise InputError(f"{source}: not valid YAML: {reason}") from None


def _override(tree: dict, override: str) -> None:
    """Set one `section.key=value`. A text is taken as it is typed; any other value is YAML."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override!r}: expected section.key=value")
    if value == "null" or (key, str) not in _keys(Config):
        value = _read_yaml(value, f"--set {override!r}")
    *sections, leaf = key.split(".")
    for section in sections:
        if not isinstance(tree.get(section), dict):
            tree[section] = {}
        tree = tree[section]
    tree[leaf] = value


def _rule(setting) -> tuple:
    """A setting's Python type, rule in words, test, and whether null is allowed."""
    or_null = type(None) in get_args(setting)
    if or_null:
        setting = get_args(setting)[0]
    kind, words, test = (setting, "", None) if is_dataclass(setting) else get_args(setting)
    return kind, words + " or null" * or_null, test, or_null


def _keys(section, prefix: str = ""):
    """Every key below a section, dotted, with its Python type: model, model.vision, ..."""
    for f in fields(section):
        kind = _rule(f.type)[0]
        yield prefix + f.name, kind
        if is_dataclass(kind):
            yield from _keys(kind, f"{prefix}{f.name}.")


def _wrong(key: str, value, expected: str) -> InputError:
    return InputError(f"{key}: got {value!r} ({type(value).__name__}), expected {expected}")


def _build(section, tree, prefix: str):
    """A dataclass of the schema from a dict that stands at `prefix`: "" or, say, "model.lora."."""
    names, values = [f.name for f in fields(section)], {}
    if not isinstance(tree, dict):
        raise _wrong(prefix[:-1], tree, f"keys: {', '.join(names)}")
    for key in tree:
        if key not in names:
            got, known = f"{prefix}{key}", [name for name, _ in _keys(Config)]
            near = [name for name in known if name.split(".")[-1] == key]
            near = near or difflib.get_close_matches(got, known, 1, cutoff=0)
            raise InputError(f"{got!r}: unknown key; the nearest known key is {near[0]}")
    for f in fields(section):
        if f.name in tree:
            values[f.name] = _check(prefix + f.name, tree[f.name], f.type)
        elif f.default is MISSING:
            raise InputError(f"{prefix}{f.name}: missing; every config must set it")
    return section(**values)


def _check(key: str, value, setting):
    """A value as its type in the schema wants it, or InputError. A ~ in front becomes the home."""
    kind, words, test, or_null = _rule(setting)
    if or_null and value is None:
        return None
    if or_null and str(value).strip().lower() in ("none", "null", "~"):
        raise _wrong(key, value, "a value or null; where null is meant, write null")
    if is_dataclass(kind):
        return _build(kind, value, key + ".")
    if kind is float and isinstance(value, str):
        words += "; YAML reads 1e-4 as text, write 1.0e-4"
    if kind is float and type(value) is int:
        value = float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not kind or not test(value):
        raise _wrong(key, value, words)
    return os.path.expanduser(value) if kind is str else value


def _require_sense(config: Config) -> None:
    """InputError where two settings contradict each other."""
    train, generate, loss = config.train, config.generate, config.loss
    if generate.min_new_tokens > generate.max_new_tokens:
        raise _wrong("generate.min_new_tokens", generate.min_new_tokens,
                     f"at most generate.max_new_tokens ({generate.max_new_tokens})")
    if train.min_lr > train.lr:
        raise _wrong("train.min_lr", train.min_lr, f"at most train.lr ({train.lr})")
    if train.batch_size < 2 and (loss.vse_weight or loss.did_weight):
        raise _wrong("train.batch_size", train.batch_size,
                     "at least 2 (VSE and DID compare the studies of a batch), or "
                     "loss.vse_weight and loss.did_weight of 0")
