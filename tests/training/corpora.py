"""Small texts for the tests of data, and ways to write them to files."""

import json

STORY = "First line.\r\nSecond  line,\twith  spaces \n\n\n  and an odd é, 漢字, 🙂 and <|endoftext|> spelt out.\n" * 30
LINES = [f"Document {n} says {n * n}, and no more than that." for n in range(200)]


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: t}) + "\n" for t in texts), encoding="utf-8")
    return str(path)


def write_text(path, content=STORY):
    path.write_bytes(content.encode())
    return str(path)
