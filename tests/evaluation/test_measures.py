"""The published metrics: their check values, the quirks of the official scripts, and a second way to compute each."""

import math
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from visual_ground.errors import GroundingStateError, GroundingValueError
from visual_ground.evaluation.measures import captions as caption_measures
from visual_ground.evaluation.measures.captions import caption_scores, tokenise_with_java
from visual_ground.evaluation.measures.composed import average_precision_at, ranking, recalls
from visual_ground.evaluation.measures.ptb import caption_words
from visual_ground.evaluation.measures.vqa import normalise_answer, vqa_accuracy

WORDS = st.text("abc ", min_size=1, max_size=4)


@pytest.mark.parametrize("matches, accuracy", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_out_one_person_at_a_time(matches, accuracy):
    people = ["cat"] * matches + [f"dog {i}" for i in range(10 - matches)]
    assert vqa_accuracy("cat", people) == pytest.approx(accuracy, abs=1e-12)


@given(answer=WORDS, people=st.lists(WORDS, min_size=10, max_size=10))
def test_vqa_accuracy_equals_the_official_loop_and_the_order_of_people_does_not_matter(answer, people):
    # As the paper defines it: leave each person out, and look how many of the others agree.
    if len({one.strip() for one in people}) > 1:
        said, told = normalise_answer(answer), [normalise_answer(one) for one in people]
    else:
        said, told = answer.strip(), [one.strip() for one in people]
    rows = [[one == said for j, one in enumerate(told) if j != i] for i in range(10)]
    expected = np.minimum(1, np.sum(rows, axis=1) / 3).mean()
    assert vqa_accuracy(answer, people) == pytest.approx(expected, abs=1e-9)
    assert vqa_accuracy(answer, people[::-1]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "answer, normal",
    [
        ("The  Cat.", "cat"),
        ("a man on an elephant", "man on elephant"),
        ("two", "2"),
        ("none", "0"),
        ("dont", "don't"),
        ("shouldntve", "shouldntve"),
        ("shouldnt've", "shouldn't've"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("red, blue", "red blue"),
        ("red,blue", "red blue"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        # The official look-behind is misspelt: a point after a digit goes too.
        ("3.", "3"),
        ("page 3. yes", "page 3 yes"),
        # The official script has this contraction the wrong way round.
        ("somebody'd", "somebodyd"),
        # It passes re.UNICODE, 32, as the count: the 33rd point stays.
        ("x." * 33, "x" * 33 + "."),
        ("what?\nno!\t", "what no"),
    ],
)
def test_answers_are_normalised_as_in_the_official_script(answer, normal):
    assert normalise_answer(answer) == normal


def test_nothing_is_normalised_where_all_people_agree():
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1
    assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1


def test_vqa_accuracy_without_others_is_refused():
    with pytest.raises(GroundingValueError, match="there are 1"):
        vqa_accuracy("yes", ["yes"])


# What Stanford's tokenizer, with the options of the published scripts, gives, without the punctuation they leave out.
STANFORD = [
    ("A man's dog isn't in the U.S. today.", "a man 's dog is n't in the u.s. today"),
    ('Two dogs, a cat; and 3.5 kg of "food".', "two dogs a cat and 3.5 kg of food"),
    (
        "He cannot (or won't) say: 'hello' -- gonna be late...",
        "he can not -lrb- or wo n't -rrb- say hello gon na be late",
    ),
    ("It's 10:30 a.m. at Mr. Smith's 5-year-old house!", "it 's 10:30 a.m. at mr. smith 's 5-year-old house"),
    ("A $5 bill and 50% off & more.", "a $ 5 bill and 50 % off & more"),
    ("The dogs' toys [red] {blue}.", "the dogs toys -lsb- red -rsb- -lcb- blue -rcb-"),
    ("I'd've thought they'd've done it, y'all.", "i 'd 've thought they 'd 've done it y' all"),
    ("A woman in 1,000 pieces of cloth - a dress.", "a woman in 1,000 pieces of cloth a dress"),
    ("'tis a man w/ hat and/or coat, what?! no!!!", "'t is a man w / hat and/or coat what ?! no !!!"),
    ("e-mail me@x.com or http://a.org.", "e-mail me@x.com or http://a.org"),
    (
        "Children\u2019s party \u201cnice\u201d caf\xe9 na\xefve \u2013 yes",
        "children 's party nice caf\xe9 na\xefve yes",
    ),
    ("it costs $3.50, not \xa34 or \u20ac5.", "it costs $ 3.50 not # 4 or $ 5"),
]


@pytest.mark.parametrize("caption, words", STANFORD)
def test_captions_are_split_as_by_stanfords_tokenizer(caption, words):
    assert caption_words(caption) == words


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")
def test_stanfords_tokenizer_itself_gives_the_same():
    found = tokenise_with_java({str(i): [caption, ""] for i, (caption, _) in enumerate(STANFORD)})
    assert found == {str(i): [words, ""] for i, (_, words) in enumerate(STANFORD)}


def test_without_java_its_tokenizer_says_what_to_do(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(GroundingStateError, match='Install a Java runtime, or take tokenizer="python"'):
        tokenise_with_java({"1": ["a cat"]})


CAPTIONS = {"1": "a cat on a red mat", "2": "two dogs run", "3": "a man with a hat"}
REFERENCES = {
    "1": ["a cat sits on a mat", "the red mat has a cat on it"],
    "2": ["two dogs run fast", "dogs", "two dogs run on a beach in the sun"],
    "3": ["a woman with a hat on her head"],
}


def cider_d(captions, references):
    """Return CIDEr-D of each image from dense vectors, by its definition."""

    def grams(text, n):
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    scores = {}
    for name, caption in captions.items():
        total = 0.0
        for n in range(1, 5):
            documents = Counter(g for refs in references.values() for g in {g for ref in refs for g in grams(ref, n)})
            vocabulary = sorted({*documents, *grams(caption, n)})
            idf = np.array([math.log(len(references)) - math.log(max(1, documents[g])) for g in vocabulary])
            said = np.array([grams(caption, n)[g] for g in vocabulary]) * idf
            for reference in references[name]:
                right = np.array([grams(reference, n)[g] for g in vocabulary]) * idf
                norms = np.linalg.norm(said) * np.linalg.norm(right)
                # The scorers count a length in bigrams.
                longer = (len(caption.split()) - 1) - (len(reference.split()) - 1)
                longer = longer if reference.split()[1:] else len(caption.split()) - 1
                similar = (np.minimum(said, right) @ right) / norms if norms else 0.0
                total += similar * math.exp(-(longer**2) / 72) / len(references[name])
        scores[name] = 10 * total / 4
    return scores


def test_cider_equals_its_definition():
    found = caption_scores(CAPTIONS, REFERENCES).cider
    assert found == pytest.approx(cider_d(CAPTIONS, REFERENCES), abs=1e-9)
    assert min(found.values()) > 0


def test_bleu_equals_its_definition():
    found = caption_scores(CAPTIONS, REFERENCES).bleu
    # By hand: 13 of 14 words, 8 of 11 pairs, 3 of 8 triples and 0 of 5 quadruples are in a reference; the references
    # that are closest in length have 6, 4 and 8 words.
    brevity = math.exp(1 - 18 / 14)
    precisions = [(clipped + 1e-15) / (of + 1e-9) for clipped, of in ((13, 14), (8, 11), (3, 8), (0, 5))]
    expected = [brevity * math.prod(precisions[:n]) ** (1 / n) for n in range(1, 5)]
    assert found == pytest.approx(expected, abs=1e-6)


def test_cider_of_one_image_alone_is_zero():
    assert caption_scores({"1": "a cat"}, {"1": ["a cat"]}).cider == {"1": 0}


def test_captions_and_references_of_other_images_are_refused():
    with pytest.raises(GroundingValueError, match=r"1 of them without references \['2'\], and 1 .* captions \['3'\]"):
        caption_scores({"1": "a", "2": "b"}, {"1": ["a"], "3": ["b"]})
    with pytest.raises(GroundingValueError, match="at least one"):
        caption_scores({}, {})
    with pytest.raises(GroundingValueError, match=r"has words: \['1'\]"):
        caption_scores({"1": "a", "2": "b"}, {"1": [".", ""], "2": ["b"]})


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(GroundingStateError, match=r"visual-ground\[captions\]"):
        caption_measures.caption_scores({"1": "a"}, {"1": ["a"]})


def test_average_precision_has_its_check_value():
    assert average_precision_at(["x", "a", "b"], {"a", "b"}, 5) == pytest.approx(7 / 12, abs=1e-12)
    assert average_precision_at(["x", "a", "b"], {"a", "b"}, 2) == pytest.approx(0.25, abs=1e-12)
    assert average_precision_at(["a"], {"a", "b", "c"}, 1) == 1


SCORES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=2, max_size=8)


@given(scores=SCORES, data=st.data())
def test_rankings_depend_on_no_order_and_ties_count_against_the_right_one(scores, data):
    names = [f"n{i}" for i in range(len(scores))]
    right = {data.draw(st.sampled_from(names))}
    ranked = ranking(scores, names, right, set())
    order = data.draw(st.permutations(range(len(scores))))
    permuted = ranking([scores[i] for i in order], [names[i] for i in order], right, set())
    place = ranked.index(*right)
    assert permuted.index(*right) == place
    mine = scores[names.index(*right)]
    assert place == sum(score >= mine for score in scores) - 1
    found = recalls(ranked, right, range(1, len(scores) + 1))
    assert list(found.values()) == sorted(found.values())
    assert found[f"r{place + 1}"] == 100
    for k in range(1, len(scores) + 1):
        expected = 1 / (place + 1) if place < k else 0
        assert average_precision_at(ranked, right, k) == pytest.approx(expected)


def test_bad_rankings_are_refused():
    with pytest.raises(GroundingValueError, match=r"1 of 2 images are not numbers, such as those of \['b'\]"):
        ranking([1.0, float("nan")], ["a", "b"], {"a"}, set())
    with pytest.raises(GroundingValueError, match="no image to search: 1 were given, 1 taken out"):
        ranking([1.0], ["a"], set(), {"a"})
    with pytest.raises(GroundingValueError, match="0 right ones"):
        average_precision_at(["a"], set(), 1)
    with pytest.raises(GroundingValueError, match="1 repetitions"):
        average_precision_at(["a", "a"], {"a"}, 1)
