"""Stop criteria as text: ``completeness > 0.98 and cc_half > 0.5``, read into a tree that is safe to evaluate.

    criterion  = ["run:" | "sample:"] or
    or         = and { "or" and }          and = not { "and" not }          not = "not" not | "(" or ")" | comparison
    comparison = value ("<" | "<=" | ">" | ">=" | "==" | "!=") value
    value      = number | quantity | quantity "(" number ")" | aggregate "(" column ")"

Nothing of it is ever given to Python's `eval`.
"""

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from storage.errors import BadCriterion

__all__ = ["AGGREGATES", "MERGED", "QUANTITIES", "Comparison", "Criterion", "Junction", "Negation", "Quantity",
           "read_criteria", "read_criterion"]  # fmt: skip

Scope = Literal["run", "sample"]

MERGED = {
    "completeness": "unique reflections observed / possible, to d_min",
    "multiplicity": "observations of each of them",
    "cc_half": "correlation of the means of two half sets of frames",
    "cc_star": "estimated correlation with the true intensities",
    "r_split": "difference of the half sets, relative to their mean",
    "i_over_sigma": "mean I/σ(I) of unique reflections",
    "resolution": "Å, up to which CC1/2 stays above 0.3, shell by shell",
    "n_observations": "reflections merged",
}
QUANTITIES = {
    "minutes": "from the start of the run to the last analysed chunk; of a sample, the sum over its runs",
    "n_frames": "frames analysed",
    "n_hits": "hits among them",
    "n_indexed": "frames with a lattice",
    "n_crystals": "lattices",
    "n_chunks": "chunks analysed",
    "n_runs": "runs with at least one analysed chunk",
    "hit_rate": "hits / frames",
    "indexing_rate": "indexed frames / hits",
    **MERGED,
}


def _of_all(function: Callable[[np.ndarray], float]) -> Callable[[np.ndarray], float | None]:
    return lambda values: float(function(values)) if len(values) else None


# Of the values that are there: not-a-number and empty ones are left out before.
AGGREGATES: dict[str, Callable[[np.ndarray], float | None]] = {
    "count": lambda values: float(np.count_nonzero(values)),
    "sum": lambda values: float(values.sum()),
    "mean": _of_all(np.mean),
    "median": _of_all(np.median),
    "min": _of_all(np.min),
    "max": _of_all(np.max),
    "std": _of_all(np.std),
}
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_TURNED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
_TOKEN = re.compile(
    r"\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?![\w.])|(?P<name>[A-Za-z_]\w*)|(?P<sign><=|>=|==|!=|[<>()=]))",
    re.ASCII,
)
_LONGEST = 1000
_DEEPEST = 20


@dataclass(frozen=True)
class Quantity:
    """What a criterion compares: a quantity of the run, with its own d_min (Å) or the usual one, or an aggregate."""

    name: str
    d_min: float | None = None
    column: str | None = None

    def __str__(self) -> str:
        argument = self.column or (f"{self.d_min:g}" if self.d_min is not None else None)
        return f"{self.name}({argument})" if argument else self.name

    @property
    def is_merged(self) -> bool:
        """Whether reflections have to be merged for it."""
        return self.name in MERGED


Values = Mapping[Quantity, float | None]


@dataclass(frozen=True)
class Comparison:
    """``quantity sign limit``; unknown (None) while the quantity is not known."""

    quantity: Quantity
    sign: str
    limit: float

    def holds(self, values: Values) -> bool | None:
        value = values.get(self.quantity)
        return None if value is None or math.isnan(value) else _COMPARE[self.sign](value, self.limit)


@dataclass(frozen=True)
class Negation:
    part: "Node"

    def holds(self, values: Values) -> bool | None:
        inner = self.part.holds(values)
        return None if inner is None else not inner


@dataclass(frozen=True)
class Junction:
    """All of the parts (and), or at least one (or); unknown parts count as SQL's NULL does."""

    kind: Literal["and", "or"]
    parts: tuple["Node", ...]

    def holds(self, values: Values) -> bool | None:
        answers = [part.holds(values) for part in self.parts]
        decisive = self.kind == "or"
        if decisive in answers:
            return decisive
        return None if None in answers else not decisive


Node = Comparison | Negation | Junction


@dataclass(frozen=True)
class Criterion:
    """A stop criterion: of one run, or of a sample over its runs."""

    text: str
    scope: Scope
    tree: Node

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """What it needs to know, each once."""
        return tuple(dict.fromkeys(c.quantity for c in comparisons(self.tree)))

    def is_met(self, values: Values) -> bool:
        """Whether it is true for these values; what is not known is not met."""
        return self.tree.holds(values) is True


def comparisons(node: Node) -> Iterator[Comparison]:
    """All comparisons of a tree."""
    if isinstance(node, Comparison):
        yield node
    elif isinstance(node, Negation):
        yield from comparisons(node.part)
    else:
        for part in node.parts:
            yield from comparisons(part)


def read_criteria(texts: Sequence[str]) -> tuple[Criterion, ...]:
    """Several criteria, each judged for itself.

    Raises
    ------
    BadCriterion : one of them cannot be read; the message repeats it and lists the names there are.
    """
    if isinstance(texts, str):
        raise BadCriterion(f"stop criteria are a list of texts, not the text {texts!r}; write [{texts!r}]")
    return tuple(read_criterion(text) for text in texts)


