"""VQA accuracy, with the normalisation of the official script and the two slips in it that change scores.

An answer is as right as the ten people agree with it: leaving out each person in turn, a third for each of the others
who gave the same answer, at most 1, averaged over the ten.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from visual_ground.errors import GroundingValueError

MARKS = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBERS["none"] = "0"
ARTICLES = frozenset(("a", "an", "the"))
# As the official script has them: a word whose apostrophe is left out gets it back, and of two, either one.
ONE_APOSTROPHE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's "
    "isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've "
    "shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're "
    "there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd "
    "where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're "
    "you've"
).split()
TWO_APOSTROPHES = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've "
    "there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've"
).split()
CONTRACTIONS = {
    **{word.replace("'", ""): word for word in ONE_APOSTROPHE},
    **{word.replace("'", "", 1): word for word in TWO_APOSTROPHES},
    **{"".join(word.rsplit("'", 1)): word for word in TWO_APOSTROPHES},
    **dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at"),
    **dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've"),
    # A slip of the official script: this one loses its apostrophe instead.
    "somebody'd": "somebodyd",
}
DIGITS_WITH_COMMA = re.compile(r"\d,\d")
# The official look-behind, which should spare a point after a digit, is misspelt and spares none: "3." becomes "3".
POINT = re.compile(r"\.(?!\d)")
# The official script passes the flag re.UNICODE where `sub` has its count.
MOST_POINTS = int(re.UNICODE)


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """Return how right an answer is, from 0 to 1.

    Where all people agree, nothing is normalised, as in the official script: "Yes." is wrong then.

    Args:
        answer: what the model says.
        answers: what each person said, ten of them in VQAv2.

    Example:
        >>> round(vqa_accuracy("two", ["2"] * 3 + ["3"] * 7), 6)
        0.9
    """
    if len(answers) < 2:
        raise GroundingValueError(
            f"VQA accuracy compares each person's answer with the others', and there are {len(answers)}. VQAv2 has ten."
        )
    answer, people = _in_one_line(answer), [_in_one_line(one) for one in answers]
    if len(set(people)) > 1:
        answer, people = normalise_answer(answer), [normalise_answer(one) for one in people]
    agreeing = people.count(answer)
    others = [agreeing - (person == answer) for person in people]
    return sum(min(1.0, count / 3) for count in others) / len(people)


def normalise_answer(answer: str) -> str:
    """Return an answer without punctuation, capitals and articles, with digits for number words.

    Example:
        >>> normalise_answer("The two dogs don't, 1,000.")
        "2 dogs don't 1000"
    """
    return _words(_without_marks(_in_one_line(answer)))


def _in_one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _without_marks(answer: str) -> str:
    """Return an answer without punctuation; a mark between two letters or digits becomes a space."""
    joined = bool(DIGITS_WITH_COMMA.search(answer))
    text = answer
    for mark in MARKS:
        at_edge = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if at_edge or joined else " ")
    return POINT.sub("", text, count=MOST_POINTS)


def _words(answer: str) -> str:
    words = [NUMBERS.get(word, word) for word in answer.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
