"""Classes as a user names them on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from fastdit.config import DiTConfig
from fastdit.errors import unknown_name, warn

# A name in double quotes, in which two stand for one, or everything up to the next comma.
_WORD = re.compile(r'\s*(?:"((?:[^"]|"")*)"|([^,]*?))\s*(?:,|$)')


def parse_labels(text: str | None, names: Sequence[str] | None, config: DiTConfig) -> list[int]:
    """Return class numbers for comma-separated names and numbers; None means every class.

    A class may have several names, as in ImageNet ("tench, Tinca tinca"), and is meant by all of
    them together or by any of them. What could mean several classes means the one that comes first
    in this order: a class by its whole name; by its number; by one of its names; by its whole name,
    and then by one of its names, without regard to case. Of classes with the same name it is the
    first. A name in double quotes is no number, and is not joined with its neighbours.

    An unconditional model has one class, 0, which cannot be named.

    Raises:
        ValueError: a name is unknown, or fits several names that differ in case; a number is out of
            range; or the model has no classes.
    Warns:
        UserWarning: a name was taken for what could also be a number, or several names.
    """
    if not config.use_class_cond:
        if text is not None:
            raise ValueError("--labels: expected none, since the model is unconditional")
        return [0]
    if text is None:
        return list(range(config.num_classes))
    words, classes = _words(text), _Classes(names or (), config.num_classes)
    longest = max((name.count(",") for name in names or ()), default=0)
    parsed, i = [], 0
    while i < len(words):
        for end in range(min(i + 1 + longest, len(words)), i + 1, -1):
            some = words[i:end]
            whole = None if any(quoted for _, quoted in some) else classes.joined(some)
            if whole is not None:
                parsed.append(whole)
                i = end
                break
        else:
            parsed.append(classes.find(*words[i]))
            i += 1
    return parsed


Word = tuple[str, bool]  # and whether it was quoted


def _words(text: str) -> list[Word]:
    """Split a text at the commas that are not within quotes."""
    found, at = [], 0
    while at <= len(text):
        match = _WORD.match(text, at)
        assert match is not None  # a quote that is not closed is a part of a name
        quoted = match[1] is not None
        found.append((match[1].replace('""', '"') if quoted else match[2], quoted))
        if not match[0].endswith(","):
            break
        at = match.end()
    return found


class _Classes:
    """Finds classes by their names and numbers."""

    def __init__(self, names: Sequence[str], count: int) -> None:
        self.count = count
        self.whole = _first_of((_spaced(name), i) for i, name in enumerate(names))
        parts = ((part.strip(), i) for i, name in enumerate(names) for part in name.split(","))
        self.single = _first_of(parts)

    def joined(self, words: Sequence[Word]) -> int | None:
        """Return the class whose whole name consists of these words, which commas part."""
        name = ", ".join(word for word, _ in words)
        found = _the_one(name, self.whole)
        if found is not None and any(self._meanings(word) != {found} for word, _ in words):
            warn(
                f"--labels: {name!r} was taken as the name of class {found}; with quotes, as in "
                f'"{words[0][0]}","{words[1][0]}", it would be {len(words)} names'
            )
        return found

    def find(self, word: str, quoted: bool) -> int:
        """Return the class that a word means."""
        is_number = self._is_number(word) and not quoted
        found = self.whole.get(_spaced(word))
        if found is None:
            found = int(word) if is_number else self.single.get(word)
        if found is not None:
            if is_number and self._meanings(word) != {found}:
                took = "the number" if found == int(word) else "the name"
                warn(f"--labels: {word}, a name and a number, was taken as {took} of class {found}")
            return found
        for known in (self.whole, self.single):
            found = _the_one(_spaced(word), known)
            if found is not None:
                return found
        if self.single and not (word.lstrip("-").isdecimal() and not quoted):
            raise unknown_name("--labels", word, self.single)
        expected = f"a number in [0, {self.count})" + " or a name" * bool(self.single)
        raise ValueError(f"--labels: expected {expected}, got {word!r}")

    def _meanings(self, word: str) -> set[int]:
        """Return the classes that a word alone can mean."""
        number = {int(word)} if self._is_number(word) else set()
        return number | set(_similar(word, self.single).values())

    def _is_number(self, word: str) -> bool:
        return word.isdecimal() and int(word) < self.count


def _similar(name: str, known: dict[str, int]) -> dict[str, int]:
    """Return the names that a name can mean, with their classes: itself, or else in other case."""
    if name in known:
        return {name: known[name]}
    return {other: i for other, i in known.items() if other.lower() == name.lower()}


def _the_one(name: str, known: dict[str, int]) -> int | None:
    """Return the class of a name, or None; it is a ValueError if the name's case is needed."""
    close = _similar(name, known)
    if len(set(close.values())) > 1:
        some = " and ".join(map(repr, close))
        raise ValueError(f"--labels: expected one of {some}, which differ in case, got {name!r}")
    return next(iter(close.values()), None)


def _first_of(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Return the first class of each name."""
    first: dict[str, int] = {}
    for name, i in pairs:
        first.setdefault(name, i)
    return first


def _spaced(name: str) -> str:
    """Return a name with one space after each comma."""
    return ", ".join(part.strip() for part in name.split(","))
