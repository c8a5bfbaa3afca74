"""Findings that a text names, by the phrases of a findings.json: no clinical labeller."""
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np

from configs import Data, InputError
from configs.files import read_json

# A clause ends with its sentence and before these words; not at the "with" of "consistent with".
# In it, what follows a word of DENIED is not there ("no change in" denies nothing), and nothing is
# there beside a word of GONE. A dataset's findings.json may name more such words, as `denied`.
CLAUSE = re.compile(r"[.;!?](?!\d)|\b(?:but|however|except|besides|aside|although|though|there|"
                    r"(?<!consistent )(?<!compatible )with)\b")
DENIED = (r"(?:no|without)(?! (?:significant |interval )*change\b(?! to suggest))", "not",
          "neither", "free", "negative", "absence of", "clear of", "removal", "resolution",
          "exclude")
GONE = re.compile(r"\b(?:resolved|cleared|removed|excluded|(?:is|are) absent|"
                  r"(?<!cannot be )ruled out|(?:no longer|(?:is|are|was|were) not) (?:well-)?"
                  r"(?:seen|identified|present|visualized|evident))\b")


def read_findings(data: Data, names: Iterable[str]) -> dict | None:
    """findings.json of the data, if there is one: what studies hold, and phrases that name it.

    InputError where it is another file, or lacks one of the studies `names`.
    """
    path = Path(data.root) / "findings.json"
    if not path.is_file():
        return None
    expected = ("one object of `phrases`, `sides` and `extents`, regular expressions, and in "
                "`studies` for each study a list of {finding, side, extent}")
    spec = read_json(path, expected)
    try:
        groups = [group for key in ("phrases", "sides", "extents") for group in spec[key].items()]
        groups += [("denied", spec["denied"])] if "denied" in spec else []
        for name, phrases in groups:
            if not isinstance(phrases, list) or not phrases or not all(phrases):
                raise InputError(f"{name!r} has no list of phrases")
        named_findings("", spec)  # compiles them
        for held in (held for name in names for held in spec["studies"][name]):
            spec["phrases"][held["finding"]], held["side"], held["extent"]
    except (ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise InputError(f"{path}: expected {expected}; got {type(error).__name__}: "
                         f"{error}") from None
    return spec


def named_findings(text: str, spec: dict) -> dict[str, tuple[str | None, str | None]]:
    """{finding: (side, extent)} that a text says are there, by phrases of findings.json.

    These are regular expressions of whole words; capitals do not count. A finding that is probable
    or possible counts as named: in IU-Xray's reports the words that would tell it are often xxxx.
    Side and extent are those of the first clause that names the finding; None where it tells none.
    """
    named, denied = {}, _whole_words((*DENIED, *spec.get("denied", ())))
    for clause in CLAUSE.split(" ".join(text.lower().split())):
        said = "" if GONE.search(clause) else denied.split(clause)[0]
        side, extent = (next(iter(_named(said, spec[key])), None) for key in ("sides", "extents"))
        for finding in _named(said, spec["phrases"]):
            named.setdefault(finding, (side, extent))
    return named


def named_in_each(texts: Iterable[str], spec: dict) -> list[dict]:
    """`named_findings` of each text; equal texts, as of a constant report, are read once."""
    texts = list(texts)
    read = {text: named_findings(text, spec) for text in set(texts)}
    return [read[text] for text in texts]


def findings_matrices(predictions: dict[str, str], spec: dict) -> tuple[np.ndarray, np.ndarray]:
    """(N, L) bool, N studies, L findings: those that predictions name; those of findings.json."""
    named = named_in_each(predictions.values(), spec)
    true = [{held["finding"] for held in spec["studies"][name]} for name in predictions]
    return tuple(np.array([[finding in row for finding in spec["phrases"]] for row in rows])
                 for rows in (named, true))


def findings_details(predictions: dict[str, str], spec: dict, each: dict[str, dict]) -> dict:
    """The long tail (Sec. 1), and the details: of the findings named rightly, the share right.

    macro_f1_frequent and _rare: over the half of the findings with most studies, and the other.
    `side` and `extent`: None where no such finding has one. `each`: the scores of each finding.
    """
    f1 = [row["f1"] for row in sorted(each.values(), key=lambda row: -row["studies"])]
    half = (len(f1) + 1) // 2
    details = {"macro_f1_frequent": float(np.mean(f1[:half])),
               "macro_f1_rare": float(np.mean(f1[half:] or [0]))}
    right = {"side": [], "extent": []}
    for name, named in zip(predictions, named_in_each(predictions.values(), spec)):
        for held in spec["studies"][name]:
            found = dict(zip(right, named.get(held["finding"], ())))
            for key in found.keys() & {key for key in right if held[key] is not None}:
                right[key].append(found[key] == held[key])
    return details | {key: float(np.mean(values)) if values else None
                      for key, values in right.items()}


def _named(text: str, groups: dict[str, list[str]]) -> list[str]:
    """The groups that have a phrase in the text."""
    return [name for name, phrases in groups.items()
            if _whole_words(tuple(phrases)).search(text)]


@cache
def _whole_words(phrases: tuple[str, ...]) -> re.Pattern:
    return re.compile(rf"\b(?:{'|'.join(phrases)})\b", re.I)
