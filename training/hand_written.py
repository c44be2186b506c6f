"""What people write into a card stays when the card is written again, be it beside the run or on the Hub:

<!-- by hand: limits (a note on what this is) -->
Their words.
<!-- end by hand -->

When a card goes to the Hub, each mark is given a hash of the words below it, <!-- by hand: limits 0a1b2c3d ... -->, so
that whoever has both versions can tell which of them was changed since.
"""

import hashlib
import re
from typing import Any, NamedTuple

import yaml

MARKED = re.compile(
    r"<!-- by hand: (?P<name>\w+)(?: (?P<published>[0-9a-f]{8}))?(?P<note>[^>]*)-->\n"
    r"(?P<words>.*?)<!-- end by hand -->",
    flags=re.DOTALL,
)


class Section(NamedTuple):
    """A part of a card that belongs to a person. published: the hash of its words when they last went to the Hub."""

    name: str
    published: str | None
    note: str
    words: str

    def is_edited(self, default: "Section | None") -> bool:
        """Whether a person has changed it since it was published, or if it never was, since the template."""
        if self.published is not None:
            return self.published != hash_of(self.words)
        return default is None or self.words.strip() != default.words.strip()

    def text(self, publishes: bool) -> str:
        mark = hash_of(self.words) if publishes else self.published
        return f"<!-- by hand: {self.name}{f' {mark}' if mark else ''}{self.note}-->\n{self.words}<!-- end by hand -->"


def sections(card: str | None) -> dict[str, Section]:
    """The sections of a card that belong to a person, by name."""
    return {found["name"]: Section(*found.groups()) for found in MARKED.finditer(_unix(card))}


def merge(body: str, own: str | None, published: str | None, publishes: bool) -> str:
    """`body`, a card fresh from the template, with the words of the one beside the run, `own`, and the one on the Hub.

    publishes: whether the result goes to the Hub. Raises ValueError if a section was changed in both.
    """
    default, here, there = sections(body), sections(own), sections(published)
    chosen = {name: _choose(name, default, here, there).text(publishes) for name in {**default, **here, **there}}
    body = MARKED.sub(lambda found: chosen[found["name"]], body)
    return "\n".join([body, *(text + "\n" for name, text in chosen.items() if name not in default)])


def _choose(name: str, default: dict, here: dict, there: dict) -> Section:
    """Of a section's versions the one that a person has changed last."""
    versions = [found[name] for found in (there, here, default) if name in found]
    if name not in here or name not in there or here[name].words.strip() == there[name].words.strip():
        return versions[0]
    is_edited = here[name].is_edited(default.get(name))
    if is_edited and there[name].is_edited(default.get(name)):
        raise ValueError(
            f"the section {name!r} of README.md was changed both here and on the Hub: give both the same words first"
        )
    return here[name] if is_edited else there[name]


def is_foreign(card: str | None) -> bool:
    """Whether a README is all a person's: it has words, and none of our marks. A header alone, as the Hub's web page
    makes it, is nobody's."""
    return bool(split_header(card)[1].strip()) and not sections(card)


def split_header(card: str | None) -> tuple[dict[str, Any], str]:
    """The YAML header of a card and what is below. A header that cannot be read counts as none."""
    text = _unix(card)
    found = re.match(r"---\n(.*?)\n?---(?:\n|$)", text, flags=re.DOTALL)
    if found is None:
        return {}, text
    try:
        header = yaml.safe_load(found[1])
    except yaml.YAMLError:
        header = None
    return header if isinstance(header, dict) else {}, text[found.end() :]


def hash_of(words: str) -> str:
    return hashlib.sha256(words.strip().encode()).hexdigest()[:8]


def _unix(text: str | None) -> str:
    return (text or "").replace("\r\n", "\n")
