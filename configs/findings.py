"""Findings that a text names, by the phrases of a findings.json: no clinical labeller."""
import re
from collections.abc import Iterable
from functools import cache

# A clause ends with its sentence and before these words; not at the "with" of "consistent with".
# In it, what follows a word of DENIED is not there ("clear airspace" lost its "of"; "no change in"
# denies nothing), and nothing is there beside a word of GONE.
CLAUSE = re.compile(r"\.|\b(?:but|however|except|besides|aside|although|though|there|"
                    r"(?<!consistent )(?<!compatible )with)\b")
DENIED = re.compile(r"\b(?:(?:no|without)(?! (?:significant |interval )*change\b(?! to suggest))|"
                    r"not|neither|free|negative|absence of|clear of|clear airspace|removal|"
                    r"resolution|exclude|evaluation|obscure|subcutaneous emphysema|"
                    r"pericardial effusion)\b")
GONE = re.compile(r"\b(?:resolved|cleared|removed|excluded|(?:is|are) absent|"
                  r"(?<!cannot be )ruled out|(?:no longer|(?:is|are|was|were) not) (?:well-)?"
                  r"(?:seen|identified|present|visualized|evident))\b")


def named_findings(text: str, spec: dict) -> dict[str, tuple[str | None, str | None]]:
    """{finding: (side, extent)} that a cleaned text says are there, by phrases of findings.json.

    These are regular expressions of whole words. A finding that is probable or possible counts as
    named: in IU-Xray's reports the words that would tell it are often xxxx. Side and extent are
    those of the first clause that names the finding; None where it tells none.
    """
    named = {}
    for clause in CLAUSE.split(" ".join(text.split())):
        said = "" if GONE.search(clause) else DENIED.split(clause)[0]
        side, extent = (next(iter(_named(said, spec[key])), None) for key in ("sides", "extents"))
        for finding in _named(said, spec["phrases"]):
            named.setdefault(finding, (side, extent))
    return named


def named_in_each(texts: Iterable[str], spec: dict) -> list[dict]:
    """`named_findings` of each text; equal texts, as of a constant report, are read once."""
    texts = list(texts)
    read = {text: named_findings(text, spec) for text in set(texts)}
    return [read[text] for text in texts]


def _named(text: str, groups: dict[str, list[str]]) -> list[str]:
    """The groups that have a phrase in the text."""
    return [name for name, phrases in groups.items()
            if _whole_words(tuple(phrases)).search(text)]


@cache
def _whole_words(phrases: tuple[str, ...]) -> re.Pattern:
    return re.compile(rf"\b(?:{'|'.join(phrases)})\b")
