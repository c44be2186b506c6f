"""Keeps what people write into a card when the card is written again, beside the run or on the Hub.

A person writes in the sections between these marks:

    <!-- by hand: limits (a note on what this is) -->
    Their words.
    <!-- end by hand -->

and in the header: licence, language, tags and every field that does not come from the results.

One card can lie beside the run and in several repositories, and people may edit any of them. A card on the Hub
therefore lists the versions that each section and the header have had, the newest last:

    <!-- by hand: limits 0a1b2c3d 4e5f6a7b ... -->

A version's id is a hash of its words and of the id before it, as the id of a commit in git. Of two cards, the one whose
list contains the newest id of the other is the newer one. If neither list contains the other's, both were changed since
they were the same, and a person has to decide.
"""

import hashlib
import re
from typing import Any, NamedTuple

import yaml

MARKED = re.compile(
    r"<!-- by hand: (?P<name>\w+)(?P<published>(?: [0-9a-f]{8})*)(?P<note>[^>]*)-->\n"
    r"(?P<words>.*?)<!-- end by hand -->",
    flags=re.DOTALL,
)
HEADER = re.compile(r"---\n((?:.*\n)*?)---[ \t]*(?:\n|$)")
HEADER_MARK = re.compile(r"<!-- header as published:((?: [0-9a-f]{8})+) -->\n")
# The fields of a header that come from the results, by the Hub's names and by those of its client.
FROM_RESULTS = ("library_name", "pipeline_tag", "base_model", "datasets", "metrics", "model_name", "model-index")
FROM_RESULTS += ("eval_results",)
PRESET = ("license", "language")  # ours until a person says otherwise


class Section(NamedTuple):
    """A part of a card that belongs to a person."""

    name: str
    published: tuple[str, ...]  # ids of the versions that went to the Hub, the newest last
    note: str  # what the template says about the section, in the mark
    words: str

    def is_edited(self, default: "Section | None") -> bool:
        """Returns whether a person changed it after it was published, or after the template if it never was.

        default: the section as the template has it; None: the template has no such section.
        """
        return self.versions(default) != (self.published or _versions_of(default))

    def versions(self, default: "Section | None") -> tuple[str, ...]:
        """Returns the ids of its versions: the published ones (or the template's), and that of its present words."""
        earlier = self.published or _versions_of(default)
        if earlier and earlier[-1] == _version_id(self.words, *earlier[-2:-1]):
            return earlier  # the newest published version has these words
        return *earlier, _version_id(self.words, *earlier[-1:])

    def text(self) -> str:
        """Returns the section with its marks."""
        mark = " ".join([self.name, *self.published])
        return f"<!-- by hand: {mark}{self.note}-->\n{self.words}<!-- end by hand -->"


def sections(card: str | None) -> dict[str, Section]:
    """Returns the sections of a card that belong to a person, by name."""
    found = (match.groupdict() for match in MARKED.finditer(_unix(card)))
    return {one["name"]: Section(**{**one, "published": tuple(one["published"].split())}) for one in found}


def merge(body: str, own: str | None, published: str | None, publishes: bool) -> str:
    """Returns a card with the words that people wrote into earlier ones.

    Args:
        body: the card, fresh from the template, without its header.
        own: the card beside the run; None: there is none.
        published: the card on the Hub; None: there is none.
        publishes: whether the result goes to the Hub, so that its sections list their versions.

    Raises:
        ValueError: a section was changed both beside the run and on the Hub.
    """
    default, here, there = sections(body), sections(own), sections(published)
    chosen = {}
    for name in {**default, **here, **there}:
        plain = default.get(name)
        section = _newest(here.get(name), there.get(name), plain, f"section {name!r}") or plain
        chosen[name] = (section._replace(published=section.versions(plain)) if publishes else section).text()
    body = MARKED.sub(lambda found: chosen[found["name"]], body)
    return "\n".join([body, *(text + "\n" for name, text in chosen.items() if name not in default)])


