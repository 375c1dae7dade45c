"""Grades mathematical answers: math-verify's comparison, of what a completion gives as its answer.

An answer may also be a word, which is no value: the letter of a choice, true or false, a date.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple
from unicodedata import normalize

from espo_rl.config import TaskSection
from espo_rl.tasks.answer_text import USUAL, final_text, plain_numbers


def math(completion: str, answer: str, tags: TaskSection = USUAL) -> bool:
    """Whether math-verify finds the completion's answer equal to the reference's.

    The last `\\boxed{}` counts where there is one, as in the usual prompts for reasoning models. A
    reference such as `B`, `(B) 12`, `option B` is a choice: `(B)`, `B) 12`, "the answer is B" are
    right. May take for ever on an absurd answer: for a process that can be killed.
    """
    text = final_text(completion, tags)
    if word := _wanted(answer):
        return word.text == word.kind.given(text)
    if (said := _name_said(text, _name(answer))) is not None:
        return said
    reference = _parsed(f"${_one_line(answer)}$")
    if _equal(reference, _given(text)):
        return True
    # A reference of several values may be answered in as many boxes, with words between them.
    parts = len(getattr(reference[0], "args", ())) if _is_list(reference) else 0
    boxes = list(dict.fromkeys(box.text for box in _boxes(text)))[-parts:]
    given = _boxed(boxes) if 1 < parts == len(boxes) else []
    return _equal(reference, given)


def math_answer(completion: str, answer: str, tags: TaskSection = USUAL) -> str | None:
    """What `math` compares with the reference: sympy's writing of it, or a word.

    Equal numbers are written alike: `x = 0.50` as `1/2`.
    """
    text = final_text(completion, tags)
    if word := _wanted(answer):
        return word.kind.given(text)
    given = _given(text)
    if not given:
        return None
    try:
        value = _unnamed(_result(given[0]))
        number = _without_percent(value)
        return str(_exact(number)) + ("" if number is value else "%")
    except (ValueError, RecursionError, AttributeError):
        # Python writes no number of more than 4,300 digits; a chain in which two sides are one
        # number cannot be written anew.
        return str(given[-1])


# -- values ----------------------------------------------------------------------------------------


def _equal(reference: list[Any], given: list[Any]) -> bool:
    """math-verify's comparison, by size for what is small, and with or without a percent sign."""
    from math_verify import verify

    def same(wanted: list[Any], answer: list[Any]) -> bool:
        found = verify(wanted, answer, allow_set_relation_comp=True, timeout_seconds=None)
        return found and _near(_unnamed(wanted[0]), _unnamed(answer[0]))

    if not reference or not given:
        return False
    if same(reference, given):
        return True
    bare = [_unnamed(parsed[0]) for parsed in (reference, given)]
    wanted, answer = map(_without_percent, bare)
    return (wanted is bare[0]) is not (answer is bare[1]) and same([wanted], [answer])


def _near(wanted: Any, answer: Any) -> bool:
    """That two numbers which math-verify takes for equal are so relative to their size.

    It compares six decimals, or what is left above 1e-16, so all that is smaller is alike to it.
    """
    numbers = [getattr(value, "is_number", False) for value in (wanted, answer)]
    if all(numbers) and wanted != answer:
        one, other = (value.doit().evalf() for value in (wanted, answer))
        near = abs(one - other) <= NEAR * max(abs(one), abs(other), key=float)
        # Of what is 0 but does not look like it, rounding leaves a size as good as any.
        return bool(near) or bool((wanted - answer).doit().equals(0))
    parts = [getattr(value, "args", ()) for value in (wanted, answer)]
    if any(numbers) or type(wanted) is not type(answer) or len(parts[0]) != len(parts[1]):
        return True
    return all(map(_near, *parts))


#: of the size of two equal numbers, how far apart they may be: as six decimals are for 0.1
NEAR = 1e-5


def _result(value: Any) -> Any:
    """What a chain of equations, or one of numbers alone, comes to: 25 of 5 · 5 = 25; any other
    value as it is, such as a curve's equation."""
    links = value._unsorted_args if type(value).__name__ == "And" else [value]
    if any(type(link).__name__ != "Equality" for link in links):
        return value
    result = links[-1].rhs
    known = value if len(links) == 1 else result
    return value if known.free_symbols else result


def _unnamed(value: Any) -> Any:
    """The value of x = value; any other as it is."""
    named = type(value).__name__ == "Equality" and value.lhs.is_Symbol
    return value.rhs if named else value


def _without_percent(value: Any) -> Any:
    """12.5 of 12.5 %; any other as it is."""
    factors = getattr(value, "args", ()) if getattr(value, "is_Mul", False) else ()
    rest = [factor for factor in factors if type(factor).__name__ != "UnevaluatedExpr"]
    return value.func(*rest) if len(rest) == len(factors) - 1 else value


def _exact(value: Any) -> Any:
    """With fractions in the place of decimals."""
    from sympy import Basic, Rational

    if not isinstance(value, Basic):
        return value
    return value.replace(lambda part: part.is_Float, lambda part: Rational(str(part)))


