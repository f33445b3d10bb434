"""Four sets of sentences that people rated for sentiment, from files that come with the project.

C. J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text", ICWSM 2014. A sentence counts as positive or negative where its mean rating is more
than half a point away from zero, on a scale of -4 to 4; the others are left out.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import random
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent.parent / "data" / "sentiment"

DOMAINS = {
    "film": "movieReviewSnippets_GroundTruth.txt.gz",
    "product": "amazonReviewSnippets_GroundTruth.txt.gz",
    "tweet": "tweets_GroundTruth.txt.gz",
    "news": "nytEditorialSnippets_GroundTruth.txt.gz",
}

SHA256 = {
    "film": "16e79baf732ee3a22f789114fe87f6457f0dcb1903d5ff4a863b8951be71e2e3",
    "product": "9975b1329e5c215c8112566f1e815675cea958c21d1ae2aea19b8b835f91193b",
    "tweet": "d7f5670dc6367af018b11618ffb684b0633e44da6b3b3e7a90519d05e4d7bcc6",
    "news": "63ddc62e6320bfff945e7a5bac59a1ebcb87205824dc0b82ac916cc93425b0a1",
}


class DataError(ValueError):
    """A file of the data set is missing or damaged."""


class Sentences(NamedTuple):
    """Sentences of one domain, and whether each is positive."""

    texts: list[str]
    positive: list[bool]


def rated(domain: str, root: Path = FOLDER) -> dict[str, list[tuple[str, bool]]]:
    """Read a domain's clearly rated sentences.

    Args:
        domain: One of `DOMAINS`.
        root: The folder that has the files.

    Returns:
        Sentences and whether they are positive, by the document that they are from.

    Raises:
        DataError: The file is missing or damaged; says which and how to get it again.
    """
    path = root / DOMAINS[domain]
    inside = path.is_relative_to(FOLDER)
    source = "git checkout -- " if inside else f"cp {os.path.relpath(FOLDER / path.name)} "
    remedy = f"get it again with: {source}{os.path.relpath(path)}"
    if not path.is_file():
        raise DataError(f"{path} is missing; {remedy}")
    packed = path.read_bytes()
    if hashlib.sha256(packed).hexdigest() != SHA256[domain]:
        raise DataError(f"{path} is damaged: its SHA-256 sum is not the data set's; {remedy}")
    documents: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    for line in gzip.decompress(packed).decode("latin-1").replace("\r", "").split("\n"):
        if line:
            identifier, rating, text = line.split("\t", 2)
            if abs(float(rating)) > 0.5:
                documents[identifier.partition("_")[0]].append((text, float(rating) > 0))
    return documents


def split(domain: str, *sizes: int, root: Path = FOLDER) -> list[Sentences]:
    """Divide a domain's sentences, with all of a document's on one side.

    Args:
        domain: One of `DOMAINS`.
        *sizes: How many sentences each part has at least, of whole documents, or what is left.
        root: The folder that has the files.

    Returns:
        The parts, in a random order that is the same at every call, cut to their sizes.
    """
    documents = list(rated(domain, root).values())
    random.Random(0).shuffle(documents)
    parts = []
    for size in sizes:
        part: list[tuple[str, bool]] = []
        while documents and len(part) < size:
            part += documents.pop()
        parts.append(Sentences(*map(list, zip(*part[:size], strict=True))))
    return parts
