"""What `math` takes for right: in a box, in a text, in several boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from espo_rl.tasks.math_grader import math, math_answer


def limit(box: str, answer: str, right: bool, reason: str) -> Any:
    """What math-verify gets wrong; shows up here should it learn."""
    return pytest.param(box, answer, right, marks=pytest.mark.xfail(strict=True, reason=reason))


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("The answer is east.", True),
        ("**Answer:** East\n\nThe sun rises there.", True),
        ("The answer is $\\text{east}$ because", True),
        ("The answer is east. No: the answer is west.", False),
        ("The answer is west. No: the answer is east.", True),
        ("The answer is $seat$", False),
        ("The answer is eastern", False),
        ("east", False),  # it does not say that it answers
    ],
)
def test_a_name_that_is_stated(text: str, right: bool) -> None:
    assert math(text, "east") is right


@pytest.mark.parametrize(
    ("box", "answer", "right"),
    [
        # As in GSM8K
        ("18", "18", True),
        ("18.00", "18", True),
        ("$18", "18", True),
        (r"\$18.00", "18", True),
        ("18 dollars", "18", True),
        (r"18\text{ dollars}", "18", True),
        ("18 USD", "18", True),
        ("€18", "18", True),
        ("18.", "18", True),
        ("17", "18", False),
        ("180", "18", False),
        ("1,234", "1234", True),
        ("1234", "1,234", True),
        ("1{,}234", "1234", True),
        (r"1\,234", "1234", True),
        (r"12\!,\!345", "12345", True),
        (r"1\ 234\ 567.5", "1234567.5", True),
        ("1 000 000", "1000000", True),
        ("$1,234.50", "1234.5", True),
        (r"\$70{,}000", "70000", True),
        ("1.234", "1234", False),
        ("12", "1,2", False),
        ("18", "$18$", True),
        ("18", r"\boxed{18}", True),
        ("007", "7", True),
        # Fractions and decimals
        (r"\frac12", "1/2", True),
        (r"\dfrac{1}{2}", "0.5", True),
        ("1/2", r"\frac{1}{2}", True),
        (".5", r"\tfrac{1}{2}", True),
        (r"\frac{2}{4}", r"\frac12", True),
        (r"1\frac{1}{2}", r"\frac32", True),
        (r"-\frac12", r"\frac{-1}{2}", True),
        ("0.33", r"\frac{1}{3}", False),
        (r"\frac{1}{3}", r"\frac12", False),
        # Nested braces, roots and constants
        (r"\sqrt{\frac{1}{4}}", r"\frac12", True),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", True),
        (r"\sqrt{12}", r"2\sqrt 3", True),
        (r"\frac{\pi}{2}", r"\pi/2", True),
        (r"\boxed{5}", "5", True),
        (r"\text{18}", "18", True),
        ("3.14", r"\pi", False),
        (r"\binom{5}{2}", "10", True),
        (r"1.5\times10^3", "1500", True),
        ("1e3", "1000", True),
        ("1.5e+3", "1500", True),
        ("-1.5E3", "-1500", True),
        ("1e-3", "0.001", True),
        ("10^{-5}", "1e-05", True),
        ("2e", "2e", True),
        ("2e + 3", "2e+3", True),
        ("6e", "2e3", False),
        ("1 1/2", "3/2", True),
        ("1 1/2", "1", False),
        (r"-1\ 1/2", "-1.5", True),
        ("1.5", "1 1/2", True),
        # Small ones, which differ by less than any decimals
        ("2.5e-7", "1.5e-7", False),
        ("1.5e-7", "1.5e-7", True),
        ("x = 2.5e-7", "1.5e-7", False),
        (r"1.38\times10^{-23}", r"6.63\times10^{-34}", False),
        (r"6.63\times10^{-34}", "6.63e-34", True),
        (r"\frac{1}{3}\cdot 10^{-20}", r"\frac{10^{-20}}{3}", True),
        ("(1e-9, 2)", "(2e-9, 2)", False),
        ("(1e-9, 2)", "(10^{-9}, 2)", True),
        ("0.0000001", "0", False),
        ("0", "1e-9", False),
        (r"(\sqrt{3} + 1)(\sqrt{3} - 1) - 2", "0", True),
        # Signs
        ("-5", "-5", True),
        ("−5", "-5", True),
        ("–5", "-5", True),
        ("−1,234", "-1234", True),
        ("–1 234", "-1,234", True),
        ("-5", "−5", True),
        ("3–5", "-5", False),
        ("5", "-5", False),
        ("-5", "5", False),
        # Intervals, sets, tuples
        ("[0, 1)", "[0,1)", True),
        ("[0,1]", "[0,1)", False),
        ("(0,1)", "[0,1)", False),
        (r"\left[0,\frac12\right)", r"[0,\frac{1}{2})", True),
        (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty,2)\cup(3,\infty)", True),
        (r"x \in [0,1)", "[0,1)", True),
        ("x<2", r"(-\infty, 2)", True),
        (r"(-\infty, 2)", "x<2", True),
        (r"x \ge 1", r"[1, \infty)", True),
        (r"x \le 2", r"(-\infty, 2)", False),
        ("1<x<2", "(1,2)", True),
        (r"\{1,2,3\}", r"\{3,2,1\}", True),
        ("3, 2, 1", r"\{1,2,3\}", True),
        (r"\{1,2\}", r"\{1,2,3\}", False),
        (r"x=2 \text{ or } x=-2", "2,-2", True),
        (r"\pm 2", "-2, 2", True),
        ("(1, 2)", r"\left(1,2\right)", True),
        ("(2,1)", "(1,2)", False),
        limit("1, 2", "(1,2)", False, "an unordered list passes for a tuple"),
        # Units, percent, degrees
        (r"5\text{ cm}", "5", True),
        ("5 cm", r"5\text{ cm}", True),
        (r"10\text{ cm}^2", "10", True),
        ("5 apples", "5", True),
        (r"50\%", "50", True),
        ("0.5", r"50\%", True),
        ("0.5", "50", False),
        (r"12.5\%", "12.5", True),
        ("12.5", r"12.5\%", True),
        ("0.125", r"12.5\%", True),
        (r"x = 12.5\%", "12.5", True),
        (r"12.5\%", r"\frac{25}{2}", True),
        (r"12.6\%", "12.5", False),
        (r"\frac{25}{2}\%", "12.5", True),
        (r"12\frac12\,\%", r"12.5\%", True),
        ("12.5", r"\dfrac{25}{2} \%", True),
        (r"\frac{25}{2}\%", "0.125", True),
        (r"\frac{25}{2}\%", "25", False),
        (r"\sqrt{2}\%", r"\sqrt{2}\%", True),
        (r"\sqrt{2}\%", "2", False),
        (r"\frac{\sqrt{2}}{2}\%", r"\frac{\sqrt2}2 \%", True),
        (r"\frac{\sqrt{4}}{\sqrt{16}}\%", "0.5", True),
        (r"\sqrt[3]{8}\%", r"2\%", True),
        (r"\sqrt[3]{8}\%", "8", False),
        (r"2^{3}\%", r"8\%", True),
        (r"(2 + 3)\%", r"5\%", True),
        (r"(2 + 3)\%", "3", False),
        (r"\{50\%, 25\%\}", r"25\%, 50\%", True),
        (r"10~\text{cm}", "10", True),
        ("18€", "18", True),
        ("18 £", "18", True),
        ("1 euro", "1", True),
        (r"US\$18", "18", True),
        # Letters that are no units
        (r"3\mathbf{i}+99\mathbf{j}", r"3\mathbf{i}-2\mathbf{j}", False),
        (r"3\mathbf{i} - 2\mathbf{j}", r"3\mathbf{i}-2\mathbf{j}", True),
        ("2", r"2\mathrm{i}", False),
        (r"3+4\mathrm{i}", "3+4i", True),
        (r"x = \mathbf{5}", "5", True),
        # Other spellings of Unicode
        ("１８", "18", True),
        ("－5", "-5", True),
        ("（1，2）", "(1,2)", True),
        ("‑5", "-5", True),
        ("½", "0.5", True),
        ("1½", "1.5", True),
        ("√2", r"\sqrt{2}", True),
        ("(-∞, 2)", r"(-\infty, 2)", True),
        ("x²+1", "x^2+1", True),
        ("5·10³", "5000", True),
        ("10⁻³", "0.001", True),
        ("√2.25", "1.5", True),
        ("3 £20", "320", False),
        (r"90^\circ", "90", True),
        ("90°", r"90^{\circ}", True),
        (r"90\text{ degrees}", "90", True),
        ("45°", "90", False),
        limit("10:30 AM", "10:30", True, "AM is no unit"),
        limit("10_2", "10", False, "the base of a number is dropped"),
        # Algebra
        ("x=5", "5", True),
        ("5", "x=5", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("x^2+1", "x^2+2x+1", False),
        ("2x", "2y", False),
        ("2<x", "x>2", True),
        ("x<2", "x>2", False),
        ("4i+3", "3+4i", True),
        ("3:4", "4:3", False),
        ("**5**", "5", True),
        (r"\approx 5", "5", True),
        (r"x \approx 5", "5", True),
        (r"{\bf 5}", "5", True),
        ("₹ 5", "5", True),
        # No value is a part of what stands there.
        (r"\ne 5", "5", False),
        (r"\le 5", "5", False),
        ("2023-01-05", "2023-01-05", True),
        ("2017", "2023-01-05", False),
        # Choices and words
        ("B", "B", True),
        ("b", "B", True),
        ("(B)", "B", True),
        ("B", "(B)", True),
        (r"\textbf{(B)}\ 12", "B", True),
        ("B) 12", r"\text{B}", True),
        ("A", "B", False),
        ("B + 1", "B", False),
        ("12", "B", False),
        (r"\text{Option B}", "B", True),
        (r"\textrm{B}", "B", True),
        (r"\textit{B}", "B", True),
        ("B = 12", "B", True),
        ("A = 12", "B", False),
        ("B", "(B) 12", True),
        ("B", "B: 12", True),
        ("B", "Option B", True),
        ("A", "(B) 12", False),
        ("b", "b", True),
        (r"\text{True}", "true", True),
        ("True", "true", True),
        ("FALSE.", r"\text{False}", True),
        (r"\textbf{Yes}", "yes", True),
        ("true", "false", False),
        (r"\text{East}", "east", True),
        (r"\text{west}", r"\text{east}", False),
        ("no", "yes", False),
        ("seat", "east", False),
        ("New York", r"\text{new york}", True),
        ("New Jersey", "New York", False),
        (r"A}, \boxed{B}, \boxed{D", "D", False),
        (r"12} (\boxed{B}", "B", True),
        (r"B} or \boxed{\text{B}", "B", True),
        # Products of letters, and what is written as a word
        ("E = mgh", "mgh", True),
        (r"x \cdot y \cdot z", "xyz", True),
        (r"\infty", "infinity", True),
        limit(r"\text{the answer is }5", "5", True, "words in the box"),
        # References as they stand in a text
        ("2", "\\begin{pmatrix}1\\\\\n2\\end{pmatrix}", False),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", "\\begin{pmatrix}1\\\\\n2\\end{pmatrix}", True),
        ("x + 1", r"\[x + 1\]", True),
        ("x + 1", "\\[\nx + 1\n\\]", True),
        ("x + 1", r"\(x + 1\)", True),
        ("x + 1", "$$x + 1$$", True),
        # Space, nothing
        (" \n18 ", "18\n", True),
        (r"\ 18\ ", " 18", True),
        ("", "18", False),
        ("?", "18", False),
    ],
)
def test_math_in_a_box(box: str, answer: str, right: bool) -> None:
    assert math(rf"7 + 11, so \boxed{{{box}}}", answer) is right


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (r"\boxed{17}, no: \boxed{18}", "18", True),
        (r"\boxed{18}, no: \boxed{17}", "18", False),
        (r"\boxed{18} is right and 17 is not", "18", True),
        (r"18 first, but then \boxed{17}", "18", False),
        (r"\fbox{18}", "18", True),
        (r"\boxed {7}", "7", True),
        (r"\fbox {7}", "7", True),
        ("\\boxed\n{7}", "7", True),
        (r"\boxed{}. The answer is 5", "5", False),
        (r"\boxed{?} 5", "5", False),
        (r"\boxed{...} $5$", "5", False),
        ("The answer is −1,234", "-1234", True),
        ("The answer is 1.5e3", "1500", True),
        ("The answer is 1 1/2", "3/2", True),
        ("The answer is 1 1/2", "1", False),
        ("The answer is 2023-01-05", "2023-01-05", True),
        ("True", "true", True),
        ("The answer is **false**.", "false", True),
        ("5 is false, so the answer is true", "true", True),
        ("The answer is not true", "true", False),
        ("The answer is option B", "B", True),
        ("The correct option is B.", "B", True),
        ("The answer is B. Option A is wrong.", "B", True),
        (r"\(B\)", "B", True),
        ("Option B", "(B) 12", True),
        (r"\boxed 5", "5", True),
        (r"\boxed{18", "18", False),
        (r"\boxed", "18", False),
        ("#### 18", "18", True),
        ("The answer is 18", "18", True),
        ("The answer is $18.00", "18", True),
        ("Answer: $34$", "34", True),
        (r"The answer is $\frac{3}{4}$.", r"\frac{3}{4}", True),
        ("First 18. The final answer is $17$.", "18", False),
        ("I get 18, then 20. Answer: 20", "18", False),
        ("she makes $1,234 a day", "1234", True),
        ("The answer is B.", "B", True),
        ("The answer is **(B)**, not A", "B", True),
        ("The answer is A. No: the answer is B", "B", True),
        ("The answer is C. Answer choice D is incorrect.", "C", True),
        ("The answer is C. Answer choice D is incorrect.", "D", False),
        ("The answer is B, because answer A is too small", "B", True),
        ("Answer B", "B", True),
        ("Answer: B. Answer A is wrong.", "B", True),
        ("The answer is A.", "B", False),
        ("The answer is a Bear", "B", False),
        ("(B)", "B", True),
        ("A or B", "B", False),
        ("I do not know", "18", False),
        ("", "18", False),
    ],
)
def test_math_in_a_text(completion: str, answer: str, right: bool) -> None:
    assert math(completion, answer) is right


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (r"\boxed{1} and \boxed{2}", "1,2", True),
        (r"$\boxed{2}$ and $\boxed{1}$", "1, 2", True),
        (r"$\boxed{1}$, $\boxed{2}$, and $\boxed{3}$", r"\{1,2,3\}", True),
        (r"$x = \boxed{1}$ or $x = \boxed{2}$", "1,2", True),
        (r"\boxed{x=1} \text{ or } \boxed{x=2}", "1,2", True),
        ("\\[\\boxed{1}\\]\n\\[\\boxed{2}\\]", "1,2", True),
        (r"**\boxed{-1}** and **\boxed{1}**", r"\pm 1", True),
        (r"\boxed{\frac{1}{2}} and \boxed{\sqrt{2}}", r"\frac12,\sqrt2", True),
        (r"\boxed{(1,2)} and \boxed{(3,4)}", "(1,2),(3,4)", True),
        (r"The first is \boxed{1}. The second is \boxed{2}.", "1,2", True),
        (r"so \boxed{1}; in all \boxed{1,2}", "1,2", True),
        (r"\boxed{1} and \boxed{3}", "1,2", False),
        (r"The first is \boxed{1}. The second is \boxed{3}.", "1,2", False),
        (r"\boxed{1} and \boxed{2}", "1,2,3", False),
        # Two answers where there is one are no answer.
        (r"\boxed{1} and \boxed{2}", "2", False),
        (r"\boxed{5}, so \boxed{5}", "5", True),
        (r"\boxed{5} \boxed{5}", "5", True),
    ],
)
def test_math_in_several_boxes(completion: str, answer: str, right: bool) -> None:
    assert math(completion, answer) is right


@pytest.mark.parametrize(
    ("box", "written"),
    [
        *((box, "18") for box in ("18", "18.00", "x = 18", r"\$18")),
        *((box, "1/4") for box in ("0.25", "1/4", r"\frac14", "x = .25")),
        *((box, "25/2%") for box in (r"12.5\%", r"\frac{25}{2}\%", r"\frac{50}{4} \%")),
        *((box, "Interval.open(1/2, 2)") for box in ("(0.5, 2)", r"(\frac12, 2)")),
        # sympy works it out, but Python does not write so long a number
        (r"\binom{20000}{10000}", r"\binom{20000}{10000}"),
        ("", None),
        (r"5 \times 5 = 25", "25"),
        (r"5 \times 5 = 25 = 25.0", "25"),
        ("x = 2.50 = 5/2", "5/2"),
        ("a = b = 0.5", "1/2"),
        ("3.5 = 3.5 = y", "3.5 = 3.5 = y"),
        ("y = 2x + 1", "2*x + 1"),
        ("x + y = 5", "Eq(x + y, 5)"),
        ("x = 1, y = 2", "{Eq(x, 1), Eq(y, 2)}"),
    ],
)
def test_equal_answers_are_one_vote(box: str, written: str | None) -> None:
    assert math_answer(rf"\boxed{{{box}}}", "7") == written


def test_a_text_that_repeats_itself_is_read_in_its_time() -> None:
    assert math(r"\boxed{" * 3000 + r"\boxed{5}", "5")
    assert math(r"\boxed{4} and " * 3000 + r"so \boxed{5}", "5")
    assert not math(r"\boxed{5}" + " " * 5000 + r"\boxed{4}", "5")
    assert not math(rf"\boxed{{{'1' * 5000} 1/2}}", "5")


def test_math_knows_gsm8ks_own_answers() -> None:
    rows = (Path(__file__).parents[2] / "data" / "gsm8k_excerpt.jsonl").read_text().splitlines()
    answers = [json.loads(row)["answer"] for row in rows]
    for answer in answers:
        given = rf"so it is \boxed{{{int(answer):,}}}"
        assert [math(given, other) for other in answers] == [other == answer for other in answers]