def _given(text: str) -> list[Any]:
    """The last boxes; of a text without any all of it."""
    boxes = _last_boxes(text)
    return _boxed(boxes) if boxes else _parsed(text)


def _last_boxes(text: str) -> list[str]:
    """What is in the last box, or the last several where only a comma or an "and" parts them."""
    boxes = _boxes(text)
    start = max(len(boxes) - 1, 0)
    while start and boxes[start - 1].text:
        if not _BETWEEN.fullmatch(text[boxes[start - 1].end : boxes[start].start][:40]):
            break
        start -= 1
    return list(dict.fromkeys(box.text for box in boxes[start:]))


def _boxed(values: Sequence[str]) -> list[Any]:
    from math_verify import LatexExtractionConfig

    # By itself math-verify looks for a number in what is no LaTeX: 5 in \ne 5.
    return _parsed(r"$\boxed{" + ", ".join(values) + " }$", [LatexExtractionConfig()])


def _parsed(text: str, *extraction: Any) -> list[Any]:
    """The value that math-verify finds in a text; as sympy has it, then as it is written."""
    from math_verify import parse

    # It warns that its timeouts are off. They use SIGALRM, which is for main threads alone.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return list(parse(_tidy(text), *extraction, parsing_timeout=None))


def _is_list(parsed: list[Any]) -> bool:
    return bool(parsed) and type(parsed[0]).__name__ == "FiniteSet"


def _one_line(answer: str) -> str:
    """A reference without line breaks and without the marks of a formula around it."""
    answer = " ".join(answer.split())
    display = re.fullmatch(r"\\\[(.*)\\\]|\$\$(.*)\$\$", answer)
    return answer if display is None else display[1] or display[2]


def _tidy(text: str) -> str:
    """Spellings that math-verify does not know, in those that it does."""
    text = text.replace(r"\fbox", r"\boxed").replace("°", r"^\circ ")
    text = re.sub(r"(?<![\w)])\*\*|\*\*(?![\w(])", "", text)  # Markdown's, no powers
    text = re.sub(r"\\(?:bf|[lL]arge|[hH]uge)(?![a-z])", "", text)
    text = re.sub(r"\\(?:approx|sim)(?![a-z])|≈", "=", text)
    text = re.sub(r"(?<=\{)\s*=", "", text)
    text = re.sub(
        r"\bUS\s*(?=\\?\$\s*\d)|(?:[€£¥₹]|\bRs\.?)(?=\s*\d)"
        r"|(?<=\d)\s*~?(?:[€£¥₹](?!\s*\d)|(?:dollars?|euros?|pounds?|USD|EUR|GBP)\b)",
        "",
        text,
    )
    text = _UPRIGHT.sub(lambda one: " " * bool(one[1]) + one[2], text)
    text = _SUPERSCRIPT.sub(lambda power: f"^{{{normalize('NFKC', power.group())}}}", text)
    text = _VULGAR.sub(lambda part: f" {normalize('NFKC', part.group())}".replace("⁄", "/"), text)
    text = re.sub(r"√\s*(\d+(?:\.\d+)?|\w+)", r"\\sqrt{\1}", text)
    text = text.replace("∞", r"\infty ").replace("·", r"\cdot ").replace("~", " ")
    text = _PERCENT.sub(r"\1 \\cdot 1\\%", text)
    text = plain_numbers(text)
    text = _SCIENTIFIC.sub(lambda number: f"{Decimal(number.group()):f}", text)
    text = _MIXED.sub(_mixed, re.sub(r"(?<!\\)\\ ", " ", text))
    return re.sub(r"(?<=\d)\.(?=\s*\})", "", text)


# The imaginary unit, Euler's number, vectors of a basis, a number in bold: no units of measure
_UPRIGHT = re.compile(
    r"(?:(?<=([A-Za-z]))|)\\(?:math(?:rm|bf|it)|text(?:bf|it)|bm|boldsymbol)\s*"
    r"\{([eijk]|-?[\d.]+)\}"
)
_SUPERSCRIPT = re.compile("[⁺⁻]?[⁰¹²³⁴-⁹]+")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
# 2e+3 is Euler's number and 3 where neither a point, a 1 nor a second digit says otherwise
_SCIENTIFIC = re.compile(
    r"(?i)(?<![\w.])"
    r"(?:(?:\d+|\d*\.\d+)e\d{1,3}|(?:1|\d*\.\d+)e[+-]\d{1,3}|\d+e[+-]\d{2,3})"
    r"(?![\w.^])"
)
# math-verify knows percents of plain numbers alone; a fraction or a root may end in a digit, too
_ENDS_IN_DIGIT = r"\\[dtc]?frac\s*(?:\{.{0,99}?\}|\d)\s*\d|\\sqrt\s*\d"
_PERCENT = re.compile(rf"({_ENDS_IN_DIGIT}|[}})])(?:\s|\\[,;:! ])*\\?%")
_MIXED = re.compile(r"(?<![\w.^/}])(\d{1,9})(?:\s|\\[,;:])+(\d{1,9})/(\d{1,9})(?![\w/^])")