def read_criterion(text: str) -> Criterion:
    """A criterion from its text, such as ``n_indexed >= 1000`` or ``sample: completeness(2.0) > 0.98``.

    Raises
    ------
    BadCriterion : it cannot be read; the message repeats it and lists the names there are.
    """
    if not isinstance(text, str) or not text.strip():
        raise BadCriterion(f"{text!r} is not a criterion; write one such as n_indexed >= 1000")
    if len(text) > _LONGEST:
        raise BadCriterion(f"a criterion of {len(text)} characters is too long; {_LONGEST} are allowed")
    prefix = re.match(r"\s*(?:per\s+)?(run|sample)\s*:", text)
    body = text[prefix.end() :] if prefix else text
    scope: Scope = "sample" if prefix and prefix[1] == "sample" else "run"
    return Criterion(text.strip(), scope, _Parser(text.strip(), body).whole())


class _Parser:
    """Reads one criterion by recursive descent."""

    def __init__(self, text: str, body: str) -> None:
        self._text, self._at, self._depth = text, 0, 0
        self._tokens = list(self._split(body))

    def whole(self) -> Node:
        tree = self._junction("or", lambda: self._junction("and", self._negation))
        if self._peek()[0] != "end":
            raise self._wrong(f"{self._peek()[1]!r} was not expected; join comparisons with and, or")
        return tree

    def _split(self, body: str) -> Iterator[tuple[str, str]]:
        at, end = 0, len(body.rstrip())
        while at < end:
            found = _TOKEN.match(body, at)
            if found is None:
                raise self._wrong(f"{body[at:].strip()[:20]!r} cannot be read")
            word = found[found.lastgroup or 0]
            kind = found.lastgroup or ""
            if kind == "name" and word.lower() in ("and", "or", "not"):
                kind = word = word.lower()
            yield kind, word
            at = found.end()
        yield "end", "the end"

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._at]

    def _next(self) -> tuple[str, str]:
        token = self._tokens[self._at]
        self._at += token[0] != "end"
        return token

    def _junction(self, kind: Literal["and", "or"], part: Callable[[], Node]) -> Node:
        parts = [part()]
        while self._peek()[0] == kind:
            self._next()
            parts.append(part())
        return parts[0] if len(parts) == 1 else Junction(kind, tuple(parts))

    def _negation(self) -> Node:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._wrong(f"it is nested deeper than {_DEEPEST}; write it flatter")
        try:
            if self._peek()[0] == "not":
                self._next()
                return Negation(self._negation())
            if self._peek()[1] == "(":
                self._next()
                inner = self._junction("or", lambda: self._junction("and", self._negation))
                self._expect(")")
                return inner
            return self._comparison()
        finally:
            self._depth -= 1

    def _comparison(self) -> Comparison:
        left = self._value()
        _, sign = self._next()
        sign = "==" if sign == "=" else sign
        if sign not in _COMPARE:
            raise self._wrong(f"{sign!r} stands where one of {' '.join(_COMPARE)} should")
        right = self._value()
        if isinstance(left, Quantity) and isinstance(right, float):
            return Comparison(left, sign, right)
        if isinstance(left, float) and isinstance(right, Quantity):
            return Comparison(right, _TURNED[sign], left)
        raise self._wrong("a comparison needs a quantity on one side and a number on the other")

    def _value(self) -> Quantity | float:
        kind, word = self._next()
        if kind == "number":
            return self._finite(word)
        if kind != "name":
            raise self._wrong(f"{word!r} stands where a quantity or a number should")
        if self._peek()[1] == "(":
            return self._with_argument(word)
        return self._quantity(word)

    def _finite(self, word: str) -> float:
        number = float(word)
        if not math.isfinite(number):
            raise self._wrong(f"{word} is too large a number")
        return number

    def _with_argument(self, name: str) -> Quantity:
        self._next()
        kind, word = self._next()
        if name in AGGREGATES:
            if kind != "name":
                raise self._wrong(f"{name}({word}) needs the name of a column, such as {name}(n_peaks)")
            quantity = Quantity(name, column=word)
        elif name in MERGED:
            d_min = self._finite(word) if kind == "number" else 0.0
            if not 0.3 <= d_min <= 1000:
                raise self._wrong(f"{name}({word}) needs a resolution in Å, such as {name}(2.0)")
            quantity = Quantity(name, d_min=d_min)
        else:
            self._quantity(name)
            raise self._wrong(f"{name} takes no argument; only {', '.join(AGGREGATES)} and {', '.join(MERGED)} do")
        self._expect(")")
        return quantity

    def _quantity(self, name: str) -> Quantity:
        if name in QUANTITIES:
            return Quantity(name)
        if name in AGGREGATES:
            raise self._wrong(f"{name} needs a column: {name}(n_peaks)")
        near = difflib.get_close_matches(name, [*QUANTITIES, *AGGREGATES], 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise self._wrong(
            f"{name} is not known{meant} There are {', '.join(QUANTITIES)}; of a column of the frames: "
            f"{', '.join(AGGREGATES)}, as in mean({name})"
        )

    def _expect(self, word: str) -> None:
        _, found = self._next()
        if found != word:
            raise self._wrong(f"{found!r} stands where {word!r} should")

    def _wrong(self, why: str) -> BadCriterion:
        return BadCriterion(f"criterion {self._text[:200]!r}: {why}")