def merge_header(
    header: dict[str, Any], own: str | None, published: str | None, publishes: bool
) -> tuple[dict[str, Any], str]:
    """Returns what people changed in the header of a card.

    Args:
        header: the fields as they come from the results.
        own, published, publishes: as in `merge`.

    Returns:
        The changed fields, None for a field that was taken out; and the mark that lists the versions of the header,
        which belongs below it.

    Raises:
        ValueError: the header was changed both beside the run and on the Hub.
    """
    plain = Section("header", (), "", "")
    here, there = _header_section(header, own), _header_section(header, published)
    mine, theirs = _fields(here), _fields(there)
    differ = sorted(name for name in {**mine, **theirs} if mine.get(name, ...) != theirs.get(name, ...))
    newest = _newest(here, there, plain, f"header ({', '.join(differ)})") or plain
    versions = newest.versions(plain) if publishes else newest.published
    fields = _fields(newest)
    if "tags" in fields:
        fields["tags"] = [*header["tags"], *fields["tags"]]
    return fields, f"<!-- header as published: {' '.join(versions)} -->\n" if versions else ""


def _header_section(fresh: dict[str, Any], card: str | None) -> Section | None:
    """Returns the fields of a card's header that belong to a person, as a section of YAML; None if the card has no
    header that can be read."""
    found, body = split_header(card)
    if not found:
        return None
    theirs = {name: value for name, value in found.items() if name not in (*FROM_RESULTS, *PRESET, "tags")}
    is_ours = "library_name" in found  # only from a header of ours can a person have taken a field out
    for name in PRESET:
        if (name in found or is_ours) and found.get(name) != fresh[name]:
            theirs[name] = found.get(name)
    tags = found.get("tags")
    tags = [tags] if isinstance(tags, str) else tags if isinstance(tags, list) else []
    if more := [tag for number, tag in enumerate(tags) if tag not in [*fresh["tags"], *tags[:number]]]:
        theirs["tags"] = more
    mark = HEADER_MARK.search(body)
    published = tuple(mark[1].split()) if mark else ()
    return Section("header", published, "", yaml.safe_dump(theirs, allow_unicode=True) if theirs else "")


def _fields(header: Section | None) -> dict[str, Any]:
    return yaml.safe_load(header.words) or {} if header else {}


def _newest(here: Section | None, there: Section | None, plain: Section | None, what: str) -> Section | None:
    """Returns the newer one of a section beside the run and on the Hub.

    Args:
        plain: the section as the template has it.
        what: what to call the section in an error.

    Raises:
        ValueError: both were changed since they were the same.
    """
    if here is None or there is None:
        return here or there
    ours, theirs = here.versions(plain), there.versions(plain)
    if here.words.strip() == there.words.strip():  # the next version comes after the versions of both
        return there._replace(published=tuple(dict.fromkeys([*there.published, *here.published])))
    if ours[-1] in theirs or not here.published and not here.is_edited(plain):
        return there
    if theirs[-1] in ours or not there.published and not there.is_edited(plain):
        return here
    raise ValueError(f"the {what} of README.md was changed both here and on the Hub: make it the same in both first")


def is_foreign(card: str | None) -> bool:
    """Returns whether a person wrote the whole README: it has words, and none of our marks.

    A header alone does not count: the Hub's web page makes one.
    """
    text = _unix(card)
    header = HEADER.match(text)
    return bool(text[header.end() if header else 0 :].strip()) and not sections(card)


def split_header(card: str | None) -> tuple[dict[str, Any], str]:
    """Returns the YAML header of a card and the text below it. A header that cannot be read counts as none."""
    text = _unix(card)
    found = HEADER.match(text)
    if found is None:
        return {}, text
    try:
        header = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError):  # ValueError: a date that does not exist
        header = None
    header = header if isinstance(header, dict) else {}
    return {name: value for name, value in header.items() if isinstance(name, str)}, text[found.end() :]


def _versions_of(default: Section | None) -> tuple[str, ...]:
    return (_version_id(default.words),) if default else ()


def _version_id(words: str, earlier: str = "") -> str:
    return hashlib.sha256((earlier + words.strip()).encode()).hexdigest()[:8]


def _unix(text: str | None) -> str:
    return (text or "").replace("\r\n", "\n")