def _mixed(number: re.Match[str]) -> str:
    """1 1/2 as 3/2, of which math-verify would read 1."""
    whole, over, under = map(int, number.groups())
    return f"{whole * under + over}/{under}"


class Box(NamedTuple):
    """A `\\boxed{}` in a text: from where to where, and what is in it."""

    start: int
    end: int
    text: str


def _boxes(text: str) -> list[Box]:
    """The last boxes of a text, those inside of others left out."""
    boxes: list[Box] = []
    for match in list(_BOXED.finditer(text))[-MOST_BOXES:]:
        if boxes and match.start() < boxes[-1].end:
            continue
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += 0 if text[end - 1] == "\\" else {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth:  # never closed
            end = match.end()
        boxes.append(Box(match.start(), end, text[match.end() : end - 1].strip()))
    return boxes


#: as many answers as anyone gives; a text that repeats itself has thousands
MOST_BOXES = 64
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BETWEEN = re.compile(
    r"[\s$*,;&()\\]*(?:\\?text\s*\{)?\s*(?:,|;|and|or)?\s*\}?[\s$*,;&()\\]*(?:[A-Za-z]\w?\s*=\s*)?"
)


# -- words -----------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """Words of one kind: how one stands in a reference, in a box, in a text that states it."""

    reference: re.Pattern[str]
    boxed: re.Pattern[str]
    stated: re.Pattern[str]
    named: re.Pattern[str]  # in passing, which counts where none is stated

    def given(self, text: str) -> str | None:
        """The word that a completion answers with."""
        if boxes := _last_boxes(text):
            words = {_first(self.boxed.match(_bare(box))) for box in boxes} - {None}
            return words.pop() if len(words) == 1 else None  # several are no answer
        text = _bare(text)
        *_, last = None, *self.named.finditer(text)
        *_, last = last, *self.stated.finditer(text)
        return _first(last or self.reference.fullmatch(text))


class Word(NamedTuple):
    """A reference that is a word."""

    kind: Kind
    text: str


def _wanted(answer: str) -> Word | None:
    for kind in _KINDS:
        if word := _first(kind.reference.match(_bare(answer))):
            return Word(kind, word)
    return None


def _first(match: re.Match[str] | None) -> str | None:
    """Its word, in capitals where it is a letter."""
    word = match and match.group(1)
    return word and (word.upper() if len(word) == 1 else word.lower())


def _name(text: str) -> str:
    """A text that is a name, such as "New York", in one spelling; else nothing.

    As a value it is a product of its letters, as which east is seat. With less than four letters
    it may be one.
    """
    found = _NAME.fullmatch(_bare(text))
    return found[1].casefold() if found else ""


def _name_said(text: str, name: str) -> bool | None:
    """Whether a completion answers with a name; None where it does not answer with any."""
    if not name:
        return None
    if boxes := _last_boxes(text):
        names = {*map(_name, boxes)} - {""}
        return names == {name} if names else None
    *_, last = None, *re.finditer(_SAID, _bare(text))
    if last is None:
        return None
    follows = last.string[last.end() :].casefold()
    if re.match(rf"{re.escape(name)}(?![\w'])", follows):
        return True
    return False if re.match(r"[a-z]{2,}(?:[.,;!?]|$)", follows) else None  # another name


def _bare(text: str) -> str:
    """A text without the markup of TeX and Markdown."""
    return " ".join(_MARKUP.sub(" ", text).split())


_MARKUP = re.compile(r"\\(?:text|math|boxed|fbox)[a-z]*(?=\s*\{)|\\[()\[\],;:! ]|[{}$*~]")
_SAID = r"(?i:(?:answer|option|choice) is:?|answer ?:) ?"
_NAMED = r"(?i:answer) "
_OPTION = r"(?i:option |choice )?\(? ?"
_TRUTH = "((?i:true|false|yes|no))"
_DATE = r"(\d{4}-\d\d-\d\d)"  # as a value, a difference
_NAME = re.compile(r"((?!inf)[A-Za-z]{4,}(?: [A-Za-z]+)*)\.?")
_KINDS = (
    Kind(
        re.compile(rf"{_OPTION}([A-Z]) ?(?:$|[).:]+(?: |$))"),
        re.compile(rf"{_OPTION}([A-Za-z])(?: ?[).:]|$|(?<=[A-Z]) ?=)"),
        re.compile(rf"{_SAID}{_OPTION}([A-Z])(?![\w'])"),
        re.compile(rf"{_NAMED}{_OPTION}([A-Z])(?![\w'])"),
    ),
    *(
        Kind(
            re.compile(rf"{word}\.?$"),
            re.compile(rf"{word}\.?$"),
            re.compile(rf"{_SAID}{word}(?![\w'])"),
            re.compile(rf"{_NAMED}{word}(?![\w'])"),
        )
        for word in (_TRUTH, _DATE)
    ),
)
