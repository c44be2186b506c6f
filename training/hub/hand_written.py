"""What people write into a card stays when the card is written again, be it beside the run or on the Hub:

<!-- by hand: limits (a note on what this is) -->
Their words.
<!-- end by hand -->

So does what they change in the header: licence, language, tags and every field that does not come from the results.

When a card goes to the Hub, it tells of each section and of the header which versions there have been, as hashes:
<!-- by hand: limits 0a1b2c3d 4e5f6a7b ... -->. Each is made with the one before it, like the commits of git, so that of
two cards, of the run or of any place that it was pushed to, one can tell whether the one follows the other, or whether
both were changed since they were the same.
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
    """A part of a card that belongs to a person. published: the versions that went to the Hub, the last one last."""

    name: str
    published: tuple[str, ...]
    note: str
    words: str

    def is_edited(self, default: "Section | None") -> bool:
        """Whether a person has changed it since it was published, or if it never was, since the template."""
        return self.versions(default) != (self.published or _versions_of(default))

    def versions(self, default: "Section | None") -> tuple[str, ...]:
        """Those published, else the template's, and then its words as they are now."""
        earlier = self.published or _versions_of(default)
        if earlier and earlier[-1] == _hash(self.words, *earlier[-2:-1]):
            return earlier
        return *earlier, _hash(self.words, *earlier[-1:])

    def text(self) -> str:
        mark = " ".join([self.name, *self.published])
        return f"<!-- by hand: {mark}{self.note}-->\n{self.words}<!-- end by hand -->"


def sections(card: str | None) -> dict[str, Section]:
    """The sections of a card that belong to a person, by name."""
    found = (match.groupdict() for match in MARKED.finditer(_unix(card)))
    return {one["name"]: Section(**{**one, "published": tuple(one["published"].split())}) for one in found}


def merge(body: str, own: str | None, published: str | None, publishes: bool) -> str:
    """`body`, a card fresh from the template, with the words of the one beside the run, `own`, and the one on the Hub.

    publishes: whether the result goes to the Hub. Raises ValueError if a section was changed in both.
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
    """What people changed of `header`, which is fresh from the results, in the card beside the run or in the one on the
    Hub, None for what they took out; and the mark of its versions, which belongs below the header.

    Raises ValueError if it was changed in both.
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
    """What in the header of a card is a person's, as YAML. None if there is no header, or none that can be read."""
    found, body = split_header(card)
    if not found:
        return None
    theirs = {name: value for name, value in found.items() if name not in (*FROM_RESULTS, *PRESET, "tags")}
    is_ours = "library_name" in found  # in another one, a field that is missing was not taken out
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
    """Of a part's versions beside the run and on the Hub the one that follows the other."""
    if here is None or there is None:
        return here or there
    ours, theirs = here.versions(plain), there.versions(plain)
    if here.words.strip() == there.words.strip():  # from now on it follows both
        return there._replace(published=tuple(dict.fromkeys([*there.published, *here.published])))
    if ours[-1] in theirs or not here.published and not here.is_edited(plain):
        return there
    if theirs[-1] in ours or not there.published and not there.is_edited(plain):
        return here
    raise ValueError(f"the {what} of README.md was changed both here and on the Hub: make it the same in both first")


def is_foreign(card: str | None) -> bool:
    """Whether a README is all a person's: it has words, and none of our marks. A header alone, as the Hub's web page
    makes it, is nobody's."""
    text = _unix(card)
    header = HEADER.match(text)
    return bool(text[header.end() if header else 0 :].strip()) and not sections(card)


def split_header(card: str | None) -> tuple[dict[str, Any], str]:
    """The YAML header of a card and what is below. A header that cannot be read counts as none."""
    text = _unix(card)
    found = HEADER.match(text)
    if found is None:
        return {}, text
    try:
        header = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError):  # ValueError: of a date that there is not
        header = None
    header = header if isinstance(header, dict) else {}
    return {name: value for name, value in header.items() if isinstance(name, str)}, text[found.end() :]


def _versions_of(default: Section | None) -> tuple[str, ...]:
    return (_hash(default.words),) if default else ()


def _hash(words: str, earlier: str = "") -> str:
    return hashlib.sha256((earlier + words.strip()).encode()).hexdigest()[:8]


def _unix(text: str | None) -> str:
    return (text or "").replace("\r\n", "\n")
